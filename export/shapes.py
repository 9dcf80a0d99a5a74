"""Sizes and batches as they are typed: `512x512,768x768` and `1-2-8` -> `engine_spec.Shapes`."""

from __future__ import annotations

import re

from ..runtime.backends.engine_spec import Shapes
from ..runtime.errors import UsageError


def parse_shapes(sizes: str, batch: str, multiple: int = 8) -> tuple[Shapes, ...]:
    """One range of inputs for each size.

    Args:
        sizes: comma-separated WIDTHxHEIGHT, pixels; each side one number, or MIN-OPT-MAX.
        batch: one number, or MIN-OPT-MAX.
        multiple: what width and height must be multiples of (`Model.multiple`).

    Raises:
        UsageError: naming the part that cannot be read, is out of order, not a multiple, or there twice.
    """
    samples = _range("batch", batch, 1)
    shapes: list[Shapes] = []
    for size in sizes.split(","):
        sides = size.strip().lower().split("x")
        if len(sides) != 2:
            raise UsageError(f"sizes: {size.strip()!r} is not WIDTHxHEIGHT; give for example 512x512,768x512")
        width, height = (_range("sizes", side, multiple, size.strip()) for side in sides)
        one = Shapes(batch=samples, height=height, width=width)
        if one in shapes:
            raise UsageError(f"sizes: {size.strip()} is there twice")
        shapes.append(one)
    return tuple(shapes)


def _range(option: str, text: str, multiple: int, inside: str | None = None) -> tuple[int, int, int]:
    where = repr(text.strip()) + (f" in {inside!r}" if inside and inside != text.strip() else "")
    parts = text.strip().split("-")
    if len(parts) not in (1, 3) or not all(re.fullmatch(r"\d{1,6}", p) for p in parts):
        raise UsageError(f"{option}: {where} is neither a number nor MIN-OPT-MAX, for example 1-2-8")
    smallest, opt, largest = (int(p) for p in (parts * 3 if len(parts) == 1 else parts))
    if not 1 <= smallest <= opt <= largest:
        raise UsageError(f"{option}: {where} is not in order; expected 1 <= MIN <= OPT <= MAX")
    for value in (smallest, opt, largest):
        if value % multiple:
            near = max(multiple, round(value / multiple) * multiple)
            raise UsageError(f"{option}: {value} in {where} is not a multiple of {multiple}; the nearest is {near}")
    return smallest, opt, largest
