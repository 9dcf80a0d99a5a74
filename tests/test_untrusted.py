"""Values out of JSON have the declared type and lie within bounds, or are refused in a line that is safe to print."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest

from iedit.runtime.untrusted import MAX_DEPTH, Match, Range, parse_json, printable, typed


@dataclass(frozen=True)
class Inner:
    size: tuple[int, int]
    name: Annotated[str, Match("[a-z]+", "small letters")]


@dataclass(frozen=True)
class Outer:
    count: Annotated[int, Range(1, 9)]
    share: float | None
    inner: Inner
    pairs: tuple[tuple[str, float], ...]
    files: Mapping[str, str]
    yes: bool = False
    made: int = field(default=3, init=False)


GOOD: dict[str, Any] = {"count": 2, "share": 1, "inner": {"size": [1, 2], "name": "abc"}, "pairs": [["a", 0.5]],
                        "files": {"x": "y"}, "yes": True}  # fmt: skip


def test_a_value_comes_back_as_the_declared_type() -> None:
    assert typed(Outer, json.loads(json.dumps(GOOD)), "") == Outer(
        2, 1.0, Inner((1, 2), "abc"), (("a", 0.5),), {"x": "y"}, True
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"count": 0}, "count is 0, expected 1 to 9"),
        ({"count": True}, "count is True, expected a whole number"),
        ({"count": 1.0}, "count is 1.0, expected a whole number"),
        ({"count": 10**4000}, "count is a huge number, expected 1 to 9"),
        ({"share": float("nan")}, "share is nan, expected a finite number"),
        ({"share": 10**400}, "share is a huge number, expected a finite number"),
        ({"share": "1"}, "share is '1', expected a finite number"),
        ({"share": [1]}, "share is a list of 1, expected a finite number"),
        ({"inner": None}, "inner is None, expected an object"),
        ({"inner": {"size": [1], "name": "a"}}, "inner.size is a list of 1, expected 2 values"),
        ({"inner": {"size": [1, 2], "name": "a\x1b[31m"}}, r"inner.name is 'a\x1b[31m', expected small letters"),
        ({"inner": {"size": [1, 2]}}, "inner.name is missing"),
        ({"pairs": [["a"]]}, "pairs[0] is a list of 1, expected 2 values"),
        ({"files": {"x": 1}}, "files.x is 1, expected a text of at most 10000 characters"),
        ({"files": {"x": "y" * 20_000}}, "expected a text of at most 10000 characters"),
        ({"pairs": [["a", 1]] * 20_000}, "pairs is a list of 20000, expected a list"),
        ({"sparkle": 1}, "'sparkle' is unknown"),
        ({"made": 1}, "'made' is unknown"),
    ],
)
def test_anything_else_is_refused_by_the_field(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        typed(Outer, GOOD | change, "")
    assert says in str(caught.value)
    assert len(str(caught.value)) < 200 and str(caught.value).isprintable()


def test_json_that_is_too_deep_too_long_or_none_is_refused() -> None:
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    for text in (
        "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
        "[" * 200_000,
        '{"a":' * 100_000,
        "1" * 2_000_000,
        "{",
        "1" * 5000,
    ):
        with pytest.raises(ValueError):
            parse_json(text)


def test_what_is_printed_cannot_drive_a_terminal() -> None:
    hostile = "a\x1b]0;owned\x07\r\n\x9b31m\u202e\u2066\x00\udce9"
    shown = printable(hostile)
    assert shown.isprintable() and shown.startswith(r"a\x1b]0;owned\x07\r\n\x9b31m\u202e")
    assert printable("grünes Auto 緑 🚗") == "grünes Auto 緑 🚗"
