"""TensorRT engines, called with torch's tensors on torch's stream; one code path for TensorRT 10.12+ and 11.

An engine runs on the kind of GPU and under the version of TensorRT that it was built with, for the ranges it was built for.
All of that is in its spec and is checked before it is loaded; what was refused is kept and said by `why_not`. Nothing here
waits for the device, and every output is a tensor of the caller's own.

Nothing of this file has run on hardware yet: it was driven by a recording fake (see docs/tensorrt.md).
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..denoise_step import Condition, IdentityCache
from ..errors import RunError, UsageError
from ..model import module_io
from ..model.model import Model
from ..profile import current, module_call
from .base import cuda_missing, missing, refuse, unet_inputs, unet_module
from .cuda_graphs import capture, first_line
from .engine_spec import EngineSpec, damaged, engines_folder, find_engines, writable_by_all

PLAN = "engine.plan"


def why_unavailable() -> list[str]:
    """Reasons why TensorRT cannot run on this machine; empty if it can."""
    return missing("tensorrt", extra="gpu") + cuda_missing()


# --- what a test without a GPU puts its own in place of ---------------------------------------------------------


def arch(device: torch.device) -> str:
    """The kind of GPU, "sm_90": an engine runs on no other."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def not_cuda(device: torch.device) -> list[str]:
    """A reason if tensors of this device cannot be given to an engine."""
    return [] if device.type == "cuda" else [f"the model is on {device}, engines need it on a CUDA device"]


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """TensorRT builds and loads on the CUDA device that is current."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def current_stream(device: torch.device) -> int:
    """The handle of torch's current stream."""
    return int(torch.cuda.current_stream(device).cuda_stream)


# ----------------------------------------------------------------------------------------------------------------


