"""`difference` and `mask_map` in Triton: two launches for |a - b| over seeds and channels, blur, normalise, threshold.

The difference kernel reads each prediction once. The second kernel has one program an image: a direct blur of
(2r+1)^2 taps (49 at sigma 1; no spills, where a blur through tl.dot spills 26 KB), the image's range or mean, a barrier,
and the threshold.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import on_device_of

BLOCK = 1024


@triton.jit
def difference_kernel(a_ptr, b_ptr, out_ptr, planes, hw, BLOCK: tl.constexpr):
    """Block (image, part): mean over `planes` = seeds * channels of |a - b|, added in order; float64, for 40 float32 terms
    round 40 times."""
    image = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < hw
    total = tl.zeros((BLOCK,), tl.float64)
    for plane in range(planes):
        where = (image * planes + plane) * hw + at
        a = tl.load(a_ptr + where, mask=inside, other=0.0).to(tl.float64)
        b = tl.load(b_ptr + where, mask=inside, other=0.0).to(tl.float64)
        total += tl.abs(a - b)
    tl.store(out_ptr + image * hw + at, (total / planes).to(tl.float32), mask=inside)


@triton.jit
def threshold_kernel(heat_ptr, weight_ptr, scratch_ptr, out_ptr, threshold, h, w, RADIUS: tl.constexpr, CLAMP: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    """One image: blur into scratch, its range (or 3x its mean), then the mask."""
    image = tl.program_id(0).to(tl.int64)
    hw = h * w
    heat_ptr += image * hw
    scratch_ptr += image * hw
    out_ptr += image * hw
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, hw, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < hw
        row, column = at // w, at % w
        value = tl.zeros((BLOCK,), tl.float32)
        for i in range(2 * RADIUS + 1):
            r = tl.minimum(tl.maximum(row + i - RADIUS, 0), h - 1)
            wide = tl.zeros((BLOCK,), tl.float32)
            for j in range(2 * RADIUS + 1):
                c = tl.minimum(tl.maximum(column + j - RADIUS, 0), w - 1)
                wide += tl.load(weight_ptr + j) * tl.load(heat_ptr + r * w + c, mask=inside, other=0.0)
            value += tl.load(weight_ptr + i) * wide
        tl.store(scratch_ptr + at, value, mask=inside)
        low = tl.minimum(low, tl.where(inside, value, float("inf")))
        high = tl.maximum(high, tl.where(inside, value, float("-inf")))
        total += tl.where(inside, value, 0.0)
    if CLAMP:
        bottom = 0.0
        span = 3.0 * tl.sum(total, 0) / hw
    else:
        bottom = tl.min(low, 0)
        span = tl.max(high, 0) - bottom
    tl.debug_barrier()
    for start in range(0, hw, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(scratch_ptr + at, mask=at < hw, other=0.0)
        if CLAMP:
            value = tl.minimum(value, span)
        share = tl.where(span > 0.0, (value - bottom) / tl.where(span > 0.0, span, 1.0), 0.0)
        tl.store(out_ptr + at, tl.where(share > threshold, 1.0, 0.0), mask=at < hw)


def difference(edited: Tensor, source: Tensor) -> Tensor:
    """See `iedit.kernels.mask_map.difference`."""
    edited, source = edited.contiguous(), source.contiguous()
    batch, seeds, channels, h, w = edited.shape
    out = torch.empty(batch, 1, h, w, dtype=torch.float32, device=edited.device)
    with on_device_of(edited):
        difference_kernel[(batch, triton.cdiv(h * w, BLOCK))](edited, source, out, seeds * channels, h * w, BLOCK=BLOCK)
    return out


def mask_map(heat: Tensor, sigma: float, norm: str, threshold: float) -> Tensor:
    """See `iedit.kernels.mask_map.mask_map`."""
    heat = heat.contiguous()
    radius = math.ceil(3 * sigma) if sigma > 0 else 0
    raw = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-radius, radius + 1)] if radius else [1.0]
    weights = torch.tensor([v / sum(raw) for v in raw], dtype=torch.float32, device=heat.device)
    batch, _, h, w = heat.shape
    out, scratch = torch.empty_like(heat), torch.empty_like(heat)
    with on_device_of(heat):
        threshold_kernel[(batch,)](
            heat, weights, scratch, out, threshold, h, w, RADIUS=radius, CLAMP=norm == "clamp", BLOCK=BLOCK
        )
    return out
