"""Are the defaults of ITO the right ones? Each option's other values against the default, on the same held-out edits, for docs/defaults.md.

    python bench/defaults.py --reader WEIGHTS [--n 20] [--layouts 10] [--engines DIR] [--processes 2] [--write docs/defaults.md]

One option is changed at a time. The default is what the checkpoint recommends, at lambda 0.6, so that the guidance image takes part in every
edit. Figures are paired: the same cases, noises and default for every variant, on a seed that nothing was chosen on. Variants share the stages
that they have in common through the editor's cache, so evaluations are counted apart, without it, on one edit of each kind. Every case is a row of
OUTPUT/STEPS-steps/cases.csv; the same command goes on from there, and a larger --n adds to a smaller one, also of a few lines (--only).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from common import FILE, FOLDER, Command, place, replace, suite
from tables import table

from iedit.runtime.errors import UsageError
from iedit.runtime.options import DEFAULT_LAMBDA, Options
from iedit.runtime.presets import PRESETS
from iedit.runtime.stage_cache import StageCache
from iedit.training import metrics, truth
from iedit.training.cli_evaluate import load_suite, progress
from iedit.training.evaluate import model_settings

Row = dict[str, Any]
STEPS = 25
BASE = Options(lam=DEFAULT_LAMBDA)
FIGURES = {"new": ("edit is there", 1), "l1_in": ("L1 inside", -1), "l1_out": ("L1 outside", -1), "mask_iou": ("mask IoU", 1)}  # fmt: skip
# What counts as a trifle although its interval excludes 0: of a share or an IoU, and of the default's own L1.
TRIFLE, TRIFLE_OF_L1 = 0.01, 0.03
TEXT, LAYOUTS, BOTH = truth.TEXT_KINDS, truth.LAYOUT_KINDS, truth.KINDS


@dataclass(frozen=True, eq=False)
class Variant:
    """One value of one option.

    Attributes:
        section: of the document. option, value: as the tables name them.
        changed: fields of `Options` that differ from `BASE`, nested as they are there.
        kinds: of edits that it is measured on.
        steps: of sampling.
        base: the variant that it is compared with; None is the default.
        shows: what is judged, a picture of `EditResult`.
    """

    section: str
    option: str
    value: str
    changed: Mapping[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = TEXT
    steps: int = STEPS
    base: Variant | None = None
    shows: str = "image"

    @property
    def method(self) -> truth.Method:
        """Under a name that says everything that it depends on, so that a row is never taken for another variant's."""
        options = _changed(BASE, self.changed)
        fields = {f.name: getattr(options, f.name) for f in dataclasses.fields(Options)}
        name = json.dumps(self.changed, sort_keys=True) + ("" if self.shows == "image" else f" {self.shows}")
        return truth.Method(name, "ito", self.kinds, fields, self.shows)


def _changed(options: Any, changed: Mapping[str, Any]) -> Any:
    return dataclasses.replace(
        options, **{k: _changed(getattr(options, k), v) if isinstance(v, Mapping) else v for k, v in changed.items()}
    )


def _differences(options: Any, base: Any = BASE) -> dict[str, Any]:
    """What differs from `BASE`, nested as there."""
    found = {}
    for f in dataclasses.fields(options):
        value, other = getattr(options, f.name), getattr(base, f.name)
        if value != other:
            found[f.name] = _differences(value, other) if dataclasses.is_dataclass(value) else value
    return found


def _both_phases(**changed: Any) -> dict[str, Any]:
    return {"guidance": changed, "final": changed}


