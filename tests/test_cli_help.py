"""Help in groups, suggestions for what was mistyped, completion, and tables that a narrow terminal can show."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from PIL import Image

from iedit.runtime.cli.help import GROUPS
from iedit.runtime.cli.main import main


@pytest.mark.parametrize("command", ["edit", "mask", "profile"])
def test_every_option_is_in_one_group_of_the_help(command: str) -> None:
    shown = CliRunner().invoke(main, [command, "--help"]).stdout
    sections = dict(zip(*[iter(re.split(r"^(\S.*):$", shown, flags=re.MULTILINE)[1:])] * 2))
    known = {max(p.opts, key=len) for p in main.commands[command].params if isinstance(p, click.Option)} | {"--help"}
    found = [name for text in sections.values() for name in re.findall(r"^  (?:-h, )?(--[a-z-]+)", text, re.MULTILINE)]
    assert sorted(found) == sorted(known)
    assert {"Common", "Masks", "Layouts", "Speed", "Output"} <= set(sections) <= set(GROUPS)
    assert "--mask-threshold" in sections["Masks"] and "--backend" in sections["Speed"]


@pytest.mark.parametrize("words", [["-h"], ["edit", "-h"], ["evaluate", "truth", "-h"], ["engines", "list", "-h"]])
def test_h_is_help(words: list[str]) -> None:
    # click keeps the help option of the first context that asked, and other tests run commands without the program around them.
    command: Any = main
    for word in words[:-1]:
        command = command.get_command(click.Context(main), word)
        command._help_option = None
    short, long = (CliRunner().invoke(main, [*words[:-1], option], prog_name="iedit") for option in ("-h", "--help"))
    assert short.exit_code == 0 and short.stdout == long.stdout and "Usage: iedit" in short.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["edti"], "No such command 'edti'. Did you mean 'edit'?"),
        (["enginse"], "Did you mean 'engines'?"),
        (["xyzzy"], "No such command 'xyzzy'."),
        (["edit", "a.png", "--prompt", "x", "--method", "dffedit"], "Did you mean 'diffedit'?"),
        (["edit", "a.png", "--prompt", "x", "--backend", "tensort"], "Did you mean 'tensorrt'?"),
        (["layouts", "a.png", "--kind", "scribbel"], "Did you mean 'scribble'?"),
        (["edit", "a.png", "--promt", "x"], "--prompt"),
    ],
)
def test_what_was_mistyped_gets_a_suggestion(words: list[str], says: str) -> None:
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2 and says in result.stderr, result.stderr
    assert ("Did you mean" in result.stderr) == ("xyzzy" not in words)


def test_the_shell_completes_commands_options_and_choices(root: Path) -> None:
    script = "from iedit.runtime.cli.main import main; main(prog_name='iedit')"

    def completed(*words: str) -> set[str]:
        environment = os.environ | {"PYTHONPATH": str(root / ".types"), "_IEDIT_COMPLETE": "bash_complete",
                                    "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}  # fmt: skip
        out = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        return {line.split(",", 1)[1] for line in out.stdout.splitlines()}

    assert completed("iedit", "e") == {"edit", "export", "engines", "evaluate"}
    assert {"--mask", "--mask-mode"} <= completed("iedit", "edit", "--mas")
    assert completed("iedit", "edit", "--method", "diff") == {"diffedit"}
    assert '_IEDIT_COMPLETE=bash_source iedit)"' in (root / "README.md").read_text()


@pytest.mark.parametrize("columns", ["20", "200"])
def test_tables_can_be_read_at_20_columns(
    columns: str, tiny_checkpoint_cli: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32), "green").save("in.png")
    words = ["profile", "in.png", "--prompt", "x", "--method", "sdedit", "--steps", "1", "--runs", "1"]
    profile = CliRunner().invoke(main, [*words, "--backend", "torch", "--model", str(tiny_checkpoint_cli)])
    assert profile.exit_code == 0, profile.output
    info = CliRunner().invoke(main, ["info", "--model", str(tiny_checkpoint_cli)])
    for wanted in ("stage", "encode", "evaluations", "vae_decoder", "ms a sample"):
        assert wanted in profile.stdout, profile.stdout  # no word is cut or broken
    assert "layouts" in info.stdout and "scribble" in info.stdout
    if columns == "20":
        tables = profile.stdout[: profile.stdout.index("threads:")]
        assert max(map(len, tables.splitlines())) <= 20
        assert "evaluations: 2" in profile.stdout


def test_a_checkpoint_in_shards_loads_without_a_word(
    tiny_checkpoint_cli: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import diffusers
    import transformers

    from iedit.runtime.model.model import load_model

    folder = shutil.copytree(tiny_checkpoint_cli, tmp_path / "model")
    loaders: dict[str, Any] = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
    }
    for part, loader in loaders.items():
        net = loader.from_pretrained(folder / part)
        shutil.rmtree(folder / part)
        net.save_pretrained(folder / part, max_shard_size="30KB")
        assert len(list((folder / part).glob("*-of-*.safetensors"))) > 1, part
    capfd.readouterr()
    load_model(str(folder), [], device="cpu")
    assert capfd.readouterr() == ("", "")
