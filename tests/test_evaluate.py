"""The machinery of `iedit evaluate`: rows that are kept, processes that end, figures that are what they say."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from iedit.runtime import images
from iedit.runtime.editor import EditRequest
from iedit.runtime.errors import RunError, UsageError
from iedit.training import evaluate, workers
from iedit.training.evaluate import Method, Settings
from iedit.training.figures import Case, Judges


def picture(seed: int, side: int = 32) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((side, side))


class Small:
    """A benchmark of random pictures; the left half is the edit."""

    title = "small"
    columns: tuple[str, ...] = ("l1", "ssim_m", "ssim_not_m", "fid")
    rank: tuple[str, ...] = ("clip_score", "l1")

    def __init__(self, n: int, sizes: Sequence[int] = (32,), edition: str = "1", instruction: str = ""):
        self.cases: Sequence[Case] = [
            Case(
                f"a/{i}",
                f"kind {i % 2}",
                "red",
                "blue",
                f"{i}{edition}",
                (sizes[i % len(sizes)],) * 2,
                instruction=instruction,
            )
            for i in range(n)
        ]

    def picture(self, case: Case) -> Image.Image:
        return picture(int(case.name[2:]), case.size[0])

    def mask(self, case: Case) -> np.ndarray | None:
        mask = np.zeros(case.size, bool)
        mask[:, : case.size[0] // 2] = True
        return mask

    def real(self) -> Iterator[tuple[str, Image.Image]]:
        for case in self.cases:
            yield "", self.picture(case)


@dataclass
class Inverter:
    """An editor that returns the negative, with the model's settings, and keeps what it was asked."""

    asked: list[list[EditRequest]] = field(default_factory=list)
    fail_at: int = -1
    model: Any = field(default_factory=lambda: SimpleNamespace(digest="d", guidance_scale=5.0, mask_strength=None,
                                                               mask_threshold=None, text_update_share=None, guidance_until=None, guidance_path=None, mask_seeds=None, lambda_area=None))  # fmt: skip

    def edit_many(self, requests: list[EditRequest]) -> list[Any]:
        assert all(isinstance(r, EditRequest) for r in requests) and len({r.image.size for r in requests}) == 1
        if len(self.asked) == self.fail_at:
            raise RunError("out of memory")
        self.asked.append(requests)
        profile = SimpleNamespace(evaluations={"sample": 3 * len(requests)})
        return [SimpleNamespace(image=ImageOps.invert(r.image), profile=profile) for r in requests]

    @property
    def edited(self) -> int:
        return sum(map(len, self.asked))


@pytest.fixture
def editor(monkeypatch: pytest.MonkeyPatch) -> Inverter:
    made = Inverter()
    load = functools.lru_cache(lambda *_: made)
    monkeypatch.setattr(evaluate, "load_editor", load)
    return made


METHODS = [Method("sdedit"), Method("ito", "fast")]


def run(output: Path, benchmark: Small | None = None, methods: Sequence[Method] = METHODS, judges: Judges | None = None, **settings: Any) -> list[dict[str, Any]]:  # fmt: skip
    return evaluate.run(benchmark or Small(5), methods, judges or Judges(), Settings(batch=2, **settings), output)


def test_a_run_that_failed_goes_on_and_nothing_is_edited_twice(tmp_path: Path, editor: Inverter) -> None:
    editor.fail_at = 2
    with pytest.raises(RunError):
        run(tmp_path)
    assert editor.edited == 4 and len(workers.read_rows(tmp_path / "cases.csv", evaluate.WORDS)) == 4
    editor.fail_at = -1
    rows = run(tmp_path)
    assert editor.edited == 10
    assert [(r["method"], r["name"]) for r in rows] == [(m, f"a/{i}") for m in ("sdedit", "ito-fast") for i in range(5)]
    before = (tmp_path / "cases.csv").read_bytes()
    again = run(tmp_path)
    assert editor.edited == 10 and str(again) == str(rows) and (tmp_path / "cases.csv").read_bytes() == before
    run(tmp_path, Small(7))  # two more of each
    assert editor.edited == 14
    fresh = run(tmp_path / "fresh")
    timeless = [[{k: v for k, v in r.items() if k != "seconds"} for r in some] for some in (rows, fresh)]
    assert str(timeless[0]) == str(timeless[1])


