"""Editing methods on a benchmark: edit every case, measure the pictures, say how sure the figures are.

What all benchmarks share: cases that are edited in batches, in several processes, each picture written whole and its row after it, so that a run
that was stopped goes on and loses a batch of each process at most; then a table, `results.json` and a sheet of the best, median and worst. A
benchmark itself is a small reader of a folder (`benchmarks.py`).

OUTPUT holds `cases.csv` (a row for each method and case), `pictures/METHOD-SETTINGS/CASE.png` (with a few digits of what the edits depend on),
`results.json` and `METHOD.png`. Rows and pictures of other settings stay beside them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..runtime import images
from ..runtime.errors import UsageError
from . import metrics
from .figures import FIGURES, Case, Judges, network_figures, picture_figures
from .workers import Row, read_rows, spread, write_json, write_rows

WORDS = ("settings", "judges", "digest", "method", "kind", "name")  # of a row; all else of it are numbers


class Benchmark(Protocol):
    """A folder of cases. It is pickled to other processes.

    Attributes:
        title: its name.
        columns: figures that its table shows, in the order of its paper.
        rank: what the sheet orders cases by: the first of these figures that was measured.
        cases: in order; those of a smaller number are the first of a larger one.
    """

    title: str
    columns: tuple[str, ...]
    rank: tuple[str, ...]
    cases: Sequence[Case]

    def picture(self, case: Case) -> Image.Image:
        """The picture to edit, RGB."""

    def mask(self, case: Case) -> np.ndarray | None:
        """Where the edit is: (H, W) bool; None where the benchmark does not say."""

    def real(self) -> Iterator[tuple[str, Image.Image]]:
        """Real pictures to compare the edits' distribution with, each with its class or ""."""


@dataclass(frozen=True)
class Method:
    """A method under test.

    Attributes:
        method: of the runtime; "" where `folder` has pictures that were edited elsewhere.
        preset: of ITO; "" is what the checkpoint recommends.
        options: fields of `Options` that differ from the default; then `name` says which.
        folder: holds CASE.png or CASE.jpg.
        name: in tables and of its pictures' folder.
    """

    method: str
    preset: str = ""
    folder: str = ""
    name: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", "-".join(filter(None, (self.method, self.preset))))


# --- running ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How is edited and measured.

    Attributes:
        model, backend, engines, device: see `runtime.editor.Editor.load`.
        seed: case i has the noise of seed + i.
        steps: of sampling; None is each method's own.
        batch: edits per call.
        given_masks: the benchmark's masks are given to the methods that use one; by default they find their own.
        processes: see `spread`.
        singular_fid: FID although there are no more pictures than features, see `metrics.frechet_distance`.
    """

    model: str = "picturebook"
    backend: str = "auto"
    engines: str | None = None
    device: str | None = None
    seed: int = 0
    steps: int | None = None
    batch: int = 8
    given_masks: bool = False
    processes: int = 1
    singular_fid: bool = False


@functools.lru_cache(maxsize=1)
def load_editor(model: str, backend: str, engines: str | None, device: str | None) -> Any:
    """An editor without a cache: methods are compared by their cost. Loaded once in a process."""
    from ..runtime.cli.live import quiet_libraries

    quiet_libraries()
    from ..runtime.editor import Editor
    from ..runtime.stage_cache import StageCache

    return Editor.load(model, backend=backend, engines=engines, device=device, cache=StageCache(memory=0))


def model_settings(editor: Any) -> str:
    """Everything of the model that an edit's result depends on: a case run under other recommendations is another case."""
    m = editor.model
    preset = (m.guidance_until, m.guidance_path, m.mask_seeds, m.lambda_area)
    shown = "" if preset == (None,) * 4 else " ito={}/{}/{}/{}".format(*preset)
    return f"{m.digest} guidance={m.guidance_scale:g} mask={m.mask_strength}/{m.mask_threshold} text updates={m.text_update_share}{shown}"


