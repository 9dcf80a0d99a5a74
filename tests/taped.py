"""A stand-in for CUDA graphs on a CPU: every operation of a call on tape, replayed on the very same tensors.

What makes a graph hard to use holds here too: what was a number in Python is fixed, memory is what it was at recording, and
nothing has been computed before the first replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from iedit.runtime.backends.compiled import CompileBackend
from iedit.runtime.backends.cuda_graphs import CudaGraphCache


class Tape(TorchDispatchMode):
    """Keeps every operator with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.kept.append((func, args, kwargs or {}, [t for t in tree_leaves(made) if isinstance(t, Tensor)]))
        return made

    def replay(self) -> None:
        for func, args, kwargs, results in self.kept:
            again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for into, of in zip(results, again, strict=True):
                if into.data_ptr() != of.data_ptr():  # a view, or in place: there already
                    into.copy_(of)


class Captures:
    """In place of `cuda_graphs.capture`.

    Attributes:
        replays: how many there were.
        operators: how many each recording holds.
    """

    def __init__(self) -> None:
        self.replays = 0
        self.operators: list[int] = []

    def __call__(self, run: Callable[[], None], device: torch.device, pool: Any = None) -> Callable[[], None]:
        tape = Tape()
        with torch.no_grad(), tape:
            run()
        for func, _, _, results in tape.kept:
            for t in results:
                if t.is_floating_point() and not func.is_view and not func._schema.is_mutable:
                    t.fill_(float("nan"))
        self.operators.append(len(tape.kept))

        def replay() -> None:
            self.replays += 1
            with torch.no_grad():
                tape.replay()

        return replay


class Recorded(CompileBackend):
    """The compile backend on a CPU as it is on a GPU, but for the compiler.

    Attributes:
        entered: times that one of its functions ran in Python.
    """

    def __init__(self, model: Any, captures: Callable[..., Callable[[], None]]):
        super().__init__(model, graphs=CudaGraphCache(torch.device("cpu"), capture=captures))
        self.entered = 0

    def _function(self, module: str, of: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*inputs: Any) -> Tensor:
            self.entered += 1
            return of(*inputs)

        return counted
