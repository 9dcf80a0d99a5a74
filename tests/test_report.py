"""A profile as tables, trace and picture."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from iedit.runtime.cli import report
from iedit.runtime.cli.main import main
from iedit.runtime.profile import Profile, module_call


@pytest.fixture
def profile() -> Profile:
    """Three stages, two of which share their calls."""
    made = Profile()
    with made.stage("encode"), module_call("vae_encoder", "torch", 1, cold=True):
        time.sleep(0.002)
    with made.stage("invert", "guidance"):
        for step in (1, 2):
            made.step(step, 2)
            made.step(step, 2)  # the other loop's word for the same step
            with module_call("unet", "onnx", 3):
                time.sleep(0.002)
            made.count({"invert": 1, "guidance": 2})
    made.fallback("unet", "tensorrt", ["tensorrt is not installed", "no CUDA device"])
    return made


def test_steps_cover_the_run_without_gaps_or_overlaps(profile: Profile) -> None:
    steps = profile.steps
    assert [(s.stage, s.step) for s in steps if s.step] == [("invert + guidance", 1), ("invert + guidance", 2)]
    for a, b in itertools.pairwise(steps):
        assert a.seconds >= 0 and a.start + a.seconds <= b.start + 1e-9
    for call in profile.modules:
        holder = [s for s in steps if s.start <= call.start and call.start + call.host <= s.start + s.seconds]
        assert [(s.stage, s.step) for s in holder] == [(call.stage, call.step)]


def test_the_trace_has_every_stage_step_and_call(profile: Profile) -> None:
    events = json.loads(json.dumps(report.trace(profile)))["traceEvents"]
    rows = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert list(rows.values()) == ["stages", "steps", "vae_encoder", "unet"]
    drawn = [(rows[e["tid"]], e["name"]) for e in events if e["ph"] == "X"]
    assert drawn.count(("unet", "unet")) == 2 and drawn.count(("vae_encoder", "vae_encoder")) == 1
    assert [n for row, n in drawn if row == "stages"] == ["encode", "invert + guidance"]
    assert [n for row, n in drawn if row == "steps"] == ["invert + guidance 1", "invert + guidance 2"]
    shared = next(e for e in events if e["ph"] == "X" and e["name"] == "invert + guidance")
    assert shared["args"]["evaluations"] == 6 and shared["dur"] >= 4000  # microseconds
    cold = next(e for e in events if e["name"] == "vae_encoder" and e["ph"] == "X")
    assert cold["args"]["cold"] is True


def test_tables_say_what_ran_where_and_why_nothing_faster_did(profile: Profile) -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in report.tables(profile, {"operators": 7}):
        console.print(table)
    text = console.export_text()
    for said in ("invert", "guidance", "vae_encoder", "onnx", "tensorrt is not installed; no CUDA device", "7 operators",
                 "outside the networks"):  # fmt: skip
        assert said in text


def test_the_plot_draws_each_call_in_its_place(profile: Profile) -> None:
    image = report.plot(profile, width=800)
    assert image.width == 800 and image.mode == "RGB"
    unet = Image.new("RGB", (1, 1), "#E69F00").getpixel((0, 0))
    row = 60 + 46 * 3 + 10
    painted = [x for x in range(800) if image.getpixel((x, row)) == unet]
    begin, end = profile.steps[0].start, profile.steps[-1].start + profile.steps[-1].seconds
    share = sum(c.host for c in profile.modules if c.module == "unet") / (end - begin)
    assert len(painted) / (800 - 210) == pytest.approx(share, abs=0.03)
    assert report.plot(Profile()).size[0] == 1600  # nothing to draw


def test_the_command_profiles_an_edit(tiny_folder: Path, tmp_path: Path) -> None:
    Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(tmp_path / "in.png")
    base = ["profile", str(tmp_path / "in.png"), "--prompt", "a cat", "--model", str(tiny_folder), "--backend", "torch",
            "--steps", "4", "--runs", "2"]  # fmt: skip
    result = CliRunner().invoke(main, [*base, "--output", str(tmp_path / "p.json"), "--trace", str(tmp_path / "t.json"),
                                       "--plot", str(tmp_path / "p.png"), "--launches"])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "unet" in result.output and "first run" in result.output
    found = json.loads((tmp_path / "p.json").read_text())
    assert len(found["runs"]) == 2 and found["launches"]["operators"] > 1000
    assert found["evaluations"]["invert"] == 4  # nothing was kept from the run before
    unet = next(m for m in found["modules"] if m["module"] == "unet")
    assert unet["samples"] == sum(found["evaluations"].values()) == sum(c["batch"] for c in found["module_calls"] if c["module"] == "unet")  # fmt: skip
    assert 0 <= found["outside_modules"] < found["total_seconds"] and found["peak_mib"] > 0
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert Image.open(tmp_path / "p.png").size[0] == 1600
    printed = json.loads(CliRunner().invoke(main, [*base, "--json"]).stdout)
    assert printed["backend"] == "torch" and printed["launches"] is None
