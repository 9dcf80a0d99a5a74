"""`ito_step` in Triton: gradient, reductions and k Adam steps of a batch of latents in one launch, one program a sample.

k=1 with a fresh state (the paper's setting): two passes over blocks of `BLOCK` values, the first for |y|^2, |g|^2 and
y.g, the second for the update. Bytes moved a sample: y and g twice, x and the mask once, the result once. A latent
does not fit into registers (6 of them a value are needed, 4 are there at 4x64x64), so it is read twice, the second time
mostly from cache. k>1 keeps value and moments in float32 scratch between the passes; a barrier stands between passes
that read what other threads wrote. No atomics: the order of every sum is fixed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
BLOCK_MANY = 2048  # at 4096 float16 inputs spill 16 bytes on sm_90
WARPS = 16


@triton.jit
def _gradient(y, x, g, m, rec, along_y, along_g, GUIDED: tl.constexpr):
    keep = 1.0 - m
    gradient = rec * keep * keep * (y - x)
    if GUIDED:
        gradient += along_y * y - along_g * g
    return gradient


@triton.jit
def _values(m_ptr, n, hw, channels, KEPT: tl.constexpr, BLOCK: tl.constexpr):
    """What L_rec is a mean over: all n values, or those that are kept, channels * sum(1 - m)."""
    count = n.to(tl.float32)
    if KEPT:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, hw, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < hw
            total += tl.where(inside, 1.0 - tl.load(m_ptr + at, mask=inside, other=1.0).to(tl.float32), 0.0)
        count = tl.maximum(tl.sum(total, 0), 1.0) * channels
    return count


@triton.jit
def _cosine_factors(yy, gg, yg, weight):
    """Factors of y and g in (1 - lambda) dL_G/dy; zero where a norm is."""
    live = (yy > 0.0) & (gg > 0.0)
    ny = tl.sqrt(tl.where(live, yy, 1.0))
    ng = tl.sqrt(tl.where(live, gg, 1.0))
    along_g = tl.where(live, weight / (ny * ng), 0.0)
    along_y = tl.where(live, weight * yg / (ny * ny * ny * ng), 0.0)
    return along_y, along_g


@triton.jit
def ito_step_once(y_ptr, x_ptr, g_ptr, m_ptr, lam_ptr, out_ptr, lr, n, hw, channels,
                  GUIDED: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One sample: k=1, fresh state. n = channels * hw values."""
    sample = tl.program_id(0).to(tl.int64)  # int64: sample * n passes 2**31 at B=32, C=16, 2048x2048
    y_ptr += sample * n
    x_ptr += sample * n
    g_ptr += sample * n
    out_ptr += sample * n
    m_ptr += sample * hw
    lam = tl.load(lam_ptr + sample).to(tl.float32)
    rec = lam * 2.0 / _values(m_ptr, n, hw, channels, KEPT, BLOCK)
    along_y = 0.0
    along_g = 0.0
    if GUIDED:
        s_yy = tl.zeros((BLOCK,), tl.float32)
        s_gg = tl.zeros((BLOCK,), tl.float32)
        s_yg = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            y = tl.load(y_ptr + at, mask=at < n, other=0.0).to(tl.float32)
            g = tl.load(g_ptr + at, mask=at < n, other=0.0).to(tl.float32)
            s_yy += y * y
            s_gg += g * g
            s_yg += y * g
        along_y, along_g = _cosine_factors(tl.sum(s_yy, 0), tl.sum(s_gg, 0), tl.sum(s_yg, 0), 1.0 - lam)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < n
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + at % hw, mask=inside, other=0.0).to(tl.float32)
        g = y
        if GUIDED:
            g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
        gradient = _gradient(y, x, g, m, rec, along_y, along_g, GUIDED)
        tl.store(
            out_ptr + at, (y - lr * gradient / (tl.abs(gradient) + 1e-8)).to(out_ptr.dtype.element_ty), mask=inside
        )


