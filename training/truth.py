"""The truth suite: how good the model and the edits are, against scenes whose exact answer can be drawn.

`model_figures` judges the model (autoencoder, text to image, ControlNets); `run` judges the editing methods on held-out
world edits; `summarise`, `table` and `render_card` put it into words. What a picture shows is judged by the reader of
`classifier.py`, which is trained on renders and used nowhere else. It says nothing about photographs.

Scenes are drawn from names that begin with "held-out-", which no training draws from. Case i does not depend on how
many cases are asked for, so a run of 10 is the beginning of a run of 100.
"""

from __future__ import annotations

import functools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ..runtime.images import write_png
from ..runtime.options import IP2P, ItoSettings
from ..runtime.presets import PRESETS
from . import metrics, redraw, world
from .classifier import Reading
from .embed import images_to_tensor
from .workers import read_rows, spread, write_rows

TEXT_KINDS = ("thing", "colour", "background")
LAYOUT_KINDS = ("pose", "scribble")
KINDS = TEXT_KINDS + LAYOUT_KINDS
POSE_LIMIT = 6.0  # pixels, mean over the joints
SCRIBBLE_LIMIT = 0.75  # IoU
SHARES = ("new", "old", "rest")  # row fields that are shares of yes; the others are means
MEANS = (
    "distance", "l1_in", "psnr_in", "redrawn", "l1_out", "psnr_out", "ssim_out", "mask_iou", "seconds", "evaluations",
)  # fmt: skip

Row = dict[str, Any]
Log = Callable[[str], None]


class Reader(Protocol):
    """What judges pictures: `classifier.Classifier`, or a stand-in for tests."""

    def read(self, images: Sequence[Any]) -> list[Reading]: ...


@dataclass(frozen=True)
class Method:
    """A method under test: its name in the tables, `EditRequest.method`, the kinds of edits that it is run on, and
    fields of `Options` that differ from the default.

    An empty `method` is the autoencoder's round trip of the exact target, which no edit through it can beat. `shows`: what is judged, a picture of
    `EditResult`. `reader`: which field of a model has to have what reads the layout; by default either.
    """

    name: str
    method: str
    kinds: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    shows: str = "image"
    reader: str = ""

    def kinds_on(self, model: Any) -> tuple[str, ...]:
        """The kinds of edits for which a `runtime.model.model.Model` can be asked for it.

        An InstructPix2Pix checkpoint runs `ip2p`, and every other all else; a layout is read by a ControlNet or by a T2I-Adapter. The
        autoencoder's round trip asks nothing of a model.
        """
        if self.method and (self.method in IP2P) != model.instructs:
            return ()
        readers = [self.reader] if self.reader else list(_READERS)
        return tuple(
            kind
            for kind in self.kinds
            if not self.method or kind not in LAYOUT_KINDS or any(kind in getattr(model, r) for r in readers)
        )


_READERS = {"controlnets": "ControlNet", "adapters": "T2I-Adapter"}  # fields of a model with what reads its layouts
LAMBDA_FIELD = "lam"  # the field of runtime.editor.Options that holds ITO's lambda
_ADAM = ItoSettings(update="adam")
_EXACT = {
    name: getattr(PRESETS["exact"].options, name) for name in (LAMBDA_FIELD, "guidance_until", "guidance_path", "mask")
}
METHODS = {
    m.name: m
    for m in (
        Method("ito", "ito", KINDS),
        Method("ito exact", "ito", KINDS, _EXACT),
        Method("ito adam", "ito", KINDS, {"guidance": _ADAM, "final": _ADAM}),
        Method("ito lambda=0.6", "ito", TEXT_KINDS, {LAMBDA_FIELD: 0.6}),
        Method("ito lambda=1", "ito", TEXT_KINDS, {LAMBDA_FIELD: 1.0}),
        Method("guidance image", "ito", KINDS, {LAMBDA_FIELD: 0.6}, "guidance"),
        Method("diffedit", "diffedit", TEXT_KINDS),
        Method("sdedit", "sdedit", TEXT_KINDS),
        Method("iedit", "iedit", TEXT_KINDS),
        Method("p2p", "p2p", TEXT_KINDS),
        Method("ddpm", "ddpm", TEXT_KINDS),
        Method("ip2p", "ip2p", TEXT_KINDS),
        Method("p2p without correction", "p2p", TEXT_KINDS, {"inversion_correction": "none"}),
        Method("controlnet", "controlnet", LAYOUT_KINDS, reader="controlnets"),
        Method("controlnet-diffedit", "controlnet-diffedit", LAYOUT_KINDS, reader="controlnets"),
        Method("t2i-adapter", "controlnet", LAYOUT_KINDS, reader="adapters"),
        Method("t2i-adapter-diffedit", "controlnet-diffedit", LAYOUT_KINDS, reader="adapters"),
        Method("round trip of the target", "", KINDS),
    )
}
MAIN = tuple(m.name for m in METHODS.values() if not m.options)  # each method once, as it is by default