DEFAULT = Variant("", "default", "", {}, BOTH)
_DRAWN = Variant(
    "Guidance image, judged itself, against the default edit", "guidance image", "default", {}, BOTH, shows="guidance"
)
_LAMBDA_1 = Variant("Lambda", "lambda", "1", {"lam": 1.0}, BOTH)
_SMALL = ("thing", "colour")  # whose masks are small, so that lambda is chosen as 1
VARIANTS = (
    Variant("Loss and update", "preservation loss", "mean over the kept area", {"kept_area": True}),
    Variant("Loss and update", "update", "Adam, fresh at each step", _both_phases(update="adam"), BOTH),
    Variant("Loss and update", "update", "Adam, carried on", _both_phases(update="adam", carry=True)),
    Variant("Loss and update", "lr, both passes", "0.05", _both_phases(lr=0.05)),
    Variant("Loss and update", "lr, both passes", "0.2", _both_phases(lr=0.2)),
    Variant("Updated steps", "t_u, final pass", "5", {"final": {"t_u": 5}}),
    Variant("Updated steps", "t_u, final pass", "10", {"final": {"t_u": 10}}, BOTH),
    Variant("Updated steps", "t_u, final pass", "20", {"final": {"t_u": 20}}, BOTH),
    Variant("Updated steps", "t_u, final pass", "25", {"final": {"t_u": 25}}, BOTH),
    Variant("Updated steps", "t_u, both passes", "25", _both_phases(t_u=25)),
    Variant("Updated steps", "k, final pass", "2", {"final": {"k": 2}}),
    Variant("Updated steps", "k, final pass", "30", {"final": {"k": 30}}, BOTH),
    Variant("Updated steps", "t_u, guidance image", "20", {"guidance": {"t_u": 20}}, BOTH),
    Variant("Updated steps", "t_u and k, guidance image", "20 and 30", {"guidance": {"t_u": 20, "k": 30}}, BOTH),
    Variant("Lambda", "lambda", "0", {"lam": 0.0}, BOTH),
    Variant("Lambda", "lambda", "0.2", {"lam": 0.2}, BOTH),
    Variant("Lambda", "lambda", "0.4", {"lam": 0.4}, BOTH),
    Variant("Lambda", "lambda", "0.8", {"lam": 0.8}, BOTH),
    _LAMBDA_1,
    Variant("Lambda", "lambda", "chosen by the mask's area", {"lam": None}),
    Variant("At lambda 1, against lambda 1", "t_u, lambda 1", "10", {"lam": 1.0, "final": {"t_u": 10}}, _SMALL, base=_LAMBDA_1),
    Variant("At lambda 1, against lambda 1", "t_u, lambda 1", "25", {"lam": 1.0, "final": {"t_u": 25}}, _SMALL, base=_LAMBDA_1),
    Variant("At lambda 1, against lambda 1", "lr, lambda 1", "0.05", {"lam": 1.0, "final": {"lr": 0.05}}, _SMALL, base=_LAMBDA_1),
    Variant("Mask", "mode", "trajectory", {"mask": {"mode": "trajectory"}}),
    Variant("Mask", "mode", "none", {"mask": {"mode": "none"}}),
    Variant("Mask", "norm", "clamp, threshold 0.5", {"mask": {"norm": "clamp"}}),
    Variant("Mask", "sigma", "0", {"mask": {"sigma": 0.0}}),
    Variant("Mask", "sigma", "2", {"mask": {"sigma": 2.0}}),
    Variant("Mask", "threshold", "0.1", {"mask": {"threshold": 0.1}}, BOTH),
    Variant("Mask", "threshold", "0.2", {"mask": {"threshold": 0.2}}, BOTH),
    Variant("Mask", "threshold", "0.4", {"mask": {"threshold": 0.4}}),
    Variant("Mask", "seeds", "1", {"mask": {"seeds": 1}}),
    Variant("Mask", "seeds", "10", {"mask": {"seeds": 10}}),
    Variant("Mask", "guided", "without guidance", {"mask": {"guided": False}}),
    Variant("Mask", "strength", "0.5", {"mask": {"strength": 0.5}}, BOTH),
    Variant("Inversion", "condition", "unconditional", {"inversion": "unconditional"}),
    Variant("Inversion", "scale", "5", {"inversion_scale": 5.0}),
    Variant("Inversion", "timestep told", "of the source level", {"inversion_evaluate": "source"}),
    Variant("Inversion", "encoding ratio", "0.8", {"encoding_ratio": 0.8}, BOTH),
    Variant("Guidance image", "its path", "inverted", {"guidance_path": "inverted"}, BOTH),
    Variant("Guidance image", "its path", "inverted, through the VAE", {"round_trip": True}),
    Variant("Guidance image", "its path", "inverted, refined", {"refine": True}, BOTH),
    _DRAWN,
    Variant("Guidance image, judged itself, against the default's", "t_u", "10", {"guidance": {"t_u": 10}}, BOTH, base=_DRAWN, shows="guidance"),
    Variant("Guidance image, judged itself, against the default's", "t_u", "20", {"guidance": {"t_u": 20}}, BOTH, base=_DRAWN, shows="guidance"),
    Variant("Guidance image, judged itself, against the default's", "t_u and k", "20 and 30", {"guidance": {"t_u": 20, "k": 30}}, BOTH, base=_DRAWN, shows="guidance"),
    Variant("Composite", "composite", "latent", {"composite": "latent"}),
    Variant("Composite", "composite", "pixel", {"composite": "pixel"}),
    Variant("Sampling", "steps", "12", steps=12),
    Variant("Sampling", "steps", "50", steps=50),
    Variant("Sampling", "guidance scale", "3", {"guidance_scale": 3.0}),
    Variant("Sampling", "guidance scale", "7.5", {"guidance_scale": 7.5}),
    Variant("Sampling", "guided steps", "all", {"guidance_until": 1.0}, BOTH),
    Variant("Sampling", "guided steps", "4 of 25", {"guidance_until": 0.16}),
    Variant("Sampling", "timestep spacing", "trailing", {"timestep_spacing": "trailing"}),
    Variant("Together", "preset", "exact", _differences(PRESETS["exact"].options), BOTH),
    Variant("Together", "preset", "paper", _differences(PRESETS["paper"].options), BOTH),
)  # fmt: skip


