"""Work in processes that end, and rows that come back."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from iedit.runtime.errors import RunError, UsageError
from iedit.training import workers


def test_rows_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cases.csv").write_text("method,l1\nito,wide\n")
    with pytest.raises(UsageError, match=r"cases.csv: these are no rows of an evaluation.*give another --output"):
        workers.read_rows(tmp_path / "cases.csv", ("method",))


def _load(fail: bool = False) -> int:
    if fail:
        raise UsageError("no such model")
    return os.getpid()


def _work(state: int, job: int) -> tuple[int, int, int]:
    if job < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return state, torch.get_num_threads(), job * job


def test_in_processes_the_results_are_the_same_and_what_goes_wrong_is_said(
    forked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Five processes, started as ever, but from one that has imported torch.
    context = forked.context()
    monkeypatch.setattr("multiprocessing.get_context", lambda _: context)
    assert [r[2] for _, r in workers.spread(_load, _work, [3, 4])] == [9, 16]
    assert list(workers.spread(functools.partial(_load, True), _work, [])) == []  # nothing is loaded for nothing
    found = dict(workers.spread(_load, _work, range(8), 2))
    assert {n: r[2] for n, r in found.items()} == {n: n * n for n in range(8)}
    assert os.getpid() not in {r[0] for r in found.values()}
    with pytest.raises(UsageError, match="no such model"):
        list(workers.spread(functools.partial(_load, True), _work, [1], 2))
    with pytest.raises(RunError, match=r"a process was killed.*the same command goes on"):
        list(workers.spread(_load, _work, [-1, -1], 2))


def test_the_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\nfrom pathlib import Path\nfrom iedit.training import workers\n"
        "def load():\n    return None\n"
        "def work(state, job):\n    Path(sys.argv[1], str(os.getpid())).touch()\n    time.sleep(600)\n"
        "if __name__ == '__main__':\n    list(workers.spread(load, work, [0, 1], 2))\n"
    )
    began = tmp_path / "began"
    began.mkdir()
    parent = subprocess.Popen([sys.executable, str(script), str(began)])
    end = time.monotonic() + 120
    while len(list(began.iterdir())) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    workers = [int(p.name) for p in began.iterdir()]
    assert len(workers) == 2
    parent.kill()
    parent.wait()

    def alive(pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

    while any(map(alive, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(alive, workers))
