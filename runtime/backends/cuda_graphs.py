"""Functions of tensors as CUDA graphs: one launch for all that a call does.

A graph reads and writes the memory it was recorded with. `CudaGraphCache` therefore keeps buffers of its own for the inputs of
every recorded call, copies into them what has changed since, replays, and returns copies of the outputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import RunError, first_line
from ..profile import current


def capture(run: Callable[[], None], device: torch.device, pool: Any = None) -> Callable[[], None]:
    """Record `run` as a CUDA graph. Nothing is computed yet: the result replays the graph on the stream that is current then.

    Args:
        pool: of `torch.cuda.graph_pool_handle`, shared by graphs of which no two run at a time.
    """
    graph = torch.cuda.CUDAGraph()
    # thread_local: what other threads do at the same time is not recorded and may not be an error.
    with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        run()
    return lambda: graph.replay()


ALIGNMENT = 256  # bytes: what TensorRT wants the addresses of inputs and outputs to be multiples of


def aligned_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Like `torch.empty`, at an address that is a multiple of `ALIGNMENT`: so is all that torch allocates on CUDA, but not on a CPU."""
    made = torch.empty(shape, dtype=dtype, device=device)
    if made.data_ptr() % ALIGNMENT == 0:
        return made
    size = made.numel() * made.element_size()
    memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + size].view(dtype).view(shape)


def aligned(tensor: Tensor) -> Tensor:
    """A contiguous tensor, or a copy of it that is aligned: a part of a batch may begin anywhere."""
    if tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return aligned_empty(tuple(tensor.shape), tensor.dtype, tensor.device).copy_(tensor)


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """The tensors of a tree of dataclasses, mappings, tuples and lists, in a fixed order."""
    if isinstance(tree, Tensor):
        yield tree
    else:
        for part in _parts(tree) or ():
            yield from tensors_of(part)


def with_tensors(tree: Any, tensors: Iterator[Tensor]) -> Any:
    """The same tree with others in place of `tensors_of(tree)`."""
    if isinstance(tree, Tensor):
        return next(tensors)
    parts = _parts(tree)
    if parts is None:
        return tree
    others = [with_tensors(part, tensors) for part in parts]
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return dataclasses.replace(tree, **dict(zip([f.name for f in dataclasses.fields(tree)], others)))
    return dict(zip(tree, others)) if isinstance(tree, Mapping) else type(tree)(others)


def outline(tree: Any) -> Any:
    """What is fixed in a recording of a call with `tree`, hashable: shapes, dtypes and everything that is no tensor."""
    if isinstance(tree, Tensor):
        return tuple(tree.shape), tree.dtype
    parts = _parts(tree)
    if parts is None:
        return tree
    return type(tree), tuple(tree) if isinstance(tree, Mapping) else (), tuple(map(outline, parts))