# --- figures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A figure of a variant less the default's, mean over the same cases, with its 95 % interval; `verdict` is "better", "worse" or ""."""

    value: float
    low: float
    high: float
    verdict: str


def difference(name: str, variant: Sequence[float], default: Sequence[float]) -> Difference:
    """Paired, by the percentile bootstrap over cases.

    A verdict takes an interval that excludes 0 by more than a trifle (`TRIFLE`, `TRIFLE_OF_L1`). The bootstrap is too sure of a share of which
    few cases changed sides, so of shares an exact sign test over these has to agree at 5 %.

    Args:
        name: of `FIGURES`.
    """
    pairs = [(v, d) for v, d in zip(variant, default, strict=True) if not math.isnan(v - d)]
    if not pairs:
        return Difference(math.nan, math.nan, math.nan, "")
    changes = [v - d for v, d in pairs]
    value, (low, high) = sum(changes) / len(changes), metrics.bootstrap(changes)
    least = TRIFLE_OF_L1 * sum(d for _, d in pairs) / len(pairs) if name.startswith("l1") else TRIFLE
    sure = (low > 0 or high < 0) and abs(value) > least
    if name in truth.SHARES:
        sure = sure and _sign_test(sum(c > 0 for c in changes), sum(c < 0 for c in changes)) < 0.05
    return Difference(value, low, high, "" if not sure else "better" if value * FIGURES[name][1] > 0 else "worse")


def _sign_test(up: int, down: int) -> float:
    """Two-sided p of so many changes either way if both were as likely (McNemar's exact test)."""
    n, fewer = up + down, min(up, down)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n)


def compare(variant: Sequence[Row], default: Sequence[Row]) -> dict[str, Difference]:
    """The differences in all `FIGURES` of rows of one kind; the default's rows are those of the same cases."""
    known = {r["number"]: r for r in default}
    return {
        name: difference(name, [r[name] for r in variant], [known[r["number"]][name] for r in variant])
        for name in FIGURES
    }


def verdict(found: Mapping[str, Difference]) -> str:
    """In words: which figures are better and which worse than noise explains."""
    parts = []
    for word in ("better", "worse"):
        names = [FIGURES[name][0] for name, d in found.items() if d.verdict == word]
        parts += [f"**{word}**: {', '.join(names)}"] if names else []
    return "; ".join(parts) or "no difference beyond noise"


