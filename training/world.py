"""The picture-book world: procedural scenes with exact captions, masks, layouts and edits.

A `Scene` is plain data (things, ground, sky, horizon) and everything is drawn from it, so the exact picture *after* an
edit can be drawn too: `render(edit(scene, change))`. That gives what no photo benchmark has: the exact target, the
exact region and the exact rest (METHOD section 5).

Conventions: pictures are 128x128 RGB, coordinates are in pixels with y down, a thing stands on its `base` line and
is centred on `x`. With two things the caption names the left one first. Drawing happens at twice the size and is
averaged down, which is the anti-aliasing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from ..runtime import layouts as layout_maps

SIZE = 128
SCALE = 2  # supersampling factor; 2 is enough for edges at 45 degrees and twice as fast as 3

KINDS = ("car", "house", "tree", "boat", "ball", "rocket", "mushroom", "umbrella", "star", "person")
COLOURS = {
    "red": (214, 48, 49),
    "orange": (240, 132, 32),
    "yellow": (248, 212, 60),
    "green": (24, 130, 70),
    "blue": (45, 100, 220),
    "purple": (130, 62, 180),
    "pink": (248, 140, 186),
    "white": (246, 246, 246),
}
GROUNDS = {
    "grass": ((138, 202, 104), (92, 160, 74)),
    "sand": ((238, 216, 166), (214, 182, 126)),
    "snow": ((226, 236, 248), (246, 250, 255)),
    "stone": ((142, 140, 146), (112, 110, 118)),
}
SKIES = {
    "noon": ((92, 168, 240), (188, 224, 250)),
    "sunset": ((232, 118, 92), (255, 216, 150)),
    "night": ((18, 24, 66), (58, 66, 128)),
}
LAYOUTS = ("pose", "scribble", "edge", "line")

# OpenPose's first 14 body points, its limbs among them and its colours.
JOINTS = (
    "nose", "neck", "r_shoulder", "r_elbow", "r_wrist", "l_shoulder", "l_elbow", "l_wrist",
    "r_hip", "r_knee", "r_ankle", "l_hip", "l_knee", "l_ankle",
)  # fmt: skip
LIMBS = ((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0))
LIMB_COLOURS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0),
    (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255),
)  # fmt: skip

# Width and height of each kind in units of `Thing.size`.
_PROPORTIONS = {
    "car": (1.2, 0.66),
    "house": (0.98, 0.98),
    "tree": (0.82, 1.1),
    "boat": (1.1, 1.0),
    "ball": (0.82, 0.82),
    "rocket": (0.62, 1.15),
    "mushroom": (0.98, 0.88),
    "umbrella": (1.1, 1.0),
    "star": (1.0, 0.96),
    "person": (1.0, 1.3),
}
_NEUTRAL = {
    "glass": (206, 232, 244),
    "wheel": (52, 52, 60),
    "hub": (176, 178, 186),
    "wood": (126, 82, 48),
    "cream": (250, 238, 210),
    "skin": (244, 202, 164),
    "hair": (92, 58, 40),
    "trousers": (58, 62, 88),
}

Point = tuple[float, float]
Part = tuple[str, tuple[float, ...], str]  # shape, flat coordinates, role of the fill


def proportions(kind: str) -> tuple[float, float]:
    """Width and height of a thing of `kind` in units of its size."""
    return _PROPORTIONS[kind]


REST_POSE = (20.0, 15.0, 20.0, 15.0, 8.0, 4.0, 8.0, 4.0)


@dataclass(frozen=True)
class Thing:
    """One thing of a scene.

    Attributes:
        kind: one of `KINDS`.
        colour: one of `COLOURS`.
        x, base: centre and standing line, pixels.
        size: pixels; width and height follow from the kind.
        stretch: width factor, 1 is the kind's own proportion.
        pose: eight angles in degrees, measured outward from straight down: upper arm and forearm right, left;
            thigh and shin right, left. Only a person has one that shows.
    """

    kind: str
    colour: str
    x: float
    base: float
    size: float
    stretch: float = 1.0
    pose: tuple[float, ...] = REST_POSE


@dataclass(frozen=True)
class Scene:
    """One or two things (left to right) on a ground under a sky; `horizon` in pixels from the top."""

    things: tuple[Thing, ...]
    ground: str
    sky: str
    horizon: float


@dataclass(frozen=True)
class Change:
    """One edit of a scene.

    Attributes:
        kind: "thing", "colour", "ground", "sky", "pose" or "scribble".
        index: which thing; ignored for ground and sky.
        value: the new kind, colour, ground or sky name; eight pose angles; or `(x, size, stretch)` for a scribble.
    """

    kind: str
    index: int
    value: str | tuple[float, ...]


# --- scenes -----------------------------------------------------------------------------------------------------


def random_pose(rng: random.Random) -> tuple[float, ...]:
    """Eight angles of a figure seen from the front whose limbs do not cross."""
    angles: list[float] = []
    for _ in range(2):
        upper = rng.uniform(12, 165)
        fore = min(175.0, max(5.0, upper + rng.uniform(-35, 80)))
        angles += [upper, fore]
    for _ in range(2):
        thigh = rng.uniform(4, 38)
        angles += [thigh, max(0.0, thigh + rng.uniform(-25, 4))]
    return tuple(angles)


def random_scene(rng: random.Random, things: int | None = None, kinds: Sequence[str] = KINDS) -> Scene:
    """A scene drawn with `rng`; `things` 1 or 2, or None for either with equal chance."""
    count = things if things is not None else rng.choice((1, 2))
    if count not in (1, 2):
        raise ValueError(f"random_scene: things is {count}, expected 1, 2 or None")
    horizon = rng.uniform(74, 84)
    made = []
    for slot in range(count):
        size = rng.uniform(56, 70) if count == 1 else rng.uniform(40, 46)
        x = rng.uniform(50, 78) if count == 1 else (33, 95)[slot] + rng.uniform(-3, 3)
        made.append(
            Thing(
                kind=rng.choice(tuple(kinds)),
                colour=rng.choice(tuple(COLOURS)),
                x=x,
                base=rng.uniform(102, 114),
                size=size,
                stretch=rng.uniform(0.85, 1.15),
                pose=random_pose(rng),
            )
        )
    return Scene(tuple(made), rng.choice(tuple(GROUNDS)), rng.choice(tuple(SKIES)), horizon)


def scene_of_seed(seed: int, things: int | None = None) -> Scene:
    """The scene of a seed: the same on every machine (Mersenne Twister, no numpy)."""
    return random_scene(random.Random(f"picturebook-{seed}"), things)


def caption(scene: Scene) -> str:
    """`a red car and a blue tree on grass at sunset`; the left thing comes first."""
    named = " and ".join(f"{'an' if t.colour[0] in 'aeiou' else 'a'} {t.colour} {t.kind}" for t in scene.things)
    return f"{named} on {scene.ground} at {scene.sky}"


def random_change(rng: random.Random, scene: Scene, kind: str) -> Change:
    """A change of `scene` that really changes it; a pose change needs a person in the scene."""
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    if kind == "thing":
        return Change(kind, index, rng.choice([k for k in KINDS if k != thing.kind]))
    if kind == "colour":
        return Change(kind, index, rng.choice([c for c in COLOURS if c != thing.colour]))
    if kind == "ground":
        return Change(kind, 0, rng.choice([g for g in GROUNDS if g != scene.ground]))
    if kind == "sky":
        return Change(kind, 0, rng.choice([s for s in SKIES if s != scene.sky]))
    if kind == "pose":
        people = [i for i, t in enumerate(scene.things) if t.kind == "person"]
        if not people:
            raise ValueError("random_change: a pose change needs a person in the scene")
        index = rng.choice(people)
        before = joints(scene.things[index])
        while True:  # far enough from the old pose that the edit is visible: 6 px mean over the joints
            pose = random_pose(rng)
            after = joints(replace(scene.things[index], pose=pose))
            if sum(math.dist(a, b) for a, b in zip(before, after, strict=True)) / len(before) > 6:
                return Change(kind, index, pose)
    if kind == "scribble":
        single = len(scene.things) == 1
        while True:
            x = rng.uniform(44, 84) if single else (33, 95)[index] + rng.uniform(-6, 6)
            size = rng.uniform(50, 74) if single else rng.uniform(36, 48)
            stretch = rng.uniform(0.75, 1.25)
            wide, tall = size * stretch / (thing.size * thing.stretch), size / thing.size
            if abs(x - thing.x) > 8 or abs(math.log(wide)) > 0.2 or abs(math.log(tall)) > 0.15:
                return Change(kind, index, (x, size, stretch))
    raise ValueError(f"random_change: kind is {kind!r}, expected thing, colour, ground, sky, pose or scribble")


def edit(scene: Scene, change: Change) -> Scene:
    """The scene after `change`: everything that the change does not name stays as it was.

    Raises:
        ValueError: an unknown kind of change or value, or an index that is not in the scene.
    """
    allowed = {"thing": KINDS, "colour": COLOURS, "ground": GROUNDS, "sky": SKIES}
    if change.kind in allowed and change.value not in allowed[change.kind]:
        raise ValueError(f"edit: {change.kind} {change.value!r} is not one of {', '.join(allowed[change.kind])}")
    if change.kind == "ground":
        return replace(scene, ground=str(change.value))
    if change.kind == "sky":
        return replace(scene, sky=str(change.value))
    if not 0 <= change.index < len(scene.things):
        raise ValueError(f"edit: index {change.index} is not in a scene of {len(scene.things)} things")
    thing = scene.things[change.index]
    if change.kind == "thing":
        thing = replace(thing, kind=str(change.value))
    elif change.kind == "colour":
        thing = replace(thing, colour=str(change.value))
    elif change.kind == "pose":
        thing = replace(thing, pose=tuple(float(v) for v in change.value))
    elif change.kind == "scribble":
        x, size, stretch = (float(v) for v in change.value)
        thing = replace(thing, x=x, size=size, stretch=stretch)
    else:
        raise ValueError(f"edit: kind is {change.kind!r}, expected thing, colour, ground, sky, pose or scribble")
    things = list(scene.things)
    things[change.index] = thing
    return replace(scene, things=tuple(things))


# --- shapes -----------------------------------------------------------------------------------------------------


def _joint_offsets(pose: Sequence[float]) -> list[Point]:
    """The 14 joints in units of the figure's height, origin at the standing point between the feet."""

    def walk(start: Point, angle: float, length: float, side: int) -> Point:
        a = math.radians(angle)
        return start[0] + side * math.sin(a) * length, start[1] + math.cos(a) * length

    neck, nose = (0.0, -0.76), (0.0, -0.89)
    right = (-0.105, -0.745)  # the figure faces us: its right side is on our left
    left = (0.105, -0.745)
    r_elbow = walk(right, pose[0], 0.17, -1)
    r_wrist = walk(r_elbow, pose[1], 0.17, -1)
    l_elbow = walk(left, pose[2], 0.17, 1)
    l_wrist = walk(l_elbow, pose[3], 0.17, 1)
    r_hip, l_hip = (-0.07, -0.43), (0.07, -0.43)
    r_knee = walk(r_hip, pose[4], 0.21, -1)
    r_ankle = walk(r_knee, pose[5], 0.2, -1)
    l_knee = walk(l_hip, pose[6], 0.21, 1)
    l_ankle = walk(l_knee, pose[7], 0.2, 1)
    return [nose, neck, right, r_elbow, r_wrist, left, l_elbow, l_wrist, r_hip, r_knee, r_ankle, l_hip, l_knee, l_ankle]


