"""Noise levels and their arithmetic: pure functions of a checkpoint's scheduler config (METHOD section 1).

A run of N steps has N+1 levels, index 0 the noisiest and index N the clean latent (`abar` 1 or alphas_cumprod[0], by
the config's `set_alpha_to_one`). Sampling goes up the indices, inversion down: the same two coefficients serve both.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import UsageError

PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Level:
    """One level of a run.

    Attributes:
        index: 0 is the noisiest level of the run, N the clean one.
        timestep: what the network is told there.
        abar: cumulative alpha.
    """

    index: int
    timestep: int
    abar: float


@dataclass(frozen=True)
class Levels:
    """The N+1 levels of a run.

    Attributes:
        timesteps: what the network is told at each level, noisiest first; the clean level's is 0.
        abar: cumulative alpha of each level, float64, increasing.
    """

    timesteps: tuple[int, ...]
    abar: tuple[float, ...]

    @property
    def steps(self) -> int:
        return len(self.abar) - 1

    def path(self, start: int = 0) -> tuple[Level, ...]:
        """The levels from index `start` to the clean one, which samplers go along in pairs."""
        return tuple(Level(i, self.timesteps[i], self.abar[i]) for i in range(start, self.steps + 1))

    def start(self, ratio: float) -> int:
        """Index of the level where the last `int(N * ratio)` steps begin (ratio in (0, 1]), at least one step."""
        if not 0 < ratio <= 1:
            raise UsageError(f"ratio is {ratio}, expected a number in (0, 1]")
        return self.steps - max(1, int(self.steps * ratio + 1e-9))


@dataclass(frozen=True)
class Schedule:
    """A checkpoint's noise schedule.

    Attributes:
        alphas_cumprod: (T,) as floats.
        final_abar: the clean level's.
        prediction: what the network predicts: epsilon, v_prediction or sample.
        spacing: leading, linspace or trailing.
        steps_offset: added to the timesteps of "leading".
    """

    alphas_cumprod: tuple[float, ...]
    final_abar: float
    prediction: str
    spacing: str
    steps_offset: int

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits of all of it."""
        return hashlib.sha256(repr(dataclasses.astuple(self)).encode()).hexdigest()[:16]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """Read any diffusers scheduler config that DDIM can be built from."""
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler.from_config(dict(config))
        prediction = scheduler.config.prediction_type
        if prediction not in PREDICTIONS:
            raise UsageError(f"scheduler: prediction_type is {prediction!r}, expected one of {', '.join(PREDICTIONS)}")
        if prediction == "sample" and float(scheduler.final_alpha_cumprod) == 1:
            raise UsageError(
                "scheduler: with prediction_type sample and set_alpha_to_one the clean level has no noise to be read from a "
                "prediction, so nothing can be inverted; set set_alpha_to_one to false"
            )
        levels = scheduler.alphas_cumprod.double()
        if not bool(((levels >= 0) & (levels <= 1)).all()):  # NaN fails too
            raise UsageError(
                "scheduler: its betas give noise levels outside 0 to 1; they lie between 0 and 1 themselves"
            )
        return cls(
            tuple(float(a) for a in levels),
            float(scheduler.final_alpha_cumprod),
            prediction,
            scheduler.config.timestep_spacing,
            int(scheduler.config.steps_offset),
        )

    def spaced(self, spacing: str | None) -> Schedule:
        """The schedule with its timesteps laid out another way; None leaves it."""
        return self if spacing is None else dataclasses.replace(self, spacing=spacing)

    def levels(self, steps: int) -> Levels:
        """The levels of a run of `steps` steps: the timesteps of diffusers' DDIMScheduler.

        Every step ends at the level that the next one starts from. diffusers' DDIM instead subtracts `T // steps` from the timestep,
        whatever the spacing. With "leading" that is the same. With "linspace" and, where `steps` does not divide T, with
        "trailing" it is not: at 48 steps of 1000 trailing timesteps lie 20 or 21 apart and diffusers always goes 20 back, so
        the latent is noisier than the network is told at the next step. An inversion that retraces the steps needs levels
        that agree.

        Raises:
            UsageError: steps out of range, or a level of pure noise that the prediction type cannot start from.
        """
        total = len(self.alphas_cumprod)
        if not 1 <= steps <= total:
            raise UsageError(f"steps is {steps}, expected 1 to {total}")
        ratio = total // steps
        if self.spacing == "leading":
            times = [i * ratio + self.steps_offset for i in reversed(range(steps))]
        elif self.spacing == "linspace":
            gap = (total - 1) / max(1, steps - 1)
            times = [round(i * gap) for i in reversed(range(steps))]
        elif self.spacing == "trailing":
            # numpy's arange as in diffusers: the fourth of 48 is 937.5, a little less in its sum, and rounds down.
            # Its length can be one too many (61 steps): the surplus is timestep -1.
            times = [round(float(t)) - 1 for t in np.arange(total, 0, -total / steps)[:steps]]
        else:
            raise UsageError(f"scheduler: timestep_spacing is {self.spacing!r}, expected leading, linspace or trailing")
        times = [min(t, total - 1) for t in times]
        if self.prediction == "epsilon" and any(self.alphas_cumprod[t] <= 0 for t in times):
            raise UsageError(
                "scheduler: its last timestep is pure noise (rescale_betas_zero_snr), from which a network that predicts noise "
                "tells nothing of the picture; set prediction_type to v_prediction if the checkpoint was trained so, or "
                "timestep_spacing to leading"
            )
        return Levels((*times, 0), (*(self.alphas_cumprod[t] for t in times), self.final_abar))


