"""bench/pareto.py: what is run once under two names, the front, labels that do not cover each other, and the command with a small model."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageDraw

from iedit.runtime.backends.eager import TorchBackend
from iedit.runtime.editor import Editor
from iedit.runtime.options import Options
from iedit.runtime.presets import PRESETS
from iedit.runtime.stage_cache import StageCache
from iedit.training import truth
from iedit.training.classifier import Reading


@pytest.fixture
def pareto(bench: Callable[[str], Any]) -> Any:
    return bench("pareto")


def point(pareto: Any, name: str, seconds: float, new: float, l1: float) -> Any:
    around = {
        "new": pareto.Figure(new, max(0, new - 0.05), min(1, new + 0.05)),
        "l1_out": pareto.Figure(l1, l1 * 0.9, l1 * 1.1),
    }
    return pareto.Point(
        name, name.startswith("ito"), 30, pareto.Figure(seconds, seconds * 0.9, seconds * 1.1), 99, around
    )


def crowd(pareto: Any, count: int, seed: int) -> list[Any]:
    """Many methods, some nearly the same."""
    rng = np.random.default_rng(seed)
    made = [point(pareto, f"method number {i}", 2 ** rng.uniform(-2, 2), rng.uniform(0.4, 1), rng.uniform(0.005, 0.03)) for i in range(count - 2)]  # fmt: skip
    return [*made, point(pareto, "ito", 1.0, 1.0, 0.01), point(pareto, "ito = fast", 1.01, 1.0, 0.0101)]


def test_everything_that_edits_is_run_and_what_comes_to_the_same_once_under_both_names(pareto: Any, tiny: Any) -> None:
    found = list(pareto.asked(tiny))
    names = [part for _, m in found for part in m.name.split(" = ")]
    assert sorted(names) == sorted(
        [
            *(
                m
                for m in truth.METHODS
                if m not in ("guidance image", "ip2p", "round trip of the target") and "t2i" not in m
            ),
            *PRESETS,
        ]
    )
    assert [s for s, m in found if "faster" in m.name.split(" = ")] == [12]
    settled = [(s, m.method, Options(**m.options).settled(tiny, s, m.method)) for s, m in found]
    assert all(a != b for a, b in itertools.combinations(settled, 2))
    assert any("exact" in m.name.split(" = ") and "ito exact" in m.name for _, m in found)


def test_the_front_is_what_no_other_beats_in_both(pareto: Any) -> None:
    for seed, name in itertools.product(range(5), ("new", "l1_out")):
        some = crowd(pareto, 12, seed)
        sign = 1 if name == "new" else -1

        def beats(a: Any, b: Any, name: str = name, sign: int = sign) -> bool:
            one, other = (
                (sign * a.figures[name].value, -a.seconds.value),
                (sign * b.figures[name].value, -b.seconds.value),
            )
            return one != other and one[0] >= other[0] and one[1] >= other[1]

        expected = [p for p in some if not any(beats(q, p) for q in some)]
        assert {p.name for p in pareto.best(some, name)} == {p.name for p in expected}


@pytest.mark.parametrize("seed", range(3))
def test_labels_are_in_the_frame_and_do_not_cover_each_other(pareto: Any, seed: int) -> None:
    draw = ImageDraw.Draw(Image.new("RGB", (pareto.WIDTH, pareto.HEIGHT)))
    frame = (116, 60, 860, 660)
    some = crowd(pareto, 13, seed)
    boxes = pareto.panel(draw, frame, some, "l1_out", "title")
    for a, b in itertools.combinations(boxes, 2):
        assert pareto._overlap(a, b) == 0
    for box in boxes:
        assert frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]


def test_what_is_drawn_is_where_the_figures_are(pareto: Any) -> None:
    """A faster method is further left, a more accurate one further up, by the colours of their points."""
    page = Image.new("RGB", (800, 600), "white")
    pareto.panel(ImageDraw.Draw(page), (100, 50, 790, 550), [point(pareto, "ito", 4.0, 0.9, 0.01), point(pareto, "sdedit", 0.5, 0.5, 0.02)], "new", "")  # fmt: skip
    pixels = np.asarray(page).astype(int)

    def middle(ink: tuple[int, int, int]) -> np.ndarray:
        return np.asarray(np.median(np.argwhere((pixels == ink).all(2)), 0))

    blue, orange = middle(pareto.INK["ito"]), middle(pareto.INK["other"])
    assert blue[0] < orange[0] and blue[1] > orange[1]


class Blind:
    """A reader that sees the same in every picture."""

    def read(self, images: Sequence[Any]) -> list[Reading]:
        return [
            Reading(("car",), ("red",), "grass", "noon", torch.zeros(128, 128), (((0.0, 0.0),) * 12,)) for _ in images
        ]


def test_the_command_measures_once_and_writes_the_plot_and_the_table(
    pareto: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = Editor(tiny, TorchBackend(tiny), cache=StageCache(memory=0))
    kinds = ("thing", "pose")
    few = {n: truth.Method(n, n, kinds[:1]) for n in ("sdedit", "diffedit")}
    few["ito"] = truth.Method("ito", "ito", kinds)
    monkeypatch.setattr(truth, "METHODS", few)
    monkeypatch.setattr(truth, "KINDS", kinds)
    monkeypatch.setattr(pareto, "PRESETS", {"fast": SimpleNamespace(steps=2, options=PRESETS["fast"].options)})
    monkeypatch.setattr(pareto, "STEPS", 2)
    monkeypatch.setattr(pareto, "load_suite", lambda *words: (editor, Blind()))
    page, png = tmp_path / "page.md", tmp_path / "pareto.png"
    page.write_text("before\n<!-- pareto -->\n<!-- /pareto -->\nafter\n")
    words = ["--reader", "r", "--n", "1", "--output", str(tmp_path / "rows"), "--write", str(png), "--table", str(page)]
    done = CliRunner().invoke(pareto.main, words)
    assert done.exit_code == 0, done.output
    assert Image.open(png).size == (pareto.WIDTH, pareto.HEIGHT)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "](pareto.png)\n" in text
    rows = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith(("| text", "| layout"))]
    assert sorted(rows) == sorted([*(["| text", n] for n in ("sdedit", "diffedit", "ito", "fast")), *(["| layout", n] for n in ("ito", "fast"))])  # fmt: skip
    with monkeypatch.context() as stopped:
        stopped.setattr(Editor, "edit_many", None)
        assert CliRunner().invoke(pareto.main, words).exit_code == 0 and page.read_text() == text
        # A preset that has changed under its name is another one.
        other = dataclasses.replace(PRESETS["fast"].options, guidance_until=0.9)
        stopped.setattr(pareto, "PRESETS", {"fast": SimpleNamespace(steps=2, options=other)})
        assert CliRunner().invoke(pareto.main, words).exit_code != 0

    page.write_text("nothing\n")
    done = CliRunner().invoke(pareto.main, words)
    assert done.exit_code == 2 and "put <!-- pareto -->" in done.output