def joints(thing: Thing) -> list[Point]:
    """The 14 joints (`JOINTS`) of a person in pixels."""
    height = thing.size * _PROPORTIONS["person"][1]
    return [(thing.x + px * height * thing.stretch, thing.base + py * height) for px, py in _joint_offsets(thing.pose)]


def _circle(cx: float, cy: float, rx: float, ry: float | None = None) -> tuple[float, ...]:
    ry = rx if ry is None else ry
    return cx - rx, cy - ry, cx + rx, cy + ry


def _star(points: int, outer: float, inner: float, cx: float, cy: float) -> tuple[float, ...]:
    flat: list[float] = []
    for i in range(2 * points):
        r = outer if i % 2 == 0 else inner
        a = math.pi * i / points
        flat += [cx + r * math.sin(a), cy - r * math.cos(a)]
    return tuple(flat)


# Unit box: x in [-0.5, 0.5], y in [-1, 0] with 0 the ground. Shapes: poly (points), oval (box), arch (upper half of an
# oval given by its box), bar (x0, y0, x1, y1, thickness in units of the width).
_SHAPES: dict[str, tuple[Part, ...]] = {
    "car": (
        ("poly", (-0.3, -0.55, -0.18, -1.0, 0.2, -1.0, 0.36, -0.55), "dark"),
        ("poly", (-0.22, -0.58, -0.14, -0.9, -0.0, -0.9, -0.0, -0.58), "glass"),
        ("poly", (0.05, -0.58, 0.05, -0.9, 0.17, -0.9, 0.28, -0.58), "glass"),
        ("poly", (-0.5, -0.2, -0.5, -0.5, -0.36, -0.6, 0.4, -0.6, 0.5, -0.46, 0.5, -0.2), "body"),
        ("poly", (-0.48, -0.5, -0.36, -0.6, 0.4, -0.6, 0.47, -0.5), "light"),
        ("oval", _circle(-0.28, -0.19, 0.125, 0.19), "wheel"),
        ("oval", _circle(0.28, -0.19, 0.125, 0.19), "wheel"),
        ("oval", _circle(-0.28, -0.19, 0.05, 0.08), "hub"),
        ("oval", _circle(0.28, -0.19, 0.05, 0.08), "hub"),
    ),
    "house": (
        ("poly", (-0.4, 0.0, -0.4, -0.58, 0.4, -0.58, 0.4, 0.0), "body"),
        ("poly", (0.14, 0.0, 0.14, -0.58, 0.4, -0.58, 0.4, 0.0), "shade"),
        ("poly", (-0.5, -0.55, 0.0, -1.0, 0.5, -0.55), "dark"),
        ("poly", (-0.3, 0.0, -0.3, -0.36, -0.1, -0.36, -0.1, 0.0), "wood"),
        ("poly", (0.06, -0.2, 0.06, -0.42, 0.28, -0.42, 0.28, -0.2), "glass"),
    ),
    "tree": (
        ("poly", (-0.1, 0.0, -0.08, -0.5, 0.08, -0.5, 0.1, 0.0), "wood"),
        ("oval", _circle(-0.2, -0.5, 0.3, 0.22), "shade"),
        ("oval", _circle(0.2, -0.5, 0.3, 0.22), "dark"),
        ("oval", _circle(0.0, -0.7, 0.36, 0.3), "body"),
        ("oval", _circle(-0.1, -0.8, 0.16, 0.12), "light"),
    ),
    "boat": (
        ("poly", (-0.04, -0.2, -0.04, -1.0, 0.03, -1.0, 0.03, -0.2), "wood"),
        ("poly", (0.05, -0.95, 0.05, -0.36, 0.42, -0.36), "cream"),
        ("poly", (-0.06, -0.85, -0.06, -0.36, -0.36, -0.36), "cream"),
        ("poly", (-0.5, -0.3, 0.5, -0.3, 0.34, 0.0, -0.34, 0.0), "body"),
        ("poly", (-0.5, -0.3, 0.5, -0.3, 0.455, -0.215, -0.455, -0.215), "light"),
    ),
    "ball": (
        ("oval", (-0.5, -1.0, 0.5, 0.0), "shade"),
        ("oval", (-0.5, -1.0, 0.42, -0.09), "body"),
        ("oval", _circle(-0.16, -0.68, 0.15, 0.13), "light"),
    ),
    "rocket": (
        ("poly", (-0.5, 0.0, -0.5, -0.2, -0.2, -0.42, -0.2, -0.06), "dark"),
        ("poly", (0.5, 0.0, 0.5, -0.2, 0.2, -0.42, 0.2, -0.06), "dark"),
        ("poly", (-0.24, -0.06, -0.28, -0.45, -0.2, -0.75, 0.0, -1.0, 0.2, -0.75, 0.28, -0.45, 0.24, -0.06), "body"),
        ("poly", (0.08, -0.06, 0.1, -0.72, 0.2, -0.75, 0.28, -0.45, 0.24, -0.06), "shade"),
        ("poly", (-0.2, -0.75, 0.0, -1.0, 0.2, -0.75), "dark"),
        ("oval", _circle(0.0, -0.54, 0.14, 0.078), "glass"),
    ),
    "mushroom": (
        ("poly", (-0.17, 0.0, -0.13, -0.5, 0.13, -0.5, 0.17, 0.0), "cream"),
        ("arch", (-0.5, -1.0, 0.5, 0.1), "body"),
        ("oval", _circle(-0.2, -0.68, 0.1, 0.1), "spot"),
        ("oval", _circle(0.2, -0.62, 0.09, 0.09), "spot"),
        ("oval", _circle(0.03, -0.86, 0.08, 0.07), "spot"),
    ),
    "umbrella": (
        ("bar", (0.0, -0.94, 0.0, -0.07, 0.07), "wood"),
        ("bar", (0.0, -0.05, 0.15, -0.05, 0.07), "wood"),
        ("bar", (0.15, -0.05, 0.15, -0.14, 0.07), "wood"),
        ("arch", (-0.5, -0.98, 0.5, -0.02), "dark"),
        ("poly", (-0.19, -0.5, -0.12, -0.78, 0.0, -0.98, 0.12, -0.78, 0.19, -0.5), "body"),
        ("poly", (-0.5, -0.5, -0.4, -0.75, -0.2, -0.92, 0.0, -0.98, -0.12, -0.8, -0.19, -0.5), "light"),
    ),
    "star": (
        ("poly", _star(5, 0.52, 0.24, 0.0, -0.48), "body"),
        ("poly", (0.0, -1.0, 0.141, -0.674, 0.495, -0.64, 0.0, -0.48), "light"),
        ("poly", (0.0, -0.48, 0.228, -0.406, 0.306, -0.06, 0.0, -0.24), "shade"),
    ),
}  # fmt: skip