def ddim_coefficients(
    abar_from: float, abar_to: float, prediction: str = "epsilon", eta: float = 0.0
) -> tuple[float, float]:
    """`(c_x, c_out)` of the DDIM step `x_to = c_x * x_from + c_out * output` (ITO Eqs. 1 and 2), in float64.

    With x_from = a x0 + b eps and x_to = A x0 + B eps (a, A: roots of abar; b, B: of 1 - abar) both are linear in what the
    network predicts. For v and sample no term divides by a, so they also start from pure noise (abar_from 0).

    With `eta` they are those of the mean of x_to, around which fresh noise of standard deviation `ddim_sigma` lies
    (DDIM, arXiv:2010.02502, Eq. 12; 1 is DDPM's): B is then the root of 1 - abar - sigma^2.

    Raises:
        ValueError: another prediction type.
    """
    sigma = ddim_sigma(abar_from, abar_to, eta)
    a, b, to_a = math.sqrt(abar_from), math.sqrt(1 - abar_from), math.sqrt(abar_to)
    to_b = math.sqrt(max(0.0, 1 - abar_to - sigma**2))
    if prediction == "epsilon":
        c_x = math.sqrt(abar_to / abar_from)
        return c_x, to_b - c_x * b
    if prediction == "v_prediction":  # x0 = a x - b v, eps = b x + a v
        return to_a * a + to_b * b, to_b * a - to_a * b
    if prediction == "sample":  # eps = (x - a x0) / b
        return to_b / b, to_a - to_b * a / b
    raise ValueError(f"ddim_coefficients: prediction is {prediction!r}, expected one of {', '.join(PREDICTIONS)}")


def ddim_sigma(abar_from: float, abar_to: float, eta: float) -> float:
    """Standard deviation of the fresh noise of a step to less noise (DDIM Eq. 16): 0 for `eta` 0, and to a clean level of abar 1."""
    return 0.0 if eta == 0 else eta * math.sqrt((1 - abar_to) / (1 - abar_from) * (1 - abar_from / abar_to))


def to_epsilon(output: Tensor, x: Tensor, abar: float, prediction: str) -> Tensor:
    """The noise that a network's output means for latents x at level `abar` (below 1 for "sample"); shapes as given.

    Raises:
        ValueError: another prediction type.
    """
    if prediction == "epsilon":
        return output
    a, b = math.sqrt(abar), math.sqrt(1 - abar)
    if prediction == "v_prediction":
        return a * output + b * x
    if prediction == "sample":
        return (x - a * output) / b
    raise ValueError(f"to_epsilon: prediction is {prediction!r}, expected one of {', '.join(PREDICTIONS)}")


def add_noise(x0: Tensor, noise: Tensor, abar: float) -> Tensor:
    """`sqrt(abar) * x0 + sqrt(1 - abar) * noise`; shapes as given, dtype of x0."""
    return math.sqrt(abar) * x0 + math.sqrt(1 - abar) * noise


def seeded_noise(seed: int, purpose: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise (float32, CPU) of one image and purpose.

    Derived from the seed and the purpose alone, so it does not depend on the batch, the device or the backend.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator)
