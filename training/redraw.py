"""Whether a picture is drawn as the renderer draws: the scene whose rendering is nearest to it, and how near that is.

A generated thing has no exact target (its place and size are the model's choice), but if it is drawn well there is a scene that renders to
it. That scene is searched for, from what the reader sees, and the PSNR of the best one inside the thing's region says how crisp the thing is:
wobbly outlines and smeared parts have no scene that draws them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from . import world
from .classifier import Reading

MARGIN = 2  # pixels that a thing's region is grown by: its outline counts
_WINDOW = 6  # pixels around what the reader sees of a thing, within which scenes are compared


@dataclass(frozen=True)
class Redrawn:
    """The nearest scene to a picture.

    Attributes:
        scene: its things have the kinds, colours, places, sizes and poses that fit best.
        psnr: of each thing, dB, inside its region (the thing as drawn in `scene`, grown by 2 px).
    """

    scene: world.Scene
    psnr: tuple[float, ...]


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), np.float32) / 255


def _side(reading: Reading, index: int) -> np.ndarray:
    """Where the reader sees thing `index`: (128, 128) bool."""
    seen = reading.mask.numpy() > 0.5
    if len(reading.kinds) == 2:
        seen = seen.copy()
        half = world.SIZE // 2
        seen[:, half if index == 0 else 0 : None if index == 0 else half] = False
    return seen


def _first_thing(reading: Reading, index: int) -> world.Thing:
    """A thing with the kind and colour that the reader names, in the box that it sees."""
    kind, colour = reading.kinds[index], reading.colours[index]
    rows, columns = np.nonzero(_side(reading, index))
    single = len(reading.kinds) == 1
    if len(rows) < 20:  # next to nothing is seen there: the middle of the thing's place
        return world.Thing(kind, colour, 64.0 if single else (33.0, 95.0)[index], 108.0, 62.0 if single else 43.0)
    left, right, top, base = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
    wide, tall = world.proportions(kind)
    size = float(np.clip((base - top) / tall, 20, 90))
    thing = world.Thing(
        kind, colour, (left + right) / 2, float(base), size, float(np.clip((right - left) / (wide * size), 0.6, 1.5))
    )
    return _as_person(thing, reading.joints[index]) if kind == "person" else thing


def _as_person(thing: world.Thing, joints: Sequence[world.Point]) -> world.Thing:
    """The size, place and pose of a person from the joints that the reader sees."""
    at = dict(zip(world.JOINTS, joints, strict=True))
    neck, hips = at["neck"], [(a + b) / 2 for a, b in zip(at["r_hip"], at["l_hip"], strict=True)]
    height = float(np.clip((hips[1] - neck[1]) / 0.33, 30, 110))

    def angle(start: str, end: str, side: int) -> float:
        (x0, y0), (x1, y1) = at[start], at[end]
        return float(np.clip(math.degrees(math.atan2(side * (x1 - x0), y1 - y0)), 0, 178))

    pose: list[float] = []
    for upper, middle, end in (("shoulder", "elbow", "wrist"), ("hip", "knee", "ankle")):
        for prefix, side in (("r", -1), ("l", 1)):
            pose += [
                angle(f"{prefix}_{upper}", f"{prefix}_{middle}", side),
                angle(f"{prefix}_{middle}", f"{prefix}_{end}", side),
            ]
    size = height / world.proportions("person")[1]
    return replace(thing, x=neck[0], base=hips[1] + 0.43 * height, size=size, stretch=1.0, pose=tuple(pose))


def _horizon(picture: np.ndarray, reading: Reading) -> float:
    """The horizon that fits best where no thing is seen."""
    free = (reading.mask.numpy() < 0.1)[..., None]

    def error(horizon: float) -> float:
        drawn = _pixels(world.render(world.Scene((), reading.ground, reading.sky, horizon)))
        return float((((drawn - picture) ** 2) * free).sum())

    return min((v / 2 for v in range(2 * 72, 2 * 86 + 1)), key=error)


def _search(thing: world.Thing, error: Callable[[world.Thing], float]) -> tuple[world.Thing, float]:
    """Compass search over place, size, stretch and pose: steps in both directions, halved when none is better, to a quarter pixel."""
    person = thing.kind == "person"

    def moved(t: world.Thing, axis: int, step: float) -> world.Thing:
        pixels, factor = 2 * step, math.exp(0.06 * step)
        if axis == 0:
            return replace(t, x=t.x + pixels)
        if axis == 1:
            return replace(t, base=t.base + pixels)
        if axis == 2:
            return replace(t, size=t.size * factor)
        if axis == 3:
            return replace(t, stretch=t.stretch * factor)
        if axis == 4:  # the base alone: the top and the width stay
            taller = max(
                0.5, 1 + pixels / (t.size * world.proportions(t.kind)[1])
            )  # a thing of a pixel is not turned upside down
            return replace(t, base=t.base + pixels, size=t.size * taller, stretch=t.stretch / taller)
        if axis == 5:  # the height alone: the base and the width stay
            return replace(t, size=t.size * factor, stretch=t.stretch / factor)
        pose = list(t.pose)
        pose[axis - 6] += 12 * step
        return replace(t, pose=tuple(pose))

    best, step = error(thing), 1.0
    while step >= 0.06:
        better = False
        for axis in range(14 if person else 6):
            for sign in (1, -1):
                other = moved(thing, axis, sign * step)
                value = error(other)
                if value < best:
                    thing, best, better = other, value, True
                    break
        step = step if better else step / 2
    return thing, best


def redraw(image: Image.Image, reading: Reading, things: Sequence[int] | None = None) -> Redrawn:
    """The scene that renders nearest to a picture of the world, by local search from the reader's answer.

    Args:
        image: 128x128.
        reading: what the reader says of it.
        things: which things are fitted and scored; all by default.
    """
    picture = _pixels(image)
    scene = world.Scene(
        tuple(_first_thing(reading, i) for i in range(len(reading.kinds))),
        reading.ground,
        reading.sky,
        _horizon(picture, reading),
    )
    fitted = tuple(range(len(scene.things))) if things is None else tuple(things)

    def with_thing(index: int, thing: world.Thing) -> world.Scene:
        return replace(scene, things=tuple(thing if i == index else t for i, t in enumerate(scene.things)))

    for index in fitted:
        first = scene.things[index]
        seen = Image.fromarray(_side(reading, index)).convert("L").filter(ImageFilter.MaxFilter(2 * _WINDOW + 1))
        window = (
            np.asarray(
                world.object_mask(with_thing(index, first), index).filter(ImageFilter.MaxFilter(2 * _WINDOW + 1))
            )
            > 0
        )
        rows, columns = np.nonzero((np.asarray(seen) > 0) | window)
        top, bottom, left, right = (int(v) for v in (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1))
        box, target = (left, top, right, bottom), picture[top:bottom, left:right]

        def error(
            thing: world.Thing,
            index: int = index,
            box: tuple[int, int, int, int] = box,
            target: np.ndarray = target,
        ) -> float:
            return float(((_pixels(world.render(with_thing(index, thing), box)) - target) ** 2).sum())

        best, least = _search(first, error)
        # Another kind or colour, if the reader took one for another: from the same box.
        others = [replace(best, colour=c) for c in world.COLOURS if c != best.colour]
        if best.kind != "person":
            others += [replace(best, kind=k) for k in world.KINDS if k not in (best.kind, "person")]
        nearest = min(others, key=error)
        if error(nearest) < least:
            best, _ = _search(nearest, error)
        scene = with_thing(index, best)
    drawn = _pixels(world.render(scene))
    scores = []
    for index in fitted:
        region = world.object_mask(scene, index).filter(ImageFilter.MaxFilter(2 * MARGIN + 1))
        inside = np.asarray(region) > 127
        mse = float(((drawn - picture) ** 2)[inside].mean()) if inside.any() else 1.0
        scores.append(-10 * math.log10(max(mse, 1e-10)))
    return Redrawn(scene, tuple(scores))
