"""What an engine was built for, in a JSON beside it; every field is checked before the engine is used.

An engine is a folder with `engine.json`, which is written last and names every other file with its digest: a folder
without it (a build that was stopped) is no engine, and a folder whose files differ from it is refused. Nothing is read out
of folder names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from ..errors import RunError, UsageError
from ..files import Match, check_regular, parse_json, typed, write_whole

SPEC_FILE = "engine.json"
REPORT_FILE = "report.json"  # of `iedit export verify`
BUILD_MARKER = "iedit-build.json"  # in a folder from when a build begins until its spec is written
FORMATS = ("onnx", "tensorrt")
PRECISIONS = ("fp32", "fp16", "bf16")
ATTENTION = ("operator", "decomposed", "decomposable", "")


@dataclass(frozen=True)
class Shapes:
    """A range of inputs: `(min, opt, max)` of batch, height and width; pixels. A maximum of 0 is "any".

    TensorRT calls this an optimisation profile. An ONNX graph with dynamic dimensions has one, without limits.
    """

    batch: tuple[int, int, int] = (1, 1, 0)
    height: tuple[int, int, int] = (8, 512, 0)
    width: tuple[int, int, int] = (8, 512, 0)

    def out_of_range(self, batch: int, height: int, width: int) -> list[str]:
        """The fields that do not take this call, with their range."""
        misses = []
        for name, value in (("batch", batch), ("height", height), ("width", width)):
            smallest, _, largest = getattr(self, name)
            if value < smallest or (largest and value > largest):
                misses.append(f"{name} {smallest}-{largest or 'any'}, asked for {value}")
        return misses


@dataclass(frozen=True)
class EngineSpec:
    """The identity of one engine.

    Attributes:
        format: "onnx" or "tensorrt".
        module: unet, unet+NAMES (fused with those ControlNets, names sorted and joined by "+"), controlnet-NAME,
            control-embedding-NAME (of its layout), vae_encoder, vae_decoder or text_encoder; see `module_io`.
        model: name of the checkpoint, for people.
        weights: digest of the module's weights and configs (`Model.module_digest`).
        graph: digest of the ONNX graph without its metadata, weights apart.
        precision: fp32; fp16 or bf16 with float32 islands (norms and softmax).
        shapes: what it was built for; TensorRT may have several.
        opset: of the ONNX graph.
        versions: of what made it: torch, diffusers, onnx, tensorrt ...
        gpu: "sm_90 NVIDIA H100 80GB HBM3" and so on; "" runs anywhere.
        attention: how it is computed: "operator" (ONNX's own), "decomposed" (products and softmax), "decomposable" (the operator, which
            TensorRT takes apart where it has no fused kernel), or "" where there is none.
        inputs: names of its inputs, in the order of `module_io.inputs`.
        files: name -> sha256 of every other file of the folder that belongs to it.
        checked: the parity report's figures, once `iedit export verify` has passed.
    """

    format: Annotated[str, Match("|".join(FORMATS), f"one of {', '.join(FORMATS)}")]
    module: str
    model: str
    weights: str
    graph: str
    precision: Annotated[str, Match("|".join(PRECISIONS), f"one of {', '.join(PRECISIONS)}")]
    shapes: tuple[Shapes, ...]
    opset: int
    versions: Mapping[str, str]
    gpu: str = ""
    attention: Annotated[str, Match("|".join(ATTENTION), f"one of {', '.join(ATTENTION[:-1])} or empty")] = ""
    inputs: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    checked: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        ranges = "; ".join(f"batch {_range(s.batch)} at {_range(s.width)}x{_range(s.height)}" for s in self.shapes)
        return f"{self.format} {self.module} {self.precision}, {ranges}{f' on {self.gpu}' if self.gpu else ''}"

    @property
    def digest(self) -> str:
        """Of the engine's files, 16 hex digits: what a receipt remembers it by."""
        return hashlib.sha256(json.dumps(dict(sorted(self.files.items()))).encode()).hexdigest()[:16]

    def differs(self, **wanted: Any) -> list[str]:
        """One reason for each field that is not as wanted: `weights: the engine has 12ab, wanted 34cd`."""
        reasons = []
        for name, value in wanted.items():
            have = getattr(self, name)
            if have != value:
                reasons.append(f"{name}: the engine has {have or 'none'}, wanted {value or 'none'}")
        return reasons

    def out_of_range(self, batch: int, height: int, width: int) -> list[str]:
        """Why no range of the engine takes this call; empty if one does."""
        if any(not s.out_of_range(batch, height, width) for s in self.shapes):
            return []
        misses = [", ".join(s.out_of_range(batch, height, width)) for s in self.shapes]
        return [f"{self.format} {self.module} engine was built for {' or '.join(misses)}"]


