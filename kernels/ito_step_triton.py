"""`ito_step` in Triton: gradient, reductions and k steps of a batch of latents in one launch, one program a sample.

k=1 without a state to carry (the default): two passes over blocks of `BLOCK` values, the first for |y|^2, |g|^2 and
y.g, the second for the update. Bytes moved a sample: y and g twice, x and the mask once, the result once. A latent
does not fit into registers (6 of them a value are needed, 4 are there at 4x64x64), so it is read twice, the second time
mostly from cache. k>1 keeps the value, and Adam's moments, in float64 scratch between the passes; a barrier stands between
passes that read what other threads wrote. No atomics: the order of every sum is fixed. Nothing else is launched or copied, so
the call can be captured in a CUDA graph.

Why float64 in between. Adam's update is lr * g / (|g| + 1e-8) of a gradient that is a difference of terms near 1e-4: where they
cancel to 1e-8 or less, float32 leaves the sign of the step to chance (errors of 0.01 and more, at one value in 2 000 to 5 000
at 4x64x64; with only the sums in float64 still at one in 7 000). In float64, with divisions and roots done in float32 and
corrected by their residual, every value is the exact answer rounded once, cancelled or not, also after 30 steps. Value and
moments stay float64 between those: rounding the value each step puts 0.1 % (k=3) to 10 % (k=30) of the values over twice the
error of one rounding. The clipped update has no such cliff: it is in float64 because it shares these passes. That is some 20
float64 operations a value (35 a step for k>1): hidden behind the loads on sm_80, 90 and 100, which have one float64 unit to two
float32 ones; by arithmetic, not measured, 80 microseconds a launch at 4x64x64 on sm_89, which has one to 64.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import on_device_of
from .ito_step import AdamState

BLOCK = 2048  # at 4096 halves without guidance spill 8 bytes on sm_100
BLOCK_MANY = 1024  # at 2048 halves with a float32 state spill 8 bytes on sm_90
WARPS = 16


@triton.jit
def _gradient(y, x, g, m, rec, along_y, along_g, GUIDED: tl.constexpr):
    """In float64; the factors and y are, the rest is widened here."""
    keep = 1.0 - m.to(tl.float64)
    gradient = rec * keep * keep * (y - x.to(tl.float64))
    if GUIDED:
        gradient += along_y * y - along_g * g.to(tl.float64)
    return gradient


@triton.jit
def _values(m_ptr, n, hw, channels, KEPT: tl.constexpr, BLOCK: tl.constexpr):
    """What L_rec is a mean over: all n values, or those that are kept, channels * sum(1 - m)."""
    count = n.to(tl.float64)
    if KEPT:
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, hw, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < hw
            total += tl.where(inside, 1.0 - tl.load(m_ptr + at, mask=inside, other=1.0).to(tl.float64), 0.0)
        count = tl.maximum(tl.sum(total, 0), 1.0) * channels
    return count


@triton.jit
def _weights(lam, count, CLIPPED: tl.constexpr):
    """Factors of (1 - m)^2 (y - x) and of dL_G/dy in the gradient, or with CLIPPED in the gradient times count / 2."""
    if CLIPPED:
        return lam, (1.0 - lam) * count * 0.5
    else:
        return lam * 2.0 / count, 1.0 - lam


@triton.jit
def _cosine_factors(yy, gg, yg, weight):
    """Factors of y and g in weight * dL_G/dy; zero where a norm is. All float64."""
    live = (yy > 0.0) & (gg > 0.0)
    yy = tl.where(live, yy, 1.0)
    ny = tl.sqrt(yy)
    ng = tl.sqrt(tl.where(live, gg, 1.0))
    along_g = tl.where(live, weight / (ny * ng), 0.0)
    along_y = tl.where(live, weight * yg / (ny * ng) / yy, 0.0)
    return along_y, along_g


@triton.jit
def _divide(top, bottom):
    """top / bottom of float64 to about 1e-13: divided in float32 and corrected once by the residual. A float64 division is some
    20 operations, and the plain float32 one is off by more than a rounding where y is smaller than lr."""
    narrow = bottom.to(tl.float32)
    found = (top.to(tl.float32) / narrow).to(tl.float64)
    return found + ((top - found * bottom).to(tl.float32) / narrow).to(tl.float64)


@triton.jit
def _root(square):
    """sqrt of float64, the same way; the 1e-8 keeps zero out of the denominator."""
    root = tl.sqrt(square.to(tl.float32))
    exact = root.to(tl.float64)
    return exact + 0.5 * ((square - exact * exact).to(tl.float32) / (root + 1e-8)).to(tl.float64)


@triton.jit
def ito_step_once(y_ptr, x_ptr, g_ptr, m_ptr, lam_ptr, out_ptr, lr, lr_rest, n, hw, channels,
                  GUIDED: tl.constexpr, KEPT: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One sample: k=1, no state. n = channels * hw values. lr + lr_rest is the rate: one float32 is off by 1.5e-9 at 0.1."""
    sample = tl.program_id(0).to(tl.int64)  # int64: sample * n passes 2**31 at B=32, C=16, 2048x2048
    y_ptr += sample * n
    x_ptr += sample * n
    g_ptr += sample * n
    out_ptr += sample * n
    m_ptr += sample * hw
    lam = tl.load(lam_ptr + sample).to(tl.float64)
    rec, weight = _weights(lam, _values(m_ptr, n, hw, channels, KEPT, BLOCK), CLIPPED)
    rate = tl.full((), 0.0, tl.float64) + lr + lr_rest
    along_y = 0.0
    along_g = 0.0
    if GUIDED:
        s_yy = tl.zeros((BLOCK,), tl.float64)
        s_gg = tl.zeros((BLOCK,), tl.float64)
        s_yg = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            y = tl.load(y_ptr + at, mask=at < n, other=0.0).to(tl.float64)
            g = tl.load(g_ptr + at, mask=at < n, other=0.0).to(tl.float64)
            s_yy += y * y
            s_gg += g * g
            s_yg += y * g
        along_y, along_g = _cosine_factors(tl.sum(s_yy, 0), tl.sum(s_gg, 0), tl.sum(s_yg, 0), weight)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < n
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float64)
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        m = tl.load(m_ptr + at % hw, mask=inside, other=0.0)
        g = y
        if GUIDED:
            g = tl.load(g_ptr + at, mask=inside, other=0.0)
        gradient = _gradient(y, x, g, m, rec, along_y, along_g, GUIDED)
        if CLIPPED:
            y -= tl.minimum(tl.maximum(gradient, -rate), rate)
        else:
            y -= _divide(rate * gradient, tl.abs(gradient) + 1e-8)
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def ito_step_many(y_ptr, x_ptr, g_ptr, m_ptr, lam_ptr, out_ptr, value_ptr, mean_ptr, square_ptr, lr, lr_rest, first,
                  n, hw, channels, k, GUIDED: tl.constexpr, KEPT: tl.constexpr, CLIPPED: tl.constexpr,
                  CARRIED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One sample: k steps. value: float64 scratch of n values; mean, square: float64 scratch of Adam's, or with CARRIED a
    caller's float32 state after `first` steps; not touched if CLIPPED."""
    sample = tl.program_id(0).to(tl.int64)
    y_ptr += sample * n
    x_ptr += sample * n
    g_ptr += sample * n
    out_ptr += sample * n
    value_ptr += sample * n
    mean_ptr += sample * n
    square_ptr += sample * n
    m_ptr += sample * hw
    lam = tl.load(lam_ptr + sample).to(tl.float64)
    rec, weight = _weights(lam, _values(m_ptr, n, hw, channels, KEPT, BLOCK), CLIPPED)
    s_gg = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < n
        if GUIDED:
            g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float64)
            s_gg += g * g
        tl.store(value_ptr + at, tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float64), mask=inside)
    gg = tl.sum(s_gg, 0)
    rate = tl.full((), 0.0, tl.float64) + lr + lr_rest
    power_mean = tl.full((), 1.0, tl.float64)  # 0.9^t and 0.999^t of Adam's bias correction
    power_square = tl.full((), 1.0, tl.float64)
    for _ in range(first):
        power_mean = power_mean * 0.9
        power_square = power_square * 0.999
    for step in range(k):
        tl.debug_barrier()
        along_y = 0.0
        along_g = 0.0
        if GUIDED:
            s_yy = tl.zeros((BLOCK,), tl.float64)
            s_yg = tl.zeros((BLOCK,), tl.float64)
            for start in range(0, n, BLOCK):
                at = start + tl.arange(0, BLOCK)
                y = tl.load(value_ptr + at, mask=at < n, other=0.0)
                g = tl.load(g_ptr + at, mask=at < n, other=0.0).to(tl.float64)
                s_yy += y * y
                s_yg += y * g
            along_y, along_g = _cosine_factors(tl.sum(s_yy, 0), gg, tl.sum(s_yg, 0), weight)
        tl.debug_barrier()
        power_mean = power_mean * 0.9
        power_square = power_square * 0.999
        fix_mean = rate / (1.0 - power_mean)
        fix_square = 1.0 / (1.0 - power_square)
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < n
            y = tl.load(value_ptr + at, mask=inside, other=0.0)
            x = tl.load(x_ptr + at, mask=inside, other=0.0)
            m = tl.load(m_ptr + at % hw, mask=inside, other=0.0)
            g = y
            if GUIDED:
                g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float64)
            gradient = _gradient(y, x, g, m, rec, along_y, along_g, GUIDED)
            if CLIPPED:
                y -= tl.minimum(tl.maximum(gradient, -rate), rate)
            else:
                known = inside & (step + CARRIED > 0)  # a fresh state's scratch has not been written
                mean = 0.9 * tl.load(mean_ptr + at, mask=known, other=0.0).to(tl.float64) + 0.1 * gradient
                square = tl.load(square_ptr + at, mask=known, other=0.0).to(tl.float64)
                square = 0.999 * square + 0.001 * gradient * gradient
                tl.store(mean_ptr + at, mean.to(mean_ptr.dtype.element_ty), mask=inside)
                tl.store(square_ptr + at, square.to(square_ptr.dtype.element_ty), mask=inside)
                y -= _divide(mean * fix_mean, _root(square * fix_square) + 1e-8)
            tl.store(value_ptr + at, y, mask=inside)
    tl.debug_barrier()
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        y = tl.load(value_ptr + at, mask=at < n, other=0.0)
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=at < n)


