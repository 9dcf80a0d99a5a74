from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageChops

from iedit.training import world
from iedit.training.world import Change, Scene, Thing

CHANGES = ("thing", "colour", "ground", "sky", "pose", "scribble")
SEEDS = range(30)


def _array(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image)


def _changes(kind: str, count: int, things: int | None = None) -> list[tuple[Scene, Change]]:
    """Changes of one kind in scenes where it is possible."""
    rng = random.Random(f"tests-{kind}-{things}")
    found: list[tuple[Scene, Change]] = []
    while len(found) < count:
        scene = world.random_scene(rng, things)
        if kind == "pose" and not any(thing.kind == "person" for thing in scene.things):
            continue
        found.append((scene, world.random_change(rng, scene, kind)))
    return found


def test_a_seed_gives_the_same_scene_and_the_same_pixels_each_time() -> None:
    for seed in SEEDS:
        scene, again = world.scene_of_seed(seed), world.scene_of_seed(seed)
        assert scene == again
        world._background.cache_clear()
        world._darker.cache_clear()
        first = world.render(scene).tobytes()
        world.render(world.scene_of_seed(seed + 1))  # whatever was drawn in between
        assert world.render(again).tobytes() == first


def test_the_scene_of_a_seed_is_pinned() -> None:
    """The embedded model's held-out scenes are named by seed: another scene for a seed would be another test set."""
    assert world.caption(world.scene_of_seed(0)) == "a white car and a purple car on grass at sunset"
    assert len({world.scene_of_seed(seed) for seed in range(200)}) == 200


def test_drawing_changes_neither_the_cached_background_nor_other_pictures() -> None:
    scene = world.scene_of_seed(3)
    before = world._background(scene.ground, scene.sky, round(scene.horizon * world.SCALE)).tobytes()
    picture = world.render(scene)
    picture.paste((1, 2, 3), (0, 0, 128, 128))
    assert world._background(scene.ground, scene.sky, round(scene.horizon * world.SCALE)).tobytes() == before


def test_pictures_masks_and_layouts_have_the_promised_size_and_mode() -> None:
    for seed in SEEDS:
        scene = world.scene_of_seed(seed)
        assert (world.render(scene).size, world.render(scene).mode) == ((128, 128), "RGB")
        assert (world.object_mask(scene).size, world.object_mask(scene).mode) == ((128, 128), "L")
        for name in world.LAYOUTS:
            drawn = world.layout(scene, name)
            assert (drawn.size, drawn.mode) == ((128, 128), "RGB")
            assert (_array(drawn).max(-1) == 0).mean() > 0.7, f"{name} does not lie on black"


def test_the_caption_names_exactly_what_is_in_the_scene_from_left_to_right() -> None:
    named = re.compile(r"(an?) (\w+) (\w+)(?: and (an?) (\w+) (\w+))? on (\w+) at (\w+)")
    counts = set()
    for seed in range(200):
        scene = world.scene_of_seed(seed)
        found = named.fullmatch(world.caption(scene))
        assert found, world.caption(scene)
        groups = found.groups()
        read = [groups[0:3]] + ([groups[3:6]] if groups[3] else [])
        assert [(colour, kind) for _, colour, kind in read] == [(thing.colour, thing.kind) for thing in scene.things]
        assert all((article == "an") == (colour[0] in "aeiou") for article, colour, _ in read)
        assert groups[6:] == (scene.ground, scene.sky)
        assert [thing.x for thing in scene.things] == sorted(thing.x for thing in scene.things)
        counts.add(len(scene.things))
    assert counts == {1, 2}


def test_every_kind_colour_ground_and_sky_is_drawn() -> None:
    scenes = [world.scene_of_seed(seed) for seed in range(300)]
    assert {thing.kind for scene in scenes for thing in scene.things} == set(world.KINDS)
    assert {thing.colour for scene in scenes for thing in scene.things} == set(world.COLOURS)
    assert {scene.ground for scene in scenes} == set(world.GROUNDS)
    assert {scene.sky for scene in scenes} == set(world.SKIES)


@pytest.mark.parametrize("kind", world.KINDS)
def test_every_kind_shows_its_colour_and_looks_like_no_other(kind: str) -> None:
    for colour, rgb in world.COLOURS.items():
        shown = _array(world.render(Scene((Thing(kind, colour, 64, 108, 60),), "grass", "noon", 80)))
        assert (np.abs(shown.astype(int) - rgb).max(-1) <= 1).sum() > 40, f"a {colour} {kind} shows no {colour}"
    mask = world.object_mask(Scene((Thing(kind, "red", 64, 108, 60),), "grass", "noon", 80))
    for other in world.KINDS:
        if other != kind:
            theirs = world.object_mask(Scene((Thing(other, "red", 64, 108, 60),), "grass", "noon", 80))
            assert (_array(ImageChops.difference(mask, theirs)) > 127).sum() > 100, f"{kind} has the outline of {other}"


