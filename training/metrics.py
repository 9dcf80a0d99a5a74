"""What the truth suite measures: pictures against pictures, masks against masks, points against points, and how sure a
share or a mean is.

Pictures are float tensors (B, C, H, W) in [0, 1], masks (B, 1, H, W) with 1 inside. A masked figure of an empty mask is
NaN, never 0 or a perfect score: there was nothing to measure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Z95 = 1.959963984540054  # the 97.5 % point of the normal distribution


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """(B, C, H, W) -> (B,): mean over everything, weighted with `mask` (B, 1, H, W) if given."""
    if mask is None:
        return values.flatten(1).mean(1)
    if mask.shape != (values.shape[0], 1, *values.shape[2:]):
        raise ValueError(f"metrics: mask is {tuple(mask.shape)}, expected {(values.shape[0], 1, *values.shape[2:])}")
    weight = mask.to(values.dtype)
    return (values * weight).flatten(1).sum(1) / (weight.flatten(1).sum(1) * values.shape[1])


def _same(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"metrics: pictures are {tuple(a.shape)} and {tuple(b.shape)}, expected one (B, C, H, W)")


def l1(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean absolute difference per picture, (B,), in [0, 1] units; within `mask` if given."""
    _same(a, b)
    return _mean((a - b).abs(), mask)


def psnr(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio per picture, (B,), in dB for a peak of 1; infinite for equal pictures."""
    _same(a, b)
    return -10 * _mean((a - b) ** 2, mask).log10()


def ssim_map(a: Tensor, b: Tensor, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Structural similarity at every pixel, (B, 1, H, W) in [-1, 1], mean over the channels.

    Wang et al. 2004: Gaussian window of 11 with sigma 1.5, K1 = 0.01, K2 = 0.03, weighted (not unbiased) moments; the
    border is reflected so that the map keeps the size of the picture. Needs pictures of at least 6x6.
    """
    _same(a, b)
    taps = torch.exp(-0.5 * ((torch.arange(window, dtype=a.dtype, device=a.device) - window // 2) / sigma) ** 2)
    taps = taps / taps.sum()
    channels, reach = a.shape[1], window // 2

    def blur(x: Tensor) -> Tensor:
        x = F.pad(x, (reach,) * 4, mode="reflect")
        x = F.conv2d(x, taps.expand(channels, 1, 1, -1), groups=channels)
        return F.conv2d(x, taps.view(-1, 1).expand(channels, 1, -1, 1), groups=channels)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, both = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return (top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean(1, keepdim=True)


def ssim(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of the SSIM map per picture, (B,); within `mask` if given (SSIM-M, SSIM-notM: METHOD section 3, row 12)."""
    return _mean(ssim_map(a, b), mask)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boolean masks (B, ...), per mask, (B,); two empty masks are equal: 1."""
    a, b = a.bool().flatten(1), b.bool().flatten(1)
    union = (a | b).sum(1)
    return torch.where(union > 0, (a & b).sum(1) / union.clamp_min(1), 1.0)


def joint_error(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> float:
    """Mean distance of corresponding points in pixels.

    Raises:
        ValueError: not the same number of points, or none.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"joint_error: {len(a)} and {len(b)} points, expected the same number and at least one")
    return sum(math.dist(p, q) for p, q in zip(a, b, strict=True)) / len(a)


def wilson(hits: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share, `hits` among `count` (Wilson 1927); within [0, 1], (0, 1) of none."""
    if count == 0:
        return 0.0, 1.0
    share, z2 = hits / count, Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(
    values: Sequence[float], weights: Sequence[float] | None = None, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % confidence interval of the (weighted) mean by the percentile bootstrap; the same numbers give the same interval.

    NaNs are left out; with no value left the interval is (NaN, NaN).
    """
    heavy = [1.0] * len(values) if weights is None else weights
    pairs = [(v, w) for v, w in zip(values, heavy, strict=True) if not math.isnan(v)]
    kept, weight = np.asarray([v for v, _ in pairs], np.float64), np.asarray([w for _, w in pairs], np.float64)
    if not len(kept):
        return math.nan, math.nan
    picks = np.random.default_rng(seed).integers(0, len(kept), (draws, len(kept)))
    low, high = np.quantile((kept * weight)[picks].sum(1) / weight[picks].sum(1), (0.025, 0.975), method="nearest")
    return float(low), float(high)
