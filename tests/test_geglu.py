"""The gate of a feed-forward layer against its definition with math.erf; on a GPU the kernel against that definition in torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from iedit.kernels.geglu import geglu, geglu_reference


def test_the_first_half_is_gated_by_the_second() -> None:
    x = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0))
    got = geglu(x)
    assert got.shape == (2, 3, 5)
    for row, made in zip(x.reshape(-1, 10).tolist(), got.reshape(-1, 5).tolist(), strict=True):
        want = [v * g * 0.5 * (1 + math.erf(g / math.sqrt(2))) for v, g in zip(row[:5], row[5:], strict=True)]
        assert made == pytest.approx(want, abs=1e-6)


def test_an_odd_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="odd"):
        geglu(torch.zeros(2, 7))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 4096, 2560), (2, 64, 10240), (3, 5, 202), (0, 4, 8)], ids=str)
def test_the_kernel_is_the_definition(
    shape: tuple[int, ...], dtype: torch.dtype, gpu_draw: Callable[..., list[Tensor]]
) -> None:
    (x,) = gpu_draw(shape, dtype, 1)
    got, want = geglu(x), geglu_reference(x.double())
    assert got.dtype == dtype and got.shape == want.shape
    if want.numel():
        rounding = float((want.to(dtype).double() - want).abs().max())
        assert float((got.double() - want).abs().max()) <= 2 * rounding + 2e-6
