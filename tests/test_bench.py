"""The benchmark scripts run, and what they name is there."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iedit.runtime.errors import UsageError
from iedit.runtime.model.checkpoint import picturebook_folder
from iedit.training import truth


def _run(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(root / ".types"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240)


def test_the_kernel_benchmark_runs_on_a_cpu_and_writes_whole_rows(
    root: Path, tmp_path: Path, bench: Callable[[str], Any]
) -> None:
    table = tmp_path / "results.csv"
    script = str(root / "bench" / "kernels.py")
    done = _run(root, sys.executable, script, "--quick", "--device", "cpu", "--table", str(table))
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(table.open(newline="")))
    assert tuple(rows[0]) == bench("results").COLUMNS
    found = {(r["name"], r["variant"]) for r in rows}
    assert {
        ("kernels/ito_step clipped k=1", "autograd"),
        ("kernels/ito_step adam k=1", "autograd"),
        ("kernels/guided_step", "eager closed form"),
    } <= found
    for row in rows:
        assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        quality = re.fullmatch(
            r"([\d.]+) GB/s needed bytes, ([\d.]+) of copy; (\d+) launches; max error .*", row["quality"]
        )
        assert quality and int(quality[3]) >= 10


@pytest.fixture
def bare(root: Path, tmp_path: Path) -> dict[str, str]:
    """An environment in which packages that a bare machine lacks cannot be found."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "GONE = {'diffusers', 'rich', 'tensorrt', 'xformers', 'importlib_metadata', 'onnxruntime'}\n"
        "class Finder(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        return None if name.partition('.')[0] in GONE else super().find_spec(name, path, target)\n"
        "sys.meta_path[:] = [Finder if f is PathFinder else f for f in sys.meta_path]\n"
    )
    return os.environ | {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{root / '.types'}"}


def test_the_gpu_script_ends_well_on_a_bare_machine_and_says_what_was_not_run_and_why(
    root: Path, tmp_path: Path, bare: dict[str, str], bench: Callable[[str], Any]
) -> None:
    script, work = root / "bench" / "gpu.sh", tmp_path / "work"
    assert os.access(script, os.X_OK)

    def run(*calls: tuple[str, ...]) -> list[tuple[str, int]]:
        """What each call of the script prints and returns, all in one process: nine tenths of a call that runs nothing are the import of torch."""
        program = (
            "import sys; sys.path.insert(0, 'bench'); import gpu\n"
            "for words in eval(sys.argv[2]):\n"
            "    try: code = gpu.main(['--work', sys.argv[1], *words])\n"
            "    except SystemExit as end: code = end.code\n"
            "    print(f'=== {code}', flush=True)\n"
        )
        command = [sys.executable, "-c", program, str(work), repr(calls)]
        done = subprocess.run(command, cwd=root, env=bare, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
        said = re.findall(r"(.*?)^=== (\d+)$", done.stdout, flags=re.DOTALL | re.MULTILINE)
        assert len(said) == len(calls), done.stdout
        return [(text, int(code)) for text, code in said]

    # On a CPU what can start is started: the benchmark, and the collection of the GPU tests, whose modules miss diffusers.
    plain, rehearsed, again, unknown = run(
        (), ("--rehearse", "kernels", "tests", "edit", "tensorrt"), ("--rehearse", "kernels"), ("everything",)
    )
    assert plain[1] == 0, plain
    lines = dict(line.split(": ", 1) for line in plain[0].splitlines()[-4:])
    assert lines["ran"] == lines["failed"] == lines["fell short"] == "nothing"
    assert all(f"{s.name} (no CUDA device)" in lines["not run"] for s in bench("gpu").STEPS)

    assert rehearsed[1] == 0, rehearsed[0]
    lines = dict(line.split(": ", 1) for line in rehearsed[0].splitlines()[-4:])
    assert re.fullmatch(r"tests \(\d+ s\); kernels \(\d+ s\)", lines["ran"])
    assert "edit (diffusers, rich not installed)" in lines["not run"] and "tensorrt (diffusers, " in lines["not run"]
    assert len(bench("gpu").rows_of(work / "rehearsal.csv")) >= 5
    assert "ran: kernels (before)" in again[0] and "---" not in again[0]
    assert unknown[1] == 2


def test_a_step_that_fails_or_is_late_does_not_keep_the_next_from_running_and_what_falls_short_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bench: Callable[[str], Any]
) -> None:
    gpu = bench("gpu")
    row = dict.fromkeys(bench("results").COLUMNS, "") | {
        "name": "kernels/x", "variant": "Triton", "shape": "64x4x64x64", "p50": "9", "quality": "9 GB/s needed bytes, 0.3 of copy",
    }  # fmt: skip
    program = tmp_path / "write.py"
    program.write_text(
        f"import csv, sys\nw = csv.DictWriter(open(sys.argv[1], 'w', newline=''), {list(row)!r})\nw.writeheader()\nw.writerow({row!r})\n"
    )
    late = tmp_path / "late.py"
    late.write_text("import time\ntime.sleep(60)\n")
    wrong = tmp_path / "wrong.py"
    wrong.write_text("raise SystemExit(3)\n")
    steps = (
        gpu.Step("wrong", (), (), (str(wrong),), 1),
        gpu.Step("late", (), (), (str(late),), 0.01),
        gpu.Step("writes", (), (), (f"{program} {{table}}",), 1, gpu.kernel_aim),
    )
    monkeypatch.setattr(gpu, "STEPS", steps)
    assert gpu.main(["--rehearse", "--work", str(tmp_path / "work")]) == 1
    said = capsys.readouterr().out
    assert "failed: wrong failed with exit code 3" in said and "; late took longer than its 0.01 minutes" in said
    assert "ran: writes (0 s)" in said
    assert "fell short: kernels/x Triton 64x4x64x64 : 0.3 of a copy, aim 0.8" in said
    edit = row | {"name": "edit/x", "variant": "compile, 1 threads", "shape": "512x512", "p50": "1.25",
                  "quality": "naive / this 3.10, mask IoU 1.000 and L1 0.0001 to naive, 4.5% outside the networks"}  # fmt: skip
    assert gpu.edit_aim(edit) == "1.25 s, aim 0.8; 3.1 times naive, aim 4; 4.5 % outside the networks, aim 3"
    assert gpu.edit_aim(edit | {"p50": "0.5", "quality": "naive / this 4.10, 2.9% outside the networks"}) == ""
    memory = row | {"variant": "checkpointing, memory-efficient attention", "peak_mib": "17000"}
    assert "aim 15258" in gpu.memory_aim(memory) and gpu.memory_aim(memory | {"peak_mib": "9000"}) == ""


def test_the_edit_benchmark_runs_and_its_plain_composition_makes_the_same_edit(
    root: Path, tmp_path: Path, tiny_folder: Path, forked: Any
) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    shutil.copy(picturebook_folder() / "iedit.json", model)  # what it recommends must not make the two differ
    table, folder = tmp_path / "results.csv", root / "bench"
    words = ["--model", model, "--size", 64, "--edits", 2, "--rounds", 1, "--steps", 6, "--backends", "torch,xformers", "--skip-missing",
             "--output", table]  # fmt: skip
    script = forked.Program((folder / "edit.py").read_text(), words, path=[folder])  # a script finds those beside it
    said, wrong = script.finish(240)

    assert script.returncode == 0, wrong
    assert "xformers is left out" in wrong or "xformers attention" in said
    rows = {r["variant"].split(",")[0]: r for r in csv.DictReader(table.open(newline=""))}
    assert {"naive", "torch", "diffusers DiffEdit", "diffusers Img2Img"} <= set(rows)
    found = re.match(r"naive / this ([\d.]+), mask IoU ([\d.]+) and L1 ([\d.]+) to naive", rows["torch"]["quality"])
    assert found and float(found[2]) >= 0.98 and float(found[3]) <= 0.005
    assert int(rows["naive"]["evaluations"]) > int(rows["torch"]["evaluations"]) > 0


def test_the_edit_benchmark_takes_the_kinds_of_edits_in_turn(bench: Callable[[str], Any]) -> None:
    asked, cases = bench("edit").requests_of("picturebook", 512, 5, 6)
    kinds = len(truth.TEXT_KINDS)
    assert [c.kind for c in cases] == [truth.TEXT_KINDS[i % kinds] for i in range(5)]
    assert len({c.source.tobytes() for c in cases}) == 5
    for request, case in zip(asked, cases, strict=True):
        assert (request.prompt, request.source_prompt, request.steps) == (case.prompts[1], case.prompts[0], 6)
        assert request.image is case.source and request.image.size == (128, 128)


def test_the_readme_s_tables_are_what_the_results_say(root: Path) -> None:
    done = _run(root, sys.executable, str(root / "bench" / "tables.py"), "--check")
    assert done.returncode == 0, done.stderr


def test_tables_keep_the_last_row_of_a_measurement(bench: Callable[[str], Any]) -> None:
    tables = bench("tables")
    base = dict.fromkeys(bench("results").COLUMNS, "") | {
        "name": "edit/x",
        "variant": "torch",
        "p20": "1",
        "p80": "3",
        "quality": "good",
    }
    text = tables.rewrite(
        f"a {tables.BEGIN} old {tables.END} b",
        [base | {"p50": "2"}, base | {"name": "other", "p50": "5"}, base | {"p50": "0.0021"}],
    )
    assert text.startswith("a ") and text.endswith(" b") and " old " not in text
    kernel = base | {"name": "kernels/x", "unit": "us", "p50": "250", "p20": "", "dtype": "float32"}
    rows = [kernel | {"shape": "8x4x64x64"}, kernel | {"shape": "1x4x64x64", "p50": "70"}]
    assert "0.25 ms |" in tables.render(rows) and "70" not in tables.render(rows)
    assert "2.10 ms (1.00 s-3.00 s)" in text and "2.00 s (" not in text and "5.00" not in text


# --- rows of results ----------------------------------------------------------------------------------------------


def test_rows_of_the_demo_are_appended_whole_and_earlier_ones_are_kept(
    bench: Callable[[str], Any], tiny: Any, tmp_path: Path
) -> None:
    from iedit.runtime.backends.eager import TorchBackend
    from iedit.runtime.editor import Editor

    table, demo, results = tmp_path / "results.csv", bench("demo"), bench("results")
    figures = [
        {"name": name, "seconds": {"encode": 0.5, "final": 1.5}, "evaluations": {"encode": 0, "final": 50},
         "peak_mib": 99.6, "mask_area": 0.25, "size": (32, 32)}
        for name in ("recolour", "new pose")
    ]  # fmt: skip
    results.append_rows(table, demo.rows_of(figures), Editor(tiny, TorchBackend(tiny)))
    first = table.read_text()
    results.append_rows(table, demo.rows_of(figures), Editor(tiny, TorchBackend(tiny)))
    both = table.read_text()
    assert both.startswith(first) and len(both) > len(first)
    rows = list(csv.DictReader(both.splitlines()))
    assert len(rows) == 2 * 2 * 3 and tuple(rows[0]) == results.COLUMNS
    for row in rows:
        assert row["name"].startswith("demo/") and row["shape"] == "32x32" and row["dtype"] == "float32"
        assert None not in row and all(row[c] for c in results.COLUMNS if c not in ("p20", "p80", "commit"))
    total = next(r for r in rows if r["name"] == "demo/new pose/total")
    assert (total["p50"], total["evaluations"], total["peak_mib"]) == ("2.0", "50", "100")


def test_a_table_of_other_columns_is_left_alone(bench: Callable[[str], Any], tmp_path: Path) -> None:
    table = tmp_path / "results.csv"
    table.write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="its columns are not those"):
        bench("results").write_rows(table, [{"name": "new"}])
    assert table.read_text() == "a,b\n1,2\n"


def test_a_table_without_commits_gets_an_empty_one_and_keeps_its_rows(
    root: Path, tmp_path: Path, bench: Callable[[str], Any]
) -> None:
    results = bench("results")
    table = tmp_path / "results.csv"
    before = [c for c in results.COLUMNS if c != "commit"]
    old = {c: f"{c}, quoted" for c in before}
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, before)
        writer.writeheader()
        writer.writerow(old)
    for _ in range(2):
        results.write_rows(table, [{"name": "new"}])
    rows = list(csv.DictReader(table.open(newline="")))
    assert rows[0] == old | {"commit": ""}
    assert [r["name"] for r in rows[1:]] == ["new", "new"] and rows[1]["date"]
    assert rows[1]["commit"] == results.commit()
    if (root / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{7,}\+?", results.commit())
    shipped = list(csv.DictReader((root / "bench" / "results.csv").open(newline="")))
    assert shipped and all(tuple(row) == results.COLUMNS and None not in row.values() for row in shipped)
