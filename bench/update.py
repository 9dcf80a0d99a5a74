"""What the two updates of ITO do to the kept area: |y - x| there after every step, over world edits, as a table and a plot.

python bench/update.py                      writes docs/update.png and prints the table of docs/update.md
python bench/update.py --cases 4 --steps 10 --output /tmp/u.png
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from iedit.runtime import pipeline
from iedit.runtime.editor import Editor, EditRequest, Options
from iedit.runtime.images import write_png
from iedit.runtime.options import ItoSettings
from iedit.runtime.sampling import ito_pass
from iedit.training import truth

UPDATES = ("adam", "clipped")
COLOURS = {"adam": (200, 60, 40), "clipped": (30, 100, 190)}


def final_passes(editor: Editor, request: EditRequest) -> list[float]:
    """Mean |y - x| over the kept area at every level that the final pass reaches."""
    distances: list[float] = []

    def watched(y: Tensor, path: Any, *args: Any, **more: Any) -> Generator[Any, Tensor, Tensor]:
        sampler = ito_pass(y, path, *args, **more)
        if more["guidance"] is None:  # the guidance image's pass
            return (yield from sampler)
        source, keep = more["source"], (1 - more["mask"]).expand_as(y) > 0.5
        step = next(sampler)
        while True:
            latent = yield step
            distances.append(float((latent - source.at(step.to))[keep].abs().mean()))
            try:
                step = sampler.send(latent)
            except StopIteration as stop:
                return stop.value

    pipeline.ito_pass, held = watched, pipeline.ito_pass  # type: ignore[assignment]
    try:
        editor.edit(request)
    finally:
        pipeline.ito_pass = held
    return distances


def plot(curves: dict[str, np.ndarray], updates: int) -> Image.Image:
    """Median over the edits, with the 20 to 80 % band, over the steps; RGB 720x400."""
    width, height, left, top, right, bottom = 720, 400, 64, 28, 16, 48
    page = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(page, "RGBA"), ImageFont.load_default(size=13)
    steps = next(iter(curves.values())).shape[1]
    highest = max(float(np.percentile(c, 80, axis=0).max()) for c in curves.values())
    top_value = np.ceil(highest * 20) / 20

    def at(step: float, value: float) -> tuple[float, float]:
        return (left + (width - left - right) * (step - 1) / (steps - 1),
                height - bottom - (height - top - bottom) * value / top_value)  # fmt: skip

    for i in range(round(top_value / 0.05) + 1):
        (x0, y0), (x1, _) = at(1, i * 0.05), at(steps, i * 0.05)
        draw.line((x0, y0, x1, y0), fill=(225, 225, 225, 255))
        draw.text((x0 - 8, y0), f"{i * 0.05:.2f}", fill="black", font=font, anchor="rm")
    for step in (1, *range(5, steps + 1, 5)):
        x, y = at(step, 0)
        draw.text((x, y + 6), str(step), fill="black", font=font, anchor="ma")
    if updates < steps:
        x, _ = at(updates + 0.5, 0)
        draw.line((x, top, x, height - bottom), fill=(120, 120, 120, 255))
        draw.text((x + 4, top), "no updates from here", fill=(90, 90, 90), font=font)
    for row, (name, values) in enumerate(curves.items()):
        low, middle, high = np.percentile(values, [20, 50, 80], axis=0)
        band = [at(i + 1, v) for i, v in enumerate(high)] + [at(i + 1, v) for i, v in reversed(list(enumerate(low)))]
        draw.polygon(band, fill=(*COLOURS[name], 45))
        draw.line([at(i + 1, v) for i, v in enumerate(middle)], fill=(*COLOURS[name], 255), width=2)
        legend = (width - right - 110, top + 12 + 18 * row)
        draw.line((*legend, legend[0] + 24, legend[1]), fill=COLOURS[name], width=2)
        draw.text((legend[0] + 30, legend[1]), name, fill="black", font=font, anchor="lm")
    draw.text(
        (left, 6),
        "mean |y - x| in the kept area, by denoising step (median of the edits, 20-80 %)",
        fill="black",
        font=font,
    )
    return page


@click.command()
@click.option("--cases", default=8, show_default=True, help="Edits of each text kind.")
@click.option("--seed", default=31337, show_default=True, help="Which held-out edits.")
@click.option("--steps", default=25, show_default=True)
@click.option("--t-u", "t_u", default=None, type=int, help="Updated steps; the checkpoint's recommendation by default.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("docs/update.png"), show_default=True)
def main(cases: int, seed: int, steps: int, t_u: int | None, output: Path) -> None:
    """Follow the kept area through the final pass with both updates."""
    torch.set_num_threads(1)
    editor = Editor.load(backend="torch", device="cpu")
    settled = Options(final=ItoSettings(t_u=t_u)).settled(editor.model, steps).final
    curves: dict[str, list[list[float]]] = {u: [] for u in UPDATES}
    asked = [c for kind in truth.TEXT_KINDS for c in truth.edit_cases(kind, cases, seed)]
    with click.progressbar(asked, label="edits") as shown:
        for case in shown:
            for update in UPDATES:
                phase = ItoSettings(t_u=t_u, update=update)
                method = truth.Method("ito", "ito", truth.TEXT_KINDS, {"guidance": phase, "final": phase})
                curves[update].append(final_passes(editor, truth.edit_request(case, method, case.number, steps)))
    arrays = {u: np.array(c) for u, c in curves.items()}
    updates = settled.updates(steps)
    write_png(output, plot(arrays, updates), None)
    marks = sorted({1, steps // 5, steps // 2, updates, steps})
    click.echo("| update | " + " | ".join(f"step {m}" for m in marks) + " |")
    click.echo("| --- " * (len(marks) + 1) + "|")
    for name, values in arrays.items():
        click.echo(f"| {name} | " + " | ".join(f"{np.median(values[:, m - 1]):.3f}" for m in marks) + " |")


if __name__ == "__main__":
    main()
