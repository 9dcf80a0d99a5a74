"""`iedit train`: help that teaches, and errors of one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from iedit.runtime.cli.main import main
from iedit.training import truth
from iedit.training.cli import train


@pytest.mark.parametrize("command", ["embed", "classifier", "figures"])
def test_every_command_explains_its_options(command: str) -> None:
    result = CliRunner().invoke(train, [command, "--help"])
    assert result.exit_code == 0
    assert "--" in result.output


def test_help_imports_no_torch() -> None:
    code = "import sys; from iedit.training.cli import train; train(['--help'], standalone_mode=False)"
    code += "; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("False")


def test_a_missing_reader_says_how_to_make_it(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["train", "figures", "--reader", str(tmp_path / "none.safetensors")])
    assert result.exit_code == 2
    assert "iedit train classifier" in result.output


def test_a_card_is_replaced_and_somebody_s_readme_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from iedit.training import embed

    made = "---\nlicense: apache-2.0\n---\n# picturebook\n\nA model.\n"
    monkeypatch.setattr(embed, "card", lambda *_: made)
    (tmp_path / "figures.json").write_text('{"about": {}}')
    monkeypatch.setattr(truth, "render_card", lambda _: "")
    words = ["train", "card", "--output", str(tmp_path), "--folder", str(tmp_path)]
    readme = tmp_path / "README.md"
    for _ in range(2):
        assert CliRunner().invoke(main, words).exit_code == 0
        assert readme.read_text() == made
    readme.write_text("# Mine\n")
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 2 and "replace it with --overwrite" in refused.stderr
    assert readme.read_text() == "# Mine\n"
    assert CliRunner().invoke(main, [*words, "--overwrite"]).exit_code == 0
    assert readme.read_text() == made