@triton.jit
def ito_step_many(y_ptr, x_ptr, g_ptr, m_ptr, lam_ptr, out_ptr, value_ptr, mean_ptr, square_ptr, correction_ptr,
                  lr, n, hw, channels, k, GUIDED: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One sample: k steps with state. value, mean, square: float32 scratch of n values; correction: (k, 2) bias factors
    1 / (1 - beta^t), computed in float64 on the host (1 - 0.999 in float32 is off by 6e-5)."""
    sample = tl.program_id(0).to(tl.int64)
    y_ptr += sample * n
    x_ptr += sample * n
    g_ptr += sample * n
    out_ptr += sample * n
    value_ptr += sample * n
    mean_ptr += sample * n
    square_ptr += sample * n
    m_ptr += sample * hw
    lam = tl.load(lam_ptr + sample).to(tl.float32)
    rec = lam * 2.0 / _values(m_ptr, n, hw, channels, KEPT, BLOCK)
    s_gg = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < n
        if GUIDED:
            g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
            s_gg += g * g
        tl.store(value_ptr + at, tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32), mask=inside)
    gg = tl.sum(s_gg, 0)
    for step in range(k):
        tl.debug_barrier()
        along_y = 0.0
        along_g = 0.0
        if GUIDED:
            s_yy = tl.zeros((BLOCK,), tl.float32)
            s_yg = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, n, BLOCK):
                at = start + tl.arange(0, BLOCK)
                y = tl.load(value_ptr + at, mask=at < n, other=0.0)
                g = tl.load(g_ptr + at, mask=at < n, other=0.0).to(tl.float32)
                s_yy += y * y
                s_yg += y * g
            along_y, along_g = _cosine_factors(tl.sum(s_yy, 0), gg, tl.sum(s_yg, 0), 1.0 - lam)
        tl.debug_barrier()
        fix_mean = tl.load(correction_ptr + 2 * step)
        fix_square = tl.load(correction_ptr + 2 * step + 1)
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < n
            y = tl.load(value_ptr + at, mask=inside, other=0.0)
            x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            m = tl.load(m_ptr + at % hw, mask=inside, other=0.0).to(tl.float32)
            g = y
            if GUIDED:
                g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
            gradient = _gradient(y, x, g, m, rec, along_y, along_g, GUIDED)
            mean = 0.9 * tl.load(mean_ptr + at, mask=inside, other=0.0) + 0.1 * gradient
            square = 0.999 * tl.load(square_ptr + at, mask=inside, other=0.0) + 0.001 * gradient * gradient
            tl.store(mean_ptr + at, mean, mask=inside)
            tl.store(square_ptr + at, square, mask=inside)
            y = y - lr * (mean * fix_mean) / (tl.sqrt(square * fix_square) + 1e-8)
            tl.store(value_ptr + at, y, mask=inside)
    tl.debug_barrier()
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        y = tl.load(value_ptr + at, mask=at < n, other=0.0)
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=at < n)


def ito_step(y: Tensor, x: Tensor, g: Tensor | None, mask: Tensor, lam: Tensor, *, k: int, lr: float, kept_area: bool,
             state: Any) -> Tensor:  # fmt: skip
    """See `iedit.kernels.ito_step.ito_step`; the arguments have been checked there."""
    y, x, mask = y.contiguous(), x.contiguous(), mask.contiguous()
    g = y if g is None else g.contiguous()
    guided, out = g is not y, torch.empty_like(y)
    batch, channels, n, hw = y.shape[0], y.shape[1], y[0].numel(), y.shape[-1] * y.shape[-2]
    lam = lam.float().contiguous()
    shared = {"GUIDED": guided, "KEPT": kept_area, "num_warps": WARPS}
    if k == 1 and state is None:
        ito_step_once[(batch,)](y, x, g, mask, lam, out, lr, n, hw, channels, BLOCK=BLOCK, **shared)
        return out
    value = torch.empty(y.shape, dtype=torch.float32, device=y.device)
    first = 0 if state is None else state.steps
    mean = torch.zeros_like(value) if state is None else state.mean
    square = torch.zeros_like(value) if state is None else state.square
    fixes = [f for i in range(first + 1, first + k + 1) for f in (1 / (1 - 0.9**i), 1 / (1 - 0.999**i))]
    corrections = torch.tensor(fixes, dtype=torch.float32, device=y.device)
    ito_step_many[(batch,)](y, x, g, mask, lam, out, value, mean, square, corrections, lr, n, hw, channels, k, BLOCK=BLOCK_MANY,
                          **shared)  # fmt: skip
    if state is not None:
        state.steps += k
    return out
