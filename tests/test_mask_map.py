"""The mask map against a definition in float64 with numpy and scipy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from iedit.kernels.mask_map import (
    difference,
    difference_reference,
    gaussian_blur,
    mask_map,
    mask_map_reference,
    normalise,
)

Float = NDArray[np.float64]


def predictions(batch: int = 3, seeds: int = 5, h: int = 9, w: int = 14) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(batch, seeds, 4, h, w, generator=generator)
    gap = torch.randn(batch, seeds, 4, h, w, generator=generator) * 0.05
    gap[..., 2:6, 3:9] *= 8  # somewhere to edit
    gap *= torch.tensor([10.0 ** (i - 1) for i in range(batch)]).view(-1, 1, 1, 1, 1)  # a strong one beside a weak one
    return source + gap, source


def exact_heat(edited: Tensor, source: Tensor) -> Float:
    """(B, h, w) float64."""
    gap: Float = np.abs(edited.numpy().astype(np.float64) - source.numpy().astype(np.float64))
    return np.asarray(gap.mean(axis=(1, 2)))


def exact_map(heat: Float, sigma: float, norm: str) -> Float:
    out = []
    for image in heat:
        blurred = image
        if sigma > 0:
            radius = int(np.ceil(3 * sigma))
            blurred = ndimage.gaussian_filter(image, sigma, mode="nearest", radius=radius)
        if norm == "minmax":
            out.append((blurred - blurred.min()) / (blurred.max() - blurred.min()))
        else:
            out.append(np.minimum(blurred, 3 * blurred.mean()) / (3 * blurred.mean()))
    return np.stack(out)


def test_difference_is_the_mean_over_seeds_and_channels() -> None:
    edited, source = predictions()
    got = difference(edited, source)
    assert got.shape == (3, 1, 9, 14) and got.dtype == torch.float32
    # 20 terms added one by one in float32: at most 20 roundings, each half a unit of the running sum
    np.testing.assert_allclose(got[:, 0].numpy(), exact_heat(edited, source), rtol=21 * 2**-24, atol=2**-24)


@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.5])
@pytest.mark.parametrize(("h", "w"), [(9, 14), (16, 16), (3, 2), (1, 8)])
def test_blur_is_scipys_with_edges_replicated(sigma: float, h: int, w: int) -> None:
    """Also where the Gaussian is wider than the picture."""
    values = torch.rand(2, 1, h, w, generator=torch.Generator().manual_seed(1))
    got = gaussian_blur(values, sigma)
    radius = int(np.ceil(3 * sigma))
    for i in range(2):
        want = ndimage.gaussian_filter(values[i, 0].double().numpy(), sigma, mode="nearest", radius=radius)
        np.testing.assert_allclose(got[i, 0].numpy(), want, rtol=0, atol=4 * 2**-23)


def test_blur_of_a_flat_map_is_flat_up_to_its_edges() -> None:
    flat = torch.full((1, 1, 6, 7), 0.7)
    torch.testing.assert_close(gaussian_blur(flat, 1.0), flat, rtol=0, atol=2**-22)
    assert gaussian_blur(flat, 0) is flat


def test_blur_of_a_corner_keeps_more_than_inside() -> None:
    """Replicated edges: a peak in the corner is its own neighbour outside."""
    corner, inside = torch.zeros(1, 1, 9, 9), torch.zeros(1, 1, 9, 9)
    corner[..., 0, 0] = 1
    inside[..., 4, 4] = 1
    assert gaussian_blur(corner, 1.0)[0, 0, 0, 0] > 2 * gaussian_blur(inside, 1.0)[0, 0, 4, 4]
    assert abs(float(gaussian_blur(inside, 1.0).sum()) - 1) < 1e-6


@pytest.mark.parametrize(("norm", "threshold"), [("minmax", 0.1), ("minmax", 0.35), ("clamp", 0.5), ("clamp", 0.1)])
@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_mask_is_the_definition(norm: str, threshold: float, sigma: float) -> None:
    edited, source = predictions()
    exact = exact_map(exact_heat(edited, source), sigma, norm)
    got = mask_map(difference(edited, source), sigma=sigma, norm=norm, threshold=threshold)
    assert got.dtype == torch.float32 and got.shape == (3, 1, 9, 14)
    clear = np.abs(exact - threshold) > 1e-5  # a cell on the threshold may round to either side
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(got[:, 0].numpy()[clear], (exact > threshold)[clear].astype(np.float32))
    if (norm, threshold) == ("clamp", 0.1):
        assert got.mean() > 0.8  # nearly everything: why that normaliser keeps its own threshold
    else:
        assert 0.05 < got.mean() < 0.8


@pytest.mark.parametrize("norm", ["minmax", "clamp"])
def test_normalised_values_are_the_definition(norm: str) -> None:
    edited, source = predictions()
    heat = difference(edited, source)
    want = exact_map(heat[:, 0].double().numpy(), 0, norm)
    np.testing.assert_allclose(normalise(heat, norm)[:, 0].numpy(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["minmax", "clamp"])
@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_an_image_does_not_see_its_batch(norm: str, sigma: float) -> None:
    edited, source = predictions(batch=4, h=16, w=16)
    together = difference(edited, source)
    mask = mask_map(together, sigma=sigma, norm=norm, threshold=0.3)
    for i in range(4):
        alone = difference(edited[i : i + 1], source[i : i + 1])
        assert torch.equal(together[i : i + 1], alone)
        assert torch.equal(gaussian_blur(together, 1.0)[i : i + 1], gaussian_blur(alone, 1.0))
        assert torch.equal(normalise(together, norm)[i : i + 1], normalise(alone, norm))
        assert torch.equal(mask[i : i + 1], mask_map(alone, sigma=sigma, norm=norm, threshold=0.3))
    assert mask[0].sum() > 0  # the weakest of them, 1000 times below the strongest, has its mask


@pytest.mark.parametrize("norm", ["minmax", "clamp"])
def test_a_map_without_difference_marks_nothing(norm: str) -> None:
    flat = torch.zeros(2, 1, 8, 8)
    assert not mask_map(flat, sigma=1, norm=norm, threshold=0).any()
    assert not mask_map(torch.full((1, 1, 8, 8), 0.3), sigma=0, norm="minmax", threshold=0).any()


def test_scale_does_not_matter() -> None:
    """So the guidance scale need not be evaluated where the unconditional halves cancel."""
    edited, source = predictions()
    heat = difference(edited, source)
    for norm in ("minmax", "clamp"):
        torch.testing.assert_close(normalise(heat * 8, norm), normalise(heat, norm), rtol=0, atol=0)


def test_unknown_normaliser_is_refused() -> None:
    with pytest.raises(ValueError, match="norm is 'max', expected minmax or clamp"):
        mask_map(torch.zeros(1, 1, 8, 8), sigma=1, norm="max", threshold=0.1)


def test_on_a_cpu_the_operations_are_their_references() -> None:
    edited, source = predictions()
    heat = difference(edited, source)
    assert torch.equal(heat, difference_reference(edited, source))
    settings: dict[str, Any] = {"sigma": 1.0, "norm": "minmax", "threshold": 0.3}
    assert torch.equal(mask_map(heat, **settings), mask_map_reference(heat, **settings))


# --- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 3, 4, 17, 11), (1, 10, 4, 64, 64)])
def test_the_kernels_round_float64_once_on_a_gpu(
    shape: tuple[int, ...], gpu_dtype: torch.dtype, poisoned: None,
    gpu_draw: Callable[..., list[Tensor]], assert_rounded_once: Callable[..., None],
) -> None:  # fmt: skip
    a, b = gpu_draw(shape, gpu_dtype, 2, seed=2)
    heat = difference(a, b)
    assert_rounded_once(heat, (a.double() - b.double()).abs().mean((1, 2))[:, None])
    for norm, threshold in (("minmax", 0.5), ("clamp", 1 / 3)):
        for sigma in (0.0, 1.0):
            got = mask_map(heat, sigma=sigma, norm=norm, threshold=threshold)
            share = normalise(gaussian_blur(heat.double(), sigma), norm)
            clear = (share - threshold).abs() > 1e-5  # a cell on the threshold may fall either way
            assert torch.equal(got[clear], (share > threshold).float()[clear])
            assert set(got.unique().tolist()) <= {0.0, 1.0}
