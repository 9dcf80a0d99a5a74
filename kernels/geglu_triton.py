"""`geglu` in Triton: each value and its gate read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import on_device_of

BLOCK = 1024


@triton.jit
def geglu_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Program (row, part of it)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x_ptr + row * 2 * n + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + row * 2 * n + n + at, mask=inside, other=0.0).to(tl.float32)
    y = value * 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(out_ptr + row * n + at, y.to(out_ptr.dtype.element_ty), mask=inside)


def geglu(x: Tensor) -> Tensor:
    """See `iedit.kernels.geglu.geglu`."""
    x = x.contiguous()
    n = x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    if out.numel():
        with on_device_of(x):
            geglu_kernel[(out.numel() // n, triton.cdiv(n, BLOCK))](x, out, n, BLOCK=BLOCK)
    return out
