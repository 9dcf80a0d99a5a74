"""What an edit's quality costs: accuracy and L1 outside against seconds, every method and preset in one run, as a plot and a table.

    python bench/pareto.py --reader WEIGHTS [--n 40] [--engines DIR] [--write docs/pareto.png] [--table docs/presets.md]

One process and one edit at a time, so seconds are what one waits for; run it on an idle machine. Every case is a row of
OUTPUT/STEPS-steps/cases.csv, and the same command goes on from there: remove them where seconds were disturbed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from common import FILE, FOLDER, Command, place, replace, suite
from PIL import Image, ImageDraw, ImageFont
from tables import table

from iedit.runtime.images import write_png
from iedit.runtime.options import Options
from iedit.runtime.presets import PRESETS
from iedit.training import truth
from iedit.training.cli_evaluate import load_suite, progress
from iedit.training.evaluate import model_settings

Row = dict[str, Any]
Box = tuple[float, float, float, float]
STEPS = 25
GROUPS = {"text": truth.TEXT_KINDS, "layout": truth.LAYOUT_KINDS}
FIGURES = {"new": "edit is there (higher is better)", "l1_out": "L1 outside (lower is better)"}
INK = {"ito": (30, 100, 190), "other": (190, 90, 30)}
SCALE = 2  # GitHub shows a page of about 880 pixels, on many screens with two to each
WIDTH, HEIGHT = 880 * SCALE, 760 * SCALE


@dataclass(frozen=True)
class Figure:
    """A figure with the ends of its bar."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """A method in one group of kinds.

    Attributes:
        seconds: median of an edit, with the 20 and 80 % quantiles.
        figures: of `FIGURES`, with their 95 % intervals.
    """

    name: str
    ito: bool
    n: int
    seconds: Figure
    evaluations: float
    figures: dict[str, Figure]


# --- what is measured ---------------------------------------------------------------------------------------------


def asked(model: Any) -> Iterator[tuple[int, truth.Method]]:
    """Steps and method of everything that edits: the suite's methods and the presets; what comes to the same with this model is run once,
    under both names."""
    found: dict[Any, tuple[int, truth.Method]] = {}
    presets = [
        (p.steps or STEPS, truth.Method(name, "ito", truth.KINDS, _fields(p.options))) for name, p in PRESETS.items()
    ]
    for steps, m in [
        *((STEPS, dataclasses.replace(m, kinds=m.kinds_on(model))) for m in truth.METHODS.values() if edits(m, model)),
        *presets,
    ]:
        settled = Options(**m.options).settled(model, steps, m.method)
        key = (steps, m.method, repr(settled))
        if key in found:
            before = found[key][1]
            kinds = tuple(k for k in truth.KINDS if k in (*before.kinds, *m.kinds))
            m = dataclasses.replace(before, name=f"{before.name} = {m.name}", kinds=kinds)
        found[key] = (steps, m)
    yield from found.values()


def edits(method: truth.Method, model: Any) -> bool:
    """Whether a method of the suite makes an edit with this model: not the autoencoder's round trip, not what an edit shows on its way."""
    return bool(method.method) and method.shows == "image" and bool(method.kinds_on(model))


def _fields(options: Options) -> dict[str, Any]:
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(Options)}


def points(rows: Sequence[Row], ito: set[str]) -> list[Point]:
    """A point for each method of the rows, which are of one group; fewest seconds first.

    Args:
        ito: names of the methods that are ITO.
    """
    found = []
    for one in truth.summarise(rows):
        if one["kind"] == "all":
            seconds = [r["seconds"] for r in rows if r["method"] == one["method"]]
            low, median, high = np.percentile(seconds, [20, 50, 80])
            figures = {n: Figure(one[n], one[n + "_low"], one[n + "_high"]) for n in FIGURES}
            found.append(
                Point(
                    one["method"],
                    one["method"] in ito,
                    one["n"],
                    Figure(median, low, high),
                    one["evaluations"],
                    figures,
                )
            )
    return sorted(found, key=lambda p: p.seconds.value)


def best(some: Sequence[Point], name: str) -> list[Point]:
    """Those that no other beats in both seconds and the figure, fewest seconds first: the Pareto front."""
    sign = 1 if name == "new" else -1
    front: list[Point] = []
    for p in sorted(some, key=lambda p: (p.seconds.value, -sign * p.figures[name].value)):
        if not front or sign * p.figures[name].value > sign * front[-1].figures[name].value:
            front.append(p)
    return front


