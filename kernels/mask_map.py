"""Edit mask from two predictions: |a - b| over seeds and channels -> blur -> normalise -> threshold (ITO Eq. 7).

All of it is per image, never per batch: diffusers clamps at 3x the mean of the whole batch, where one image's mask
vanishes beside another's stronger one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dispatch import use_triton

NORMS = ("minmax", "clamp")


def difference(edited: Tensor, source: Tensor) -> Tensor:
    """Mean over seeds and channels of |edited - source|.

    Args:
        edited, source: (B, n, C, h, w) predictions under the two conditions, n seeds.

    Returns:
        (B, 1, h, w) float32.
    """
    if use_triton("difference", edited, source):
        from .mask_map_triton import difference as fused

        return fused(edited, source)
    return difference_reference(edited, source)


def difference_reference(edited: Tensor, source: Tensor) -> Tensor:
    """The definition of `difference` in plain torch; arguments and result as there."""
    gap = (edited.float() - source.float()).abs()
    # Added one by one: a batched reduction over two dimensions may round differently with B.
    total = torch.zeros_like(gap[:, 0, :1])
    for seed in range(gap.shape[1]):
        for channel in range(gap.shape[2]):
            total = total + gap[:, seed, channel : channel + 1]
    return total / (gap.shape[1] * gap.shape[2])


def gaussian_blur(values: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian, radius ceil(3 sigma), edges replicated. (B, 1, h, w) -> the same; sigma 0 changes nothing."""
    if sigma <= 0:
        return values
    radius = math.ceil(3 * sigma)
    weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-radius, radius + 1)]
    h, w = values.shape[-2:]
    rows = torch.arange(-radius, h + radius).clamp(0, h - 1)
    columns = torch.arange(-radius, w + radius).clamp(0, w - 1)
    tall = values[..., rows.to(values.device), :]
    values = sum(wt / sum(weights) * tall[..., i : i + h, :] for i, wt in enumerate(weights))  # type: ignore[assignment]
    wide = values[..., columns.to(values.device)]
    return sum(wt / sum(weights) * wide[..., i : i + w] for i, wt in enumerate(weights))  # type: ignore[return-value]


def normalise(values: Tensor, norm: str) -> Tensor:
    """(B, 1, h, w) -> [0, 1] per image. "minmax", or "clamp" (at 3x the image's mean, as diffusers does); flat -> 0."""
    flat = values.flatten(1)
    if norm == "minmax":
        lowest = flat.min(1).values.view(-1, 1, 1, 1)
        span = flat.max(1).values.view(-1, 1, 1, 1) - lowest
        return torch.where(span > 0, (values - lowest) / span.clamp(min=torch.finfo(torch.float32).tiny), 0)
    if norm == "clamp":
        top = torch.stack([v.mean() for v in flat]).view(-1, 1, 1, 1) * 3
        return torch.where(top > 0, values.clamp(max=top) / top.clamp(min=torch.finfo(torch.float32).tiny), 0)
    raise ValueError(f"normalise: norm is {norm!r}, expected minmax or clamp")


def mask_map(heat: Tensor, *, sigma: float, norm: str, threshold: float) -> Tensor:
    """Binary mask of a difference map.

    Args:
        heat: (B, 1, h, w) from `difference`.
        sigma: of the Gaussian, latent pixels; 0 for none.
        threshold: cells above it after normalisation are edited.

    Returns:
        (B, 1, h, w) float32, 0 or 1.
    """
    if norm not in NORMS:
        raise ValueError(f"mask_map: norm is {norm!r}, expected {' or '.join(NORMS)}")
    if use_triton("mask_map", heat):
        from .mask_map_triton import mask_map as fused

        return fused(heat, sigma, norm, threshold)
    return mask_map_reference(heat, sigma=sigma, norm=norm, threshold=threshold)


def mask_map_reference(heat: Tensor, *, sigma: float, norm: str, threshold: float) -> Tensor:
    """The definition of `mask_map` in plain torch; arguments and result as there."""
    return (normalise(gaussian_blur(heat, sigma), norm) > threshold).float()
