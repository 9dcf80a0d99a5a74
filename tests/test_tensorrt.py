"""The TensorRT builder and backend, driven through a recording fake that knows only the names of a hand-written manifest.

What runs is all of `export/tensorrt.py` and `runtime/backends/trt.py`; what does not is TensorRT. The fake's engines call
the tiny checkpoint in torch on the memory whose addresses they were given.
"""

from __future__ import annotations

import ast
import contextlib
import contextvars
import importlib.util
import json
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from iedit.export import onnx as graphs_of
from iedit.export import tensorrt as builder
from iedit.export import verify as parity
from iedit.export.cli import tensorrt as command
from iedit.export.shapes import parse_shapes
from iedit.runtime import BACKENDS, backends
from iedit.runtime.backends import trt as backend_tensorrt
from iedit.runtime.backends.base import Backend
from iedit.runtime.backends.eager import TorchBackend
from iedit.runtime.backends.engine_spec import EngineSpec, Shapes, new_build, read_spec, write_spec
from iedit.runtime.backends.fallback import FallbackBackend
from iedit.runtime.backends.torch_modules import PreparedCondition
from iedit.runtime.backends.trt import TensorrtBackend
from iedit.runtime.cli.demo import sample_requests
from iedit.runtime.denoise_step import Condition, ControlInput
from iedit.runtime.editor import Editor, EditRequest
from iedit.runtime.errors import RunError, UsageError
from iedit.runtime.model import module_io
from iedit.runtime.profile import Profile

HERE = Path(__file__).parent
SOURCES = ("export/tensorrt.py", "runtime/backends/trt.py")
SMALL = Shapes((1, 2, 4), (64, 64, 64), (64, 64, 64))
WIDE = Shapes((1, 1, 2), (64, 128, 128), (64, 128, 192))
MODULES = (
    "unet",
    "unet+pose+scribble",
    "control-embedding-pose",
    "control-embedding-scribble",
    "vae_encoder",
    "vae_decoder",
    "text_encoder",
)


def _helper(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


manifest, fake = _helper("tensorrt_manifest"), _helper("fake_tensorrt")


@dataclass
class Machine:
    """A machine whose GPU and TensorRT are made up, and the graphs of the tiny checkpoint on it."""

    trt: ModuleType
    model: Any
    folder: Path
    graphs: Path

    @property
    def calls(self) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = self.trt.calls
        return found

    def executed(self) -> list[tuple[Any, ...]]:
        return [c for c in self.calls if c[0] == "execute"]

    def graph(self, module: str, kind: str = "FLOAT", opset: int = 22, **more: Any) -> Path:
        """The engine folder of an ONNX graph."""
        channels, width = self.model.channels, int(self.model.unet.config.cross_attention_dim)
        latents, images = [-1, channels, -1, -1], [-1, 3, -1, -1]
        dims: dict[str, Any] = {"sample": (latents, kind), "latents": (latents, kind), "images": (images, kind),
                                "timestep": ([-1], "INT64"), "encoder_hidden_states": ([-1, -1, width], kind),
                                "ids": ([-1, -1], "INT64")}  # fmt: skip
        start = int(self.model.unet.config.block_out_channels[0])
        more_dims = {"image": images, "embedding": [-1, start, -1, -1], "scale": [-1]}
        inputs = {n: dims.get(n) or (more_dims[n.split("_")[-1]], kind) for n in module_io.inputs(module)}
        first, factor = next(iter(inputs)), self.model.vae_scale_factor
        rows: dict[str, list[Any]] = {
            "vae_encoder": [[first, 0, 1, 1], channels, [first, 2, 1, factor], [first, 3, 1, factor]],
            "vae_decoder": [[first, 0, 1, 1], 3, [first, 2, factor, 1], [first, 3, factor, 1]],
            "text_encoder": [[first, 0, 1, 1], [first, 1, 1, 1], width],
        }
        if module.startswith("control-embedding-"):
            rows[module] = [[first, 0, 1, 1], start, [first, 2, 1, factor], [first, 3, 1, factor]]
        unet = [[first, 0, 1, 1], channels, [first, 2, 1, 1], [first, 3, 1, 1]]
        folder = self.graphs / f"{module}-{kind}"
        folder.mkdir(parents=True, exist_ok=True)
        output = {"name": module_io.output(module), "kind": kind, "dims": rows.get(module, unet)}
        fake.write_graph(folder / "model.onnx", module, inputs, output, **more)
        precision = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}[kind]
        write_spec(folder, EngineSpec("onnx", module, self.model.name, self.model.module_digest(module), "g", precision,
                                      (Shapes(),), opset, {"torch": "2"}, inputs=module_io.inputs(module),
                                      attention="operator" if more.get("attention") else ""), ["model.onnx"])  # fmt: skip
        return folder

    def build(
        self, module: str, shapes: tuple[Shapes, ...] = (SMALL,), kind: str = "FLOAT", name: str = "", **more: Any
    ) -> EngineSpec:
        tokens = self.model.tokenizer.model_max_length
        longest = tokens if module == "text_encoder" else 2 * tokens
        options = {"vae_scale_factor": self.model.vae_scale_factor, "text": (tokens, tokens, longest)} | more
        return builder.build_tensorrt(self.graph(module, kind), self.folder / (name or module), shapes, **options)

    def condition(self, batch: int, seed: int = 0, layouts: bool = False, side: int = 64) -> Condition:
        torch.manual_seed(seed)
        text = torch.randn(
            batch, self.model.tokenizer.model_max_length, int(self.model.unet.config.cross_attention_dim)
        )
        maps = torch.rand(2, batch, 3, side, side)
        named = (ControlInput("pose", maps[0], 0.8), ControlInput("scribble", maps[1], 0.3)) if layouts else ()
        return Condition(text, named)


