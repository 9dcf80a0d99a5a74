"""How the command line looks and helps: options in groups, suggestions for what was mistyped, tables on narrow terminals."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import click

# Heading -> its options, in the order in which they are shown. An option that is in none comes last, under "Other".
GROUPS = {
    "Common": ("--prompt", "--source-prompt", "--method", "--lambda", "--steps", "--seed", "--count", "--guidance-scale",
               "--negative-prompt", "--resize", "--model"),
    "Masks": ("--mask", "--mask-mode", "--mask-threshold", "--mask-strength", "--mask-seeds", "--composite"),
    "Layouts": ("--layout", "--source-layout", "--controlnet", "--control-scale"),
    "Of single methods": ("--t-u", "--k", "--update", "--refine", "--ratio", "--cross-replace", "--self-replace",
                          "--replacement", "--reweight", "--inversion-correction", "--source-guidance-scale", "--image-guidance-scale"),
    "Speed": ("--preset", "--guidance-until", "--guidance-path", "--timestep-spacing", "--backend", "--engines", "--trust-engines", "--device", "--dtype", "--attention", "--channels-last", "--cache"),
    "Output": ("--output", "--overwrite", "--no-receipt", "--stages", "--profile", "--json", "--runs", "--trace", "--plot",
               "--launches", "--help"),
}  # fmt: skip


def suggestion(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for the closest of the known words, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


class Choice(click.Choice[str]):
    """click's choice, with a suggestion for a mistyped one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            message = f"{error.message.rstrip('.')}.{suggestion(str(value), self.choices)}"
            raise click.BadParameter(message, ctx=ctx, param=param) from None


class Grouped(click.Command):
    """A command whose help shows its options in `GROUPS`."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        left = {
            max(p.opts, key=len): p.get_help_record(ctx) for p in self.get_params(ctx) if isinstance(p, click.Option)
        }
        for heading, names in {**GROUPS, "Other": tuple(left)}.items():
            rows = [row for name in names if (row := left.pop(name, None)) is not None]
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)


def show(table: Any) -> None:
    """Print a rich table; where the terminal is too narrow for its columns, each row as lines of "heading: value"."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console()
    if Measurement.get(console, console.options.update(width=10_000), table).minimum <= console.width:
        console.print(table)
        return
    headings = [str(column.header) for column in table.columns]
    if table.title:
        console.print(table.title, highlight=False)
    for cells in zip(*(column.cells for column in table.columns)):
        if not any(headings):  # a table of names and values
            console.print(*([f"{cells[0]}:"] if cells[0] else []), *cells[1:], highlight=False)
            continue
        for heading, cell in zip(headings, cells):
            if str(cell):
                console.print(f"{heading}:", cell, highlight=False)
        console.print()
    if table.caption:
        console.print(table.caption, highlight=False)