def picture_path(output: Path, method: Method, case: Case, settings: str) -> Path:
    """Where an edit is; `settings` is its row's."""
    if method.folder:
        return ready_picture(method, case)
    return (
        output / "pictures" / f"{method.name}-{hashlib.sha256(settings.encode()).hexdigest()[:6]}" / f"{case.name}.png"
    )


def ready_picture(method: Method, case: Case) -> Path:
    """The picture of a case in a folder of edits that were made elsewhere.

    Raises:
        UsageError: there is none.
    """
    found = next(
        (p for e in (".png", ".jpg", ".jpeg", ".JPEG") if (p := Path(method.folder) / f"{case.name}{e}").is_file()),
        None,
    )
    if found is None:
        raise UsageError(f"{method.folder}: holds no {case.name}.png or .jpg, the edit of that case by {method.name}")
    return found


def _digest(method: Method, case: Case) -> str:
    """Of a case, and of its picture where that was made elsewhere."""
    from .pair_models import file_digest

    return (
        f"{case.digest}-{file_digest(ready_picture(method, case), 'pictures')[:16]}" if method.folder else case.digest
    )


@dataclass(frozen=True)
class _Batch:
    """Cases of one size for one method, each with its number in the benchmark.

    Attributes:
        settings: of the rows.
        cost: seconds and evaluations of the earlier rows of cases whose pictures are there already; None: they have to be edited.
    """

    method: Method
    settings: str
    cases: tuple[tuple[int, Case], ...]
    cost: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Worker:
    """What a process does with a batch."""

    benchmark: Benchmark
    output: Path
    settings: Settings
    judges: Judges
    among: tuple[str, ...]

    def edit(self, batch: _Batch) -> tuple[list[Image.Image], float, float]:
        """The edits, and seconds and evaluations of each."""
        from ..runtime.editor import EditRequest, Options
        from ..runtime.options import IP2P
        from ..runtime.presets import with_preset

        s = self.settings
        editor = load_editor(s.model, s.backend, s.engines, s.device)
        requests = []
        for number, case in batch.cases:
            mask = self.benchmark.mask(case) if s.given_masks and uses_mask(batch.method.method) else None
            given = (
                None if mask is None or mask.all() or not mask.any() else Image.fromarray(mask.astype(np.uint8) * 255)
            )
            prompt = case.prompt
            if batch.method.method in IP2P:
                prompt = case.instruction
                if not prompt:
                    raise UsageError(
                        f"{case.name}: has no instruction, which method {batch.method.method} needs; leave the method out"
                    )
            request = EditRequest(self.benchmark.picture(case), prompt, case.source_prompt, batch.method.method, mask=given,
                                  seed=s.seed + number, steps=s.steps, options=Options(**batch.method.options))  # fmt: skip
            requests.append(with_preset(request, batch.method.preset) if batch.method.preset else request)
        began = time.perf_counter()
        results = editor.edit_many(requests)
        seconds = (time.perf_counter() - began) / len(results)
        for (_, case), result in zip(batch.cases, results, strict=True):
            path = picture_path(self.output, batch.method, case, batch.settings)
            path.parent.mkdir(parents=True, exist_ok=True)
            images.write_png(path, result.image)
        return [r.image for r in results], seconds, sum(results[0].profile.evaluations.values()) / len(results)

    def __call__(self, batch: _Batch) -> list[Row]:
        """A row for each case."""
        seconds, evaluations = batch.cost or (math.nan, math.nan)
        if batch.method.folder or batch.cost is not None:
            places = [picture_path(self.output, batch.method, c, batch.settings) for _, c in batch.cases]
            edited = [images.load_image(p) for p in places]
        else:
            edited, seconds, evaluations = self.edit(batch)
        cases = [c for _, c in batch.cases]
        sources, masks = [self.benchmark.picture(c) for c in cases], [self.benchmark.mask(c) for c in cases]
        rows: list[Row] = []
        for case, source, edit, mask in zip(cases, sources, edited, masks, strict=True):
            try:
                own = {
                    "digest": _digest(batch.method, case),
                    "method": batch.method.name,
                    "kind": case.kind,
                    "name": case.name,
                }
                rows.append(own | picture_figures(source, edit, mask))
            except UsageError as error:
                raise UsageError(f"{case.name} by {batch.method.name}: {error}") from None
        for row, more in zip(
            rows, network_figures(cases, sources, edited, masks, self.judges, self.among), strict=True
        ):
            row.update(more, seconds=seconds, evaluations=evaluations)
        return rows


