"""The samplers of an edit: inversion, mask estimation, the ITO pass and masked sampling.

Each is a generator over the levels of its path, which is cut once (`Levels.path`): `y = yield DenoiseStep(...)`, nothing else. It holds no
state but the latent and does not know what answers; `network.Network` runs it, alone or beside others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.ito_step import AdamState
from ..kernels.mask_map import difference
from .denoise_step import Blend, Condition, DenoiseStep, ItoUpdate, Sampler, repeat
from .options import ItoSettings
from .schedule import Level, add_noise, ddim_sigma, to_epsilon

Path = Sequence[Level]


class Reference(Protocol):
    """The source latent at every level of a path: what a preservation loss or a blend compares with."""

    def at(self, level: Level) -> Tensor:
        """(B, C, h, w) at `level`."""
        ...

    def blend(self, mask: Tensor, level: Level) -> Blend:
        """Puts it back outside of `mask` at `level`."""
        ...


@dataclass(frozen=True)
class NoisedReference:
    """The clean latent under one fixed noise; itself at the path's last level (METHOD section 2 row 10, section 3 rows 1-2).

    Attributes:
        x0, noise: (B, C, h, w).
    """

    x0: Tensor
    noise: Tensor
    path: Path

    def at(self, level: Level) -> Tensor:
        return self.x0 if level == self.path[-1] else add_noise(self.x0, self.noise, level.abar)

    def blend(self, mask: Tensor, level: Level) -> Blend:
        if level == self.path[-1]:
            return Blend(mask, self.x0)
        abar = torch.full((len(self.x0),), level.abar, dtype=self.x0.dtype, device=self.x0.device)
        return Blend(mask, self.x0, self.noise, abar)


@dataclass(frozen=True)
class TrajectoryReference:
    """The latents of an inversion.

    Attributes:
        trajectory: (len(path), B, C, h, w), what `invert` returned for the same path.
    """

    trajectory: Tensor
    path: Path

    def at(self, level: Level) -> Tensor:
        return self.trajectory[level.index - self.path[0].index]

    def blend(self, mask: Tensor, level: Level) -> Blend:
        return Blend(mask, self.at(level))


def invert(
    x0: Tensor,
    path: Path,
    condition: Condition,
    uncond: Condition | None = None,
    scale: float = 1.0,
    *,
    evaluate: str = "target",
) -> Sampler[Tensor]:
    """DDIM inversion from the clean level to the path's first, the noisiest (ITO Eq. 2).

    Args:
        x0: (B, C, h, w) clean latents.
        evaluate: tell the network the "target" level's timestep (as diffusers does) or the "source" level's.

    Returns:
        (len(path), B, C, h, w): the latent at each level of the path; the last one is x0 itself.
    """
    trajectory = [x0]
    for level, noisier in pairwise(reversed(path)):
        told = noisier if evaluate == "target" else level
        y = yield DenoiseStep(trajectory[-1], level, noisier, condition, uncond, scale, timestep=told.timestep)
        trajectory.append(y)
    return torch.stack(trajectory[::-1])


def masked_sampling(
    y: Tensor,
    path: Path,
    condition: Condition,
    uncond: Condition | None,
    scale: float,
    *,
    source: Reference | None = None,
    mask: Tensor | None = None,
    guided: int | None = None,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Sampler[Tensor]:
    """DDIM sampling along the path; with a mask, everything outside it is put back after each step.

    The blend is at the level that the latent is then at, the clean source after the last step (iEdit Eq. 13; METHOD
    section 3, row 1), so an empty mask returns the source bit for bit. With no mask this is SDEdit.

    Args:
        y: (B, C, h, w) at the path's first level.
        mask: (B, 1, h, w) in [0, 1]; 1 edits.
        guided: the first so many steps have classifier-free guidance; None is all.
        eta: share of the noise of each level that is fresh, 0 (DDIM) to 1 (DDPM); with more than 0 `noise` is given.
        noise: (len(path) - 2, B, C, h, w), standard normal: of each step but the last, which adds none (DDPM Algorithm 2).

    Returns:
        (B, C, h, w) clean latents.
    """
    fresh = [] if noise is None else list(noise)
    for number, (level, cleaner) in enumerate(pairwise(path)):
        added = ddim_sigma(level.abar, cleaner.abar, eta) * fresh[number] if number < len(fresh) else None
        blend = source.blend(mask, cleaner) if mask is not None and source is not None else None
        low = uncond if guided is None or number < guided else None
        y = yield DenoiseStep(y, level, cleaner, condition, low, scale, blend=blend, eta=eta, noise=added)
    return y


def ito_pass(
    y: Tensor,
    path: Path,
    condition: Condition,
    uncond: Condition | None,
    scale: float,
    *,
    source: Reference,
    guidance: Reference | None,
    mask: Tensor,
    lam: Tensor,
    settings: ItoSettings,
    kept_area: bool = False,
    guided: int | None = None,
) -> Sampler[Tensor]:
    """DDIM sampling that moves the latent toward source and guidance after each of the first t_u steps.

    The update comes after the DDIM step, at the level that the latent is then at (METHOD section 2, row 7; ITO Eq. 6).

    Args:
        y: (B, C, h, w) at the path's first level.
        guidance: the guidance latent at every level, or None where every lam is 1.
        mask: (B, 1, h, w); 1 edits.
        lam: (B,) weight of the preservation loss.
        guided: the first so many steps have classifier-free guidance; None is all.

    Returns:
        (len(path), B, C, h, w): the latent at each level of the path; the last one is the clean latent.
    """
    latents = [y]
    updates = settings.updates(path[-1].index)
    state = AdamState(torch.zeros_like(y), torch.zeros_like(y)) if settings.carry else None
    for number, (level, cleaner) in enumerate(pairwise(path)):
        update = None
        if number < updates:
            g = guidance.at(cleaner) if guidance else None
            s = settings
            update = ItoUpdate(source.at(cleaner), g, mask, lam, s.k, s.lr, kept_area, s.update, state)
        low = uncond if guided is None or number < guided else None
        latents.append((yield DenoiseStep(latents[-1], level, cleaner, condition, low, scale, update=update)))
    return torch.stack(latents)


def rounding_level(dtype: torch.dtype) -> float:
    """Below which a difference of two predictions, as a share of their root mean square, is the network's own rounding.

    In float32 one and the same sample differs by 4 eps (mean over seeds and channels, the worst cell) between calls of
    1, 2 and 20 samples of the embedded model, and another colour in the prompt makes 1e6 eps: 64 eps. In a half a difference
    of that kind is 12 eps of bfloat16 and rounding is no longer far away; as both conditions of a seed share a call, which rounds them
    alike, 4 eps are enough.
    """
    return torch.finfo(dtype).eps * (64 if dtype in (torch.float32, torch.float64) else 4)


def _same_controls(a: Condition, b: Condition) -> bool:
    return len(a.controls) == len(b.controls) and all(
        c.name == d.name and c.scale == d.scale and torch.equal(c.image, d.image)
        for c, d in zip(a.controls, b.controls, strict=True)
    )


def _same(a: Condition, b: Condition) -> Tensor:
    """(B,) bool: whether the two conditions of a sample are one and the same, so that their predictions are."""
    pairs = [(a.prompt_embeds, b.prompt_embeds)]
    pairs += [(c.image, d.image) for c, d in zip(a.controls, b.controls, strict=True)]
    return torch.stack([(p == q).flatten(1).all(1) for p, q in pairs]).all(0)


def estimate_mask(
    x0: Tensor,
    noise: Tensor,
    path: Path,
    edit: Condition,
    source: Condition,
    *,
    uncond: Tensor,
    scale: float,
    mode: str,
    prediction: str,
    guided: bool = True,
    rounding: float = 0.0,
) -> Sampler[Tensor]:
    """Difference map of two conditions, before blur and threshold: of the noise that each predicts (ITO Eq. 7).

    Args:
        x0: (B, C, h, w) clean latents.
        noise: (B, n, C, h, w), one per seed.
        path: from the level of the comparison (METHOD section 2, row 12) to the clean one.
        edit, source: the conditions, (B, ...), with the same names of controls.
        uncond: (1 or B, L, D) embeddings of the negative prompt.
        scale: guidance scale.
        mode: "single" compares one evaluation at the path's first level per seed and condition (DiffEdit); "trajectory" denoises
            each condition from the same noise and compares at the last sampling step (Eq. 7 to the letter).
        prediction: what the network predicts (see `schedule.PREDICTIONS`).
        guided: compare the predictions after guidance, not those of the conditions alone. A trajectory is denoised with
            guidance either way.
        rounding: a map that is nowhere above this share of the predictions' root mean square is rounding, see `rounding_level`.

    Returns:
        (B, 1, h, w) float32; zero where a sample's two conditions are the same or differ by rounding alone. All seeds and
        conditions of a step share calls, and the two conditions of a seed lie next to each other, so that they are in
        one call also where those are split.

    The unconditional halves cancel in a difference when both conditions have the same controls and latents:
    `|s (edit - source)|`. Normalisation takes out the scale, so they are then not evaluated, and the map is that of the
    guided predictions divided by s.
    """
    if mode not in ("single", "trajectory"):
        raise ValueError(f"estimate_mask: mode is {mode!r}, expected single or trajectory")
    batch, seeds = noise.shape[:2]
    x = repeat(add_noise(x0.unsqueeze(1), noise, path[0].abar).flatten(0, 1), 2)
    pairs = Condition.interleave(edit, source).repeat(seeds, block=2)
    negative = uncond.expand(batch, -1, -1) if len(uncond) == 1 else uncond
    low: Condition | None = pairs.with_prompt(repeat(negative, 2 * seeds))
    last = path[0]
    if mode == "trajectory":
        for level, cleaner in pairwise(path[:-1]):
            x = yield DenoiseStep(x, level, cleaner, pairs, low, scale)
        last = path[-2]
    if not guided or (mode == "single" and _same_controls(edit, source)):
        low = None
    output = yield DenoiseStep(x, last, None, pairs, low, scale)
    predicted = to_epsilon(output, x, last.abar, prediction).unflatten(0, (batch, seeds, 2))
    heat = difference(predicted[:, :, 0], predicted[:, :, 1])
    # Guidance multiplies the difference of its halves by `scale`, and their rounding with it.
    level_of_rounding = (
        rounding * max(1.0, scale if low is not None else 1.0) * predicted.float().flatten(1).square().mean(1).sqrt()
    )
    nothing = _same(edit, source).to(heat.device) | (heat.flatten(1).amax(1) <= level_of_rounding)
    return heat.masked_fill(nothing.view(-1, 1, 1, 1), 0.0)