def _placed(thing: Thing) -> list[Part]:
    """The parts of a thing in pixels, back to front."""
    wide, tall = _PROPORTIONS[thing.kind]
    wide, tall = wide * thing.size * thing.stretch, tall * thing.size
    if thing.kind == "person":
        j = joints(thing)
        arm, leg, head = 0.075 * tall, 0.088 * tall, 0.1 * tall
        parts: list[Part] = []
        for hip, knee, ankle in ((8, 9, 10), (11, 12, 13)):
            parts += [("bar", (*j[hip], *j[knee], leg), "trousers"), ("bar", (*j[knee], *j[ankle], leg), "trousers")]
        torso = (*j[2], *j[5], *j[11], *j[8])
        parts.append(("poly", torso, "body"))
        parts += [("bar", (*j[a], *j[b], arm), "body") for a, b in ((2, 5), (8, 11), (2, 8), (5, 11))]
        for shoulder, elbow, wrist in ((2, 3, 4), (5, 6, 7)):
            parts += [("bar", (*j[shoulder], *j[elbow], arm), "dark"), ("bar", (*j[elbow], *j[wrist], arm), "dark")]
            parts.append(("oval", _circle(*j[wrist], 0.042 * tall), "skin"))
        parts.append(("oval", _circle(*j[0], head * thing.stretch**0.5, head), "hair"))
        parts.append(("oval", _circle(j[0][0], j[0][1] + 0.3 * head, head * 0.82, head * 0.72), "skin"))
        return parts
    placed: list[Part] = []
    for shape, flat, role in _SHAPES[thing.kind]:
        values = list(flat[:4] if shape == "bar" else flat)
        xy = [thing.x + v * wide if i % 2 == 0 else thing.base + v * tall for i, v in enumerate(values)]
        placed.append((shape, (*xy, flat[4] * wide) if shape == "bar" else tuple(xy), role))
    return placed


