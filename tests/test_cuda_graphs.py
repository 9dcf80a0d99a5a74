"""Recorded steps say what the same steps say unrecorded, bit for bit; a tape stands in for the GPU's graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from iedit.runtime import denoise_step as steps
from iedit.runtime.backends.compiled import CompileBackend
from iedit.runtime.backends.cuda_graphs import CudaGraphCache, outline, tensors_of, with_tensors
from iedit.runtime.backends.eager import TorchBackend
from iedit.runtime.backends.graphs import GraphsBackend
from iedit.runtime.denoise_step import ItoUpdate, Transition
from iedit.runtime.editor import Editor, EditRequest, Options
from iedit.runtime.errors import RunError
from iedit.runtime.model.model import load_model
from iedit.runtime.options import ItoSettings
from iedit.runtime.stage_cache import StageCache

CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def move(batch: int = 1, *, guided: bool = True, seed: int = 0, scale: float = 5.0) -> Transition:
    x, source, guidance = draw(3, batch, 4, 8, 8, seed=seed)
    one = torch.ones(batch)
    update = ItoUpdate(source, guidance, torch.zeros(batch, 1, 8, 8), one * 0.5, 1, 0.1, False, "clipped")
    return Transition(x, guided, scale, one, one * 0.1, None, update)


def test_a_tree_is_taken_apart_and_put_together_again() -> None:
    tree = (move(), [torch.zeros(2), None], {"b": torch.ones(1), "a": 3})
    parts = list(tensors_of(tree))
    assert len(parts) == 3 + 4 + 2  # of the move, of its update, the rest
    again = with_tensors(tree, iter([p + 1 for p in parts]))
    assert torch.equal(again[0].update.lam, torch.full((1,), 1.5)) and torch.equal(again[2]["b"], torch.full((1,), 2.0))
    assert again[1][1] is None and again[2]["a"] == 3 and again[0].scale == 5.0
    assert outline(again) == outline(tree)


@pytest.mark.parametrize(
    "other",
    [move(2), move(guided=False), move(scale=7.5), [move()], (move(), move()), {"a": move()}],
    ids=["batch", "guidance", "scale", "list", "two", "mapping"],
)
def test_what_a_recording_holds_fixed_is_in_its_outline(other: Any) -> None:
    assert outline(move()) == outline(move(seed=3))
    assert outline(move()) != outline(other)
    assert hash(outline(other)) is not None


def test_the_first_call_runs_the_second_records_and_the_rest_replay(taped: Any) -> None:
    captures = taped.Captures()
    graphs, entered = CudaGraphCache(CPU, capture=captures), []

    def twice(inputs: list[Tensor]) -> list[Tensor]:
        entered.append(len(inputs))
        return [2 * inputs[0] + inputs[1]]

    kept, fixed = [], torch.full((3,), 0.5)
    for i in range(5):
        assert graphs.cold("twice", [fixed, fixed]) is (i < 2)
        kept.append(graphs("twice", twice, [torch.full((3,), float(i)), fixed])[0])
    assert len(entered) == 1 + 2 and captures.replays == 4  # as it is; a last time as it is and on tape
    for i, value in enumerate(kept):  # each is its own: no replay writes into it
        assert torch.equal(value, torch.full((3,), 2 * i + 0.5))
    fixed += 1  # in place: the same tensor with something else in it
    assert torch.equal(graphs("twice", twice, [fixed, fixed])[0], torch.full((3,), 4.5))
    assert graphs.cold("twice", [fixed[:2], fixed[:2]]) and graphs.cold("thrice", [fixed, fixed])


def test_the_recordings_used_last_are_kept(taped: Any) -> None:
    graphs = CudaGraphCache(CPU, held=2, capture=taped.Captures())
    for size in (1, 2, 1, 3, 1):
        for _ in range(2):
            graphs("f", lambda inputs: [inputs + 1], torch.zeros(size))
    assert [graphs.cold("f", torch.zeros(size)) for size in (1, 2, 3)] == [False, True, False]


def test_where_nothing_is_recorded_every_call_runs_and_the_first_of_an_outline_is_cold() -> None:
    graphs, entered = CudaGraphCache(CPU, capture=None), []

    def double(inputs: Tensor) -> list[Tensor]:
        entered.append(len(inputs))
        return [2 * inputs]

    for i, size in enumerate((3, 3, 2, 3)):
        assert not graphs.enabled and graphs.cold("double", torch.ones(size)) is (i in (0, 2))
        assert torch.equal(graphs("double", double, torch.ones(size))[0], torch.full((size,), 2.0))
    assert entered == [3, 3, 2, 3]


def test_what_is_recorded_may_be_another_function_with_memory_of_its_own(taped: Any) -> None:
    graphs, made = CudaGraphCache(CPU, capture=taped.Captures()), []

    def new_function() -> Callable[[Tensor], list[Tensor]]:
        made.append(torch.empty(3))  # its buffer
        return lambda inputs: [torch.add(inputs, 1, out=made[-1])]

    for i in range(4):
        (output,) = graphs("f", lambda inputs: [inputs + 1], torch.full((3,), float(i)), new_function)
        assert torch.equal(output, torch.full((3,), i + 1.0)) and not any(output is m for m in made)
    assert len(made) == 1  # the first call is not recorded, and the second one is recorded for all that follow


def test_what_cannot_be_recorded_runs_and_says_why(tiny: Any, taped: Any) -> None:
    def refuse(*_: Any) -> Callable[[], None]:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nadvice")

    backend = taped.Recorded(tiny, taped.Captures())
    backend.graphs = CudaGraphCache(CPU, capture=refuse)
    request = EditRequest(Image.new("RGB", (64, 64)), "a cat", method="sdedit", steps=4)
    result = Editor(tiny, backend).edit(request)
    assert torch.equal(result.latent, Editor(tiny, TorchBackend(tiny)).edit(request).latent)
    why = {"module": "unet", "backend": "cuda graph", "reasons": ["CUDA error: operation not permitted when stream is capturing"]}  # fmt: skip
    assert why in result.receipt["backend"]["fallbacks"]


def test_running_out_of_memory_in_a_whole_step_goes_on_with_smaller_calls(tiny: Any, taped: Any) -> None:
    class Full(taped.Recorded):
        def _function(self, module: str, of: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def run(x: Tensor, *rest: Any) -> Tensor:
                if len(x) > 1:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return of(x, *rest)

            return run if module.startswith("unet") else of

    request = EditRequest(Image.new("RGB", (64, 64)), "a cat", method="sdedit", steps=4)
    result = Editor(tiny, Full(tiny, taped.Captures())).edit(request)
    assert any("going on with batches of 1" in n for n in result.profile.notes)
    want = Editor(tiny, TorchBackend(tiny)).edit(request)
    assert torch.allclose(result.latent, want.latent, atol=1e-4)
    assert result.profile.evaluations == want.profile.evaluations


def _noting(kernels: list[str], name: str, of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def noting(*args: Any, **more: Any) -> Tensor:
        kernels.append(name)
        return of(*args, **more)

    return noting


def _request(picture: Any, how: str) -> EditRequest:
    scene = picture(0)
    if how == "layouts":
        maps = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)) for i in (1, 2)]
        return EditRequest(scene, "a blue house on sand", "a red car on grass", layouts={"pose": maps[0]},
                           source_layouts={"pose": maps[1]}, steps=6)  # fmt: skip
    options = {
        "ito": Options(),
        "k": Options(final=ItoSettings(k=3, t_u=4), guidance=ItoSettings(t_u=6)),
        "adam": Options(final=ItoSettings(update="adam"), guidance=ItoSettings(update="adam", k=2)),
        "carry": Options(final=ItoSettings(update="adam", carry=True, t_u=6)),
        "iedit": Options(),
        "diffedit": Options(),
    }[how]
    method = how if "edit" in how else "ito"
    return EditRequest(scene, "a blue house on sand", "a red car on grass", method, steps=6, options=options)


@pytest.mark.parametrize("how", ["ito", "k", "layouts", "iedit", "diffedit", "adam", "carry"])
def test_a_whole_edit_from_recordings_is_the_edit(
    tiny: Any, picture: Any, how: str, monkeypatch: Any, taped: Any
) -> None:
    """Three times: as it is, while recording, from graphs alone; each bit for bit what eager torch makes."""
    request, captures = _request(picture, how), taped.Captures()
    backend = taped.Recorded(tiny, captures)
    want = Editor(tiny, TorchBackend(tiny)).edit(request)
    results = [Editor(tiny, backend, cache=StageCache(memory=0)).edit(request) for _ in range(2)]
    kernels: list[str] = []
    for name in ("guided_step", "ito_step"):
        real = getattr(steps, name)
        monkeypatch.setattr(steps, name, _noting(kernels, name, real))
    entered, replays, recorded = backend.entered, captures.replays, len(captures.operators)
    results.append(Editor(tiny, backend, cache=StageCache(memory=0)).edit(request))
    for result in results:
        assert torch.equal(result.latent, want.latent) and result.image.tobytes() == want.image.tobytes()
        assert result.profile.evaluations == want.profile.evaluations
        assert not result.profile.fallbacks
    # The third edit: nothing new is recorded, and no network is entered but from a recording.
    calls = results[-1].profile.modules
    assert len(captures.operators) == recorded and backend.entered == entered
    assert captures.replays - replays == len(calls) and {c.backend for c in calls} == {"compile"}
    assert not any(c.cold for c in calls) and any(c.cold for c in results[0].profile.modules)
    # A step is one replay with its kernels in it; a state that is carried keeps them outside.
    assert (set(kernels) == {"guided_step", "ito_step"}) if how == "carry" else not kernels
    unets = [c for c in calls if c.module.startswith("unet") and c.stage != "mask"]
    assert len({(c.stage, c.step, c.module) for c in unets}) == len(unets)


def test_nan_in_a_recorded_step_is_still_named(tiny: Any, taped: Any) -> None:
    class Broken(taped.Recorded):
        def _function(self, module: str, of: Callable[..., Tensor]) -> Callable[..., Tensor]:
            if not module.startswith("unet"):
                return of
            return lambda x, t, *rest: of(x, t, *rest) + torch.where(t < 300, torch.nan, 0.0)[:, None, None, None]

    request = EditRequest(Image.new("RGB", (64, 64)), "a cat", method="sdedit", steps=10)
    with pytest.raises(RunError, match="NaN or infinity in stage sample, step"):
        Editor(tiny, Broken(tiny, taped.Captures())).edit(request)


@pytest.mark.gpu
def test_on_a_gpu_the_third_edit_is_replays_alone(tiny_checkpoint_cli: Any, picture: Any) -> None:
    from torch.profiler import ProfilerActivity, profile

    model = load_model(str(tiny_checkpoint_cli), device="cuda", dtype="float32")
    backend, request = CompileBackend(model), _request(picture, "ito")
    assert backend.graphs.enabled
    want = Editor(model, TorchBackend(model)).edit(request)
    editor = Editor(model, backend)
    for _ in range(3):
        editor.cache = StageCache(memory=0)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            result = editor.edit(request)
        assert not backend.graphs.failed
        # Other kernels, through some 70 calls of the network.
        assert (result.latent - want.latent).abs().max() < 1e-2 * want.latent.abs().max()
    calls = result.profile.modules
    assert not any(c.cold for c in calls)
    assert sum(row.count for row in seen.key_averages() if "GraphLaunch" in row.key) == len(calls)


def test_a_caller_may_be_in_inference_mode_at_one_call_and_not_at_the_next(taped: Any) -> None:
    captures = taped.Captures()
    cache = CudaGraphCache(CPU, capture=captures)

    def twice(x: Tensor) -> Tensor:
        (made,) = cache("twice", lambda inputs: [inputs[0] * 2], [x])
        return made

    with torch.inference_mode():
        x = torch.ones(4)
        assert [float(twice(x).sum()) for _ in range(3)] == [8.0] * 3
        x += 1  # it has no version that would tell
        assert float(twice(x).sum()) == 16.0
    assert float(twice(torch.full((4,), 5.0)).sum()) == 40.0  # the same recording
    with torch.inference_mode():
        assert float(twice(torch.full((4,), 7.0)).sum()) == 56.0
    assert captures.replays == 5 and len(captures.operators) == 1


def test_an_edit_in_inference_mode_is_the_edit(tiny: Any, taped: Any, picture: Callable[..., Image.Image]) -> None:
    request = EditRequest(picture(0), "a blue house on sand", "a red car on grass", steps=4)
    plain = Editor(tiny, TorchBackend(tiny), cache=StageCache(memory=0)).edit(request)
    captures = taped.Captures()
    backend = taped.Recorded(tiny, captures)
    editor = Editor(tiny, backend, cache=StageCache(memory=0))
    for inference in (True, True, True, False, True):
        with torch.inference_mode(inference):
            assert torch.equal(editor.edit(request).latent, plain.latent)
    assert captures.replays > 0 and not backend.graphs.failed


@pytest.mark.parametrize("how", ["ito", "layouts"])
def test_recorded_eager_networks_compute_what_eager_ones_do(tiny: Any, taped: Any, picture: Any, how: str) -> None:
    request = _request(picture, how)
    want = Editor(tiny, TorchBackend(tiny), cache=StageCache(memory=0)).edit(request)
    captures = taped.Captures()
    backend = GraphsBackend(tiny, graphs=CudaGraphCache(CPU, capture=captures))
    editor = Editor(tiny, backend, cache=StageCache(memory=0))
    for _ in range(3):
        result, replays = editor.edit(request), captures.replays
        assert torch.equal(result.latent, want.latent) and not result.profile.fallbacks
    calls = result.profile.modules
    assert {c.backend for c in calls} == {"graphs"} and replays
    assert not any(c.cold for c in calls)


@pytest.mark.parametrize("how", ["ito", "layouts"])
def test_an_edit_with_activations_channels_last_is_eager_s_within_one(
    tiny_folder: Any, taped: Any, picture: Any, how: str
) -> None:
    eager, other = (load_model(str(tiny_folder), device="cpu") for _ in range(2))
    request, captures = _request(picture, how), taped.Captures()
    want = Editor(eager, TorchBackend(eager), cache=StageCache(memory=0)).edit(request).image
    backend = GraphsBackend(other, channels_last=True, graphs=CudaGraphCache(CPU, capture=captures))
    editor = Editor(other, backend, cache=StageCache(memory=0))
    for _ in range(3):
        apart = np.asarray(editor.edit(request).image, dtype=int) - np.asarray(want, dtype=int)
        assert np.abs(apart).max() <= 1
    assert captures.replays and not backend.graphs.failed


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["ito", "layouts"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_on_a_gpu_recorded_eager_networks_compute_what_eager_ones_do(
    tiny_checkpoint_cli: Any, picture: Any, how: str, channels_last: bool
) -> None:
    model, other = (load_model(str(tiny_checkpoint_cli), device="cuda", dtype="float32") for _ in range(2))
    backend, request = GraphsBackend(other, channels_last=channels_last), _request(picture, how)
    want = Editor(model, TorchBackend(model), cache=StageCache(memory=0)).edit(request)
    editor = Editor(other, backend, cache=StageCache(memory=0))
    for _ in range(3):
        result = editor.edit(request)
        assert not backend.graphs.failed
        assert (result.latent - want.latent).abs().max() < 1e-4 * want.latent.abs().max()