def test_a_mask_is_where_the_thing_is_drawn() -> None:
    """Against the renderer: outside the mask (and its shadow) nothing differs from the scene without the thing."""
    for seed in SEEDS:
        scene = world.scene_of_seed(seed)
        empty, full = _array(world.render(replace(scene, things=()))), _array(world.render(scene))
        mask = _array(world.object_mask(scene))
        differs = (empty != full).any(-1)
        shadow = np.zeros((128, 128), dtype=bool)
        for thing in scene.things:
            x0, y0, x1, y1 = world._shadow_box(thing)
            shadow[max(0, int(y0) - 1) : int(y1) + 2, max(0, int(x0) - 1) : int(x1) + 2] = True
        assert not (differs & (mask == 0) & ~shadow).any()
        inside = mask == 255
        assert inside.sum() > 300
        assert differs[inside].mean() > 0.9  # the rest has the background's own colour by chance, as white on snow


def test_the_masks_of_two_things_add_up_and_do_not_touch() -> None:
    for seed in SEEDS:
        scene = world.scene_of_seed(seed, things=2)
        left, right = (_array(world.object_mask(scene, index)) for index in (0, 1))
        assert not ((left > 0) & (right > 0)).any()
        assert np.array_equal(np.maximum(left, right), _array(world.object_mask(scene)))


def test_every_thing_stays_inside_the_picture() -> None:
    for seed in range(150):
        scene = world.scene_of_seed(seed)
        if any(thing.kind == "person" for thing in scene.things):
            continue  # arms may reach out; the joints have their own test
        mask = _array(world.object_mask(scene))
        assert not mask[0].any()
        assert not mask[-1].any()
        assert not mask[:, 0].any()
        assert not mask[:, -1].any()


# --- edits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CHANGES)
def test_an_edit_changes_something_and_only_inside_the_exact_region(kind: str) -> None:
    for scene, change in _changes(kind, 12):
        after = world.edit(scene, change)
        assert after != scene
        before_pixels, after_pixels = _array(world.render(scene)), _array(world.render(after))
        region = _array(world.exact_region(scene, after))
        assert set(np.unique(region)) <= {0, 255}
        difference = np.abs(before_pixels.astype(int) - after_pixels).max(-1)
        assert difference[region == 255].max() > 20
        # exact_region looks at a luma above 2, which blue alone reaches at 2 / 0.114 = 17.5 only.
        assert difference[region == 0].max(initial=0) <= 17
        assert world.edit(scene, change) == after, "the same change gave another scene"


@pytest.mark.parametrize("kind", ["thing", "colour", "pose", "scribble"])
def test_an_edit_of_one_thing_leaves_the_other_things_pixels_alone_bit_for_bit(kind: str) -> None:
    for scene, change in _changes(kind, 20, things=2):
        after = world.edit(scene, change)
        other = 1 - change.index
        assert after.things[other] == scene.things[other]
        assert (after.ground, after.sky, after.horizon) == (scene.ground, scene.sky, scene.horizon)
        mine = _array(world.object_mask(scene, change.index)) | _array(world.object_mask(after, change.index))
        theirs = (_array(world.object_mask(scene, other)) == 255) & (mine == 0)
        assert theirs.sum() > 200
        before_pixels, after_pixels = _array(world.render(scene)), _array(world.render(after))
        assert np.array_equal(before_pixels[theirs], after_pixels[theirs])


@pytest.mark.parametrize("kind", ["ground", "sky"])
def test_an_edit_of_the_ground_or_the_sky_leaves_the_things_alone_bit_for_bit(kind: str) -> None:
    for scene, change in _changes(kind, 15):
        after = world.edit(scene, change)
        assert after.things == scene.things
        inside = _array(world.object_mask(scene)) == 255
        assert np.array_equal(_array(world.render(scene))[inside], _array(world.render(after))[inside])


def test_an_edit_of_the_ground_leaves_the_sky_alone_bit_for_bit() -> None:
    for scene, change in _changes("ground", 10):
        above = int(scene.horizon) - 6
        assert np.array_equal(
            _array(world.render(scene))[:above], _array(world.render(world.edit(scene, change)))[:above]
        )


def test_an_edit_back_gives_the_first_picture_again() -> None:
    for scene, change in _changes("colour", 10):
        back = Change("colour", change.index, scene.things[change.index].colour)
        assert world.render(world.edit(world.edit(scene, change), back)).tobytes() == world.render(scene).tobytes()


