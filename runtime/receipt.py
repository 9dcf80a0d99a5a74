"""A receipt: what made a picture, inside its PNG. What goes in, what is believed of it, and the picture made again from it.

In it are prompts, options, seeds, digests of model and inputs, versions, what ran each module, and names: of the model and of the
input files, without their folders. Whoever gets the picture can read it.

A receipt that is read may be anybody's work. It is checked against the types and bounds of `Receipt` before anything of it
is used; it opens no file but those of its names beside the picture, whose digests must match; it names no folder, no
engine and no download: a model that is not the embedded one, ControlNets and engines are what the caller names.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image

from . import BACKENDS, METHODS
from .errors import UsageError
from .images import load_image, load_layout, load_mask, read_receipt
from .model.checkpoint import PICTUREBOOK
from .options import Options
from .profile import Callback
from .request import EditRequest
from .untrusted import Match, Range, printable, typed

BOUND = 1  # of 255: what another grouping of the network's calls changes in a picture

Digest = Annotated[str, Match("[0-9a-f]{8,64}", "a digest of 8 to 64 hex digits")]
Word = Annotated[str, Match(r"[^\x00-\x1f\x7f]{0,200}", "at most 200 characters")]
FileName = Annotated[str, Match(r"(?!\.{1,2}$)[^/\\\x00]{1,255}", "the name of a file, without a folder")]
BackendName = Annotated[str, Match("|".join(BACKENDS), f"one of {', '.join(BACKENDS)}")]
Device = Annotated[str, Match(r"cpu|cuda(:[0-9]{1,3})?", "cpu or cuda:NUMBER")]
Dtype = Annotated[str, Match("float32|float16|bfloat16", "float32, float16 or bfloat16")]
Seed = Annotated[int, Range(-(2**63), 2**64 - 1)]
Share = Annotated[float, Range(0, 1)]


# --- what a receipt may hold ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelPart:
    """The checkpoint: its name without a folder, `Model.digest` and the digest of its noise schedule."""

    name: Word
    digest: Digest
    schedule: Digest
    dtype: Dtype


@dataclass(frozen=True)
class RequestPart:
    """What was asked for."""

    prompt: str
    source_prompt: str
    method: Annotated[str, Match("|".join(METHODS), f"one of {', '.join(METHODS)}")]
    seed: Seed
    steps: Annotated[int, Range(1, 1000)]
    options: Options


@dataclass(frozen=True)
class InputsPart:
    """`editor.picture_digest` of every input."""

    image: Digest
    mask: Digest | None
    layouts: Mapping[Word, Digest]
    source_layouts: Mapping[Word, Digest]


@dataclass(frozen=True)
class EnginePart:
    """An engine that ran a module."""

    module: Word
    backend: BackendName
    digest: Digest


@dataclass(frozen=True)
class StepDown:
    """A backend that did not run a module, and why."""

    module: Word
    backend: Word
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class BackendPart:
    """What ran it: the backend by the name it was asked for, and what ran each module."""

    name: Word
    device: Device
    threads: Annotated[int, Range(1, 4096)]
    share: bool
    modules: Mapping[Word, tuple[BackendName, ...]]
    engines: tuple[EnginePart, ...]
    fallbacks: tuple[StepDown, ...]


@dataclass(frozen=True)
class MaskPart:
    """The mask that was used."""

    area: Share
    estimated: bool


@dataclass(frozen=True)
class FilesPart:
    """Names of the input files; they are looked for beside the picture."""

    image: FileName
    mask: FileName | None
    layouts: Mapping[Word, FileName]
    source_layouts: Mapping[Word, FileName]


@dataclass(frozen=True)
class RunPart:
    """Options of the command line that say how it was run."""

    backend: Annotated[str, Match("|".join(("auto", *BACKENDS)), f"one of auto, {', '.join(BACKENDS)}")]
    device: Device | None
    dtype: Dtype | None
    attention: Annotated[str, Match("sdpa|xformers", "sdpa or xformers")]
    channels_last: bool
    model: Word
    controlnet: Mapping[Word, Word]


@dataclass(frozen=True)
class Member:
    """One edit of a batch."""

    seed: Seed
    lam: Share


@dataclass(frozen=True)
class BatchPart:
    """The edits that ran together, and which of them the picture is."""

    members: tuple[Member, ...]
    index: Annotated[int, Range(0, 9999)]


@dataclass(frozen=True)
class Receipt:
    """A whole receipt of `iedit edit`; the Python interface's lack `files`, `run` and `batch`."""

    iedit: Word
    model: ModelPart
    request: RequestPart
    inputs: InputsPart
    backend: BackendPart
    versions: Mapping[Word, Word]
    mask: MaskPart | None
    notes: tuple[str, ...]
    files: FilesPart
    run: RunPart
    batch: BatchPart