def points_table(groups: dict[str, list[Point]]) -> str:
    """Markdown: a line for each group and method; bold where no other has both fewer seconds and a better figure."""
    lines = []
    for group, some in groups.items():
        fronts = {n: best(some, n) for n in FIGURES}
        for p in some:
            new, out = p.figures["new"], p.figures["l1_out"]
            cells = {
                "new": f"{new.value:.0%} ({new.low * 100:.0f}-{new.high * 100:.0f})",
                "l1_out": f"{out.value:.4f} ({out.low:.4f}-{out.high:.4f})",
            }
            shown = [f"**{c}**" if p in fronts[n] else c for n, c in cells.items()]
            s = p.seconds
            lines.append([group, p.name, str(p.n), *shown, f"{p.evaluations:.0f}", f"{s.value:.2f} ({s.low:.2f}-{s.high:.2f})"])  # fmt: skip
    return table(["edits", "method", "n", "edit is there", "L1 outside", "evaluations", "s (20-80 %)"], lines) + "\n"


# --- the plot -----------------------------------------------------------------------------------------------------


def _overlap(a: Box, b: Box) -> float:
    """Area that two boxes (left, top, right, bottom) share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def place_labels(
    anchors: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], taken: Sequence[Box], frame: Box
) -> list[Box]:
    """A box for each label, near its anchor, inside the frame, off the other labels and what is taken where there is room.

    Args:
        sizes: (width, height) of each label.
        taken: boxes that are drawn on already.
    """
    order = sorted(range(len(anchors)), key=lambda i: anchors[i][1])
    placed: dict[int, Box] = {}
    for i in order:
        (x, y), (w, h) = anchors[i], sizes[i]

        def cost(box: Box, x: float = x, y: float = y) -> float:
            shared = [_overlap(box, b) for b in placed.values()]
            others = sum(1000 * (v > 0) + 100 * v for v in shared) + 10 * sum(_overlap(box, b) for b in taken)
            away = math.hypot(max(box[0] - x, 0, x - box[2]), max(box[1] - y, 0, y - box[3]))
            return others + away

        candidates = []
        for reach, angle in itertools.product(range(10, 130, 6), range(0, 360, 15)):
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            cx, cy = x + SCALE * reach * dx + dx * w / 2, y + SCALE * reach * dy + dy * h / 2
            cx, cy = (
                min(max(c, low + s / 2), high - s / 2)
                for c, low, high, s in ((cx, frame[0], frame[2], w), (cy, frame[1], frame[3], h))
            )
            candidates.append((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
        placed[i] = min(candidates, key=cost)
    return [placed[i] for i in range(len(anchors))]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, about five."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    return [round(i * step, 10) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def panel(draw: ImageDraw.ImageDraw, frame: Box, some: Sequence[Point], name: str, title: str) -> list[Box]:
    """One plot in `frame` (left, top, right, bottom of the axes); the boxes of its labels."""
    font, small = ImageFont.load_default(size=13 * SCALE), ImageFont.load_default(size=12 * SCALE)
    left, top, right, bottom = frame
    seconds = [math.log2(v) for p in some for v in (p.seconds.low, p.seconds.high)]
    first, last = min(seconds) - 0.3, max(seconds) + 0.5
    values = [v for p in some for v in (p.figures[name].low, p.figures[name].high)]
    room = 0.08 * (max(values) - min(values) or 0.1)
    lowest, highest = max(0.0, min(values) - room), max(values) + room
    if name == "new":
        highest = 1.0 + 0.04 * (1 - lowest)

    def at(second: float, value: float) -> tuple[float, float]:
        return (left + (right - left) * (math.log2(second) - first) / (last - first), bottom - (bottom - top) * (value - lowest) / (highest - lowest))  # fmt: skip

    draw.text((left, top - 8 * SCALE), title, fill="black", font=font, anchor="lb")
    for value in (v for v in _ticks(lowest, highest) if name != "new" or v <= 1):
        _, y = at(1, value)
        draw.line((left, y, right, y), fill=(225, 225, 225), width=SCALE)
        draw.text(
            (left - 6 * SCALE, y),
            f"{value:.0%}" if name == "new" else f"{value:.3f}",
            fill="black",
            font=small,
            anchor="rm",
        )
    for second in (2.0**i for i in range(math.ceil(first), math.floor(last) + 1)):
        x, _ = at(second, lowest)
        draw.line((x, bottom, x, bottom + 4 * SCALE), fill="black", width=SCALE)
        draw.text((x, bottom + 6 * SCALE), f"{second:g} s", fill="black", font=small, anchor="ma")
    draw.line((left, top, left, bottom, right, bottom), fill="black", width=SCALE)

    front = [at(p.seconds.value, p.figures[name].value) for p in best(some, name)]
    draw.line(
        [v for a, b in itertools.pairwise(front) for v in (a, (b[0], a[1]), b)], fill=(150, 150, 150), width=SCALE
    )
    taken: list[Box] = []
    for p in some:
        (x, y), f, s, ink = (
            at(p.seconds.value, p.figures[name].value),
            p.figures[name],
            p.seconds,
            INK["ito" if p.ito else "other"],
        )
        (_, y0), (_, y1) = at(1, f.high), at(1, max(f.low, lowest))
        (x0, _), (x1, _) = at(s.low, lowest), at(s.high, lowest)
        draw.line((x, y0, x, y1), fill=ink, width=SCALE)
        draw.line((x0, y, x1, y), fill=ink, width=SCALE)
        r = 4 * SCALE
        draw.ellipse((x - r, y - r, x + r, y + r), fill=ink)
        taken += [(x - r, y - r, x + r, y + r), (x - 1, y0, x + 1, y1), (x0, y - 1, x1, y + 1)]
    anchors = [at(p.seconds.value, p.figures[name].value) for p in some]
    sizes = [(draw.textlength(p.name, font=font) + 4 * SCALE, 16.0 * SCALE) for p in some]
    boxes = place_labels(anchors, sizes, taken, frame)
    for p, (x, y), box in zip(some, anchors, boxes, strict=True):
        ink = INK["ito" if p.ito else "other"]
        near = (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))
        if math.dist(near, (x, y)) > 12 * SCALE:
            draw.line((*near, x, y), fill=(170, 170, 170), width=1)
        draw.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), p.name, fill=ink, font=font, anchor="mm")
    return boxes


def plot(groups: dict[str, list[Point]], note: str = "") -> Image.Image:
    """Two panels for each group: accuracy and L1 outside against the seconds of an edit. RGB, `WIDTH` x `HEIGHT`."""
    page = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(page)
    across, down = WIDTH / len(FIGURES), (HEIGHT - 24 * SCALE) / len(groups)
    for row, (group, some) in enumerate(groups.items()):
        for column, (name, title) in enumerate(FIGURES.items()):
            x, y = column * across, row * down
            frame = (x + 58 * SCALE, y + 30 * SCALE, x + across - 10 * SCALE, y + down - 30 * SCALE)
            panel(draw, frame, some, name, f"{group} edits ({some[0].n}): {title}")
    draw.text(
        (10 * SCALE, HEIGHT - 6 * SCALE),
        note,
        fill=(90, 90, 90),
        font=ImageFont.load_default(size=12 * SCALE),
        anchor="lb",
    )
    return page


@click.command(cls=Command)
@suite
@click.option("--n", "count", default=40, show_default=True, type=click.IntRange(1), help="Edits of each kind.")
@click.option("--seed", default=0, show_default=True, help="Of the held-out edits.")
@click.option("--output", type=FOLDER, default=Path("build/pareto"), show_default=True)
@click.option("--write", type=FILE, default=None, help="The plot, a PNG.")
@click.option("--table", "page", type=FILE, default=None, help="A document whose table between <!-- pareto --> and <!-- /pareto --> is replaced.")  # fmt: skip
def main(
    model: str, reader: Path, backend: str, engines: str | None, count: int, seed: int, output: Path, write: Path | None, page: Path | None
) -> None:  # fmt: skip
    """Measure all methods and presets, and draw them."""
    if page is not None:
        place(page, "pareto")
    editor, judge = load_suite(model, reader, backend, None if engines is None else str(engines))
    methods = list(asked(editor.model))
    rows: list[Row] = []
    for steps in dict.fromkeys(s for s, _ in methods):
        with progress(f"{steps} steps") as tell:
            some = [m for s, m in methods if s == steps]
            # A preset that has changed keeps its name.
            changed = hashlib.sha256(repr([(m.name, m.options) for m in some]).encode()).hexdigest()[:8]
            rows += truth.run(
                editor, judge, some, truth.KINDS, count, settings=f"{model_settings(editor)} options={changed}", seed=seed, steps=steps,
                batch=1, output=output / f"{steps}-steps", tell=tell,
            )  # fmt: skip
    ito = {m.name for _, m in methods if m.method == "ito"}
    groups = {group: points([r for r in rows if r["kind"] in kinds], ito) for group, kinds in GROUPS.items()}
    click.echo(points_table(groups))
    if write is not None:
        about = f"{editor.backend}, {editor.model.device.type}, one edit at a time; bars: 95 % up and down, 20 to 80 % of the seconds; blue: ITO; line: no other is faster and better"
        write_png(write, plot(groups, about), None)
    if page is not None:
        picture = (
            ""
            if write is None
            else f"![Accuracy and L1 outside against the seconds of an edit]({os.path.relpath(write, page.parent)})\n\n"
        )
        replace(page, "pareto", picture + points_table(groups))


if __name__ == "__main__":
    main()