def why_not(name: str, model: Any, kinds: Sequence[str]) -> str:
    """Why a method of `METHODS` cannot be run with a model on these kinds of edits, and what to do: the end of a sentence about the model."""
    method = METHODS[name]
    if method.method and (method.method in IP2P) != model.instructs:
        kind = (
            "an InstructPix2Pix checkpoint, which runs ip2p alone"
            if model.instructs
            else "no InstructPix2Pix checkpoint"
        )
        return f"is {kind}; leave it out, or name another --model"
    lacks = _READERS.get(method.reader) or " or ".join(_READERS.values())
    others = [m for m in METHODS.values() if m.method == method.method and m.reader != method.reader]
    instead = "".join(f"ask for {m.name}, " for m in others if set(kinds) & set(m.kinds_on(model)))
    return f"has no {lacks} that reads {' or '.join(kinds or method.kinds)}; leave it out, {instead}or name another --model"


# --- cases ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One held-out edit: scenes before and after `change`; pictures are drawn when first asked for."""

    kind: str
    number: int
    before: world.Scene
    after: world.Scene
    change: world.Change

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.number:03d}"

    @property
    def prompts(self) -> tuple[str, str]:
        """Captions before and after; equal for the edits of a layout."""
        return world.caption(self.before), world.caption(self.after)

    @cached_property
    def source(self) -> Image.Image:
        """The picture to edit, 128x128 RGB."""
        return world.render(self.before)

    @cached_property
    def target(self) -> Image.Image:
        """The exact picture after the edit."""
        return world.render(self.after)

    @cached_property
    def region(self) -> Image.Image:
        """Where they differ, grown by 4 px: "L", 0 and 255."""
        return world.exact_region(self.before, self.after)

    @cached_property
    def term(self) -> Image.Image:
        """Where the word that a text edit replaces is seen in the source, exactly, which CLIPSeg would have to find: "L", 0 and 255."""
        sky, ground = world.background_masks(self.before)
        named = {"sky": sky, "ground": ground}
        mask = named.get(self.change.kind)
        if mask is None:
            mask = np.asarray(world.object_mask(self.before, self.change.index)) > 127
        return Image.fromarray(mask.astype(np.uint8) * 255)

    @property
    def layouts(self) -> dict[str, Image.Image]:
        """The asked layout by name; empty for a text edit."""
        return {self.kind: world.layout(self.after, self.kind)} if self.kind in LAYOUT_KINDS else {}

    @property
    def source_layouts(self) -> dict[str, Image.Image]:
        return {self.kind: world.layout(self.before, self.kind)} if self.kind in LAYOUT_KINDS else {}


