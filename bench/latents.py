"""Whether a change of the code changed a result: the latents of 35 edits, bit for bit, before it and after it.

    python bench/latents.py record build/latents.json     # at the commit before
    python bench/latents.py compare build/latents.json    # at the commit after, on the same machine with the same packages

Every method, both passes of ITO with every one of its settings, layouts, given and estimated masks, sweeps of lambda, a batch of different
pictures, stages answered from the cache, and call sharing on and off. One thread and 6 steps each: 3 minutes on one core. The digests are
of this machine's rounding, so they are recorded where they are compared and are not kept in the repository.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from iedit.runtime.editor import Editor, EditRequest, EditResult, MaskOptions, Options
from iedit.runtime.stage_cache import StageCache
from iedit.training import world

STEPS = 6
ITO_SETTINGS = type(Options().final)


def request(
    seed: int,
    kind: str,
    method: str = "ito",
    mask: Image.Image | None = None,
    estimate: MaskOptions | None = None,
    **options: Any,
) -> EditRequest:
    """An edit of `kind` in the world, with its layouts if the kind has some.

    Args:
        mask: given; None estimates one as `estimate` says, of three noises by default.
    """
    if estimate is None:
        estimate = MaskOptions(seeds=3) if mask is None and method not in ("sdedit", "controlnet") else MaskOptions()
    rng = random.Random(f"latents-{seed}-{kind}")
    scene = world.random_scene(rng, 1 + seed % 2, ("person",) if kind == "pose" else world.KINDS)
    after = world.edit(scene, world.random_change(rng, scene, kind))
    names = (kind,) if kind in ("pose", "scribble") else ()
    return EditRequest(
        world.render(scene), world.caption(after), world.caption(scene), method, {n: world.layout(after, n) for n in names},
        {n: world.layout(scene, n) for n in names}, mask, seed, STEPS, Options(mask=estimate, **options),
    )  # fmt: skip


def ellipse() -> Image.Image:
    """A given mask of the world's size."""
    mask = Image.new("L", (world.SIZE, world.SIZE))
    ImageDraw.Draw(mask).ellipse((20, 40, 90, 110), fill=255)
    return mask


def edits(editor: Editor, unshared: Editor) -> Iterator[tuple[str, EditResult]]:
    """Name and result of every edit; those of the second editor do not share calls."""
    settings = ITO_SETTINGS
    adam = settings(update="adam")
    alone = {
        "ito thing": request(1, "thing"),
        "ito colour": request(2, "colour"),
        "ito sky": request(3, "sky"),
        "ito pose": request(4, "pose"),
        "ito scribble": request(5, "scribble"),
        "ito adam": request(6, "thing", guidance=adam, final=adam),
        "ito adam carried": request(6, "thing", final=dataclasses.replace(adam, carry=True, k=2)),
        "ito k=3": request(7, "colour", guidance=settings(k=3, t_u=4), final=settings(k=2, lr=0.05)),
        "ito refined": request(8, "thing", refine=True),
        "ito refined, round trip": request(8, "scribble", refine=True, round_trip=True),
        "ito lambda 1": request(9, "thing", lam=1.0),
        "ito kept area": request(10, "colour", kept_area=True),
        "ito no mask": request(11, "thing", estimate=MaskOptions(mode="none")),
        "ito trajectory mask": request(12, "thing", estimate=MaskOptions(mode="trajectory", seeds=2)),
        "ito unguided mask": request(12, "pose", estimate=MaskOptions(seeds=2, guided=False)),
        "ito given mask, pixels": request(13, "thing", mask=ellipse(), composite="pixel"),
        "ito latent composite": request(13, "colour", composite="latent", encoding_ratio=0.8),
        "ito unconditional inversion": request(14, "thing", inversion="unconditional", negative_prompt="a red house"),
        "ito guided inversion": request(15, "thing", inversion_scale=2.0, inversion_evaluate="source"),
        "ito scale 1": request(16, "colour", guidance_scale=1.0),
        "diffedit": request(1, "thing", "diffedit"),
        "diffedit given mask": request(2, "colour", "diffedit", mask=ellipse(), ratio=0.5),
        "sdedit": request(3, "thing", "sdedit"),
        "iedit": request(4, "thing", "iedit"),
        "iedit given mask": request(4, "colour", "iedit", mask=ellipse()),
        "controlnet": request(5, "pose", "controlnet"),
        "controlnet-diffedit": request(6, "scribble", "controlnet-diffedit", control_scale=0.8),
        "resized": request(9, "colour", resize=64),
    }
    for name, one in alone.items():
        yield name, editor.edit(one)
    for name in ("ito thing", "ito pose", "ito refined"):
        yield f"{name}, not shared", unshared.edit(alone[name])
    sweep = [request(1, "thing", lam=lam) for lam in (0.2, 0.6, 1.0)]  # the inversion is the cache's
    for one, result in zip(sweep, editor.edit_many(sweep), strict=True):
        yield f"sweep lambda {one.options.lam}", result
    for i, result in enumerate(editor.edit_many([request(s, "thing") for s in (21, 22, 23)])):
        yield f"batch {i}", result


def digest(*values: Any) -> str:
    """16 hex digits of tensors and pictures."""
    whole = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            whole.update(value.contiguous().numpy().tobytes())
        elif value is not None:
            whole.update(f"{value.mode}{value.size}".encode() + value.tobytes())
    return whole.hexdigest()[:16]


def record(model: str, backend: str) -> dict[str, Any]:
    """Name of the edit -> digests of its latent, of its picture and mask, its network evaluations, and its calls."""
    torch.set_num_threads(1)
    editor = Editor.load(model, backend=backend, device="cpu")
    unshared = Editor.load(model, backend=backend, device="cpu", share=False, cache=StageCache(memory=0))
    rows: dict[str, Any] = {}
    for name, result in edits(editor, unshared):
        rows[name] = {
            "latent": digest(result.latent),
            "picture": digest(result.image, result.mask),
            "evaluations": sum(result.profile.evaluations.values()),
            "calls": sum(result.profile.calls.values()),
        }
        print(f"{len(rows):3d}  {rows[name]['latent']}  {name}", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Record the latents of 35 edits, or compare them with recorded ones.")
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default="picturebook", help="folder of the weights that both are made with")
    parser.add_argument("--backend", default="torch")
    asked = parser.parse_args()
    made = record(asked.model, asked.backend)
    if asked.what == "record":
        asked.file.parent.mkdir(parents=True, exist_ok=True)
        asked.file.write_text(json.dumps(made, indent=1) + "\n")
        print(f"{len(made)} edits recorded in {asked.file}")
        return
    before = json.loads(asked.file.read_text())
    other = [name for name in before.keys() | made.keys() if before.get(name) != made.get(name)]
    for name in sorted(other):
        print(f"{name}: was {before.get(name)}, is {made.get(name)}")
    print(f"{len(made) - len(other)} of {len(before)} edits are the same, bit for bit")
    sys.exit(1 if other else 0)


if __name__ == "__main__":
    main()