def uses_mask(method: str) -> bool:
    """Whether a method of the runtime takes a mask."""
    from ..runtime.options import UNMASKED

    return method not in UNMASKED


def _run_worker(worker: _Worker, batch: _Batch) -> list[Row]:
    return worker(batch)


def _itself(worker: _Worker) -> _Worker:
    return worker


def run(
    benchmark: Benchmark,
    methods: Sequence[Method],
    judges: Judges,
    settings: Settings,
    output: Path,
    tell: Callable[[int, int], object] = lambda done, of: None,
) -> list[Row]:
    """Edit and measure every case with every method; a row for each, in order.

    Rows of `OUTPUT/cases.csv` of the same settings and cases are taken; where other networks measure now, the pictures are taken and measured again.
    Rows of other settings and methods stay.

    Args:
        tell: called with how many rows are there, and of how many.

    Raises:
        UsageError, RunError: as the runtime and the networks do; what was done until then is kept.
    """
    path = output / "cases.csv"
    known = {(r["settings"], r["method"], r["name"]): r for r in read_rows(path, WORDS) if r.keys() >= set(WORDS)}
    if known and not next(iter(known))[0].startswith(f"{benchmark.title}; "):
        raise UsageError(f"{path}: holds rows of another benchmark; give another --output")
    classes = judges.load("classes")
    for name in {n for c in benchmark.cases for n in (c.old, c.new) if n and classes is not None}:
        classes.number(name)
    edits = [m for m in methods if not m.folder]
    model = (
        model_settings(load_editor(settings.model, settings.backend, settings.engines, settings.device))
        if edits
        else ""
    )
    if settings.processes > 1:
        load_editor.cache_clear()  # each process has its own
    how = f"{model} seed={settings.seed} steps={settings.steps} masks={'given' if settings.given_masks else 'own'}"
    by = {}
    for method in methods:
        more = "".join(f" {k}={v}" for k, v in {"preset": method.preset, **method.options}.items() if v != "")
        by[method.name] = (
            f"{benchmark.title}; {f'pictures of {os.path.abspath(method.folder)}' if method.folder else how + more}"
        )
    measured = " ".join(f"{k}={v[:12]}" for k, v in judges.digests().items()) + f" scale={judges.structure_scale:g}"
    done: dict[tuple[str, str, str], Row] = {}
    todo: list[_Batch] = []
    for method in methods:
        groups: dict[Any, list[tuple[int, Case]]] = {}
        for number, case in enumerate(benchmark.cases):
            key = (by[method.name], method.name, case.name)
            row = known.get(key)
            if row is not None and row["digest"] != _digest(method, case):
                row = None
            there = row is not None and picture_path(output, method, case, by[method.name]).is_file()
            if row is not None and there and row["judges"] == measured:
                done[key] = row
                continue
            cost = (row["seconds"], row["evaluations"]) if row is not None and there and not method.folder else None
            groups.setdefault((case.size, cost), []).append((number, case))
        for (_, cost), some in groups.items():
            parts = range(0, len(some), settings.batch)
            todo += [_Batch(method, by[method.name], tuple(some[at : at + settings.batch]), cost) for at in parts]
    todo.sort(
        key=lambda b: b.cases[0][0]
    )  # all methods on the first cases first: the time left is then that of all of them
    total = len(methods) * len(benchmark.cases)
    tell(len(done), total)
    among = tuple(dict.fromkeys(c.new for c in benchmark.cases if c.new))
    worker = _Worker(benchmark, output, settings, judges, among)
    for number, rows in spread(functools.partial(_itself, worker), _run_worker, todo, settings.processes):
        batch = todo[number]
        for row in rows:
            done[batch.settings, row["method"], row["name"]] = {"settings": batch.settings, "judges": measured} | row
        write_rows(path, list((known | done).values()))
        tell(len(done), total)
    ordered = {key: done[key] for m in methods for c in benchmark.cases if (key := (by[m.name], m.name, c.name))}
    write_rows(path, [*(r for key, r in known.items() if key not in ordered), *ordered.values()], WORDS)
    return list(ordered.values())


