"""A corpus of renders says what its scenes are: captions, exact masks and truth agree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from iedit.runtime.cli.main import main
from iedit.runtime.errors import UsageError
from iedit.training import demo_corpus, world
from iedit.training.corpus import Sample, open_corpus


def scene_of(values: dict) -> world.Scene:
    things = tuple(world.Thing(**t | {"pose": tuple(t["pose"])}) for t in values["things"])
    return world.Scene(things, values["ground"], values["sky"], values["horizon"])


def test_pictures_captions_and_truth_are_of_the_same_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_corpus, "SHARD", 4)
    told: list[tuple[int, int]] = []
    demo_corpus.write_renders(tmp_path / "renders", 10, seed=3, tell=lambda *x: told.append(x))
    truth = json.loads((tmp_path / "renders" / "truth.json").read_text())
    shards = open_corpus(tmp_path / "renders")
    samples = [s for shard in shards for s in shard if isinstance(s, Sample)]
    assert len(shards) == 3 and [s.key for s in samples] == list(truth) == [f"{i:09d}" for i in range(10)]
    for i, sample in enumerate(samples):
        scene = scene_of(truth[sample.key])
        assert scene == demo_corpus.scene(3, i)
        assert sample.caption == world.caption(scene) and sample.image.tobytes() == world.render(scene).tobytes()
        assert set(sample.masks) == {f"{t.colour}-{t.kind}" for t in scene.things} | {scene.ground, f"{scene.sky}-sky"}
    assert told == [(i, 10) for i in range(1, 11)]
    demo_corpus.write_renders(tmp_path / "again", 10, seed=3)
    for path in (tmp_path / "renders").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    demo_corpus.write_renders(tmp_path / "other", 10, seed=4)
    assert (tmp_path / "other" / "truth.json").read_text() != (tmp_path / "renders" / "truth.json").read_text()


def test_the_masks_of_a_scene_share_out_the_picture() -> None:
    thing = world.Thing("car", "red", 35, 108, 44)
    scenes = [demo_corpus.scene(0, i) for i in range(20)]
    scenes.append(world.Scene((thing, world.Thing("car", "red", 95, 108, 44)), "grass", "noon", 80))
    for scene in scenes:
        masks = {label: np.asarray(m) == 255 for label, m in demo_corpus.masks(scene).items()}
        assert (sum(m.astype(int) for m in masks.values()) == 1).all()  # each pixel belongs to one
        sky = masks[f"{scene.sky}-sky"]
        assert sky[0].all() and not sky[90:].any() and masks[scene.ground][127].all()
        for i, t in enumerate(scene.things):
            assert masks[f"{t.colour}-{t.kind}"][np.asarray(world.object_mask(scene, i)) > 127].all()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds thesis\.txt, which is not of this corpus; choose another folder"):
        demo_corpus.write_renders(tmp_path, 3)
    result = CliRunner().invoke(main, ["train", "renders", "--out", str(tmp_path / "new"), "--n", "3"])
    assert result.exit_code == 0 and result.stdout.strip() == f"{tmp_path / 'new'}: 3 renders"
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["00000.tar", "truth.json"]
