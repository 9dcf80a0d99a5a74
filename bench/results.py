"""Rows of `bench/results.csv`: what was measured, how well the result was, on what, from which commit. Not installed."""

from __future__ import annotations

import csv
import datetime
import io
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iedit.runtime.errors import UsageError
from iedit.runtime.files import write_whole
from iedit.runtime.receipt import versions

if TYPE_CHECKING:
    from iedit.runtime.editor import Editor

COLUMNS = ("name", "variant", "shape", "dtype", "p20", "p50", "p80", "unit", "peak_mib", "evaluations", "quality", "device",
           "versions", "commit", "date")  # fmt: skip


def append_rows(path: Path, rows: list[dict[str, Any]], editor: Editor) -> None:
    """`write_rows`, with what describes the editor filled in where a row does not say it."""
    v = versions()
    shared = {
        "variant": f"{editor.backend}, {editor.model.name}",
        "dtype": str(editor.model.dtype).removeprefix("torch."),
        "unit": "s",
        "device": editor.model.device.type,
        "versions": f"torch {v['torch']} diffusers {v['diffusers']}",
    }
    write_rows(path, [shared | row for row in rows])


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows of `COLUMNS` to a results CSV, keeping what is there; written whole.

    The commit and the day are filled in where a row does not say them. A table from before there was a commit column gets
    an empty one.

    Raises:
        UsageError: the file has other columns.
    """
    old = path.read_text() if path.exists() else ""
    head = old.splitlines()[0].split(",") if old else []
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if head == [c for c in COLUMNS if c != "commit"]:
        writer.writeheader()
        writer.writerows({"commit": ""} | row for row in csv.DictReader(io.StringIO(old)))
        old = ""
    elif not old:
        writer.writeheader()
    elif head != list(COLUMNS):
        raise UsageError(f"{path}: its columns are not those of this version; give another file")
    shared = {"commit": commit(), "date": datetime.date.today().isoformat()}
    writer.writerows(shared | row for row in rows)
    separator = "" if not old or old.endswith("\n") else "\n"
    write_whole(path, (old + separator + text.getvalue()).encode())


def commit() -> str:
    """The short hash of the checkout that this file lies in, with a + where files were changed; "" outside of one."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        # Not a checkout that an environment happens to lie in.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)bench/results.csv")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""
