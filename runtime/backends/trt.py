"""TensorRT engines, called with torch's tensors on torch's stream; one code path for TensorRT 10.12+ and 11.

An engine runs on the kind of GPU and under the version of TensorRT that it was built with, for the ranges it was built for.
All of that is in its spec and is checked before it is loaded. Calls go to a stream of the backend's own, which waits for the caller's and
is waited for by it on the device only, and every output is a tensor of the caller's own.

Nothing of this file has run on hardware yet: it was driven by a recording fake (see docs/tensorrt.md).
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RunError, UsageError
from ..model import module_io
from ..model.model import Model
from ..profile import current, module_call
from .base import BackendOptions, UnavailableError, cuda_missing, import_failure, missing
from .cuda_graphs import CudaGraphCache, aligned, aligned_empty, capture
from .engine import Engine, EngineBackend, pixels
from .engine_spec import EngineSpec

PLAN = "engine.plan"
CONTEXTS = 4  # that are kept of an engine, one for each optimisation profile that is in use


def why_unavailable() -> list[str]:
    """Reasons why TensorRT cannot run on this machine; empty if it can. Where there is a GPU it is imported to know that."""
    why = missing("tensorrt", extra="gpu") + cuda_missing()
    return why or import_failure("tensorrt", _tensorrt)


def _tensorrt() -> Any:
    import tensorrt

    return tensorrt.__version__  # a package without its bindings can be imported and is empty


# --- replaced by the tests, which have no GPU --------------------------------------------------------------------


def gpu_kind(device: torch.device) -> str:
    """The kind of GPU, "sm_90 NVIDIA H100 80GB HBM3". An engine's kernels were chosen on it: another one of its architecture may lack
    the memory or the multiprocessors that they count on."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor} {torch.cuda.get_device_name(device)}"


def not_cuda(device: torch.device) -> list[str]:
    """A reason if tensors of this device cannot be given to an engine."""
    return [] if device.type == "cuda" else [f"the model is on {device}, engines need it on a CUDA device"]


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """TensorRT builds and loads on the CUDA device that is current."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def own_stream(device: torch.device) -> Any:
    """A new stream: on the default stream TensorRT synchronises more than it has to. None on a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def current_stream(device: torch.device) -> int:
    """The handle of torch's current stream."""
    return int(torch.cuda.current_stream(device).cuda_stream)


# ----------------------------------------------------------------------------------------------------------------


