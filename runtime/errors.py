"""What goes wrong, by who can do something about it. The command line turns `exit_code` into its exit status.

A message is one line that says who, what came, what was wanted and what to do.
"""

from __future__ import annotations


class IeditError(Exception):
    """Base of every error that this project raises on purpose."""

    exit_code = 1


class UsageError(IeditError):
    """What was asked for cannot be done as asked: a bad file, size, name or option. Nothing has been run."""

    exit_code = 2


class RunError(IeditError):
    """It failed while running: NaN from a network, out of memory, a disk that is full."""

    exit_code = 1


class Cancelled(IeditError):
    """A callback asked to stop. Nothing has been written."""

    exit_code = 1


def first_line(error: BaseException, longest: int = 160) -> str:
    """What an error of another library says, short enough for a line; its type where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= longest else lines[0][: longest - 3] + "..."
