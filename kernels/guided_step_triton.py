"""`guided_step` in Triton: guidance + DDIM step + masked blend in one pass, 5.25 latents moved where eager moves 23.

Computed in float64 and rounded once: guidance at 7.5 multiplies a difference of two predictions, and its roundings in
float32 come to several times that of the answer. About 15 float64 operations a value, hidden behind 21 bytes of memory
traffic where a chip has one float64 unit to two float32 ones (sm_80, 90, 100). The roots of the reference's level are taken
here too: on the host they would be two more launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import on_device_of

BLOCK = 1024


@triton.jit
def guided_step_kernel(x_ptr, cond_ptr, uncond_ptr, cx_ptr, cout_ptr, m_ptr, ref_ptr, noise_ptr, target_ptr, out_ptr,
                       scale, n, hw, GUIDED: tl.constexpr, MASKED: tl.constexpr, NOISED: tl.constexpr,
                       BLOCK: tl.constexpr):  # fmt: skip
    """Block (sample, part). target: cumulative alpha of the reference's level."""
    sample = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    base = sample * n
    x = tl.load(x_ptr + base + at, mask=inside, other=0.0).to(tl.float64)
    out = tl.load(cond_ptr + base + at, mask=inside, other=0.0).to(tl.float64)
    if GUIDED:
        low = tl.load(uncond_ptr + base + at, mask=inside, other=0.0).to(tl.float64)
        out = low + scale * (out - low)
    y = tl.load(cx_ptr + sample).to(tl.float64) * x + tl.load(cout_ptr + sample).to(tl.float64) * out
    if MASKED:
        ref = tl.load(ref_ptr + base + at, mask=inside, other=0.0).to(tl.float64)
        if NOISED:
            noise = tl.load(noise_ptr + base + at, mask=inside, other=0.0).to(tl.float64)
            target = tl.load(target_ptr + sample).to(tl.float64)
            ref = tl.sqrt(target) * ref + tl.sqrt(1.0 - target) * noise
        m = tl.load(m_ptr + sample * hw + at % hw, mask=inside, other=0.0).to(tl.float64)
        y = m * y + (1.0 - m) * ref
    tl.store(out_ptr + base + at, y.to(out_ptr.dtype.element_ty), mask=inside)


def guided_step(x: Tensor, cond: Tensor, uncond: Tensor | None, scale: float, c_x: Tensor, c_out: Tensor,
                mask: Tensor | None, reference: Tensor | None, noise: Tensor | None,
                reference_abar: Tensor | None) -> Tensor:  # fmt: skip
    """See `iedit.kernels.guided_step.guided_step`; the arguments have been checked there."""
    x, cond = x.contiguous(), cond.contiguous()
    out = torch.empty_like(x)
    n, hw = x[0].numel(), x.shape[-1] * x.shape[-2]
    uncond_ = cond if uncond is None else uncond.contiguous()
    mask_ = x if mask is None else mask.contiguous()
    reference_ = x if reference is None else reference.contiguous()
    noise_ = x if noise is None else noise.contiguous()
    target = c_x if reference_abar is None else reference_abar
    with on_device_of(x):
        guided_step_kernel[(x.shape[0], triton.cdiv(n, BLOCK))](
            x, cond, uncond_, c_x.contiguous(), c_out.contiguous(), mask_, reference_, noise_, target.contiguous(), out,
            scale, n, hw, GUIDED=uncond is not None, MASKED=mask is not None, NOISED=noise is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return out