def new_logger(trt: Any) -> Any:
    """A TensorRT logger that prints nothing and keeps the last errors and warnings, `errors` and `warnings`. What it raised
    would be swallowed by the bindings, so it raises nothing."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=5)
            self.warnings: deque[str] = deque(maxlen=20)

        def log(self, severity: Any, msg: str) -> None:
            line = " ".join(msg.split())[:300]
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(line)
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(line)

    return Log()


def last_errors(log: Any) -> str:
    """What TensorRT said last, for the end of a message."""
    return "; ".join(log.errors) or "TensorRT gave no reason"


def torch_dtype(trt: Any, dtype: Any) -> torch.dtype:
    """The torch dtype of a tensor of an engine."""
    dtypes = {
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.HALF: torch.float16,
        trt.DataType.BF16: torch.bfloat16,
        trt.DataType.INT64: torch.int64,
        trt.DataType.INT32: torch.int32,
    }
    if dtype not in dtypes:
        raise RunError(f"tensorrt: an input or output is of type {dtype}, expected float32, float16, bfloat16 or int")
    return dtypes[dtype]


@dataclass
class _Context:
    """An execution context and the device memory that it was given."""

    context: Any
    memory: Tensor


@dataclass
class _Loaded:
    """An engine in memory.

    Attributes:
        inputs: name -> dtype that it wants.
        output, dtype: name and dtype of what it returns.
        contexts: optimisation profile -> its context, the last used ones.
    """

    engine: Any
    inputs: dict[str, torch.dtype]
    output: str
    dtype: torch.dtype
    contexts: OrderedDict[int, _Context] = field(default_factory=OrderedDict)


def load(model: Model, options: BackendOptions) -> TensorrtBackend:
    """See `backends.load_backend`."""
    return TensorrtBackend(model, options.engines, trust_engines=options.trust_engines)


class TensorrtBackend(EngineBackend):
    """The modules of a model for which a usable TensorRT engine was found. An engine is loaded when a module is first called; calls from
    several threads are safe, one at a time: all contexts compute in the same device memory, as much as the largest engine needs. Arguments as of `EngineBackend`, and:

    Args:
        graphs: replay each module and shape as a CUDA graph from its second call on; costs its buffers and one execution
            context each. Where one cannot be recorded all run without, and the profile says why.

    Raises:
        UsageError: TensorRT cannot run here, or the model is not on a GPU.
    """

    name = "tensorrt"
    format_name = "TensorRT"
    file = PLAN

    def __init__(self, model: Model, engines: Path | None = None, *, graphs: bool = True, trust_engines: bool = False):
        why = why_unavailable() or not_cuda(model.device)
        if why:
            raise UnavailableError(self.name, why)
        import tensorrt as trt

        self._trt, self._log = trt, new_logger(trt)
        self._runtime = trt.Runtime(self._log)
        self._loaded: dict[Path, _Loaded] = {}
        self._memory: Tensor | None = None
        self._stream = own_stream(model.device)
        self._turn = threading.RLock()
        self.graphs = CudaGraphCache(model.device, capture=capture if graphs else None)
        super().__init__(model, engines, trust_engines)

    @property
    def fix(self) -> str:
        return f"build one here with `iedit export tensorrt {self.model.name} --precision {self.precisions[0]}`"

    def _differs(self, spec: EngineSpec) -> list[str]:
        why = super()._differs(spec) + spec.differs(gpu=gpu_kind(self.device))
        built, here = spec.versions.get("tensorrt", "none"), str(self._trt.__version__)
        if built != here:
            why.append(f"versions: the engine was built with TensorRT {built}, here is {here}")
        return why

    # --- engines ------------------------------------------------------------------------------------------------

    def _run(self, module: str, inputs: Sequence[Tensor], height: int, width: int) -> Tensor:
        with self._turn:
            result = self._in_turn(module, inputs, height, width)
            running = current()
            while running is not None and self._log.warnings:
                running.note(f"tensorrt: {self._log.warnings.popleft()}")
        self.graphs.tell_failure(module)
        return result.float()

    def _in_turn(self, module: str, inputs: Sequence[Tensor], height: int, width: int) -> Tensor:
        first, batch = inputs[0], len(inputs[0])
        folder, spec = self._nearest(module, batch, height, width)
        known = self._loaded.get(folder)
        given = None if known is None else self._given(known, module, inputs)
        cold = given is None or self.graphs.cold(str(folder), given)
        with on(self.device), module_call(module, self.name, batch, cold=cold, device=first.device, engine=spec.digest):
            loaded = known or self._load(module, folder)
            given = given or self._given(loaded, module, inputs)
            with self._on_own_stream() as callers:
                (result,) = self.graphs(
                    str(folder),
                    lambda given: [self._execute(module, loaded, self._context(module, loaded, given), given)],
                    given,
                    lambda: self._recordable(module, loaded),
                )
            if callers is not None:
                result.record_stream(callers)  # whose work may still read it when it is freed
        return result

    @contextlib.contextmanager
    def _on_own_stream(self) -> Iterator[Any]:
        """Work after all that the caller's stream has been given, and before all that it will be; the caller's stream."""
        if self._stream is None:
            yield None
            return
        callers = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(callers)
        with torch.cuda.stream(self._stream):
            yield callers
        callers.wait_stream(self._stream)

    def _given(self, loaded: _Loaded, module: str, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Inputs by name as an engine takes them: on its device, of its dtypes, contiguous and aligned."""
        named = zip(module_io.inputs(module), inputs, strict=True)
        return {name: aligned(value.to(self.device, loaded.inputs[name]).contiguous()) for name, value in named}

    def _recordable(self, module: str, loaded: _Loaded) -> Callable[[dict[str, Tensor]], list[Tensor]]:
        """A call that can be recorded as a CUDA graph, with a context of its own, because the graph holds the addresses that
        it was given.

        The first time that it is called it does all that TensorRT does when shapes are new; afterwards it enqueues the same again.
        """
        ready: list[tuple[_Context, Tensor]] = []

        def call(given: dict[str, Tensor]) -> list[Tensor]:
            if not ready:
                held = self._new_context(module, loaded, self._profile(module, loaded.engine, given))
                ready.append((held, self._execute(module, loaded, held.context, given)))
            else:
                self._enqueue(module, ready[0][0].context)
            return [ready[0][1]]

        return call

    def _nearest(self, module: str, batch: int, height: int, width: int) -> Engine:
        """Of the model's own precision, if there is one, the engine with the profile whose optimum is nearest: far from it an engine can be
        slower than eager torch."""

        def distance(spec: EngineSpec) -> float:
            distances = [math.inf]
            h, w = pixels(spec, height, width)
            for s in spec.shapes:
                if not s.out_of_range(batch, h, w):
                    pairs = ((batch, s.batch[1]), (h, s.height[1]), (w, s.width[1]))
                    distances.append(sum(abs(math.log(max(a, 1) / max(b, 1))) for a, b in pairs))
            return min(distances)

        fitting = [engine for engine in self.engines(module) if math.isfinite(distance(engine[1]))]
        return min(fitting, key=lambda e: (self.precisions.index(e[1].precision), distance(e[1])))

    def _load(self, module: str, folder: Path) -> _Loaded:
        with self._lock:
            if folder not in self._loaded:
                trt = self._trt
                engine = self._runtime.deserialize_cuda_engine((folder / PLAN).read_bytes())
                if engine is None:
                    raise RunError(f"{folder / PLAN}: TensorRT cannot load it: {last_errors(self._log)}; {self.fix}")
                inputs: dict[str, torch.dtype] = {}
                outputs: dict[str, torch.dtype] = {}
                for i in range(engine.num_io_tensors):
                    name = engine.get_tensor_name(i)
                    side = inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs
                    side[name] = torch_dtype(trt, engine.get_tensor_dtype(name))
                expected = {"inputs": set(module_io.inputs(module)), "outputs": {module_io.output(module)}}
                for what, names in (("inputs", set(inputs)), ("outputs", set(outputs))):
                    if names != expected[what]:
                        given, wanted = (", ".join(sorted(n)) for n in (names, expected[what]))
                        raise RunError(f"{folder}: the engine's {what} are {given}, expected {wanted}; build it again")
                ((output, dtype),) = outputs.items()
                self._loaded[folder] = _Loaded(engine, inputs, output, dtype)
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
            raise UsageError(f"the tensorrt {module} engine was built for {' or '.join(why)}; {self.fix}")
        return best[1]

    def _scratch(self, engine: Any) -> Tensor:
        """Device memory for the contexts of an engine: one piece for all of the backend, as its calls follow each other on one stream."""
        size = max(int(engine.device_memory_size_v2), 1)
        if self._memory is None or self._memory.numel() < size:
            self._memory = aligned_empty((size,), torch.uint8, self.device)
        return self._memory

    def _new_context(self, module: str, loaded: _Loaded, profile: int) -> _Context:
        trt = self._trt
        context = loaded.engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            # The words by which `network.Network` knows it and goes on with smaller batches.
            raise MemoryError(f"tensorrt can't allocate memory for {module}: {last_errors(self._log)}")
        memory = self._scratch(loaded.engine)
        context.set_device_memory(memory.data_ptr(), memory.numel())
        if not context.set_optimization_profile_async(profile, current_stream(self.device)):
            raise RunError(f"tensorrt {module}: profile {profile} was refused: {last_errors(self._log)}")
        return _Context(context, memory)

    def _context(self, module: str, loaded: _Loaded, given: dict[str, Tensor]) -> Any:
        """The context of the profile for these inputs, kept: making one takes longer than a call."""
        profile = self._profile(module, loaded.engine, given)
        if profile not in loaded.contexts:
            loaded.contexts[profile] = self._new_context(module, loaded, profile)
            while len(loaded.contexts) > CONTEXTS:
                loaded.contexts.popitem(last=False)
        loaded.contexts.move_to_end(profile)
        held, memory = loaded.contexts[profile], self._scratch(loaded.engine)
        if held.memory is not memory:  # a larger engine came, and what it has is enough for this one
            context = held.context
            context.set_device_memory(memory.data_ptr(), memory.numel())
            held.memory = memory
        return held.context

    def _execute(self, module: str, loaded: _Loaded, context: Any, given: dict[str, Tensor]) -> Tensor:
        """Enqueue one call on torch's current stream. `given` may be freed after it: torch's allocator keeps the stream's order."""
        for name, value in given.items():
            if not context.set_input_shape(name, tuple(value.shape)):
                raise RunError(
                    f"tensorrt {module}: {name} of {tuple(value.shape)} was refused: {last_errors(self._log)}"
                )
            self._set_address(module, context, name, value)
        unknown = context.infer_shapes()
        if unknown:
            raise RunError(f"tensorrt {module}: the shape of {', '.join(unknown)} does not follow from the inputs")
        result = aligned_empty(tuple(context.get_tensor_shape(loaded.output)), loaded.dtype, self.device)
        self._set_address(module, context, loaded.output, result)
        self._enqueue(module, context)
        return result

    def _set_address(self, module: str, context: Any, name: str, value: Tensor) -> None:
        if not context.set_tensor_address(name, value.data_ptr()):
            raise RunError(f"tensorrt {module}: the memory of {name} was refused: {last_errors(self._log)}")

    def _enqueue(self, module: str, context: Any) -> None:
        """Run a context whose shapes and addresses are set."""
        if not context.execute_async_v3(current_stream(self.device)):
            raise RunError(f"tensorrt could not run {module}: {last_errors(self._log)}")
