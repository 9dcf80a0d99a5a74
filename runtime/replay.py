"""A picture made again from the receipt inside it, and compared with what it was.

A receipt is never trusted: it opens no file but those of its names beside the picture, whose digests must match, and names no
folder, no engine and no download. A model that is not the embedded one, ControlNets and engines are what the caller names.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .backends import load_backend, load_recorded
from .backends.base import Backend
from .editor import Editor
from .errors import UsageError
from .files import printable
from .images import load_image, load_layout, load_mask, read_receipt
from .model.checkpoint import PICTUREBOOK
from .model.model import Model, load_model
from .options import ITO
from .profile import Callback
from .receipt import Receipt, parse, picture_digest, versions
from .request import EditRequest

BOUND = 1  # of 255: what another grouping of the network's calls changes in a picture


@dataclass(frozen=True)
class Named:
    """What the caller names because a receipt may not, or because it has moved; see `replay`."""

    image: str | None = None
    mask: str | None = None
    layouts: Mapping[str, str] = field(default_factory=dict)
    source_layouts: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None
    controlnets: Mapping[str, str] = field(default_factory=dict)
    engines: str | None = None
    trust_engines: bool = False
    backend: str | None = None


@dataclass(frozen=True)
class Replayed:
    """A picture made again, beside the one that it was made from.

    Attributes:
        image: RGB, made again.
        receipt: of the picture, as it was.
        largest: the largest difference of a channel, 0 to 255.
        pixels: how many pixels differ.
        reasons: what is different here from where the picture was made.
    """

    image: Image.Image
    receipt: dict[str, Any]
    largest: int
    pixels: int
    reasons: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether it differs by no more than another grouping of network calls can cause."""
        return self.largest <= BOUND

    def __str__(self) -> str:
        """What is said of it in a line."""
        if self.largest == 0:
            return "identical"
        count = f"{self.pixels} pixel{'s' * (self.pixels != 1)}"
        why = f" ({'; '.join(self.reasons)})" if self.reasons else ""
        if self.same:
            return f"within {BOUND} of 255, {count} differ{'s' * (self.pixels == 1)}{why}"
        return f"differs, by at most {self.largest} of 255 in {count}{why or ' (another machine or an edited picture)'}"


def replay(picture: str, named: Named = Named(), callback: Callback | None = None) -> Replayed:
    """Make a picture again from the receipt inside it, on the backends that ran it, in the batch that it was made in.

    Args:
        picture: a PNG of `iedit edit`.
        named: inputs that are not beside the picture; the model, if it is not the embedded one, and its ControlNets, if they
            were not inside it; the engines' folder, if it is not the user's cache; `backend` to compare with another one.

    Raises:
        UsageError: no receipt, or one that cannot be used; an input, the model or an engine is missing or not the one that
            was used. RunError: as for an edit.
    """
    raw = read_receipt(picture)
    receipt = parse(raw, picture)
    inputs = _inputs(receipt, picture, named)
    threads_before = torch.get_num_threads()
    try:
        torch.set_num_threads(min(receipt.backend.threads, os.cpu_count() or 1))
        model = _load_model(receipt, named)
        editor = Editor(model, _load_backend(receipt, named, model), share=receipt.backend.share)
        result = editor.edit_many(_requests(receipt, inputs), callback)[receipt.batch.index]
        reasons = _differences_here(receipt, named, model, result.profile.ran())
    finally:
        torch.set_num_threads(threads_before)
    return Replayed(result.image, raw, *_difference(load_image(picture), result.image), reasons)


def inputs_of(picture: str, named: Named) -> list[str]:
    """Every file and folder that `replay` would read, whether or not it is there.

    Raises:
        UsageError: the picture has no receipt that can be used.
    """
    receipt, beside = parse(read_receipt(picture), picture), Path(picture).resolve().parent
    names = [
        receipt.files.image,
        receipt.files.mask,
        *receipt.files.layouts.values(),
        *receipt.files.source_layouts.values(),
    ]
    given = [
        named.image,
        named.mask,
        named.model,
        named.engines,
        *named.layouts.values(),
        *named.source_layouts.values(),
    ]
    return [picture, *(str(beside / n) for n in names if n), *(f for f in given if f), *named.controlnets.values()]


