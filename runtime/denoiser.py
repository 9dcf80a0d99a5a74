"""The Denoiser protocol and the one place that calls it: guidance batching, memory bound, counting, NaN and cancel checks.

A backend is anything with `predict(x, t, condition)`; the steps in `ito.py`, `mask.py` and `methods.py` call `Network`, which
wraps one, and do not know which backend answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.guided_step import guided_step
from .errors import RunError
from .profile import Profile
from .schedule import Levels, ddim_coefficients, to_epsilon


@dataclass(frozen=True)
class Condition:
    """What the network is told, per sample.

    Attributes:
        text: (B, L, D) text encoder states.
        layouts: ControlNet name -> ((B, 3, H, W) map in [0, 1], scale). Residuals are summed with their scales.
    """

    text: Tensor
    layouts: tuple[tuple[str, Tensor, float], ...] = ()

    def __len__(self) -> int:
        return self.text.shape[0]

    def take(self, index: Tensor | slice) -> Condition:
        """The samples of `index`."""
        return Condition(self.text[index], tuple((name, maps[index], scale) for name, maps, scale in self.layouts))

    def repeat(self, times: int) -> Condition:
        """Each sample `times` times in a row."""
        return Condition(
            self.text.repeat_interleave(times, 0),
            tuple((name, maps.repeat_interleave(times, 0), scale) for name, maps, scale in self.layouts),
        )

    def with_text(self, text: Tensor) -> Condition:
        """The same layouts under another text; `text` may be (1, L, D)."""
        return replace(self, text=text.expand(len(self), -1, -1) if text.shape[0] == 1 else text)

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """One batch of several; all must have the same layouts and text length."""
        first = conditions[0]
        names = [(name, scale) for name, _, scale in first.layouts]
        if any([(name, scale) for name, _, scale in c.layouts] != names for c in conditions):
            raise ValueError("Condition.cat: the conditions have different layouts")
        return Condition(
            torch.cat([c.text for c in conditions]),
            tuple((n, torch.cat([c.layouts[i][1] for c in conditions]), s) for i, (n, s) in enumerate(names)),
        )


class Denoiser(Protocol):
    """A network that predicts; no state between calls."""

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """(B, C, h, w) latents, (B,) int64 timesteps -> (B, C, h, w) float32 in the checkpoint's prediction type."""
        ...


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class Network:
    """A Denoiser for the length of one run.

    Args:
        denoiser: the backend.
        prediction: what it predicts (see `schedule`).
        max_batch: samples per call at most; halved, down to 1, when a call runs out of memory.
        profile: counts evaluations and calls, and passes progress on.
    """

    def __init__(self, denoiser: Denoiser, prediction: str, max_batch: int, profile: Profile):
        self.denoiser, self.prediction, self.max_batch, self.profile = denoiser, prediction, max_batch, profile

    def predict(self, x: Tensor, t: int | Tensor, condition: Condition) -> Tensor:
        """The network's output, (B, C, h, w) float32, in calls of at most `max_batch` samples.

        Raises:
            RunError: NaN or infinity in the output, or out of memory with one sample.
        """
        times = t if isinstance(t, Tensor) else torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        parts: list[Tensor] = []
        start = 0
        while start < len(x):
            piece = slice(start, start + self.max_batch)
            try:
                parts.append(self.denoiser.predict(x[piece], times[piece], condition.take(piece)))
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                if self.max_batch == 1:
                    raise RunError(
                        f"out of memory in {self.profile.where}: one sample of {tuple(x.shape[1:])} does not fit; "
                        "use a smaller image, a smaller dtype or another device"
                    ) from error
                self.max_batch = max(1, min(self.max_batch, len(x[piece])) // 2)
                self.profile.note(f"out of memory in {self.profile.where}: going on with batches of {self.max_batch}")
                continue
            self.profile.count(len(x[piece]))
            start += len(x[piece])
        output = torch.cat(parts) if len(parts) > 1 else parts[0]
        if not torch.isfinite(output).all():
            raise RunError(
                f"the network returned NaN or infinity in {self.profile.where}: "
                "load the model with dtype float32, or check the checkpoint"
            )
        return output

    def guided(
        self, x: Tensor, t: int | Tensor, condition: Condition, uncond: Condition | None, scale: float
    ) -> Tensor:
        """Classifier-free guidance, both halves in one call: `uncond + scale * (cond - uncond)`.

        With scale 1, or no `uncond`, the unconditional half is not evaluated.
        """
        if uncond is None or scale == 1:
            return self.predict(x, t, condition)
        times = t if isinstance(t, Tensor) else torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        both = self.predict(torch.cat([x, x]), torch.cat([times, times]), Condition.cat([uncond, condition]))
        low, high = both.chunk(2)
        return low + scale * (high - low)

    def step(self, x: Tensor, output: Tensor, abar_from: float, abar_to: float) -> Tensor:
        """One DDIM step of the whole batch from one level to another."""
        c_x, c_eps = ddim_coefficients(abar_from, abar_to)
        eps = to_epsilon(output, x, abar_from, self.prediction)
        ones = torch.ones(len(x), dtype=x.dtype, device=x.device)
        return guided_step(x, eps, ones * c_x, ones * c_eps)


def invert(
    network: Network,
    x0: Tensor,
    levels: Levels,
    start: int,
    condition: Condition,
    *,
    uncond: Condition | None = None,
    scale: float = 1.0,
    evaluate: str = "target",
) -> Tensor:
    """DDIM inversion from the clean level to level `start` (ITO Eq. 2).

    Args:
        x0: (B, C, h, w) clean latents.
        start: index of the noisiest level to reach.
        evaluate: tell the network the "target" level's timestep (as diffusers does) or the "source" level's.

    Returns:
        (N - start + 1, B, C, h, w): the latent at levels start..N; the last one is x0 itself.
    """
    trajectory = [x0]
    for i in range(levels.steps, start, -1):
        network.profile.step(levels.steps - i + 1, levels.steps - start)
        t = levels.timesteps[i - 1 if evaluate == "target" else i]
        output = network.guided(trajectory[-1], t, condition, uncond, scale)
        trajectory.append(network.step(trajectory[-1], output, levels.abar[i], levels.abar[i - 1]))
    return torch.stack(trajectory[::-1])
