"""Photograph -> layout map. All maps are RGB pictures of the photograph's size, white (or coloured) on black.

They need numpy and Pillow only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from .errors import UsageError
from .images import as_rgb

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


def edge_map(image: Image.Image, low: float = 0.06) -> Image.Image:
    """Edges of a photograph: gradient magnitude over the colour channels, thinned to its ridges.

    Args:
        image: any mode; read as RGB.
        low: gradients below this (in [0, 1] units per pixel) are not edges.

    Returns:
        RGB, the same size, 0 or 255.
    """
    dx, dy = _gradients(image.convert("RGB"))
    edges = _ridges(dx, dy, low).astype(np.uint8) * 255
    return Image.fromarray(edges).convert("RGB")


def scribble_map(image: Image.Image, low: float = 0.12, shortest: int = 12) -> Image.Image:
    """The strong edges of a photograph as a thick outline: closed over gaps, short ones dropped, 3 px wide.

    An approximation of a scribble: a hand would draw the outline of each thing only, this also draws the horizon,
    strong inner edges and whatever else has contrast.

    Args:
        image: any mode; read as RGB.
        low: gradients below this (in [0, 1] units per pixel, after a blur of 0.7 px) are not drawn.
        shortest: connected edges of fewer pixels than this are dropped.

    Returns:
        RGB, the same size, 0 or 255.
    """
    strong = _ridges(*_gradients(image.convert("RGB").filter(ImageFilter.GaussianBlur(0.7))), low)
    closed = Image.fromarray(strong.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(3))
    ys, xs = np.nonzero(np.asarray(closed))
    labels = _components(ys, xs, np.zeros(len(ys), dtype=np.int64), closed.size)
    thin = strong[ys, xs]  # counted on the thin edges, connected over the gaps
    long_enough = np.bincount(labels, weights=thin, minlength=len(ys))[labels] >= shortest
    kept = np.zeros(strong.shape, dtype=np.uint8)
    kept[ys[long_enough], xs[long_enough]] = 255
    return Image.fromarray(kept).convert("RGB")


def line_map(image: Image.Image, shortest: float = 8.0, low: float = 0.05) -> Image.Image:
    """The straight edges of a photograph as lines of about 1 px.

    Edge pixels are grouped by the direction of their gradient, in two sets of 45 degree sectors that are half a sector
    apart; each pixel goes with the set in which its connected group is larger, so that no direction is cut by a
    sector's border (Burns, Hanson and Riseman 1986). A group that is long, thin and does not turn is drawn as its axis.

    Args:
        image: any mode; read as RGB.
        shortest: shorter segments (pixels) are not drawn.
        low: gradients below this (in [0, 1] units per pixel) are not edges.

    Returns:
        RGB, the same size, anti-aliased.
    """
    picture = image.convert("RGB")
    drawn = Image.new("L", (picture.width * 2, picture.height * 2))
    pen = ImageDraw.Draw(drawn)
    for x0, y0, x1, y1 in _segments(*_gradients(picture), low, shortest):
        pen.line([2 * v + 1 for v in (x0, y0, x1, y1)], fill=255, width=2)
    return drawn.reduce(2).convert("RGB")


def annotate(image: Image.Image, name: str) -> Image.Image:
    """The map called `name` of a picture: RGB, its size.

    Raises:
        UsageError: a name that is not known, or `pose`, which needs a pose network that does not come with iedit.
    """
    check_annotator(name)
    return _ANNOTATORS[name](as_rgb(image))


def check_annotator(name: str) -> None:
    """Raises UsageError for a map that `annotate` cannot make."""
    if name in _ANNOTATORS:
        return
    if name == "pose":
        raise UsageError(
            "layout pose: nothing here can find a pose in a picture; give the source's skeleton with "
            "--source-layout pose=FILE (OpenPose colours on black), drawn by hand or by a pose detector"
        )
    raise UsageError(f"layout {name!r} cannot be made from a picture; known are {', '.join(sorted(_ANNOTATORS))}")


def check_layout(image: Image.Image, name: str, size: tuple[int, int]) -> Image.Image:
    """A layout given by the user as RGB, with its transparency on black; `name` may be the user's own.

    Raises:
        UsageError: its size is not `size` (width, height).
    """
    if image.size != tuple(size):
        raise UsageError(
            f"layout {name}: it is {image.width}x{image.height} and the image {size[0]}x{size[1]}; "
            "draw or resize it to the image's size"
        )
    return as_rgb(image, f"layout {name}", background="black")


_ANNOTATORS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "scribble": scribble_map,
    "edge": edge_map,
    "line": line_map,
}


# --- parts ------------------------------------------------------------------------------------------------------


def _gradients(image: Image.Image) -> tuple[FloatArray, FloatArray]:
    """Central differences of an RGB image in [0, 1]: dx and dy, each (H, W, 3)."""
    rgb: FloatArray = np.asarray(image, dtype=np.float32) / np.float32(255)
    padded = np.pad(rgb, ((1, 1), (1, 1), (0, 0)), mode="edge")
    dx: FloatArray = (padded[1:-1, 2:] - padded[1:-1, :-2]) / np.float32(2)
    dy: FloatArray = (padded[2:, 1:-1] - padded[:-2, 1:-1]) / np.float32(2)
    return dx, dy


def _ridges(dx: FloatArray, dy: FloatArray, low: float) -> NDArray[np.bool_]:
    """(H, W): where the gradient is above `low` and largest across its edge."""
    strength = np.sqrt((dx**2 + dy**2).sum(-1))
    ring = np.pad(strength, 1)
    across = np.abs(dx).sum(-1) >= np.abs(dy).sum(-1)
    ridge = np.where(
        across,
        (strength >= ring[1:-1, :-2]) & (strength > ring[1:-1, 2:]),
        (strength >= ring[:-2, 1:-1]) & (strength > ring[2:, 1:-1]),
    )
    return ridge & (strength > low)


def _components(ys: IntArray, xs: IntArray, classes: IntArray, size: tuple[int, int]) -> IntArray:
    """Connected groups of pixels (8 neighbours) of one class: for each pixel the index of its group's first pixel.

    Labels fall to the smallest one among neighbours and are then shortened like a union-find's paths, all pixels at
    once: a few rounds, where passing labels from pixel to pixel would take as many as a group is long.
    """
    width, height = size
    index = np.full((height + 2, width + 2), -1, dtype=np.int64)
    index[ys + 1, xs + 1] = np.arange(len(ys))
    pairs = []
    for down, right in ((0, 1), (1, -1), (1, 0), (1, 1)):
        other = index[ys + 1 + down, xs + 1 + right]
        here = np.nonzero((other >= 0) & (classes == classes[other]))[0]
        pairs.append(np.stack([here, other[here]]))
    a, b = np.concatenate(pairs, axis=1)
    labels = np.arange(len(ys))
    while True:
        la, lb = labels[a], labels[b]
        if np.array_equal(la, lb):
            return labels
        np.minimum.at(labels, np.maximum(la, lb), np.minimum(la, lb))
        while not np.array_equal(labels, labels[labels]):
            labels = labels[labels]


def _segments(dx: FloatArray, dy: FloatArray, low: float, shortest: float) -> FloatArray:
    """Straight edges as (n, 4) end points x0, y0, x1, y1 in pixel centres; see `line_map`."""
    strongest = np.argmax(dx**2 + dy**2, axis=-1)[..., None]  # one channel: the sum would cancel opposite slopes
    gx, gy = (np.take_along_axis(d, strongest, -1)[..., 0].astype(np.float64) for d in (dx, dy))
    strength = np.hypot(gx, gy)
    ys, xs = np.nonzero(strength > low)
    if not len(ys):
        return np.zeros((0, 4), dtype=np.float32)
    weight, angle = strength[ys, xs], np.arctan2(gy[ys, xs], gx[ys, xs])
    size = (dx.shape[1], dx.shape[0])
    groups, sizes = [], []
    for shift in (0.0, 0.5):
        sector = np.floor(angle / (np.pi / 4) + shift).astype(np.int64) % 8
        labels = _components(ys, xs, sector, size)
        groups.append(labels)
        sizes.append(np.bincount(labels, minlength=len(ys))[labels])
    second = sizes[1] > sizes[0]
    label = np.where(second, groups[1] + len(ys), groups[0])
    _, label = np.unique(label, return_inverse=True)
    n = int(label.max()) + 1

    def total(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(label, weights=values, minlength=n).astype(np.float64)

    # Weighted moments of each group: its centre, axis, thickness and how its gradient turns along the axis.
    mass = total(weight)
    cx, cy = total(weight * xs) / mass, total(weight * ys) / mass
    px, py = xs - cx[label], ys - cy[label]
    xx, yy, xy = (total(weight * v) / mass for v in (px * px, py * py, px * py))
    axis = 0.5 * np.arctan2(2 * xy, xx - yy)
    ax, ay = np.cos(axis), np.sin(axis)
    along = px * ax[label] + py * ay[label]
    thick = np.sqrt(np.maximum(xx * ay**2 + yy * ax**2 - 2 * xy * ax * ay, 0))
    start, end = np.full(n, np.inf), np.full(n, -np.inf)
    np.minimum.at(start, label, along)
    np.maximum.at(end, label, along)
    length = end - start
    mean = np.arctan2(total(weight * np.sin(angle)), total(weight * np.cos(angle)))
    # Turning from the shape, a parabola through the group: directions of gradients lean to the axes on sharp edges.
    bow = along**2 - (total(weight * along**2) / mass)[label]
    aside = py * ax[label] - px * ay[label]
    bend = total(weight * aside * bow) / np.maximum(total(weight * bow**2), 1e-12)
    turn = 2 * np.abs(bend) * length
    across = np.abs(np.cos(mean - axis))  # 0 where the gradient is at right angles to the axis, as on an edge
    left = np.bincount(label)
    supported = 2 * left > total(np.where(second, sizes[1], sizes[0])) / left  # half of its pixels chose this group
    # 0.9 px: an edge under a 2 px box has 0.6. 0.35 rad: circles leave nothing behind, at 0.45 they leave chords.
    good = supported & (length >= shortest - 1) & (thick <= 0.9) & (turn <= 0.35) & (across <= 0.35)
    return np.stack([cx + start * ax, cy + start * ay, cx + end * ax, cy + end * ay], axis=1)[good].astype(np.float32)
