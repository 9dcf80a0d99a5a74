"""The benchmark scripts run, and what they name is there."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

from iedit.runtime.cli.demo import COLUMNS


def _run(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(root / ".types"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240)


def test_the_kernel_benchmark_runs_on_a_cpu_and_writes_whole_rows(root: Path, tmp_path: Path) -> None:
    table = tmp_path / "results.csv"
    script = str(root / "bench" / "kernels.py")
    done = _run(root, sys.executable, script, "--quick", "--device", "cpu", "--table", str(table))
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(table.open(newline="")))
    assert tuple(rows[0]) == COLUMNS
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


def test_the_gpu_script_is_sound_and_names_files_that_are_there(root: Path) -> None:
    script = root / "bench" / "gpu.sh"
    assert _run(root, "bash", "-n", str(script)).returncode == 0
    assert os.access(script, os.X_OK)
    text = script.read_text()
    named = set(re.findall(r"\b(?:bench|tests)/[\w./]+\.\w+", text)) - {"bench/gpu.sh", "bench/results.csv"}
    assert {"bench/kernels.py", "bench/edit.py"} <= named
    assert all((root / name).is_file() for name in named), named
    assert text.count("timeout 600") == 3  # each step
    wrong = _run(root, "bash", str(script), "everything")
    assert wrong.returncode == 2 and "give tests, kernels, edit or all" in wrong.stderr
    any_gpu = any("pytest.mark.gpu" in path.read_text() for path in (root / "tests").glob("test_*.py"))
    assert any_gpu


def test_the_edit_benchmark_runs_and_its_plain_composition_makes_the_same_edit(root: Path, tmp_path: Path) -> None:
    table = tmp_path / "results.csv"
    script = str(root / "bench" / "edit.py")
    done = _run(root, sys.executable, script, "--edits", "2", "--rounds", "1", "--steps", "6", "--backends", "torch,xformers",
                "--skip-missing", "--output", str(table))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "xformers is left out" in done.stderr or "xformers attention" in done.stdout
    rows = {r["variant"].split(",")[0]: r for r in csv.DictReader(table.open(newline=""))}
    assert {"naive", "torch", "diffusers DiffEdit", "diffusers Img2Img"} <= set(rows)
    found = re.match(r"naive / this ([\d.]+), mask IoU ([\d.]+) and L1 ([\d.]+) to naive", rows["torch"]["quality"])
    assert found and float(found[2]) >= 0.98 and float(found[3]) <= 0.005
    assert int(rows["naive"]["evaluations"]) > int(rows["torch"]["evaluations"]) > 0


def test_the_readme_s_tables_are_what_the_results_say(root: Path) -> None:
    done = _run(root, sys.executable, str(root / "bench" / "tables.py"), "--check")
    assert done.returncode == 0, done.stderr


def test_tables_keep_the_last_row_of_a_measurement() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("tables", Path(__file__).parent.parent / "bench" / "tables.py")
    assert spec and spec.loader
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    base = dict.fromkeys(COLUMNS, "") | {
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
