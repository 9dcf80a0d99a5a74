"""Edit mask estimated from the network's own predictions (ITO Eq. 7; METHOD section 2, rows 11-14)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.mask_map import difference
from .denoiser import Condition, Loop, Network, repeat
from .schedule import Levels, add_noise, to_epsilon


def rounding_level(dtype: torch.dtype) -> float:
    """Below which a difference of two predictions, as a share of their root mean square, is the network's own rounding.

    In float32 one and the same sample differs by 4 eps (mean over seeds and channels, the worst cell) between calls of
    1, 2 and 20 samples of the embedded model, and another colour in the prompt makes 1e6 eps: 64 eps. In a half a difference
    of that kind is 12 eps of bfloat16 and rounding is no longer far away; as both conditions of a seed share a call, which rounds them
    alike, 4 eps are enough.
    """
    return torch.finfo(dtype).eps * (64 if dtype in (torch.float32, torch.float64) else 4)


def _same_layouts(a: Condition, b: Condition) -> bool:
    return len(a.layouts) == len(b.layouts) and all(
        n == m and s == r and torch.equal(p, q) for (n, p, s), (m, q, r) in zip(a.layouts, b.layouts, strict=True)
    )


def _same(a: Condition, b: Condition) -> Tensor:
    """(B,) bool: whether the two conditions of a sample are one and the same, so that their predictions are."""
    pairs = [(a.text, b.text), *((p, q) for (_, p, _), (_, q, _) in zip(a.layouts, b.layouts, strict=True))]
    return torch.stack([(p == q).flatten(1).all(1) for p, q in pairs]).all(0)


def estimate(
    network: Network,
    x0: Tensor,
    noise: Tensor,
    levels: Levels,
    edit: Condition,
    source: Condition,
    *,
    uncond: Tensor,
    scale: float,
    strength: float,
    mode: str,
    guided: bool = True,
    rounding: float = 0.0,
) -> Loop[Tensor]:
    """Difference map of two conditions, before blur and threshold: of the noise that each predicts (Eq. 7).

    Args:
        x0: (B, C, h, w) clean latents.
        noise: (B, n, C, h, w), one per seed.
        edit, source: the conditions, (B, ...), with the same names of layouts.
        uncond: (1 or B, L, D) states of the negative prompt.
        scale: guidance scale.
        strength: noise level of the start, share of the steps.
        mode: "single" compares one evaluation at that level per seed and condition (DiffEdit); "trajectory" denoises
            each condition from the same noise and compares at the last sampling step (Eq. 7 to the letter).
        guided: compare the predictions after guidance, not those of the conditions alone. A trajectory is denoised with
            guidance either way.
        rounding: a map that is nowhere above this share of the predictions' root mean square is rounding, see `rounding_level`.

    Returns:
        (B, 1, h, w) float32; zero where a sample's two conditions are the same or differ by rounding alone. All seeds and
        conditions of a step share calls, and the two conditions of a seed lie next to each other, so that they are in
        one call also where those are split.

    The unconditional halves cancel in a difference when both conditions have the same layouts and latents:
    `|s (edit - source)|`. Normalisation takes out the scale, so they are then not evaluated, and the map is that of the
    guided predictions divided by s.
    """
    batch, seeds = noise.shape[:2]
    start = levels.start(strength)
    x = repeat(add_noise(x0.unsqueeze(1), noise, levels.abar[start]).flatten(0, 1), 2)
    pairs = Condition.interleave(edit, source).repeat(seeds, block=2)
    low: Condition | None = pairs.with_text(
        repeat(uncond.expand(batch, -1, -1) if len(uncond) == 1 else uncond, 2 * seeds)
    )
    if mode == "single":
        if not guided or _same_layouts(edit, source):
            low = None
        network.profile.step(1, 1)
        compared, i = (yield from network.guided(x, levels.timesteps[start], pairs, low, scale)), start
    elif mode == "trajectory":
        for i in range(start, levels.steps):
            network.profile.step(i - start + 1, levels.steps - start)
            last = i + 1 == levels.steps
            halves = low if guided or not last else None
            compared = yield from network.guided(x, levels.timesteps[i], pairs, halves, scale)
            if not last:
                x = network.step(x, compared, levels.abar[i], levels.abar[i + 1])
        low = low if guided else None
    else:
        raise ValueError(f"estimate: mode is {mode!r}, expected single or trajectory")
    said = to_epsilon(compared, x, levels.abar[i], network.prediction).unflatten(0, (batch, seeds, 2))
    heat = difference(said[:, :, 0], said[:, :, 1])
    # Guidance multiplies the difference of its halves by `scale`, and their rounding with it.
    level = rounding * max(1.0, scale if low is not None else 1.0) * said.float().flatten(1).square().mean(1).sqrt()
    nothing = _same(edit, source).to(heat.device) | (heat.flatten(1).amax(1) <= level)
    return heat.masked_fill(nothing.view(-1, 1, 1, 1), 0.0)
