"""The demo: the sample edits that ship with the embedded model, one contact sheet, seconds per stage."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from ..editor import Editor, EditRequest, Options
from ..errors import UsageError
from ..files import check_outputs
from ..images import contact_sheet, load_image, load_layout, write_png
from ..model.checkpoint import picturebook_folder
from ..profile import Callback


def sample_requests() -> list[tuple[str, EditRequest]]:
    """The shipped samples as `(name, request)`: `samples/samples.json` beside their pictures."""
    folder = picturebook_folder() / "samples"

    def request(sample: dict[str, Any]) -> EditRequest:
        return EditRequest(
            image=load_image(folder / sample["image"]),
            prompt=sample["prompt"],
            source_prompt=sample["source_prompt"],
            layouts={n: load_layout(folder / f) for n, f in sample["layouts"].items()},
            source_layouts={n: load_layout(folder / f) for n, f in sample["source_layouts"].items()},
            options=Options(**sample.get("options", {})),
        )

    return [(sample["name"], request(sample)) for sample in json.loads((folder / "samples.json").read_text())]


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
    output: Path, callback: Callback | None = None, overwrite: bool = True, editor: Editor | None = None
) -> list[dict[str, Any]]:
    """Run every sample and write the sheet, in a folder that is made if it is not there.

    Args:
        overwrite: replace a sheet that is there.
        editor: what runs them; by default the embedded model on the first backend that can.

    Returns:
        For each edit: name, size, seconds and evaluations per stage, peak_mib (of the process), mask_area.

    Raises:
        UsageError: the output cannot be written, or there is no embedded model; nothing has been run.
    """
    if output.suffix.lower() != ".png":
        raise UsageError(f"{output}: the sheet is a PNG; give a name that ends in .png")
    output.parent.mkdir(parents=True, exist_ok=True)
    check_outputs([output], [], [], overwrite)
    editor = Editor.load() if editor is None else editor
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
    write_png(output, contact_sheet(rows, titles=titles))
    return figures
