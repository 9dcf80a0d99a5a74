"""A graph that was traced once is the module: what is translated here says what torch says, and the rest is decomposed as before."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from iedit.export.traced_once import onnx_program

logging.getLogger("torch.__trace").setLevel(logging.WARNING)


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators of each graph that was decomposed, in a list that grows."""
    seen: list[str] = []
    decompose = torch.export.ExportedProgram.run_decompositions

    def counted(self: Any, *given: Any, **named: Any) -> Any:
        seen.append(" ".join(sorted({str(n.target) for n in self.graph.nodes if n.op == "call_function"})))
        return decompose(self, *given, **named)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", counted)
    return seen


def _same(function: Callable[[Tensor], Any], folder: Path, x: Tensor, *others: Tensor) -> Counter[str]:
    """Export `function` of `x` with free first and last dimensions, compare at `x` and `others`, and return its operators."""
    free: dict[int, str] = {0: "batch"} | (
        {x.dim() - 1: "last"} if others and others[0].shape[-1] != x.shape[-1] else {}
    )
    with torch.no_grad():
        program = onnx_program(
            _Function(function).eval(), (x,), opset_version=23, dynamic_shapes=(free,), verbose=False
        )
    program.save(str(folder / "model.onnx"))
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    for value in (x, *others):
        wanted = function(value)
        outputs = session.run(None, {session.get_inputs()[0].name: value.numpy()})
        for output, exact in zip(outputs, wanted if isinstance(wanted, (list, tuple)) else [wanted], strict=True):
            assert torch.equal(torch.from_numpy(output), exact)
    return Counter(node.op_type for node in program.model_proto.graph.node)


def test_each_translation_says_what_torch_says(tmp_path: Path, decomposed: list[str]) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return (
            x.to(torch.int32),
            x.to("cpu", torch.float64),
            x.to(torch.float16).to(torch.float32, copy=True),
            x.unflatten(-1, (2, -1)),
            x.unflatten(1, (3, 2)),
            x.unflatten(-2, (-1, 2, 3)) * 2,
            x.flatten(1),
            x.flatten(0, 1),
            x.flatten(-3, -2) + 1,
            *x.chunk(2, 2),
            *x.chunk(4, dim=1),  # of six: three of two
            x.chunk(1, -1)[0] * 3,
        )

    _same(function, tmp_path, torch.randn(2, 6, 8), torch.randn(5, 6, 8))
    assert decomposed == []


def test_a_free_dimension_behind_what_is_reshaped_stays_free(tmp_path: Path, decomposed: list[str]) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return x.unflatten(1, (3, 2)), x.flatten(0, 1), x.flatten(1)

    _same(function, tmp_path, torch.randn(2, 6, 8), torch.randn(5, 6, 11), torch.randn(1, 6, 1))
    assert decomposed == []


def test_heads_are_split_by_one_node_without_arithmetic_on_shapes(tmp_path: Path) -> None:
    operators = _same(lambda x: x.unflatten(-1, (2, 4)).transpose(1, 2).flatten(2), tmp_path, torch.randn(2, 6, 8), torch.randn(3, 6, 8))  # fmt: skip
    assert operators == {"Reshape": 2, "Transpose": 1}


def _writes(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1:3].mul_(3)  # through a view
    y += 1
    return y


def test_a_module_that_writes_into_its_tensors_is_decomposed(tmp_path: Path, decomposed: list[str]) -> None:
    _same(_writes, tmp_path, torch.randn(2, 6, 8), torch.randn(5, 6, 8))
    assert len(decomposed) == 1 and "mul_" in decomposed[0]


def test_an_operator_that_the_exporter_decomposes_is(tmp_path: Path, decomposed: list[str]) -> None:
    _same(lambda x: torch.nn.functional.threshold(x, 0.1, 20.0), tmp_path, torch.randn(2, 6, 8), torch.randn(5, 6, 8))
    assert len(decomposed) == 1


def test_a_branch_is_looked_into(tmp_path: Path, decomposed: list[str]) -> None:
    def function(x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda y: (y.clone().mul_(2) + y,), lambda y: (y - 1,), (x,))[0]

    _same(function, tmp_path, torch.ones(2, 6, 8), -torch.ones(5, 6, 8))
    assert len(decomposed) >= 1


def test_what_cannot_be_translated_undecomposed_is_exported_in_the_plain_way(
    tmp_path: Path, decomposed: list[str]
) -> None:
    _same(lambda x: x.swapaxes(0, 1).ravel() + 1, tmp_path, torch.randn(2, 6, 8), torch.randn(5, 6, 8))
    assert len(decomposed) == 1


def test_the_exporter_is_left_as_it_was_also_after_an_error() -> None:
    before = torch.export.ExportedProgram.run_decompositions

    def function(x: Tensor) -> Tensor:
        assert torch.export.ExportedProgram.run_decompositions is not before
        raise ZeroDivisionError

    with pytest.raises(torch.onnx.OnnxExporterError, match="ZeroDivisionError"):
        onnx_program(_Function(function).eval(), (torch.zeros(2),), verbose=False)
    assert torch.export.ExportedProgram.run_decompositions is before