def _parts(tree: Any) -> list[Any] | None:
    """What a node of a tree consists of, in a fixed order; None for a leaf."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [getattr(tree, f.name) for f in dataclasses.fields(tree)]
    if isinstance(tree, Mapping):
        return list(tree.values())
    return list(tree) if isinstance(tree, (tuple, list)) else None


@dataclass
class _Recording:
    """A recorded call.

    Attributes:
        function: kept, because the graph may use memory that it holds.
        buffers: the inputs that it was recorded with.
        copied: for each buffer the tensor whose values it holds, and that tensor's version when they were copied. A tensor of inference
            mode has no version, and is copied each time.
    """

    function: Callable[[Any], list[Tensor]]
    buffers: list[Tensor]
    copied: list[tuple[Tensor, int] | None]
    replay: Callable[[], None]
    outputs: list[Tensor]


class CudaGraphCache:
    """Calls `function(inputs)`, from a tree of tensors to a list of tensors, as CUDA graphs: the first call with inputs of an outline
    runs as it is, the second one is recorded, and from then on each is one replay.

    Where graphs are replayed the calls of several threads take turns, and all must be on one stream. Where they are not (on a CPU, or
    after a recording failed) only the first call of an outline makes other first calls wait.

    Args:
        held: graphs kept, the last used ones; each has its inputs and outputs in memory, and all share what is between.
        capture: records a function as `capture` of this module does; None records nothing.
    """

    def __init__(
        self, device: torch.device, held: int = 32, capture: Callable[..., Callable[[], None]] | None = capture
    ):
        self.device, self.held, self._capture = device, held, capture
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" and capture else None
        self._made: OrderedDict[Any, _Recording] = OrderedDict()
        self._seen: set[Any] = set()
        self._lock = threading.Lock()
        self.failed = ""  # why a recording failed; no other is tried after it

    @property
    def enabled(self) -> bool:
        """Whether calls were to be recorded."""
        return self._capture is not None

    def cold(self, name: str, inputs: Any) -> bool:
        """Whether the next such call is more than a repetition, so that its time says nothing of the calls after it."""
        return (name, outline(inputs)) not in (self._made if self.enabled and not self.failed else self._seen)

    def tell_failure(self, module: str) -> None:
        """Note in the running profile that calls of `module` run without graphs, if recording failed."""
        running = current()
        if self.failed and running is not None:
            running.fallback(module, "cuda graph", [self.failed])

    def __call__(
        self,
        name: str,
        function: Callable[[Any], list[Tensor]],
        inputs: Any,
        new_function: Callable[[], Callable[[Any], list[Tensor]]] | None = None,
    ) -> list[Tensor]:
        """The outputs of `function(inputs)`, the caller's own.

        Args:
            name: what the function is; the same name must always be the same function.
            new_function: makes what is recorded in place of `function`, for one that needs memory of its own in each recording. It is
                called twice with the same inputs; the second time is the one that is recorded.
        """
        key = (name, outline(inputs))
        if not self.enabled or self.failed:
            with contextlib.nullcontext() if key in self._seen else self._lock:
                return self._run(key, function, inputs)
        with self._lock:
            if self.failed or key not in self._seen:  # another thread's recording may have failed by now
                return self._run(key, function, inputs)
            recording = self._made.get(key)
            # A caller may be in inference mode at one call and not at the next, and buffers that were made in it cannot be filled outside.
            with torch.inference_mode(False), torch.no_grad():
                if recording is None:
                    recording = self._record(new_function() if new_function else function, inputs)
                    if recording is None:
                        return function(inputs)
                    self._made[key] = recording
                    while len(self._made) > self.held:
                        self._made.popitem(last=False)
                self._made.move_to_end(key)
                self._fill(recording, inputs)
                recording.replay()
            return [o.clone() for o in recording.outputs]

    def _run(self, key: Any, function: Callable[[Any], list[Tensor]], inputs: Any) -> list[Tensor]:
        outputs = function(inputs)
        self._seen.add(key)
        return outputs

    def _record(self, function: Callable[[Any], list[Tensor]], inputs: Any) -> _Recording | None:
        """None where it cannot be recorded; `failed` then says why."""
        assert self._capture is not None
        buffers = [aligned_empty(tuple(t.shape), t.dtype, t.device).copy_(t) for t in tensors_of(inputs)]
        own = with_tensors(inputs, iter(buffers))
        outputs: list[Tensor] = []

        def run() -> None:
            outputs[:] = function(own)

        function(own)  # what is set up at a first call with these very tensors must not be recorded
        try:
            replay = self._capture(run, self.device, self._pool)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, RunError) as error:
            self.failed = first_line(error, 200)
            return None
        return _Recording(function, buffers, [None] * len(buffers), replay, outputs)

    @staticmethod
    def _fill(recording: _Recording, inputs: Any) -> None:
        """Copy what the buffers do not hold already, in one launch for each dtype."""
        stale: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for i, tensor in enumerate(tensors_of(inputs)):
            version = -1 if tensor.is_inference() else tensor._version
            copied = recording.copied[i]
            if copied is not None and copied[0] is tensor and copied[1] == version >= 0:
                continue
            buffers, values = stale.setdefault(tensor.dtype, ([], []))
            buffers.append(recording.buffers[i])
            values.append(tensor)
            recording.copied[i] = (tensor, version)
        for buffers, values in stale.values():
            torch._foreach_copy_(buffers, values)
