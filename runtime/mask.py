"""Edit mask estimated from the network's own predictions (ITO Eq. 7; METHOD section 2, rows 11-14)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.mask_map import difference
from .denoiser import Condition, Loop, Network
from .schedule import Levels, add_noise


def _same_layouts(a: Condition, b: Condition) -> bool:
    return len(a.layouts) == len(b.layouts) and all(
        n == m and s == r and torch.equal(p, q) for (n, p, s), (m, q, r) in zip(a.layouts, b.layouts, strict=True)
    )


def estimate(
    network: Network,
    x0: Tensor,
    noise: Tensor,
    levels: Levels,
    edit: Condition,
    source: Condition,
    *,
    uncond: Tensor | None,
    scale: float,
    strength: float,
    mode: str,
) -> Loop[Tensor]:
    """Difference map of two conditions, before blur and threshold.

    Args:
        x0: (B, C, h, w) clean latents.
        noise: (B, n, C, h, w), one per seed.
        edit, source: the conditions, (B, ...).
        uncond: (1 or B, L, D) states of the negative prompt, or None for no guidance.
        scale: guidance scale.
        strength: noise level of the start, share of the steps.
        mode: "single" compares one evaluation at that level per seed and condition (DiffEdit); "trajectory" denoises
            each condition from the same noise and compares at the last sampling step (Eq. 7 to the letter).

    Returns:
        (B, 1, h, w) float32. All seeds and conditions of a step share calls.

    The unconditional halves cancel in a difference when both conditions have the same layouts and latents:
    `|s (edit - source)|`. Normalisation takes out the scale, so they are then not evaluated, and the map is that of the
    guided predictions divided by s.
    """
    batch, seeds = noise.shape[:2]
    start = levels.start(strength)
    x = add_noise(x0.unsqueeze(1), noise, levels.abar[start]).flatten(0, 1)
    both = Condition.cat([edit, source]).repeat(seeds)
    low = None
    if uncond is not None and scale != 1 and not (mode == "single" and _same_layouts(edit, source)):
        states = uncond.expand(batch, -1, -1) if uncond.shape[0] == 1 else uncond
        low = both.with_text(states.repeat_interleave(seeds, 0).repeat(2, 1, 1))
    if mode == "single":
        network.profile.step(1, 1)
        output = yield from network.guided(torch.cat([x, x]), levels.timesteps[start], both, low, scale)
    elif mode == "trajectory":
        x = torch.cat([x, x])
        for i in range(start, levels.steps):
            network.profile.step(i - start + 1, levels.steps - start)
            output = yield from network.guided(x, levels.timesteps[i], both, low, scale)
            if i + 1 < levels.steps:
                x = network.step(x, output, levels.abar[i], levels.abar[i + 1])
    else:
        raise ValueError(f"estimate: mode is {mode!r}, expected single or trajectory")
    edited, original = output.unflatten(0, (2, batch, seeds))
    return difference(edited, original)
