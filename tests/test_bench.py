"""The benchmark scripts run, and what they name is there."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

from iedit.runtime.demo import COLUMNS


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
    assert {("kernels/ito_step k=1", "autograd + Adam"), ("kernels/guided_step", "eager closed form")} <= found
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
    named = set(re.findall(r"\b(?:bench|tests)/[\w./]+\.\w+", text)) - {"bench/gpu.sh"}
    guarded = set(re.findall(r"\[\[ -f (\S+) \]\]", text))
    assert "bench/kernels.py" in named
    assert all((root / name).is_file() for name in named - guarded), named
    assert text.count("timeout 600") == 3  # each step
    wrong = _run(root, "bash", str(script), "everything")
    assert wrong.returncode == 2 and "give tests, kernels, edit or all" in wrong.stderr
    any_gpu = any("pytest.mark.gpu" in path.read_text() for path in (root / "tests").glob("test_*.py"))
    assert any_gpu
