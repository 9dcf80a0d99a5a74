"""Metrics against values that can be written down by hand, against torchmetrics, and against the formula in SciPy."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch
from scipy import linalg
from torchmetrics.functional import mean_squared_error
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from iedit.runtime.errors import UsageError
from iedit.training import metrics


def test_l1_and_psnr_of_a_constant_offset_are_the_offset() -> None:
    a = torch.full((2, 3, 8, 10), 0.25)
    b = a + 0.1
    assert metrics.l1(a, b).tolist() == pytest.approx([0.1, 0.1], rel=1e-5)
    assert metrics.psnr(a, b).tolist() == pytest.approx([20.0, 20.0], rel=1e-5)
    assert metrics.psnr(a, a).tolist() == [math.inf, math.inf]


def test_a_mask_counts_only_what_it_covers() -> None:
    a = torch.zeros(1, 3, 8, 8)
    b = a.clone()
    b[..., :4] = 0.5
    left = torch.zeros(1, 1, 8, 8)
    left[..., :4] = 1
    assert metrics.l1(a, b, left).item() == pytest.approx(0.5)
    assert metrics.l1(a, b, 1 - left).item() == 0.0
    assert metrics.psnr(a, b, left).item() == pytest.approx(-10 * math.log10(0.25), rel=1e-5)


def test_an_empty_mask_measures_nothing() -> None:
    a = torch.rand(1, 3, 16, 16)
    assert math.isnan(metrics.l1(a, a, torch.zeros(1, 1, 16, 16)).item())


def test_a_mask_of_another_size_is_refused() -> None:
    a = torch.rand(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"mask is \(1, 1, 16, 16\), expected \(2, 1, 16, 16\)"):
        metrics.l1(a, a, torch.ones(1, 1, 16, 16))
    with pytest.raises(ValueError, match="expected one"):
        metrics.l1(a, a[:1])


def test_ssim_of_a_picture_with_itself_is_one_and_of_its_negative_is_negative() -> None:
    torch.manual_seed(0)
    a = torch.rand(2, 3, 20, 24, dtype=torch.float64)
    assert metrics.ssim_map(a, a).shape == (2, 1, 20, 24)
    assert metrics.ssim(a, a).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)
    assert (metrics.ssim(a, 1 - a) < -0.5).all()


def test_ssim_of_two_constants_is_the_luminance_term() -> None:
    a = torch.full((1, 3, 16, 16), 0.2, dtype=torch.float64)
    b = torch.full((1, 3, 16, 16), 0.6, dtype=torch.float64)
    want = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert metrics.ssim(a, b).item() == pytest.approx(want, rel=1e-9)


def test_ssim_at_a_pixel_is_the_formula_with_an_explicit_window() -> None:
    torch.manual_seed(1)
    a, b = torch.rand(2, 1, 1, 15, 15, dtype=torch.float64)
    grid = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-(grid[:, None] ** 2 + grid[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    x, y = a[0, 0, 2:13, 2:13], b[0, 0, 2:13, 2:13]  # the window around pixel (7, 7)
    mx, my = (window * x).sum(), (window * y).sum()
    vx, vy, xy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum(), (window * (x - mx) * (y - my)).sum()
    want = (2 * mx * my + 1e-4) * (2 * xy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert metrics.ssim_map(a, b)[0, 0, 7, 7].item() == pytest.approx(want.item(), rel=1e-9)


def test_ssim_outside_a_mask_ignores_what_is_far_inside_it() -> None:
    a = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[..., :12] = 0.0
    far = torch.zeros(1, 1, 48, 48)
    far[..., 20:] = 1  # more than the window's reach of 5 pixels away
    assert metrics.ssim(a, b, far).item() == pytest.approx(1.0, abs=1e-6)
    assert metrics.ssim(a, b, 1 - far).item() < 0.8


def test_iou_of_half_overlapping_masks_is_a_third() -> None:
    a = torch.zeros(3, 4, 6)
    b = torch.zeros(3, 4, 6)
    a[0, :, 0:4], b[0, :, 2:6] = 1, 1
    a[1] = 1
    assert metrics.iou(a, b).tolist() == pytest.approx([1 / 3, 0.0, 1.0])


def test_joint_error_is_the_mean_distance() -> None:
    assert metrics.joint_error([(0, 0), (10, 10)], [(3, 4), (10, 10)]) == 2.5
    with pytest.raises(ValueError, match="1 and 0 points"):
        metrics.joint_error([(0, 0)], [])


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(90, 100, 0.82563, 0.94477), (0, 100, 0.0, 0.03699), (100, 100, 0.96301, 1.0), (5, 10, 0.23659, 0.76341)],
)
def test_wilson_gives_the_published_intervals(hits: int, count: int, low: float, high: float) -> None:
    assert metrics.wilson(hits, count) == pytest.approx((low, high), abs=2e-5)


def test_wilson_of_nothing_says_nothing() -> None:
    assert metrics.wilson(0, 0) == (0.0, 1.0)


def test_bootstrap_is_close_to_the_normal_interval_and_repeats() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    mean = sum(values) / 400
    half = 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values) / 399 / 400)
    low, high = metrics.bootstrap(values)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.015)
    assert metrics.bootstrap(values) == (low, high)
    assert metrics.bootstrap([2.0, math.nan, 2.0]) == (2.0, 2.0)
    assert all(math.isnan(v) for v in metrics.bootstrap([math.nan]))


def test_mse_psnr_and_ssim_are_torchmetrics() -> None:
    a, b = torch.rand(2, 3, 3, 40, 52, generator=torch.Generator().manual_seed(2))
    b = (a + 0.2 * b).clamp(0, 1)
    for i in range(3):
        one, other = a[i : i + 1], b[i : i + 1]
        assert metrics.mse(one, other).item() == pytest.approx(mean_squared_error(one, other).item(), rel=1e-4)
        want = peak_signal_noise_ratio(one, other, data_range=1.0)
        assert metrics.psnr(one, other).item() == pytest.approx(want.item(), rel=1e-4)
        similar = structural_similarity_index_measure(one, other, data_range=1.0)
        assert isinstance(similar, torch.Tensor)
        assert metrics.ssim(one, other).item() == pytest.approx(similar.item(), rel=1e-4)


def features(seed: int, count: int, width: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values: np.ndarray = rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)
    return values


def test_the_frechet_distance_is_the_formula_with_scipy_s_matrix_root() -> None:
    a, b = features(0, 80), features(1, 60)
    one, other = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(one @ other).real
    want = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + other - 2 * root)
    assert metrics.frechet_distance(a, b) == pytest.approx(want, rel=1e-4)
    assert metrics.frechet_distance(a.astype(np.float32), b.astype(np.float32)) == pytest.approx(want, rel=1e-4)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6 * np.trace(one))


def test_the_frechet_distance_of_gaussians_that_do_not_mix_is_a_sum_over_the_axes() -> None:
    axes = np.asarray([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])  # uncorrelated
    a, b = axes * [1, 2] + [3, 0], axes * [2, 5]
    spread = np.sqrt(4 / 3)
    assert metrics.frechet_distance(a, b) == pytest.approx(9 + (spread * 1) ** 2 + (spread * 3) ** 2, rel=1e-9)


def test_too_few_pictures_for_fid_is_said_and_can_be_had_anyway() -> None:
    with pytest.raises(UsageError, match="50 pictures on 2048 features: the covariance is singular"):
        metrics.frechet_distance(np.zeros((50, 2048)), np.zeros((3000, 2048)))
    a, b = features(2, 10), features(3, 10)
    with pytest.raises(UsageError, match=r"10 pictures on 12 features.*give more than 12"):
        metrics.frechet_distance(a, b)
    values, vectors = np.linalg.eigh(np.cov(a, rowvar=False))
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    crossed = np.sqrt(np.linalg.eigvalsh(root @ np.cov(b, rowvar=False) @ root).clip(0)).sum()
    want = (
        ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False)) - 2 * crossed
    )
    assert metrics.frechet_distance(a, b, singular=True) == pytest.approx(want, rel=1e-4)
    with pytest.raises(UsageError, match="1 picture has no spread"):
        metrics.frechet_distance(a[:1], b, singular=True)
    with pytest.raises(UsageError, match=r"\(10, 12\) and \(10, 11\)"):
        metrics.frechet_distance(a, b[:, :11])


def test_fid_without_torchmetrics_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'torchmetrics, which is not installed; pip install "iedit\[train\]"'):
        metrics.frechet_distance(features(0, 20), features(1, 20))


def test_csfid_is_the_mean_over_the_classes_of_the_distance_of_their_means() -> None:
    edits = np.asarray([[0.0, 0], [2, 0], [5, 5]])  # two into a cat, one into a dog
    real = {
        "cat": np.asarray([[1.0, 3], [1, 5]]),
        "dog": np.asarray([[5.0, 5], [5, 5], [5, 2]]),
        "fox": np.zeros((1, 2)),
    }
    assert metrics.csfid(edits, ["cat", "cat", "dog"], real) == pytest.approx((4**2 + 1) / 2)
    values, names = features(4, 30), [("a", "b", "c")[i % 3] for i in range(30)]
    own = {n: np.flatnonzero([m == n for m in names]) for n in "abc"}
    reference = {n: features(ord(n), 7) for n in "abc"}
    want = np.mean([np.linalg.norm(values[own[n]].mean(0) - reference[n].mean(0)) ** 2 for n in "abc"])
    assert metrics.csfid(values, names, reference) == pytest.approx(want, rel=1e-4)
    with pytest.raises(UsageError, match="no real picture of 'emu'"):
        metrics.csfid(edits, ["cat", "cat", "emu"], real)
    with pytest.raises(UsageError, match="0 edits and 0 classes"):
        metrics.csfid(edits[:0], [], real)


def test_preferences_are_the_softmax_over_the_methods() -> None:
    from scipy.special import softmax

    scores = np.random.default_rng(0).normal(20, 2, (3, 5))
    assert metrics.preference(scores) == pytest.approx(softmax(scores, axis=0), rel=1e-4)
    assert metrics.preference(np.asarray([[800.0], [0.0]])).tolist() == [[1.0], [0.0]]
