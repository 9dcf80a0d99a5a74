"""The ablation runs from renders to its table, goes on where it was stopped, and writes only where a table belongs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from iedit.runtime.editor import Editor
from iedit.runtime.errors import UsageError
from iedit.training import ablation, world
from iedit.training.classifier import Classifier
from iedit.training.finetune import Settings


def _small_wordnet(folder: Path) -> Path:
    spec = importlib.util.spec_from_file_location("small_wordnet", Path(__file__).with_name("small_wordnet.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write(folder)


def test_a_row_of_the_table_is_a_fine_tuned_model_on_held_out_edits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "RATIOS", {0.12: 1})
    rows = [r for r in ablation.ROWS if r.name in ("base model", "global + paired, raw captions")]
    trained: list[Any] = []

    def run() -> list[dict[str, Any]]:
        return ablation.run(
            tmp_path, "picturebook", lambda name: Editor.load(name, [], backend="torch", device="cpu"), Classifier(),
            Settings(steps=1, sample_every=0, learning_rate=1e-3), wordnet=_small_wordnet(tmp_path / "wordnet"), pictures=80, count=1,
            rows=rows, tell=trained.append,
        )  # fmt: skip

    done = run()
    assert [(d["name"], d["ratio"], d["n"]) for d in done] == [(r.name, 0.12, len(ablation.KINDS)) for r in rows]
    assert done[0]["l1_in"] != done[1]["l1_in"] and len(trained) == 1
    again = run()
    assert len(trained) == 1 and [d["l1_in"] for d in again] == [d["l1_in"] for d in done]

    document = tmp_path / "training.md"
    document.write_text("before\n<!-- ablation -->\nold\n<!-- /ablation -->\nafter\n")
    text = ablation.replace_table(document, done)
    assert text.startswith("before\n<!-- ablation -->\n| trained with |") and text.endswith(
        "<!-- /ablation -->\nafter\n"
    )
    assert "old\n" not in text and text.count("| base model | sdedit | 0.12 | 2 |") == 1
    document.write_text("nothing of the kind")
    with pytest.raises(UsageError, match="has no place for the table"):
        ablation.replace_table(document, done)


def test_raw_captions_are_often_wrong_and_always_the_same() -> None:
    scenes = [world.scene_of_seed(i, 2) for i in range(300)]
    raw = [ablation.raw_caption(s) for s in scenes]
    assert raw == [ablation.raw_caption(s) for s in scenes]
    right = [all(f"{t.colour} {t.kind}" in words for t in s.things) for s, words in zip(scenes, raw, strict=True)]
    assert 0.2 < sum(right) / len(right) < 0.5  # two thirds are of the picture, half of them name both things
