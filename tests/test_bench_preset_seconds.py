"""bench/preset_seconds.py: presets and backends take turns, the first round is not counted, and the table goes into a document."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from iedit.runtime.editor import Editor
from iedit.runtime.presets import PRESETS


@pytest.fixture
def timing(bench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script with editors that take a second a sampling step on torch and half of that on onnx; the first round takes ten times as long."""
    module = bench("preset_seconds")
    module.now, module.asked = 0.0, []
    calls = itertools.count()

    def load(model: str, *, backend: str, cache: Any, engines: Any) -> Any:
        assert cache.memory == 0

        def edit_many(requests: list[Any]) -> None:
            (request,) = requests
            cold = next(calls) < 2 * len(module.KINDS) * len(PRESETS)
            module.asked.append((backend, request.steps, sorted(request.layouts)))
            module.now += request.steps * (1 if backend == "torch" else 0.5) * (10 if cold else 1)

        return SimpleNamespace(edit_many=edit_many)

    monkeypatch.setattr(Editor, "load", load)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: module.now))
    return module


def test_the_table_is_of_the_counted_rounds_and_replaces_the_one_before(timing: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- preset-seconds -->\nold\n<!-- /preset-seconds -->\nafter\n")
    words = ["--rounds", "2", "--write", str(page)]
    done = CliRunner().invoke(timing.main, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    lines = text.splitlines()
    assert lines[2] == "| edits | preset | torch, s | exact / this | onnx, s | exact / this |"
    assert len(lines) == 4 + 2 + len(timing.KINDS) * len(PRESETS)
    assert "| thing | exact | 25.00 (25.00-25.00) | 1.00 | 12.50 (12.50-12.50) | 1.00 |" in lines
    assert "| pose | faster | 12.00 (12.00-12.00) | 2.08 | 6.00 (6.00-6.00) | 2.08 |" in lines
    assert len(timing.asked) == 3 * 2 * len(timing.KINDS) * len(PRESETS)
    assert [b for b, *_ in timing.asked[:4]] == ["torch", "onnx"] * 2  # they take turns
    assert {tuple(layouts) for *_, layouts in timing.asked} == {(), ("pose",)}


def test_what_is_wrong_is_one_line(timing: Any, tmp_path: Path) -> None:
    for words, says in (
        (
            ["--backends", "torch,cuda"],
            "--backends: 'cuda', expected different ones of tensorrt, onnx, compile, graphs, torch",
        ),
        (["--backends", "torch,torch"], "--backends: 'torch', expected different ones"),
        (["--write", str(tmp_path / "none.md")], "has no place for the tables"),
    ):
        refused = CliRunner().invoke(timing.main, words)
        assert refused.exit_code == 2 and says in refused.output and not timing.asked