@pytest.fixture(params=["10.12.0.36", "11.4.0.2"])
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _functions(model: Any) -> dict[str, Callable[..., Tensor]]:
    torch_backend = TorchBackend(model)

    def unet(sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **layouts: Tensor) -> Tensor:
        names = sorted(n.removesuffix("_scale") for n in layouts if n.endswith("_scale"))
        assert all((layouts[f"{n}_scale"] == layouts[f"{n}_scale"][0]).all() for n in names)
        named = tuple(
            ControlInput(n, layouts[f"{n}_control_embedding"].float(), float(layouts[f"{n}_scale"][0])) for n in names
        )
        told = Condition(encoder_hidden_states.float(), named)
        scales = {c.name: torch.tensor(c.scale) for c in named}
        ready = PreparedCondition(told, told.prompt_embeds, {c.name: c.image for c in named}, scales)
        with torch.no_grad():
            return torch_backend._predict(sample.float(), timestep, ready)

    def unseen(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """What torch does in place of an engine is not in the profile."""
        return lambda **inputs: contextvars.Context().run(lambda: call(**inputs))

    found: dict[str, Callable[..., Tensor]] = {
        "unet": unet,
        "unet+pose+scribble": unet,
        "control-embedding-pose": lambda image: torch_backend.control_embedding("pose", image.float()),
        "control-embedding-scribble": lambda image: torch_backend.control_embedding("scribble", image.float()),
        "vae_encoder": lambda images: torch_backend.encode_image(images.float()),
        "vae_decoder": lambda latents: torch_backend.decode_latent(latents.float()),
        "text_encoder": lambda ids: torch_backend.encode_tokens(ids),
    }
    return {name: unseen(call) for name, call in found.items()}


@pytest.fixture(scope="module")
def functions(tiny: Any) -> dict[str, Callable[..., Tensor]]:
    return _functions(tiny)


@pytest.fixture
def machine(version: str, tiny: Any, functions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    trt = fake.make_tensorrt(version, manifest, functions)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(backend_tensorrt, "cuda_missing", lambda: [])
    monkeypatch.setattr(backend_tensorrt, "not_cuda", lambda device: [])
    monkeypatch.setattr(backend_tensorrt, "gpu_kind", lambda device: "sm_90 GPU")
    monkeypatch.setattr(backend_tensorrt, "on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(backend_tensorrt, "current_stream", lambda device: 77)
    monkeypatch.setattr(backend_tensorrt, "capture", lambda run, device, pool: run)
    return Machine(trt, tiny, tmp_path / "engines", tmp_path / "graphs")


# --- names ------------------------------------------------------------------------------------------------------


def _used(root: Path) -> set[tuple[str, str]]:
    """(class, attribute) of every name of TensorRT in the sources: through `trt.`, a variable that holds one, or `getattr`."""
    found = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse((root / source).read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
                where, what = node.args[0], node.args[1]
                if ast.unparse(where).startswith("trt."):
                    assert isinstance(where, ast.Attribute) and isinstance(what, ast.Constant)
                    found.add((where.attr, str(what.value)))
            if not isinstance(node, ast.Attribute):
                continue
            owner = ast.unparse(node.value)
            if owner in ("trt", "self._trt"):
                found.add(("", node.attr))
            elif owner.startswith("trt."):
                found.add((owner.split(".")[-1], node.attr))
            elif (variable := owner.removeprefix("self.").removeprefix("loaded.")) in manifest.VARIABLES:
                found.add((manifest.VARIABLES[variable], node.attr))
    return found


def test_every_name_of_tensorrt_is_in_the_manifest_and_the_other_way_round(root: Path) -> None:
    known = {("", n) for n in manifest.MODULE}
    for group in (manifest.ENUMS, manifest.CLASSES, manifest.ASKED_FOR):
        known |= {(owner, name) for owner, names in group.items() for name in names}
    used = _used(root)
    assert used - known == set()
    assert known - used == set()
    assert len(used) > 50


def test_what_tensorrt_calls_back_has_the_names_of_the_manifest(root: Path) -> None:
    found = {}
    for source in SOURCES:
        for node in ast.walk(ast.parse((root / source).read_text())):
            if isinstance(node, ast.ClassDef) and node.bases and ast.unparse(node.bases[0]).startswith("trt."):
                methods = {m.name for m in node.body if isinstance(m, ast.FunctionDef)}
                assert "__init__" in methods  # pybind11 wants the base's to be called
                found[ast.unparse(node.bases[0]).removeprefix("trt.")] = methods - {"__init__"}
    assert found == manifest.OVERRIDDEN


def test_no_removed_name_is_used(root: Path) -> None:
    names = {name for _, name in _used(root)}
    assert not names & set(manifest.REMOVED)
    for source in SOURCES:  # nor in another way, as a string or keyword
        words = set(re.findall(r"\w+", (root / source).read_text()))
        assert not words & (set(manifest.REMOVED) - {"precision"})  # a field of EngineSpec


def test_the_fake_knows_what_the_manifest_lists_and_nothing_else(machine: Machine) -> None:
    public = {n for n in vars(machine.trt) if not n.startswith("_")} | {"__version__"}
    assert public - {"calls", "functions", "made"} == set(manifest.MODULE)
    assigned = {"IBuilderConfig": {"progress_monitor", "profiling_verbosity"}, "ITensor": {"name", "shape"}}
    for name, cls in machine.trt.made.items():
        public = {n for n in vars(cls) if not n.startswith("_")} | assigned.get(name, set())
        assert public == set(manifest.CLASSES[name]), name
    config = machine.trt.Builder(backend_tensorrt.new_logger(machine.trt)).create_builder_config()
    with pytest.raises(AttributeError, match="has no property max_workspace_size"):
        config.max_workspace_size = 1
    for name in ("FP16", "INT8"):
        assert not hasattr(machine.trt.BuilderFlag, name)


def test_networks_are_strongly_typed_in_both_versions(machine: Machine, version: str) -> None:
    flags = builder.network_flags(machine.trt)
    assert flags == (2 if version.startswith("10") else 1)
    with pytest.raises(AssertionError):  # the fake would notice
        machine.trt.Builder(backend_tensorrt.new_logger(machine.trt)).create_network(3 - flags)


# --- building ---------------------------------------------------------------------------------------------------


def test_a_build_is_an_engine_folder_with_its_spec(machine: Machine, version: str) -> None:
    said: list[str] = []
    spec = machine.build("unet+pose+scribble", (SMALL, WIDE), kind="HALF", workspace=1 << 30, tell=said.append)
    folder = machine.folder / "unet+pose+scribble"
    assert read_spec(folder) == spec
    assert (spec.format, spec.gpu, spec.precision) == ("tensorrt", "sm_90 GPU", "fp16")
    assert spec.versions == {"torch": "2", "tensorrt": version} and spec.shapes == (SMALL, WIDE)
    assert set(spec.files) == {"engine.plan", "inspector.json"}
    assert json.loads((folder / "inspector.json").read_text())["Layers"]
    plan = json.loads((folder / "engine.plan").read_text())
    tokens, width = machine.model.tokenizer.model_max_length, int(machine.model.unet.config.cross_attention_dim)
    cells, start = 64 // machine.model.vae_scale_factor, int(machine.model.unet.config.block_out_channels[0])
    assert plan["profiles"][0] == {
        "sample": [[1, 4, cells, cells], [2, 4, cells, cells], [4, 4, cells, cells]],
        "timestep": [[1], [2], [4]],
        "encoder_hidden_states": [[1, tokens, width], [2, tokens, width], [4, 2 * tokens, width]],
        **{f"{n}_control_embedding": [[b, start, cells, cells] for b in (1, 2, 4)] for n in ("pose", "scribble")},
        **{f"{n}_scale": [[1], [2], [4]] for n in ("pose", "scribble")},
    }
    assert plan["profiles"][1]["sample"][2] == [2, 4, 2 * cells, 3 * cells]  # height 128, width 192
    assert ("memory", "WORKSPACE", 1 << 30) in machine.calls
    built = next(c for c in machine.calls if c[0] == "build")
    assert built[2] == [] and built[3].name == "DETAILED"
    assert "unet+pose+scribble: Building Engine 50 %" in said and not any("Tactics" in line for line in said)
    assert said[-1] == "unet+pose+scribble: done"


def test_what_is_built_is_kept_until_something_differs(machine: Machine) -> None:
    for count, more in ((1, {}), (1, {}), (2, {"shapes": (WIDE,)}), (3, {"shapes": (WIDE,), "force": True})):
        machine.build("unet", **more)
        assert sum(c[0] == "build" for c in machine.calls) == count
    assert [p.name for p in machine.folder.iterdir() if p.is_dir()] == ["unet"]


def test_the_parsers_errors_are_all_reported(machine: Machine) -> None:
    errors = [{"node": "attention_3", "operator": "Attention", "desc": "head size 40 is not supported"},
              {"node": "", "operator": "", "desc": "no importer"}]  # fmt: skip
    folder = machine.graph("unet", errors=errors)
    with pytest.raises(RunError, match=r"attention_3 \(Attention\): head size 40 .*; a node \(\?\): no importer$"):
        builder.build_tensorrt(folder, machine.folder / "unet", [SMALL])
    assert not (machine.folder / "unet").exists()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C arrives, also where the tests were started in the background, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("stop", ["fail", "interrupted"])
def test_a_build_that_stops_leaves_no_engine_and_the_one_before(machine: Machine, stop: str) -> None:
    machine.build("unet")
    before = (machine.folder / "unet" / "engine.plan").read_bytes()
    for name in ("unet", "new"):
        fault: dict[str, Any] = {stop: "could not find any implementation" if stop == "fail" else 1}
        folder = machine.graph("unet", **fault)
        expected: Any = RunError if stop == "fail" else KeyboardInterrupt
        with pytest.raises(expected) as error:
            builder.build_tensorrt(
                folder, machine.folder / name, [WIDE], vae_scale_factor=machine.model.vae_scale_factor
            )
        if stop == "fail":
            assert "could not build unet for tensorrt unet fp32" in str(error.value)
            assert "could not find any implementation" in str(error.value)
        else:  # it is TensorRT that stops, at its next step
            assert [c[1] for c in machine.calls if c[0] == "step"][-1] == 0
    assert (machine.folder / "unet" / "engine.plan").read_bytes() == before
    assert not (machine.folder / "new").exists()
    assert [p.name for p in machine.folder.iterdir() if p.is_dir()] == ["unet"]


def test_what_a_callback_raises_ends_the_build_and_is_raised(machine: Machine) -> None:
    def tell(line: str) -> None:
        if "begins" in line:
            raise BrokenPipeError("nobody reads")

    with pytest.raises(BrokenPipeError, match="nobody reads"):
        machine.build("unet", tell=tell)
    assert not (machine.folder / "unet").exists()
    assert not any(c[0] == "swallowed" for c in machine.calls)  # the bindings would have lost it
    assert sum(c[0] == "step" for c in machine.calls) == 1


def test_attention_may_be_decomposed_and_the_spec_says_so(machine: Machine, version: str) -> None:
    folder = machine.graph("vae_decoder", opset=23, attention=1)
    if version.startswith("10.12"):
        with pytest.raises(
            UsageError, match=r"opset 23, and TensorRT 10.12.0.36 reads up to 22; `iedit export tensorrt .* --opset 22`"
        ):
            builder.build_tensorrt(folder, machine.folder / "v", [SMALL])
    else:
        assert builder.build_tensorrt(folder, machine.folder / "v", [SMALL]).attention == "decomposable"
    assert machine.build("unet").attention == ""
    assert b"TRT_decomposable" not in (folder / "model.onnx").read_bytes()  # which ONNX Runtime would refuse


@pytest.mark.parametrize(
    ("version_", "opset"), [("10.12.0.36", 22), ("10.13.3", 22), ("10.14.1.48", 23), ("11.4.0.2", 23), ("10.9", 22)]
)
def test_the_opset_is_what_the_version_reads(version_: str, opset: int) -> None:
    assert builder.newest_opset(version_) == opset


@pytest.mark.parametrize("version", ["11.4.0.2"], indirect=True)
def test_a_parser_that_refuses_opset_23_is_told_of_22(machine: Machine) -> None:
    errors = [{"node": "attention_3", "operator": "Attention", "desc": "head size 40 is not supported"}]
    with pytest.raises(RunError, match=r"not supported; try `iedit export tensorrt .* --opset 22`$"):
        builder.build_tensorrt(machine.graph("unet", opset=23, errors=errors), machine.folder / "unet", [SMALL])


def test_what_a_killed_build_left_behind_is_removed_by_the_next(machine: Machine) -> None:
    left, theirs = new_build(machine.folder / "unet"), machine.folder / ".unet.01234567.building"
    theirs.mkdir()
    (left / "engine.plan").write_text("half")
    with pytest.raises(UsageError, match="can be used"):
        TensorrtBackend(machine.model, machine.folder)
    machine.build("unet")
    assert not left.exists()
    assert theirs.exists()  # of that name, and not known to be a build's


def test_the_timing_cache_is_carried_from_build_to_build(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "timing.cache"
    said: list[str] = []
    machine.build("unet", timing_cache=file)
    assert file.read_bytes() == b"+timed"
    machine.build("unet", timing_cache=file, force=True)
    assert file.read_bytes() == b"+timed+timed"
    assert [c[1:] for c in machine.calls if c[0] == "cache"] == [(b"", False), (b"+timed", False)]
    file.write_bytes(b"other GPU")
    machine.build("unet", timing_cache=file, force=True, tell=said.append)
    assert file.read_bytes() == b"+timed" and any("of another GPU or TensorRT" in line for line in said)


def test_ranges_and_graphs_that_cannot_be_used_are_refused(machine: Machine) -> None:
    with pytest.raises(UsageError, match="batch 1-1-0 is not a range with limits"):
        machine.build("unet", (Shapes(),))
    with pytest.raises(UsageError, match="at least one"):
        machine.build("unet", ())
    machine.build("unet")
    with pytest.raises(UsageError, match="is an engine of format tensorrt, expected onnx"):
        builder.build_tensorrt(machine.folder / "unet", machine.folder / "again", [SMALL])
    folder = machine.graph("vae_encoder")
    (folder / "model.onnx").write_text("{}")  # no graph
    with pytest.raises(UsageError, match=r"files: model.onnx is not what was built .*; export it again"):
        builder.build_tensorrt(folder, machine.folder / "v", [SMALL])
    folder = machine.graph("vae_decoder")
    write_spec(folder, replace(read_spec(folder), module="vae_encoder"), ["model.onnx"])
    with pytest.raises(RunError, match="its inputs are latents, expected images; export it again"):
        builder.build_tensorrt(folder, machine.folder / "v", [SMALL])


# --- running ----------------------------------------------------------------------------------------------------


@pytest.fixture
def built(machine: Machine) -> Machine:
    for module in MODULES:
        machine.build(module, (SMALL, WIDE))
    return machine


def test_an_engine_answers_as_torch_does(built: Machine) -> None:
    backend, want = TensorrtBackend(built.model, built.folder), TorchBackend(built.model)
    assert isinstance(backend, Backend) and backend.modules() == sorted(MODULES)
    model = built.model
    side = 64 // model.vae_scale_factor
    for layouts in (False, True):
        x, t = torch.randn(2, model.channels, side, side), torch.tensor([3, 700])  # a timestep per sample
        condition = built.condition(2, layouts=layouts)
        assert torch.equal(backend.predict(x, t, condition), want.predict(x, t, condition))
    images, latents = torch.rand(1, 3, 128, 192), torch.randn(3, model.channels, side, side)
    ids = torch.randint(0, 20, (2, model.tokenizer.model_max_length))
    assert torch.equal(backend.encode_image(images), want.encode_image(images))
    assert torch.equal(backend.decode_latent(latents), want.decode_latent(latents))
    assert torch.equal(backend.encode_tokens(ids), want.encode_tokens(ids))
    executed = built.executed()
    embeddings = ["control-embedding-pose", "control-embedding-scribble"]
    assert [c[1] for c in executed] == ["unet", *embeddings, "unet+pose+scribble", "vae_encoder", "vae_decoder", "text_encoder"]  # fmt: skip
    assert {c[4] for c in executed} == {77}  # torch's stream
    assert executed[4][2] == 1 and executed[5][2] == 0  # 128x192 by the second profile


def test_tensors_that_are_not_contiguous_or_of_another_type_are_taken(built: Machine) -> None:
    backend, want = TensorrtBackend(built.model, built.folder), TorchBackend(built.model)
    side = 64 // built.model.vae_scale_factor
    x = torch.randn(2, side, side, built.model.channels).permute(0, 3, 1, 2)
    two = Condition(built.condition(1).prompt_embeds.expand(2, -1, -1).double())
    t = torch.tensor([5, 5], dtype=torch.int32)
    expected = want.predict(x.contiguous(), t, Condition(two.prompt_embeds.float()))
    assert torch.equal(backend.predict(x, t, two), expected)


@pytest.mark.parametrize(("kind", "dtype"), [("HALF", torch.float16), ("BF16", torch.bfloat16)])
def test_inputs_and_outputs_of_a_half_engine_are_converted(machine: Machine, kind: str, dtype: torch.dtype) -> None:
    machine.build("unet", kind=kind)
    backend = TensorrtBackend(replace(machine.model, dtype=dtype), machine.folder)
    side = 64 // machine.model.vae_scale_factor
    x, t, condition = torch.randn(1, machine.model.channels, side, side), torch.tensor([9]), machine.condition(1)
    got = backend.predict(x, t, condition)
    rounded = Condition(condition.prompt_embeds.to(dtype).float())
    want = TorchBackend(machine.model).predict(x.to(dtype).float(), t, rounded)
    assert got.dtype == torch.float32 and torch.equal(got, want.to(dtype).float())


@pytest.mark.parametrize("graphs", [False, True])
def test_the_output_of_a_call_is_the_callers_own(built: Machine, graphs: bool) -> None:
    backend = TensorrtBackend(built.model, built.folder, graphs=graphs)
    want = TorchBackend(built.model)
    side = 64 // built.model.vae_scale_factor
    kept, expected = [], []
    for i in range(4):
        x, t = torch.randn(1, built.model.channels, side, side), torch.tensor([10 * i])
        condition = built.condition(1, seed=i, layouts=True)
        kept.append(backend.predict(x, t, condition))
        expected.append(want.predict(x, t, condition))
    assert all(torch.equal(a, b) for a, b in zip(kept, expected))
    assert len({k.data_ptr() for k in kept}) == 4
    # With graphs: 1 plain, 1 before the recording (in whose place the fake keeps the call), 3 replays.
    for module in ("unet+pose+scribble", "control-embedding-pose", "control-embedding-scribble"):
        assert sum(c[1] == module for c in built.executed()) == (5 if graphs else 4)


def test_the_embedding_of_a_layout_is_made_once_for_a_condition(built: Machine) -> None:
    backend, want, side = (
        TensorrtBackend(built.model, built.folder, graphs=False),  # each call is one execution
        TorchBackend(built.model),
        64 // built.model.vae_scale_factor,
    )
    condition = built.condition(1, layouts=True)
    for i in range(3):
        x, t = torch.randn(1, built.model.channels, side, side), torch.tensor([10 * i])
        assert torch.equal(backend.predict(x, t, condition), want.predict(x, t, condition))
    ran = [c[1] for c in built.executed()]
    assert ran == ["control-embedding-pose", "control-embedding-scribble", *["unet+pose+scribble"] * 3]


def test_the_control_embedding_engine_is_a_part_of_the_fused_one(machine: Machine) -> None:
    machine.build("unet+pose+scribble")
    machine.build("control-embedding-pose", (Shapes((1, 1, 1), (128, 128, 128), (64, 64, 64)),))
    why = TensorrtBackend(machine.model, machine.folder).why_not("unet+pose+scribble", 2, 64, 64)
    assert why[0] == "tensorrt control-embedding-pose engine was built for height 128-128, asked for 64"
    assert why[1].startswith("there is no engine for control-embedding-scribble in ") and len(why) == 2


def test_a_graph_is_recorded_for_each_shape(built: Machine) -> None:
    backend, want = TensorrtBackend(built.model, built.folder, graphs=True), TorchBackend(built.model)
    for _ in range(3):
        for height, width in ((64, 64), (128, 128), (64, 192)):
            images = torch.rand(1, 3, height, width)
            assert torch.equal(backend.encode_image(images), want.encode_image(images))


def test_where_no_graph_can_be_recorded_the_engines_run_without_and_say_why(
    built: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(run: Callable[[], None], device: torch.device, pool: Any) -> Callable[[], None]:
        raise RuntimeError("CUDA error: operation would make the legacy stream depend on a capturing stream\nadvice")

    monkeypatch.setattr(backend_tensorrt, "capture", refuse)
    backend, want, profile = TensorrtBackend(built.model, built.folder), TorchBackend(built.model), Profile()
    with profile.stage("encode"):
        for _ in range(3):
            images = torch.rand(1, 3, 64, 64)
            assert torch.equal(backend.encode_image(images), want.encode_image(images))
    told = "CUDA error: operation would make the legacy stream depend on a capturing stream"
    assert profile.fallbacks == {("vae_encoder", "cuda graph"): [told]}
    assert [c.cold for c in profile.modules if c.backend == "tensorrt"] == [True, True, False]


def test_the_profile_with_the_nearest_optimum_is_chosen(machine: Machine) -> None:
    machine.build("vae_encoder", (Shapes((1, 1, 4), (64, 64, 256), (64, 64, 256)), Shapes((1, 4, 4), (64, 256, 256), (64, 256, 256))))  # fmt: skip
    machine.build("vae_encoder", (Shapes((1, 1, 1), (64, 128, 256), (64, 128, 256)),), name="other")
    machine.build("unet")
    backend = TensorrtBackend(machine.model, machine.folder)
    for (b, h, w), shapes, profile in (
        ((1, 64, 64), 2, 0),
        ((4, 256, 256), 2, 1),
        ((3, 64, 128), 2, 0),
        ((1, 128, 128), 1, 0),
    ):
        assert len(backend._nearest("vae_encoder", b, h, w)[1].shapes) == shapes
        backend.encode_image(torch.rand(b, 3, h, w))
        assert machine.executed()[-1][2] == profile


def test_calls_from_several_threads_do_not_mix(built: Machine) -> None:
    backend, want = TensorrtBackend(built.model, built.folder), TorchBackend(built.model)
    side = 64 // built.model.vae_scale_factor
    wrong: list[int] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(3):
            z = torch.randn(1 + seed % 2, built.model.channels, side, side, generator=generator)
            if not torch.equal(backend.decode_latent(z), want.decode_latent(z)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (
        sum(c[0] == "load" and c[1] == "vae_decoder" for c in built.calls) == 2
    )  # the builder's own look, and once here


@pytest.mark.parametrize("graphs", [False, True])
def test_calls_are_in_the_profile_and_the_first_of_a_shape_are_cold(built: Machine, graphs: bool) -> None:
    backend = TensorrtBackend(built.model, built.folder, graphs=graphs)
    running = Profile()
    with running.stage("encode"):
        for size in (64, 64, 64, 128):
            backend.encode_image(torch.rand(1, 3, size, size))
    # With graphs the second call records.
    assert [(c.module, c.backend, c.cold) for c in running.modules] == [
        ("vae_encoder", "tensorrt", True),
        ("vae_encoder", "tensorrt", graphs),
        ("vae_encoder", "tensorrt", False),
        ("vae_encoder", "tensorrt", True),
    ]


def test_a_part_of_a_batch_is_aligned(built: Machine) -> None:
    """A sample of the tiny latent is 1024 bytes, a timestep 8; parts of a batch begin anywhere."""
    backend, want = TensorrtBackend(built.model, built.folder), TorchBackend(built.model)
    side = 64 // built.model.vae_scale_factor
    x, t, condition = torch.randn(7, built.model.channels, side, side), torch.arange(7), built.condition(7)
    for _ in range(3):
        got = backend.predict(x, t, condition)
        assert torch.allclose(got, want.predict(x, t, condition), atol=1e-5)
        x = x + 1


def test_all_contexts_compute_in_the_same_memory_and_few_are_kept(machine: Machine) -> None:
    sizes = [64 * i for i in range(1, 8)]
    machine.build("vae_encoder", tuple(Shapes((1, 1, 1), (64, 64, 64), (s, s, s)) for s in sizes))
    folder = machine.graph("unet", scratch=5000)
    builder.build_tensorrt(folder, machine.folder / "unet", [SMALL], vae_scale_factor=machine.model.vae_scale_factor)
    backend, want = TensorrtBackend(machine.model, machine.folder, graphs=False), TorchBackend(machine.model)
    side = 64 // machine.model.vae_scale_factor

    def encode(size: int) -> None:
        images = torch.rand(1, 3, 64, size)
        assert torch.equal(backend.encode_image(images), want.encode_image(images))

    for size in sizes:
        encode(size)
    small = {c[1] for c in machine.calls if c[0] == "memory of context"}
    assert len(small) == 1
    (loaded,) = backend._loaded.values()
    assert list(loaded.contexts) == [3, 4, 5, 6]
    x, t, condition = torch.randn(1, machine.model.channels, side, side), torch.tensor([1]), machine.condition(1)
    backend.predict(x, t, condition)  # needs more
    encode(sizes[-1])
    (large,) = {c[1] for c in machine.calls if c[0] == "memory of context" and c[2] >= 5000}
    assert [c[1] for c in machine.calls if c[0] == "memory of context"][-2:] == [large, large]
    before = len(machine.calls)
    encode(sizes[-1])
    assert not any(c[0] == "memory of context" for c in machine.calls[before:])


@pytest.mark.parametrize("version", ["11.4.0.2"], indirect=True)
def test_verify_compares_engines_marks_those_that_pass_and_finds_one_that_does_not(
    machine: Machine, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from iedit.export.cli import verify

    for module in MODULES:
        machine.build(module, parse_shapes("64x64", "1-2-4"))
    # Also the tiny model's pictures can be edited: those of the samples are shrunk.
    samples = [
        (n, replace(q, image=q.image.resize((64, 64)), layouts={}, source_layouts={})) for n, q in sample_requests()
    ]
    monkeypatch.setattr(parity, "sample_requests", lambda: samples)
    words = [str(tiny_folder), "--backend", "tensorrt", "--engines", str(machine.folder), "--edits", "1", "--json"]
    result = CliRunner().invoke(verify, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)["fp32"]
    unet = [r for r in report["modules"] if r["module"] == "unet"]
    assert [(r["batch"], r["size"]) for r in unet] == [(1, "64x64"), (4, "64x64")] and not report["failures"]
    assert len(report["edits"]) == 1
    assert all("largest" in read_spec(machine.folder / m).checked for m in MODULES)
    functions = machine.trt.functions
    exact = functions["vae_decoder"]
    monkeypatch.setitem(functions, "vae_decoder", lambda **given: exact(**given) + 0.1)
    result = CliRunner().invoke(verify, words)
    assert isinstance(result.exception, RunError) and "fp32 vae_decoder at batch 1, 64x64: largest error" in str(
        result.exception
    )


def test_engines_that_were_never_compared_are_named_in_the_profile(built: Machine) -> None:
    backend, running = TensorrtBackend(built.model, built.folder), Profile()
    folder = built.folder / "vae_decoder"
    spec = replace(read_spec(folder), checked={"largest": 1e-6})
    write_spec(folder, spec, list(spec.files))
    backend, running = TensorrtBackend(built.model, built.folder), Profile()
    with running.stage("encode"):
        backend.decode_latent(backend.encode_image(torch.rand(1, 3, 64, 64)))
    assert running.as_dict()["unverified"] == ["tensorrt vae_encoder"]
    assert running.unverified["tensorrt vae_encoder"].startswith("iedit export verify ")


def test_an_engine_of_another_precision_does_not_run(machine: Machine) -> None:
    machine.build("unet", kind="HALF")
    with pytest.raises(UsageError, match="precision: the engine has fp16, wanted fp32"):
        TensorrtBackend(machine.model, machine.folder)
    machine.build("unet", kind="FLOAT", name="exact")
    half = replace(machine.model, dtype=torch.float16)
    chosen = TensorrtBackend(half, machine.folder)._nearest("unet", 2, 64, 64)
    assert chosen[1].precision == "fp16"


def test_what_tensorrt_warns_of_is_a_note_of_the_edit_once(machine: Machine) -> None:
    folder = machine.graph("unet", warning="Using an engine plan file across different models of devices")
    builder.build_tensorrt(folder, machine.folder / "unet", [SMALL], vae_scale_factor=machine.model.vae_scale_factor)
    backend, running = TensorrtBackend(machine.model, machine.folder), Profile()
    side = 64 // machine.model.vae_scale_factor
    x, t, condition = torch.randn(1, machine.model.channels, side, side), torch.tensor([1]), machine.condition(1)
    with running.stage("final"):
        for _ in range(3):
            backend.predict(x, t, condition)
    assert running.notes == ["tensorrt: Using an engine plan file across different models of devices"]


# --- edits --------------------------------------------------------------------------------------------------------


def test_the_default_batch_is_what_an_edit_puts_into_a_call(tiny: Any) -> None:
    assert builder.default_batch(tiny, 64, 64) == "1-2-20"
    config = SimpleNamespace(block_out_channels=(320, 640, 1280, 1280))
    sd15: Any = SimpleNamespace(unet=SimpleNamespace(config=config), vae_scale_factor=8)
    assert builder.default_batch(sd15, 512, 512) == "1-2-4"
    assert builder.default_batch(sd15, 256, 256) == "1-2-13"


def test_a_half_of_the_vae_is_built_for_few_pictures() -> None:
    """It holds whole pictures in hundreds of channels, and an edit has one."""
    (large,), (exact,) = (parse_shapes("512x512", b) for b in ("1-2-20", "8"))
    for module in ("vae_encoder", "vae_decoder"):
        assert builder.module_shapes(module, [large])[0].batch == (1, 1, 4)
        assert builder.module_shapes(module, [exact])[0].batch == (8, 8, 8)
    assert builder.module_shapes("unet", [large]) == (large,)


@pytest.mark.parametrize(
    ("version", "batch"),
    [("10.12.0.36", "1-2-20"), ("11.4.0.2", "1-2-20"), ("11.4.0.2", "1-2-8"), ("11.4.0.2", "1")],
    indirect=["version"],
)
@pytest.mark.parametrize("layouts", [False, True])
def test_a_default_edit_runs_on_default_engines_alone(
    machine: Machine, batch: str, layouts: bool, picture: Callable[..., Any]
) -> None:
    for module in MODULES:
        machine.build(module, parse_shapes("64x64", batch))
    maps = {name: picture(2) for name in ("pose", "scribble")} if layouts else {}
    asked = EditRequest(
        picture(1), "a blue car on grass", "a red car on grass", steps=2, layouts=maps, source_layouts=maps
    )
    got = Editor(machine.model, TensorrtBackend(machine.model, machine.folder)).edit(asked)
    want = Editor(machine.model, TorchBackend(machine.model)).edit(asked)
    assert {row["backend"] for row in got.profile.by_module()} == {"tensorrt"} and not got.profile.fallbacks
    assert np.abs(np.asarray(got.image).astype(int) - np.asarray(want.image)).max() <= 1
    largest = max(c.batch for c in got.profile.modules if c.module.startswith("unet"))
    assert largest == (20 if batch == "1-2-20" else int(batch.split("-")[-1]))
    assert got.profile.evaluations == want.profile.evaluations
    samples = sum(r["samples"] for r in got.profile.by_module() if r["module"].startswith("unet"))
    assert samples == sum(want.profile.evaluations.values())


@pytest.mark.parametrize("version", ["11.4.0.2"], indirect=True)
@pytest.mark.parametrize("fault", ["fails at", "memory", "deleted", "other size", "text"])
def test_an_edit_under_auto_survives(machine: Machine, fault: str, picture: Callable[..., Any]) -> None:
    faults: dict[str, dict[str, Any]] = {"fails at": {"fails at": 3}, "memory": {"memory": 0}}
    for module in MODULES:
        sizes = "128x64" if fault == "other size" else "64x64"
        folder = machine.graph(module, **(faults.get(fault, {}) if module == "unet" else {}))
        tokens = machine.model.tokenizer.model_max_length
        builder.build_tensorrt(folder, machine.folder / module, parse_shapes(sizes, "1-2-20"), text=(tokens, tokens, tokens),
                               vae_scale_factor=machine.model.vae_scale_factor)  # fmt: skip
    backend = backends.load_backend("auto", machine.model, machine.folder)
    if fault == "deleted":
        assert backend.why_not("unet", 1, 64, 64) == []
        assert isinstance(backend, FallbackBackend) and backend.usable[0].why_not("unet", 1, 64, 64) == []
        (machine.folder / "unet" / "engine.plan").unlink()
    prompt = "a blue car on grass " * (12 if fault == "text" else 1)
    asked = EditRequest(picture(1), prompt, "a red car on grass", steps=2)
    got = Editor(machine.model, backend).edit(asked)
    want = Editor(machine.model, TorchBackend(machine.model)).edit(asked)
    assert np.abs(np.asarray(got.image).astype(int) - np.asarray(want.image)).max() <= 1
    told = " ".join(r for f in got.receipt["backend"]["fallbacks"] if f["backend"] == "tensorrt" for r in f["reasons"])
    said = {"fails at": "it failed: tensorrt could not run unet: CUDA error 700", "memory": "can't allocate memory for unet",
            "deleted": "it failed: FileNotFoundError", "other size": "built for width 128-128, asked for 64",
            "text": "the tensorrt unet engine was built for encoder_hidden_states"}  # fmt: skip
    assert said[fault] in told


# --- refusals ---------------------------------------------------------------------------------------------------


def test_a_call_that_no_range_takes_is_refused_by_the_field(built: Machine) -> None:
    backend = TensorrtBackend(built.model, built.folder)
    assert backend.why_not("unet", 2, 64, 64) == [] and backend.why_not("text_encoder", 4, 0, 0) == []
    assert backend.why_not("text_encoder", 5, 0, 0) == [] == backend.why_not("unet", 5, 64, 64)  # in two calls
    assert backend.pieces("unet", 5, 64, 64) == [4, 1] and backend.pieces("unet", 5, 128, 128) == [2, 2, 1]
    assert "height 64-64, asked for 512 or height 64-128, asked for 512" in backend.why_not("unet", 5, 512, 64)[0]
    assert "width 64-192, asked for 256" in backend.why_not("unet", 1, 128, 256)[0]
    before = len(built.executed())
    with pytest.raises(UsageError, match=r"backend 'tensorrt' cannot run vae_encoder: .*height 64-128, asked for 512"):
        backend.encode_image(torch.rand(1, 3, 512, 64))
    side = 64 // built.model.vae_scale_factor
    condition = built.condition(1)
    longer = Condition(condition.prompt_embeds.repeat(1, 3, 1))
    with pytest.raises(UsageError, match=r"built for encoder_hidden_states \(1, .* given \(1, .*; build one here with"):
        backend.predict(torch.randn(1, built.model.channels, side, side), torch.tensor([1]), longer)
    assert len(built.executed()) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": "0" * 16}, "weights: the engine has 0000000000000000, wanted "),
        ({"gpu": "sm_90 Other"}, "gpu: the engine has sm_90 Other, wanted sm_90 GPU"),
        ({"versions": {"tensorrt": "10.9.0"}}, "versions: the engine was built with TensorRT 10.9.0, here is 1"),
        ({"versions": {}}, "versions: the engine was built with TensorRT none, here is 1"),
        ({"module": "unet+edges"}, "module: unet+edges needs controlnet-edges, which the model does not have"),
    ],
)
def test_another_ones_engine_is_refused_by_the_field(machine: Machine, change: dict[str, Any], said: str) -> None:
    machine.build("unet")
    machine.build("unet", name="other")
    folder = machine.folder / "other"
    write_spec(folder, replace(read_spec(folder), **change), ["engine.plan", "inspector.json"])
    backend = TensorrtBackend(machine.model, machine.folder)  # the sound one is enough
    assert said in "; ".join(w for why in backend.refused.values() for w in why)
    shutil.rmtree(machine.folder / "unet")
    with pytest.raises(UsageError, match="can be used") as error:
        TensorrtBackend(machine.model, machine.folder)
    assert said in str(error.value) and str(folder) in str(error.value)
    assert "build one here with `iedit export tensorrt" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_engine_is_refused_by_the_file_and_the_reason_is_kept(built: Machine) -> None:
    plan = built.folder / "vae_encoder" / "engine.plan"
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)
    backend = TensorrtBackend(built.model, built.folder)
    why = "; ".join(backend.why_not("vae_encoder", 1, 64, 64))
    assert "there is no engine for vae_encoder" in why
    assert "files: engine.plan is not what was built" in why
    (built.folder / "vae_decoder" / "engine.json").unlink()  # as a build that was killed leaves it
    assert backends.load_backend("tensorrt", built.model, built.folder).why_not("vae_decoder", 1, 64, 64)


def test_a_folder_without_engines_names_the_fix(machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"there are no TensorRT engines in it; build one here with `iedit export tensorrt"
    ):
        TensorrtBackend(machine.model, tmp_path / "nothing")
    machine.graph("unet")  # an ONNX engine is none
    with pytest.raises(UsageError, match="there are no TensorRT engines in it"):
        TensorrtBackend(machine.model, machine.graphs)


def test_what_tensorrt_says_when_it_fails_is_in_the_message(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.build("unet")
    backend = TensorrtBackend(machine.model, machine.folder)
    side = 64 // machine.model.vae_scale_factor
    x, t, condition = torch.randn(1, machine.model.channels, side, side), torch.tensor([1]), machine.condition(1)
    backend.predict(x, t, condition)
    engine = next(iter(backend._loaded.values())).engine
    engine._graph["broken"] = "illegal memory access"
    with pytest.raises(RunError, match="could not run unet: illegal memory access"):
        backend.predict(x, t, condition)
    backend = TensorrtBackend(machine.model, machine.folder)
    monkeypatch.setattr(machine.trt.made["ICudaEngine"], "create_execution_context", lambda self, strategy: None)
    with pytest.raises(MemoryError, match="can't allocate memory"):
        backend.predict(x, t, condition)
    plan = machine.folder / "unet" / "engine.plan"
    plan.write_bytes(b"\0damaged after the check")
    with pytest.raises(
        RunError, match=r"engine.plan: TensorRT cannot load it: Magic tag does not match; build one here"
    ):
        backend._loaded.clear()
        backend._load("unet", plan.parent)


# --- the fallback and the command ---------------------------------------------------------------------------------


def test_auto_steps_down_and_says_why(machine: Machine, tiny: Any) -> None:
    fallback = backends.load_backend("auto", tiny, machine.folder)
    assert isinstance(fallback, FallbackBackend)
    assert "no engine of" in fallback.unusable["tensorrt"][0]
    machine.build("unet")
    fallback = backends.load_backend("auto", tiny, machine.folder)
    assert isinstance(fallback, FallbackBackend) and "tensorrt" not in fallback.unusable
    running = Profile()
    side = 64 // tiny.vae_scale_factor
    with running.stage("final"):
        for height in (1, 2):
            x, t = torch.randn(6, tiny.channels, height * side, side), torch.full((6,), 5)
            fallback.predict(x, t, machine.condition(6))
    assert [(c.backend, c.batch) for c in running.modules] == [("tensorrt", 4), ("tensorrt", 2), ("torch", 6)]
    assert running.fallbacks[("unet", "tensorrt")] == ["tensorrt unet engine was built for height 64-64, asked for 128"]


def test_where_tensorrt_cannot_run_all_reasons_are_given(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("tensorrt") is not None or torch.cuda.is_available():
        pytest.skip("it may run here")
    want = ['tensorrt is not installed (pip install "iedit[gpu]")', "no CUDA device"]
    assert backends.why_unavailable("tensorrt") == want == backends.reasons()["tensorrt"]
    assert BACKENDS[0] == "tensorrt"
    with pytest.raises(
        UsageError, match=r"'tensorrt' was requested but cannot run: tensorrt is not .*; no CUDA device"
    ):
        backends.load_backend("tensorrt", tiny)
    fallback = backends.load_backend("auto", tiny, tmp_path)
    assert isinstance(fallback, FallbackBackend) and fallback.unusable["tensorrt"] == want
    with pytest.raises(UsageError, match="tensorrt was requested but cannot run"):
        builder.build_tensorrt(tmp_path, tmp_path / "out", [SMALL])
    result = CliRunner().invoke(command, ["picturebook"])
    assert isinstance(result.exception, UsageError) and "tensorrt is not installed" in str(result.exception)


def test_a_model_on_the_cpu_is_told_apart(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert backend_tensorrt.not_cuda(torch.device("cpu")) == ["the model is on cpu, engines need it on a CUDA device"]
    assert backend_tensorrt.not_cuda(torch.device("cuda", 1)) == []


def test_sizes_and_batches_are_read_as_they_are_typed() -> None:
    assert parse_shapes("512x512, 768x640", "1-2-8", 64) == (
        Shapes((1, 2, 8), (512, 512, 512), (512, 512, 512)),
        Shapes((1, 2, 8), (640, 640, 640), (768, 768, 768)),
    )
    assert parse_shapes("256-512-1024X512", "4") == (Shapes((4, 4, 4), (512, 512, 512), (256, 512, 1024)),)


@pytest.mark.parametrize(
    ("sizes", "batch", "said"),
    [
        ("512", "1", "sizes: '512' is not WIDTHxHEIGHT; give for example"),
        ("512x512,", "1", "sizes: '' is not WIDTHxHEIGHT"),
        ("512x", "1", "sizes: '' in '512x' is neither a number nor MIN-OPT-MAX"),
        ("500x512", "1", "sizes: 500 in '500' in '500x512' is not a multiple of 64; the nearest is 512"),
        ("512x512,512x512", "1", "sizes: 512x512 is there twice"),
        ("512x512", "1-8", "batch: '1-8' is neither a number nor MIN-OPT-MAX"),
        ("512x512", "4-2-8", "batch: '4-2-8' is not in order"),
        ("512x512", "0", "batch: '0' is not in order; expected 1 <= MIN"),
        ("512x512", "-1", "batch: '-1' is neither"),
    ],
)
def test_mistyped_sizes_name_the_part(sizes: str, batch: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_shapes(sizes, batch, 64)
    assert said in str(error.value)


@pytest.fixture
def exporter(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """In place of the ONNX exporter: it writes the fake's graphs."""
    asked: list[Any] = []

    def export_onnx(model: Any, out: Path, layouts: Any, precision: str, opset: int, tell: Any) -> list[EngineSpec]:
        asked.append((out, layouts, precision, opset))
        attention = {"attention": 2} if opset == 23 else {}
        return [read_spec(machine.graph(m, "HALF", opset, **attention)) for m in MODULES]

    monkeypatch.setattr(graphs_of, "export_onnx", export_onnx)
    monkeypatch.setattr(graphs_of, "engine_folder", lambda out, name, precision: machine.graphs / f"{name}-HALF")
    return asked


def test_the_command_builds_every_module(machine: Machine, exporter: list[Any], tiny_folder: Path) -> None:
    words = [str(tiny_folder), "--layouts", "pose,scribble", "--sizes", "64x64,128x64", "--batch", "1-2-4", "--out",
             str(machine.folder), "--workspace", "2.5", "--timing-cache", str(machine.folder / "timing.cache")]  # fmt: skip
    result = CliRunner().invoke(command, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    newest = 22 if machine.trt.__version__ == "10.12.0.36" else 23
    assert exporter == [(machine.folder, ["pose", "scribble"], "fp16", newest)]
    assert ("memory", "WORKSPACE", 2684354560) in machine.calls
    assert (
        "unet+pose+scribble: tensorrt unet+pose+scribble fp16, batch 1-4 at 64x64; batch 1-4 at 128x64 on sm_90 GPU"
        in result.stdout
    )
    backend = TensorrtBackend(replace(machine.model, dtype=torch.float16), machine.folder)
    assert backend.modules() == sorted(MODULES) and not backend.refused
    assert backend.why_not("unet", 4, 64, 128) == []
    spec = read_spec(machine.folder / "tensorrt-fp16" / "text_encoder")
    assert spec.shapes == (Shapes((1, 2, 4), (0, 0, 0), (0, 0, 0)),)
    tokens = machine.model.tokenizer.model_max_length
    plan = json.loads((machine.folder / "tensorrt-fp16" / "text_encoder" / "engine.plan").read_text())
    assert plan["profiles"] == [{"ids": [[1, tokens], [2, tokens], [4, tokens]]}]
    result = CliRunner().invoke(command, [str(tiny_folder), "--out", str(machine.folder / "default")])
    assert result.exit_code == 0, result.output
    (shapes,) = read_spec(machine.folder / "default" / "tensorrt-fp16" / "unet").shapes
    assert shapes == Shapes((1, 2, 20), (64, 64, 64), (64, 64, 64))
    wrong = CliRunner().invoke(command, [str(tiny_folder), "--sizes", "60x64"])
    assert isinstance(wrong.exception, UsageError) and "60 in '60' in '60x64' is not a multiple" in str(wrong.exception)
