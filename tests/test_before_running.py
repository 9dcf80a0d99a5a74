"""What can be known before the model is loaded is told before it is loaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from iedit.runtime.cli.main import main
from iedit.runtime.editor import Editor
from iedit.runtime.errors import UsageError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Editor, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    for name in ("in", "map"):
        Image.new("RGB", (32, 32), "green").save(f"{name}.png")
    Image.new("RGB", (16, 16)).save("small.png")
    os.symlink("loop.png", "loop.png")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prompt", "  "], "the prompt is empty"),
        (
            ["--layout", "depth=map.png"],
            "layout 'depth': .* has no ControlNet or T2I-Adapter of that name; it has pose, scribble",
        ),
        (["--layout", "pose=map.png"], "--source-layout pose=FILE"),
        (["--layout", "scribble=small.png"], "layout scribble: it is 16x16 and the image 32x32"),
        (["--source-layout", "depth=map.png"], "layout 'depth'"),
        (["--method", "controlnet"], "needs at least one layout"),
        (["--engines", "nowhere"], "engines: nowhere is not a folder; run `iedit export onnx` first"),
        (["--output", "loop.png"], "loop.png: cannot be a file's name"),
        (["--output", "x" * 300 + ".png"], "cannot be a file's name .File name too long"),
        (["--stages", "in.png/sheet.png"], "in.png"),
        (["--output", "caf\udce9.png"], "is not UTF-8; rename the file"),
        (["--prompt", "caf\udce9"], "is not UTF-8"),
        (["--model", "."], "is missing; . is not a whole diffusers checkpoint"),
        (["--controlnet", "pose=in.png"], "in.png is not a folder"),
    ],
)
@pytest.mark.parametrize("command", ["edit", "mask", "profile"])
def test_it_is_one_line_and_exit_code_2_before_the_model_is_loaded(
    here: Path, tiny_checkpoint_cli: Path, command: str, words: list[str], says: str
) -> None:
    if command != "edit" and words[0] == "--stages":
        words = ["--output", words[1]]
    if command == "mask" and "controlnet" in words:
        says = "controlnet uses no mask"
    if command == "profile" and words[0] == "--output":
        words = ["--plot", words[1]]
    arguments = [command, "in.png", "--prompt", "a red car", "--model", str(tiny_checkpoint_cli), *words]
    result = CliRunner().invoke(main, arguments, prog_name="iedit")
    assert result.exit_code == 2, result.output + repr(result.exception)
    said = [x for x in result.stderr.splitlines() if x and not x.startswith(("Usage: ", "Try '"))]
    assert len(said) == 1 and re.search(says, said[0]), result.stderr
    assert sorted(p.name for p in here.iterdir()) == ["in.png", "loop.png", "map.png", "small.png"]


def test_an_input_that_is_a_loop_of_links_is_one_line(here: Path) -> None:
    result = CliRunner().invoke(main, ["edit", "loop.png", "--prompt", "x"])
    assert result.exit_code == 2 and result.stderr.startswith("Error: loop.png: "), result.output


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to_is_refused(here: Path) -> None:
    (here / "locked").mkdir(mode=0o500)
    result = CliRunner().invoke(main, ["edit", "in.png", "--prompt", "x", "--output", "locked/out.png"])
    assert result.exit_code == 2 and "the folder locked may not be written to" in result.stderr


def test_a_folder_without_permission_is_refused_for_every_user(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode, **_: mode == os.R_OK)
    result = CliRunner().invoke(main, ["edit", "in.png", "--prompt", "x", "--output", "out.png"])
    assert result.exit_code == 2 and "the folder . may not be written to" in result.stderr


def test_python_refuses_engines_that_are_not_there() -> None:
    with pytest.raises(UsageError, match="engines: no/where is not a folder"):
        Editor.load(engines="no/where")
