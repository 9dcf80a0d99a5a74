"""Every kernel on a GPU against float64: what the interpreter cannot show (bfloat16, real masked loads, streams, graphs)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from iedit.kernels.guided_step import guided_step
from iedit.kernels.ito_step import UPDATES, AdamState, ito_step
from iedit.kernels.mask_map import difference, gaussian_blur, mask_map, normalise

pytestmark = pytest.mark.gpu

KINDS = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(3, 4, 16, 16), (3, 4, 9, 13), (3, 16, 17, 19), (3, 4, 64, 64), (2, 4, 96, 72)]


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IEDIT_KERNELS", "auto")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is NaN, not whatever lay there (often the right answer, of the call before)."""
    like, new = torch.empty_like, torch.empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: like(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: new(*a, **k).fill_(float("nan")))


def draw(shape: tuple[int, ...], kind: torch.dtype, count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to("cuda", kind) for _ in range(count)]


def assert_rounded_once(got: Tensor, exact: Tensor) -> None:
    """Every value within twice the error of rounding the exact answer once, the bound taken per sample."""
    error = (got.double() - exact).abs().flatten(1).amax(1)
    bound = 2 * (exact.to(got.dtype).double() - exact).abs().flatten(1).amax(1)
    assert torch.isfinite(got).all()
    assert (error <= bound).all(), f"{(error / bound).tolist()} of the bound, by sample"


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("k", [1, 3, 30])
@pytest.mark.parametrize("mask_kind", ["empty", "full", "soft"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ito_step(
    shape: tuple[int, ...], kind: torch.dtype, mask_kind: str, k: int, update: str, poisoned: None
) -> None:
    y, x, g = draw(shape, kind, 3)
    y[-1], g[-1] = 0, 0  # no direction
    soft = torch.rand(shape[0], 1, *shape[2:], device="cuda")
    mask = {"empty": soft * 0, "full": soft * 0 + 1, "soft": soft}[mask_kind]
    lam = torch.tensor([0.0, 1.0, 0.6], device="cuda")[-shape[0] :]
    for guide, kept in ((g, False), (g, True), (None, False)):
        exact = ito_step(*wide(y, x, guide, mask, lam), update=update, k=k, kept_area=kept)  # type: ignore[arg-type]
        assert_rounded_once(ito_step(y, x, guide, mask, lam, update=update, k=k, kept_area=kept), exact)


def test_ito_step_carries_a_state() -> None:
    y, x, g = draw((2, 4, 16, 16), torch.float32, 3)
    mask, lam = torch.rand(2, 1, 16, 16, device="cuda"), torch.full((2,), 0.6, device="cuda")
    state = AdamState(torch.zeros_like(y), torch.zeros_like(y))
    twice = y
    for _ in range(2):
        twice = ito_step(twice, x, g, mask, lam, update="adam", k=2, state=state)
    exact = ito_step(*wide(y, x, g, mask, lam), update="adam", k=4)  # type: ignore[arg-type]
    assert state.steps == 4
    # The state and the latent were rounded to float32 in between: most values do not notice, a cancelled gradient does.
    assert ((twice.double() - exact).abs() < 1e-5).double().mean() > 0.99


@pytest.mark.parametrize("blend", ["none", "trajectory", "noise"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_guided_step(shape: tuple[int, ...], kind: torch.dtype, blend: str, poisoned: None) -> None:
    x, cond, uncond, reference, noise = draw(shape, kind, 5, seed=1)
    mask = torch.rand(shape[0], 1, *shape[2:], device="cuda")
    c_x, c_out, target = (
        torch.linspace(a, b, shape[0], device="cuda") for a, b in ((0.9, 1.1), (-0.1, 0.2), (0.7, 0.2))
    )

    def run(change: Callable[[Tensor], Tensor]) -> Tensor:
        more = {}
        if blend != "none":
            more = {"mask": change(mask), "reference": change(reference)}
        if blend == "noise":
            more |= {"noise": change(noise), "reference_abar": change(target)}
        return guided_step(change(x), change(cond), change(uncond), 7.5, change(c_x), change(c_out), **more)

    assert_rounded_once(run(lambda t: t), run(Tensor.double))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 17, 11), (1, 10, 4, 64, 64)])
def test_difference_and_mask_map(shape: tuple[int, ...], kind: torch.dtype, poisoned: None) -> None:
    a, b = draw(shape, kind, 2, seed=2)
    heat = difference(a, b)
    assert_rounded_once(heat, (a.double() - b.double()).abs().mean((1, 2))[:, None])
    for norm, threshold in (("minmax", 0.5), ("clamp", 1 / 3)):
        for sigma in (0.0, 1.0):
            got = mask_map(heat, sigma=sigma, norm=norm, threshold=threshold)
            share = normalise(gaussian_blur(heat.double(), sigma), norm)
            clear = (share - threshold).abs() > 1e-5  # a cell on the threshold may fall either way
            assert torch.equal(got[clear], (share > threshold).float()[clear])
            assert set(got.unique().tolist()) <= {0.0, 1.0}


def every_kernel() -> dict[str, tuple[list[Tensor], Callable[..., Tensor]]]:
    """Name -> inputs and a call on them."""
    y, x, g = draw((2, 4, 64, 64), torch.float32, 3)
    mask, lam = torch.rand(2, 1, 64, 64, device="cuda"), torch.full((2,), 0.6, device="cuda")
    half = torch.full((2,), 0.5, device="cuda")
    seeds = torch.randn(2, 10, 4, 64, 64, device="cuda")
    return {
        "ito_step_once": ([y, x, g, mask, lam], lambda *t: ito_step(*t)),
        "ito_step_many": ([y, x, g, mask, lam], lambda *t: ito_step(*t, k=5)),
        "guided_step": (
            [y, x, g, mask, half],
            lambda y, x, g, mask, half: guided_step(y, x, g, 5.0, half, half, mask=mask, reference=x),
        ),
        "difference": ([seeds, seeds.roll(1, 0)], lambda a, b: difference(a, b)),
    }


@pytest.mark.parametrize("name", ["ito_step_once", "ito_step_many", "guided_step", "difference"])
def test_a_kernel_runs_on_the_stream_that_is_current(name: str) -> None:
    inputs, call = every_kernel()[name]
    want = call(*inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the inputs arrive late on this stream: a kernel elsewhere would read zeros
        late = [torch.zeros_like(t).copy_(t) for t in inputs]
        got = call(*late)
    stream.synchronize()
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["ito_step_once", "ito_step_many", "guided_step", "difference"])
def test_a_kernel_can_be_captured_in_a_cuda_graph(name: str) -> None:
    inputs, call = every_kernel()[name]
    static = [t.clone() for t in inputs]
    call(*static)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*static)
    for shift in (1, 2):
        fresh = [t if t.dim() == 1 else t.roll(shift, -1) for t in inputs]
        for box, t in zip(static, fresh, strict=True):
            box.copy_(t)
        graph.replay()
        assert torch.equal(out, call(*fresh))
