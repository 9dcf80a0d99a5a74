"""ONNX engine folders -> TensorRT engine folders, for the GPU of this machine; one code path for TensorRT 10.12+ and 11.

The network is strongly typed: precision is what the ONNX graph says, so there is no flag for it here. Each `Shapes` becomes
one optimisation profile. A build is seen whole or not at all: it is written beside its place, `engine.json` last, and renamed.

Nothing of this file has run on hardware yet: it was driven by a recording fake (see docs/tensorrt.md).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..runtime.backends import trt as backend_tensorrt
from ..runtime.backends.base import missing
from ..runtime.backends.engine_spec import EngineSpec, Shapes, damaged, read_spec
from ..runtime.backends.trt import PLAN, last_errors, new_logger
from ..runtime.editor import samples_per_call
from ..runtime.errors import RunError, UsageError
from ..runtime.files import write_whole
from ..runtime.model import module_io
from ..runtime.model.model import Model
from . import onnx
from .build_folder import build_once

GRAPH = "model.onnx"
INSPECTOR = "inspector.json"
MASK_SAMPLES = (
    20  # that a default edit's mask asks for, where memory takes them in one call; its other steps ask for 1 to 4
)
VAE_SAMPLES = (
    4  # the largest batch of a half of the VAE: it holds whole pictures in hundreds of channels, and an edit has one
)
ATTENTION_SINCE = (10, 14)  # the version of TensorRT from which on its parser knows the operator Attention, of opset 23
TEXT = (1, 77, 308)  # tokens: CLIP's length is the optimum, prompts of up to four chunks fit
Tell = Callable[[str], None]


def build_tensorrt(
    onnx_folder: Path,
    out: Path,
    shapes: Sequence[Shapes],
    *,
    timing_cache: Path | None = None,
    tell: Tell = lambda text: None,
    vae_scale_factor: int = 8,
    text: tuple[int, int, int] = TEXT,
    workspace: int | None = None,
    device: torch.device | None = None,
    force: bool = False,
) -> EngineSpec:
    """Build the engine of one module in folder `out`. What is there already and valid is kept.

    Args:
        onnx_folder: an engine of format onnx: `engine.json` and `model.onnx`.
        shapes: ranges without "any", pixels; one optimisation profile each.
        timing_cache: file of tactic timings, read and written: a second build takes a fraction of the first.
        tell: is given a line for every phase of the build.
        vae_scale_factor: pixels per latent cell.
        text: (min, opt, max) of the text's length in tokens, where the graph leaves it open.
        workspace: bytes that layers may use for scratch; None is all that the GPU has.

    Raises:
        UsageError: TensorRT cannot run here, or the ONNX folder or a range cannot be used; nothing was written.
        RunError: the parser or the builder failed; nothing was written.
        KeyboardInterrupt: Ctrl-C, as soon as TensorRT comes to a next step; nothing was written.
    """
    why = backend_tensorrt.why_unavailable() or missing("onnx", extra="gpu")
    if why:
        raise UsageError(f"tensorrt was requested but cannot run: {'; '.join(why)}")
    import tensorrt as trt

    source = _source(onnx_folder)
    where = device or torch.device("cuda")
    newest = newest_opset(str(trt.__version__))
    if source.opset > newest:
        raise UsageError(
            f"{onnx_folder}: its graph is of opset {source.opset}, and TensorRT {trt.__version__} reads up to {newest}; "
            f"`iedit export tensorrt {source.model} --opset {newest}` exports it anew"
        )
    spec = EngineSpec(
        format="tensorrt",
        module=source.module,
        model=source.model,
        weights=source.weights,
        graph=source.graph,
        precision=source.precision,
        shapes=module_shapes(source.module, shapes),
        opset=source.opset,
        versions={**source.versions, "tensorrt": str(trt.__version__)},
        gpu=backend_tensorrt.gpu_kind(where),
        attention="decomposable" if source.attention == "operator" else source.attention,
        inputs=source.inputs,
    )

    def fits(there: EngineSpec) -> bool:
        fields = ("format", "module", "weights", "graph", "precision", "shapes", "gpu", "attention", "inputs")
        same = not there.differs(**{name: getattr(spec, name) for name in fields})
        return same and there.versions.get("tensorrt") == spec.versions["tensorrt"]

    def build(folder: Path) -> EngineSpec:
        one = _Build(trt, onnx_folder / GRAPH, spec, tell)

        def write() -> None:
            with backend_tensorrt.on(where):  # the device that is current is the thread's own
                one.write(folder, timing_cache, vae_scale_factor, text, workspace)

        interruptible(write, one.stop, one.tell)
        return spec

    spec, kept = build_once(out, fits, build, tell, force)
    tell(f"{spec.module}: {'kept, the engine is there' if kept else 'done'}")
    return spec


def newest_opset(version: str) -> int:
    """The newest opset of those that `export.onnx` writes that TensorRT of a version reads."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    return 23 if numbers >= ATTENTION_SINCE else 22