def new_logger(trt: Any) -> Any:
    """A TensorRT logger that prints nothing and keeps the last errors, `errors`, for a message."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=5)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(" ".join(msg.split())[:300])

    return Log()


def last_errors(log: Any) -> str:
    """What TensorRT said last, for the end of a message."""
    return "; ".join(log.errors) or "TensorRT gave no reason"


def torch_kind(trt: Any, kind: Any) -> torch.dtype:
    """The torch dtype of a tensor of an engine."""
    kinds = {
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.HALF: torch.float16,
        trt.DataType.BF16: torch.bfloat16,
        trt.DataType.INT64: torch.int64,
        trt.DataType.INT32: torch.int32,
    }
    if kind not in kinds:
        raise RunError(f"tensorrt: an input or output is of type {kind}, expected float32, float16, bfloat16 or int")
    return kinds[kind]


@dataclass
class _Loaded:
    """An engine in memory.

    Attributes:
        inputs: name -> dtype that it wants.
        contexts: profile -> execution context; one call at a time, under `lock`.
        graphs: shapes of the inputs -> what replays them.
    """

    engine: Any
    inputs: dict[str, torch.dtype]
    output: str
    kind: torch.dtype
    contexts: dict[int, Any] = field(default_factory=dict)
    graphs: dict[tuple[Any, ...], _Graph] = field(default_factory=dict)
    seen: set[tuple[Any, ...]] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class _Graph:
    """A recorded call on buffers of its own; the context is here since the graph uses its memory."""

    context: Any
    inputs: dict[str, Tensor]
    output: Tensor
    replay: Callable[[], None]


class TensorrtBackend:
    """The modules of a model for which a usable engine was found; see `backends.Backend`.

    Engines are loaded when a module is first called. Calls from several threads are safe, one at a time for each module.

    Args:
        engines: folder of engines; None is the user's cache, by the model's digest.
        graphs: replay each module and shape as a CUDA graph from its second call on; costs its buffers and one execution
            context each. Where one cannot be recorded all run without, and the profile says why.
        trust_engines: also use engines that every user of this machine may change.

    Raises:
        UsageError: TensorRT cannot run here, the model is not on a GPU, or no engine of a UNet can be used.
    """

    name = "tensorrt"

    def __init__(self, model: Model, engines: Path | None = None, *, graphs: bool = True, trust_engines: bool = False):
        why = why_unavailable() or not_cuda(model.device)
        if why:
            raise UsageError(f"tensorrt was requested but cannot run: {'; '.join(why)}")
        import tensorrt as trt

        self.model, self.device, self.graphs, self._trt = model, model.device, graphs, trt
        self.folder = engines_folder(model.weights_digest) if engines is None else engines
        self.trust = trust_engines
        self.no_graphs = ""  # why recording failed
        self.refused: dict[str, list[str]] = {}  # module, or the name of a folder that names none -> reasons
        self._found: dict[str, list[tuple[Path, EngineSpec]]] = {}
        self._loaded: dict[Path, _Loaded] = {}
        self._lock = threading.Lock()
        self._cache: IdentityCache[dict[str, Tensor]] = IdentityCache(4)
        self._log = new_logger(trt)
        self._runtime = trt.Runtime(self._log)
        self._find()
        if not any(module.startswith("unet") for module in self._found):
            told = [w for why in self.refused.values() for w in why] or ["there are no TensorRT engines in it"]
            raise UsageError(f"no engine of {model.name} can be used: {self.folder}: {'; '.join(told)}; {self._fix()}")

    def _fix(self) -> str:
        return f"build one here with `iedit export tensorrt {self.model.name}`"

    def _find(self) -> None:
        for folder, spec in find_engines(self.folder):
            if isinstance(spec, UsageError):
                self.refused.setdefault(folder.name, []).append(str(spec))
            elif spec.format == "tensorrt":
                why = self._differs(spec) or damaged(folder, spec)
                why = why or ([] if self.trust else writable_by_all(folder, spec, self.folder))
                if why:
                    self.refused.setdefault(spec.module, []).extend(f"{folder}: {w}" for w in why)
                else:
                    self._found.setdefault(spec.module, []).append((folder, spec))

    def _differs(self, spec: EngineSpec) -> list[str]:
        """Every field that is not this model's, this GPU's or this TensorRT's."""
        try:
            digest = self.model.module_digest(spec.module)
        except KeyError as absent:
            return [f"module: {spec.module} needs {absent.args[0]}, which the model does not have"]
        why = spec.differs(weights=digest, gpu=arch(self.device))
        built, here = spec.versions.get("tensorrt", "none"), str(self._trt.__version__)
        if built != here:
            why.append(f"versions: the engine was built with TensorRT {built}, here is {here}")
        if PLAN not in spec.files:
            why.append(f"files: {PLAN} is not among them")
        return why

    def engine_digests(self, module: str) -> list[str]:
        """`EngineSpec.digest` of everything that could run `module`."""
        return [spec.digest for _, spec in self._found.get(module, [])]

    def modules(self) -> list[str]:
        """Names of the modules that have an engine."""
        return sorted(self._found)

    def why_not(self, module: str, batch: int, height: int, width: int) -> list[str]:
        """A fused UNet needs the engines of its layouts' embeddings too."""
        hints = module_io.hint_modules(module)
        return [why for name in (module, *hints) for why in self._why_not(name, batch, height, width)]

    def _why_not(self, module: str, batch: int, height: int, width: int) -> list[str]:
        found = self._found.get(module, [])
        if not found:
            return [f"there is no engine for {module} in {self.folder} ({self._fix()})", *self.refused.get(module, [])]
        why: list[str] = []
        for _, spec in found:
            misses = spec.out_of_range(batch, *_pixels(spec, height, width))
            if not misses:
                return []
            why += misses
        return why

    # --- modules ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `base.Denoiser`."""
        module, size = (
            unet_module(condition),
            (x.shape[-2] * self.model.vae_scale_factor, x.shape[-1] * self.model.vae_scale_factor),
        )
        refuse(self, module, len(x), *size)  # before the hints, so that it is the UNet that is named
        inputs = unet_inputs(x, t, condition, self._hints(condition) if condition.controls else {})
        return self._run(module, inputs, *size)

    def _hints(self, condition: Condition) -> dict[str, Tensor]:
        return self._cache.get([condition], lambda: {c.name: self.hint(c.name, c.image) for c in condition.controls})

    @torch.no_grad()
    def hint(self, name: str, maps: Tensor) -> Tensor:
        """(B, 3, H, W) map in [0, 1] -> (B, C0, h, w) float32, its embedding; `predict` asks once for each condition."""
        return self._run(module_io.HINT_PREFIX + name, [maps], *maps.shape[-2:])

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        return self._run("vae_encoder", [images], *images.shape[-2:])

    @torch.no_grad()
    def decode_latent(self, latents: Tensor) -> Tensor:
        factor = self.model.vae_scale_factor
        return self._run("vae_decoder", [latents], latents.shape[-2] * factor, latents.shape[-1] * factor)

    @torch.no_grad()
    def encode_tokens(self, ids: Tensor) -> Tensor:
        return self._run("text_encoder", [ids], 0, 0)

    # --- engines ------------------------------------------------------------------------------------------------

    def _run(self, module: str, values: Sequence[Tensor], height: int, width: int) -> Tensor:
        """One call. Returns float32, a tensor that nothing else refers to."""
        inputs = dict(zip(module_io.inputs(module), values, strict=True))
        first = values[0]
        batch = len(first)
        refuse(self, module, batch, height, width)
        folder = self._nearest(module, batch, height, width)
        key = tuple(tuple(v.shape) for v in values)
        known = self._loaded.get(folder)
        cold = known is None or key not in known.seen or (self.graphs and key not in known.graphs)
        engine = next(spec.digest for where, spec in self._found[module] if where == folder)
        with on(self.device), module_call(module, self.name, batch, cold=cold, device=first.device, engine=engine):
            loaded = self._load(module, folder)
            if set(inputs) != set(loaded.inputs):
                raise RunError(
                    f"{folder}: the engine's inputs are {', '.join(sorted(loaded.inputs))}, expected "
                    f"{', '.join(sorted(inputs))}; build it again"
                )
            given = {n: v.to(self.device, loaded.inputs[n]).contiguous() for n, v in inputs.items()}
            with loaded.lock:
                if self.graphs and key in loaded.seen:
                    result = self._replay(module, loaded, key, given)
                else:
                    context = self._context(module, loaded, given)
                    result = self._execute(module, loaded, context, given)
                loaded.seen.add(key)
        running = current()
        if self.no_graphs and running is not None:
            running.fallback(module, "cuda graph", [self.no_graphs])
        return result.float()

    def _nearest(self, module: str, batch: int, height: int, width: int) -> Path:
        """The engine with the profile whose optimum is nearest: far from it an engine can be slower than eager torch."""

        def distance(spec: EngineSpec) -> float:
            found = [math.inf]
            h, w = _pixels(spec, height, width)
            for s in spec.shapes:
                if not s.out_of_range(batch, h, w):
                    asked = ((batch, s.batch[1]), (h, s.height[1]), (w, s.width[1]))
                    found.append(sum(abs(math.log(max(a, 1) / max(b, 1))) for a, b in asked))
            return min(found)

        return min(self._found[module], key=lambda one: distance(one[1]))[0]

    def _load(self, module: str, folder: Path) -> _Loaded:
        with self._lock:
            if folder not in self._loaded:
                trt = self._trt
                engine = self._runtime.deserialize_cuda_engine((folder / PLAN).read_bytes())
                if engine is None:
                    raise RunError(f"{folder / PLAN}: TensorRT cannot load it: {last_errors(self._log)}; {self._fix()}")
                inputs: dict[str, torch.dtype] = {}
                outputs: dict[str, torch.dtype] = {}
                for i in range(engine.num_io_tensors):
                    name = engine.get_tensor_name(i)
                    side = inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs
                    side[name] = torch_kind(trt, engine.get_tensor_dtype(name))
                if list(outputs) != [module_io.output(module)]:
                    raise RunError(
                        f"{folder}: the engine's outputs are {', '.join(outputs)}, expected {module_io.output(module)}; "
                        "build it again"
                    )
                ((output, kind),) = outputs.items()
                self._loaded[folder] = _Loaded(engine, inputs, output, kind)
            return self._loaded[folder]

    def _profile(self, module: str, engine: Any, given: dict[str, Tensor]) -> int:
        """The optimisation profile that takes these inputs and whose optimum is nearest.

        Raises:
            UsageError: none takes them; the input is named. (Width, height and batch have been asked of the spec before: it is
                the text's length.)
        """
        best, why = (math.inf, -1), []
        for i in range(engine.num_optimization_profiles):
            distance, misses = 0.0, []
            for name, value in given.items():
                static = tuple(engine.get_tensor_shape(name))
                low, opt, high = engine.get_tensor_profile_shape(name, i) if -1 in static else (static, static, static)
                for size, a, b, c in zip(value.shape, low, opt, high, strict=True):
                    distance += abs(math.log(size / b))
                    if not a <= size <= c:
                        misses.append(f"{name} {tuple(low)} to {tuple(high)}, given {tuple(value.shape)}")
                        break
            if not misses:
                best = min(best, (distance, i))
            why += misses
        if best[1] < 0:
            raise UsageError(f"the tensorrt {module} engine was built for {' or '.join(why)}; {self._fix()}")
        return best[1]

    def _new_context(self, module: str, loaded: _Loaded, profile: int) -> Any:
        context = loaded.engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(profile, current_stream(self.device)):
            # The words by which `network.Network` knows it and goes on with smaller batches.
            raise MemoryError(f"tensorrt can't allocate memory for {module}: {last_errors(self._log)}")
        return context

    def _context(self, module: str, loaded: _Loaded, given: dict[str, Tensor]) -> Any:
        """The context of the profile for these inputs, kept: making one takes longer than a call."""
        profile = self._profile(module, loaded.engine, given)
        if profile not in loaded.contexts:
            loaded.contexts[profile] = self._new_context(module, loaded, profile)
        return loaded.contexts[profile]

    def _execute(
        self, module: str, loaded: _Loaded, context: Any, given: dict[str, Tensor], into: Tensor | None = None
    ) -> Tensor:
        """Enqueue one call on torch's stream. `given` may be freed after it: torch's allocator keeps the stream's order."""
        for name, value in given.items():
            if not context.set_input_shape(name, tuple(value.shape)):
                raise RunError(
                    f"tensorrt {module}: {name} of {tuple(value.shape)} was refused: {last_errors(self._log)}"
                )
            context.set_tensor_address(name, value.data_ptr())
        unknown = context.infer_shapes()
        if unknown:
            raise RunError(f"tensorrt {module}: the shape of {', '.join(unknown)} does not follow from the inputs")
        shape = tuple(context.get_tensor_shape(loaded.output))
        result = torch.empty(shape, dtype=loaded.kind, device=self.device) if into is None else into
        context.set_tensor_address(loaded.output, result.data_ptr())
        if not context.execute_async_v3(current_stream(self.device)):
            raise RunError(f"tensorrt could not run {module}: {last_errors(self._log)}")
        return result

    def _replay(self, module: str, loaded: _Loaded, key: tuple[Any, ...], given: dict[str, Tensor]) -> Tensor:
        """From a graph on buffers of its own; the result is a copy, for the next replay writes over the buffer."""
        graph = loaded.graphs.get(key)
        if graph is None:
            context = self._new_context(module, loaded, self._profile(module, loaded.engine, given))
            own = {name: value.clone() for name, value in given.items()}
            # A call outside the graph first, for what TensorRT sets up when the shapes are new.
            into = self._execute(module, loaded, context, own)
            try:
                replay = capture(lambda: self._enqueue(module, context), self.device)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, RunError) as error:
                self.graphs, self.no_graphs = False, first_line(error)
                return into
            graph = loaded.graphs[key] = _Graph(context, own, into, replay)
        for name, value in given.items():
            graph.inputs[name].copy_(value)
        graph.replay()
        return graph.output.clone()

    def _enqueue(self, module: str, context: Any) -> None:
        if not context.execute_async_v3(current_stream(self.device)):
            raise RunError(f"tensorrt could not record {module} as a graph: {last_errors(self._log)}")


def _pixels(spec: EngineSpec, height: int, width: int) -> tuple[int, int]:
    """What to ask a spec's ranges for: a text has no height."""
    if spec.module == "text_encoder":
        return spec.shapes[0].height[0], spec.shapes[0].width[0]
    return height, width
