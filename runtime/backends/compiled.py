"""torch.compile: a model's networks as fused kernels; on CUDA each denoising step is one replay of a CUDA graph.

The UNet and the ControlNets of a condition are one function of tensors (`graph_modules`), so another prompt, scale or level does not compile
again. Compiling is not part of what a step costs: such calls are cold in the profile. What compiles when:

- On a CPU shapes are dynamic: one function serves all sizes and numbers of samples but for what Dynamo takes for a constant, a batch of one
  among it, which makes three or four compilations of each set of layouts: six sets at four numbers of samples and three sizes, 72 shapes, are 21.
- On CUDA the first `STATIC_SHAPES` shapes of a module are compiled each for itself, because with dynamic shapes Inductor does without its
  channels-last convolutions; those are the shapes of an edit, over and over. What comes after them shares a dynamic function as on a CPU.

On CUDA a step's graph holds the compiled functions with the rest of the step; where recording fails they run without.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import RunError
from ..model.model import Model
from .base import BackendOptions
from .cuda_graphs import CudaGraphCache
from .graph_modules import GraphModules


def why_unavailable() -> list[str]:
    """Reasons why torch.compile cannot work on this machine; empty if it can."""
    if torch.cuda.is_available():
        from ...kernels.dispatch import triton_missing

        return list(triton_missing())
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        return [f"no C++ compiler: {compiler} is not on the path (install one, or name it in CXX)"]
    return []


def load(model: Model, options: BackendOptions) -> CompileBackend:
    """See `backends.load_backend`."""
    return CompileBackend(model, attention=options.attention, channels_last=options.channels_last)


class CompileBackend(GraphModules):
    """See this file's docstring. Arguments as of `GraphModules`, and:

    Args:
        static_shapes: how many shapes of a module are compiled each for itself; by default `STATIC_SHAPES` on CUDA and none elsewhere.
    """

    name = "compile"

    def __init__(
        self,
        model: Model,
        *,
        attention: str = "sdpa",
        channels_last: bool = False,
        graphs: CudaGraphCache | None = None,
        static_shapes: int | None = None,
    ):
        super().__init__(model, attention=attention, channels_last=channels_last, graphs=graphs)
        on_cuda = model.device.type == "cuda"
        self.static_shapes = (STATIC_SHAPES if on_cuda else 0) if static_shapes is None else static_shapes
        self._compiled: dict[str, Callable[..., Tensor]] = {}

    def _function(self, module: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if module not in self._compiled:
            self._compiled[module] = compiled(function, self.static_shapes)
        return self._compiled[module]


# How often Dynamo may compile one function again before it gives up. All modules share the code of `fused`, and a process may edit many
# sizes, batches and layouts; the defaults, 8 and 256, were reached by the tests of one checkpoint.
_LIMITS = {"recompile_limit": 256, "accumulated_recompile_limit": 4096}


# Of numbers that are no tensors Dynamo takes a module's own (the eps of a norm, a dropout's share, a block's output scale) for inputs where shapes
# are dynamic. Only when the graph is done does it see that most have to be constants, and then traces the whole function once more. Whatever
# changes from call to call is a tensor.
_NUMBERS = {"specialize_float": True}


# Shapes of a module that are compiled each for itself on CUDA: an edit without layouts calls the UNet with three or four numbers of samples at
# one size. Each has its own copy of the convolutions' weights where they are not channels-last already (`channels_last`).
STATIC_SHAPES = 4


def compiled(function: Callable[..., Tensor], static_shapes: int = 0) -> Callable[..., Tensor]:
    """`function` by Inductor: whole or an error, never half of it in eager.

    Args:
        function: of tensors, and lists or tuples of tensors and numbers.
        static_shapes: so many first shapes of the inputs are compiled each for itself, all others with dynamic shapes.
    """

    def made(dynamic: bool) -> Callable[..., Tensor]:
        # freezing: weights are constants, repacked for the kernels that read them.
        return torch.compile(function, fullgraph=True, dynamic=dynamic, options={"freezing": True})

    any_shape, one_shape = made(True), made(False)
    static: set[tuple[Any, ...]] = set()

    def call(*inputs: Any) -> Tensor:
        shape = tuple(getattr(t, "shape", t) for i in inputs for t in (i if isinstance(i, (list, tuple)) else [i]))
        if len(static) < static_shapes:
            static.add(shape)
        try:
            with torch._dynamo.config.patch(_LIMITS | _NUMBERS):  # 10 microseconds
                output: Tensor = (one_shape if shape in static else any_shape)(*inputs)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise RunError(
                f"torch.compile: this process has compiled a module {_LIMITS['recompile_limit']} times, for as many kinds of shapes, and "
                "compiles no more; start another process, or use --backend torch"
            ) from error
        return output

    return call
