"""A corpus of the picture-book world for `iedit train pairs`: renders with their captions and exact masks, in webdataset tars.

Each sample is KEY.png, KEY.txt and a mask for every thing, the ground and the sky (KEY.red-car.mask.png, KEY.grass.mask.png,
KEY.noon-sky.mask.png). `truth.json` holds the scenes, for whoever judges the pairs; nothing that makes them reads it.
"""

from __future__ import annotations

import dataclasses
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ..runtime.errors import UsageError
from ..runtime.files import open_whole, write_whole
from . import world

SHARD = 250  # renders in a tar
TRUTH = "truth.json"


def scene(seed: int, number: int) -> world.Scene:
    """Scene `number` of the corpus of a seed; no held-out scene is drawn from such a name."""
    return world.random_scene(random.Random(f"corpus-{seed}-{number}"))


def masks(of: world.Scene) -> dict[str, Image.Image]:
    """Label -> exact mask, 128x128 "L" of 0 and 255: the things by colour and kind, the ground and the sky that they leave to be seen."""
    sky, ground = world.background_masks(of)
    found = {of.ground: ground, f"{of.sky}-sky": sky}
    for index, thing in enumerate(of.things):
        label, own = f"{thing.colour}-{thing.kind}", np.asarray(world.object_mask(of, index)) > 127
        found[label] = found.get(label, False) | own
    return {label: Image.fromarray(mask.astype(np.uint8) * 255) for label, mask in sorted(found.items())}


def write_renders(
    folder: Path,
    count: int,
    seed: int = 0,
    tell: Callable[[int, int], object] = lambda done, of: None,
    caption: Callable[[world.Scene], str] = world.caption,
) -> None:
    """Write a corpus of `count` renders; the same bytes for the same count and seed.

    Args:
        folder: is made; tars in it are written anew.
        tell: called with how many renders are written, and of how many.
        caption: what is said of a scene.

    Raises:
        UsageError: the folder holds something else; RunError: it could not be written.
    """
    names = [f"{i:05d}.tar" for i in range(-(-count // SHARD))]
    others = sorted(p.name for p in folder.iterdir() if p.name not in (*names, TRUTH)) if folder.is_dir() else []
    if others:
        raise UsageError(f"{folder}: holds {others[0]}, which is not of this corpus; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    truth = {}
    for number, name in enumerate(names):
        with open_whole(folder / name) as file, tarfile.open(fileobj=file, mode="w") as tar:
            for i in range(number * SHARD, min(count, (number + 1) * SHARD)):
                one, key = scene(seed, i), f"{i:09d}"
                truth[key] = dataclasses.asdict(one)
                pictures = {"png": world.render(one)} | {f"{k}.mask.png": m for k, m in masks(one).items()}
                members = {ending: _png(picture) for ending, picture in pictures.items()}
                for ending, data in (members | {"txt": caption(one).encode()}).items():
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                tell(i + 1, count)
    write_whole(folder / TRUTH, (json.dumps(truth) + "\n").encode())


def _png(picture: Image.Image) -> bytes:
    held = io.BytesIO()
    picture.save(held, "PNG")
    return held.getvalue()
