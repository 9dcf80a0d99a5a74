"""Triton kernels in Triton's interpreter against float64. Not collected: `test_kernels_triton.py` runs this file in a
process of its own, since `TRITON_INTERPRET` has to be set before a kernel is decorated and rules out compiling."""

from __future__ import annotations

import pytest
import torch

from iedit.kernels import guided_step as guided_definition
from iedit.kernels import ito_step as ito_definition
from iedit.kernels import mask_map as mask_definition
from iedit.kernels.dispatch import use_triton
from iedit.kernels.ito_step import AdamState

SHAPES = [(2, 4, 16, 16), (3, 4, 9, 13), (1, 16, 8, 8), (1, 4, 64, 64)]


@pytest.fixture(autouse=True)
def _forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes whatever is not float64, which is what the exact answers are computed in."""
    monkeypatch.setenv("IEDIT_KERNELS", "auto")
    assert use_triton("test", torch.zeros(1)) and not use_triton("test", torch.zeros(1, dtype=torch.float64))


def once(exact: torch.Tensor, dtype: torch.dtype = torch.float32) -> float:
    """Twice the error of rounding the exact answer once."""
    return 2 * float((exact.to(dtype).double() - exact).abs().max())


def sensitivity(*args: torch.Tensor | None, **kwargs: object) -> float:
    """How far the exact answer moves when its inputs are off by one float32 rounding: the update divides by |gradient| +
    1e-8, so where a gradient cancels to about 1e-8 no float32 computation can be nearer to it than this. Times 4, for the
    draws (8 of them) see less than the worst."""
    exact = ito_definition.ito_step(*args, **kwargs)  # type: ignore[arg-type]
    moved = 0.0
    for _ in range(8):
        off = [None if a is None else a * (1 + 2**-23 * torch.randn_like(a).sign()) for a in args]
        moved = max(moved, float((ito_definition.ito_step(*off, **kwargs) - exact).abs().max()))  # type: ignore[arg-type]
    return 4 * moved


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 3, 30])
@pytest.mark.parametrize("kind", ["empty", "full", "soft"])
def test_ito_step_matches_float64_on_every_lambda(shape: tuple[int, ...], k: int, kind: str) -> None:
    if k == 30 and shape[-1] == 64:
        shape = (1, 4, 20, 24)  # 30 passes of the interpreter over 16 384 values take 20 s
    torch.manual_seed(0)
    y, x, g = (torch.randn(shape) for _ in range(3))
    mask = {"empty": torch.zeros, "full": torch.ones, "soft": torch.rand}[kind](shape[0], 1, *shape[2:])
    lam = torch.tensor([0.6, 0.0, 1.0])[: shape[0]]
    for guide, kept in ((g, False), (None, True)):
        weight = lam if guide is not None else torch.ones(shape[0])
        parts = [t.double() if t is not None else None for t in (y, x, guide, mask, weight)]
        exact = ito_definition.ito_step(*parts, k=k, kept_area=kept)  # type: ignore[arg-type]
        got = ito_definition.ito_step(y, x, guide, mask, weight, k=k, kept_area=kept)
        allowed = sensitivity(*parts, k=k, kept_area=kept) + once(exact)
        error = (got.double() - exact).abs()
        assert error.max() <= allowed
        assert (error < 1e-5).double().mean() >= 0.99  # all but the few values whose gradient cancels


def test_ito_step_rounds_a_float16_result_once() -> None:
    torch.manual_seed(1)
    y, x, g = (torch.randn(2, 4, 16, 16).half() for _ in range(3))
    mask, lam = torch.rand(2, 1, 16, 16), torch.tensor([0.6, 0.3])
    exact = ito_definition.ito_step(y.double(), x.double(), g.double(), mask.double(), lam.double())
    got = ito_definition.ito_step(y, x, g, mask, lam)
    assert got.dtype == torch.float16
    assert (got.double() - exact).abs().max() <= once(exact, torch.float16)


def test_ito_step_of_zero_latents_stays_finite_and_still() -> None:
    zero, mask, lam = torch.zeros(1, 4, 16, 16), torch.zeros(1, 1, 16, 16), torch.tensor([0.6])
    assert torch.equal(ito_definition.ito_step(zero, zero, zero, mask, lam), zero)


def test_ito_step_carries_the_state_from_call_to_call() -> None:
    torch.manual_seed(2)
    y, x, g = (torch.randn(1, 4, 16, 16) for _ in range(3))
    mask, lam = torch.rand(1, 1, 16, 16), torch.tensor([0.6])
    state = AdamState(torch.zeros_like(y), torch.zeros_like(y))
    twice = y
    for _ in range(2):
        twice = ito_definition.ito_step(twice, x, g, mask, lam, k=2, state=state)
    assert state.steps == 4
    parts = [t.double() for t in (y, x, g, mask, lam)]
    exact = ito_definition.ito_step(*parts, k=4)
    assert (twice.double() - exact).abs().max() <= sensitivity(*parts, k=4) + once(exact)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("blend", ["none", "trajectory", "noise"])
def test_guided_step_matches_float64(prediction: str, blend: str) -> None:
    torch.manual_seed(3)
    shape = (2, 4, 9, 13)
    x, cond, uncond, reference, noise = (torch.randn(shape) for _ in range(5))
    mask = torch.rand(2, 1, 9, 13)
    c_x, c_eps, abar, target = (torch.tensor([0.9, 1.1]), torch.tensor([-0.1, 0.2]), torch.tensor([0.5, 0.1]),
                                torch.tensor([0.7, 0.2]))  # fmt: skip
    more: dict[str, torch.Tensor] = {}
    if blend != "none":
        more = {"mask": mask, "reference": reference}
    if blend == "noise":
        more |= {"noise": noise, "reference_abar": target}

    def run(kind: torch.dtype) -> torch.Tensor:
        return guided_definition.guided_step(
            x.to(kind), cond.to(kind), uncond.to(kind), 7.5, c_x.to(kind), c_eps.to(kind), abar=abar.to(kind),
            prediction=prediction, **{k: v.to(kind) for k, v in more.items()},
        )  # fmt: skip

    exact, got = run(torch.float64), run(torch.float32)
    # Guidance at 7.5 subtracts and multiplies before the sum: its terms, not the answer, set the size of a rounding.
    size = 7.5 * (cond - uncond).abs().max() + x.abs().max()
    assert (got.double() - exact).abs().max() <= 4 * 2**-23 * float(size)


def test_guided_step_keeps_the_reference_bit_for_bit_where_the_mask_is_empty() -> None:
    torch.manual_seed(4)
    x, cond, reference = (torch.randn(1, 4, 16, 16) for _ in range(3))
    one = torch.tensor([0.5])
    got = guided_definition.guided_step(
        x, cond, None, 1.0, one, one, abar=one, mask=torch.zeros(1, 1, 16, 16), reference=reference
    )
    assert torch.equal(got, reference)


@pytest.mark.parametrize("shape", [(2, 3, 4, 17, 11), (1, 10, 4, 64, 64)])
def test_difference_and_mask_match_their_definitions(shape: tuple[int, ...]) -> None:
    torch.manual_seed(5)
    a, b = torch.randn(shape), torch.randn(shape)
    heat = mask_definition.difference(a, b)
    exact = (a.double() - b.double()).abs().mean((1, 2), keepdim=True)[:, 0]
    planes = shape[1] * shape[2]  # a running sum of so many values rounds so many times, at its own size
    assert (heat.double() - exact).abs().max() <= planes * 2**-24 * float(exact.max())
    for norm, threshold in (("minmax", 0.5), ("clamp", 1 / 3)):  # clamp: 1 is 3x the mean
        for sigma in (0.0, 1.0):
            got = mask_definition.mask_map(heat, sigma=sigma, norm=norm, threshold=threshold)
            share = mask_definition.normalise(mask_definition.gaussian_blur(heat, sigma), norm)
            clear = (share - threshold).abs() > 1e-5  # a cell on the threshold may fall either way
            assert torch.equal(got[clear], (share > threshold).float()[clear])
            assert 0 < got.mean() < 1


def test_a_flat_difference_gives_an_empty_mask() -> None:
    heat = torch.full((1, 1, 16, 16), 0.25)
    assert mask_definition.mask_map(heat, sigma=1.0, norm="minmax", threshold=0.1).sum() == 0
