"""`iedit train`: help that teaches, and errors of one line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner
from PIL import Image

from iedit.training import classifier, truth
from iedit.training.cli import train


@pytest.mark.parametrize("command", ["embed", "classifier", "figures", "truth"])
def test_every_command_explains_its_options(command: str) -> None:
    result = CliRunner().invoke(train, [command, "--help"])
    assert result.exit_code == 0
    assert "--" in result.output


def test_help_imports_no_torch() -> None:
    code = "import sys; from iedit.training.cli import train; train(['--help'], standalone_mode=False)"
    code += "; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("False")


def test_an_unknown_kind_is_a_usage_error_that_names_the_known_ones() -> None:
    result = CliRunner().invoke(train, ["truth", "--kinds", "pose,shape"])
    assert result.exit_code == 2
    assert "'shape' is not one of thing, colour, background, pose, scribble" in result.output


def test_a_missing_reader_says_how_to_make_it(tmp_path: Path) -> None:
    result = CliRunner().invoke(train, ["figures", "--reader", str(tmp_path / "none.safetensors")])
    assert result.exit_code == 1
    assert "iedit train classifier" in result.output


def test_a_card_is_replaced_and_somebody_s_readme_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from iedit.runtime.cli.main import main
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


@dataclass
class Options:
    lam: float = 0.6
    guidance: Any = None
    final: Any = None


@dataclass
class EditRequest:
    """The public fields that a request of the truth suite fills."""

    image: Image.Image
    prompt: str
    source_prompt: str
    method: str
    layouts: dict[str, Image.Image]
    source_layouts: dict[str, Image.Image]
    mask: Image.Image | None
    seed: int
    steps: int
    options: Options = field(default_factory=Options)


class Editor:
    """Stands in for the runtime: knows the cases of the suite by their pictures and returns the exact target."""

    asked: ClassVar[list[EditRequest]] = []

    @classmethod
    def load(cls, model: str, backend: str, cache: Any) -> Editor:
        assert cache.memory == 0  # methods are compared by their cost
        return cls()

    @property
    def model(self) -> Any:
        return SimpleNamespace(
            digest="0123456789abcdef",
            guidance_scale=5.0,
            mask_strength=None,
            mask_threshold=None,
            text_update_share=None,
        )

    def edit_many(self, requests: list[EditRequest]) -> list[Any]:
        self.asked.extend(requests)
        known = {(c.source.tobytes(), c.prompts[1]): c for k in truth.KINDS for c in truth.edit_cases(k, 2)}
        cases = [known[r.image.tobytes(), r.prompt] for r in requests]
        profile = SimpleNamespace(evaluations={"final": 50})
        return [SimpleNamespace(image=c.target, mask=c.region, guidance=None, profile=profile) for c in cases]

    def reconstruct(self, images: list[Image.Image]) -> list[Image.Image]:
        return images


def test_the_truth_command_runs_every_method_on_its_kinds_and_writes_card_rows_and_sheets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = ModuleType("iedit.runtime.editor")
    runtime.__dict__.update(Editor=Editor, EditRequest=EditRequest, Options=Options)
    monkeypatch.setitem(sys.modules, "iedit.runtime.editor", runtime)
    monkeypatch.setattr(Editor, "asked", [])
    reader, output = tmp_path / "reader.safetensors", tmp_path / "out"
    classifier.Classifier().save(reader)
    arguments = ["truth", "--reader", str(reader), "--output", str(output), "--n", "2"]
    result = CliRunner().invoke(train, [*arguments, "--sheet", "1"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    counted: dict[tuple[str, float, str], int] = {}
    for request in Editor.asked:
        key = (request.method, request.options.lam, getattr(request.options.final, "update", "clipped"))
        counted[key] = counted.get(key, 0) + 1
        assert set(request.layouts) == set(request.source_layouts) <= {"pose", "scribble"}
        assert (request.mask is not None) == (request.method == "iedit")
    assert counted == {("ito", 0.6, "clipped"): 10, ("ito", 0.6, "adam"): 10, ("ito", 1.0, "clipped"): 6,
                       ("diffedit", 0.6, "clipped"): 6, ("sdedit", 0.6, "clipped"): 6, ("iedit", 0.6, "clipped"): 6, ("controlnet", 0.6, "clipped"): 4,
                       ("controlnet-diffedit", 0.6, "clipped"): 4}  # fmt: skip
    assert len(list(output.glob("*.png"))) == 2 * 5 + 4 * 3 + 2 * 2 + 5
    assert "### Edits of held-out scenes" in (output / "card.md").read_text()
    assert json.loads((output / "figures.json").read_text())["edits"][0]["n"] == 2
    CliRunner().invoke(train, arguments, catch_exceptions=False)
    assert len(Editor.asked) == 52  # nothing was run again
