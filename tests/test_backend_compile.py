"""torch.compile says what eager torch says, and compiles once: another batch, prompt, timestep or scale is the same graph."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from iedit.runtime.backends import compiled, load_backend, why_unavailable
from iedit.runtime.backends.compiled import CompileBackend
from iedit.runtime.backends.eager import TorchBackend
from iedit.runtime.denoise_step import AttentionControl, Condition, ControlInput
from iedit.runtime.errors import RunError, UsageError
from iedit.runtime.profile import Profile


def _call(batch: int, seed: int, scale: float = 0.7) -> tuple[Any, ...]:
    draw = torch.Generator().manual_seed(seed)
    text, maps = torch.randn(batch, 7, 32, generator=draw), torch.rand(batch, 3, 64, 64, generator=draw)
    t = torch.randint(0, 1000, (batch,), generator=draw)
    return torch.randn(batch, 4, 8, 8, generator=draw), t, Condition(text, (ControlInput("pose", maps, scale),))


def test_one_compilation_serves_every_batch_prompt_timestep_and_scale(smallest: Any) -> None:
    from torch._dynamo.utils import compilation_time_metrics, counters

    why = why_unavailable("compile")
    assert not why, why  # a compiler is part of what the tests need
    backend, exact, profile = CompileBackend(smallest), TorchBackend(smallest), Profile()
    counters.clear()
    compilation_time_metrics.clear()
    kept = []
    # Two batches, then another prompt, timestep, map and scale at each.
    calls = [_call(2, 0), _call(3, 1), _call(2, 2, 0.2), _call(3, 3, 1.1)]
    with profile.stage("final"):
        for call in calls:
            kept.append(backend.predict(*call))
    for call, output in zip(calls, kept, strict=True):  # an output that the next call wrote into would not be its own
        wanted = exact.predict(*call)
        assert output.dtype == torch.float32
        assert float((output - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    attempts = [name for name in compilation_time_metrics if name.startswith("compile_attempt_")]
    assert attempts == ["compile_attempt_0"]  # a second one would trace the whole function again
    ran = [(c.module, c.batch, c.cold) for c in profile.modules if c.backend == "compile"]
    assert ran == [("unet+pose", 2, True), ("unet+pose", 3, True), ("unet+pose", 2, False), ("unet+pose", 3, False)]
    # What it listens to: the same latents under another text and another scale are not the same.
    x, t, condition = calls[0]
    louder = dataclasses.replace(condition, controls=tuple(dataclasses.replace(c, scale=2 * c.scale) for c in condition.controls))  # fmt: skip
    for other in (condition.with_prompt(condition.prompt_embeds + 1), louder):
        assert not torch.allclose(backend.predict(x, t, other), kept[0], atol=1e-3)
    assert not torch.allclose(backend.predict(x, (t + 500) % 1000, condition), kept[0], atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


def test_control_of_attention_and_the_features_of_an_adapter_are_inputs_of_the_compiled_function(smallest: Any) -> None:
    from diffusers import T2IAdapter
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    net: Any = T2IAdapter(channels=[8], num_res_blocks=1)
    model = dataclasses.replace(smallest, adapters={"sketch": net.eval().requires_grad_(False)})
    backend, exact = CompileBackend(model), TorchBackend(model)
    counters.clear()
    for pictures in (2, 3, 2):
        x, t, told = _call(3 * pictures, pictures)
        draw = torch.Generator().manual_seed(pictures)
        edited = torch.tensor([False, False, True] * pictures)
        control = AttentionControl(
            edited, torch.rand(len(x), 7, 7, generator=draw), torch.rand(len(x), 7, generator=draw), 64
        )
        (layout,) = told.controls
        told = dataclasses.replace(
            told, controls=(dataclasses.replace(layout, name="sketch", adapter=True),), attention=control, together=3
        )
        wanted = exact.predict(x, t, told)
        assert float((backend.predict(x, t, told) - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
        plain = dataclasses.replace(told, controls=(), attention=None)
        assert not torch.allclose(exact.predict(x, t, plain), wanted, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


class _Words(torch.nn.Module):
    """A text encoder of one table: tracing CLIP's takes nearly a second, and here it is the tracings that are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(50, 32)

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        return (self.table(ids).tanh(),)


