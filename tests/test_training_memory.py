"""Memory of fine-tuning: what counts bytes is held to allocations whose size is known; a step of the real size runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

MIB = 1 << 20


@pytest.fixture
def alive(bench: Callable[[str], Any]) -> Any:
    return bench("training_memory").Alive()


def test_storages_are_counted_once_and_leave_with_their_last_tensor(alive: Any) -> None:
    with alive:
        a = torch.zeros(MIB, dtype=torch.uint8)
        view = a.view(4, -1)[1]
        assert alive.now == MIB
        b = torch.cat([a, a])
        assert alive.now == 3 * MIB
        del a
        assert alive.now == 3 * MIB  # the view holds it
        del view, b
        assert alive.now == 0 and alive.peak == 3 * MIB


def test_checkpointing_is_seen_to_hold_less(bench: Callable[[str], Any]) -> None:
    layers = [
        torch.nn.Sequential(*(m for _ in range(4) for m in (torch.nn.Linear(64, 64), torch.nn.GELU())))
        for _ in range(4)
    ]

    def peak(saving: bool) -> int:
        with bench("training_memory").Alive() as counted:
            x = torch.zeros(4096, 64, requires_grad=True)
            y = x
            for layer in layers:
                y = checkpoint(layer, y, use_reentrant=False) if saving else layer(y)
            y.sum().backward()
        return int(counted.peak)

    unit = 4096 * 64 * 4  # an activation
    # Without it: the input and two activations of each of 16 layers; with it the segments' ends and one segment's inside.
    assert peak(False) >= 33 * unit
    assert peak(True) <= 18 * unit


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_step_of_sd_1_4_s_shapes_runs_on_a_cpu_and_is_counted_under_16_gib(root: Path, tmp_path: Path) -> None:
    def script(what: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(root / ".types")}
        command = [sys.executable, str(root / "bench" / "training_memory.py"), what, str(tmp_path / f"{what}.csv")]
        return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout

    lines = script("count").splitlines()
    peaks = {line.partition(":")[0]: float(line.partition(":")[2].split()[0]) for line in lines}
    both = peaks["checkpointing, memory-efficient attention"]
    assert both < 16 and all(both < other for name, other in peaks.items() if not name.startswith("checkpointing, "))
    words = script("step").replace(",", "").split()
    assert all(0 < float(words[words.index("loss") + 2 + i]) < 10 for i in (0, 3)), words
    assert len((tmp_path / "step.csv").read_text().splitlines()) == 2
