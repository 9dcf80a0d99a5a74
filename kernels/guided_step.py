"""Guidance + DDIM step + masked blend: everything elementwise between two calls of the network, in one pass.

    out   = uncond + scale (cond - uncond)
    x_r   = c_x x_s + c_out out                      ITO Eqs. 1 and 2; levels and prediction type are in the coefficients
    ref   = sqrt(a_r) reference + sqrt(1 - a_r) noise, or the reference itself
    x_r   = m x_r + (1 - m) ref                      DiffEdit's and iEdit's blend (iEdit Eq. 13), at the level x_r is now at

Bytes moved, in latents: x, two predictions, reference (and noise), a quarter for the mask, the result: 5.25 (6.25); eager
moves 23 in 10 launches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import use_triton


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def guided_step(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    scale: float,
    c_x: Tensor,
    c_out: Tensor,
    *,
    mask: Tensor | None = None,
    reference: Tensor | None = None,
    noise: Tensor | None = None,
    reference_abar: Tensor | None = None,
) -> Tensor:
    """One guided DDIM step between any two levels, per sample, and the blend that may follow it.

    Args:
        x, cond, uncond: (B, C, h, w): latent and the network's outputs; `uncond` None for no guidance.
        scale: guidance scale.
        c_x, c_out: (B,) coefficients of `schedule.ddim_coefficients`, for what the network predicts.
        mask: (B, 1, h, w) in [0, 1]; 1 edits, 0 keeps; None for no blend.
        reference: (B, C, h, w) what is kept; with `noise` the clean latent, noised to `reference_abar` (B,).

    Returns:
        (B, C, h, w), dtype of x; computed in float32 (float64 if x is, and in the Triton kernel).

    Raises:
        ValueError: a shape is not as above.
    """
    for name, value in (("cond", cond), ("uncond", uncond), ("reference", reference), ("noise", noise)):
        if value is not None and value.shape != x.shape:
            raise ValueError(f"guided_step: {name} is {tuple(value.shape)}, expected {tuple(x.shape)} as x")
    for name, value in (("c_x", c_x), ("c_out", c_out), ("reference_abar", reference_abar)):
        if value is not None and value.shape != (len(x),):
            raise ValueError(f"guided_step: {name} is {tuple(value.shape)}, expected {(len(x),)}")
    if mask is not None and (reference is None or mask.shape != (x.shape[0], 1, *x.shape[2:])):
        raise ValueError(
            f"guided_step: mask is {tuple(mask.shape)}, expected {(x.shape[0], 1, *x.shape[2:])} and a reference"
        )
    if noise is not None and reference_abar is None:
        raise ValueError("guided_step: noise needs reference_abar, the level that the reference is noised to")
    if use_triton("guided_step", x, cond, uncond, mask, reference, noise):
        from .guided_step_triton import guided_step as fused

        return fused(x, cond, uncond, scale, c_x, c_out, mask, reference, noise, reference_abar)
    return guided_step_reference(x, cond, uncond, scale, c_x, c_out, mask, reference, noise, reference_abar)


def guided_step_reference(x: Tensor, cond: Tensor, uncond: Tensor | None, scale: float, c_x: Tensor, c_out: Tensor,
                          mask: Tensor | None = None, reference: Tensor | None = None, noise: Tensor | None = None,
                          reference_abar: Tensor | None = None) -> Tensor:  # fmt: skip
    """The definition of `guided_step` in plain torch; arguments and result as there, unchecked."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    value, out = x.to(dtype), cond.to(dtype)
    if uncond is not None:
        unconditional = uncond.to(dtype)
        out = unconditional + scale * (out - unconditional)
    result = _per_sample(c_x, value) * value + _per_sample(c_out, value) * out
    if mask is not None and reference is not None:
        kept = reference.to(dtype)
        if noise is not None and reference_abar is not None:
            signal, rest = reference_abar.sqrt(), (1 - reference_abar).sqrt()
            kept = _per_sample(signal, kept) * kept + _per_sample(rest, kept) * noise.to(dtype)
        result = blend(mask.to(dtype), result, kept)
    return result.to(x.dtype)


def blend(mask: Tensor, edited: Tensor, kept: Tensor) -> Tensor:
    """`mask * edited + (1 - mask) * kept`: mask 0 returns `kept` bit for bit and mask 1 `edited`.

    Args:
        mask: (B, 1, h, w) in [0, 1]; 1 edits, 0 keeps.
        edited, kept: (B, C, h, w) finite.
    """
    if mask.shape != (edited.shape[0], 1, *edited.shape[2:]):
        raise ValueError(f"blend: mask is {tuple(mask.shape)}, expected {(edited.shape[0], 1, *edited.shape[2:])}")
    return mask * edited + (1 - mask) * kept