def parse(receipt: Mapping[str, Any], name: str) -> Receipt:
    """A receipt as it came out of a picture, checked.

    Raises:
        UsageError: a field is missing, unknown, of another type or out of its bounds; `name` and the field are named.
    """
    for part in ("files", "run", "batch"):
        if part not in receipt:
            raise UsageError(
                f"{name}: its receipt has no {part}; only pictures that `iedit edit` wrote can be replayed"
            )
    try:
        found: Receipt = typed(Receipt, dict(receipt), "")
        found.request.options.check()
        if found.batch.index >= len(found.batch.members):
            raise ValueError(f"batch.index is {found.batch.index} of {len(found.batch.members)} members")
        if set(found.files.layouts) != set(found.inputs.layouts) or set(found.files.source_layouts) != set(
            found.inputs.source_layouts
        ):
            raise ValueError("files and inputs name different layouts")
        if (found.files.mask is None) != (found.inputs.mask is None):
            raise ValueError("files and inputs disagree about a mask")
    except (ValueError, UsageError) as error:
        raise UsageError(
            f"{name}: its receipt cannot be used: {error}; it is damaged, or of another version of iedit (it says {printable(str(receipt.get('iedit')))[:40]})"
        ) from error
    return found


# --- what goes in -----------------------------------------------------------------------------------------------

# Something like a path: from the root, the home or a folder above, up to its last name.
_PATH = re.compile(r"(?<![\w.~:/-])(?:~|\.{1,2})?/(?!/)(?:[^\s/:;,'\"()]+/)*([^\s/:;,'\"()]*)")


def without_paths(receipt: dict[str, Any], *folders: Path) -> dict[str, Any]:
    """A receipt whose notes, reasons and model name hold no path of this machine, only the last names.

    Args:
        folders: that may be in them, also with spaces in their names.
    """
    # Home and working folder have no last name that anybody should read.
    known = {str(f): f.name for f in folders} | {str(Path.home()): "~", str(Path.cwd()): "."}
    known = {f: name for f, name in known.items() if len(f) > 1}

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            for folder in sorted(known, key=len, reverse=True):
                value = value.replace(folder, known[folder])
            return _PATH.sub(r"\1", value)
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items()}
        return [clean(v) for v in value] if isinstance(value, (list, tuple)) else value

    told = dict(receipt) | {"notes": clean(receipt["notes"])}
    told["model"] = receipt["model"] | {"name": public_name(receipt["model"]["name"])}
    told["backend"] = receipt["backend"] | {"fallbacks": clean(receipt["backend"]["fallbacks"])}
    return told


def public_name(model: str) -> str:
    """A model's name without folders: as it is for the embedded one and a hub id, else its folder's own."""
    if model == PICTUREBOOK or (re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) and not Path(model).is_dir()):
        return model
    return file_name(os.path.abspath(Path(model).expanduser()))


def file_name(path: str) -> str:
    """The last name of a path, printable."""
    return printable(os.path.basename(path.rstrip("/")))[:200]


def of_command(
    receipt: dict[str, Any], files: Mapping[str, Any], run: Mapping[str, Any], members: list[dict[str, Any]], index: int
) -> dict[str, Any]:
    """The library's receipt with what `replay` needs: the inputs' names, how it was run, and the batch.

    Args:
        files: `image`, `mask`, `layouts` and `source_layouts` as they were named; only the last names are kept.
        run: the options of `RunPart`; of model and ControlNets only names are kept.
    """

    def names(given: Any) -> Any:
        if isinstance(given, Mapping):
            return {n: file_name(p) for n, p in given.items()}
        return None if given is None else file_name(given)

    how = {f.name: run[f.name] for f in dataclasses.fields(RunPart)}
    how |= {"model": public_name(run["model"]), "controlnet": {n: public_name(f) for n, f in run["controlnet"].items()}}
    return receipt | {
        "files": {k: names(v) for k, v in files.items()},
        "run": how,
        "batch": {"members": members, "index": index},
    }


