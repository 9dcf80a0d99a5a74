"""ITO update: k steps on `(1 - lambda) * L_G + lambda * L_rec` with closed-form gradients (ITO Eqs. 3-6).

Per sample, over the C*h*w values of the latent y, with x the source latent and g the guidance latent at the same level:

    L_rec = sum(((1 - m) (y - x))^2) / count   dL_rec/dy = (2/count) (1 - m)^2 (y - x)
    L_G   = 1 - y.g / (|y| |g|)                dL_G/dy   = -(g / (|y||g|) - (y.g) y / (|y|^3 |g|))

`count` is C*h*w, or with `kept_area` the kept values, C * sum(1 - m). Both gradients are zero where |y| or |g| is zero.
Everything is at least float32 whatever the inputs are: in float16 g^2 and Adam's eps underflow.

Two updates (METHOD section 2, rows 5 and 6):

    clipped    y <- y - clip(gradient * count / 2, -lr, lr)
    adam       torch.optim.Adam; with k=1 and a fresh state exactly y <- y - lr * gradient / (|gradient| + eps)

`count / 2` is the inverse curvature of L_rec where all is kept, so the clipped step is its Newton step, never longer than lr: it
ends at x where it is near. Adam's first step has length lr however small the gradient is: it throws y off where y is at x
already, and turns rounding (a gradient of 1e-9 in place of -1e-9) into a difference of 2 lr.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import use_triton

UPDATES = ("clipped", "adam")
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


def ito_gradient(
    y: Tensor, x: Tensor, g: Tensor | None, mask: Tensor, lam: Tensor, *, kept_area: bool = False, newton: bool = False
) -> Tensor:
    """Gradient of `(1 - lam) * L_G + lam * L_rec` with respect to y.

    Args:
        y, x: (B, C, h, w).
        g: (B, C, h, w), or None where every lam is 1 (no guidance image).
        mask: (B, 1, h, w) in [0, 1]; 1 edits, 0 keeps.
        lam: (B,) in [0, 1].
        kept_area: normalise L_rec by the kept values, C * sum(1 - m), in place of n.
        newton: multiply by `count / 2`, which gives the step of the clipped update.

    Returns:
        (B, C, h, w) float32 (float64 if y is).
    """
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    y, x, mask, lam = y.to(dtype), x.to(dtype), mask.to(dtype), lam.to(dtype)
    keep = 1 - mask
    count: Tensor | float = y.numel() / len(y)
    if kept_area:
        count = torch.stack([k.sum() for k in keep]).clamp(min=1) * y.shape[1]
    preserve, guide = (lam, (1 - lam) * count / 2) if newton else (lam * 2 / count, 1 - lam)
    gradient = _per_sample(preserve, y) * keep * keep * (y - x)
    if g is None:
        return gradient
    g = g.to(dtype)
    yy, gg, yg = _dot(y, y).sqrt(), _dot(g, g).sqrt(), _dot(y, g)
    live = (yy > 0) & (gg > 0)
    along_g = torch.where(live, 1 / (yy * gg), 0)
    along_y = torch.where(live, yg / (yy**3 * gg), 0)
    cosine = _per_sample(along_y, y) * y - _per_sample(along_g, y) * g
    return gradient + _per_sample(guide, y) * cosine


def ito_step(
    y: Tensor,
    x: Tensor,
    g: Tensor | None,
    mask: Tensor,
    lam: Tensor,
    *,
    update: str = "clipped",
    k: int = 1,
    lr: float = 0.1,
    kept_area: bool = False,
    state: AdamState | None = None,
) -> Tensor:
    """k steps on y, clipped or Adam's (betas 0.9 / 0.999, eps 1e-8); shapes as in `ito_gradient`.

    Args:
        update: "clipped" or "adam"; see the formulas above.
        k: inner steps, at least 0.
        lr: the longest step of a value (clipped), Adam's learning rate.
        state: of Adam; None starts fresh (METHOD section 2, row 6); otherwise it is used and updated in place (`carry`).

    Returns:
        (B, C, h, w), dtype of y; computed in float32 (the Triton kernels: in float64 and rounded once).

    Raises:
        ValueError: a shape is not as above, another update, or a state that Adam cannot go on with.
    """
    for name, value in (("x", x), ("g", g)):
        if value is not None and value.shape != y.shape:
            raise ValueError(f"ito_step: {name} is {tuple(value.shape)}, expected {tuple(y.shape)} as y")
    if mask.shape != (y.shape[0], 1, *y.shape[2:]):
        raise ValueError(f"ito_step: mask is {tuple(mask.shape)}, expected {(y.shape[0], 1, *y.shape[2:])}")
    if lam.shape != (y.shape[0],):
        raise ValueError(f"ito_step: lam is {tuple(lam.shape)}, expected {(y.shape[0],)}")
    if update not in UPDATES:
        raise ValueError(f"ito_step: update is {update!r}, expected {' or '.join(UPDATES)}")
    if state is not None:
        if update != "adam":
            raise ValueError(f"ito_step: update {update} has no state to carry; use update='adam', or no state")
        for name, value in (("mean", state.mean), ("square", state.square)):
            if value.shape != y.shape or value.device != y.device:
                raise ValueError(
                    f"ito_step: the state's {name} is {tuple(value.shape)} on {value.device}, expected {tuple(y.shape)} "
                    f"on {y.device} as y; start a fresh one for another batch"
                )
    if use_triton("ito_step", y, x, g, mask, lam):
        from .ito_step_triton import ito_step as fused

        return fused(y, x, g, mask, lam, update=update, k=k, lr=lr, kept_area=kept_area, state=state)
    return ito_step_reference(y, x, g, mask, lam, update=update, k=k, lr=lr, kept_area=kept_area, state=state)


def ito_step_reference(y: Tensor, x: Tensor, g: Tensor | None, mask: Tensor, lam: Tensor, *, update: str = "clipped", k: int = 1,
                       lr: float = 0.1, kept_area: bool = False, state: AdamState | None = None) -> Tensor:  # fmt: skip
    """The definition of `ito_step` in plain torch; arguments and result as there, unchecked."""
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    value = y.to(dtype)
    if update == "clipped":
        for _ in range(k):
            step = ito_gradient(value, x, g, mask, lam, kept_area=kept_area, newton=True)
            value = value - step.clamp(-lr, lr)
        return value.to(y.dtype)
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