def _range(limits: tuple[int, int, int]) -> str:
    smallest, _, largest = limits
    return str(smallest) if smallest == largest else f"{smallest}-{largest or 'any'}"


def file_digest(path: Path) -> str:
    """sha256 of a file, 64 hex digits."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def new_build(target: Path) -> Path:
    """A new folder beside `target` to build in, marked as such: `.NAME.xxxxxxxx.building`. Nothing else is one.

    Raises:
        UsageError: `target`, which the build will replace, holds something that is not an engine's.
    """
    there = sorted(target.iterdir()) if target.is_dir() else [target] if os.path.lexists(target) else []
    strangers = set(there) - set(own_files(target) or ())
    if strangers:
        raise UsageError(
            f"{target}: {min(strangers).name} is there, which is of no engine of iedit, and the build would replace it; move it "
            "away, or build in another folder"
        )
    building = target.parent / f".{target.name}.{secrets.token_hex(4)}.building"
    building.mkdir(parents=True)
    (building / BUILD_MARKER).write_text(json.dumps({"iedit": "build", "of": target.name}) + "\n")
    return building


def is_build(folder: Path) -> bool:
    """Whether a folder is what `new_build` makes, in use or left over."""
    named = re.fullmatch(r"\..+\.[0-9a-f]{8}\.building", folder.name) and folder.is_dir() and not folder.is_symlink()
    return bool(named) and ((folder / BUILD_MARKER).is_file() or _ours(folder) is not None)


def _ours(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's `engine.json`, if this project wrote it: of whatever version, it has these fields."""
    path = folder / SPEC_FILE
    try:
        check_regular(path)
        content = parse_json(path.read_text())
    except (UsageError, OSError, ValueError):
        return None
    wanted = {"format", "module", "weights", "graph", "precision", "shapes"}
    return content if isinstance(content, dict) and wanted <= set(content) and content["format"] in FORMATS else None


def own_files(folder: Path) -> list[Path] | None:
    """What of a folder is an engine's: its spec, report and the files that the spec names, if they are there.

    Returns:
        None where there is no spec of this project, whatever else lies there.
    """
    content = _ours(folder)
    if content is None:
        return None
    named = content.get("files")
    names = [SPEC_FILE, REPORT_FILE, BUILD_MARKER, *(named if isinstance(named, dict) else ())]
    return [folder / n for n in names if n == Path(n).name and n not in (".", "..") and os.path.lexists(folder / n)]


def write_spec(folder: Path, spec: EngineSpec, files: Sequence[str]) -> EngineSpec:
    """Make `folder` an engine: digest `files` (names in it) and write `engine.json`, the very last thing of a build.

    Returns:
        the spec with its files.
    """
    whole = dataclasses.replace(spec, files={name: file_digest(folder / name) for name in sorted(files)})
    write_whole(folder / SPEC_FILE, (json.dumps(dataclasses.asdict(whole), indent=1) + "\n").encode())
    (folder / BUILD_MARKER).unlink(missing_ok=True)
    return whole


def read_spec(folder: Path) -> EngineSpec:
    """The spec of an engine's folder. Files are not looked at; see `damaged`.

    Raises:
        UsageError: there is no `engine.json`, or it is not one of ours; the field is named.
    """
    path = folder / SPEC_FILE
    if not os.path.lexists(path):
        raise UsageError(f"{folder}: no {SPEC_FILE}: not an engine, or a build that was stopped; export it again")
    check_regular(path)
    try:
        content = parse_json(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); export the engine again") from error
    names = {f.name for f in dataclasses.fields(EngineSpec)}
    if not isinstance(content, dict) or set(content) != names:
        odd = sorted(names ^ set(content)) if isinstance(content, dict) else ["everything"]
        raise UsageError(
            f"{path}: field {odd[0]} is missing or unknown; the engine is of another version of iedit, export it again"
        )
    try:
        spec: EngineSpec = typed(EngineSpec, content, "")
    except ValueError as error:
        raise UsageError(f"{path}: {error}; export the engine again") from error
    if any(name != Path(name).name or name in ("", ".", "..", SPEC_FILE) for name in spec.files):
        raise UsageError(f"{path}: files: a name in it is not one of a file in this folder; export the engine again")
    ranges = [r for s in spec.shapes for r in (s.batch, s.height, s.width)]
    if not ranges or any(least < 0 or most < 0 or (most and most < least) for least, _, most in ranges):
        raise UsageError(f"{path}: shapes: they hold no range, or one that is out of order; export the engine again")
    return spec


