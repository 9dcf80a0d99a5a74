"""bench/defaults.py: every option of ITO that is a choice is varied, and only what noise does not explain gets a verdict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy import stats

from iedit.runtime.backends.eager import TorchBackend
from iedit.runtime.editor import Editor
from iedit.runtime.errors import UsageError
from iedit.runtime.model.model import load_model
from iedit.runtime.options import USES, Options
from iedit.runtime.stage_cache import StageCache
from iedit.training import truth
from iedit.training.classifier import Reading


@pytest.fixture
def defaults(bench: Callable[[str], Any]) -> Any:
    return bench("defaults")


def flat(options: Any, prefix: str = "options.") -> dict[str, Any]:
    """Options by dotted names."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        found |= flat(value, f"{prefix}{f.name}.") if dataclasses.is_dataclass(value) else {prefix + f.name: value}
    return found


def test_every_option_of_ito_is_varied_but_those_that_are_no_choice_of_the_method(defaults: Any) -> None:
    base = flat(defaults.BASE)
    varied = {
        n for v in defaults.VARIANTS for n, value in flat(Options(**v.method.options)).items() if value != base[n]
    }
    inputs = {
        "options.negative_prompt",
        "options.control_scale",
        "options.control_scales",
        "options.resize",
        "options.feather",
    }
    known = {
        name
        for u in USES
        if "ito" in u.methods
        for name in flat(Options())
        if name == u.field or name.startswith(u.field + ".")
    }
    known |= {"options.guidance_scale"}
    refinement = {
        n for n in known if n.startswith("options.refinement.")
    }  # A.5's own numbers, of an option that is off
    phases = {"options.guidance.k", "options.guidance.t_u", "options.final.k", "options.final.t_u"}
    assert known - inputs - refinement <= varied and phases <= varied


def test_every_variant_is_another_edit_than_the_default_and_one_that_can_be_made(defaults: Any) -> None:
    model = load_model("picturebook", device="cpu")
    names = [(v.steps, v.method.name) for v in (defaults.DEFAULT, *defaults.VARIANTS)]
    assert len(set(names)) == len(names)
    for v in defaults.VARIANTS:
        options = Options(**v.method.options)
        options.check()
        base = v.base or defaults.DEFAULT
        assert set(v.kinds) <= set(base.kinds) and (v.steps == base.steps or v.option == "steps")
        for kind in v.kinds:
            settled, default = (
                o.settled(model, v.steps, layouts=kind in truth.LAYOUT_KINDS)
                for o in (options, Options(**base.method.options))
            )
            assert v.steps != base.steps or settled != default or v.shows != base.shows, (v.option, v.value, kind)


def test_a_few_lines_are_asked_for_by_their_names_and_bring_what_they_are_compared_with(defaults: Any) -> None:
    assert defaults.some_of(()) == [defaults.DEFAULT, *defaults.VARIANTS]
    for v in defaults.VARIANTS:
        found = defaults.some_of((f"{v.option} {v.value}",))
        assert found[0] is defaults.DEFAULT and set(found[1:]) == {v, v.base} - {None}
    with pytest.raises(UsageError, match=r"'steps 13' is not one of .*steps 12"):
        defaults.some_of(("steps 12", "steps 13"))


def test_only_what_is_beyond_noise_and_no_trifle_is_better_or_worse(defaults: Any) -> None:
    rng = np.random.default_rng(0)
    default = 0.01 + 0.001 * rng.random(20)

    def verdict(name: str, variant: Any, default: Any) -> str:
        return str(defaults.difference(name, variant, default).verdict)

    assert (
        verdict("l1_out", default * 0.9, default) == "better" and verdict("l1_out", default * 1.1, default) == "worse"
    )
    assert verdict("l1_out", default * 0.99, default) == ""  # sure, and a trifle
    assert verdict("l1_out", default + 0.01 * rng.standard_normal(20), default) == ""  # much, and noise
    assert verdict("mask_iou", default + 0.1, default) == "better"
    yes, five, six = np.ones(20), np.ones(20), np.ones(20)
    five[:5], six[:6] = 0, 0
    assert defaults.difference("new", five, yes).high < 0 and verdict("new", five, yes) == ""  # five of five: p = 0.06
    assert verdict("new", six, yes) == "worse" and verdict("new", yes, six) == "better"
    nothing = defaults.difference("mask_iou", [math.nan] * 3, [0.5] * 3)
    assert math.isnan(nothing.value) and nothing.verdict == ""
    one = defaults.difference("l1_in", [0.5, math.nan, 0.7], [0.25, 0.1, 0.25])
    assert one.value == pytest.approx(0.35)