def edit_cases(kind: str, n: int = 100, seed: int = 0) -> list[Case]:
    """The first `n` held-out edits of a kind; odd numbers are two-thing scenes.

    Args:
        kind: one of `KINDS`; "background" is another sky or another ground.

    Raises:
        ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"edit_cases: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    cases = []
    for number in range(n):
        rng = random.Random(f"held-out-{kind}-{seed}-{number}")
        before = world.random_scene(rng, 1 + number % 2)
        if kind == "pose":
            before = world.edit(before, world.Change("thing", rng.randrange(len(before.things)), "person"))
        change = world.random_change(rng, before, rng.choice(("sky", "ground")) if kind == "background" else kind)
        cases.append(Case(kind, number, before, world.edit(before, change), change))
    return cases


def edit_request(case: Case, method: Method, seed: int, steps: int) -> Any:
    """The `EditRequest` of a case. iEdit is given its mask, of the term that is edited; the others find theirs or have none."""
    from ..runtime.editor import EditRequest, Options

    source_prompt, prompt = case.prompts
    return EditRequest(
        image=case.source,
        prompt=prompt,
        source_prompt=source_prompt,
        method=method.method,
        layouts=case.layouts,
        source_layouts=case.source_layouts,
        mask=case.term if method.method == "iedit" else None,
        seed=seed,
        steps=steps,
        options=Options(**method.options),
    )


# --- scoring ----------------------------------------------------------------------------------------------------


def _picture(image: Image.Image) -> Tensor:
    """PIL -> (1, 3, H, W) in [0, 1]."""
    return (images_to_tensor([image]) + 1) / 2


def _inside(mask: Image.Image) -> Tensor:
    """PIL "L" -> (1, 1, H, W) bool."""
    return _picture(mask)[:, :1] > 0.5


def _facts(things: Iterable[tuple[str, str]], ground: str, sky: str) -> dict[Any, Any]:
    named = list(things)
    facts: dict[Any, Any] = {"count": len(named), "ground": ground, "sky": sky}
    for i, (kind, colour) in enumerate(named):
        facts |= {("thing", i): kind, ("colour", i): colour}
    return facts


def facts_of_scene(scene: world.Scene) -> dict[Any, Any]:
    """Everything that the reader names, of a scene: count, ground, sky, ("thing", i), ("colour", i)."""
    return _facts(((t.kind, t.colour) for t in scene.things), scene.ground, scene.sky)


def facts_of_reading(reading: Reading) -> dict[Any, Any]:
    """The same, as read from a picture."""
    return _facts(zip(reading.kinds, reading.colours, strict=True), reading.ground, reading.sky)


def pose_error(reading: Reading, scene: world.Scene, index: int) -> float:
    """Mean error of the joints of thing `index` in pixels; NaN where the reader sees no person there."""
    if index >= len(reading.kinds) or reading.kinds[index] != "person":
        return math.nan
    return metrics.joint_error(reading.joints[index], world.joints(scene.things[index]))


def outline_iou(reading: Reading, scene: world.Scene, index: int | None = None) -> float:
    """IoU of the things as read with the exact ones; with `index` only on that thing's side of the picture, so that
    an untouched neighbour earns nothing."""
    exact, seen = _inside(world.object_mask(scene))[0, 0], reading.mask > 0.5
    if index is not None and len(scene.things) == 2:
        middle = round((scene.things[0].x + scene.things[1].x) / 2)
        side = slice(0, middle) if index == 0 else slice(middle, None)
        exact, seen = exact[:, side], seen[:, side]
    return float(metrics.iou(seen[None], exact[None]))


def judge(case: Case, reading: Reading) -> Row:
    """Whether a picture shows the edit: fields `new`, `old`, `rest` (0 or 1) and `distance`.

    Text edits: the changed attribute is read as its new / its old value. Pose edits: the joints are within 6 px (mean)
    of the asked / of the old pose. Scribble edits: the outline on the thing's side has IoU >= 0.75 with the asked /
    the old one. Old and new shapes can overlap, so a layout edit counts as old only if it is nearer to the old one.
    `rest`: all else is read as it should be. `distance`: pixels for a pose, IoU for a scribble, NaN for text.
    """
    asked, seen = facts_of_scene(case.after), facts_of_reading(reading)
    change, index = case.change, case.change.index
    if case.kind in TEXT_KINDS:
        changed: Any = change.kind if change.kind in ("ground", "sky") else (change.kind, index)
        new, old = seen.get(changed) == asked[changed], seen.get(changed) == facts_of_scene(case.before)[changed]
        rest = {k: v for k, v in seen.items() if k != changed} == {k: v for k, v in asked.items() if k != changed}
        return {"new": float(new), "old": float(old), "rest": float(rest), "distance": math.nan}
    if case.kind == "pose":
        distance, before = pose_error(reading, case.after, index), pose_error(reading, case.before, index)
        new, old = distance <= POSE_LIMIT, before <= POSE_LIMIT and before < distance
    else:
        distance, before = outline_iou(reading, case.after, index), outline_iou(reading, case.before, index)
        new, old = distance >= SCRIBBLE_LIMIT, before >= SCRIBBLE_LIMIT and before > distance
    return {"new": float(new), "old": float(old), "rest": float(seen == asked), "distance": distance}


def measure(case: Case, image: Image.Image, mask: Image.Image | None = None) -> Row:
    """Distances of an edited picture: inside the exact region to the exact target, outside it to the input; and the IoU
    of the estimated mask ("L" of any size) with the exact region, NaN without one. `outside`: share of the picture there.
    """
    got, region = _picture(image), _inside(case.region)
    target, source, kept = _picture(case.target), _picture(case.source), ~region
    overlap = math.nan
    if mask is not None:
        overlap = metrics.iou(
            _inside(mask.convert("L").resize(case.region.size, Image.Resampling.NEAREST)), region
        ).item()
    return {
        "l1_in": metrics.l1(got, target, region).item(),
        "psnr_in": metrics.psnr(got, target, region).item(),
        "l1_out": metrics.l1(got, source, kept).item(),
        "outside": kept.float().mean().item(),
        "psnr_out": metrics.psnr(got, source, kept).item(),
        "ssim_out": metrics.ssim(got, source, kept).item(),
        "mask_iou": overlap,
    }


def crispness(case: Case, image: Image.Image, reading: Reading) -> float:
    """PSNR in dB of the edited thing against the nearest one that the renderer draws (see `redraw`); NaN for an edit of ground or sky,
    and where the reader does not see the thing."""
    if case.kind == "background" or case.change.index >= len(reading.kinds):
        return math.nan
    return redraw.redraw(image, reading, [case.change.index]).psnr[0]


# --- running ----------------------------------------------------------------------------------------------------

_KEY = ("settings", "method", "kind", "number")


WORDS, WHOLE = ("settings", "method", "kind"), ("number", "things")  # of a row; all else of it are numbers


@dataclass(frozen=True)
class _Shown:
    """What came out of one case, for the sheet."""

    case: Case
    image: Image.Image
    mask: Image.Image | None = None
    guidance: Image.Image | None = None
    evaluations: float = 0.0


def run(
    editor: Any,
    reader: Reader,
    methods: Sequence[str | Method],
    kinds: Sequence[str] = KINDS,
    n: int = 100,
    *,
    settings: str = "",
    seed: int = 0,
    steps: int = 25,
    batch: int = 10,
    output: Path | None = None,
    sheet: int = 0,
    log: Log = lambda _: None,
    tell: Callable[[int, int], object] = lambda done, of: None,
    request: Callable[[Case, Method, int, int], Any] = edit_request,
    processes: int = 1,
    load: Callable[[], tuple[Any, Reader]] | None = None,
) -> list[Row]:
    """Edit the first `n` cases of every kind with every method and score them; one row per case.

    Args:
        editor: a `runtime.editor.Editor`; `edit_many` and `reconstruct` are used.
        methods: names of `METHODS`, or methods; each skips the kinds that it is not for.
        settings: what the rows depend on besides method and case (digest of the model); rows with other settings are
            thrown away, equal ones in `output/cases.csv` are not run again.
        batch: cases per call of `edit_many`; seconds are the call's, shared equally.
        sheet: how many first cases of each method and kind to show in `output/METHOD-KIND.png`; these are run again.
        tell: called with how many edits are scored, and of how many.
        processes: in so many processes (see `workers.spread`), each with the editor and reader that `load` makes; then
            `load` and `request` have to be functions that can be pickled.

    Evaluations are those that `profile.evaluations` counts for the call, shared equally, so a stage that the editor's cache already
    holds costs nothing: give an editor without a cache where costs are compared.

    Returns: the rows of the methods, kinds and cases asked for, those of earlier runs included.

    Raises:
        ValueError: an unknown method or kind, or several processes without `load`.
    """
    unknown = [m for m in methods if isinstance(m, str) and m not in METHODS] + [k for k in kinds if k not in KINDS]
    if unknown:
        raise ValueError(f"run: {unknown[0]!r} is neither one of {', '.join(METHODS)} nor of {', '.join(KINDS)}")
    if processes > 1 and load is None:
        raise ValueError(f"run: {processes} processes need `load`")
    chosen = [METHODS[m] if isinstance(m, str) else m for m in methods]
    settings = f"{settings} seed={seed} steps={steps}".strip()
    path = output / "cases.csv" if output else None
    fields = {*_KEY, "things", *SHARES, *MEANS}  # a row of an earlier version may lack one, and is run again
    kept = [
        r for r in (read_rows(path, WORDS, WHOLE) if path else []) if r["settings"] == settings and fields <= r.keys()
    ]
    done = {tuple(r[k] for k in _KEY): r for r in kept}
    jobs: list[tuple[Method, list[Case]]] = []
    for kind in kinds:
        cases = edit_cases(kind, n, seed)
        for method in (m for m in chosen if kind in m.kinds):
            todo = [c for c in cases if (settings, method.name, kind, c.number) not in done or c.number < sheet]
            jobs += [(method, todo[at : at + batch]) for at in range(0, len(todo), batch)]
    scored, of = 0, sum(len(cases) for _, cases in jobs)
    tell(scored, of)
    shown: dict[tuple[str, str], list[_Shown]] = {}
    work = functools.partial(_score, seed=seed, steps=steps, sheet=sheet, request=request)
    for number, (rows, results) in spread(
        load if processes > 1 and load else lambda: (editor, reader), work, jobs, processes
    ):
        method, some = jobs[number]
        for row in rows:
            row = {"settings": settings} | row
            done[tuple(row[k] for k in _KEY)] = row
        shown.setdefault((method.name, some[0].kind), []).extend(results)
        if path:
            write_rows(path, list(done.values()), _KEY)
        scored += len(some)
        tell(scored, of)
        log(f"truth: {method.name}: {some[0].kind} {scored}/{of}, {rows[0]['seconds']:.1f} s each")
    for (name, kind), results in shown.items():
        if results and output:
            page = contact_sheet(sorted(results, key=lambda one: one.case.number))
            write_png(output / f"{name.replace(' ', '_')}-{kind}.png", page)
    wanted = [(m.name, k, i) for k in kinds for m in chosen if k in m.kinds for i in range(n)]
    return [done[(settings, *key)] for key in wanted]


def _score(
    state: tuple[Any, Reader], job: tuple[Method, list[Case]], seed: int, steps: int, sheet: int, request: Any
) -> tuple[list[Row], list[_Shown]]:
    """The rows of a batch, and what came out of the cases that the sheet shows."""
    (editor, reader), (method, cases) = state, job
    began = time.perf_counter()
    results = _edit(editor, cases, method, seed, steps, request)
    seconds = (time.perf_counter() - began) / len(cases)
    rows = []
    for result, reading in zip(results, reader.read([r.image for r in results]), strict=True):
        case = result.case
        row: Row = {"method": method.name, "kind": case.kind, "number": case.number}
        row |= {"things": len(case.before.things), **judge(case, reading)}
        row |= measure(case, result.image, result.mask) | {"redrawn": crispness(case, result.image, reading)}
        rows.append(row | {"seconds": seconds, "evaluations": result.evaluations})
    return rows, [r for r in results if r.case.number < sheet]


def _edit(editor: Any, cases: list[Case], method: Method, seed: int, steps: int, request: Any) -> list[_Shown]:
    if not method.method:
        return [_Shown(c, i) for c, i in zip(cases, editor.reconstruct([c.target for c in cases]), strict=True)]
    results = editor.edit_many([request(c, method, seed + c.number, steps) for c in cases])
    return [
        _Shown(c, getattr(r, method.shows), r.mask, r.guidance, sum(r.profile.evaluations.values()) / len(cases))
        for c, r in zip(cases, results, strict=True)
    ]


def contact_sheet(shown: Sequence[_Shown]) -> Image.Image:
    """One row per case: input, layout, mask, guidance image, result, exact target; what is not there stays grey."""
    columns = ("input", "layout", "mask", "guidance", "result", "exact target")
    gap, text = 4, 14
    width, height = len(columns) * (world.SIZE + gap) + gap, text + len(shown) * (world.SIZE + text + gap)
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    for i, column in enumerate(columns):
        draw.text((gap + i * (world.SIZE + gap), 1), column, fill="black")
    for row, one in enumerate(shown):
        case, top = one.case, text + row * (world.SIZE + text + gap)
        before, after = case.prompts
        words = before if before == after else f"{before} -> {after}"
        draw.text((gap, top + 1), f"{case.name}: {words}", fill="black")
        layout = next(iter(case.layouts.values()), None)
        for i, image in enumerate((case.source, layout, one.mask, one.guidance, one.image, case.target)):
            tile = image.convert("RGB") if image else Image.new("RGB", (world.SIZE, world.SIZE), (208, 208, 208))
            if tile.size != (world.SIZE, world.SIZE):
                tile = tile.resize((world.SIZE, world.SIZE), Image.Resampling.NEAREST)
            page.paste(tile, (gap + i * (world.SIZE + gap), top + text))
    return page


# --- figures of the model ---------------------------------------------------------------------------------------


def _mean(name: str, values: Sequence[float], wanted: str = "", unit: str = "") -> Row:
    """A mean over what was measured (NaNs left out) with its bootstrap interval."""
    kept = [v for v in values if not math.isnan(v)]
    low, high = metrics.bootstrap(kept)
    value = sum(kept) / len(kept) if kept else math.nan
    return {"name": name, "value": value, "low": low, "high": high, "n": len(kept), "wanted": wanted, "unit": unit}


def _median(name: str, values: Sequence[float], unit: str = "") -> Row:
    """A median with the interval of its order statistics (95 %, normal approximation of the binomial)."""
    ordered = sorted(values)
    reach = metrics.Z95 * math.sqrt(len(ordered)) / 2
    low, high = (ordered[min(max(round(len(ordered) / 2 + r), 0), len(ordered) - 1)] for r in (-reach, reach))
    value = statistics.median(ordered)
    return {"name": name, "value": value, "low": low, "high": high, "n": len(ordered), "wanted": "", "unit": unit}


def _share(name: str, hits: Sequence[bool], wanted: str = "") -> Row:
    low, high = metrics.wilson(sum(hits), len(hits))
    value = sum(hits) / len(hits) if hits else math.nan
    return {"name": name, "value": value, "low": low, "high": high, "n": len(hits), "wanted": wanted, "unit": ""}


def held_out_scenes(name: str, n: int, things: int, person: bool = False, seed: int = 0) -> list[world.Scene]:
    """`n` scenes that no training has drawn; with `person` one thing, chosen at random, is a person."""
    scenes = []
    for number in range(n):
        rng = random.Random(f"held-out-{name}-{things}-{seed}-{number}")
        scene = world.random_scene(rng, things)
        scenes.append(world.edit(scene, world.Change("thing", rng.randrange(things), "person")) if person else scene)
    return scenes


def model_figures(
    editor: Any,
    reader: Reader,
    n: int = 200,
    *,
    seed: int = 0,
    steps: int = 25,
    batch: int = 20,
    log: Log = lambda _: None,
) -> list[Row]:
    """The figures of the model card, each from `n` held-out scenes.

    Autoencoder: PSNR of the round trip and whether the reader still reads everything right. Text to image: thing,
    colour, ground and sky all right, one thing and two. Of both: how near each thing is to one that the renderer draws (`redraw`). ControlNets: joints and outline of the sample against the
    asked layout.

    Returns: dicts with name, value, low, high (95 %), n, wanted, unit.
    """
    figures: list[Row] = []
    for things in (1, 2):
        scenes = held_out_scenes("autoencoder", n, things, seed=seed)
        ratios, agreed, drawn = [], [], list[float]()
        for at in range(0, n, batch):
            some = scenes[at : at + batch]
            pictures = [world.render(s) for s in some]
            back = editor.reconstruct(pictures)
            ratios += [metrics.psnr(_picture(a), _picture(b)).item() for a, b in zip(pictures, back, strict=True)]
            readings = reader.read(back)
            agreed += [r.agrees(s) for r, s in zip(readings, some, strict=True)]
            drawn += [v for b, r in zip(back, readings, strict=True) for v in redraw.redraw(b, r).psnr]
            log(f"figures: autoencoder, {things} thing(s), {at + len(some)}/{n}")
        figures.append(_mean(f"autoencoder PSNR, {_things(things)}", ratios, ">= 30", "dB"))
        figures.append(_share(f"autoencoder, all read right after it, {_things(things)}", agreed))
        figures.append(
            _median(f"autoencoder, a thing as the renderer draws it (median), {_things(things)}", drawn, "dB")
        )

    def samples(
        name: str, scenes: list[world.Scene], layout: str = ""
    ) -> list[tuple[world.Scene, Reading, Image.Image]]:
        made: list[tuple[world.Scene, Reading, Image.Image]] = []
        for at in range(0, len(scenes), batch):
            some = scenes[at : at + batch]
            images = editor.generate(
                prompts=[world.caption(s) for s in some],
                layouts={layout: [world.layout(s, layout) for s in some]} if layout else None,
                seeds=[seed + at + i for i in range(len(some))],
                steps=steps,
            )
            made += zip(some, reader.read(images), images, strict=True)
            log(f"figures: {name}, {at + len(some)}/{len(scenes)}")
        return made

    for things, wanted in ((1, ">= 0.90"), (2, ">= 0.75")):
        name = f"text to image, {_things(things)}"
        made = samples(name, held_out_scenes("text", n, things, seed=seed))
        figures.append(_share(f"{name}: all right", [r.agrees(s) for s, r, _ in made], wanted))
        drawn = [v for _, r, image in made for v in redraw.redraw(image, r).psnr]
        figures.append(_median(f"{name}: a thing as the renderer draws it (median)", drawn, "dB"))
    for things in (1, 2):
        made = samples(f"pose, {_things(things)}", held_out_scenes("pose", n, things, True, seed), "pose")
        people = [(s, r, i) for s, r, _ in made for i, t in enumerate(s.things) if t.kind == "person"]
        errors = [pose_error(r, s, i) for s, r, i in people]
        name = f"ControlNet pose, {_things(things)}"
        figures.append(_mean(f"{name}: mean error of the joints where a person is seen", errors, "<= 6", "px"))
        figures.append(_share(f"{name}: person seen and within {POSE_LIMIT:g} px", [e <= POSE_LIMIT for e in errors]))
    for things in (1, 2):
        name = f"ControlNet scribble, {_things(things)}"
        made = samples(name, held_out_scenes("scribble", n, things, seed=seed), "scribble")
        overlaps = [outline_iou(r, s) for s, r, _ in made]
        figures.append(_mean(f"{name}: IoU with the asked outline", overlaps, ">= 0.75"))
        figures.append(_share(f"{name}: IoU >= {SCRIBBLE_LIMIT:g}", [o >= SCRIBBLE_LIMIT for o in overlaps]))
    return figures


def _things(count: int) -> str:
    return "one thing" if count == 1 else "two things"


def met(figure: Row) -> bool | None:
    """Whether a figure is as wanted; None where nothing is asked of it."""
    if not figure["wanted"]:
        return None
    sign, limit = figure["wanted"].split()
    return bool(figure["value"] >= float(limit) if sign == ">=" else figure["value"] <= float(limit))


# --- summaries --------------------------------------------------------------------------------------------------


def summarise(rows: Sequence[Row], by_things: bool = False) -> list[Row]:
    """One dict per kind and method: `n`, and for every field its mean, `FIELD_low` and `FIELD_high` (95 %; Wilson for
    shares, bootstrap for means); also "text", "layout" and "all" over such kinds, without the distance, which mixes there.

    With `by_things` scenes of one and two things apart: "thing x1", "thing x2".
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        group = "text" if row["kind"] in TEXT_KINDS else "layout"
        for kind in (row["kind"], group, "all"):
            label = f"{kind} x{row['things']}" if by_things else kind
            groups.setdefault((label, row["method"]), []).append(row)
    order = {k: i for i, k in enumerate((*TEXT_KINDS, "text", *LAYOUT_KINDS, "layout", "all"))}
    summary = []
    for (kind, method), some in sorted(groups.items(), key=lambda g: (order[g[0][0].split()[0]], g[0][0])):
        one: Row = {"kind": kind, "method": method, "n": len(some)}
        for name in (*SHARES, *MEANS):
            values = [r[name] for r in some]
            figure = _share(name, [v > 0.5 for v in values]) if name in SHARES else _mean(name, values)
            mixed = name == "distance" and kind.split()[0] in ("text", "layout", "all")
            for suffix, part in (("", "value"), ("_low", "low"), ("_high", "high")):
                one[name + suffix] = math.nan if mixed else figure[part]
        # Over all pixels outside: an edit of the sky leaves 2 % of its picture outside, an edit of a thing 70 %.
        values, weights = [r["l1_out"] for r in some], [r["outside"] for r in some]
        one["l1_out_pixels"] = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
        one["l1_out_pixels_low"], one["l1_out_pixels_high"] = metrics.bootstrap(values, weights)
        summary.append(one)
    return summary