def with_decomposable_attention(graph: bytes) -> bytes:
    """An ONNX file whose Attention operators TensorRT may take apart. Unless it is told that it may, a build fails at the
    first that no fused kernel fits: every one in float32, and the heads of size 512 of Stable Diffusion 1.5's VAE. ONNX Runtime
    refuses the attribute that says so, which is why it is not in the exported file."""
    import onnx as format_

    proto = format_.load_model_from_string(graph)
    for node in proto.graph.node:
        if node.op_type == "Attention":
            node.attribute.append(format_.helper.make_attribute("TRT_decomposable", 1))
    data: bytes = proto.SerializeToString()
    return data


def interruptible(work: Callable[[], None], stop: threading.Event, tell: Tell) -> None:
    """`work` in a thread of its own, while this one waits for Ctrl-C: in TensorRT's own code Python does not see it, and what is raised in
    its callbacks never arrives. Ctrl-C sets `stop` and is raised once the work has come back; a second one is raised at once."""
    failed: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name="iedit-tensorrt", daemon=True).start()
    try:
        while not done.wait(0.1):
            pass
    except KeyboardInterrupt:
        stop.set()
        tell("stopping at TensorRT's next step; Ctrl-C again does not wait for it")
        done.wait()  # not the thread's `join`, which takes a thread for ended once it was interrupted
        raise
    if failed:
        raise failed[0]


def _source(onnx_folder: Path) -> EngineSpec:
    """The spec of the ONNX engine to build from, its files compared with their digests."""
    source = read_spec(onnx_folder)
    if source.format != "onnx":
        raise UsageError(f"{onnx_folder}: is an engine of format {source.format}, expected onnx")
    why = damaged(onnx_folder, source)
    if why:
        raise UsageError(f"{onnx_folder}: {'; '.join(why)}; export it again")
    return source


