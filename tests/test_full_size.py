"""The real size: a checkpoint of SD 1.5's shapes loads from a folder and edits on a machine without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


def _script(root: Path, *words: str) -> str:
    """In a process of its own: what pytest holds does not count, and the weights are gone when it ends."""
    environment = os.environ | {"PYTHONPATH": str(root / ".types")}
    command = [sys.executable, str(root / "bench" / "full_size.py"), *words]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.fixture
def checkpoint(root: Path, tmp_path: Path) -> Iterator[Path]:
    if shutil.disk_usage(tmp_path).free < 4 << 30:
        pytest.skip("needs 4 GB of disk")
    folder = tmp_path / "full-size"
    _script(root, "write", str(folder))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_full_size_checkpoint_edits_with_a_controlnet_within_22_gib(root: Path, checkpoint: Path) -> None:
    assert sum(p.stat().st_size for p in checkpoint.rglob("*.safetensors")) > 2.8e9  # 1.43 G parameters of 2 bytes
    found = json.loads(_script(root, "edit", str(checkpoint)))
    assert found["finite"]
    assert 0 < found["deviation"] < 100
    assert found["size"] == [256, 256]
    assert found["latent"] == [4, 32, 32]
    assert found["peak_mib"] < 22 * 1024
    # 2 seeds x 2 conditions, guided because their layouts differ; 2 steps each of 1 to invert and 2 with guidance.
    assert found["profile"]["evaluations"] == {
        "encode": 0,
        "mask": 8,
        "invert": 2,
        "guidance": 4,
        "invert-guidance": 2,
        "final": 4,
        "decode": 0,
    }
