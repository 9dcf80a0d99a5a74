"""Seconds of an edit with each preset, one at a time, on several backends in one run, and a table for docs/presets.md.

    python bench/preset_seconds.py [--backends torch,onnx] [--engines DIR] [--rounds 5] [--write docs/presets.md]

Presets and backends take turns within a round, so that a machine that slows down slows all of them alike; a first round is not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from common import FILE, FOLDER, Command, place, replace
from tables import table

from iedit.runtime import BACKENDS
from iedit.runtime.cli.params import use_threads
from iedit.runtime.editor import Editor
from iedit.runtime.errors import UsageError
from iedit.runtime.presets import PRESETS, with_preset
from iedit.runtime.stage_cache import StageCache
from iedit.training import truth

KINDS = {"thing": "thing", "background": "sky or ground", "pose": "pose"}
SEED = 3  # of the held-out edits, a new one in every round
REFERENCE = "exact"
STEPS = 25  # of a preset that leaves them open
Seconds = dict[tuple[str, str, str], list[float]]


def measure(editors: Mapping[str, Any], rounds: int) -> Seconds:
    """(kind, preset, backend) -> seconds of an edit in each round.

    Args:
        editors: backend -> the editor that runs on it, without a cache.
        rounds: that count, at least 1.
    """
    found: Seconds = {}
    for number in range(rounds + 1):
        for kind in KINDS:
            case = truth.edit_cases(kind, number + 1, SEED)[number]
            for preset, asked in PRESETS.items():
                for backend, editor in editors.items():
                    plain = truth.edit_request(case, truth.METHODS["ito"], number, asked.steps or STEPS)
                    request = with_preset(plain, preset)
                    began = time.perf_counter()
                    editor.edit_many([request])
                    if number:
                        found.setdefault((kind, preset, backend), []).append(time.perf_counter() - began)
    return found


def render(found: Seconds, backends: Sequence[str]) -> str:
    """Markdown: medians with their range, and how many times shorter than `REFERENCE` on the same backend."""
    rows = []
    for kind, says in KINDS.items():
        for preset in PRESETS:
            cells = []
            for backend in backends:
                seconds, whole = found[kind, preset, backend], found[kind, REFERENCE, backend]
                middle = statistics.median(seconds)
                cells.append(f"{middle:.2f} ({min(seconds):.2f}-{max(seconds):.2f})")
                cells.append(f"{statistics.median(whole) / middle:.2f}")
            rows.append([says, preset, *cells])
    heads = [name for b in backends for name in (f"{b}, s", f"{REFERENCE} / this")]
    return table(["edits", "preset", *heads], rows) + "\n"


@click.command(cls=Command)
@click.option("--model", default="picturebook", show_default=True)
@click.option("--backends", default="torch,onnx", show_default=True, help="Comma-separated.")
@click.option("--engines", type=FOLDER, default=None, help="Folder of exported engines. Default: the user's cache.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Edits of each kind.")
@click.option("--write", type=FILE, default=None, help="A document whose table is replaced.")
def main(model: str, backends: str, engines: Path | None, rounds: int, write: Path | None) -> None:
    """Measure how long an edit takes with each preset."""
    if write is not None:
        place(write, "preset-seconds")
    names = backends.split(",")
    for name in names:
        if name not in BACKENDS or names.count(name) > 1:
            raise UsageError(f"--backends: {name!r}, expected different ones of {', '.join(BACKENDS)}")
    use_threads()
    made = {
        name: Editor.load(
            model, backend=name, cache=StageCache(memory=0), engines=None if engines is None else str(engines)
        )
        for name in names
    }
    text = render(measure(made, rounds), names)
    click.echo(text)
    if write is not None:
        replace(write, "preset-seconds", text)


if __name__ == "__main__":
    main()
