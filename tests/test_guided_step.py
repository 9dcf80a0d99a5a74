"""Guidance, DDIM step and blend: the reference against the formulas in float64, and the kernel against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from iedit.kernels.guided_step import blend, guided_step, guided_step_reference

SHAPE = (3, 4, 9, 13)


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Arguments of a guided step with a blend at the reference's level."""
    rng = torch.Generator().manual_seed(0)
    x, cond, uncond, reference, noise = (torch.randn(SHAPE, generator=rng, dtype=torch.float64) for _ in range(5))
    mask = torch.rand(3, 1, 9, 13, generator=rng, dtype=torch.float64)
    c_x, c_out, abar = torch.tensor([[0.9, 1.0, 1.1], [-0.1, 0.05, 0.2], [0.7, 0.5, 0.2]], dtype=torch.float64)
    tensors = {"x": x, "cond": cond, "uncond": uncond, "c_x": c_x, "c_out": c_out, "mask": mask, "reference": reference,
               "noise": noise, "reference_abar": abar}  # fmt: skip
    return {"scale": 7.5} | {name: value.to(dtype) for name, value in tensors.items()}


def test_it_is_the_formulas_sample_by_sample() -> None:
    a = inputs()
    got = guided_step(**a)
    for i in range(3):
        out = a["uncond"][i] + 7.5 * (a["cond"][i] - a["uncond"][i])
        y = a["c_x"][i] * a["x"][i] + a["c_out"][i] * out
        abar = float(a["reference_abar"][i])
        kept = abar**0.5 * a["reference"][i] + (1 - abar) ** 0.5 * a["noise"][i]
        torch.testing.assert_close(got[i], a["mask"][i] * y + (1 - a["mask"][i]) * kept, rtol=0, atol=1e-13)
        clean = guided_step(**a | {"noise": None, "reference_abar": None})[i]
        torch.testing.assert_close(clean, a["mask"][i] * y + (1 - a["mask"][i]) * a["reference"][i], rtol=0, atol=1e-13)
        alone = guided_step(**a | {"uncond": None, "mask": None, "noise": None})[i]
        torch.testing.assert_close(alone, a["c_x"][i] * a["x"][i] + a["c_out"][i] * a["cond"][i], rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_mask_s_ends_are_bit_for_bit(dtype: torch.dtype) -> None:
    a = inputs(dtype) | {"noise": None}
    assert torch.equal(guided_step(**a | {"mask": torch.zeros(3, 1, 9, 13)}), a["reference"])
    assert torch.equal(guided_step(**a | {"mask": torch.ones(3, 1, 9, 13)}), guided_step(**a | {"mask": None}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    a = inputs(dtype) | {n: inputs(torch.float32)[n] for n in ("c_x", "c_out", "reference_abar")}
    wide: dict[str, Any] = {n: v.float() if isinstance(v, Tensor) else v for n, v in a.items()}
    got = guided_step(**a)
    assert got.dtype == dtype and torch.equal(got, guided_step(**wide).to(dtype))


def test_a_batch_is_its_samples_bit_for_bit_and_on_a_cpu_the_operation_is_its_reference() -> None:
    a = inputs(torch.float32)
    together = guided_step(**a)
    assert torch.equal(together, guided_step_reference(**a))
    for i in range(3):
        one: dict[str, Any] = {n: v[i : i + 1] if isinstance(v, Tensor) else v for n, v in a.items()}
        assert torch.equal(together[i : i + 1], guided_step(**one))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cond": torch.zeros(1, 4, 9, 13)}, r"cond is \(1, 4, 9, 13\), expected \(3, 4, 9, 13\) as x"),
        ({"c_x": torch.tensor(1.0)}, r"c_x is \(\), expected \(3,\)"),
        ({"mask": torch.zeros(3, 9, 13)}, r"mask is \(3, 9, 13\), expected \(3, 1, 9, 13\) and a reference"),
        ({"reference": None}, "and a reference"),
        ({"reference_abar": None}, "noise needs reference_abar"),
    ],
)
def test_errors_name_the_tensor_what_came_and_what_was_wanted(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"guided_step: .*{says}"):
        guided_step(**inputs() | change)


def test_a_blend_wants_one_mask_for_all_channels() -> None:
    with pytest.raises(ValueError, match=r"blend: mask is \(3, 4, 9, 13\), expected \(3, 1, 9, 13\)"):
        blend(torch.zeros(SHAPE), torch.zeros(SHAPE), torch.zeros(SHAPE))


# --- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("blend", ["none", "trajectory", "noise"])
def test_the_kernel_rounds_float64_once_on_a_gpu(
    gpu_shape: tuple[int, ...], gpu_dtype: torch.dtype, blend: str, poisoned: None,
    gpu_draw: Callable[..., list[Tensor]], assert_rounded_once: Callable[..., None],
) -> None:  # fmt: skip
    shape = gpu_shape
    x, cond, uncond, reference, noise = gpu_draw(shape, gpu_dtype, 5, seed=1)
    mask = torch.rand(shape[0], 1, *shape[2:], device="cuda")
    c_x, c_out, target = (
        torch.linspace(a, b, shape[0], device="cuda") for a, b in ((0.9, 1.1), (-0.1, 0.2), (0.7, 0.2))
    )

    def run(step: Callable[..., Tensor], change: Callable[[Tensor], Tensor]) -> Tensor:
        more = {}
        if blend != "none":
            more = {"mask": change(mask), "reference": change(reference)}
        if blend == "noise":
            more |= {"noise": change(noise), "reference_abar": change(target)}
        return step(change(x), change(cond), change(uncond), 7.5, change(c_x), change(c_out), **more)

    assert_rounded_once(run(guided_step, lambda t: t), run(guided_step_reference, Tensor.double))
