"""Every kernel on a GPU: streams and graphs, which the interpreter cannot show. What it computes is tested in the file of each operation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from iedit.kernels.geglu import geglu
from iedit.kernels.group_norm import group_norm
from iedit.kernels.guided_step import guided_step
from iedit.kernels.ito_step import ito_step
from iedit.kernels.mask_map import difference

pytestmark = pytest.mark.gpu

NAMES = ["ito_step_once", "ito_step_many", "guided_step", "group_norm", "geglu", "difference"]
Draw = Callable[..., list[Tensor]]


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IEDIT_KERNELS", "auto")


def every_kernel(gpu_draw: Draw) -> dict[str, tuple[list[Tensor], Callable[..., Tensor]]]:
    """Name -> inputs and a call on them."""
    y, x, g = gpu_draw((2, 4, 64, 64), torch.float32, 3)
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
        "group_norm": (
            gpu_draw((2, 320, 64, 64), torch.bfloat16, 1) + gpu_draw((320,), torch.bfloat16, 2),
            lambda x, weight, bias: group_norm(x, 32, weight, bias, 1e-5, silu=True),
        ),
        "geglu": (gpu_draw((2, 64, 2560), torch.bfloat16, 1), geglu),
        "difference": ([seeds, seeds.roll(1, 0)], lambda a, b: difference(a, b)),
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_runs_on_the_stream_that_is_current(name: str, gpu_draw: Draw) -> None:
    inputs, call = every_kernel(gpu_draw)[name]
    want = call(*inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the inputs arrive late on this stream: a kernel elsewhere would read zeros
        late = [torch.zeros_like(t).copy_(t) for t in inputs]
        got = call(*late)
    stream.synchronize()
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_can_be_captured_in_a_cuda_graph(name: str, gpu_draw: Draw) -> None:
    inputs, call = every_kernel(gpu_draw)[name]
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
