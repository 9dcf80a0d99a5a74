"""What is seen of a command while it runs: one live line, notes, and Ctrl-C that acts at once."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..files import printable

if TYPE_CHECKING:
    from ..profile import Progress


def quiet_libraries() -> None:
    """Progress bars of loading libraries would tear the live display."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextlib.contextmanager
def live_progress(model: str) -> Iterator[Callable[[Progress], bool | None]]:
    """One live line on stderr: stage, step, share of the run, time left.

    Where stderr is no terminal, one line that says what is loaded, before anything is.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    share = (TextColumn("{task.description:<22}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    columns = (*share, TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
    console = Console(stderr=True)
    if not console.is_terminal:
        click.echo(f"loading {printable(model)}", err=True)
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with prompt_interrupts(), bar:
        task = bar.add_task(f"loading {printable(model)}"[:40], total=1.0, left="")

        def tell(progress: Any) -> bool | None:
            step = f" {progress.step}/{progress.steps}" if progress.steps else ""
            left = "" if progress.seconds_left is None else time_left(progress.seconds_left)
            bar.update(task, description=progress.stage + step, completed=progress.fraction, left=left)
            return None

        yield tell


def time_left(seconds: float) -> str:
    return f"{seconds:.0f} s left" if seconds < 120 else f"{seconds / 60:.0f} min left"


def show_notes(notes: Sequence[str]) -> None:
    for note in notes:
        click.echo(f"note: {printable(note)}", err=True)


@contextlib.contextmanager
def prompt_interrupts(patience: float = 0.8) -> Iterator[None]:
    """Ctrl-C acts within a second: Python sees it only when a network's operation has ended, which in a large VAE takes long. Who does
    not come out of this block in `patience` seconds is ended then, and a second Ctrl-C ends it at once. Nothing is written here."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    receive, send = os.pipe()
    os.set_blocking(send, False)
    before = signal.set_wakeup_fd(send, warn_on_full_buffer=False)

    def watch() -> None:
        while (number := os.read(receive, 1)) and number[0] != signal.SIGINT:
            pass
        if not number:
            return  # the block was left
        ready, _, _ = select.select([receive], [], [], patience)
        if not ready or os.read(receive, 1):
            show_cursor = b"\x1b[?25h" if os.isatty(2) else b""
            os.write(2, show_cursor + b"\nAborted!\n")
            os._exit(1)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(send)
        watcher.join()
        os.close(receive)
