"""How well metrics agree with the truth: edits of several methods on held-out scenes of the picture-book world, where the exact answer is known, and
the rank correlation of each metric with the exact figures (`iedit evaluate agreement`).

A metric of photographs cannot know whether an edit is right; here it can be asked how often it would have ordered two edits as the truth does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..runtime import images
from . import metrics, truth
from .benchmarks import World
from .classifier import Classifier
from .embed import images_to_tensor
from .evaluate import Method, picture_path
from .figures import FIGURES
from .workers import Row

# Methods that differ in what they do, not only in what they cost.
METHODS = (
    Method("ito"),
    Method("ito", options={truth.LAMBDA_FIELD: 1.0}, name="ito-lambda-1"),
    Method("diffedit"),
    Method("sdedit"),
    Method("sdedit", options={"ratio": 0.4}, name="sdedit-0.4"),
    Method("iedit"),
    Method("p2p"),
)
# Exact figure -> its heading, and 1 where more is better.
EXACT = {
    "exact_l1_in": ("L1 inside to the exact target", -1),
    "exact_new": ("edit is there", 1),
    "exact_l1_out": ("L1 outside", -1),
}
# Figures that no rank correlation is asked of: the exact ones themselves, the cost, and those that order edits as another does.
_LEFT_OUT = ("l1_not_m", "mse", "mse_kept", "clip_whole", "preference", "new", "old", "seconds", "evaluations")
DRAWS = 300


class ReaderFeatures:
    """What the reader sees in a picture before it names anything, as features for FID: (B, 128)."""

    def __init__(self, reader: Classifier):
        self.reader = reader

    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """RGB pictures of 128x128 -> (B, 128) float32."""
        kept: list[torch.Tensor] = []
        handle = self.reader.summary.register_forward_hook(lambda module, args, output: kept.append(output))
        try:
            with torch.inference_mode():
                self.reader(images_to_tensor(list(pictures)))
        finally:
            handle.remove()
        return kept[0].float().numpy()


def add_exact(
    rows: Sequence[Row], benchmark: World, methods: Sequence[Method], reader: truth.Reader, output: Path
) -> None:
    """Give every row its exact figures: `exact_l1_in`, `exact_new`, `exact_l1_out` (`truth.measure`, `truth.judge`)."""
    by = {m.name: m for m in methods}
    cases = {c.name: c for c in benchmark.cases}
    for at in range(0, len(rows), 64):
        some = rows[at : at + 64]
        pictures = [
            images.load_image(picture_path(output, by[r["method"]], cases[r["name"]], r["settings"])) for r in some
        ]
        for row, picture, reading in zip(some, pictures, reader.read(pictures), strict=True):
            exact = benchmark.exact[row["name"]]
            found = truth.measure(exact, picture) | truth.judge(exact, reading)
            row.update({name: found[name.removeprefix("exact_")] for name in EXACT})


def features_of(
    rows: Sequence[Row],
    benchmark: World,
    methods: Sequence[Method],
    features: Callable[[Sequence[Image.Image]], np.ndarray],
    output: Path,
) -> dict[str, np.ndarray]:
    """Method -> (N, D) features of its edits, in the order of the cases."""
    by, settings = {m.name: m for m in methods}, {(r["method"], r["name"]): r["settings"] for r in rows}
    return {
        name: np.concatenate(
            [features([images.load_image(picture_path(output, method, c, settings[name, c.name]))]) for c in benchmark.cases]
        )
        for name, method in by.items()
    }  # fmt: skip


def real_features(n: int, seed: int, features: Callable[[Sequence[Image.Image]], np.ndarray]) -> np.ndarray:
    """Features of renders of other held-out scenes, `n` of each kind: what a collection of real pictures is to photographs."""
    cases = [c for kind in truth.TEXT_KINDS for c in truth.edit_cases(kind, n, seed + 1)]
    return np.concatenate([features([c.target]) for c in cases])


# --- correlations -------------------------------------------------------------------------------------------------


def _rank(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Spearman's and Kendall's (tau-b) rank correlation; NaN where one of the two says nothing."""
    from scipy import stats

    fine = np.isfinite(a) & np.isfinite(b)
    a, b = a[fine], b[fine]
    if len(a) < 2 or (a == a[0]).all() or (b == b[0]).all():
        return math.nan, math.nan
    return float(stats.spearmanr(a, b).statistic), float(stats.kendalltau(a, b).statistic)


def _with_interval(
    estimate: Callable[[np.ndarray], tuple[float, float]], cases: int, draws: int, seed: int = 0
) -> dict[str, float]:
    """Both correlations with their 95 % intervals by the percentile bootstrap over cases: edits of one case are not independent.

    Args:
        estimate: of the numbers of the cases, drawn with replacement.
    """
    rng = np.random.default_rng(seed)
    drawn = np.asarray([estimate(rng.integers(0, cases, cases)) for _ in range(draws)])
    found: dict[str, float] = {}
    for i, (name, value) in enumerate(zip(("spearman", "kendall"), estimate(np.arange(cases)), strict=True)):
        kept = drawn[np.isfinite(drawn[:, i]), i]
        low, high = np.quantile(kept, (0.025, 0.975)) if len(kept) else (math.nan, math.nan)
        found |= {name: value, f"{name}_low": float(low), f"{name}_high": float(high)}
    return found


