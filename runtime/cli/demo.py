"""The demo: the sample edits that ship with the embedded model, one contact sheet, seconds per stage."""

from __future__ import annotations

import csv
import datetime
import io
import json
import subprocess
import threading
from pathlib import Path
from typing import Any

from ..editor import Editor, EditRequest, Options
from ..errors import UsageError
from ..files import check_outputs, write_whole
from ..images import contact_sheet, load_image, load_layout, write_png
from ..model.checkpoint import picturebook_folder
from ..profile import Callback
from ..receipt import versions


def sample_requests(folder: Path | None = None) -> list[tuple[str, EditRequest]]:
    """The shipped samples as `(name, request)`: `samples/samples.json` beside their pictures."""
    folder = (picturebook_folder() if folder is None else folder) / "samples"
    found = []
    for sample in json.loads((folder / "samples.json").read_text()):
        found.append(
            (
                sample["name"],
                EditRequest(
                    image=load_image(folder / sample["image"]),
                    prompt=sample["prompt"],
                    source_prompt=sample["source_prompt"],
                    layouts={n: load_layout(folder / f) for n, f in sample["layouts"].items()},
                    source_layouts={n: load_layout(folder / f) for n, f in sample["source_layouts"].items()},
                    options=Options(**sample.get("options", {})),
                ),
            )
        )
    return found


class PeakMemory:
    """The largest resident size of this process, MiB, while the block runs: sampled ten times a second on Linux.

    `peak` is 0 where /proc is not there.
    """

    def __enter__(self) -> PeakMemory:
        self.peak, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        status = Path("/proc/self/statm")
        while status.exists():
            import resource

            pages = int(status.read_text().split()[1])
            self.peak = max(self.peak, pages * resource.getpagesize() / 2**20)
            if self._stop.wait(0.1):
                return

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def run_demo(
    output: Path, callback: Callback | None = None, bench: Path | None = None, overwrite: bool = True
) -> list[dict[str, Any]]:
    """Run every sample and write the sheet, in a folder that is made if it is not there.

    Args:
        bench: a CSV that rows are added to.
        overwrite: replace a sheet that is there.

    Returns:
        For each edit: name, size, seconds and evaluations per stage, peak_mib (of the process), mask_area.

    Raises:
        UsageError: the output cannot be written, or there is no embedded model; nothing has been run.
    """
    if output.suffix.lower() != ".png":
        raise UsageError(f"{output}: the sheet is a PNG; give a name that ends in .png")
    for path in (output, *([bench] if bench else [])):
        path.parent.mkdir(parents=True, exist_ok=True)
    check_outputs([output], [], [bench] if bench else [], overwrite)
    editor = Editor.load()
    rows, titles, figures = [], [], []
    for name, request in sample_requests():
        with PeakMemory() as memory:
            result = editor.edit(request, callback)
        row = [("input", request.image)]
        row += [(f"{n} asked for", p) for n, p in request.layouts.items()]
        if result.mask:
            row.append(("mask", result.mask))
        if result.guidance:
            row.append(("guidance image", result.guidance))
        rows.append([*row, ("result", result.image)])
        titles.append(f"{name}: {request.source_prompt} -> {request.prompt}")
        figures.append(
            {
                "name": name,
                "seconds": dict(result.profile.seconds),
                "evaluations": dict(result.profile.evaluations),
                "peak_mib": memory.peak,
                "mask_area": (result.receipt["mask"] or {"area": 1.0})["area"],
                "size": request.image.size,
            }
        )
    write_png(output, contact_sheet(rows, titles=titles), None)
    if bench is not None:
        append_rows(bench, figures, editor)
    return figures


COLUMNS = ("name", "variant", "shape", "dtype", "p20", "p50", "p80", "unit", "peak_mib", "evaluations", "quality", "device",
           "versions", "commit", "date")  # fmt: skip


def append_rows(path: Path, figures: list[dict[str, Any]], editor: Editor) -> None:
    """Add a row per edit and stage to a results CSV."""
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
    append_csv(path, rows, editor)


def append_csv(path: Path, rows: list[dict[str, Any]], editor: Editor) -> None:
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
    """The short hash of the checkout that this code runs from, with a + where files were changed; "" for an installed copy."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", Path(__file__).name
        )  # not the checkout that an environment happens to lie in
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)bench/results.csv")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""
