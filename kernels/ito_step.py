"""ITO update: k Adam steps on `(1 - lambda) * L_G + lambda * L_rec` with closed-form gradients (ITO Eqs. 3-6).

Per sample, over n = C*h*w values of the latent y, with x the source latent and g the guidance latent at the same level:

    L_rec = mean(((1 - m) (y - x))^2)          dL_rec/dy = (2/n) (1 - m)^2 (y - x)
    L_G   = 1 - y.g / (|y| |g|)                dL_G/dy   = -(g / (|y||g|) - (y.g) y / (|y|^3 |g|))

Both gradients are zero where |y| or |g| is zero. Everything is at least float32 whatever the inputs are: in float16 g^2 and Adam's
eps underflow. With k=1 and a fresh state Adam is exactly `lr * grad / (|grad| + eps)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import definition, use_triton

BETAS = (0.9, 0.999)
EPS = 1e-8


@dataclass
class AdamState:
    """Adam's moments (B, C, h, w) float32 and how many steps they have seen: kept across timesteps by `carry`."""

    mean: Tensor
    square: Tensor
    steps: int = 0


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(B,) inner products. One reduction per sample: a batched one may round differently with B."""
    if len(a) == 1:
        return (a * b).sum().view(1)
    return torch.stack([(p * q).sum() for p, q in zip(a, b, strict=True)])


@definition
def ito_gradient(
    y: Tensor, x: Tensor, g: Tensor | None, mask: Tensor, lam: Tensor, *, kept_area: bool = False
) -> Tensor:
    """Gradient of `(1 - lam) * L_G + lam * L_rec` with respect to y.

    Args:
        y, x: (B, C, h, w).
        g: (B, C, h, w), or None where every lam is 1 (no guidance image).
        mask: (B, 1, h, w) in [0, 1]; 1 edits, 0 keeps.
        lam: (B,) in [0, 1].
        kept_area: normalise L_rec by the kept values, C * sum(1 - m), in place of n.

    Returns:
        (B, C, h, w) float32 (float64 if y is).
    """
    kind = torch.float64 if y.dtype == torch.float64 else torch.float32
    y, x, mask, lam = y.to(kind), x.to(kind), mask.to(kind), lam.to(kind)
    keep = 1 - mask
    count: Tensor | int = y.numel() // len(y)
    if kept_area:
        count = torch.stack([k.sum() for k in keep]).clamp(min=1) * y.shape[1]
    gradient = _per_sample(lam * 2 / count, y) * keep * keep * (y - x)
    if g is None:
        return gradient
    g = g.to(kind)
    yy, gg, yg = _dot(y, y).sqrt(), _dot(g, g).sqrt(), _dot(y, g)
    live = (yy > 0) & (gg > 0)
    along_g = torch.where(live, 1 / (yy * gg), 0)
    along_y = torch.where(live, yg / (yy**3 * gg), 0)
    cosine = _per_sample(along_y, y) * y - _per_sample(along_g, y) * g
    return gradient + _per_sample(1 - lam, y) * cosine


def ito_step(
    y: Tensor,
    x: Tensor,
    g: Tensor | None,
    mask: Tensor,
    lam: Tensor,
    *,
    k: int = 1,
    lr: float = 0.1,
    kept_area: bool = False,
    state: AdamState | None = None,
) -> Tensor:
    """k Adam steps (lr, betas 0.9 / 0.999, eps 1e-8) on y; shapes as in `ito_gradient`.

    Args:
        k: inner steps, at least 0.
        state: None starts fresh (METHOD section 2, row 6); otherwise it is used and updated in place (`carry`).

    Returns:
        (B, C, h, w), dtype of y; computed in float32 (the Triton kernels: in float64 and rounded once).
    """
    for name, value in (("x", x), ("g", g)):
        if value is not None and value.shape != y.shape:
            raise ValueError(f"ito_step: {name} is {tuple(value.shape)}, expected {tuple(y.shape)} as y")
    if mask.shape != (y.shape[0], 1, *y.shape[2:]):
        raise ValueError(f"ito_step: mask is {tuple(mask.shape)}, expected {(y.shape[0], 1, *y.shape[2:])}")
    if lam.shape != (y.shape[0],):
        raise ValueError(f"ito_step: lam is {tuple(lam.shape)}, expected {(y.shape[0],)}")
    if use_triton("ito_step", y, x, g, mask, lam):
        from .ito_step_triton import ito_step as fused

        return fused(y, x, g, mask, lam, k=k, lr=lr, kept_area=kept_area, state=state)
    kind = torch.float64 if y.dtype == torch.float64 else torch.float32
    value = y.to(kind)
    if state is None and k == 1:
        gradient = ito_gradient(value, x, g, mask, lam, kept_area=kept_area)
        return (value - lr * gradient / (gradient.abs() + EPS)).to(y.dtype)
    if state is None:
        state = AdamState(torch.zeros_like(value), torch.zeros_like(value))
    for _ in range(k):
        gradient = ito_gradient(value, x, g, mask, lam, kept_area=kept_area)
        state.steps += 1
        state.mean = BETAS[0] * state.mean + (1 - BETAS[0]) * gradient
        state.square = BETAS[1] * state.square + (1 - BETAS[1]) * gradient * gradient
        mean = state.mean / (1 - BETAS[0] ** state.steps)
        square = state.square / (1 - BETAS[1] ** state.steps)
        value = value - lr * mean / (square.sqrt() + EPS)
    return value.to(y.dtype)
