"""What a method does not use is refused by name, from the command line and from Python, by one table that the docs repeat."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from PIL import Image

from iedit.runtime import METHODS, options
from iedit.runtime.cli.main import main
from iedit.runtime.editor import Editor, EditRequest, ItoSettings, MaskOptions, Options
from iedit.runtime.errors import UsageError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32), "green").save("in.png")
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (8, 8, 24, 24))
    mask.save("mask.png")
    return tmp_path


LAYOUT = ["--layout", "scribble=in.png"]
NO_MASK = ["--mask-mode", "none"]
MASK = ["--mask", "mask.png"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--method", "sdedit", *MASK], "--mask: method sdedit does not use it"),
        (["--method", "controlnet", *LAYOUT, *MASK], "--mask: method controlnet does not use it"),
        (["--method", "sdedit", "--composite", "pixel"], "--composite: method sdedit does not use it"),
        (["--composite", "pixel", *NO_MASK], "--composite: it would not be used, there is no mask with mask mode none"),
        (["--method", "sdedit", "--lambda", "0.2"], "--lambda: method sdedit does not use it"),
        (["--method", "sdedit", "--lambda", "0.6"], "a method that does: ito"),  # the default's value, but asked for
        (["--method", "diffedit", "--lambda", "0.2", "--lambda", "0.8"], "--lambda: method diffedit"),
        (["--method", "sdedit", "--refine"], "--refine: method sdedit"),
        (["--method", "iedit", "--t-u", "3"], "--t-u: method iedit"),
        (["--method", "diffedit", "--k", "2"], "--k: method diffedit"),
        (["--ratio", "0.5"], "--ratio: method ito does not use it"),
        (["--refine", "--lambda", "1"], "--refine: it would not be used, lambda 1 makes no guidance image"),
        (["--control-scale", "0.5"], "--control-scale: it would not be used, no layout is given"),
        (["--negative-prompt", "night", "--guidance-scale", "1"], "--negative-prompt: it would not be used"),
        (["--mask-threshold", "0.3", *MASK], "--mask-threshold: it would not be used, a mask is given"),
        (["--mask-mode", "trajectory", *MASK], "--mask-mode: it would not be used, a mask is given"),
        (["--mask-seeds", "3", *NO_MASK], "--mask-seeds: it would not be used, mask mode none"),
        (["--mask-strength", "0.5", "--method", "sdedit"], "--mask-strength: method sdedit"),
    ],
)
def test_the_command_line_refuses_an_option_that_would_not_be_used(here: Path, words: list[str], says: str) -> None:
    result = CliRunner().invoke(main, ["edit", "in.png", "--prompt", "a red car", "--model", "no/such/folder", *words])
    assert result.exit_code == 2, result.output
    line = result.stderr.strip()
    assert says in line and len(line.splitlines()) == 1
    assert sorted(p.name for p in here.iterdir()) == ["in.png", "mask.png"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "sdedit", "mask": Image.new("L", (64, 64), 255)}, "--mask: method sdedit"),
        ({"method": "sdedit", "options": Options(lam=0.2)}, "--lambda: method sdedit"),
        ({"method": "diffedit", "options": Options(final=ItoSettings(k=3))}, "options.final|final: method diffedit"),
        ({"method": "sdedit", "options": Options(inversion_scale=2.0)}, "inversion_scale: method sdedit"),
        ({"options": Options(ratio=0.5)}, "--ratio: method ito"),
        ({"options": Options(feather=2.0)}, "feather: it would not be used, the composite is not pixel"),
        ({"options": Options(round_trip=True, lam=1.0)}, "round_trip: .* lambda 1"),
        ({"options": Options(refinement=ItoSettings(t_u=3))}, "refinement: .* not refined"),
        ({"options": Options(control_scales=(("pose", 0.5),))}, "control_scales: .* no layout"),
        ({"options": Options(mask=MaskOptions(mode="none", sigma=2.0))}, "mask.sigma: .* mask mode none"),
    ],
)
def test_python_refuses_a_field_that_differs_from_its_default_and_would_not_be_used(
    tiny: Any, picture: Callable[..., Any], changes: dict[str, Any], says: str
) -> None:
    from iedit.runtime.backends.eager import TorchBackend

    request = dataclasses.replace(EditRequest(picture(0), "a red car"), **changes)
    with pytest.raises(UsageError, match=says):
        Editor(tiny, TorchBackend(tiny)).edit(request)


def test_a_sweep_that_reaches_lambda_1_may_refine_its_other_edits(tiny: Any, picture: Callable[..., Any]) -> None:
    from iedit.runtime.backends.eager import TorchBackend

    request = EditRequest(picture(0), "a red car", steps=1, options=Options(refine=True, mask=MaskOptions(seeds=1)))
    sweep = [dataclasses.replace(request, options=dataclasses.replace(request.options, lam=lam)) for lam in (0.5, 1.0)]
    assert len(Editor(tiny, TorchBackend(tiny)).edit_many(sweep)) == 2


def test_a_source_prompt_and_source_layouts_that_are_not_used_are_a_note(
    tiny: Any, picture: Callable[..., Any]
) -> None:
    from iedit.runtime.backends.eager import TorchBackend

    editor, maps = Editor(tiny, TorchBackend(tiny)), {"pose": picture(1)}
    request = EditRequest(picture(0), "a red car", "a tree", "controlnet", maps, maps, steps=1)
    notes = editor.edit(request).notes
    assert [n.split(" not used")[0] for n in notes] == ["the source prompt is", "the source layouts are"]
    request = EditRequest(picture(0), "a red car", "a tree", steps=1, options=Options(mask=MaskOptions(seeds=1)))
    assert not [n for n in editor.edit(request).notes if "not used" in n]


def test_the_table_has_every_field_of_the_options_that_a_method_could_leave_out() -> None:
    everywhere = {"guidance_scale"}  # every method samples under it
    known = {u.field.removeprefix("options.").split(".")[0] for u in options.USES}
    assert {f.name for f in dataclasses.fields(Options)} - known <= everywhere
    inside = {u.field.removeprefix("options.mask.") for u in options.USES if u.field.startswith("options.mask.")}
    assert inside == {f.name for f in dataclasses.fields(MaskOptions)}
    assert all(set(u.methods) <= set(METHODS) for u in options.USES)


def test_every_option_of_the_table_exists_and_its_help_says_who_uses_it() -> None:
    shown = {o: p.help or "" for p in main.commands["edit"].params if isinstance(p, click.Option) for o in p.opts}
    for use in options.USES:
        if use.option:
            assert options.used_by(use.option) in shown[use.option]
    assert "[ito only]" in shown["--k"] and "[not ito, ip2p]" in shown["--ratio"]


def table() -> str:
    """The table of docs/options.md, markdown; paste it there when this test fails."""
    lines = [f"| option | {' | '.join(METHODS)} | needs |", "|---" * (len(METHODS) + 2) + "|"]
    for use in options.USES:
        marks = ["x" if m in use.methods else "" for m in METHODS]
        lines.append(f"| `{use.option or use.field}` | {' | '.join(marks)} | {use.needs} |")
    return "\n".join(lines) + "\n"


def test_the_documented_table_is_the_one_that_is_checked(root: Path) -> None:
    found = re.search(r"<!-- uses -->\n(.*?)<!-- /uses -->", (root / "docs/options.md").read_text(), re.DOTALL)
    assert found and found[1] == table(), table()
