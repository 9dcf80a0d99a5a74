"""The truth suite judged with editors whose answer is known: the exact target, and the untouched input."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from iedit.training import truth, workers, world
from iedit.training.classifier import Reading


def reading_of(scene: world.Scene) -> Reading:
    """What a perfect reader reads."""
    mask = torch.from_numpy(np.asarray(world.object_mask(scene), dtype=np.float32) / 255)
    things = scene.things
    return Reading(
        kinds=tuple(t.kind for t in things),
        colours=tuple(t.colour for t in things),
        ground=scene.ground,
        sky=scene.sky,
        mask=mask,
        joints=tuple(tuple(world.joints(t)) for t in things),
    )


class Oracle:
    """A reader that knows the scene of every picture it was told of, by its pixels."""

    def __init__(self, scenes: Sequence[world.Scene]) -> None:
        self.known = {world.render(s).tobytes(): reading_of(s) for s in scenes}

    def read(self, images: Sequence[Any]) -> list[Reading]:
        return [self.known[i.tobytes()] for i in images]


@dataclass
class Profile:
    evaluations: dict[str, int] = field(default_factory=lambda: {"mask": 40, "final": 50})


@dataclass
class Result:
    image: Image.Image
    mask: Image.Image | None
    guidance: Image.Image | None = None
    profile: Profile = field(default_factory=Profile)


class FakeEditor:
    """Returns the exact target with the exact region as its mask, or the input with none; counts its calls."""

    def __init__(self, perfect: bool) -> None:
        self.perfect, self.edits, self.calls = perfect, 0, 0

    def edit_many(self, requests: list[truth.Case]) -> list[Result]:
        self.edits, self.calls = self.edits + len(requests), self.calls + 1
        return [Result(c.target, c.region) if self.perfect else Result(c.source, None) for c in requests]

    def reconstruct(self, images: list[Image.Image]) -> list[Image.Image]:
        return images


def the_case(case: truth.Case, method: truth.Method, seed: int, steps: int) -> truth.Case:
    """In place of an `EditRequest`: the case itself, which the fake editor answers."""
    return case


def oracle_of(kinds: Sequence[str], n: int) -> Oracle:
    cases = [c for k in kinds for c in truth.edit_cases(k, n)]
    return Oracle([c.before for c in cases] + [c.after for c in cases])


@pytest.mark.parametrize("kind", truth.KINDS)
def test_cases_repeat_and_a_short_run_is_the_beginning_of_a_long_one(kind: str) -> None:
    cases = truth.edit_cases(kind, 12)
    assert cases[:5] == truth.edit_cases(kind, 5)
    assert len({(c.before, c.after) for c in cases}) == 12
    assert truth.edit_cases(kind, 5, seed=1) != cases[:5]


@pytest.mark.parametrize("kind", truth.KINDS)
def test_half_of_the_cases_have_two_things(kind: str) -> None:
    assert [len(c.before.things) for c in truth.edit_cases(kind, 6)] == [1, 2] * 3


@pytest.mark.parametrize("kind", truth.KINDS)
def test_an_edit_changes_pixels_inside_the_exact_region_only(kind: str) -> None:
    for case in truth.edit_cases(kind, 6):
        difference = np.asarray(ImageChops.difference(case.source, case.target).convert("L"))
        region = np.asarray(case.region) > 0
        assert difference[region].max() > 2
        assert difference[~region].max() <= 2  # in luminance; fewer steps of 255 than a picture shows
        assert 0 < region.mean() < 1


@pytest.mark.parametrize("kind", truth.KINDS)
def test_layout_edits_keep_the_caption_and_carry_both_layouts(kind: str) -> None:
    case = truth.edit_cases(kind, 2)[1]
    same = case.prompts[0] == case.prompts[1]
    if kind in truth.LAYOUT_KINDS:
        assert same
        assert list(case.layouts) == list(case.source_layouts) == [kind]
        assert case.layouts[kind].tobytes() != case.source_layouts[kind].tobytes()
    else:
        assert not same
        assert case.layouts == case.source_layouts == {}


def test_held_out_scenes_are_not_those_of_a_training_step() -> None:
    held = set(truth.held_out_scenes("text", 50, 1))
    assert not held & {world.random_scene(random.Random(f"vae-0-{step}-0"), 1) for step in range(50)}
    assert all(any(t.kind == "person" for t in s.things) for s in truth.held_out_scenes("pose", 20, 2, person=True))


def test_the_exact_target_gets_a_perfect_score() -> None:
    rows = truth.run(FakeEditor(True), oracle_of(truth.KINDS, 6), ["ito"], n=6, request=the_case)
    assert len(rows) == 6 * len(truth.KINDS)
    for row in rows:
        assert (row["new"], row["old"], row["rest"]) == (1, 0, 1), row
        assert (row["l1_in"], row["mask_iou"], row["evaluations"]) == (0, 1, 15)  # 90 for the six of a call
        assert row["l1_out"] < 0.001
        assert row["ssim_out"] > 0.97  # the window reaches 5 px across the border of the region
    summary = truth.summarise(rows)
    assert all(one["new"] == 1 for one in summary)
    assert all(truth.met(f) for f in truth.verdicts(summary))
    assert len(truth.verdicts(summary)) == 2 * 4 + 2 * len(truth.KINDS)  # text is 4, layout 4, each kind 2
    distances = {one["kind"]: one["distance"] for one in summary}
    assert distances["pose"] == 0
    assert distances["scribble"] == 1
    assert math.isnan(distances["text"])


def test_the_untouched_input_fails_everything_but_keeps_the_rest() -> None:
    rows = truth.run(FakeEditor(False), oracle_of(truth.KINDS, 6), ["ito"], n=6, request=the_case)
    for row in rows:
        assert row["new"] == (row["distance"] >= truth.SCRIBBLE_LIMIT if row["kind"] == "scribble" else 0)
        assert (row["rest"], row["l1_out"], row["psnr_out"]) == (1, 0, math.inf)
        assert row["ssim_out"] == pytest.approx(1, abs=1e-6)
        assert row["l1_in"] > 0.01
        assert math.isnan(row["mask_iou"])
    summary = {one["kind"]: one for one in truth.summarise(rows)}
    assert summary["text"]["old"] == 1
    assert summary["pose"]["old"] == 1
    assert summary["scribble"]["new"] < 0.5
    assert not any(truth.met(f) for f in truth.verdicts(list(summary.values())) if "as " in f["name"])


def test_a_picture_that_changed_something_else_is_new_but_not_right_in_the_rest() -> None:
    case = next(c for c in truth.edit_cases("colour", 4) if len(c.before.things) == 2)
    sky = next(s for s in world.SKIES if s != case.after.sky)
    wrong = world.edit(case.after, world.Change("sky", 0, sky))
    assert truth.judge(case, reading_of(wrong)) | {"distance": 0} == {"new": 1, "old": 0, "rest": 0, "distance": 0}


def test_a_pose_without_a_person_to_be_seen_is_not_reached() -> None:
    case = truth.edit_cases("pose", 1)[0]
    judged = truth.judge(case, reading_of(world.edit(case.after, world.Change("thing", 0, "car"))))
    assert (judged["new"], judged["old"]) == (0, 0)
    assert math.isnan(judged["distance"])


def test_an_untouched_neighbour_earns_nothing_for_an_outline() -> None:
    case = next(c for c in truth.edit_cases("scribble", 40) if len(c.after.things) == 2)
    index = case.change.index
    alone = world.Scene((case.after.things[1 - index],), case.after.ground, case.after.sky, case.after.horizon)
    seen = reading_of(alone)  # the edited thing is gone, its neighbour is there
    assert truth.outline_iou(seen, case.after, index) < 0.1
    assert truth.outline_iou(seen, case.after) > 0.25


def test_a_guidance_image_is_judged_as_a_result_is() -> None:
    class Guided(FakeEditor):
        def edit_many(self, requests: list[truth.Case]) -> list[Result]:
            return [Result(c.source, c.region, c.target) for c in requests]

    names = ("guidance image", "ito lambda=0.6")
    guidance, result = truth.run(Guided(False), oracle_of(["thing"], 1), names, ["thing"], 1, request=the_case)
    assert (
        (guidance["new"], guidance["old"], guidance["l1_in"]) == (1, 0, 0)
        and result["old"] == 1
        and result["l1_in"] > 0
    )
    assert truth.METHODS["guidance image"].options == truth.METHODS["ito lambda=0.6"].options


def test_a_second_run_repeats_nothing_and_a_larger_one_only_adds(tmp_path: Path) -> None:
    editor, oracle = FakeEditor(True), oracle_of(["thing", "pose"], 8)

    def again(n: int, settings: str = "a", **options: Any) -> list[truth.Row]:
        return truth.run(editor, oracle, ["ito", "sdedit"], ["thing", "pose"], n, settings=settings, batch=3,
                         output=tmp_path, request=the_case, **options)  # fmt: skip

    first = again(4)
    assert (editor.edits, editor.calls) == (12, 6)  # sdedit is not for poses; 4 cases are a batch of 3 and one of 1
    second = again(4)
    assert editor.edits == 12
    assert [(r["kind"], r["method"], r["number"]) for r in first] == [
        (r["kind"], r["method"], r["number"]) for r in second
    ]
    assert len(again(8)) == 24
    assert editor.edits == 24
    again(4, settings="another model")
    assert editor.edits == 36


def test_rows_come_back_from_disk_as_they_went(tmp_path: Path) -> None:
    rows = truth.run(FakeEditor(True), oracle_of(["background"], 2), ["ito"], ["background"], 2,
                     output=tmp_path, request=the_case)  # fmt: skip
    back = workers.read_rows(tmp_path / "cases.csv", truth.WORDS, truth.WHOLE)
    assert [str(r) for r in back] == [str(r) for r in rows]
    assert [p.name for p in tmp_path.iterdir()] == ["cases.csv"]


def test_the_sheet_shows_the_first_cases(tmp_path: Path) -> None:
    truth.run(FakeEditor(True), oracle_of(["pose"], 3), ["ito", "round trip of the target"], ["pose"], 3,
              output=tmp_path, sheet=2, request=the_case)  # fmt: skip
    page = Image.open(tmp_path / "ito-pose.png")
    case = truth.edit_cases("pose", 1)[0]
    tile = page.crop((4, 28, 4 + world.SIZE, 28 + world.SIZE))
    assert tile.tobytes() == case.source.tobytes()
    assert page.size == (6 * 132 + 4, 14 + 2 * 146)
    assert (tmp_path / "round_trip_of_the_target-pose.png").exists()


def test_unknown_methods_and_kinds_are_named() -> None:
    with pytest.raises(ValueError, match="'warp'"):
        truth.run(FakeEditor(True), Oracle([]), ["warp"])
    with pytest.raises(ValueError, match="'shape'"):
        truth.edit_cases("shape")


class FakeModel(FakeEditor):
    """Draws what the caption and the layout ask for, from the scenes it was told of."""

    def __init__(self, scenes: Sequence[world.Scene], right: bool) -> None:
        super().__init__(True)
        self.right, self.queue = right, list(scenes)

    def generate(
        self, prompts: list[str], layouts: dict[str, list[Image.Image]] | None, seeds: list[int], steps: int
    ) -> list[Image.Image]:
        some, self.queue = self.queue[: len(prompts)], self.queue[len(prompts) :]
        assert [world.caption(s) for s in some] == prompts
        assert len(set(seeds)) == len(prompts)
        for name, pictures in (layouts or {}).items():
            assert [p.tobytes() for p in pictures] == [world.layout(s, name).tobytes() for s in some]
        if self.right:
            return [world.render(s) for s in some]
        return [world.render(world.scene_of_seed(s, 1)) for s in seeds]


def asked_scenes(n: int) -> list[world.Scene]:
    scenes = [s for t in (1, 2) for s in truth.held_out_scenes("text", n, t)]
    scenes += [s for t in (1, 2) for s in truth.held_out_scenes("pose", n, t, True)]
    return scenes + [s for t in (1, 2) for s in truth.held_out_scenes("scribble", n, t)]


@pytest.mark.parametrize("right", [True, False])
def test_the_figures_of_a_model_that_draws_the_truth_are_met_and_of_another_are_not(right: bool) -> None:
    scenes = asked_scenes(3)
    known = scenes + [s for t in (1, 2) for s in truth.held_out_scenes("autoencoder", 3, t)]
    oracle = Oracle(known + [world.scene_of_seed(i, 1) for i in range(3)])
    figures = truth.model_figures(FakeModel(scenes, right), oracle, 3, batch=2)
    asked = {f["name"]: truth.met(f) for f in figures if f["wanted"]}
    assert len(asked) == 8
    sampled = [v for k, v in asked.items() if not k.startswith("autoencoder")]
    assert all(sampled) if right else not any(sampled)
    card = truth.render_card({"model": figures, "about": {"seed": 0}})
    assert ("**no**" in card) is not right
    assert "| text to image, two things: all right |" in card


def test_the_card_and_the_table_hold_every_method(tmp_path: Path) -> None:
    rows = truth.run(FakeEditor(True), oracle_of(["thing"], 2), ["ito", "sdedit"], ["thing"], 2, request=the_case)
    summary = truth.summarise(rows)
    assert [(one["kind"], one["method"]) for one in summary] == [
        (k, m) for k in ("thing", "text", "all") for m in ("ito", "sdedit")
    ]
    assert {one["kind"] for one in truth.summarise(rows, by_things=True)} == {
        "thing x1",
        "thing x2",
        "text x1",
        "text x2",
        "all x1",
        "all x2",
    }
    assert truth.table(summary).row_count == 6
    workers.write_json(tmp_path / "figures.json", {"edits": summary})
    card = truth.render_card(workers.read_json(tmp_path / "figures.json"))
    assert card.count("| sdedit |") == 3
    assert "1.00 (0.34-1.00)" in card
