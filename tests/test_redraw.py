"""The nearest rendering to a picture: found for what the renderer drew, far away from what it did not draw."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from iedit.training import world
from iedit.training.classifier import Reading
from iedit.training.redraw import _search, redraw


def reading_of(scene: world.Scene, wrong_colour: bool = False) -> Reading:
    """What a reader says that sees outlines and joints a little off."""
    rng = random.Random(0)
    mask = torch.from_numpy(np.asarray(world.object_mask(scene).filter(ImageFilter.MaxFilter(3)), np.float32) / 255)
    return Reading(
        tuple(t.kind for t in scene.things),
        tuple("pink" if wrong_colour else t.colour for t in scene.things),
        scene.ground,
        scene.sky,
        mask,
        tuple(tuple((x + rng.gauss(0, 1), y + rng.gauss(0, 1)) for x, y in world.joints(t)) for t in scene.things),
    )


def wobbled(picture: Image.Image, size: float = 1.5) -> Image.Image:
    """Rows and columns shifted by waves of `size` pixels, as an undertrained model draws."""
    pixels, (height, width) = np.asarray(picture), (picture.height, picture.width)
    y, x = np.mgrid[:height, :width]
    rows = np.clip(np.round(y + size * np.sin(x / 4)), 0, height - 1).astype(int)
    columns = np.clip(np.round(x + size * np.sin(y / 3)), 0, width - 1).astype(int)
    return Image.fromarray(pixels[rows, columns])


@pytest.mark.parametrize("things", [1, 2])
def test_what_the_renderer_drew_is_found_and_what_wobbles_has_no_rendering(things: int) -> None:
    sharp, soft = list[float](), list[float]()
    for seed in range(4):
        scene = world.random_scene(random.Random(f"redraw-{things}-{seed}"), things)
        picture, reading = world.render(scene), reading_of(scene)
        sharp += redraw(picture, reading).psnr
        soft += redraw(wobbled(picture), reading).psnr
    assert min(sharp) > 26 and np.median(sharp) > 31
    assert np.median(soft) < np.median(sharp) - 8


def test_a_person_s_pose_is_found() -> None:
    scene = world.random_scene(random.Random("redraw-pose"), 1, ("person",))
    found = redraw(world.render(scene), reading_of(scene))
    assert found.psnr[0] > 24
    gaps = np.subtract(world.joints(found.scene.things[0]), world.joints(scene.things[0]))
    assert float(np.hypot(*gaps.T).mean()) < 1.0


def test_a_colour_that_was_read_wrong_is_put_right() -> None:
    thing = world.Thing("car", "green", 64.0, 108.0, 60.0)
    scene = world.Scene((thing,), "sand", "noon", 79.0)
    found = redraw(world.render(scene), reading_of(scene, wrong_colour=True))
    assert found.scene.things[0].colour == "green" and found.psnr[0] > 28


def test_only_the_things_that_are_asked_for_are_fitted() -> None:
    scene = world.random_scene(random.Random("redraw-both"), 2)
    both, second = redraw(world.render(scene), reading_of(scene)), redraw(world.render(scene), reading_of(scene), [1])
    assert len(both.psnr) == 2 and len(second.psnr) == 1
    assert second.psnr[0] > 24


def test_a_picture_in_which_nothing_is_seen_still_has_a_figure() -> None:
    scene = world.random_scene(random.Random("redraw-none"), 1)
    blank = replace(reading_of(scene), mask=torch.zeros(world.SIZE, world.SIZE))
    assert redraw(Image.new("RGB", (world.SIZE, world.SIZE)), blank).psnr[0] < 15


def test_a_thing_that_is_nearly_gone_is_never_turned_upside_down() -> None:
    """What a reader makes of noise can be a pixel high, and the search moves bases by two."""
    seen: list[world.Thing] = []

    def error(thing: world.Thing) -> float:
        world.render(world.Scene((thing,), "grass", "noon", 78))
        seen.append(thing)
        return 0.0

    for kind in ("umbrella", "mushroom", "car"):
        _search(world.Thing(kind, "red", 60, 90, 1.0), error)
    assert len(seen) > 100 and all(t.size > 0 and t.stretch > 0 for t in seen)