def _shades(colour: str) -> dict[str, tuple[int, int, int]]:
    base = COLOURS[colour]

    def mix(to: int, share: float) -> tuple[int, int, int]:
        r, g, b = (round(c + (to - c) * share) for c in base)
        return r, g, b

    spot = (250, 238, 210) if colour != "white" else (190, 176, 168)
    return _NEUTRAL | {"body": base, "dark": mix(0, 0.3), "shade": mix(0, 0.16), "light": mix(255, 0.38), "spot": spot}


def _draw(draw: ImageDraw.ImageDraw, parts: Iterable[Part], fills: dict[str, tuple[int, int, int]] | int) -> None:
    for shape, flat, role in parts:
        fill = fills if isinstance(fills, int) else fills[role]
        xy = [v * SCALE for v in flat]
        if shape == "poly":
            draw.polygon(xy, fill=fill)
        elif shape == "oval":
            draw.ellipse(xy, fill=fill)
        elif shape == "arch":
            draw.pieslice(xy, 180, 360, fill=fill)
        else:  # bar: a line with round ends
            x0, y0, x1, y1, thick = xy
            draw.line((x0, y0, x1, y1), fill=fill, width=max(1, round(thick)))
            r = thick / 2
            draw.ellipse((x0 - r, y0 - r, x0 + r, y0 + r), fill=fill)
            draw.ellipse((x1 - r, y1 - r, x1 + r, y1 + r), fill=fill)


