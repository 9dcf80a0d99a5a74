"""Guidance + DDIM step + masked blend, the elementwise tail of every denoising step.

out  = uncond + scale (cond - uncond)
x_r  = c_x x_s + c_eps eps(out)            ITO Eqs. 1 and 2; only the levels differ
x_r  = m x_r + (1 - m) ref_r               DiffEdit's and iEdit's blend (iEdit Eq. 13), at the level x_r is now at
"""

from __future__ import annotations

from torch import Tensor


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def guided_step(x: Tensor, eps: Tensor, c_x: Tensor, c_eps: Tensor) -> Tensor:
    """One DDIM step between any two levels, per sample.

    Args:
        x, eps: (B, C, h, w) float32.
        c_x, c_eps: (B,) coefficients of `schedule.ddim_coefficients`.

    Returns:
        (B, C, h, w) float32.
    """
    return _per_sample(c_x, x) * x + _per_sample(c_eps, x) * eps


def blend(mask: Tensor, edited: Tensor, kept: Tensor) -> Tensor:
    """`mask * edited + (1 - mask) * kept`: mask 0 returns `kept` bit for bit and mask 1 `edited`.

    Args:
        mask: (B, 1, h, w) in [0, 1]; 1 edits, 0 keeps.
        edited, kept: (B, C, h, w) finite.
    """
    if mask.shape != (edited.shape[0], 1, *edited.shape[2:]):
        raise ValueError(f"blend: mask is {tuple(mask.shape)}, expected {(edited.shape[0], 1, *edited.shape[2:])}")
    return mask * edited + (1 - mask) * kept
