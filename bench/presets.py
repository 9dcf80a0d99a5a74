"""What the presets of ITO cost and do: the truth suite's held-out edits with each, and a table for docs/presets.md.

    python bench/presets.py --reader WEIGHTS [--n 100] [--backend onnx] [--write docs/presets.md]

Every case is a row of OUTPUT/PRESET/cases.csv, and the same command goes on from there. The edits are of a seed that no preset was chosen on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from common import Command, place, replace

from iedit.runtime.editor import Editor
from iedit.runtime.options import Options
from iedit.runtime.presets import PRESETS
from iedit.runtime.stage_cache import StageCache
from iedit.training import truth
from iedit.training.classifier import Classifier

COLUMNS = {
    "new": "edit is there",
    "l1_in": "L1 inside",
    "l1_out": "L1 outside",
    "mask_iou": "mask IoU",
    "evaluations": "evaluations",
    "seconds": "s",
}


def table(summaries: Mapping[str, list[dict[str, Any]]]) -> str:
    """Markdown: a row for each kind and preset, each figure with its 95 % interval where it has one."""

    def cell(one: Mapping[str, Any], name: str) -> str:
        low, value, high = (one[name + suffix] for suffix in ("_low", "", "_high"))
        if name == "new":
            return f"{value:.0%} ({low * 100:.0f}-{high * 100:.0f})"
        if name in ("evaluations", "seconds"):
            return f"{value:.0f}" if name == "evaluations" else f"{value:.2f}"
        digits = 4 if name == "l1_out" else 3
        return f"{value:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"

    lines = ["| edits | preset | " + " | ".join(COLUMNS.values()) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for kind in truth.KINDS:
        for name, summary in summaries.items():
            one = next(s for s in summary if s["kind"] == kind)
            lines.append(f"| {kind} ({one['n']}) | {name} | " + " | ".join(cell(one, c) for c in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


@click.command(cls=Command)
@click.option("--model", default="picturebook", show_default=True)
@click.option("--reader", required=True, type=click.Path(path_type=Path), help="Weights of `iedit train classifier`.")
@click.option("--backend", default="torch", show_default=True)
@click.option("--engines", default=None, help="Folder of exported engines. Default: the user's cache.")
@click.option("--n", "count", default=100, show_default=True, help="Edits of each kind.")
@click.option("--seed", default=0, show_default=True, help="Of the held-out edits; the presets were chosen on 31337.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("build/presets"), show_default=True)
@click.option("--write", type=click.Path(path_type=Path), default=None, help="A document whose table is replaced.")
def main(
    model: str, reader: Path, backend: str, engines: str | None, count: int, seed: int, output: Path, write: Path | None
) -> None:
    """Measure the presets."""
    if write is not None:
        place(write, "presets")
    editor = Editor.load(model, backend=backend, cache=StageCache(memory=0), engines=engines)
    judge, summaries = Classifier.load(reader), dict[str, list[dict[str, Any]]]()
    for name, preset in PRESETS.items():
        fields = (f.name for f in dataclasses.fields(Options))
        changed = {n: getattr(preset.options, n) for n in fields if getattr(preset.options, n) != getattr(Options(), n)}
        rows = truth.run(
            editor, judge, [truth.Method(name, "ito", truth.KINDS, changed)], truth.KINDS, count, settings=f"{editor.model.digest} {changed}", seed=seed,
            steps=preset.steps or 25, output=output / name, log=click.echo,
        )  # fmt: skip
        summaries[name] = truth.summarise(rows)
    text = table(summaries)
    click.echo(text)
    if write is not None:
        replace(write, "presets", text)


if __name__ == "__main__":
    main()