def _gradient(top: tuple[int, ...], bottom: tuple[int, ...], height: int) -> Image.Image:
    column = Image.new("RGB", (1, 2))
    column.putdata([top, bottom])
    # Resized from the two centres of a 1x2 picture: the blend runs over the whole height.
    return column.resize((SIZE * SCALE, height), Image.Resampling.BILINEAR, box=(0, 0.5, 1, 1.5))


@lru_cache(maxsize=256)
def _background(ground: str, sky: str, horizon: int) -> Image.Image:
    full = SIZE * SCALE
    image = Image.new("RGB", (full, full))
    image.paste(_gradient(*SKIES[sky], horizon), (0, 0))
    draw = ImageDraw.Draw(image)
    disc = {"noon": (100, 22, 11, (255, 244, 190)), "sunset": (26, 40, 14, (255, 240, 176)),
            "night": (100, 24, 10, (240, 240, 220))}[sky]  # fmt: skip
    x, y, r, colour = disc
    draw.ellipse([v * SCALE for v in (x - r, y - r, x + r, y + r)], fill=colour)
    earth = _gradient(*GROUNDS[ground], full - horizon)
    if sky == "night":
        earth = Image.blend(earth, Image.new("RGB", earth.size, (30, 36, 90)), 0.35)
    elif sky == "sunset":
        earth = Image.blend(earth, Image.new("RGB", earth.size, (255, 170, 110)), 0.18)
    image.paste(earth, (0, horizon))
    return image