def _inputs(receipt: Receipt, picture: str, named: Named) -> dict[str, Any]:
    """The pictures of a receipt: named by the caller, or of that name beside the picture; their digests are compared."""
    beside = Path(picture).resolve().parent

    def read(name: str, given: str | None, option: str, digest: str, load: Callable[[str], Any]) -> Any:
        path = given or str(beside / name)
        if given is None and not os.path.lexists(path):
            raise UsageError(
                f"{beside / printable(name)}: there is no such file, and the picture was made from it; say where it is with {option}"
            )
        loaded = load(path)
        if picture_digest(loaded) != digest:
            raise UsageError(
                f"{path}: this is not the one that was used; replay needs the same file, name it with {option}"
            )
        return loaded

    files, digests = receipt.files, receipt.inputs
    image = read(files.image, named.image, "--image", digests.image, load_image)
    inputs: dict[str, Any] = {"image": image, "mask": None}
    for key, option in (("layouts", "--layout"), ("source_layouts", "--source-layout")):
        given: Mapping[str, str] = getattr(named, key)
        inputs[key] = {
            n: read(f, given.get(n), f"{option} {printable(n)}=FILE", getattr(digests, key)[n], load_layout)
            for n, f in getattr(files, key).items()
        }
    if files.mask is not None and digests.mask is not None:
        inputs["mask"] = read(files.mask, named.mask, "--mask", digests.mask, lambda path: load_mask(path, image.size))
    return inputs


def _load_model(receipt: Receipt, named: Named) -> Model:
    """The model that was used: nothing that only the receipt names is opened, but for the embedded model."""
    name = named.model
    if name is None:
        if receipt.run.model != PICTUREBOOK:
            raise UsageError(
                f"the picture was made with the model {printable(receipt.run.model)}, and a receipt opens and fetches none; "
                "say where it is with --model"
            )
        name = PICTUREBOOK
    for control in sorted(set(receipt.run.controlnet) ^ set(named.controlnets)):
        if control in named.controlnets:
            raise UsageError(f"controlnet {control}: the picture was made with those inside the model; leave it out")
        raise UsageError(
            f"the picture was made with the ControlNet {printable(receipt.run.controlnet[control])}; say where it is with "
            f"--controlnet {printable(control)}=FOLDER"
        )
    model = load_model(
        name,
        dict(named.controlnets) or None,
        device=receipt.run.device,
        dtype=receipt.run.dtype,
        used_layouts={*receipt.files.layouts, *receipt.files.source_layouts},
    )
    if model.digest != receipt.model.digest:
        raise UsageError(
            f"model: {model.name} has digest {model.digest}, the picture was made with {receipt.model.digest}: other "
            "weights, another config or tokenizer, or ControlNets by other names"
        )
    if model.schedule.digest != receipt.model.schedule:
        raise UsageError(f"model: the scheduler config of {model.name} is not the one that the picture was made with")
    return model


def _load_backend(receipt: Receipt, named: Named, model: Model) -> Backend:
    """What ran each module when the picture was made, or the backend that the caller names."""
    run, engines = receipt.run, None if named.engines is None else Path(named.engines)
    options: dict[str, Any] = {
        "attention": run.attention,
        "channels_last": run.channels_last,
        "trust_engines": named.trust_engines,
    }
    if named.backend is not None:
        return load_backend(named.backend, model, engines, **options)
    try:
        built = [(e.module, e.backend, e.digest) for e in receipt.backend.engines]
        return load_recorded(model, receipt.backend.modules, built, engines, **options)
    except UsageError as error:
        raise UsageError(
            f"{error}; name their folder with --engines, or compare with another backend: --backend torch"
        ) from error


def _requests(receipt: Receipt, inputs: Mapping[str, Any]) -> list[EditRequest]:
    """The whole batch: networks round differently with the batch size."""
    asked = receipt.request
    return [
        EditRequest(
            **inputs,
            prompt=asked.prompt,
            source_prompt=asked.source_prompt,
            method=asked.method,
            seed=member.seed,
            steps=asked.steps,
            options=dataclasses.replace(asked.options, lam=member.lam if asked.method in ITO else None),
        )
        for member in receipt.batch.members
    ]


def _differences_here(
    receipt: Receipt, named: Named, model: Model, modules: Mapping[str, list[str]]
) -> tuple[str, ...]:
    """What is different here from where the picture was made: versions, device, dtype, threads and, where another was named, backend."""

    def backends(ran: Mapping[str, Any]) -> str:
        return " and ".join(sorted({name for names in ran.values() for name in names}))

    here = versions() | {
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
    }
    made = receipt.backend
    there = {k: v for k, v in receipt.versions.items() if k in versions()}
    there |= {"device": made.device, "dtype": receipt.model.dtype, "threads": str(made.threads)}
    if named.backend is not None:
        here["backend"], there["backend"] = backends(modules), backends(made.modules)
    return tuple(f"{k} was {printable(there[k])}, is {here[k]}" for k in there if here[k] != there[k])


def _difference(one: Image.Image, other: Image.Image) -> tuple[int, int]:
    """The largest difference of a channel, and in how many pixels there is one; everything where the sizes differ."""
    a, b = np.asarray(one).astype(int), np.asarray(other).astype(int)
    if a.shape != b.shape:
        return 255, max(one.width * one.height, other.width * other.height)
    difference = np.abs(a - b).max(axis=-1)
    return int(difference.max()), int((difference > 0).sum())