def default_batch(model: Model, height: int, width: int) -> str:
    """The range of batches, as it is typed, that a default edit at a size in pixels asks for: what `editor.samples_per_call` puts
    into one call, up to what a mask takes. At Stable Diffusion 1.5's 512x512 that is 1-2-4, and the embedded model's 1-2-20."""
    most = samples_per_call(model, height // model.vae_scale_factor, width // model.vae_scale_factor)
    return f"1-2-{min(MASK_SAMPLES, max(4, most))}"


def module_shapes(module: str, shapes: Sequence[Shapes]) -> tuple[Shapes, ...]:
    """The ranges that a module has profiles for. The text encoder has no size: one range for each batch. The halves of the VAE are best
    at the smallest batch and have at most `VAE_SAMPLES`, or the smallest; larger ones are run in several calls.

    Raises:
        UsageError: there is none, or one without limits.
    """
    if not shapes:
        raise UsageError("shapes: a TensorRT engine is built for ranges of batch and size; give at least one")
    for s in shapes:
        for name in ("batch", "height", "width"):
            smallest, opt, largest = getattr(s, name)
            if not 1 <= smallest <= opt <= largest:
                raise UsageError(
                    f"shapes: {name} {smallest}-{opt}-{largest} is not a range with limits; TensorRT needs one"
                )
    if module == "text_encoder":
        return tuple(dict.fromkeys(Shapes(s.batch, (0, 0, 0), (0, 0, 0)) for s in shapes))
    if module in ("vae_encoder", "vae_decoder"):
        return tuple(
            replace(s, batch=(s.batch[0], s.batch[0], max(s.batch[0], min(s.batch[2], VAE_SAMPLES)))) for s in shapes
        )
    return tuple(shapes)


class _Build:
    """One build: a network from an ONNX graph, a configuration, an engine."""

    def __init__(self, trt: Any, graph: Path, spec: EngineSpec, tell: Tell):
        self.trt, self.graph, self.spec = trt, graph, spec
        self.tell: Tell = lambda line: tell(f"{spec.module}: {line}")
        self.log, self.stop = new_logger(trt), threading.Event()

    def write(
        self,
        folder: Path,
        timing_cache: Path | None,
        vae_scale_factor: int,
        text: tuple[int, int, int],
        workspace: int | None,
    ) -> None:
        """Write the plan and the inspector's report into `folder`. Arguments as of `build_tensorrt`."""
        trt = self.trt
        builder = trt.Builder(self.log)
        network = self.parse(builder)
        config = builder.create_builder_config()
        if workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        config.clear_flag(
            trt.BuilderFlag.TF32
        )  # which is on unless told otherwise, with 10 bits of what is called float32
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        monitor = config.progress_monitor = new_monitor(trt, self.tell, self.stop)
        self.add_profiles(builder, config, network, vae_scale_factor, text)
        if timing_cache is not None:
            self.read_timings(config, timing_cache)
        plan = builder.build_serialized_network(network, config)
        if monitor.error is not None:
            raise monitor.error
        if plan is None:
            if self.stop.is_set():
                return
            raise self.error(f"TensorRT could not build {self.spec.module} for {self.spec}")
        if timing_cache is not None:
            cache = config.get_timing_cache()
            timing_cache.parent.mkdir(parents=True, exist_ok=True)
            write_whole(timing_cache, bytes(cache.serialize()))
        write_whole(folder / PLAN, bytes(plan))
        runtime = trt.Runtime(self.log)
        engine = runtime.deserialize_cuda_engine(bytes(plan))
        if engine is None:
            raise self.error("TensorRT cannot load what it built")
        inspector = engine.create_engine_inspector()
        report = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        write_whole(folder / INSPECTOR, str(report).encode())

    def error(self, what: str) -> RunError:
        return RunError(f"{self.graph}: {what}: {last_errors(self.log)}")

    def parse(self, builder: Any) -> Any:
        """The network of the ONNX graph.

        Raises:
            RunError: the parser refused it; all that it found.
        """
        self.tell(f"reading {self.graph.name}")
        trt, network = self.trt, builder.create_network(network_flags(self.trt))
        parser = trt.OnnxParser(network, self.log)
        # The path is for the weights beside it.
        if not parser.parse(with_decomposable_attention(self.graph.read_bytes()), str(self.graph)):
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            why = "; ".join(
                f"{error.node_name() or 'a node'} ({error.node_operator() or '?'}): {error.desc()}" for error in errors
            )
            other = f"; try `iedit export tensorrt {self.spec.model} --opset 22`" if self.spec.opset > 22 else ""
            raise RunError(f"{self.graph}: TensorRT's parser refused it: {why or last_errors(self.log)}{other}")
        return network

    def add_profiles(
        self, builder: Any, config: Any, network: Any, vae_scale_factor: int, text: tuple[int, int, int]
    ) -> None:
        """One optimisation profile for each range of the spec.

        Raises:
            RunError: the graph's inputs are not the module's, or TensorRT refused a range.
        """
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        names, wanted = {tensor.name for tensor in inputs}, module_io.inputs(self.spec.module)
        if names != set(wanted):
            raise RunError(
                f"{self.graph}: its inputs are {', '.join(sorted(names))}, expected {', '.join(wanted)}; export it again"
            )
        for limits in self.spec.shapes:
            profile = builder.create_optimization_profile()
            for tensor in inputs:
                dims = tuple(tensor.shape)
                if -1 in dims:
                    profile.set_shape(tensor.name, *input_ranges(tensor.name, dims, limits, vae_scale_factor, text))
            if config.add_optimization_profile(profile) < 0:
                raise self.error(f"TensorRT refused the ranges {limits}")

    def read_timings(self, config: Any, path: Path) -> None:
        """Use the tactic timings of a file; a new cache where there is none, or one of another GPU or version of TensorRT."""
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            self.tell(f"{path} is of another GPU or TensorRT; starting a new one")
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, ignore_mismatch=False)


