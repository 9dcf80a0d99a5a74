"""The demo: samples in, one sheet and figures out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from iedit.runtime.cli import demo
from iedit.runtime.cli.demo import PeakMemory, run_demo
from iedit.runtime.cli.main import main

STAGES = ("encode", "mask", "invert", "guidance", "invert-guidance", "final", "decode")


@pytest.fixture
def samples(tiny_checkpoint_cli: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two samples of random pictures in place of the shipped ones, for a model of random weights."""
    from iedit.runtime.model import checkpoint

    whole = tmp_path / "picturebook"
    whole.symlink_to(tiny_checkpoint_cli, target_is_directory=True)
    monkeypatch.setattr(checkpoint, "picturebook_folder", lambda: whole)
    beside = tmp_path / "shipped"
    folder = beside / "samples"
    folder.mkdir(parents=True)
    monkeypatch.setattr(demo, "picturebook_folder", lambda: beside)
    for name in ("in", "pose", "old"):
        Image.effect_noise((32, 32), 80).save(folder / f"{name}.png")
    words = {"image": "in.png", "prompt": "a blue car", "source_prompt": "a red car"}
    none: dict[str, str] = {}
    listed = [
        words | {"name": "recolour", "layouts": none, "source_layouts": none, "options": {"lam": 1.0}},
        words | {"name": "new pose", "layouts": {"pose": "pose.png"}, "source_layouts": {"pose": "old.png"}},
    ]
    (folder / "samples.json").write_text(json.dumps(listed))
    return folder


def test_the_demo_writes_a_sheet_and_complete_figures(samples: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "made" / "edits.png"
    seen: list[str] = []
    figures = run_demo(sheet, lambda p: seen.append(p.stage))
    assert Image.open(sheet).width >= 5 * 192  # input, layout, mask, guidance image, result
    assert [f["name"] for f in figures] == ["recolour", "new pose"]
    assert set(figures[0]["seconds"]) == set(STAGES) - {"guidance", "invert-guidance"}
    assert set(figures[1]["seconds"]) == set(STAGES) == set(figures[1]["evaluations"])
    # 25 steps: one evaluation each to invert, two each with guidance.
    assert (figures[1]["evaluations"]["invert-guidance"], figures[1]["evaluations"]["final"]) == (25, 50)
    assert figures[1]["evaluations"]["invert"] == 0  # the same picture and source prompt as the first sample's
    for f in figures:
        assert all(
            seconds > 0 for stage, seconds in f["seconds"].items() if stage != "invert"
        )  # may come from the cache
        assert 0 <= f["mask_area"] <= 1
        assert f["size"] == (32, 32)
        assert f["peak_mib"] > 50  # this process has torch loaded
    assert set(seen) == set(STAGES)


def test_the_command_prints_a_table_and_where_the_sheet_is(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["demo", "--output", "edits.png"])
    assert result.exit_code == 0, result.output
    assert all(word in result.stdout for word in ("recolour", "new pose", "peak MiB", *STAGES))
    assert result.stdout.splitlines()[-1].startswith("edits.png: 2 edits")
    assert result.stderr == "loading picturebook\n"
    assert CliRunner().invoke(main, ["demo", "--output", "edits.jpg"]).exit_code == 2


def test_the_demo_s_own_sheet_is_made_anew_and_another_file_is_not_replaced(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    recolour = demo.sample_requests()[:1]
    monkeypatch.setattr(demo, "sample_requests", lambda: recolour)
    for _ in range(2):
        assert CliRunner().invoke(main, ["demo"]).exit_code == 0
    assert (tmp_path / "demo" / "edits.png").is_file()
    (tmp_path / "mine.png").write_text("somebody's")
    refused = CliRunner().invoke(main, ["demo", "--output", "mine.png"])
    assert refused.exit_code == 2 and "replace it with --overwrite" in refused.stderr
    assert (tmp_path / "mine.png").read_text() == "somebody's"
    assert CliRunner().invoke(main, ["demo", "--output", "mine.png", "--overwrite"]).exit_code == 0
    assert "iedit demo\n" in (root / "Makefile").read_text()  # `make demo` twice names no sheet of its own


def test_peak_memory_sees_what_is_held_for_a_moment() -> None:
    import time

    with PeakMemory() as before:
        pass
    with PeakMemory() as memory:
        held = bytearray(b"x" * (200 << 20))
        time.sleep(0.3)
        del held
    assert memory.peak > before.peak + 150