def ito_step(y: Tensor, x: Tensor, g: Tensor | None, mask: Tensor, lam: Tensor, *, update: str, k: int, lr: float,
             kept_area: bool, state: AdamState | None) -> Tensor:  # fmt: skip
    """See `iedit.kernels.ito_step.ito_step`; the arguments have been checked there."""
    y, x, mask = y.contiguous(), x.contiguous(), mask.contiguous()
    g = y if g is None else g.contiguous()
    guided, out = g is not y, torch.empty_like(y)
    batch, channels, n, hw = y.shape[0], y.shape[1], y[0].numel(), y.shape[-1] * y.shape[-2]
    lam = lam.float().contiguous()
    shared = {"GUIDED": guided, "KEPT": kept_area, "CLIPPED": update == "clipped", "num_warps": WARPS}
    rate = float(np.float32(lr))  # what a kernel gets of a float
    if k == 1 and state is None:
        with on_device_of(y):
            ito_step_once[(batch,)](y, x, g, mask, lam, out, rate, lr - rate, n, hw, channels, BLOCK=BLOCK, **shared)
        return out
    value = torch.empty(y.shape, dtype=torch.float64, device=y.device)
    if state is not None:  # the kernel reads and writes it in place, in the order of y
        state.mean, state.square = state.mean.float().contiguous(), state.square.float().contiguous()
        mean, square = state.mean, state.square
    elif update == "adam":
        mean, square = torch.empty_like(value), torch.empty_like(value)
    else:
        mean, square = value, value
    first = 0 if state is None else state.steps
    with on_device_of(y):
        ito_step_many[(batch,)](y, x, g, mask, lam, out, value, mean, square, rate, lr - rate, first, n, hw, channels, k,
                                CARRIED=state is not None, BLOCK=BLOCK_MANY, **shared)  # fmt: skip
    if state is not None:
        state.steps += k
    return out