def verdicts(summary: Sequence[Row], method: str = "ito") -> list[Row]:
    """What is asked of ITO, as figures with `wanted`: new >= 0.90 on text and >= 0.80 on layout edits, old <= 0.05, and
    an L1 <= 0.03 outside the exact region, of each kind too: as the mean of the edits' own means and over all pixels there.
    """
    kept = (("l1_out", "<= 0.03"), ("l1_out_pixels", "<= 0.03"))
    asked = {
        "text": (("new", ">= 0.90"), ("old", "<= 0.05"), *kept),
        "layout": (("new", ">= 0.80"), ("old", "<= 0.05"), *kept),
        **dict.fromkeys(KINDS, kept),
    }
    return [
        {"name": f"{one['kind']} edits: {_HEADS[name]}", "value": one[name], "low": one[name + "_low"],
         "high": one[name + "_high"], "n": one["n"], "wanted": wanted, "unit": ""}
        for one in summary
        if one["method"] == method and one["kind"] in asked
        for name, wanted in asked[one["kind"]]
    ]  # fmt: skip


_HEADS = {
    "new": "as new",
    "old": "as old",
    "rest": "rest right",
    "distance": "px or IoU",
    "l1_in": "L1 inside",
    "psnr_in": "PSNR inside",
    "redrawn": "as drawn, dB",
    "l1_out": "L1 outside, per edit",
    "l1_out_pixels": "L1 outside, per pixel",
    "psnr_out": "PSNR outside",
    "ssim_out": "SSIM outside",
    "mask_iou": "mask IoU",
    "seconds": "s",
    "evaluations": "evaluations",
}
_DIGITS = {
    "distance": 2,
    "l1_in": 3,
    "l1_out": 3,
    "l1_out_pixels": 3,
    "psnr_in": 1,
    "redrawn": 1,
    "psnr_out": 1,
    "ssim_out": 3,
    "seconds": 1,
    "evaluations": 0,
}