@lru_cache(maxsize=64)
def _darker(ground: str, sky: str, horizon: int) -> Image.Image:
    """The background in shadow."""
    return _background(ground, sky, horizon).point(lambda v: round(v * 0.78))


def _shadow_box(thing: Thing) -> list[float]:
    wide = _PROPORTIONS[thing.kind][0] * thing.size * thing.stretch * (0.75 if thing.kind == "person" else 1.0)
    return [thing.x - wide * 0.5, thing.base - 4, thing.x + wide * 0.5, thing.base + 4]


def render(scene: Scene, box: tuple[int, int, int, int] | None = None) -> Image.Image:
    """The picture of a scene: 128x128 RGB; only what is within `box` (left, top, right, bottom in pixels) if given."""
    horizon = round(scene.horizon * SCALE)
    image = _background(scene.ground, scene.sky, horizon).copy()
    shadow = Image.new("L", image.size)
    draw = ImageDraw.Draw(shadow)
    for thing in scene.things:
        draw.ellipse([v * SCALE for v in _shadow_box(thing)], fill=255)
    shaded = shadow.getbbox()
    if shaded is not None:  # pasting the whole picture would take a third of all of this
        image.paste(_darker(scene.ground, scene.sky, horizon).crop(shaded), shaded, shadow.crop(shaded))
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw(draw, _placed(thing), _shades(thing.colour))
    left, top, right, bottom = box or (0, 0, SIZE, SIZE)
    return image.reduce(SCALE, (left * SCALE, top * SCALE, right * SCALE, bottom * SCALE))