def test_other_settings_and_other_cases_are_edited_and_the_rows_of_before_stay(
    tmp_path: Path, editor: Inverter
) -> None:
    run(tmp_path)
    run(tmp_path, steps=7)
    assert editor.edited == 20
    run(tmp_path)
    run(tmp_path, steps=7)
    assert editor.edited == 20
    assert len(workers.read_rows(tmp_path / "cases.csv", evaluate.WORDS)) == 20
    run(tmp_path, Small(5, edition="2"))  # pictures of the same names
    assert editor.edited == 30 and len(workers.read_rows(tmp_path / "cases.csv", evaluate.WORDS)) == 20
    shown = next((tmp_path / "pictures").glob("sdedit-*/a/0.png"))
    shown.unlink()
    run(tmp_path, Small(5, edition="2"))
    assert editor.edited == 31
    other = Small(5)
    other.title = "another"
    with pytest.raises(UsageError, match=r"holds rows of another benchmark; give another --output"):
        run(tmp_path, other)


def test_other_networks_measure_the_pictures_that_are_there(tmp_path: Path, editor: Inverter) -> None:
    rows = run(tmp_path)
    more = run(tmp_path, judges=Judges(clip="picturebook"))
    assert editor.edited == 10 and [r["seconds"] for r in rows] == [r["seconds"] for r in more]
    for one, other in zip(rows, more, strict=True):
        assert {k: v for k, v in other.items() if k in one and k != "judges"} == {
            k: v for k, v in one.items() if k != "judges"
        }
        assert 0 <= other["clip_score"] <= 2.5 and math.isfinite(other["clip_edited"])


def test_requests_carry_seed_steps_preset_prompts_and_masks_only_if_asked(tmp_path: Path, editor: Inverter) -> None:
    run(tmp_path, Small(3, sizes=(32, 48)), [*METHODS, Method("iedit")], seed=10)
    by = [[(r.method, r.seed, r.image.size[0]) for r in some] for some in editor.asked]
    # Batches are of one size, and all methods have the first cases before any has the next.
    assert by[:2] == [[("sdedit", 10, 32), ("sdedit", 12, 32)], [("ito", 10, 32), ("ito", 12, 32)]]
    assert by[3:5] == [[("sdedit", 11, 48)], [("ito", 11, 48)]]
    assert all(r.mask is None and (r.source_prompt, r.prompt) == ("red", "blue") for some in editor.asked for r in some)
    fast = next(r for some in editor.asked for r in some if r.method == "ito")
    assert fast.options.guidance_path == "drawn" and fast.options.mask.seeds == 4
    editor.asked.clear()
    run(tmp_path, Small(3), [*METHODS, Method("iedit")], given_masks=True, steps=9)
    for request in (r for some in editor.asked for r in some):
        assert request.steps == 9 and (request.mask is None) == (request.method == "sdedit")
        if request.mask is not None:
            assert np.asarray(request.mask)[:, :16].all() and not np.asarray(request.mask)[:, 16:].any()


def test_pictures_that_were_made_elsewhere_are_measured_and_again_when_they_change(
    tmp_path: Path, editor: Inverter
) -> None:
    benchmark, folder = Small(3), tmp_path / "mine" / "a"
    folder.mkdir(parents=True)
    for i, ending in enumerate((".png", ".png", ".png")):
        benchmark.picture(benchmark.cases[i]).save(folder / f"{i}{ending}")
    own = [Method("", folder=str(folder.parent), name="mine")]
    rows = run(tmp_path / "out", benchmark, own)
    assert [r["l1"] for r in rows] == [0, 0, 0] and editor.asked == [] and all(math.isnan(r["seconds"]) for r in rows)
    picture(99).save(folder / "1.png")
    assert [r["l1"] > 0 for r in run(tmp_path / "out", benchmark, own)] == [False, True, False]
    picture(99, 48).save(folder / "1.png")
    with pytest.raises(UsageError, match=r"a/1 by mine: the edit is 48x48 and its source 32x32"):
        run(tmp_path / "out", benchmark, own)
    (folder / "1.png").unlink()
    with pytest.raises(UsageError, match=r"holds no a/1.png or .jpg, the edit of that case by mine"):
        run(tmp_path / "out", benchmark, own)