def test_the_exact_region_of_no_change_is_empty_and_its_margin_grows_it() -> None:
    scene, change = _changes("thing", 1)[0]
    assert not _array(world.exact_region(scene, scene)).any()
    after = world.edit(scene, change)
    sizes = [int((_array(world.exact_region(scene, after, margin)) > 0).sum()) for margin in (0, 2, 4)]
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (Change("thing", 0, "dragon"), "thing 'dragon' is not one of car, "),
        (Change("sky", 0, "fog"), "sky 'fog' is not one of noon, "),
        (Change("colour", 5, "red"), "index 5 is not in a scene of"),
        (Change("weather", 0, "rain"), "kind is 'weather', expected thing"),
    ],
)
def test_an_impossible_edit_says_what_is_possible(change: Change, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        world.edit(world.scene_of_seed(0), change)


# --- poses and layouts ------------------------------------------------------------------------------------------


def test_the_joints_of_every_figure_lie_inside_the_picture() -> None:
    rng = random.Random("joints")
    for count, _ in itertools.product((1, 2), range(150)):
        scene = world.random_scene(rng, count, kinds=("person",))
        for thing in scene.things:
            points = world.joints(thing)
            assert len(points) == len(world.JOINTS)
            assert all(0 <= x < world.SIZE and 0 <= y < world.SIZE for x, y in points), points


def test_a_figure_stands_on_its_feet_with_its_head_up() -> None:
    points = dict(zip(world.JOINTS, world.joints(Thing("person", "red", 64, 108, 60)), strict=True))
    assert points["nose"][1] < points["neck"][1] < points["r_hip"][1] < points["r_knee"][1] < points["r_ankle"][1]
    assert points["r_shoulder"][0] < points["l_shoulder"][0]  # it faces us


def test_the_pose_map_marks_each_joint_in_its_colour_and_knows_only_people() -> None:
    person = Scene(
        (Thing("person", "blue", 64, 110, 64, pose=(80, 100, 120, 150, 20, 10, 30, 20)),), "sand", "noon", 80
    )
    drawn = _array(world.layout(person, "pose")).astype(int)
    joints = world.joints(person.things[0])
    for name, (x, y) in zip(world.JOINTS, joints, strict=True):
        assert drawn[round(y) - 1 : round(y) + 2, round(x) - 1 : round(x) + 2].max() > 200, f"nothing at the {name}"
    for name in ("r_wrist", "l_wrist", "r_ankle"):  # ends of limbs, where nothing overlaps
        index = world.JOINTS.index(name)
        x, y = joints[index]
        near = drawn[int(y) : int(y) + 2, int(x) : int(x) + 2].reshape(-1, 3)
        assert np.abs(near - world.LIMB_COLOURS[index]).max(-1).min() < 60, name
    car = Scene((Thing("car", "blue", 64, 110, 64),), "sand", "noon", 80)
    assert not _array(world.layout(car, "pose")).any()


def test_a_pose_edit_moves_the_joints_by_more_than_six_pixels_on_average() -> None:
    for scene, change in _changes("pose", 15):
        before = np.array(world.joints(scene.things[change.index]))
        after = np.array(world.joints(world.edit(scene, change).things[change.index]))
        assert np.linalg.norm(before - after, axis=1).mean() > 6


def test_the_scribble_is_the_outline_of_the_mask() -> None:
    for seed in SEEDS:
        scene = world.scene_of_seed(seed)
        drawn = _array(world.layout(scene, "scribble"))[..., 0]
        assert set(np.unique(drawn)) == {0, 255}
        inside = _array(world.object_mask(scene)) > 127
        border = np.zeros_like(inside)
        border[:, 1:] |= inside[:, 1:] != inside[:, :-1]
        border[1:] |= inside[1:] != inside[:-1]
        assert (drawn[border] == 255).all()
        deep = inside.copy()
        for shift in (-2, 2):
            deep &= np.roll(inside, shift, 0) & np.roll(inside, shift, 1)
        for down, right in itertools.product((-1, 0, 1), (-1, 0, 1)):
            deep &= np.roll(np.roll(inside, down, 0), right, 1)
        assert not drawn[deep].any()


def test_the_scribble_of_a_colour_edit_is_the_same() -> None:
    for scene, change in _changes("colour", 5):
        after = world.edit(scene, change)
        for name in ("pose", "scribble", "line"):
            assert world.layout(scene, name).tobytes() == world.layout(after, name).tobytes()


def test_the_line_map_has_the_horizon() -> None:
    scene = Scene((Thing("ball", "red", 64, 108, 60),), "grass", "noon", 80)
    rows = np.nonzero(_array(world.layout(scene, "line"))[..., 0].min(axis=1) > 100)[0]
    assert set(rows) <= {79, 80}
    assert len(rows)


def test_an_unknown_layout_or_number_of_things_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'depth', expected one of pose, scribble, edge, line"):
        world.layout(world.scene_of_seed(0), "depth")
    with pytest.raises(ValueError, match=r"things is 3, expected 1, 2 or None"):
        world.random_scene(random.Random(0), 3)


def test_a_part_of_a_render_is_cut_out_of_the_whole() -> None:
    for seed in range(6):
        scene = world.scene_of_seed(seed)
        for box in ((0, 0, 128, 128), (3, 40, 90, 121), (64, 100, 65, 128)):
            assert world.render(scene, box).tobytes() == world.render(scene).crop(box).tobytes()
