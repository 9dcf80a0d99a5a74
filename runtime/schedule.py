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

from ..kernels.guided_step import PREDICTIONS
from .errors import UsageError


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
        return cls(
            tuple(float(a) for a in scheduler.alphas_cumprod.double()),
            float(scheduler.final_alpha_cumprod),
            prediction,
            scheduler.config.timestep_spacing,
            int(scheduler.config.steps_offset),
        )

    def levels(self, steps: int) -> Levels:
        """The levels of a run of `steps` steps, as diffusers' DDIMScheduler places them."""
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
        return Levels((*times, 0), (*(self.alphas_cumprod[t] for t in times), self.final_abar))


def ddim_coefficients(abar_from: float, abar_to: float) -> tuple[float, float]:
    """`(c_x, c_eps)` of `x_to = c_x * x_from + c_eps * eps` (ITO Eqs. 1 and 2), in float64."""
    c_x = math.sqrt(abar_to / abar_from)
    return c_x, math.sqrt(1 - abar_to) - c_x * math.sqrt(1 - abar_from)


def add_noise(x0: Tensor, noise: Tensor, abar: float) -> Tensor:
    """`sqrt(abar) * x0 + sqrt(1 - abar) * noise`; shapes as given, dtype of x0."""
    return math.sqrt(abar) * x0 + math.sqrt(1 - abar) * noise


def seeded_noise(seed: int, purpose: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise (float32, CPU) of one image and purpose.

    Derived from the seed and the purpose alone, so it does not depend on the batch, the device or the backend.
    """
    import hashlib

    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator)