def test_a_summary_has_intervals_leaves_out_what_could_not_be_measured_and_shares_of_picks() -> None:
    rows: list[dict[str, Any]] = [
        {"method": m, "kind": k, "name": f"{k}{i}", "new": float(i > 2), "l1": 0.1 * i if i else math.nan, "pickscore": i + (m == "b") * math.log(3)}
        for m in "ab" for k in "xy" for i in range(10)
    ]  # fmt: skip
    evaluate.with_preference(rows)
    assert [r["preference"] for r in rows if r["method"] == "b"] == pytest.approx([0.75] * 20)
    summary = evaluate.summarise(rows)
    assert [(s["kind"], s["method"], s["n"]) for s in summary] == [("all", "a", 20), ("all", "b", 20), ("x", "a", 10), ("x", "b", 10), ("y", "a", 10), ("y", "b", 10)]  # fmt: skip
    one = summary[2]
    assert (one["l1"], one["l1_n"]) == (pytest.approx(0.5), 9) and one["l1_low"] < 0.5 < one["l1_high"]
    assert one["new"] == 0.7 and (one["new_low"], one["new_high"]) == pytest.approx((0.397, 0.892), abs=1e-3)
    assert summary[0]["new_high"] - summary[0]["new_low"] < one["new_high"] - one["new_low"]
    page = evaluate.table(summary, ("l1", "fid", "new"))
    assert [c.header for c in page.columns] == ["cases", "method", "n", "L1", "as new"]  # there is no FID


def test_the_sheet_shows_the_best_the_median_and_the_worst_once_each(tmp_path: Path, editor: Inverter) -> None:
    benchmark, method = Small(12), Method("sdedit")
    rows = run(tmp_path, benchmark, [method])
    seen: list[list[str]] = []
    first: list[Any] = []

    def keep(lines: Any, titles: list[str]) -> Image.Image:
        seen.append(titles)
        first.extend(lines[:1])
        return Image.new("RGB", (8, 8))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "contact_sheet", keep)
        evaluate.sheet(benchmark, method, rows, tmp_path)
        evaluate.sheet(benchmark, method, rows[:2], tmp_path)
    assert [t.split(":")[0] for t in seen[0]] == ["best 1 of 12", "best 2 of 12", "best 3 of 12", "median 6 of 12", "median 7 of 12",
                                                  "median 8 of 12", "worst 10 of 12", "worst 11 of 12", "worst 12 of 12"]  # fmt: skip
    best = min(rows, key=lambda r: r["l1"])["name"]
    (name, source), _, (_, edited) = first[0]
    assert name == best and source.tobytes() == picture(int(best[2:])).tobytes()
    assert edited.tobytes() == ImageOps.invert(source).tobytes()
    assert len(seen[1]) == 2 and evaluate.sheet(benchmark, method, [], tmp_path) is None


def test_fid_is_of_the_pictures_on_disk_and_too_few_are_a_note(tmp_path: Path, editor: Inverter) -> None:
    benchmark = Small(4)
    judges = Judges(features="picturebook")
    rows = run(tmp_path, benchmark, judges=judges)
    summary = evaluate.summarise(rows)
    (note,) = evaluate.add_distances(rows, summary, benchmark, METHODS, judges, tmp_path)
    assert "4 pictures on 96 features" in note and note.endswith("(--singular-fid)") and "fid" not in summary[0]
    assert evaluate.add_distances(rows, summary, benchmark, METHODS, judges, tmp_path, singular=True) == []
    assert summary[0]["fid"] == pytest.approx(summary[1]["fid"]) and summary[0]["fid"] > 1
    assert all("fid" not in s for s in summary if s["kind"] != "all")


def test_a_method_that_is_told_what_to_change_is_given_the_instruction(tmp_path: Path, editor: Inverter) -> None:
    run(tmp_path, Small(1, instruction="make it blue"), [Method("ip2p"), Method("sdedit")])
    assert [some[0].prompt for some in editor.asked] == ["make it blue", "blue"]
    with pytest.raises(UsageError, match="a/0: has no instruction, which method ip2p needs; leave the method out"):
        run(tmp_path / "other", Small(1), [Method("ip2p")])


def test_rows_of_another_recommended_preset_are_other_rows(tmp_path: Path, editor: Inverter) -> None:
    before = evaluate.model_settings(editor)
    run(tmp_path)
    editor.model.guidance_path, editor.model.guidance_until, editor.model.mask_seeds = "drawn", 0.32, 4
    assert evaluate.model_settings(editor) == f"{before} ito=0.32/drawn/4/None"
    run(tmp_path)
    assert editor.edited == 20
