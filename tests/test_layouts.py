from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from iedit.runtime import layouts
from iedit.runtime.errors import UsageError
from iedit.training import world


def _white(image: Image.Image) -> NDArray[np.bool_]:
    return np.asarray(image.convert("L")) > 100


def _share_near(these: Image.Image, those: Image.Image, within: int = 2) -> float:
    """Share of the white pixels of `these` that have one of `those` within so many pixels."""
    grown = _white(those.convert("L").filter(ImageFilter.MaxFilter(2 * within + 1)))
    return float((_white(these) & grown).sum() / max(1, _white(these).sum()))


def _polygon(corners: list[tuple[float, float]], size: tuple[int, int] = (128, 128)) -> Image.Image:
    """A filled polygon, anti-aliased, with its outline drawn apart."""
    image = Image.new("RGB", (size[0] * 4, size[1] * 4), (30, 60, 90))
    ImageDraw.Draw(image).polygon([(4 * x, 4 * y) for x, y in corners], fill=(220, 180, 60))
    return image.reduce(4)


@pytest.mark.parametrize("name", ["edge", "line", "scribble"])
@pytest.mark.parametrize("size", [(128, 128), (97, 61), (1, 1), (3, 200)])
def test_a_map_is_rgb_of_the_pictures_size(name: str, size: tuple[int, int]) -> None:
    made = layouts.annotate(world.render(world.scene_of_seed(1)).resize(size), name)
    assert (made.mode, made.size) == ("RGB", size)


@pytest.mark.parametrize("name", ["edge", "line", "scribble"])
def test_a_flat_picture_has_an_empty_map(name: str) -> None:
    assert not _white(layouts.annotate(Image.new("RGB", (64, 48), (200, 10, 90)), name)).any()


@pytest.mark.parametrize("angle", range(0, 90, 3))  # 87: cut by a sector border if there were one set of them
def test_every_side_of_a_square_is_found_at_every_angle(angle: int) -> None:
    corners = [
        (64 + 50 * math.cos(math.radians(angle + turn)), 64 + 50 * math.sin(math.radians(angle + turn)))
        for turn in (0, 90, 180, 270)
    ]
    exact = Image.new("RGB", (128, 128))
    ImageDraw.Draw(exact).line([*corners, corners[0]], fill="white")
    found = layouts.line_map(_polygon(corners))
    assert _share_near(exact, found) > 0.98
    assert _share_near(found, exact) > 0.98


@pytest.mark.parametrize("radius", [6, 10, 15, 20, 30])
def test_a_circle_has_an_outline_but_no_straight_line(radius: int) -> None:
    picture = Image.new("RGB", (512, 512), (30, 60, 90))
    ImageDraw.Draw(picture).ellipse([256 + 4 * side * radius for side in (-1, -1, 1, 1)], fill=(220, 180, 60))
    picture = picture.reduce(4)
    around = 2 * math.pi * radius
    assert _white(layouts.edge_map(picture)).sum() > 0.8 * around
    assert _white(layouts.line_map(picture)).sum() < 0.1 * around


def test_a_segment_shorter_than_asked_is_not_drawn() -> None:
    square = _polygon([(50, 50), (64, 50), (64, 64), (50, 64)])
    assert _white(layouts.line_map(square)).sum() > 0.8 * 4 * 14
    assert not _white(layouts.line_map(square, shortest=20)).any()


@pytest.mark.parametrize("kind", ["house", "star", "rocket"])
def test_the_line_map_finds_the_straight_edges_of_the_worlds_things(kind: str) -> None:
    recall, precision = [], []
    for colour in ("red", "blue", "orange"):
        thing = world.Thing(kind, colour, 64, 108, 66)
        scene = world.Scene((thing,), "grass", "noon", 80)
        found, exact = layouts.line_map(world.render(scene)), world.layout(scene, "line")
        recall.append(_share_near(exact, found))
        precision.append(_share_near(found, exact))
    # The exact map also has edges hidden behind other parts; a round window's chords and the shadow are not in it.
    assert np.mean(recall) > 0.75, recall
    assert np.mean(precision) > 0.8, precision


def test_the_line_map_agrees_with_the_exact_one_over_the_world() -> None:
    pairs = [
        (layouts.line_map(world.render(scene)), world.layout(scene, "line"))
        for scene in (world.scene_of_seed(seed) for seed in range(24))
    ]
    assert np.mean([_share_near(exact, found) for found, exact in pairs]) > 0.65
    assert np.mean([_share_near(found, exact) for found, exact in pairs]) > 0.5


def test_the_scribble_map_covers_the_exact_scribble_over_the_world() -> None:
    covered, exact_share, white = [], [], []
    for seed in range(24):
        scene = world.scene_of_seed(seed)
        found, exact = layouts.scribble_map(world.render(scene)), world.layout(scene, "scribble")
        covered.append(_share_near(exact, found))
        exact_share.append(_share_near(found, exact))
        white.append(_white(found).mean())
    assert np.mean(covered) > 0.9
    assert min(covered) > 0.6  # white things on snow have little contrast
    assert np.mean(exact_share) > 0.45  # it also draws the horizon, the sun and inner edges
    assert max(white) < 0.2


def test_a_scribble_is_three_pixels_wide_and_closed_over_a_small_gap() -> None:
    picture = Image.new("RGB", (64, 64))
    picture.paste((255, 255, 255), (0, 32, 64, 64))
    assert np.array_equal(_white(layouts.scribble_map(picture)).sum(axis=0)[2:-2], np.full(60, 3))
    speck = Image.new("RGB", (64, 64))
    speck.putpixel((30, 30), (255, 255, 255))
    assert not _white(layouts.scribble_map(speck)).any()


def test_pose_says_what_to_do_and_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(UsageError, match=r"--source-layout pose=FILE"):
        layouts.annotate(Image.new("RGB", (8, 8)), "pose")
    with pytest.raises(UsageError, match=r"'depth'.*edge, line, scribble"):
        layouts.annotate(Image.new("RGB", (8, 8)), "depth")
    assert {"pose", *layouts._ANNOTATORS} == set(world.LAYOUTS)


def test_a_layout_of_another_size_is_refused_with_both_sizes() -> None:
    with pytest.raises(UsageError, match=r"layout pose: it is 64x32 and the image 128x96"):
        layouts.check_layout(Image.new("RGB", (64, 32)), "pose", (128, 96))


def test_a_layout_with_transparency_lies_on_black() -> None:
    drawn = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    drawn.putpixel((1, 2), (255, 85, 0, 255))
    checked = layouts.check_layout(drawn, "own name", (4, 4))
    assert checked.mode == "RGB"
    assert checked.getpixel((1, 2)) == (255, 85, 0)
    assert checked.getpixel((0, 0)) == (0, 0, 0)


def test_the_groups_of_connected_pixels_are_those_of_scipy() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    for share in (0.2, 0.4, 0.6):
        grid = np.random.default_rng(3).random((40, 57)) < share
        ys, xs = np.nonzero(grid)
        ours = layouts._components(ys, xs, np.zeros(len(ys), dtype=np.int64), (57, 40))
        theirs, count = ndimage.label(grid, structure=np.ones((3, 3)))
        assert len(np.unique(ours)) == count
        assert len(np.unique(np.stack([ours, theirs[ys, xs]]), axis=1).T) == count
