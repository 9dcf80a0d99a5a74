"""The command line `iedit`: its group of commands, and what becomes of an error. `iedit --help` imports no torch."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Any

import click

from .. import VERSION
from ..errors import IeditError
from ..files import printable
from .edit import edit, layouts_command, mask_command, replay
from .help import suggestion
from .info import demo, info, profile_command

# Groups of the packages above this one, by name so that imports keep pointing one way.
_OTHER_GROUPS = {
    "export": ("iedit.export.cli", "export", "Write a model's networks as engines, and check them."),
    "engines": ("iedit.export.cli", "engines", "List, check and clean up engines."),
    "train": ("iedit.training.cli", "train", "Train iEdit on pairs, and the embedded model."),
    "evaluate": ("iedit.training.cli_evaluate", "evaluate", "Measure editing methods on benchmarks and exact answers."),
}


class _Failure(click.ClickException):
    """One line on stderr and the error's exit code."""


class _Usage(_Failure):
    exit_code = 2


class _Commands(click.Group):
    """Loads the groups of other packages when they are used, and turns the project's errors into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.commands, *_OTHER_GROUPS]  # in the order of a first reading, not of the alphabet

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in _OTHER_GROUPS:
            module, attribute, _ = _OTHER_GROUPS[name]
            command: click.Command = getattr(importlib.import_module(module), attribute)
            return command
        return super().get_command(ctx, name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}.{suggestion(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            command = None if name in _OTHER_GROUPS else self.get_command(ctx, name)
            rows.append((name, _OTHER_GROUPS[name][2] if command is None else command.get_short_help_str(90)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for word in args:
            try:
                word.encode()
            except UnicodeEncodeError:  # bytes that are no UTF-8, which could be neither printed nor kept in a receipt
                raise click.UsageError(f"{word!a} is not UTF-8; rename the file, or type the text again") from None
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except IeditError as error:
            raise (_Usage if error.exit_code == 2 else _Failure)(printable(" ".join(str(error).split()))) from error
        except MemoryError as error:
            raise _Failure("out of memory; use a smaller picture, --dtype float16 or another machine") from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of the output went away: click's own business
                raise
            raise _Failure(printable(f"{error.filename or 'system'}: {error.strerror or error}")) from error
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as error:  # a mistake of this program's: a line for the user, the rest for whoever repairs it
            if os.environ.get("IEDIT_DEBUG") == "1":
                raise
            line = f"unexpected {type(error).__name__}: {_one_line(error)}; {_write_report(error)}"
            raise _Failure(printable(line)) from error


def _one_line(error: BaseException, longest: int = 200) -> str:
    line = " ".join(str(error).split()) or "no message"
    return line if len(line) <= longest else line[: longest - 3] + "..."


def _write_report(error: BaseException) -> str:
    """Everything about an error in a file that only the user can read; says where it is."""
    import platform
    import tempfile
    import traceback
    from importlib import metadata

    versions = {
        d.name: d.version
        for d in metadata.distributions()
        if d.name in ("torch", "diffusers", "transformers", "numpy", "pillow")
    }
    lines = [
        f"iedit {VERSION}, Python {platform.python_version()}, {platform.platform()}",
        ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        f"command: {sys.argv}",
        "",
        *traceback.format_exception(error),
    ]
    try:
        handle, path = tempfile.mkstemp(prefix="iedit-report-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join(lines))
    except OSError as problem:
        return f"a report could not be written ({problem.strerror}); IEDIT_DEBUG=1 shows where it happened"
    return f"a full report is in {path} (IEDIT_DEBUG=1 shows it here)"


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="iedit")
def main() -> None:
    """Localised image editing with diffusion models.

    \b
    iedit edit photo.png --source-prompt "a red car on grass at noon" --prompt "a blue car on grass at noon"

    With no --model the embedded picture-book model is used: it draws its own small world and nothing else. Give a folder
    of a Stable Diffusion 1.x checkpoint (diffusers layout) or a hub id for photographs.
    """


for command in (edit, mask_command, layouts_command, replay, profile_command, info, demo):
    main.add_command(command)

if __name__ == "__main__":  # python -m iedit.runtime.cli.main, where nothing is installed
    main()