# --- tables -------------------------------------------------------------------------------------------------------


def _number(name: str, value: float, sign: bool = True) -> str:
    plus = "+" if sign else ""
    return f"{100 * value:{plus}.0f} %" if name == "new" else f"{value:{plus}.{3 if name == 'mask_iou' else 4}f}"


def _cell(name: str, d: Difference) -> str:
    if math.isnan(d.value):
        return "-"
    if d.low == d.high == 0:
        return "0"
    text = f"{_number(name, d.value)} ({_number(name, d.low)} to {_number(name, d.high)})"
    return f"**{text}**" if d.verdict else text


def default_table(rows: Sequence[Row], costs: Sequence[Row]) -> str:
    """The default's own figures, a line for each kind."""
    lines = []
    for one in truth.summarise(rows):
        if one["kind"] in truth.KINDS:
            cells = [f"{_number(f, one[f], False)} ({_number(f, one[f + '_low'], False)} to {_number(f, one[f + '_high'], False)})" for f in FIGURES]  # fmt: skip
            lines.append(
                [one["kind"], str(one["n"]), *cells, _evaluations([r for r in costs if r["kind"] == one["kind"]])]
            )
    return table(["edits", "n", *(head for head, _ in FIGURES.values()), "evaluations"], lines)


def _kinds(rows: Mapping[Variant, Sequence[Row]], variant: Variant) -> Iterator[tuple[str, list[Row]]]:
    for kind in variant.kinds:
        yield kind, [r for r in rows[variant] if r["kind"] == kind]


def _evaluations(rows: Sequence[Row]) -> str:
    counts = [f"{sum(found) / len(found):.0f}" for kinds in (TEXT, LAYOUTS) if (found := [r["evaluations"] for r in rows if r["kind"] in kinds])]  # fmt: skip
    return " / ".join(counts)


def document(rows: Mapping[Variant, Sequence[Row]], costs: Mapping[Variant, Sequence[Row]]) -> str:
    """Everything between the marks: the default's figures, and a table of differences for each section.

    Args:
        rows: of the default and the variants.
        costs: rows whose evaluations are those of an edit that takes nothing from a cache.
    """
    found = {
        variant: {kind: compare(some, [r for r in rows[variant.base or DEFAULT] if r["kind"] == kind]) for kind, some in _kinds(rows, variant)}
        for variant in rows if variant is not DEFAULT
    }  # fmt: skip
    intervals = [d for kinds in found.values() for ds in kinds.values() for d in ds.values() if d.low != d.high]
    parts = [
        "The default:", "", default_table(rows[DEFAULT], costs[DEFAULT]), "",
        f"{len(found)} variants, {len(intervals)} intervals of something that moved at all. If nothing made any difference, about "
        f"{round(0.05 * len(intervals))} of them would exclude 0 by chance; {sum(d.verdict != '' for d in intervals)} do so by more than a trifle.", "",
    ]  # fmt: skip
    for section in dict.fromkeys(v.section for v in found):
        some = {v: kinds for v, kinds in found.items() if v.section == section}
        shown = [n for n in FIGURES if any(d.low != d.high for kinds in some.values() for ds in kinds.values() for m, d in ds.items() if m == n)]  # fmt: skip
        lines, last = [], ("", "")
        for v, kinds in some.items():
            for number, (kind, ds) in enumerate(kinds.items()):
                named = ["" if v.option == last[0] else v.option, v.value, _evaluations(costs[v])] if number == 0 else [""] * 3  # fmt: skip
                last = (v.option, v.value)
                lines.append([*named, kind, *(_cell(n, ds[n]) for n in shown), verdict(ds)])
        head = ["option", "value", "evaluations", "edits", *(FIGURES[n][0] for n in shown), "verdict"]
        parts += [f"### {section}", "", table(head, lines), ""]
    return "\n".join(parts).rstrip() + "\n"


# --- running ------------------------------------------------------------------------------------------------------


