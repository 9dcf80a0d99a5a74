"""A receipt: what made a picture, inside its PNG. What goes in, and what is believed of one that is read.

In it are prompts, options, seeds, digests of model and inputs, versions, what ran each module, and names: of the model and of the
input files, without their folders. Whoever gets the picture can read it.

A receipt that is read may be anybody's work: it is checked against the types and bounds of `Receipt` before anything of it is used.
`replay` makes the picture again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image

from . import BACKENDS, METHODS, VERSION
from .errors import UsageError
from .files import Match, Range, printable, typed
from .images import mask_coverage
from .model.checkpoint import PICTUREBOOK
from .model.model import Model
from .options import Options
from .profile import Profile
from .request import PreparedRequest

Digest = Annotated[str, Match("[0-9a-f]{8,64}", "a digest of 8 to 64 hex digits")]
Word = Annotated[str, Match(r"[^\x00-\x1f\x7f]{0,200}", "at most 200 characters")]
FileName = Annotated[str, Match(r"(?!\.{1,2}$)[^/\\\x00]{1,255}", "the name of a file, without a folder")]
BackendName = Annotated[str, Match("|".join(BACKENDS), f"one of {', '.join(BACKENDS)}")]
Device = Annotated[str, Match(r"cpu|cuda(:[0-9]{1,3})?", "cpu or cuda:NUMBER")]
Dtype = Annotated[str, Match("float32|float16|bfloat16", "float32, float16 or bfloat16")]
Seed = Annotated[int, Range(-(2**63), 2**64 - 1)]
Share = Annotated[float, Range(0, 1)]

# Something like a path: from the root, the home or a folder above, up to its last name.
_PATH = re.compile(r"(?<![\w.~:/-])(?:~|\.{1,2})?/(?!/)(?:[^\s/:;,'\"()]+/)*([^\s/:;,'\"()]*)")


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
    """`picture_digest` of every input."""

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
class FallbackPart:
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
    fallbacks: tuple[FallbackPart, ...]


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
    lam: Share | None


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
        parsed: Receipt = typed(Receipt, dict(receipt), "")
        parsed.request.options.check()
        files, inputs, batch = parsed.files, parsed.inputs, parsed.batch
        if batch.index >= len(batch.members):
            raise ValueError(f"batch.index is {batch.index} of {len(batch.members)} members")
        if files.layouts.keys() != inputs.layouts.keys() or files.source_layouts.keys() != inputs.source_layouts.keys():
            raise ValueError("files and inputs name different layouts")
        if (files.mask is None) != (inputs.mask is None):
            raise ValueError("files and inputs disagree about a mask")
    except (ValueError, UsageError) as error:
        raise UsageError(
            f"{name}: its receipt cannot be used: {error}; it is damaged, or of another version of iedit (it says {printable(str(receipt.get('iedit')))[:40]})"
        ) from error
    return parsed


# --- what goes in -----------------------------------------------------------------------------------------------


def of_edit(
    r: PreparedRequest, mask: Image.Image | None, profile: Profile, model: Model, backend: str, share: bool
) -> dict[str, Any]:
    """The receipt of an edit that has run, JSON-ready; paths are still in it, see `without_paths`.

    Args:
        mask: where the edit was allowed, as a picture.
        backend: by the name that it was asked for.
        share: whether stages shared network calls.
    """
    q, digests = r.request, lambda maps: {name: picture_digest(picture) for name, picture in maps.items()}
    receipt: dict[str, Any] = {
        "iedit": VERSION,
        "model": {"name": model.name, "digest": model.digest, "schedule": model.schedule.digest,
                  "dtype": str(model.dtype).removeprefix("torch.")},
        "request": {"prompt": q.prompt, "source_prompt": q.source_prompt, "method": q.method, "seed": q.seed,
                    "steps": q.steps, "options": dataclasses.asdict(q.options)},
        "inputs": {"image": picture_digest(q.image), "mask": None if q.mask is None else picture_digest(q.mask),
                   "layouts": digests(q.layouts), "source_layouts": digests(q.source_layouts)},
        "backend": {"name": backend, "device": str(model.device), "threads": torch.get_num_threads(), "share": share,
                    "modules": profile.ran(), "engines": profile.engines(), "fallbacks": profile.fallback_reasons()},
        "versions": versions(),
        "mask": None,
        "notes": [*r.notes, *profile.notes],
    }  # fmt: skip
    if mask is not None:
        receipt["mask"] = {"area": round(mask_coverage(mask), 6), "estimated": r.given_mask is None}
    return receipt


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

    settings = {f.name: run[f.name] for f in dataclasses.fields(RunPart)}
    settings |= {
        "model": public_name(run["model"]),
        "controlnet": {n: public_name(f) for n, f in run["controlnet"].items()},
    }
    return receipt | {
        "files": {k: names(v) for k, v in files.items()},
        "run": settings,
        "batch": {"members": members, "index": index},
    }


def picture_digest(image: Image.Image) -> str:
    """32 hex digits of a picture's mode, size and pixels."""
    return hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()[:32]


def versions() -> dict[str, str]:
    """Versions of Python and of every library that can change a pixel."""
    return dict(_versions())


@functools.cache  # to read them takes 7 ms, of an edit that can take 700
def _versions() -> dict[str, str]:
    # Torch says its build too (+cpu, +cu130), which the wheel's metadata may leave out.
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("diffusers", "transformers", "numpy", "pillow"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
    return versions


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

    model, backend = receipt["model"], receipt["backend"]
    return receipt | {
        "notes": clean(receipt["notes"]),
        "model": model | {"name": public_name(model["name"])},
        "backend": backend | {"fallbacks": clean(backend["fallbacks"])},
    }


def public_name(model: str) -> str:
    """A model's name without folders: as it is for the embedded one and a hub id, else its folder's own."""
    if model == PICTUREBOOK or (re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) and not Path(model).is_dir()):
        return model
    return file_name(os.path.abspath(Path(model).expanduser()))


def file_name(path: str) -> str:
    """The last name of a path, printable."""
    return printable(os.path.basename(path.rstrip("/")))[:200]
