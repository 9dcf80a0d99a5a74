"""What was written by somebody else: JSON with bounds, values by declared types, text that is safe to print.

Receipts inside pictures, specs of engines and configs of checkpoints come from anywhere. They are parsed here, and nothing
of them is used before it has the declared type and lies within the declared bounds.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_JSON = 1 << 20  # characters
MAX_DEPTH = 12
MAX_TEXT = 10_000  # characters of a string without a bound of its own
MAX_ENTRIES = 10_000  # of a list or an object


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included; for `Annotated[int, Range(1, 1000)]`."""

    low: float
    high: float


@dataclass(frozen=True)
class Match:
    """A regular expression that the whole text must match, and in words what that is."""

    pattern: str
    told: str


def parse_json(text: str | bytes, longest: int = MAX_JSON) -> Any:
    """JSON of at most `longest` characters, nested at most `MAX_DEPTH` deep.

    Raises:
        ValueError: it is no JSON, too long or too deep; in a few words.
    """
    if len(text) > longest:
        raise ValueError(f"{len(text)} characters of JSON, the limit is {longest}")
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    level, depth = [v for v in [found] if isinstance(v, (dict, list))], 1
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        inside = (v for container in level for v in (container.values() if isinstance(container, dict) else container))
        level, depth = [v for v in inside if isinstance(v, (dict, list))], depth + 1
    return found


def printable(text: str) -> str:
    """Text with its control characters, terminal escapes and direction marks written out as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def typed(kind: Any, value: Any, where: str) -> Any:
    """A value out of JSON as `kind`: dataclasses are built, every field of them has to be there, and no other.

    Args:
        kind: bool, int, float, str, None, Any, unions, tuples, mappings with names as keys, dataclasses, and
            `Annotated` with a `Range` or a `Match`. Numbers are finite. Without a bound of its own a text has at most
            `MAX_TEXT` characters; lists and objects have at most `MAX_ENTRIES` entries.
        where: name of the value, for messages.

    Raises:
        ValueError: it is something else; the field, what came and what was expected.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        found = typed(args[0], value, where)
        for bound in args[1:]:
            _check_bound(bound, found, where)
        return found
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for one in args:
            if (value is None) == (one is type(None)):
                return typed(one, value, where)
        raise ValueError(f"{where} is {_short(value)}, which it cannot be")
    if kind is type(None) or kind is None:
        return _expect(value is None, value, where, "null")
    if kind is bool:
        return _expect(isinstance(value, bool), value, where, "true or false")
    if kind is int:
        return _expect(isinstance(value, int) and not isinstance(value, bool), value, where, "a whole number")
    if kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        _expect(number and abs(value) < 1e300 and math.isfinite(value), value, where, "a finite number")
        return float(value)
    if kind is str:
        return _expect(
            isinstance(value, str) and len(value) <= MAX_TEXT, value, where, f"a text of at most {MAX_TEXT} characters"
        )
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    if origin is tuple:
        _expect(isinstance(value, (list, tuple)) and len(value) <= MAX_ENTRIES, value, where, "a list")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(typed(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        _expect(len(value) == len(args), value, where, f"{len(args)} values")
        return tuple(typed(one, v, f"{where}[{i}]") for i, (one, v) in enumerate(zip(args, value, strict=True)))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        _expect(isinstance(value, dict) and len(value) <= MAX_ENTRIES, value, where, "an object")
        return {
            typed(args[0], k, f"a name in {where}"): typed(args[1], v, f"{where}.{k[:60]}") for k, v in value.items()
        }
    raise TypeError(f"typed: {kind} of {where} is not known here")


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), value, where, "an object")
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = [f.name for f in dataclasses.fields(kind) if f.init]
    prefix = f"{where}." if where else ""
    for name in sorted(set(value) - set(fields)):
        raise ValueError(f"{prefix}{_short(name)} is unknown")
    for name in fields:
        if name not in value:
            raise ValueError(f"{prefix}{name} is missing")
    return kind(**{name: typed(hints[name], value[name], f"{prefix}{name}") for name in fields})


def _check_bound(bound: Any, value: Any, where: str) -> None:
    if isinstance(bound, Range):
        _expect(bound.low <= value <= bound.high, value, where, f"{bound.low:g} to {bound.high:g}")
    elif isinstance(bound, Match):
        _expect(re.fullmatch(bound.pattern, value) is not None, value, where, bound.told)


def _expect(fine: bool, value: Any, where: str, wanted: str) -> Any:
    if not fine:
        raise ValueError(f"{where or 'it'} is {_short(value)}, expected {wanted}")
    return value


def _short(value: Any) -> str:
    """What came, in a few safe characters."""
    if isinstance(value, (dict, list, tuple)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    shown = printable(repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number")
    return shown if len(shown) <= 60 else shown[:57] + "..."
