"""How well metrics agree with the truth: correlations of rows whose order is known, exact figures of pictures that are known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from iedit.training import agreement, truth
from iedit.training.benchmarks import World
from iedit.training.classifier import Classifier
from iedit.training.evaluate import Method, picture_path


def rows_of(values: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Figures (methods, cases) as rows."""
    shape = next(iter(values.values())).shape
    return [
        {"method": f"m{m}", "name": f"c{c}", "kind": "thing", "settings": "s"} | {n: float(v[m, c]) for n, v in values.items()}
        for m in range(shape[0]) for c in range(shape[1])
    ]  # fmt: skip


def find(found: list[dict[str, Any]], metric: str, level: str, exact: str) -> dict[str, Any]:
    (one,) = [r for r in found if (r["metric"], r["level"], r["exact"]) == (metric, level, exact)]
    return one


def test_a_metric_that_orders_as_the_truth_has_1_and_one_that_turns_it_round_minus_1() -> None:
    rng = np.random.default_rng(0)
    error = rng.random((5, 12)) + np.arange(5)[:, None]
    values = {"exact_l1_in": error, "exact_new": (error < 2).astype(float), "exact_l1_out": rng.random((5, 12)),
              "l1": error**3, "psnr": error, "ssim": rng.random((5, 12)), "clip_score": np.full((5, 12), 0.5), "seconds": error}  # fmt: skip
    found = agreement.correlations(rows_of(values), draws=40)
    for level in ("edits", "methods"):
        same, turned = find(found, "L1", level, "exact_l1_in"), find(found, "PSNR", level, "exact_l1_in")
        assert (same["spearman"], same["kendall"]) == pytest.approx((1, 1)) and same["spearman_low"] == pytest.approx(1)
        assert (turned["spearman"], turned["kendall"]) == pytest.approx((-1, -1))
        noise = find(found, "SSIM", level, "exact_l1_out")
        assert noise["spearman_low"] <= noise["spearman"] <= noise["spearman_high"] and noise["spearman_low"] < 0.5
        assert math.isnan(find(found, "CLIPScore", level, "exact_l1_in")["spearman"])  # it says the same of every edit
    assert "s" not in {r["metric"] for r in found}
    yes = find(found, "L1", "edits", "exact_new")
    assert yes["spearman"] == pytest.approx(stats.spearmanr(-error.ravel(), values["exact_new"].ravel()).statistic)
    assert yes["kendall"] == pytest.approx(stats.kendalltau(-error.ravel(), values["exact_new"].ravel()).statistic)
    assert str(agreement.correlations(rows_of(values), draws=40)) == str(found)  # the same intervals again
    assert agreement.markdown(found, "methods").count("\n") == 5  # two of heading, four metrics
    assert agreement.table(found, "edits").row_count == 4


def test_what_is_infinite_counts_as_the_best_and_what_is_missing_is_left_out() -> None:
    error = np.arange(12.0).reshape(3, 4)
    psnr = -error.copy()
    psnr[0, 0], psnr[1, 1] = math.inf, math.nan
    found = agreement.correlations(
        rows_of({"exact_l1_in": error, "exact_new": error * 0 + 1, "exact_l1_out": error, "psnr": psnr}), draws=10
    )
    assert find(found, "PSNR", "edits", "exact_l1_in")["kendall"] == pytest.approx(1)
    assert math.isnan(find(found, "PSNR", "edits", "exact_new")["kendall"])


def test_fid_orders_methods_by_how_far_their_edits_are_from_real_pictures() -> None:
    rng = np.random.default_rng(1)
    real, error = rng.normal(size=(40, 3)), np.arange(4.0)[:, None] + rng.random((4, 30)) * 0.1
    features = {f"m{m}": rng.normal(size=(30, 3)) + 2 * m for m in range(4)}
    rows = rows_of({"exact_l1_in": error, "exact_new": -error, "exact_l1_out": -error})
    found = agreement.correlations(rows, {"FID": (features, real)}, draws=20)
    assert find(found, "FID", "methods", "exact_l1_in")["spearman"] == pytest.approx(1)
    assert find(found, "FID", "methods", "exact_l1_out")["kendall"] == pytest.approx(-1)
    assert {r["level"] for r in found} == {"methods"}


def test_exact_figures_are_those_of_the_truth_suite_of_the_pictures_on_disk(tmp_path: Path) -> None:
    benchmark, method = World(1, seed=5), Method("sdedit")
    rows: list[dict[str, Any]] = [
        {"method": "sdedit", "name": c.name, "kind": c.kind, "settings": "s"} for c in benchmark.cases
    ]
    for case in benchmark.cases:
        path = picture_path(tmp_path, method, case, "s")
        path.parent.mkdir(parents=True, exist_ok=True)
        (benchmark.exact[case.name].target if case.kind == "thing" else benchmark.picture(case)).save(path)
    reader = Classifier()
    agreement.add_exact(rows, benchmark, [method], reader, tmp_path)
    thing = next(r for r in rows if r["kind"] == "thing")
    assert thing["exact_l1_in"] == 0 and thing["exact_l1_out"] < 0.001
    for row in rows:
        if row["kind"] != "thing":  # nothing was edited
            want = truth.measure(benchmark.exact[row["name"]], benchmark.exact[row["name"]].source)
            assert row["exact_l1_in"] == want["l1_in"] > 0.01 and row["exact_l1_out"] == 0
        exact = benchmark.exact[row["name"]]
        shown = exact.target if row["kind"] == "thing" else exact.source
        assert row["exact_new"] == truth.judge(exact, reader.read([shown])[0])["new"]
    seen = agreement.ReaderFeatures(reader)
    made = agreement.features_of(rows, benchmark, [method], seen, tmp_path)
    assert made["sdedit"].shape == (3, 128)
    assert made["sdedit"][0] == pytest.approx(seen([benchmark.exact["thing-000"].target])[0], rel=1e-4, abs=1e-6)
    assert agreement.real_features(1, 5, seen).shape == (3, 128)
