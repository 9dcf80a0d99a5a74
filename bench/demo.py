"""The shipped sample edits as rows of results, one for each stage: `python bench/demo.py [--sheet edits.png] [--table bench/results.csv]`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from results import append_rows

from iedit.runtime.cli.demo import run_demo
from iedit.runtime.editor import Editor


def rows_of(figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every edit and stage, and one for every edit as a whole, of what `run_demo` returns."""
    rows = []
    for f in figures:
        total = {"total": sum(f["seconds"].values())}
        for stage, seconds in (f["seconds"] | total).items():
            count = sum(f["evaluations"].values()) if stage == "total" else f["evaluations"].get(stage, 0)
            rows.append(
                {
                    "name": f"demo/{f['name']}/{stage}",
                    "shape": f"{f['size'][0]}x{f['size'][1]}",
                    "p50": round(seconds, 4),
                    "peak_mib": round(f["peak_mib"]),
                    "evaluations": count,
                    "quality": f"mask area {f['mask_area']:.3f}",
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sheet", type=Path, default=Path("demo/edits.png"))
    parser.add_argument("--table", type=Path, default=Path(__file__).parent / "results.csv")
    options = parser.parse_args()
    editor = Editor.load(backend="torch")
    rows = rows_of(run_demo(options.sheet, editor=editor))
    append_rows(options.table, rows, editor)
    print(f"{options.table}: {len(rows)} rows added")


if __name__ == "__main__":
    main()
