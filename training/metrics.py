"""What is measured: pictures against pictures, masks against masks, points against points, features against features, and how
sure a share or a mean is. What a network computes is in `metric_models.py`.

Pictures are float tensors (B, C, H, W) in [0, 1], masks (B, 1, H, W) with 1 inside. A masked figure of an empty mask is
NaN, never 0 or a perfect score: there was nothing to measure.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..runtime.errors import UsageError

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


def mse(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference per picture, (B,), in [0, 1] units; within `mask` if given."""
    _same(a, b)
    return _mean((a - b) ** 2, mask)


def psnr(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio per picture, (B,), in dB for a peak of 1; infinite for equal pictures."""
    return -10 * mse(a, b, mask).log10()


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


# --- features ---------------------------------------------------------------------------------------------------


def torchmetrics_folder() -> Path:
    """Where torchmetrics is installed.

    Raises:
        UsageError: it is not.
    """
    found = importlib.util.find_spec("torchmetrics")
    if found is None or found.origin is None:
        raise UsageError('this metric needs torchmetrics, which is not installed; pip install "iedit[train]"')
    return Path(found.origin).parent


def frechet_distance(a: np.ndarray, b: np.ndarray, singular: bool = False) -> float:
    """Fréchet distance of two sets of features, (N, D) and (M, D), taken for Gaussian: FID, where they are Inception's (Heusel et al. 2017).

    Args:
        singular: also where a set has no more vectors than a vector has entries. Its covariance is singular then and the distance far too
            large; it can be compared with others of the same numbers of pictures only.

    Raises:
        UsageError: a set has fewer than two vectors, or too few (see `singular`); the sets' vectors differ in length; torchmetrics is missing.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise UsageError(f"fid: features are {a.shape} and {b.shape}, expected (N, D) and (M, D)")
    fewest, width = min(len(a), len(b)), a.shape[1]
    if fewest < 2:
        raise UsageError(
            f"fid: {fewest} picture has no spread; give at least 2, and more than {width} for a figure that means something"
        )
    if fewest <= width and not singular:
        raise UsageError(
            f"fid: {fewest} pictures on {width} features: the covariance is singular and the distance far too large; give more than {width} "
            "pictures, or features of fewer entries, or ask for it anyway"
        )
    torchmetrics_folder()
    from torchmetrics.image.fid import FrechetInceptionDistance

    same = torch.nn.Identity()
    same.num_features = width
    distance = FrechetInceptionDistance(feature=same)
    distance.update(torch.from_numpy(a).double(), real=True)
    distance.update(torch.from_numpy(b).double(), real=False)
    return float(distance.compute())


def csfid(features: np.ndarray, classes: Sequence[str], reference: Mapping[str, np.ndarray]) -> float:
    """Class-wise simplified FID: the squared distance between the mean features of the edits into a class and of real pictures of that class,
    mean over the classes (FlexIT, Couairon et al. 2022; DiffEdit and ITO report it).

    The simplified FID of FlexIT's published program has the distance of the means alone: a handful of pictures has no covariance worth
    comparing.

    Args:
        features: (N, D) of the edits. classes: of each, the class that it was edited into.
        reference: class -> (M, D) of real pictures of it.

    Raises:
        UsageError: there is no edit, or a class without real pictures.
    """
    if not len(features) or len(features) != len(classes):
        raise UsageError(
            f"csfid: {len(features)} edits and {len(classes)} classes, expected one for each and at least one"
        )
    distances = []
    for name in dict.fromkeys(classes):
        if name not in reference or not len(reference[name]):
            raise UsageError(
                f"csfid: there is no real picture of {name!r} to compare with; give some, or leave the class out"
            )
        own = features[[c == name for c in classes]].astype(np.float64)
        distances.append(float(((own.mean(0) - reference[name].astype(np.float64).mean(0)) ** 2).sum()))
    return sum(distances) / len(distances)


def preference(scores: np.ndarray) -> np.ndarray:
    """PickScores (methods, cases) as shares that add up to 1 over the methods: how likely each method's picture is the one that people pick
    (Kirstain et al. 2023, Eq. 1); ITO's Table 1 has their mean over the cases."""
    shares = np.exp(scores - scores.max(0))
    return np.asarray(shares / shares.sum(0))


# --- masks and points -------------------------------------------------------------------------------------------


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


# --- how sure ---------------------------------------------------------------------------------------------------


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