# --- summaries ----------------------------------------------------------------------------------------------------


def with_preference(rows: Sequence[Row]) -> None:
    """Give every row its `preference`: its PickScore's share among the methods' of its case. Nothing, where there is one method or no score."""
    scores: dict[str, list[Row]] = {}
    for row in rows:
        scores.setdefault(row["name"], []).append(row)
    if not all("pickscore" in r for r in rows) or any(len(some) < 2 for some in scores.values()):
        return
    for some in scores.values():
        for row, share in zip(
            some, metrics.preference(np.asarray([[r["pickscore"]] for r in some]))[:, 0], strict=True
        ):
            row["preference"] = float(share)


def summarise(rows: Sequence[Row]) -> list[Row]:
    """For each method over all cases, and over those of each kind where there are several: `kind`, `method`, `n`, and of every figure its mean
    over what could be measured, `FIGURE_low` and `FIGURE_high` (95 %; Wilson for shares, bootstrap for means) and `FIGURE_n`."""
    kinds = list(dict.fromkeys(r["kind"] for r in rows))
    summary = []
    for kind in ("all", *(kinds if len(kinds) > 1 else ())):
        for method in dict.fromkeys(r["method"] for r in rows):
            some = [r for r in rows if r["method"] == method and kind in ("all", r["kind"])]
            if not some:
                continue
            one: Row = {"kind": kind, "method": method, "n": len(some)}
            for name, figure in FIGURES.items():
                values = [r[name] for r in some if name in r and math.isfinite(r[name])]
                if not any(name in r for r in some):
                    continue
                low, high = metrics.wilson(sum(values), len(values)) if figure.share else metrics.bootstrap(values)
                mean = sum(values) / len(values) if values else math.nan
                one |= {name: mean, f"{name}_low": low, f"{name}_high": high, f"{name}_n": len(values)}
            summary.append(one)
    return summary


def add_distances(
    rows: Sequence[Row], summary: Sequence[Row], benchmark: Benchmark, methods: Sequence[Method], judges: Judges, output: Path, singular: bool = False,
    tell: Callable[[int, int], object] = lambda done, of: None,
) -> list[str]:  # fmt: skip
    """Give the rows of a summary over all cases the FID or CSFID that the benchmark's table shows; what could not be had, in words.

    Args:
        tell: called with how many pictures have been looked at, and of how many.
    """
    features = judges.load("features")
    if features is None:
        return []
    real: dict[str, list[np.ndarray]] = {}
    cases, of = benchmark.cases, len(benchmark.cases) * (len(methods) + 1)
    by = {(r["method"], r["name"]): r["settings"] for r in rows}
    for name, picture in benchmark.real():
        real.setdefault(name, []).append(features([picture])[0])
        tell(min(sum(map(len, real.values())), len(cases)), of)
    everything = np.stack([v for values in real.values() for v in values])
    notes = []
    for number, method in enumerate(methods):
        made = []
        for i, case in enumerate(cases):
            path = picture_path(output, method, case, by[method.name, case.name])
            made.append(features([images.load_image(path)])[0])
            tell(len(cases) * (number + 1) + i + 1, of)
        (row,) = [r for r in summary if r["kind"] == "all" and r["method"] == method.name]
        try:
            if "fid" in benchmark.columns:
                row["fid"] = metrics.frechet_distance(np.stack(made), everything, singular)
        except UsageError as error:
            note = f"{error} (--singular-fid)" if "ask for it anyway" in str(error) else str(error)
            notes += [note] if note not in notes else []
        if "csfid" in benchmark.columns:
            row["csfid"] = metrics.csfid(
                np.stack(made), [c.new for c in cases], {k: np.stack(v) for k, v in real.items()}
            )
    return notes