def some_of(names: Sequence[str]) -> list[Variant]:
    """The default and the variants of these names ("OPTION VALUE"), with those that they are compared with; all of them if there is none.

    Raises:
        UsageError: there is no such variant.
    """
    named = {f"{v.option} {v.value}": v for v in VARIANTS}
    unknown = [n for n in names if n not in named]
    if unknown:
        raise UsageError(f"--only: {unknown[0]!r} is not one of {'; '.join(named)}")
    wanted = {named[n] for n in names} or set(VARIANTS)
    wanted |= {v.base for v in wanted if v.base}
    return [DEFAULT, *(v for v in VARIANTS if v in wanted)]


def load_cached(model: str, reader: Path, backend: str, engines: str | None) -> tuple[Any, Any]:
    """`cli_evaluate.load_suite` with a cache."""
    editor, judge = load_suite(model, reader, backend, engines)
    editor.cache = StageCache()
    return editor, judge


def measure(
    variants: Sequence[Variant],
    counts: Mapping[str, int],
    load: Callable[[], Any],
    what: str,
    output: Path,
    **more: Any,
) -> dict[Variant, list[Row]]:
    """The rows of every variant, those of earlier runs included.

    Args:
        counts: kind -> how many edits of it.
        load: makes an editor and a reader, see `truth.run`.
        what: is measured, for the line of progress.
        more: `seed`, `batch` and `processes` of `truth.run`.
    """
    editor, judge = load()
    rows: dict[Variant, list[Row]] = {v: [] for v in variants}
    for steps in dict.fromkeys(v.steps for v in variants):
        some = {v.method.name: v for v in variants if v.steps == steps}
        for count in dict.fromkeys(counts.values()):
            kinds = [k for k, n in counts.items() if n == count and any(k in v.kinds for v in some.values())]
            if not kinds:
                continue
            with progress(f"{what}, {steps} steps, {', '.join(kinds)}") as tell:
                found = truth.run(
                    editor, judge, [v.method for v in some.values()], kinds, count, settings=model_settings(editor), steps=steps,
                    output=output / f"{steps}-steps", tell=tell, load=load, **more,
                )  # fmt: skip
            for row in found:
                rows[some[row["method"]]].append(row)
    return rows


@click.command(cls=Command)
@suite
@click.option("--n", "count", default=20, show_default=True, type=click.IntRange(2), help="Edits of each text kind.")
@click.option("--layouts", default=10, show_default=True, type=click.IntRange(2), help="Edits of each layout kind.")
@click.option(
    "--only",
    "chosen",
    multiple=True,
    metavar="'OPTION VALUE'",
    help="These lines of the tables alone, for instance 'steps 12'; repeat for several. They are written to a place of their own, "
    "<!-- closer -->.",
)
@click.option("--seed", default=11, show_default=True, help="Of the held-out edits; nothing was chosen on it.")
@click.option("--batch", default=10, show_default=True, type=click.IntRange(1), help="Edits per call.")
@click.option("--processes", default=1, show_default=True, type=click.IntRange(1))
@click.option("--output", type=FOLDER, default=Path("build/defaults"), show_default=True)
@click.option("--write", type=FILE, default=None, help="A document whose tables are replaced.")
def main(model: str, reader: Path, backend: str, engines: str | None, count: int, layouts: int, chosen: tuple[str, ...], seed: int, batch: int,
         processes: int, output: Path, write: Path | None) -> None:  # fmt: skip
    """Measure every option of ITO that is a choice, one at a time."""
    mark = "closer" if chosen else "defaults"
    if write is not None:
        place(write, mark)
    asked = some_of(chosen)
    named = (model, reader, backend, None if engines is None else str(engines))
    more = {"seed": seed, "batch": batch, "processes": processes}
    costs = measure(
        asked, dict.fromkeys(BOTH, 1), functools.partial(load_suite, *named), "evaluations", output / "costs", **more
    )
    counts = dict.fromkeys(TEXT, count) | dict.fromkeys(LAYOUTS, layouts)
    text = document(measure(asked, counts, functools.partial(load_cached, *named), "edits", output, **more), costs)
    click.echo(text)
    if write is not None:
        replace(write, mark, text)


if __name__ == "__main__":
    main()