@pytest.fixture
def words(tiny: Any) -> Any:
    """The random checkpoint with that text encoder."""
    return dataclasses.replace(tiny, text_encoder=_Words().requires_grad_(False))


def test_many_shapes_may_be_compiled_in_one_process(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo gives up on a function after 8 compilations if nobody says otherwise. Traced only, and anew for every shape."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, fullgraph, **_: compile_(f, fullgraph=fullgraph, dynamic=False, backend="eager")
    )
    backend, eager = CompileBackend(words), TorchBackend(words)
    for batch in range(1, 13):
        ids = torch.randint(0, 50, (batch, 8))
        assert torch.equal(backend.encode_tokens(ids), eager.encode_tokens(ids))


def test_the_last_compilation_that_is_allowed_is_told_in_a_line(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, fullgraph, **_: compile_(f, fullgraph=fullgraph, dynamic=False, backend="eager")
    )
    torch._dynamo.reset()  # what was compiled before counts too
    monkeypatch.setattr(compiled, "_LIMITS", {"recompile_limit": 2, "accumulated_recompile_limit": 4096})
    backend = CompileBackend(words)
    with pytest.raises(
        RunError, match=r"has compiled a module 2 times, .* start another process, or use --backend torch"
    ):
        for batch in range(1, 6):
            backend.encode_tokens(torch.randint(0, 50, (batch, 8)))


def test_the_first_shapes_may_be_compiled_each_for_itself(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA. What a compiled graph takes for its inputs says whether it is for one shape or for many."""
    compile_, batches = torch.compile, []

    def traced(graph: Any, inputs: Any) -> Any:
        symbolic = any(isinstance(i, torch.SymInt) for i in inputs)
        (batch,) = {i.shape[0] for i in inputs if torch.is_tensor(i) and i.dtype == torch.int64 and i.ndim == 2} - {1}
        batches.append("any" if symbolic else batch)
        return graph.forward

    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, fullgraph, dynamic, **_: compile_(f, fullgraph=fullgraph, dynamic=dynamic, backend=traced),
    )
    torch._dynamo.reset()
    backend, eager = CompileBackend(words, static_shapes=2), TorchBackend(words)
    for batch in (5, 3, 5, 3, 4, 6, 7, 5):
        ids = torch.randint(0, 50, (batch, 8))
        assert torch.equal(backend.encode_tokens(ids), eager.encode_tokens(ids))
    assert batches == [5, 3, "any"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_six_layout_sets_at_four_batches_and_three_sizes_run_in_one_process(
    smallest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """72 shapes. Traced only: it is Dynamo that counts."""
    from torch._dynamo.utils import counters

    compile_ = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, fullgraph, dynamic, **_: compile_(f, fullgraph=fullgraph, dynamic=dynamic, backend="eager"),
    )
    (net,) = smallest.controlnets.values()
    model = dataclasses.replace(smallest, controlnets={n: copy.deepcopy(net) for n in "abc"})
    backend, exact = CompileBackend(model), TorchBackend(model)
    counters.clear()
    for names in ("", "a", "b", "c", "ab", "abc"):
        for batch in (1, 2, 4, 20):
            for side in (64, 128, 192):
                x, t = torch.randn(batch, 4, side // 8, side // 8), torch.randint(0, 1000, (batch,))
                maps = tuple(ControlInput(n, torch.rand(batch, 3, side, side), 0.7) for n in names)
                call = (x, t, Condition(torch.randn(batch, 7, 32), maps))
                wanted = exact.predict(*call)
                assert float((backend.predict(*call) - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert counters["stats"]["unique_graphs"] <= 24


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's kernels are Triton's")
def test_without_a_compiler_it_says_so(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    want = "no C++ compiler: no-such-compiler is not on the path (install one, or name it in CXX)"
    assert why_unavailable("compile") == [want]
    with pytest.raises(UsageError, match="backend 'compile' was requested but cannot run: no C\\+\\+ compiler"):
        load_backend("compile", tiny)