def damaged(folder: Path, spec: EngineSpec) -> list[str]:
    """Reasons why the files are not those that were built: missing, changed, or read by the graph and of no digest; each named."""
    reasons = []
    for name, digest in spec.files.items():
        path = folder / name
        try:
            if not path.is_file():
                reasons.append(f"files: {name} is missing")
            elif file_digest(path) != digest:
                reasons.append(f"files: {name} is not what was built (its digest differs)")
        except OSError as error:  # it may not be read, or has just been removed
            reasons.append(f"files: {name} cannot be read ({error.strerror})")
    return reasons or [f"files: {name} belongs to the graph and is not among them" for name in _unlisted(folder, spec)]


def _unlisted(folder: Path, spec: EngineSpec) -> list[str]:
    """Files that an ONNX graph reads its weights from and that the spec leaves out, whose bytes nobody has compared. The graph
    names such a file as it is called in the folder."""
    if spec.format != "onnx":
        return []
    found = []
    with contextlib.suppress(OSError):
        graphs = [(folder / name).read_bytes() for name in spec.files if name.endswith(".onnx")]
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder).as_posix()
            if inside not in spec.files and path.is_file() and any(inside.encode() in graph for graph in graphs):
                found.append(inside)
    return found


def writable_by_all(folder: Path, spec: EngineSpec, root: Path) -> list[str]:
    """A reason if every user of this machine may change the engine: its files, its folder, or one up to `root`.

    An engine is code that runs with the rights of whoever starts an edit, and its digests lie beside it.
    """
    places = [folder / name for name in (SPEC_FILE, *spec.files)]
    places += [p for p in (folder, *folder.parents) if p == root or root in p.parents]
    if folder.resolve() != folder.absolute():  # behind a link: what it leads to
        places += [folder.resolve(), folder.resolve().parent]
    for place in places:
        if place.exists() and place.stat().st_mode & stat.S_IWOTH:
            return [
                f"every user of this machine may write to {place} (chmod -R o-w it, or ask for it with --trust-engines)"
            ]
    return []


def engines_folder(weights_digest: str) -> Path:
    """Where engines of a model are kept unless told otherwise: the user's cache, by `Model.weights_digest`."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "iedit" / "engines" / weights_digest


def find_engines(folder: Path) -> Iterator[tuple[Path, EngineSpec | UsageError]]:
    """Every engine in a folder, however deep, with its spec or what is wrong with it; sorted by path. Links to folders are followed.

    Folders whose names begin with a dot are builds that are not in their place yet, or never will be.
    """
    for where in sorted(_folders(folder, lambda name: not name.startswith("."))):
        if os.path.lexists(where / SPEC_FILE):
            try:
                yield where, read_spec(where)
            except UsageError as error:
                yield where, error


def find_builds(folder: Path) -> list[Path]:
    """What builds under a folder left, or have under way; sorted."""
    return sorted(p for p in _folders(folder, lambda name: True) if is_build(p))


def _folders(folder: Path, enter: Callable[[str], bool]) -> Iterator[Path]:
    """A folder and those in it, however deep, whose names `enter` takes; each once, also where links lead in a circle. What goes away
    meanwhile, or may not be looked into, is left out."""
    seen: set[tuple[int, int]] = set()
    with contextlib.suppress(OSError):
        root = os.stat(folder)
        seen.add((root.st_dev, root.st_ino))
    for where, names, _ in os.walk(folder, followlinks=True):
        entered = []
        for name in names:
            with contextlib.suppress(OSError):
                found = os.stat(os.path.join(where, name))
                if enter(name) and (found.st_dev, found.st_ino) not in seen:
                    seen.add((found.st_dev, found.st_ino))
                    entered.append(name)
        names[:] = entered
        yield Path(where)


def describe_engines(weights_digest: str) -> str:
    """What lies in a model's default folder of engines, in a line; their files are not read."""
    folder = engines_folder(weights_digest)
    specs = [spec for _, spec in find_engines(folder)]
    counts = Counter("unreadable" if isinstance(s, UsageError) else f"{s.format} {s.precision}" for s in specs)
    summary = ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
    return f"{summary} in {folder}" if summary else f"none in {folder} (iedit export onnx MODEL writes some)"


@contextlib.contextmanager
def build_lock(
    folder: Path, tell: Callable[[str], None] = lambda text: None, timeout: float = 3600.0
) -> Iterator[None]:
    """One process builds into `folder` at a time; the others wait and then find it done.

    The lock is the operating system's: it is gone with the process that held it, however that ended.

    Raises:
        RunError: another process held it for longer than `timeout` seconds.
    """
    import fcntl

    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f".{folder.name}.lock"
    with path.open("a+") as handle:
        began, announced = time.monotonic(), False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not announced:
                    tell(f"another process is building {folder.name}; waiting for it")
                    announced = True
                if time.monotonic() - began > timeout:
                    raise RunError(
                        f"{path}: another process has been building for {timeout:.0f} s; stop it or wait"
                    ) from None
                time.sleep(0.2)
        yield
