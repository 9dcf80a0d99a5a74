"""What the commands share that measure with the truth suite and write into a document: options, errors of one line, places for tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from iedit.runtime import BACKENDS
from iedit.runtime.cli.params import together
from iedit.runtime.errors import IeditError, UsageError
from iedit.runtime.files import write_whole

FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)
suite: Callable[[Any], Any] = together([
    click.option("--model", default="picturebook", show_default=True),
    click.option("--reader", required=True, type=FILE, help="Weights of `iedit train classifier`."),
    click.option("--backend", default="auto", show_default=True, type=click.Choice(("auto", *BACKENDS)), help="What runs the networks."),
    click.option("--engines", type=FOLDER, default=None, help="Folder of exported engines. Default: the user's cache."),
])  # fmt: skip


class Command(click.Command):
    """A command whose errors are a line and an exit code, and whose Ctrl-C says that it goes on."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except IeditError as error:
            failure = click.ClickException(" ".join(str(error).split()))
            failure.exit_code = error.exit_code
            raise failure from error
        except KeyboardInterrupt:
            click.echo("stopped; the same command goes on", err=True)
            raise click.Abort from None


def place(path: Path, name: str) -> tuple[str, str]:
    """What of a document stands up to the mark `<!-- NAME -->` and from `<!-- /NAME -->` on.

    Raises:
        UsageError: it is not there, or has no such marks.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, begun, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not (begun and ended):
        raise UsageError(f"{path} has no place for the tables; put {begin.strip()} and {end} on lines where they go")
    return before + begin, end + after


def replace(path: Path, name: str, text: str) -> None:
    """Write `text` (whole lines) between the marks of a document, whole or not at all.

    Raises:
        UsageError: see `place`.
    """
    before, after = place(path, name)
    write_whole(path, f"{before}{text}{after}".encode())
