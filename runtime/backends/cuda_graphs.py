"""Functions of tensors as CUDA graphs: one launch for all that a call does.

A graph reads and writes the memory it was recorded with. `CudaGraphCache` therefore keeps buffers of its own for the inputs of
every recorded call, copies into them what has changed since, replays, and returns copies of the outputs.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def capture(run: Callable[[], None], device: torch.device, pool: Any = None) -> Callable[[], None]:
    """`run` as a CUDA graph, not run yet; the result replays it on the stream that is current then.

    Args:
        pool: of `torch.cuda.graph_pool_handle`, shared by graphs of which no two run at a time.
    """
    graph = torch.cuda.CUDAGraph()
    # thread_local: what other threads do meanwhile is theirs
    with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        run()
    return lambda: graph.replay()


def first_line(error: BaseException) -> str:
    """Of CUDA's errors the first line says what; the rest is advice to developers."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


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
    made = [with_tensors(part, tensors) for part in parts]
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return dataclasses.replace(tree, **dict(zip([f.name for f in dataclasses.fields(tree)], made)))
    return dict(zip(tree, made)) if isinstance(tree, Mapping) else type(tree)(made)


def outline(tree: Any) -> Any:
    """What a recording of a call with `tree` holds fixed, hashable: shapes, dtypes and everything that is no tensor."""
    if isinstance(tree, Tensor):
        return tuple(tree.shape), tree.dtype
    parts = _parts(tree)
    if parts is None:
        return tree
    return type(tree), tuple(tree) if isinstance(tree, Mapping) else (), tuple(map(outline, parts))


def _parts(tree: Any) -> list[Any] | None:
    """None for a leaf that is no tensor."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [getattr(tree, f.name) for f in dataclasses.fields(tree)]
    if isinstance(tree, Mapping):
        return list(tree.values())
    return list(tree) if isinstance(tree, (tuple, list)) else None


@dataclass
class _Recording:
    buffers: list[Tensor]
    given: list[tuple[Tensor, int] | None]  # what each buffer holds a copy of, at which version
    replay: Callable[[], None]
    outputs: list[Tensor]


class CudaGraphCache:
    """Calls `function(inputs)`, trees of tensors to lists of tensors, from graphs: the first call with inputs of an outline
    runs as it is, the second one records, from then on it is one replay.

    The calls of several threads take turns; all must be on one stream.

    Args:
        held: graphs kept, the last used ones; each has its inputs and outputs in memory, and all share what is between.
        capture: of this module, or a test's.
    """

    def __init__(self, device: torch.device, held: int = 32, capture: Callable[..., Callable[[], None]] = capture):
        self.device, self.held = device, held
        self._capture, self._pool = capture, torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._made: OrderedDict[Any, _Recording] = OrderedDict()
        self._seen: set[Any] = set()
        self._lock = threading.Lock()
        self.failed = ""

    def cold(self, name: str, inputs: Any) -> bool:
        """Whether the next such call is more than a replay: its time says nothing of the calls after it."""
        return (name, outline(inputs)) not in (self._seen if self.failed else self._made)

    def __call__(self, name: str, function: Callable[[Any], list[Tensor]], inputs: Any) -> list[Tensor]:
        """The outputs of `function(inputs)`, the caller's own.

        Args:
            name: what the function is; the same name must always be the same function.
        """
        key = (name, outline(inputs))
        with self._lock:
            found = self._made.get(key)
            if found is None:
                if self.failed or key not in self._seen:
                    outputs = function(inputs)
                    self._seen.add(key)
                    return outputs
                found = self._record(function, inputs)
                if found is None:
                    return function(inputs)
                self._made[key] = found
                while len(self._made) > self.held:
                    self._made.popitem(last=False)
            self._made.move_to_end(key)
            self._fill(found, inputs)
            found.replay()
            return [o.clone() for o in found.outputs]

    def _record(self, function: Callable[[Any], list[Tensor]], inputs: Any) -> _Recording | None:
        """None where it cannot be recorded; `failed` then says why, and no other is tried."""
        buffers = [t.clone() for t in tensors_of(inputs)]
        own = with_tensors(inputs, iter(buffers))
        outputs: list[Tensor] = []
        function(own)  # what is set up at a first call with these very tensors must not be recorded
        try:
            replay = self._capture(lambda: outputs.extend(function(own)), self.device, self._pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.failed = first_line(error)
            return None
        return _Recording(buffers, [None] * len(buffers), replay, outputs)

    @staticmethod
    def _fill(found: _Recording, inputs: Any) -> None:
        """Copies what a buffer does not hold already, in one launch for each dtype."""
        late: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for i, tensor in enumerate(tensors_of(inputs)):
            held = found.given[i]
            if held is not None and held[0] is tensor and held[1] == tensor._version:
                continue
            into, of = late.setdefault(tensor.dtype, ([], []))
            into.append(found.buffers[i])
            of.append(tensor)
            found.given[i] = (tensor, tensor._version)
        for into, of in late.values():
            torch._foreach_copy_(into, of)
