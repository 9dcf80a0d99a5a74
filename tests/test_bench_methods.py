"""bench/methods.py: tables of rows whose order is known, and what is said of the papers' statements."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from iedit.runtime.errors import UsageError
from iedit.training import truth
from iedit.training.workers import write_rows

N = 40


def rows_of(method: str, kinds: tuple[str, ...] = truth.TEXT_KINDS, n: int = N, **figures: Any) -> list[dict[str, Any]]:
    """Rows of a method; a figure is a number, or one for each case."""
    made = []
    for kind in kinds:
        for number in range(n):
            row: dict[str, Any] = {
                "settings": "s seed=0 steps=25",
                "method": method,
                "kind": kind,
                "number": number,
                "things": 1,
            }
            row |= dict.fromkeys((*truth.SHARES, *truth.MEANS), 1.0) | {"outside": 0.5}
            row |= {k: float(v[number]) if isinstance(v, np.ndarray) else v for k, v in figures.items()}
            made.append(row)
    return made


def few(share: float) -> np.ndarray:
    """1 for the first share of the cases, else 0."""
    return (np.arange(N) < share * N).astype(float)


@pytest.fixture
def methods(bench: Callable[[str], Any]) -> Any:
    return bench("methods")


def lines(text: str, *cells: str) -> list[list[str]]:
    """The lines of tables that begin with these cells."""
    found = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return [line for line in found if line[: len(cells)] == list(cells)]


def test_a_statement_is_confirmed_or_refuted_where_its_interval_excludes_0_else_undecided(methods: Any) -> None:
    rng = np.random.default_rng(0)
    rows = [
        *rows_of("ito", new=few(1.0), old=few(0.1), l1_out=rng.random(N), ssim_out=0.9),
        *rows_of("diffedit", new=few(0.5), old=few(0.1), l1_out=rng.random(N)),
        *rows_of("p2p", new=few(0.8)),
    ]
    text = methods.statements_table(rows)
    said = {line[1]: line[3:] for line in lines(text, "ITO, Table 1")}
    assert said["edit is there: ito > diffedit"][0] == str(3 * N)
    assert re.fullmatch(r"\+50\.0 % \(\+\d\d\.\d % to \+\d\d\.\d %\)", said["edit is there: ito > diffedit"][1])
    assert said["edit is there: ito > diffedit"][2] == "**confirmed**"
    assert said["edit is there: diffedit > p2p"][1].startswith("-30.0 %")
    assert said["edit is there: diffedit > p2p"][2] == "**refuted**"
    assert said["as old: diffedit > ito"][1:] == ["+0.0 % (+0.0 % to +0.0 %)", "undecided"]
    assert not any(
        "iedit" in line[1] or "controlnet" in line[1] for line in lines(text)
    )  # not in the rows: nothing is said


def test_differences_are_of_the_same_cases_and_of_as_many_of_each_kind(methods: Any) -> None:
    value = np.arange(N) / N
    rows = rows_of("a", l1_out=value) + [r for r in rows_of("b", l1_out=value + 0.25) if r["number"] >= 10 or r["kind"] == "colour"]  # fmt: skip
    assert methods.paired(rows, "b", "a", "l1_out", ("colour",)) == pytest.approx((N, 0.25, 0.25, 0.25))
    assert methods.paired(rows, "b", "a", "l1_out", truth.TEXT_KINDS)[0] == 3 * (N - 10)
    assert methods.paired(rows, "b", "a", "l1_out", truth.TEXT_KINDS)[1] == pytest.approx(0.25)
    nothing = methods.paired(rows, "b", "c", "l1_out", ("thing",))
    assert nothing[0] == 0 and nothing[1] != nothing[1]


def test_the_table_has_every_method_of_every_kind_and_text_together_only_where_the_kinds_are_equal(
    methods: Any,
) -> None:
    rows = [*rows_of("ito", truth.KINDS, new=few(0.5)), *rows_of("sdedit", ("thing",)), *rows_of("sdedit", ("colour", "background"), n=5)]  # fmt: skip
    text = methods.methods_table(rows)
    for kind in truth.KINDS:
        (line,) = lines(text, kind, "ito")
        assert line[2] == str(N) and re.fullmatch(r"50\.0 % \(3\d\.\d % to 6\d\.\d %\)", line[3])  # Wilson's
    assert lines(text, "text", "ito")[0][2] == str(3 * N)
    assert lines(text, "background", "sdedit")[0][2] == "5" and not lines(text, "text", "sdedit")


def test_each_lambda_is_compared_with_each_other_kind_by_kind(methods: Any) -> None:
    rows = [
        *rows_of("ito", l1_in=0.3, evaluations=70.0),
        *rows_of("ito lambda=1", l1_in=0.2, evaluations=66.0),
        *rows_of("ito lambda=0.6", l1_in=0.6, evaluations=99.0),
    ]
    found = methods.lambda_table(rows)
    for pair, l1, cost in (
        ("ito lambda=1 less ito lambda=0.6", "-0.4000", "-33"),
        ("ito less ito lambda=0.6", "-0.3000", "-29"),
        ("ito less ito lambda=1", "+0.1000", "+4"),
    ):
        some = lines(found, pair)
        assert [line[1] for line in some] == list(truth.TEXT_KINDS)
        assert all(line[2] == str(N) and f"{l1} ({l1} to {l1})" in line and line[-1] == cost for line in some)
    assert found in methods.document(rows)
    assert methods.lambda_table(rows_of("ito")) == "" and "Lambda 1" not in methods.document(rows_of("ito"))


def test_the_command_replaces_what_is_between_the_marks_alone_and_leaves_the_rows(
    methods: Any, tmp_path: Path, root: Path
) -> None:
    table, page = tmp_path / "cases.csv", tmp_path / "results.md"
    write_rows(table, [*rows_of("ito"), *rows_of("diffedit", new=0.0)])
    before = table.read_bytes()
    page.write_text((root / "docs" / "results.md").read_text() + "after\n")
    for _ in range(2):
        done = CliRunner().invoke(methods.main, [str(table), "--write", str(page)])
        assert done.exit_code == 0, done.output
    text = page.read_text()
    around = re.compile(r"(?<=<!-- results -->\n).*(?=<!-- /results -->)", re.DOTALL)
    assert around.sub("", text) == around.sub("", (root / "docs" / "results.md").read_text()) + "after\n"
    assert len(lines(text, "thing", "ito")) == 1 and table.read_bytes() == before

    page.write_text("no marks\n")
    done = CliRunner().invoke(methods.main, [str(table), "--write", str(page)])
    assert done.exit_code == 2 and "put <!-- results -->" in done.output and len(done.output.splitlines()) == 1
    assert page.read_text() == "no marks\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no rows"), ("settings,method,kind\n", "no rows"), ("settings,method\na,b\n", "missing"), ("number\nx\n", "no rows of an evaluation")],
)  # fmt: skip
def test_other_files_are_refused_in_a_line(methods: Any, tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "cases.csv"
    if content is not None:
        path.write_text(content)
    done = CliRunner().invoke(methods.main, [str(path)])
    assert done.exit_code == 2 and said in done.output and len(done.output.splitlines()) == 1


def test_rows_of_two_runs_are_refused(methods: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "cases.csv", [*rows_of("ito"), *(r | {"settings": "other"} for r in rows_of("sdedit"))])
    with pytest.raises(UsageError, match="several settings"):
        methods.load(tmp_path / "cases.csv")