def cell(one: Row, name: str) -> str:
    """A figure of a summary as a table shows it, with its interval if it has one."""
    figure, value = FIGURES[name], one.get(name, math.nan)
    if math.isnan(value):
        return "-"
    if math.isnan(one.get(f"{name}_low", math.nan)) or name in ("seconds", "evaluations"):
        return f"{value * figure.factor:.{figure.digits}f}"
    numbers = (f"{one[name + end] * figure.factor:.{figure.digits}f}" for end in ("", "_low", "_high"))
    return "{} ({}-{})".format(*numbers)


def shown_columns(summary: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """Of `columns` those of which there is anything, and the cost."""
    return [c for c in (*columns, "seconds", "evaluations") if any(not math.isnan(r.get(c, math.nan)) for r in summary)]


def table(summary: Sequence[Row], columns: Sequence[str]) -> Any:
    """A `rich.table.Table` of `summarise`'s rows."""
    from rich.table import Table

    names = shown_columns(summary, columns)
    page = Table("cases", "method", "n", *(FIGURES[n].head for n in names))
    last = ""
    for one in summary:
        if last not in ("", one["kind"]):
            page.add_section()
        page.add_row(one["kind"], one["method"], str(one["n"]), *(cell(one, n) for n in names))
        last = one["kind"]
    return page


def sheet(benchmark: Benchmark, method: Method, rows: Sequence[Row], output: Path, each: int = 3) -> Image.Image | None:
    """A method's best, median and worst cases by the benchmark's `rank`: source, mask and edit; each once. None where nothing was measured."""
    rank = next((name for name in benchmark.rank if any(math.isfinite(r.get(name, math.nan)) for r in rows)), "")
    own = [r for r in rows if r["method"] == method.name and math.isfinite(r.get(rank, math.nan))]
    if not own:
        return None
    figure = FIGURES[rank]
    own.sort(key=lambda r: -figure.better * r[rank])
    each, middle = min(each, len(own)), max(0, len(own) // 2 - each // 2)
    picks = {
        "best": range(each),
        "median": range(middle, min(middle + each, len(own))),
        "worst": range(len(own) - each, len(own)),
    }
    cases = {c.name: c for c in benchmark.cases}
    lines, titles, shown = [], [], set[int]()
    for word, numbers in picks.items():
        for number in (i for i in numbers if i not in shown):
            shown.add(number)
            row, case = own[number], cases[own[number]["name"]]
            path = picture_path(output, method, case, row["settings"])
            value = f"{figure.head} {row[rank] * figure.factor:.{figure.digits}f}"
            line = [(case.name, benchmark.picture(case)), (f"{method.name}: {value}", images.load_image(path))]
            mask = benchmark.mask(case)
            if mask is not None:
                line.insert(1, ("where the edit is", Image.fromarray(mask.astype(np.uint8) * 255)))
            lines.append(line)
            titles.append(f"{word} {number + 1} of {len(own)}: {case.source_prompt} -> {case.prompt}")
    return images.contact_sheet(lines, titles=titles)


def write_results(
    output: Path, benchmark: Benchmark, methods: Sequence[Method], judges: Judges, settings: Settings, rows: Sequence[Row],
    summary: Sequence[Row], notes: Sequence[str],
) -> list[Path]:  # fmt: skip
    """Write `results.json` and the sheets; where they are."""
    from importlib import metadata

    from .. import runtime

    versions = {"iedit": runtime.VERSION} | {n: metadata.version(n) for n in ("torch", "diffusers", "transformers")}
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions["torchmetrics"] = metadata.version("torchmetrics")
    figures = {
        "benchmark": benchmark.title, "cases": len(benchmark.cases), "settings": dataclasses.asdict(settings),
        "methods": [dataclasses.asdict(m) for m in methods], "judges": dataclasses.asdict(judges), "digests": judges.digests(),
        "versions": versions, "notes": list(notes), "summary": list(summary),
    }  # fmt: skip
    write_json(output / "results.json", figures)
    written = [output / "results.json"]
    for method in methods:
        page = sheet(benchmark, method, rows, output)
        if page is not None:
            images.write_png(output / f"{method.name}.png", page)
            written.append(output / f"{method.name}.png")
    return written
