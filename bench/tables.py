"""The README's tables of measurements, generated from `bench/results.csv`: `python bench/tables.py` rewrites them.

Of rows that measure the same thing the last one counts. A test compares the README with what this makes of the CSV.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results -->", "<!-- /results -->"
Row = dict[str, str]


def latest(rows: list[Row]) -> list[Row]:
    """The last row of each measurement, in the order in which they first came; of kernels on any GPU."""
    last: dict[tuple[str, ...], Row] = {}
    for row in rows:
        on_gpu = row["name"].startswith("kernels/") and row["device"] != "cpu"
        last[(*(row[k] for k in ("name", "variant", "shape", "dtype")), "gpu" if on_gpu else row["device"])] = row
    return list(last.values())


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def seconds(text: str, unit: str) -> str:
    value = float(text) * {"": 1, "s": 1, "us": 1e-6}[unit]
    return f"{value:.2f} s" if value >= 0.1 else f"{1e3 * value:.2f} ms" if value >= 1e-4 else f"{1e6 * value:.1f} us"


def spread(row: Row) -> str:
    low, middle, high = (seconds(row[k], row["unit"]) if row[k] else "" for k in ("p20", "p50", "p80"))
    return f"{middle} ({low}-{high})" if low else middle


def shown(row: Row) -> bool:
    """Of the kernels' rows on each device, only those of one shape and dtype, on a GPU of a large shape too; those of networks in bfloat16."""
    if row["name"].startswith(("kernels/group_norm", "kernels/geglu")):
        return row["dtype"] == "bfloat16"
    shapes = ("8x4x64x64",) if row["device"] == "cpu" else ("8x4x64x64", "64x4x128x128")
    return not row["name"].startswith("kernels/") or (row["shape"] in shapes and row["dtype"] == "float32")


def render(rows: list[Row]) -> str:
    """All tables, markdown; a heading for each group that has rows."""
    rows = latest(rows)
    parts = []
    for prefix, title in (("edit/", "ITO text edits, warm, A B A B in one process"), ("kernels/", "Kernels, 8 latents in float32, on a GPU 64 too, those of networks in bfloat16; the other shapes and dtypes are in bench/results.csv"),
                          ("full-size/", "Stable Diffusion 1.5's shapes, random weights, without a GPU")):  # fmt: skip
        group = [r for r in rows if r["name"].startswith(prefix) and shown(r)]
        if group:
            lines = [
                [
                    r["name"].removeprefix(prefix),
                    r["variant"],
                    r["shape"],
                    r["dtype"],
                    r["device"],
                    spread(r),
                    r["quality"],
                ]
                for r in group
            ]
            parts.append(
                f"**{title}**\n\n"
                + table(["what", "how", "shape", "dtype", "device", "median (20-80 %)", "beside it"], lines)
            )
    return "\n\n".join(parts)


def rewrite(text: str, rows: list[Row]) -> str:
    """`text` with what lies between the two marks replaced."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{render(rows)}\n{END}{after}"


def read(path: Path = ROOT / "bench" / "results.csv") -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    readme = ROOT / "README.md"
    made = rewrite(readme.read_text(), read())
    if "--check" in sys.argv:
        sys.exit(
            "README.md is not what bench/results.csv says: run python bench/tables.py"
            if made != readme.read_text()
            else 0
        )
    readme.write_text(made)
