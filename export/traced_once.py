"""`torch.onnx.export` in about half of its time.

The exporter traces a module, then decomposes the graph, for which it is analysed and traced once more, and translates what is left. A diffusion
network's graph has nothing that must be decomposed: only a few operators that the exporter knows by their parts alone, and those are translated
here. So tracing once is enough; the graph has the same nodes but for some arithmetic on shapes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_exporting = threading.Lock()


def onnx_program(module: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> Any:
    """`torch.onnx.export(module, inputs, dynamo=True, **options)` -> ONNXProgram, without decomposing what needs no decomposing.

    A graph is decomposed where the exporter's table says so of an operator, where an operator writes into its input (tracing again makes that a
    new tensor), where there are branches, and where the exporter cannot translate the graph as it is: then it is exported a second time, in
    the plain way. One thread at a time exports; another one waits.

    Args:
        module: in eval mode; takes `inputs` by position.
        options: of `torch.onnx.export`, but for `dynamo` and `custom_translation_table`.

    Raises:
        torch.onnx.OnnxExporterError: it cannot be exported in the plain way either.
    """
    program = torch.export.ExportedProgram
    decompose, spared = program.run_decompositions, False

    def if_needed(self: Any, table: Any = None, *rest: Any, **more: Any) -> Any:
        nonlocal spared
        calls = {node.target for node in self.graph.nodes if node.op == "call_function"}
        written = any(getattr(getattr(operator, "_schema", None), "is_mutable", False) for operator in calls)
        branches = any(node.op == "get_attr" for node in self.graph.nodes)
        if table is None or written or branches or any(operator in table for operator in calls):
            return decompose(self, table, *rest, **more)
        spared = True
        return self

    with _exporting:
        program.run_decompositions = if_needed  # type: ignore[method-assign]
        try:
            return torch.onnx.export(module, inputs, dynamo=True, custom_translation_table=_translations(), **options)
        except torch.onnx.OnnxExporterError:
            if not spared:
                raise
        finally:
            program.run_decompositions = decompose  # type: ignore[method-assign]
        return torch.onnx.export(module, inputs, dynamo=True, **options)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """ATen operator -> the ONNX operators that it is. The parameters have ATen's names, because some are given by name."""
    from onnxscript import opset18

    op: Any = opset18  # its functions take tensors or what `op` makes of them, which its annotations do not say

    def to_dtype(self: Any, dtype: int, non_blocking: bool = False, copy: bool = False, memory_format: Any = None) -> Any:  # fmt: skip
        return op.Cast(self, to=dtype)

    def to_device(self: Any, device: Any, dtype: int, non_blocking: bool = False, copy: bool = False, memory_format: Any = None) -> Any:  # fmt: skip
        return op.Cast(self, to=dtype)

    def reshaped(self: Any, start: int, sizes: Sequence[int], end: int) -> Any:
        """With the dimensions from `start` up to but not with `end` replaced by `sizes`."""
        # 0 is the size that the input has there.
        parts = [op.Constant(value_ints=[0] * start + list(sizes))]
        if end < len(self.shape):
            parts.append(op.Shape(self, start=end))
        return op.Reshape(self, op.Concat(*parts, axis=0) if len(parts) > 1 else parts[0])

    def unflatten(self: Any, dim: int, sizes: Sequence[int]) -> Any:
        start = dim % len(self.shape)
        return reshaped(self, start, sizes, start + 1)

    def flatten(self: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
        rank = len(self.shape)
        return reshaped(self, start_dim % rank, [-1], end_dim % rank + 1)

    def chunk(self: Any, chunks: int, dim: int = 0) -> Any:
        size = self.shape[dim]
        if isinstance(size, int):
            chunks = -(-size // -(-size // chunks))  # of five in four there are three: 2, 2, 1
        return op.Split(self, axis=dim, num_outputs=chunks) if chunks > 1 else (op.Identity(self),)

    aten = torch.ops.aten
    return {aten.to.dtype: to_dtype, aten.to.device: to_device, aten.unflatten.int: unflatten,
            aten.flatten.using_ints: flatten, aten.chunk.default: chunk}  # fmt: skip
