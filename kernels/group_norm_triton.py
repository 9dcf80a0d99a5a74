"""`group_norm` in Triton: one launch where a program holds a group of a sample, two (moments of parts, then the rest) where it does not.

A program's tile is `ROWS` cells by the channels of a group, padded to a power of two. The moments of a part are its mean and its sum of squares about
that mean, put together by Chan et al.'s formula: nothing cancels, and no sum depends on the order in which programs run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import on_device_of

WHOLE, PART = 16384, 8192  # values in a tile that holds a group at most, and in one of several


@triton.jit
def _tile(x_ptr, shift_ptr, sample, group, part, channels, hw, SHIFTED: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
          ROWS: tl.constexpr):  # fmt: skip
    """The values of a part of a group in float32 with 0 outside, where in their sample they lie, and which are inside; (ROWS, LANES) each."""
    row, lane = part * ROWS + tl.arange(0, ROWS), tl.arange(0, LANES)
    channel = group * WIDTH + lane
    inside = (row < hw)[:, None] & (lane < WIDTH)[None, :]
    where = row[:, None] * channels + channel[None, :]
    value = tl.load(x_ptr + sample.to(tl.int64) * hw * channels + where, mask=inside, other=0.0).to(tl.float32)
    if SHIFTED:
        shift = tl.load(shift_ptr + sample * channels + channel, mask=lane < WIDTH, other=0.0).to(tl.float32)
        value = tl.where(inside, value + shift[None, :], 0.0)
    return value, where, inside


@triton.jit
def _moments(value, inside, count):
    """Mean, and sum of squares about it."""
    mean = tl.sum(tl.sum(value, 1), 0) / count
    off = tl.where(inside, value - mean, 0.0)
    return mean, tl.sum(tl.sum(off * off, 1), 0)


@triton.jit
def moments_kernel(x_ptr, shift_ptr, moments_ptr, channels, hw, parts, SHIFTED: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
                   ROWS: tl.constexpr):  # fmt: skip
    """Program (sample and group, part): mean and sum of squares of that part."""
    own, part = tl.program_id(0), tl.program_id(1)
    groups = channels // WIDTH
    value, _, inside = _tile(
        x_ptr, shift_ptr, own // groups, own % groups, part, channels, hw, SHIFTED, WIDTH, LANES, ROWS
    )
    mean, squares = _moments(value, inside, tl.minimum(ROWS, hw - part * ROWS) * WIDTH)
    tl.store(moments_ptr + (own * parts + part) * 2, mean)
    tl.store(moments_ptr + (own * parts + part) * 2 + 1, squares)


@triton.jit
def normalise_kernel(x_ptr, shift_ptr, moments_ptr, weight_ptr, bias_ptr, out_ptr, eps, channels, hw, parts, SHIFTED: tl.constexpr,
                     SILU: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """Program (sample and group, part): that part normalised; PARTS 1: the group is one tile, whose moments are taken here."""
    own, part = tl.program_id(0), tl.program_id(1)
    groups = channels // WIDTH
    sample, group = own // groups, own % groups
    value, where, inside = _tile(x_ptr, shift_ptr, sample, group, part, channels, hw, SHIFTED, WIDTH, LANES, ROWS)
    if PARTS == 1:
        mean, squares = _moments(value, inside, hw * WIDTH)
    else:
        p = tl.arange(0, PARTS)
        count = tl.where(p < parts, tl.minimum(ROWS, hw - p * ROWS) * WIDTH, 0).to(tl.float32)
        means = tl.load(moments_ptr + (own * parts + p) * 2, mask=p < parts, other=0.0)
        mean = tl.sum(count * means, 0) / (hw * WIDTH)
        off = means - mean
        squares = tl.sum(
            tl.load(moments_ptr + (own * parts + p) * 2 + 1, mask=p < parts, other=0.0) + count * off * off, 0
        )
    lane = tl.arange(0, LANES)
    scale = tl.load(weight_ptr + group * WIDTH + lane, mask=lane < WIDTH, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + group * WIDTH + lane, mask=lane < WIDTH, other=0.0).to(tl.float32)
    scale *= 1.0 / tl.sqrt(squares / (hw * WIDTH) + eps)
    y = (value - mean) * scale[None, :] + bias[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out_ptr + sample.to(tl.int64) * hw * channels + where, y.to(out_ptr.dtype.element_ty), mask=inside)


def warps(tile: int) -> int:
    """32 values a thread at most: more of them do not stay in registers."""
    return min(16, max(1, tile // 1024))


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None, silu: bool
) -> Tensor:
    """See `iedit.kernels.group_norm.group_norm`; the arguments have been checked there."""
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    batch, channels, h, w = x.shape
    hw, width = h * w, channels // groups
    lanes = triton.next_power_of_2(width)
    whole = triton.next_power_of_2(hw) * lanes <= WHOLE
    rows = triton.next_power_of_2(hw) if whole else max(1, PART // lanes)
    parts = triton.cdiv(hw, rows)
    moments = torch.empty(0 if whole else batch * groups * parts * 2, dtype=torch.float32, device=x.device)
    shift_ = x if shift is None else shift.contiguous()
    grid, sizes = (
        (batch * groups, parts),
        {"WIDTH": width, "LANES": lanes, "ROWS": rows, "num_warps": warps(rows * lanes)},
    )
    with on_device_of(x):
        if not whole:
            moments_kernel[grid](x, shift_, moments, channels, hw, parts, SHIFTED=shift is not None, **sizes)
        normalise_kernel[grid](
            x, shift_, moments, weight.contiguous(), bias.contiguous(), out, eps, channels, hw, parts,
            SHIFTED=shift is not None, SILU=silu, PARTS=triton.next_power_of_2(parts), **sizes,
        )  # fmt: skip
    return out
