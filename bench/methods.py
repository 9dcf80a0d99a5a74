"""Every method on held-out edits, and what the papers say of their order, from the rows of `iedit evaluate truth`: the tables of docs/results.md.

    iedit evaluate truth --n 300 --processes 2 --output build/results
    python bench/methods.py build/results/cases.csv [--write docs/results.md]

Nothing is edited and the rows are only read. Differences are paired: the same cases with both methods.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from common import FILE, Command, place, replace
from tables import table

from iedit.runtime.errors import UsageError
from iedit.training import metrics, truth
from iedit.training.workers import read_rows

Row = dict[str, Any]
COLUMNS = {
    "new": "edit is there", "old": "as old", "rest": "rest kept", "l1_in": "L1 inside", "l1_out": "L1 outside", "ssim_out": "SSIM outside",
    "mask_iou": "mask IoU", "evaluations": "evaluations",
}  # fmt: skip
_DIGITS = {"l1_in": 4, "l1_out": 4, "ssim_out": 4, "mask_iou": 3, "evaluations": 0}


@dataclass(frozen=True)
class Statement:
    """A paper's claim that one method has more of a figure than another.

    Attributes:
        where: it is made.
        more, less: the methods.
        name: of the figure, of `COLUMNS`.
        kinds: of edits, taken together.
    """

    where: str
    more: str
    less: str
    name: str
    kinds: tuple[str, ...] = truth.TEXT_KINDS


# ITO at the paper's lambda, where the rows have it, else as it is by default.
ITO, ITO_AT_PAPERS = "ito", "ito lambda=0.6"
STATEMENTS = (
    Statement("ITO, Table 1", ITO, "diffedit", "new"),
    Statement("ITO, Table 1", "diffedit", "p2p", "new"),
    Statement("ITO, Table 1", ITO, "p2p", "new"),
    Statement("ITO, Table 1", "diffedit", ITO, "old"),
    Statement("ITO, Table 1: L1, there of the whole picture", ITO, "diffedit", "l1_out"),
    Statement("ITO, section 4, Figs. 2 and 3", ITO, "controlnet-diffedit", "new", truth.LAYOUT_KINDS),
    Statement("ITO, section 4, Figs. 2 and 3", "controlnet", ITO, "l1_out", truth.LAYOUT_KINDS),
    Statement("iEdit, Table 1: SSIM-notM", "iedit", "sdedit", "ssim_out"),
)
LAMBDA_1 = "ito lambda=1"


def load(path: Path) -> list[Row]:
    """The rows of a truth suite's cases.csv.

    Raises:
        UsageError: there are none, or they are of several models, seeds or steps.
    """
    rows = read_rows(path, truth.WORDS, truth.WHOLE)
    if not rows:
        raise UsageError(f"{path}: no rows; `iedit evaluate truth --output DIR` writes them to DIR/cases.csv")
    needed = {*truth.WORDS, *truth.WHOLE, *COLUMNS}
    if not needed <= rows[0].keys():
        raise UsageError(f"{path}: no rows of the truth suite, {', '.join(sorted(needed - rows[0].keys()))} missing; give its cases.csv")  # fmt: skip
    if len({r["settings"] for r in rows}) > 1:
        raise UsageError(
            f"{path}: rows of several settings; run `iedit evaluate truth` again, which keeps those of one"
        )
    return rows


def paired(rows: Sequence[Row], a: str, b: str, name: str, kinds: Sequence[str]) -> tuple[int, float, float, float]:
    """Figure of `a` less that of `b` over cases that both have, as many of each of the kinds: their number, the mean, its 95 % bootstrap interval."""
    changes = []
    for kind in kinds:
        first, second = ({r["number"]: r[name] for r in rows if (r["method"], r["kind"]) == (m, kind)} for m in (a, b))
        changes.append([first[case] - second[case] for case in sorted(first.keys() & second.keys())])
    few = min(len(some) for some in changes)
    together = [c for some in changes for c in some[:few]]
    return len(together), sum(together) / len(together) if together else float("nan"), *metrics.bootstrap(together)


def _number(name: str, value: float, sign: bool = False) -> str:
    plus = "+" if sign else ""
    return f"{100 * value:{plus}.1f} %" if name in truth.SHARES else f"{value:{plus}.{_DIGITS[name]}f}"


def _interval(name: str, value: float, low: float, high: float, sign: bool = False) -> str:
    if value != value:
        return "-"
    shown = [_number(name, v, sign) for v in (value, low, high)]
    return shown[0] if name == "evaluations" else f"{shown[0]} ({shown[1]} to {shown[2]})"


def methods_table(rows: Sequence[Row]) -> str:
    """A line for each kind and method; and for text edits together where a method has as many of each kind."""
    summary = {(one["kind"], one["method"]): one for one in truth.summarise(rows)}
    lines = []
    for (kind, method), one in summary.items():
        each = {summary.get((k, method), {}).get("n") for k in truth.TEXT_KINDS}
        if kind in truth.KINDS or (kind == "text" and len(each) == 1):
            cells = [_interval(n, one[n], one[n + "_low"], one[n + "_high"]) for n in COLUMNS]
            lines.append([kind, method, str(one["n"]), *cells])
    return table(["edits", "method", "n", *COLUMNS.values()], lines)


def _of_rows(rows: Sequence[Row]) -> Iterator[Statement]:
    """The statements whose methods the rows have."""
    there = {(r["method"], k) for r in rows for k in truth.KINDS if r["kind"] == k}
    for s in STATEMENTS:
        for ito in (ITO, ITO_AT_PAPERS) if ITO in (s.more, s.less) else (ITO,):
            more, less = (ito if m == ITO else m for m in (s.more, s.less))
            if all((m, k) in there for m in (more, less) for k in s.kinds):
                yield Statement(s.where, more, less, s.name, s.kinds)


def statements_table(rows: Sequence[Row]) -> str:
    """Each statement with the paired difference that it is about: confirmed or refuted where the interval excludes 0, else undecided."""
    lines = []
    for s in _of_rows(rows):
        count, value, low, high = paired(rows, s.more, s.less, s.name, s.kinds)
        said = "**confirmed**" if low > 0 else "**refuted**" if high < 0 else "undecided"
        kinds = "text" if s.kinds == truth.TEXT_KINDS else "layouts"
        lines.append([s.where, f"{COLUMNS[s.name]}: {s.more} > {s.less}", kinds, str(count), _interval(s.name, value, low, high, True), said])  # fmt: skip
    return table(["paper", "statement", "edits", "pairs", "difference", "here"], lines)


def lambda_table(rows: Sequence[Row]) -> str:
    """Lambda 1 less lambda 0.6, and the lambda that is chosen by the mask less either, for each text kind; "" where the rows lack one of them."""
    if not {LAMBDA_1, ITO_AT_PAPERS, ITO} <= {r["method"] for r in rows}:
        return ""
    lines = []
    for more, less in ((LAMBDA_1, ITO_AT_PAPERS), (ITO, ITO_AT_PAPERS), (ITO, LAMBDA_1)):
        for kind in truth.TEXT_KINDS:
            found = {n: paired(rows, more, less, n, (kind,)) for n in COLUMNS}
            cells = (_interval(n, *f[1:], sign=True) for n, f in found.items())
            lines.append([f"{more} less {less}", kind, str(found["new"][0]), *cells])
    return table(["same cases", "edits", "pairs", *COLUMNS.values()], lines)


def document(rows: Sequence[Row]) -> str:
    """Everything between the marks."""
    parts = [
        f"Rows of `{rows[0]['settings']}`.",
        methods_table(rows),
        "### What the papers say of the order",
        statements_table(rows),
    ]
    by_lambda = lambda_table(rows)
    parts += ["### Lambda 1, lambda 0.6, and the one that is chosen", by_lambda] if by_lambda else []
    return "\n\n".join(parts) + "\n"


@click.command(cls=Command)
@click.argument("rows", type=FILE)
@click.option("--write", type=FILE, default=None, help="A document whose tables are replaced.")
def main(rows: Path, write: Path | None) -> None:
    """Tables of ROWS, a cases.csv of `iedit evaluate truth`."""
    if write is not None:
        place(write, "results")
    text = document(load(rows))
    click.echo(text)
    if write is not None:
        replace(write, "results", text)


if __name__ == "__main__":
    main()