def network_flags(trt: Any) -> int:
    """For `create_network`: strongly typed. TensorRT 11 knows nothing else, and has renumbered the flags: this one is ignored there."""
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if typed is None else 1 << int(typed)


def input_ranges(
    name: str, dims: tuple[int, ...], limits: Shapes, vae_scale_factor: int, text: tuple[int, int, int]
) -> tuple[tuple[int, ...], ...]:
    """(min, opt, max) shape of an input; its open dimensions, -1 in `dims`, are filled.

    Raises:
        RunError: an input that no module has (see `module_io`).
    """
    pixels = (limits.height, limits.width)
    cells = tuple(tuple(v // vae_scale_factor for v in side) for side in pixels)
    rows: tuple[tuple[int, ...], ...]
    if name in ("sample", "latents") or name.endswith("_control_embedding"):
        rows = (limits.batch, (0, 0, 0), *cells)  # channels are never open
    elif name in ("images", "image"):
        rows = (limits.batch, (3, 3, 3), *pixels)
    elif name == "timestep" or name.endswith("_scale") or name == "scale":
        rows = (limits.batch,)
    elif name in ("encoder_hidden_states", "ids"):
        rows = (limits.batch, text, (0, 0, 0))
    else:
        raise RunError(f"the ONNX graph has an input {name}, which no module has; export it again")
    filled = [(d, d, d) if d != -1 else rows[i] for i, d in enumerate(dims)]
    return tuple(tuple(row[i] for row in filled) for i in range(3))


def new_monitor(trt: Any, tell: Tell, stop: threading.Event) -> Any:
    """Tells of the build's outer phases, with their share, and ends the build at the next step once `stop` is set. An exception in a
    callback would be swallowed by the bindings: it is kept as `error`, and ends the build too."""

    def say(monitor: Any, line: str) -> None:
        try:
            tell(line)
        except BaseException as error:
            monitor.error = error
            stop.set()

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.tenths: dict[str, int] = {}
            self.error: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:  # inner ones come by the thousand
                self.steps[phase_name], self.tenths[phase_name] = num_steps, 0
                say(self, f"{phase_name} begins")

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps:
                tenth = 10 * (step + 1) // max(self.steps[phase_name], 1)
                if tenth > self.tenths[phase_name]:
                    self.tenths[phase_name] = tenth
                    say(self, f"{phase_name} {10 * min(tenth, 10)} %")
            return not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            if self.steps.pop(phase_name, None) is not None:
                say(self, f"{phase_name} is done")

    return Monitor()


def build_all(
    model: Model,
    out: Path,
    shapes: Sequence[Shapes],
    layouts: Sequence[str] | None = None,
    precision: str = "fp16",
    *,
    opset: int | None = None,
    timing_cache: Path | None = None,
    workspace: int | None = None,
    tell: Tell = lambda text: None,
    force: bool = False,
) -> list[EngineSpec]:
    """Engines of every module of a model, from the ONNX engines in `out`; those that are missing are exported first.

    Args:
        layouts: ControlNets to fuse; None is each that the model has, alone.
        opset: of the graphs; None is the newest that the installed TensorRT reads.
        timing_cache, workspace: as of `build_tensorrt`.
    """
    why = backend_tensorrt.why_unavailable()
    if why:
        raise UsageError(f"tensorrt was requested but cannot run: {'; '.join(why)}")
    import tensorrt as trt

    opset = opset or newest_opset(str(trt.__version__))
    tokens = model.text_length

    def tell_export(progress: onnx.ExportProgress) -> None:
        tell(f"{progress.module}: ONNX: {progress.text}")

    specs = []
    for source in onnx.export_onnx(model, out, layouts, precision, opset, tell=tell_export):
        # The encoder reads one chunk at a time; the UNet reads the embeddings of up to four.
        longest = tokens if source.module == "text_encoder" else 4 * tokens
        specs.append(
            build_tensorrt(
                onnx.engine_folder(out, source.module, precision),
                out / f"tensorrt-{precision}" / source.module,
                shapes,
                timing_cache=timing_cache,
                workspace=workspace,
                tell=tell,
                vae_scale_factor=model.vae_scale_factor,
                text=(tokens, tokens, longest),
                device=model.device,
                force=force,
            )
        )
    return specs