def _cell(one: Row, name: str, intervals: Sequence[str] = (*SHARES, "distance", "l1_in", "l1_out", "ssim_out")) -> str:
    value, digits = one[name], _DIGITS.get(name, 2)
    if math.isnan(value):
        return "-"
    if name not in intervals:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ({one[name + '_low']:.{digits}f}-{one[name + '_high']:.{digits}f})"


def table(summary: Sequence[Row]) -> Any:
    """A `rich.table.Table` of `summarise`'s rows; shares with their 95 % interval."""
    from rich.table import Table

    page = Table("kind", "method", "n", *_HEADS.values())
    last = ""
    for one in summary:
        if last not in ("", one["kind"]):
            page.add_section()
        page.add_row(one["kind"], one["method"], str(one["n"]), *(_cell(one, name, SHARES) for name in _HEADS))
        last = one["kind"]
    return page


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def _figure_table(figures: Sequence[Row]) -> str:
    lines = []
    for f in figures:
        digits, unit = (1, " " + f["unit"]) if f["unit"] else (3, "")
        value = f"{f['value']:.{digits}f}{unit} ({f['low']:.{digits}f}-{f['high']:.{digits}f})"
        good = met(f)
        lines.append(
            [f["name"], value, str(f["n"]), f["wanted"] or "-", "-" if good is None else "yes" if good else "**no**"]
        )
    return _markdown(("figure", "measured (95 % interval)", "n", "wanted", "met"), lines)


