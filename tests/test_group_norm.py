"""GroupNorm with what stands around it, against a definition in float64 with numpy; on a GPU the kernel against that definition in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from iedit.kernels.group_norm import group_norm, group_norm_reference


def exact(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, shift: Tensor, silu: bool) -> Any:
    """(B, C, h, w) float64, a group at a time."""
    value = x.numpy().astype(np.float64) + shift.numpy()[:, :, None, None]
    out = np.empty_like(value)
    width = x.shape[1] // groups
    for sample in range(len(x)):
        for first in range(0, x.shape[1], width):
            part = value[sample, first : first + width]
            normal = (part - part.mean()) / np.sqrt(part.var() + eps)
            normal = (
                normal * weight.numpy()[first : first + width, None, None]
                + bias.numpy()[first : first + width, None, None]
            )
            out[sample, first : first + width] = normal / (1 + np.exp(-normal)) if silu else normal
    return out


@pytest.mark.parametrize("silu", [False, True])
def test_it_normalises_groups_of_what_is_shifted(silu: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    x, shift = torch.randn(2, 12, 5, 7, generator=rng), torch.randn(2, 12, generator=rng)
    weight, bias = torch.randn(2, 12, generator=rng)
    got = group_norm(x, 3, weight, bias, 1e-5, shift=shift, silu=silu)
    assert got.dtype == x.dtype and got.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(got.numpy(), exact(x, 3, weight, bias, 1e-5, shift, silu), rtol=0, atol=3e-6)
    plain = group_norm(x, 3, weight, bias, 1e-5, silu=silu)
    np.testing.assert_allclose(plain.numpy(), exact(x, 3, weight, bias, 1e-5, 0 * shift, silu), rtol=0, atol=3e-6)


def test_what_does_not_fit_is_named() -> None:
    x, ones = torch.zeros(2, 12, 4, 4), torch.ones(12)
    with pytest.raises(ValueError, match="12 channels do not make 5 groups"):
        group_norm(x, 5, ones, ones, 1e-5)
    with pytest.raises(ValueError, match=r"bias is \(6,\), expected \(12,\)"):
        group_norm(x, 3, ones, ones[:6], 1e-5)
    with pytest.raises(ValueError, match=r"shift is \(1, 12\), expected \(2, 12\)"):
        group_norm(x, 3, ones, ones, 1e-5, shift=torch.ones(1, 12))


def test_a_sample_larger_than_the_kernel_can_count_is_left_to_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    import iedit.kernels.group_norm as module

    x, ones = torch.randn(1, 12, 4, 4), torch.ones(12)
    want = group_norm(x, 3, ones, ones, 1e-5)
    monkeypatch.setattr(module, "use_triton", lambda *_: True)
    monkeypatch.setattr(module, "LARGEST", x[0].numel())
    assert torch.equal(group_norm(x, 3, ones, ones, 1e-5), want)


# Of SD 1.5 at 512x512: each width of a group, one tile and several parts, and its VAE's last block.
SHAPES = [(2, 320, 64, 64), (2, 960, 64, 64), (4, 640, 32, 32), (2, 1920, 32, 32), (2, 1280, 16, 16), (2, 2560, 8, 8), (1, 128, 512, 512),
          (3, 96, 17, 19)]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_is_the_definition(
    shape: tuple[int, ...], dtype: torch.dtype, gpu_draw: Callable[..., list[Tensor]]
) -> None:
    (x,), (weight, bias), (shift,) = (
        gpu_draw(shape, dtype, 1),
        gpu_draw(shape[1:2], dtype, 2, 1),
        gpu_draw(shape[:2], dtype, 1, 2),
    )
    x = x * 3 + 5
    for laid in (x, x.contiguous(memory_format=torch.channels_last)):
        got = group_norm(laid, 32, weight, bias, 1e-5, shift=shift, silu=True)
        want = group_norm_reference(x.double(), 32, weight.double(), bias.double(), 1e-5, shift.double(), True)
        rounding = float((want.to(dtype).double() - want).abs().max())
        assert float((got.double() - want).abs().max()) <= 2 * rounding + 2e-5
        assert got.is_contiguous(memory_format=torch.channels_last)
