"""ONNX graphs and the backend that runs them say what eager torch says, at every shape, from one file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from iedit.export import onnx as exporter
from iedit.export import verify
from iedit.runtime.backends import load_backend
from iedit.runtime.backends import ort as backend_onnx
from iedit.runtime.backends.eager import TorchBackend
from iedit.runtime.backends.engine_spec import SPEC_FILE, EngineSpec, damaged, find_engines, read_spec
from iedit.runtime.backends.fallback import FallbackBackend
from iedit.runtime.backends.ort import OnnxBackend, instance_norms, new_session
from iedit.runtime.denoise_step import Condition, ControlInput
from iedit.runtime.editor import Editor, EditRequest, MaskOptions, Options
from iedit.runtime.errors import RunError, UsageError
from iedit.runtime.profile import Profile

logging.getLogger("torch.__trace").setLevel(logging.WARNING)  # pytest would keep all that the tracer tells


@pytest.fixture(scope="session")
def built(tiny_engines: Path) -> tuple[Path, list[EngineSpec]]:
    """Modules of the tiny model and their specs. Not to be changed, copy it."""
    return tiny_engines, [spec for _, spec in find_engines(tiny_engines) if isinstance(spec, EngineSpec)]


@pytest.fixture
def engines(built: tuple[Path, list[EngineSpec]], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(built[0], tmp_path / "engines"))


@pytest.fixture(scope="module")
def backend(tiny: Any, built: tuple[Path, list[EngineSpec]]) -> OnnxBackend:
    return OnnxBackend(tiny, built[0])


def _call(model: Any, batch: int, size: tuple[int, int], length: int, names: tuple[str, ...] = ()) -> tuple[Any, ...]:
    """Latents, a timestep for each sample, and a condition whose layouts and scales all differ."""
    draw = torch.Generator().manual_seed(batch * size[0] + size[1])
    h, w = size[0] // model.vae_scale_factor, size[1] // model.vae_scale_factor
    x = torch.randn((batch, model.channels, h, w), generator=draw)
    t = torch.randint(0, 1000, (batch,), generator=draw)
    text = torch.randn((batch, length, model.unet.config.cross_attention_dim), generator=draw)
    maps = [torch.rand((batch, 3, *size), generator=draw) for _ in names]
    return x, t, Condition(text, tuple(ControlInput(n, m, 0.5 + 0.4 * i) for i, (n, m) in enumerate(zip(names, maps))))


def _close(got: Tensor, wanted: Tensor, limit: float = 1e-4) -> None:
    assert got.shape == wanted.shape
    assert got.dtype == torch.float32
    assert float((got - wanted).abs().max()) <= limit * float(wanted.std())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
@pytest.mark.parametrize("names", [(), ("pose",), ("pose", "scribble"), ("scribble", "pose")])
def test_one_graph_says_what_torch_says_at_every_batch_size_and_text_length(
    tiny: Any, backend: OnnxBackend, batch: int, size: tuple[int, int], names: tuple[str, ...]
) -> None:
    for length in (7, 20):
        x, t, condition = _call(tiny, batch, size, length, names)
        _close(backend.predict(x, t, condition), TorchBackend(tiny).predict(x, t, condition))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(64, 64), (24, 80)])
def test_the_vae_and_the_text_encoder_say_what_torch_says(
    tiny: Any, backend: OnnxBackend, batch: int, size: tuple[int, int]
) -> None:
    exact = TorchBackend(tiny)
    images = torch.rand((batch, 3, *size)) * 2 - 1
    latents = exact.encode_image(images)
    _close(backend.encode_image(images), latents)
    _close(backend.decode_latent(latents), exact.decode_latent(latents))
    for length in (5, 16):
        ids = torch.randint(0, tiny.text_encoder.config.vocab_size, (batch, length))
        _close(backend.encode_tokens(ids), exact.encode_tokens(ids))


def test_every_sample_has_a_timestep_and_a_result_of_its_own(tiny: Any, backend: OnnxBackend) -> None:
    x, _, condition = _call(tiny, 3, (64, 64), 7)
    x, condition = x[:1].repeat(3, 1, 1, 1), condition.with_prompt(condition.prompt_embeds[:1])
    output = backend.predict(x, torch.tensor([10, 500, 10]), condition)
    assert torch.allclose(output[0], output[2], atol=1e-6)
    assert not torch.allclose(output[0], output[1], atol=1e-3)
    kept = output.clone()
    backend.predict(2 * x, torch.tensor([1, 2, 3]), condition)
    assert torch.equal(output, kept)  # the next call does not write into it


def test_the_embedding_of_a_layout_is_made_once_for_a_condition(
    tiny: Any, built: tuple[Path, list[EngineSpec]]
) -> None:
    backend, profile, names = OnnxBackend(tiny, built[0]), Profile(), ("scribble", "pose")
    calls = [_call(tiny, 2, size, 7, names) for size in ((64, 64), (48, 80))]
    with profile.stage("final"):
        for _ in range(3):
            for x, t, condition in calls:
                _close(backend.predict(x, t, condition), TorchBackend(tiny).predict(x, t, condition))
                t.add_(1)
    rows = {r["module"]: r["calls"] for r in profile.by_module() if r["backend"] == "onnx"}
    assert rows == {"unet+pose+scribble": 6, "control-embedding-pose": 2, "control-embedding-scribble": 2}
    x, t, condition = calls[0]
    other = dataclasses.replace(condition, controls=tuple(dataclasses.replace(c, image=1 - c.image) for c in condition.controls))  # fmt: skip
    assert not torch.allclose(backend.predict(x, t, other), backend.predict(x, t, condition), atol=1e-3)


def test_the_control_embedding_engine_is_a_part_of_the_fused_one(tiny: Any, engines: Path) -> None:
    small = {"batch": [1, 1, 2], "height": [16, 64, 64], "width": [16, 64, 64]}
    _respec(engines / "onnx-fp32" / "control-embedding-scribble", shapes=[small])
    backend = OnnxBackend(tiny, engines)
    assert backend.why_not("unet+pose+scribble", 2, 64, 64) == []
    assert backend.why_not("unet+pose+scribble", 3, 64, 64) == []  # in two calls
    assert backend.why_not("unet+pose+scribble", 2, 80, 64) == [
        "onnx control-embedding-scribble engine was built for height 16-64, asked for 80"
    ]
    shutil.rmtree(engines / "onnx-fp32" / "control-embedding-scribble")
    fallback = load_backend("auto", tiny, engines)
    x, t, condition = _call(tiny, 1, (64, 64), 7, ("pose", "scribble"))
    profile = Profile()
    with profile.stage("final"):
        _close(fallback.predict(x, t, condition), TorchBackend(tiny).predict(x, t, condition))
    (why,) = profile.fallbacks[("unet+pose+scribble", "onnx")]
    assert "there is no engine for control-embedding-scribble in" in why
    with pytest.raises(
        UsageError, match=r"backend 'onnx' cannot run unet\+pose\+scribble: there is no engine for control-embedding-"
    ):
        OnnxBackend(tiny, engines).predict(x, t, condition)


def test_what_is_exported_for_layouts_has_their_control_embeddings(tiny: Any) -> None:
    assert exporter.module_names(tiny, ["scribble"]) == (
        "unet", "unet+scribble", "control-embedding-scribble", "vae_encoder", "vae_decoder", "text_encoder")  # fmt: skip
    assert {"control-embedding-pose", "control-embedding-scribble", "unet+pose+scribble"} <= set(
        exporter.module_names(tiny, ["pose", "scribble"])
    )
    assert tiny.module_digest("control-embedding-pose") == tiny.module_digest("controlnet-pose")


def test_inputs_of_any_dtype_and_stride_are_taken(tiny: Any, backend: OnnxBackend) -> None:
    x, t, condition = _call(tiny, 2, (64, 64), 7, ("pose",))
    wanted = backend.predict(x, t, condition)
    strided = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not strided.is_contiguous()
    assert torch.equal(backend.predict(strided, t.int(), condition), wanted)
    assert torch.equal(backend.predict(x.double(), t, condition), wanted)


def test_the_rewritten_norm_is_group_norm(tmp_path: Path) -> None:
    """At ragged sizes, with an offset that a wrong variance would show."""
    norm = torch.nn.GroupNorm(3, 12, eps=1e-6)
    made = exporter.Function(
        norm, {"x": torch.zeros(2, 12, 4, 5)}, ("y",),
        {"x": ("batch", 12, "height", "width"), "y": ("batch", 12, "height", "width")},
    )  # fmt: skip
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    proto = exporter.write_graph(made, tmp_path, 23)
    instance_norms(proto.graph)
    assert "GroupNormalization" not in {n.op_type for n in proto.graph.node}
    session = new_session(tmp_path / "model.onnx")
    assert not session.get_session_options().enable_mem_pattern  # it keeps memory for every shape that was ever seen
    for shape in ((1, 12, 3, 7), (3, 12, 8, 1)):
        x = torch.randn(shape) * 2 + 5
        (y,) = session.run(None, {"x": x.numpy()})
        _close(torch.from_numpy(y), made.module(x).detach(), 1e-5)


class FakeRuntime:
    """Of ONNX Runtime what a session needs, on a machine with a GPU.

    Args:
        loads: providers whose libraries can be loaded; where one cannot, a session goes on without it and says nothing.
    """

    def __init__(self, *loads: str):
        self.loads, self.sessions = loads, []  # type: ignore[var-annotated]
        self.GraphOptimizationLevel = type("GraphOptimizationLevel", (), {"ORT_ENABLE_ALL": 99})
        self.SessionOptions = type("SessionOptions", (), {"add_session_config_entry": lambda self, name, value: None})

    def get_available_providers(self) -> list[str]:
        return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(self, source: Any, options: Any, providers: list[Any]) -> Any:
        self.sessions.append((source, providers))
        names = [p if isinstance(p, str) else p[0] for p in providers]
        taken = [n for n in names if n in self.loads]
        return type("Session", (), {"get_providers": lambda self: taken})()


def test_a_provider_that_onnxruntime_quietly_leaves_out_is_an_error(
    tiny_engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = FakeRuntime("CPUExecutionProvider")
    monkeypatch.setattr(backend_onnx, "_onnxruntime", lambda: runtime)
    graph, cuda = tiny_engines / "onnx-fp32" / "unet" / "model.onnx", torch.device("cuda", 1)
    providers = backend_onnx._providers(cuda, None)
    assert providers == [
        ("CUDAExecutionProvider", {"device_id": "1", "cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}),
        "CPUExecutionProvider",
    ]
    with pytest.raises(RunError, match="took CPUExecutionProvider in place of CUDAExecutionProvider, whose libraries"):
        new_session(graph, providers)
    runtime.loads = ("CPUExecutionProvider", "CUDAExecutionProvider")
    new_session(graph, providers)
    assert runtime.sessions[-1][0] == str(graph)  # the rewrites were measured on a CPU
    new_session(graph)
    assert b"InstanceNormalization" in runtime.sessions[-1][0]


def test_a_broken_onnx_package_costs_the_rewrites_only(tiny_engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime("CPUExecutionProvider")
    monkeypatch.setattr(backend_onnx, "_onnxruntime", lambda: runtime)
    monkeypatch.setitem(sys.modules, "onnx", None)  # an import raises
    graph = tiny_engines / "onnx-fp32" / "unet" / "model.onnx"
    new_session(graph)
    assert runtime.sessions[-1][0] == str(graph)


def test_attention_that_a_version_computes_on_the_cpu_is_refused_on_a_gpu(
    tiny: Any, tiny_engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = read_spec(tiny_engines / "onnx-fp32" / "unet")
    assert spec.attention == "operator"
    assert read_spec(tiny_engines / "onnx-fp32" / "control-embedding-pose").attention == ""
    backend = OnnxBackend(tiny, tiny_engines)
    for device, version, told in (("cuda", "1.24.4", 1), ("cuda", "1.27.0", 0), ("cuda", "", 0), ("cpu", "1.24.4", 0)):
        monkeypatch.setattr(backend, "device", torch.device(device))
        monkeypatch.setattr(backend_onnx, "installed_version", lambda version=version: version)
        why = backend._differs(spec)
        assert len(why) == told and all("before onnxruntime-gpu 1.27, here is 1.24.4" in w for w in why)


# --- graphs -----------------------------------------------------------------------------------------------------


def test_a_dimension_that_the_exporter_fixed_is_refused(tmp_path: Path) -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, -1)

    made = exporter.Function(Fixed(), {"x": torch.zeros(2, 6)}, ("y",), {"x": (2, 6), "y": ("batch", 6)})
    with pytest.raises(RunError, match=r"dimension 0 \(batch\) of y was fixed at 2"):
        exporter.write_graph(made, tmp_path, 23)


def test_a_graph_holds_no_tracebacks_and_two_exports_are_the_same(
    tiny: Any, built: tuple[Path, list[EngineSpec]], tmp_path: Path
) -> None:
    exporter.write_graph(exporter.function(tiny, "control-embedding-pose"), tmp_path, 23)
    assert b".py" not in (tmp_path / "model.onnx").read_bytes()
    for name in ("model.onnx", "model.onnx.data"):
        first = built[0] / "onnx-fp32" / "control-embedding-pose" / name
        assert (tmp_path / name).read_bytes() == first.read_bytes()


def test_the_graph_digest_is_of_the_graph_and_not_of_the_weights(
    tiny: Any, built: tuple[Path, list[EngineSpec]], build_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from iedit.runtime.model.model import load_model

    other = load_model(str(build_checkpoint(tmp_path / "other", seed=2)), device="cpu")
    (spec,) = exporter.export_onnx(other, tmp_path / "engines", modules=["control-embedding-pose"])
    mine = next(s for s in built[1] if s.module == "control-embedding-pose")
    assert spec.graph == mine.graph
    assert spec.weights != mine.weights
    assert spec.files["model.onnx.data"] != mine.files["model.onnx.data"]


def test_tensorrt_knows_every_operator_and_an_unknown_one_is_named(built: tuple[Path, list[EngineSpec]]) -> None:
    for path in built[0].rglob("model.onnx"):
        assert exporter.unsupported_operators(onnx.load(str(path), load_external_data=False)) == []
    odd = onnx.helper.make_node("Det", ["x"], ["y"])
    graph = onnx.helper.make_graph([odd], "g", [], [])
    assert exporter.unsupported_operators(onnx.helper.make_model(graph)) == ["Det"]


@pytest.mark.parametrize("precision, opset", [("fp16", 22), pytest.param("bf16", 23, marks=pytest.mark.slow)])
def test_half_precision_has_float32_islands_and_leaves_the_model_alone(
    smallest: Any, tmp_path: Path, traced_once: Any, precision: str, opset: int
) -> None:
    before = {k: v.clone() for k, v in smallest.unet.state_dict().items()}
    classes = [type(m) for m in smallest.unet.modules()]
    with traced_once():
        exporter.export_onnx(smallest, tmp_path, precision=precision, opset=opset, modules=["unet"])
    assert [type(m) for m in smallest.unet.modules()] == classes
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in smallest.unet.state_dict().items())
    proto = onnx.load(str(tmp_path / f"onnx-{precision}" / "unet" / "model.onnx"), load_external_data=False)
    half = onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.BFLOAT16
    types = {v.name: v.type.tensor_type.elem_type for v in proto.graph.value_info}
    weights = {i.name: i.data_type for i in proto.graph.initializer}
    assert {v.type.tensor_type.elem_type for v in proto.graph.output} == {onnx.TensorProto.FLOAT}
    made = {o: n for n in proto.graph.node for o in n.output}
    seen = set()
    for node in proto.graph.node:
        seen.add(node.op_type)
        if node.op_type == "Conv":
            assert weights[node.input[1]] == half
        if node.op_type in ("GroupNormalization", "LayerNormalization"):
            assert weights[node.input[1]] == onnx.TensorProto.FLOAT
            assert types[node.output[0]] == onnx.TensorProto.FLOAT
        if node.op_type == "Softmax":
            assert made[node.input[0]].op_type == "Cast"
        if node.op_type == "Attention":
            assert {a.name: a.i for a in node.attribute}["softmax_precision"] == onnx.TensorProto.FLOAT
        if node.op_type == "Gather" and node.input[0].endswith("time_proj.rows"):
            seen.add("time table")
            assert weights[node.input[0]] == half
    assert {"Conv", "GroupNormalization", "time table", "Softmax" if opset == 22 else "Attention"} <= seen
    assert not seen & {"Sin", "Cos"}
    if precision == "fp16":
        runs = OnnxBackend(dataclasses.replace(smallest, dtype=torch.float16), tmp_path)
        rows = verify.check_module(smallest, runs, "unet", verify.LIMITS["fp16"])
        assert all(r["passed"] and r["largest"] > 0 for r in rows)
    else:
        with pytest.raises(UsageError, match="bf16"):
            OnnxBackend(dataclasses.replace(smallest, dtype=torch.bfloat16), tmp_path)


@pytest.mark.slow  # the quick tests have it in half precision
def test_opset_22_says_the_same(tiny: Any, tmp_path: Path) -> None:
    (spec,) = exporter.export_onnx(tiny, tmp_path, opset=22, modules=["unet"])
    assert spec.opset == 22
    x, t, condition = _call(tiny, 3, (48, 80), 7)
    _close(OnnxBackend(tiny, tmp_path).predict(x, t, condition), TorchBackend(tiny).predict(x, t, condition))


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tiny: Any, tmp_path: Path) -> None:
    for options, told in (
        ({"precision": "int8"}, "precision is 'int8', expected one of fp32, fp16, bf16"),
        ({"opset": 17}, "opset is 17, expected one of 22, 23"),
        ({"layouts": ["depth"]}, "no ControlNet for depth; it has pose, scribble"),
        ({"modules": ["unet+scribble+pose"]}, "module 'unet\\+scribble\\+pose' is not one of"),
        ({"modules": ["vae"]}, "module 'vae' is not one of"),
    ):
        with pytest.raises(UsageError, match=told):
            exporter.export_onnx(tiny, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# --- engines ----------------------------------------------------------------------------------------------------


def test_what_is_there_is_kept_and_force_exports_it_anew(tiny: Any, engines: Path) -> None:
    told: list[exporter.ExportProgress] = []
    options: dict[str, Any] = {"modules": ["control-embedding-pose"], "tell": told.append}
    before = read_spec(engines / "onnx-fp32" / "control-embedding-pose")
    assert exporter.export_onnx(tiny, engines, **options) == [before]
    assert [t.text for t in told] == ["kept"]
    exporter.export_onnx(tiny, engines, force=True, **options)
    assert [t.text for t in told] == ["kept", "exporting", "done"]
    _flip(engines / "onnx-fp32" / "control-embedding-pose" / "model.onnx.data")
    exporter.export_onnx(tiny, engines, **options)
    assert told[-1].text == "done"
    assert OnnxBackend(tiny, engines).why_not("unet+pose", 1, 64, 64) == []


def _flip(path: Path, at: int = -9) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_flipped_byte_is_refused_by_name(tiny: Any, engines: Path, name: str) -> None:
    _flip(engines / "onnx-fp32" / "unet+pose" / name)
    backend = OnnxBackend(tiny, engines)
    x, t, condition = _call(tiny, 1, (64, 64), 7, ("pose",))
    with pytest.raises(UsageError, match=f"files: {name} is not what was built"):
        backend.predict(x, t, condition)
    assert backend.why_not("unet", 1, 64, 64) == []


def test_flipped_weights_do_not_run_because_the_spec_leaves_them_out(tiny: Any, engines: Path) -> None:
    folder = engines / "onnx-fp32" / "unet"
    told = json.loads((folder / SPEC_FILE).read_text())
    del told["files"]["model.onnx.data"]
    (folder / SPEC_FILE).write_text(json.dumps(told))
    _flip(folder / "model.onnx.data")
    why = OnnxBackend(tiny, engines).why_not("unet", 1, 64, 64)
    assert "files: model.onnx.data belongs to the graph and is not among them" in why[1]


def test_engines_of_another_model_are_refused_by_the_field(
    built: tuple[Path, list[EngineSpec]], build_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from iedit.runtime.model.model import load_model

    other = load_model(str(build_checkpoint(tmp_path / "other", seed=2)), device="cpu")
    with pytest.raises(UsageError, match=r"weights: the engine has \w+, wanted \w+.*run `iedit export onnx"):
        OnnxBackend(other, built[0])


def _respec(folder: Path, **changes: Any) -> None:
    found = json.loads((folder / SPEC_FILE).read_text())
    (folder / SPEC_FILE).write_text(json.dumps(found | changes))


def test_an_engine_that_is_too_small_is_refused_with_its_range(tiny: Any, engines: Path) -> None:
    small = {"batch": [1, 1, 2], "height": [16, 64, 64], "width": [16, 64, 64]}
    _respec(engines / "onnx-fp32" / "unet", shapes=[small])
    backend = OnnxBackend(tiny, engines)
    assert backend.why_not("unet", 2, 64, 64) == []
    x, t, condition = _call(tiny, 1, (80, 64), 7)
    with pytest.raises(UsageError, match=r"backend 'onnx' cannot run unet: .*built for height 16-64, asked for 80"):
        backend.predict(x, t, condition)
    assert "height 16-64, asked for 80" in backend.why_not("unet", 1, 80, 64)[0]


@pytest.mark.parametrize(
    ("range_", "batch", "calls"),
    [([1, 1, 2], 5, [2, 2, 1]), ([1, 1, 3], 7, [2, 2, 2, 1]), ([3, 3, 3], 6, [3, 3]), ([1, 2, 8], 20, [8, 8, 4])],
)
def test_a_batch_that_is_too_large_for_an_engine_is_run_in_several_calls(
    tiny: Any, engines: Path, range_: list[int], batch: int, calls: list[int]
) -> None:
    for name in ("unet+pose", "control-embedding-pose"):
        _respec(engines / "onnx-fp32" / name, shapes=[{"batch": range_, "height": [8, 64, 64], "width": [8, 64, 64]}])
    backend, profile = OnnxBackend(tiny, engines), Profile()
    x, t, condition = _call(tiny, batch, (64, 64), 7, ("pose",))
    with profile.stage("final"):
        _close(backend.predict(x, t, condition), TorchBackend(tiny).predict(x, t, condition))
    assert [c.batch for c in profile.modules if c.module == "unet+pose" and c.backend == "onnx"] == calls
    assert [c.batch for c in profile.modules if c.module == "control-embedding-pose"] == calls


def test_a_batch_that_does_not_divide_into_what_an_engine_takes_is_refused(tiny: Any, engines: Path) -> None:
    _respec(engines / "onnx-fp32" / "unet", shapes=[{"batch": [4, 4, 8], "height": [8, 64, 64], "width": [8, 64, 64]}])
    backend = OnnxBackend(tiny, engines)
    assert backend.why_not("unet", 12, 64, 64) == []
    for batch, left in ((2, 2), (10, 2)):
        assert backend.why_not("unet", batch, 64, 64) == [f"onnx unet engine was built for batch 4-8, asked for {left}"]


def test_sizes_that_the_levels_cannot_halve_are_refused(tiny: Any, backend: OnnxBackend) -> None:
    assert backend.why_not("unet", 1, 72, 64) == [f"unet takes width and height in multiples of {tiny.multiple}, asked for 64x72"]  # fmt: skip
    assert backend.why_not("vae_encoder", 1, 72, 64) == []  # its own factor is 8
    assert backend.why_not("text_encoder", 1, 0, 0) == []


def test_half_precision_engines_are_not_taken_for_a_float32_model(tiny: Any, engines: Path) -> None:
    _respec(engines / "onnx-fp32" / "unet+pose", precision="fp16")
    why = OnnxBackend(tiny, engines).why_not("unet+pose", 1, 64, 64)
    assert why[0].startswith("there is no engine for unet+pose in ")
    assert "precision: the engine has fp16, wanted fp32" in why[1]


def test_an_engine_with_inputs_of_other_names_is_refused_by_them(tiny: Any, engines: Path) -> None:
    inputs = ["sample", "timestep", "encoder_hidden_states", "pose_hint", "pose_scale"]  # of an earlier version
    _respec(engines / "onnx-fp32" / "unet+pose", inputs=inputs)
    why = OnnxBackend(tiny, engines).why_not("unet+pose", 1, 64, 64)
    assert why[0].startswith("there is no engine for unet+pose in ")
    assert "inputs: the engine has ('sample', 'timestep', 'encoder_hidden_states', 'pose_hint', 'pose_scale')" in why[1]


def test_a_folder_without_a_spec_is_no_engine(tiny: Any, engines: Path) -> None:
    for path in engines.rglob(SPEC_FILE):
        path.unlink()
    with pytest.raises(UsageError, match=r"there are no ONNX engines in it; run `iedit export onnx"):
        OnnxBackend(tiny, engines)
    with pytest.raises(UsageError, match="no engine of"):
        load_backend("onnx", tiny, engines)


def test_a_build_in_its_temporary_folder_is_no_engine(engines: Path) -> None:
    folder = engines / "onnx-fp32"
    (folder / "unet").rename(folder / ".unet.0123abcd.building")
    assert "unet" not in {spec.module for _, spec in find_engines(engines) if isinstance(spec, EngineSpec)}


_EXPORT = """
import torch
torch.set_num_threads(1)
from iedit.export.onnx import export_onnx
from iedit.runtime.model.model import load_model
model = load_model(str(checkpoint), device="cpu")
export_onnx(model, out, modules=["control-embedding-pose"], tell=lambda t: told.send(t.text))
"""


@pytest.fixture(scope="module")
def start(tiny_folder: Path, forked: Any) -> Callable[[Path], tuple[Any, Any]]:
    """`start(out)`: a process that exports a small module, and a connection on which it tells what it does."""
    context = forked.context()

    def begin(out: Path) -> tuple[Any, Any]:
        told, telling = context.Pipe(duplex=False)
        given = {"checkpoint": tiny_folder, "out": out, "told": telling}
        process = context.Process(target=exec, args=(_EXPORT, given))
        process.start()
        telling.close()
        return process, told

    return begin


def _told(connection: Any) -> list[str]:
    """All that an export tells until it ends."""
    found = []
    with contextlib.suppress(EOFError):
        while True:
            found.append(connection.recv())
    return found


def test_a_killed_export_leaves_whole_engines_or_none_and_the_next_clears_up(
    start: Callable[[Path], tuple[Any, Any]], tiny: Any, tmp_path: Path
) -> None:
    for delay in (0.0, 1.0):
        out = tmp_path / f"killed-{delay}"
        process, told = start(out)
        while told.recv() != "exporting":
            pass
        time.sleep(delay)
        process.kill()
        process.join()
        for folder, spec in find_engines(out):
            assert isinstance(spec, EngineSpec)
            assert damaged(folder, spec) == []
    left = tmp_path / "killed-0.0" / "onnx-fp32"
    assert [p.suffix for p in left.glob(".control-embedding-pose.*.building")] == [".building"]
    exporter.export_onnx(tiny, left.parent, modules=["control-embedding-pose"])
    assert sorted(p.name for p in left.iterdir()) == [".control-embedding-pose.lock", "control-embedding-pose"]


def test_two_processes_build_an_engine_once(start: Callable[[Path], tuple[Any, Any]], tmp_path: Path) -> None:
    both = [start(tmp_path) for _ in range(2)]
    assert sorted(_told(told)[-1] for _, told in both) == ["done", "kept"]
    for process, _ in both:
        process.join()
        assert process.exitcode == 0


# --- edits ------------------------------------------------------------------------------------------------------


def _request(picture: Any, **changes: Any) -> EditRequest:
    options = Options(mask=MaskOptions(seeds=2, threshold=0.3))
    return dataclasses.replace(
        EditRequest(picture(1), "a blue car on grass at noon", "a red car on grass at noon", steps=6, options=options),
        **changes,
    )


def test_an_edit_is_the_same_edit(tiny: Any, backend: OnnxBackend, picture: Any) -> None:
    request = _request(picture, layouts={"pose": picture(2)}, source_layouts={"pose": picture(3)})
    wanted, got = Editor(tiny, TorchBackend(tiny)).edit(request), Editor(tiny, backend).edit(request)
    assert np.array_equal(np.asarray(wanted.mask), np.asarray(got.mask))
    assert float((wanted.latent - got.latent).abs().max()) < 1e-3
    calls = {row["module"]: row for row in got.profile.by_module()}
    assert {row["backend"] for row in calls.values()} == {"onnx"}
    assert {"unet", "unet+pose", "control-embedding-pose", "vae_decoder", "vae_encoder"} <= set(calls)
    assert (
        calls["control-embedding-pose"]["calls"] < calls["unet+pose"]["calls"]
    )  # once for a condition, not at every step
    assert sum(r["samples"] for m, r in calls.items() if m.startswith("unet")) == sum(got.profile.evaluations.values())
    assert got.profile.fallbacks == {}


def test_the_first_call_of_a_module_is_cold_and_the_second_is_not(
    tiny: Any, built: tuple[Path, list[EngineSpec]]
) -> None:
    backend, profile = OnnxBackend(tiny, built[0]), Profile()
    x, t, condition = _call(tiny, 2, (64, 64), 7)
    with profile.stage("final"):
        backend.predict(x, t, condition)
        backend.predict(x, t, condition)
    (row,) = profile.by_module()
    assert (row["module"], row["backend"], row["calls"], row["samples"], row["cold_calls"]) == ("unet", "onnx", 2, 4, 1)


def test_auto_steps_down_from_a_damaged_engine_and_says_why(tiny: Any, engines: Path, picture: Any) -> None:
    _flip(engines / "onnx-fp32" / "unet" / "model.onnx")
    fallback = load_backend("auto", tiny, engines)
    assert isinstance(fallback, FallbackBackend)
    result = Editor(tiny, fallback).edit(_request(picture))
    ran = {row["module"]: row["backend"] for row in result.profile.by_module()}
    assert ran | {"text_encoder": "onnx"} == {
        "text_encoder": "onnx",
        "vae_encoder": "onnx",
        "unet": "torch",
        "vae_decoder": "onnx",
    }
    why = result.profile.fallbacks[("unet", "onnx")]
    assert any("files: model.onnx is not what was built" in w for w in why)


def test_auto_without_engines_is_torch_and_says_why(tiny: Any, tmp_path: Path, picture: Any) -> None:
    result = Editor(tiny, load_backend("auto", tiny, tmp_path)).edit(_request(picture))
    assert {row["backend"] for row in result.profile.by_module()} == {"torch"}
    assert "there are no ONNX engines in it" in result.profile.fallbacks[("all", "onnx")][0]


def test_a_method_that_changes_attention_is_refused_before_anything_is_run_and_auto_gives_it_to_torch(
    tiny: Any, backend: OnnxBackend, picture: Any
) -> None:
    source, prompt = "a red car on grass at noon", "a blue car on grass at noon"
    asked, seen = EditRequest(picture(0), prompt, source, "p2p", steps=3), list[Any]()
    with pytest.raises(UsageError, match=r"'onnx' cannot run unet with attention control: .*--backend torch, or auto"):
        Editor(tiny, backend).edit(asked, seen.append)
    assert seen == []
    result = Editor(tiny, FallbackBackend([backend, TorchBackend(tiny)], tiny.vae_scale_factor)).edit(asked)
    wanted = Editor(tiny, TorchBackend(tiny)).edit(asked)
    assert (result.latent - wanted.latent).abs().max() < 1e-4 * wanted.latent.abs().max()
    ran = result.receipt["backend"]
    assert ran["modules"]["vae_encoder"] == ["onnx"] and sorted(ran["modules"]["unet"]) == ["onnx", "torch"]
    (why,) = [f for f in ran["fallbacks"] if f["module"] == "unet with attention control"]
    assert why["backend"] == "onnx" and "the attention of an engine is fixed" in why["reasons"][0]


def test_several_threads_share_a_backend(tiny: Any, built: tuple[Path, list[EngineSpec]]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    backend = OnnxBackend(tiny, built[0])
    calls = [_call(tiny, 1 + i % 3, (64, 64), 7) for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda c: backend.predict(*c), calls))
    for call, output in zip(calls, together, strict=True):
        assert torch.equal(output, backend.predict(*call))


def test_samples_are_shared_out_to_threads_where_a_batch_divides(
    tiny: Any, built: tuple[Path, list[EngineSpec]], backend: OnnxBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    two, profile = OnnxBackend(tiny, built[0], threads=2), Profile()
    calls = [_call(tiny, batch, (64, 64), 7, names) for batch, names in ((4, ()), (3, ()), (4, ()), (2, ("pose",)))]
    with profile.stage("final"):
        outputs = [two.predict(*call) for call in calls]
    for call, output in zip(calls, outputs, strict=True):
        _close(output, backend.predict(*call))
    unets = [(c.module, c.batch, c.cold) for c in profile.modules if c.module.startswith("unet")]
    assert unets == [("unet", 4, True), ("unet", 3, True), ("unet", 4, False), ("unet+pose", 2, True)]
    assert set(two._sessions) >= {("unet", 1), ("unet", 2), ("unet+pose", 1)} and ("unet+pose", 2) not in two._sessions
    # What fails in one of the threads fails the call; a UNet that is not small is held once.
    real, x, t, condition = two._execute, *_call(tiny, 4, (64, 64), 7)

    def broken(module: str, session: Any, given: Any, result: Tensor) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError("onnxruntime can't allocate memory: no")
        real(module, session, given, result)

    with monkeypatch.context() as patch:
        patch.setattr(two, "_execute", broken)
        with pytest.raises(MemoryError, match="allocate"):
            two.predict(x, t, condition)
    monkeypatch.setattr(backend_onnx, "SMALL", 1000)
    large = OnnxBackend(tiny, built[0], threads=2)
    _close(large.predict(x, t, condition), two.predict(x, t, condition))
    assert ("unet", 1) not in large._sessions


def test_out_of_memory_is_told_in_the_words_that_halve_the_batch(
    tiny: Any, backend: OnnxBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    from iedit.runtime.network import Network

    x, t, condition = _call(tiny, 4, (64, 64), 7)
    wanted = backend.predict(x, torch.full_like(t, int(t[0])), condition)
    session = backend._session("unet", 1)

    class Small:
        def io_binding(self) -> Any:
            return session.io_binding()

        def run_with_iobinding(self, binding: Any) -> None:
            if len(binding.get_outputs()[0].numpy()) > 2:
                raise RuntimeError("Failed to allocate memory for requested buffer of size 1")
            session.run_with_iobinding(binding)

    monkeypatch.setitem(backend._sessions, ("unet", 1), Small())
    profile = Profile()
    with profile.stage("final"):
        output = Network(backend, "epsilon", 8, profile).predict(x, int(t[0]), condition)
    _close(output, wanted)
    assert profile.calls["final"] == 2
    assert any("going on with batches of 2" in n for n in profile.notes)


# --- the embedded model and the real size -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_edits_of_the_world_are_the_same_edits(tmp_path: Path) -> None:
    from iedit.runtime.model.model import load_model
    from iedit.training import truth

    model = load_model("picturebook", device="cpu")
    exporter.export_onnx(model, tmp_path)
    method = truth.METHODS["ito"]
    cases = [c for kind in truth.KINDS for c in truth.edit_cases(kind, 20 // len(truth.KINDS) + 1)][:20]
    requests = [(f"{c.kind} {c.number}", truth.edit_request(c, method, 0, 25)) for c in cases]
    rows = verify.compare_edits(model, OnnxBackend(model, tmp_path), requests)
    print({k: float(np.mean([r[k] for r in rows])) for k in rows[0] if k != "edit"}, max(r["levels"] for r in rows))
    assert len(rows) == 20
    assert max(r["levels"] for r in rows) <= 2
    assert verify.edits_pass(rows, verify.LIMITS["fp32"]) == []


def test_an_edit_that_differs_by_more_than_its_limit_fails_by_name() -> None:
    good = {"edit": "colour 1", "iou": 1.0, "l1_inside": 0.0, "l1_outside": 0.0, "levels": 2}
    assert verify.edits_pass([good], verify.LIMITS["fp32"]) == []
    bad = good | {"edit": "thing 3", "levels": 3}
    assert verify.edits_pass([good, bad], verify.LIMITS["fp32"]) == [
        "edit thing 3: differs by 3 of 255, at most 2 wanted"
    ]
    assert verify.edits_pass([bad], verify.LIMITS["fp16"]) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_full_size_unet_exports_and_runs_at_every_size(root: Path, tmp_path: Path) -> None:
    """In processes of their own: what the exporter holds must not add to what ONNX Runtime needs."""
    if shutil.disk_usage(tmp_path).free < 12 << 30:
        pytest.skip("needs 12 GB of disk")
    environment = os.environ | {"PYTHONPATH": str(root / ".types"), "OMP_NUM_THREADS": "1"}

    def script(*words: str) -> None:
        subprocess.run([sys.executable, *words], env=environment, check=True)

    script(str(root / "bench" / "full_size.py"), "write", str(tmp_path / "model"))
    script("-c", _FULL_EXPORT, str(tmp_path / "model"), str(tmp_path / "engines"))
    script("-c", _FULL_RUN, str(tmp_path / "engines"))


_FULL_EXPORT = """
import resource, sys, time
from pathlib import Path
from iedit.export.onnx import export_onnx
from iedit.runtime.model.model import load_model
began = time.time()
model = load_model(sys.argv[1], layouts=[], device="cpu", dtype="float32")
export_onnx(model, Path(sys.argv[2]), modules=["unet"])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(f"export {time.time() - began:.0f} s, peak {peak:.1f} GiB", flush=True)
assert peak < 22
"""

_FULL_RUN = """
import resource, sys, time
from pathlib import Path
import numpy as np
from iedit.runtime.backends.ort import new_session
began = time.time()
session = new_session(next(Path(sys.argv[1]).rglob("model.onnx")))
print(f"load {time.time() - began:.0f} s", flush=True)
for batch, side in ((1, 256), (2, 384), (8, 256), (1, 768)):
    began = time.time()
    draw = np.random.default_rng(0)
    x = draw.standard_normal((batch, 4, side // 8, side // 8), np.float32)
    feed = {"sample": x, "timestep": np.arange(batch), "encoder_hidden_states": draw.standard_normal((batch, 77, 768), np.float32)}
    (y,) = session.run(None, feed)
    assert y.shape == x.shape and np.isfinite(y).all()
    print(f"batch {batch} at {side}: {time.time() - began:.1f} s", flush=True)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(f"peak {peak:.1f} GiB", flush=True)
assert peak < 22
"""