def render_card(figures: Mapping[str, Any]) -> str:
    """The figures as the part of the model card that carries them, in markdown.

    figures: any of "model" (of `model_figures`), "edits" (of `summarise`), "reader" (of `classifier.examine`) and
    "about" (strings by name: commit, seed, steps, machine).
    """
    parts = ["## Figures", ""]
    if figures.get("about"):
        parts += ["; ".join(f"{k}: {v}" for k, v in figures["about"].items()) + ".", ""]
    if figures.get("model"):
        parts += ["### The model, on held-out scenes (`iedit train figures`)", "", _figure_table(figures["model"]), ""]
    if figures.get("edits"):
        parts += ["### Edits of held-out scenes (`iedit evaluate truth`)", ""]
        asked = verdicts(figures["edits"])
        if asked:
            parts += [_figure_table(asked), ""]
        lines = ([e["kind"], e["method"], str(e["n"]), *(_cell(e, name) for name in _HEADS)] for e in figures["edits"])
        parts += [_markdown(("kind", "method", "n", *_HEADS.values()), lines), ""]
        parts += [
            "As new, as old: share of edits read as what was asked, as what was there. Inside: against the exact target"
            " in the exact region. As drawn: PSNR of the edited thing against the nearest one that the renderer draws. Outside: against the input. Half of the scenes have two things. Intervals are 95 %.",
            "",
        ]
    if figures.get("reader"):
        shown = [(k, f"{v:.4g}") for k, v in figures["reader"].items()]
        parts += ["### The reader that judges, on held-out renders (`iedit train classifier`)", ""]
        parts += [_markdown(("figure", "value"), shown), ""]
    return "\n".join(parts)