def test_the_sign_test_is_scipy_s(defaults: Any) -> None:
    for up, down in ((0, 1), (5, 0), (6, 0), (3, 9), (10, 10)):
        assert defaults._sign_test(up, down) == pytest.approx(stats.binomtest(up, up + down).pvalue)
    assert defaults._sign_test(0, 0) == 1


class Blind:
    """A reader that sees the same in every picture."""

    def read(self, images: Sequence[Any]) -> list[Reading]:
        return [
            Reading(("car",), ("red",), "grass", "noon", torch.zeros(128, 128), (((0.0, 0.0),) * 12,)) for _ in images
        ]


def test_differences_are_of_the_same_cases_costs_are_without_the_cache_and_nothing_is_edited_twice(
    defaults: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = [
        defaults.Variant("", "default", "", {}, ("thing", "pose"), 2),
        defaults.Variant("Lambda", "lambda", "1", {"lam": 1.0}, ("thing",), 2),
        defaults.Variant("Composite", "composite", "pixel", {"composite": "pixel"}, ("thing", "pose"), 2),
    ]
    monkeypatch.setattr(defaults, "DEFAULT", variants[0])
    cached, fresh = (Editor(tiny, TorchBackend(tiny), cache=StageCache(memory=m)) for m in (1 << 26, 0))
    more = {"seed": 11, "batch": 2, "processes": 1}

    def measured(editor: Any, counts: dict[str, int], output: Path) -> Any:
        return defaults.measure(variants, counts, lambda: (editor, Blind()), "edits", output, **more)

    costs = measured(fresh, {"thing": 1, "pose": 1}, tmp_path / "costs")
    rows = measured(cached, {"thing": 2, "pose": 1}, tmp_path)
    assert [len(rows[v]) for v in variants] == [3, 2, 3]
    assert (
        rows[variants[2]][0]["evaluations"]
        < costs[variants[2]][0]["evaluations"]
        == costs[variants[0]][0]["evaluations"]
    )
    text = defaults.document(rows, costs)
    heads = [line for line in text.splitlines() if line.startswith("### ")]
    assert heads == ["### Lambda", "### Composite"] and "2 variants" in text
    (line,) = (line for line in text.splitlines() if line.startswith("| lambda |"))
    evaluations = sum(r["evaluations"] for r in costs[variants[1]])
    assert f"| lambda | 1 | {evaluations:.0f} | thing |" in line
    (line,) = (line for line in text.splitlines() if line.startswith("| composite |"))
    expected = np.mean([r["l1_out"] for r in rows[variants[2]] if r["kind"] == "thing"]) - np.mean([r["l1_out"] for r in rows[variants[0]] if r["kind"] == "thing"])  # fmt: skip
    assert f"{expected:+.4f}" in line

    monkeypatch.setattr(Editor, "edit_many", None)
    again = measured(cached, {"thing": 2, "pose": 1}, tmp_path)
    assert defaults.document(again, costs) == text


def test_what_is_not_there_is_a_line_before_anything_runs(defaults: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    reader = tmp_path / "classifier.safetensors"
    for words, said in (
        (("--reader", reader, "--write", page), "put <!-- defaults -->"),
        (("--reader", reader, "--write", page, "--only", "steps 12"), "put <!-- closer -->"),
        (("--reader", reader, "--only", "steps"), "'steps' is not one of"),
        (("--reader", reader), "train it with"),
        (("--reader", reader, "--n", 1), "1 is not in the range"),
    ):
        done = CliRunner().invoke(defaults.main, [str(w) for w in words])
        assert done.exit_code == 2 and said in done.output, done.output
    assert page.read_text() == "nothing\n"