# --- the picture made again -------------------------------------------------------------------------------------


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
    from .backends import load_backend, load_recorded
    from .editor import Editor, versions
    from .model.model import load_model

    raw = read_receipt(picture)
    receipt = parse(raw, picture)
    inputs = _inputs(receipt, picture, named)
    model, controlnets = _model(receipt, named)
    run, made = receipt.run, receipt.backend
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(min(made.threads, os.cpu_count() or 1))
        loaded = load_model(model, controlnets or None, device=run.device, dtype=run.dtype)
        if loaded.digest != receipt.model.digest:
            raise UsageError(
                f"model: {loaded.name} has digest {loaded.digest}, the picture was made with {receipt.model.digest}: other "
                "weights, another config or tokenizer, or ControlNets by other names"
            )
        if loaded.schedule.digest != receipt.model.schedule:
            raise UsageError(
                f"model: the scheduler config of {loaded.name} is not the one that the picture was made with"
            )
        engines = None if named.engines is None else Path(named.engines)
        options: dict[str, Any] = {
            "attention": run.attention,
            "channels_last": run.channels_last,
            "trust_engines": named.trust_engines,
        }
        if named.backend is not None:
            backend = load_backend(named.backend, loaded, engines, **options)
        else:
            try:
                built = [(e.module, e.backend, e.digest) for e in made.engines]
                backend = load_recorded(loaded, made.modules, built, engines, **options)
            except UsageError as error:
                raise UsageError(
                    f"{error}; name their folder with --engines, or compare with another backend: --backend torch"
                ) from error
        editor = Editor(loaded, backend, share=made.share)
        result = editor.edit_many(_requests(receipt, inputs), callback)[receipt.batch.index]
        threads = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    here = {"device": str(loaded.device), "dtype": str(loaded.dtype).removeprefix("torch."), "threads": str(threads)}
    there = {"device": made.device, "dtype": receipt.model.dtype, "threads": str(made.threads)}
    if named.backend is not None:
        here["backend"], there["backend"] = _backends(result.profile.ran()), _backends(made.modules)
    now = versions()
    here, there = now | here, {k: v for k, v in receipt.versions.items() if k in now} | there
    reasons = tuple(f"{k} was {printable(there[k])}, is {here[k]}" for k in there if here.get(k) != there[k])
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
    from .editor import picture_digest

    beside = Path(picture).resolve().parent

    def read(name: str, given: str | None, option: str, digest: str, load: Callable[[str], Any]) -> Any:
        path = given or str(beside / name)
        if given is None and not os.path.lexists(path):
            raise UsageError(
                f"{beside / printable(name)}: there is no such file, and the picture was made from it; say where it is with {option}"
            )
        found = load(path)
        if picture_digest(found) != digest:
            raise UsageError(
                f"{path}: this is not the one that was used; replay needs the same file, name it with {option}"
            )
        return found

    files, digests = receipt.files, receipt.inputs
    image = read(files.image, named.image, "--image", digests.image, load_image)
    found: dict[str, Any] = {"image": image, "mask": None}
    for key, option in (("layouts", "--layout"), ("source_layouts", "--source-layout")):
        given: Mapping[str, str] = getattr(named, key)
        found[key] = {
            n: read(f, given.get(n), f"{option} {printable(n)}=FILE", getattr(digests, key)[n], load_layout)
            for n, f in getattr(files, key).items()
        }
    if files.mask is not None and digests.mask is not None:
        found["mask"] = read(files.mask, named.mask, "--mask", digests.mask, lambda path: load_mask(path, image.size))
    return found


def _model(receipt: Receipt, named: Named) -> tuple[str, dict[str, str]]:
    """The model and ControlNets to load: nothing that only the receipt names, but for the embedded model."""
    model = named.model
    if model is None:
        if receipt.run.model != PICTUREBOOK:
            raise UsageError(
                f"the picture was made with the model {printable(receipt.run.model)}, and a receipt opens and fetches none; "
                "say where it is with --model"
            )
        model = PICTUREBOOK
    for name in sorted(set(receipt.run.controlnet) ^ set(named.controlnets)):
        if name in named.controlnets:
            raise UsageError(f"controlnet {name}: the picture was made with those inside the model; leave it out")
        told = printable(receipt.run.controlnet[name])
        raise UsageError(
            f"the picture was made with the ControlNet {told}; say where it is with --controlnet {printable(name)}=FOLDER"
        )
    return model, dict(named.controlnets)


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
            options=dataclasses.replace(asked.options, lam=member.lam),
        )
        for member in receipt.batch.members
    ]


def _backends(ran: Mapping[str, Any]) -> str:
    return " and ".join(sorted({name for names in ran.values() for name in names}))


def _difference(one: Image.Image, other: Image.Image) -> tuple[int, int]:
    """The largest difference of a channel, and in how many pixels there is one; everything where the sizes differ."""
    a, b = np.asarray(one).astype(int), np.asarray(other).astype(int)
    if a.shape != b.shape:
        return 255, max(one.width * one.height, other.width * other.height)
    difference = np.abs(a - b).max(axis=-1)
    return int(difference.max()), int((difference > 0).sum())
