"""An error that nobody expected is one line, an exit code and a report, never a traceback on the terminal."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from iedit.runtime import images
from iedit.runtime.cli.main import main

WORDS = ["edit", "in.png", "--prompt", "a red car"]


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every edit fails in a way that no code expects; the folder that temporary files go to."""

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("first line\nsecond line " + "x" * 500)

    monkeypatch.setattr(images, "load_image", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("IEDIT_DEBUG", raising=False)
    return tmp_path


def test_it_is_one_line_with_the_path_of_a_report_that_has_the_whole_traceback(broken: Path) -> None:
    result = CliRunner().invoke(main, WORDS)
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("Error: unexpected ZeroDivisionError: first line second line xxx")
    found = re.search(r"a full report is in (\S+)", result.stderr)
    assert found is not None
    path = Path(found[1])
    assert list(broken.iterdir()) == [path]
    text = path.read_text()
    assert "Traceback" in text and "test_last_resort.py" in text and "x" * 500 in text and "torch 2" in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600  # prompts and paths are in it


def test_debug_shows_the_traceback_and_writes_nothing(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IEDIT_DEBUG", "1")
    result = CliRunner().invoke(main, WORDS)
    assert isinstance(result.exception, ZeroDivisionError) and result.exit_code == 1
    assert list(broken.iterdir()) == []


def test_a_report_that_cannot_be_written_is_still_one_line(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(broken / "nowhere"))
    result = CliRunner().invoke(main, WORDS)
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
    assert "a report could not be written (No such file or directory)" in result.stderr


def test_an_interrupt_and_a_closed_pipe_are_no_reports(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(images, "load_image", interrupted)
    assert CliRunner().invoke(main, WORDS).stderr.split() == ["Aborted!"]

    def closed(*_: Any, **__: Any) -> None:
        raise BrokenPipeError(32, os.strerror(32))

    monkeypatch.setattr(images, "load_image", closed)
    assert CliRunner().invoke(main, WORDS).exit_code == 1
    assert list(broken.iterdir()) == []