def object_mask(scene: Scene, index: int | None = None) -> Image.Image:
    """Coverage of the thing `index` (or of all): 128x128 "L", 255 inside, anti-aliased, shadow not included."""
    mask = Image.new("L", (SIZE * SCALE, SIZE * SCALE))
    draw = ImageDraw.Draw(mask)
    for i, thing in enumerate(scene.things):
        if index is None or i == index:
            _draw(draw, _placed(thing), 255)
    return mask.reduce(SCALE)


def background_masks(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Sky and ground, where no thing stands before them: (128, 128) bool each."""
    things = np.asarray(object_mask(scene)) > 127
    above = np.repeat((np.arange(SIZE) < scene.horizon)[:, None], SIZE, 1)
    return above & ~things, ~above & ~things


def exact_region(before: Scene, after: Scene, margin: int = 4) -> Image.Image:
    """Where the two pictures differ, grown by `margin` pixels: 128x128 "L" with 0 and 255.

    The margin is half a latent cell: an 8x8 block is the smallest thing that a latent edit can touch.
    """
    bands = ImageChops.difference(render(before), render(after)).split()
    largest = ImageChops.lighter(ImageChops.lighter(bands[0], bands[1]), bands[2])
    difference = largest.point(lambda v: 255 if v > 2 else 0)
    return difference.filter(ImageFilter.MaxFilter(2 * margin + 1)) if margin else difference


def layout(scene: Scene, name: str) -> Image.Image:
    """The layout map of a scene: 128x128 RGB on black.

    pose: skeletons of the people in OpenPose's colours; scribble: 2 px outline of every thing; edge: edges of the
    picture by the same operator that annotates photographs; line: the straight edges of the things and the horizon.
    """
    if name == "pose":
        image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE))
        draw = ImageDraw.Draw(image)
        for thing in scene.things:
            if thing.kind == "person":
                draw_skeleton(draw, joints(thing), SCALE)
        return image.reduce(SCALE)
    if name == "scribble":
        outline = Image.new("L", (SIZE, SIZE))
        for i in range(len(scene.things)):
            mask = object_mask(scene, i).point(lambda v: 255 if v > 127 else 0)
            edge = ImageChops.subtract(mask.filter(ImageFilter.MaxFilter(3)), mask.filter(ImageFilter.MinFilter(3)))
            outline = ImageChops.lighter(outline, edge)
        return outline.convert("RGB")
    if name == "edge":
        return layout_maps.edge_map(render(scene))
    if name == "line":
        image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE))
        draw = ImageDraw.Draw(image)
        draw.line((0, scene.horizon * SCALE, SIZE * SCALE, scene.horizon * SCALE), fill="white", width=SCALE)
        for thing in scene.things:
            for shape, flat, _ in _placed(thing):
                if shape != "poly":
                    continue
                points = list(zip(flat[0::2], flat[1::2], strict=True))
                for a, b in zip(points, points[1:] + points[:1], strict=True):
                    if math.dist(a, b) >= 8:
                        draw.line([v * SCALE for v in (*a, *b)], fill="white", width=SCALE)
        return image.reduce(SCALE)
    raise ValueError(f"layout: name is {name!r}, expected one of {', '.join(LAYOUTS)}")


def draw_skeleton(draw: ImageDraw.ImageDraw, points: Sequence[Point], scale: float = 1.0) -> None:
    """Draw 14 joints in OpenPose's colours; limbs 3 px wide at scale 1."""
    for (a, b), colour in zip(LIMBS, LIMB_COLOURS, strict=True):
        draw.line([v * scale for v in (*points[a], *points[b])], fill=colour, width=round(3 * scale))
    for i, (x, y) in enumerate(points):
        r = 2 * scale
        colour = LIMB_COLOURS[min(i, len(LIMB_COLOURS) - 1)]
        draw.ellipse((x * scale - r, y * scale - r, x * scale + r, y * scale + r), fill=colour)