def correlations(
    rows: Sequence[Row],
    distances: Mapping[str, tuple[Mapping[str, np.ndarray], np.ndarray]] | None = None,
    draws: int = DRAWS,
    tell: Callable[[int, int], object] = lambda done, of: None,
) -> list[Row]:
    """The rank correlation of every metric with every exact figure, each turned so that 1 means that the metric orders edits as the truth does:
    for single edits, all methods' together (`level` "edits"), and for methods, by their means over the cases ("methods").

    Args:
        rows: of `evaluate.run`, with the exact figures: as many for each method, in the same order of cases.
        distances: heading -> (method -> features of its edits, features of real pictures): FID, for methods only.
        draws: of the bootstrap.
        tell: called with how many correlations are done, and of how many.

    Returns:
        Dicts with `metric`, `level`, `exact`, `spearman`, `spearman_low`, `spearman_high`, and the same of `kendall`.
    """
    methods = list(dict.fromkeys(r["method"] for r in rows))

    def values(name: str) -> np.ndarray:
        """(methods, cases)"""
        return np.asarray([[r.get(name, math.nan) for r in rows if r["method"] == m] for m in methods], np.float64)

    names = [n for n in FIGURES if n not in _LEFT_OUT and any(math.isfinite(r.get(n, math.nan)) for r in rows)]
    fid = {head: _Distances([f[m] for m in methods], real) for head, (f, real) in (distances or {}).items()}
    asked: list[tuple[str, str, str, int, Callable[[np.ndarray], tuple[float, float]]]] = []
    for exact, (_, better) in EXACT.items():
        right = values(exact) * better
        cases = right.shape[1]
        for name in names:
            measured = values(name) * (FIGURES[name].better or 1)
            measured = np.where(np.isposinf(measured), 1e9, measured)  # the PSNR of what was not touched
            head = FIGURES[name].head.partition(" x1e")[0]
            asked.append((head, "edits", exact, cases, functools.partial(_of_edits, measured, right)))
            asked.append((head, "methods", exact, cases, functools.partial(_of_methods, measured, right)))
        for head, distance in fid.items():
            asked.append((head, "methods", exact, cases, functools.partial(_of_distances, distance, right)))
    found: list[Row] = []
    for number, (metric, level, exact, cases, estimate) in enumerate(asked):
        found.append({"metric": metric, "level": level, "exact": exact} | _with_interval(estimate, cases, draws))
        tell(number + 1, len(asked))
    return found


def _of_edits(measured: np.ndarray, right: np.ndarray, cases: np.ndarray) -> tuple[float, float]:
    return _rank(measured[:, cases].ravel(), right[:, cases].ravel())


def _of_methods(measured: np.ndarray, right: np.ndarray, cases: np.ndarray) -> tuple[float, float]:
    return _rank(np.nanmean(measured[:, cases], 1), right[:, cases].mean(1))


class _Distances:
    """FID of every method's edits of the cases that are drawn; the draws are the same for every exact figure, and so is what they cost."""

    def __init__(self, features: Sequence[np.ndarray], real: np.ndarray):
        self.features, self.real = features, real
        self.known: dict[bytes, np.ndarray] = {}

    def __call__(self, cases: np.ndarray) -> np.ndarray:
        """(methods,)"""
        key = cases.tobytes()
        if key not in self.known:
            found = [metrics.frechet_distance(f[cases], self.real, singular=True) for f in self.features]
            self.known[key] = np.asarray(found)
        return self.known[key]


def _of_distances(distance: _Distances, right: np.ndarray, cases: np.ndarray) -> tuple[float, float]:
    return _rank(-distance(cases), right[:, cases].mean(1))


def _lines(found: Sequence[Row], level: str) -> Iterator[list[str]]:
    for metric in dict.fromkeys(r["metric"] for r in found if r["level"] == level):
        line = [metric]
        for exact in EXACT:
            (one,) = [r for r in found if (r["metric"], r["level"], r["exact"]) == (metric, level, exact)]
            for name in ("spearman", "kendall"):
                line.append(
                    f"{one[name]:.2f} ({one[f'{name}_low']:.2f} to {one[f'{name}_high']:.2f})"
                    if math.isfinite(one[name])
                    else "-"
                )
        yield line


def heads() -> list[str]:
    """Headings of `table`, from the second column on."""
    return [f"{head}: {name}" for head, _ in EXACT.values() for name in ("Spearman", "Kendall")]


def table(found: Sequence[Row], level: str) -> Any:
    """A `rich.table.Table` of the correlations of a level, a row for each metric."""
    from rich.table import Table

    page = Table("metric", *heads(), title={"edits": "single edits", "methods": "methods"}[level])
    for line in _lines(found, level):
        page.add_row(*line)
    return page


def markdown(found: Sequence[Row], level: str) -> str:
    """The same in markdown."""
    lines = [["metric", *heads()], ["---"] * (1 + len(heads())), *_lines(found, level)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
