"""Stages whose results are kept by content: what was computed once for an image is not computed again (invert once, edit many).

A key is the digest of everything that the stage's result depends on: picture, texts, model, schedule and the options that
matter to that stage. Results live in memory up to a bound, the least recently used going first; on request they are also
kept on disk, within a bound of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import profile
from .denoise_step import Sampler
from .errors import RunError, UsageError
from .files import write_whole
from .network import Network
from .profile import Profile
from .request import PreparedRequest


def key_of(stage: str, *parts: Any) -> str:
    """32 hex digits of a stage and JSON-ready parts."""
    text = json.dumps([stage, *parts], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def tensor_digest(value: Tensor) -> str:
    """32 hex digits of a tensor's shape, dtype and content."""
    array = value.detach().cpu().contiguous()
    head = f"{tuple(array.shape)}{array.dtype}".encode()
    return hashlib.sha256(head + array.view(-1).numpy().tobytes()).hexdigest()[:32]


FOLDER = "iedit-cache-v1"
MARKER = "CACHEDIR.TAG"  # of https://bford.info/cachedir: backups leave such folders out
_MARK = (
    "Signature: 8a477f597d28d172789f06886806bc55\n# Stage results of iedit; they are made again when this is removed.\n"
)
_ENTRY = re.compile(r"[0-9a-f]{32}\.safetensors")
_LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.[0-9a-f]+\.tmp")
_STALE = 3600.0  # seconds after which an unfinished file is of a process that is gone
_WEIGHTS = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".gguf")


class StageCache:
    """Results by key. Safe to use from several threads.

    On disk a result is a safetensors file in the folder `iedit-cache-v1` inside the one that is named, which is made when
    the first result is written. Nothing outside it is ever touched, and in it only what this class made: entries, named by
    their keys, and what is left of entries that a stopped process did not finish. Every entry carries a digest of its
    content. One that is not what was written is removed and computed again; a disk that is full costs the entry and not
    the edit. Both are notes of the running profile.

    Args:
        memory: bound in bytes; 0 keeps nothing in memory.
        folder: also keep results as files there.
        disk: bound of the files in bytes; those read longest ago are removed first.

    Raises:
        UsageError: `folder` is no place for a cache: it or the one that it would be made in is a checkpoint's, a file, or
            may not be written to, or there is something else called `iedit-cache-v1` in it.
    """

    def __init__(self, memory: int = 512 << 20, folder: Path | None = None, disk: int = 4 << 30):
        self.memory, self.disk = memory, disk
        self.folder = None if folder is None else _own_folder(Path(folder))
        self._held: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @staticmethod
    def _size(result: Tensor) -> int:
        return result.numel() * result.element_size()

    def get(self, key: str, stage: str = "", shape: Sequence[int] | None = None) -> Tensor | None:
        """The result of `key`, or None.

        Args:
            stage: whose result it is, for notes.
            shape: of the result, if the caller knows it; a file with another is damaged too.
        """
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        if self.folder is None:
            return None
        path = self.folder / f"{key}.safetensors"
        try:
            result = _read(path, key, shape)
            os.utime(path)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            self._discard(path, stage, error)
            return None
        self._hold(key, result)
        return result

    def put(self, key: str, result: Tensor) -> None:
        """Keep `result`; one that is larger than a bound is not kept there."""
        self._hold(key, result)
        if self.folder is None:
            return
        temporary = self.folder / f".{key}.{secrets.token_hex(8)}.tmp"
        try:
            self._make_folder()
            try:
                temporary.write_bytes(_packed(key, result))
                os.replace(temporary, self.folder / f"{key}.safetensors")
            finally:
                temporary.unlink(missing_ok=True)
            self._trim()
        except (OSError, RunError) as error:
            why = (error.strerror if isinstance(error, OSError) else None) or error
            _note(f"the cache could not be written ({why}); a later edit will compute again what this one did")

    def _make_folder(self) -> None:
        assert self.folder is not None
        if not (self.folder / MARKER).is_file():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)  # latents are pictures: they are nobody else's business
            write_whole(self.folder / MARKER, _MARK.encode())

    @staticmethod
    def _discard(path: Path, stage: str, error: Exception) -> None:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        told = (str(error).splitlines() or [type(error).__name__])[0][:100]
        _note(f"the cache held a damaged result of stage {stage} ({told}); it was removed, and is computed again")

    def _hold(self, key: str, result: Tensor) -> None:
        size = self._size(result)
        if size > self.memory:
            return
        with self._lock:
            if key in self._held:
                self._bytes -= self._size(self._held.pop(key))
            self._held[key] = result
            self._bytes += size
            while self._bytes > self.memory:
                _, old = self._held.popitem(last=False)
                self._bytes -= self._size(old)

    def _trim(self) -> None:
        """Removes the entries read longest ago beyond the bound, and what stopped processes did not finish."""
        assert self.folder is not None
        found = []
        for path in self.folder.iterdir():
            try:
                status = path.lstat()  # another process may be trimming the same folder
            except FileNotFoundError:
                continue
            if not stat.S_ISREG(status.st_mode):
                continue
            if _LEFTOVER.fullmatch(path.name) and time.time() - status.st_mtime > _STALE:
                path.unlink(missing_ok=True)
            elif _ENTRY.fullmatch(path.name):
                found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.disk:
                break
            path.unlink(missing_ok=True)
            total -= size


@dataclass(frozen=True)
class Stage:
    """What is computed for some requests, one result each.

    Attributes:
        name: of the stage.
        members: the requests that need it.
        compute: the result for some of them as one tensor, or a sampler that returns it.
        key_parts: what a request's result depends on, beside the model and the backend: JSON-ready; None is never kept.
        batch_dim: the dimension of what `compute` returns that counts the requests.
        steps: how many steps a sampler takes, for progress.
        shape: of one request's result; a file with another is damaged.
        cost: network evaluations for one request, for progress.
    """

    name: str
    members: list[PreparedRequest]
    compute: Callable[[list[PreparedRequest]], Tensor | Sampler[Tensor]]
    key_parts: Callable[[PreparedRequest], list[Any]] | None = None
    batch_dim: int = 0
    steps: int = 0
    shape: tuple[int, ...] | None = None
    cost: int = 0


class StageRunner:
    """Runs stages of one batch: from the cache what it has, the rest as one batch.

    Args:
        model_key: JSON-ready: the model and the backend, part of every key.
    """

    def __init__(
        self, network: Network, cache: StageCache, profile: Profile, device: torch.device, model_key: list[Any]
    ):
        self.network, self.cache, self.profile, self.device, self.model_key = network, cache, profile, device, model_key

    def run(self, *stages: Stage) -> None:
        """`request.results[stage.name]` for every member of each stage; requests with equal keys are computed once.

        Several stages, which must not depend on each other, go in lock-step and share calls of the network.
        """
        with self.profile.stage(*(s.name for s in stages)):
            missing = [self._look_up(s) for s in stages]
            outputs: dict[str, Tensor] = {}
            samplers: dict[str, Sampler[Tensor]] = {}
            for stage, requests in zip(stages, missing, strict=True):
                if requests:
                    made = stage.compute(requests)
                    if isinstance(made, Tensor):
                        outputs[stage.name] = made
                    else:
                        samplers[stage.name] = made
            outputs |= self.network.run_lockstep(samplers, max(s.steps for s in stages))
            for stage, requests in zip(stages, missing, strict=True):
                if requests:
                    self._keep(stage, requests, outputs[stage.name].transpose(0, stage.batch_dim))

    def _look_up(self, stage: Stage) -> list[PreparedRequest]:
        """The members whose results must be computed, one for each key. The others get theirs from the cache."""
        if stage.key_parts is None:
            return stage.members
        missing: dict[str, PreparedRequest] = {}
        for r in stage.members:
            key = r.keys[stage.name] = key_of(stage.name, self.model_key, *stage.key_parts(r))
            result = self.cache.get(key, stage.name, stage.shape)
            if result is None:
                missing.setdefault(key, r)
            else:
                r.results[stage.name] = result.to(self.device)
        if not missing:
            self.profile.cached.append(stage.name)
        self.profile.expected -= stage.cost * (len(stage.members) - len(missing))
        return list(missing.values())

    def _keep(self, stage: Stage, computed: list[PreparedRequest], values: Tensor) -> None:
        if stage.key_parts is None:
            for r, value in zip(computed, values, strict=True):
                r.results[stage.name] = value
            return
        by_key: dict[str, Tensor] = {}
        for r, value in zip(computed, values, strict=True):
            by_key[r.keys[stage.name]] = value.contiguous().clone()
            self.cache.put(r.keys[stage.name], by_key[r.keys[stage.name]])
        for r in stage.members:
            if r.keys[stage.name] in by_key:
                r.results[stage.name] = by_key[r.keys[stage.name]].to(self.device)


def _own_folder(folder: Path) -> Path:
    """Where the cache of `folder` lies, whether or not it is there yet; see `StageCache` for what is refused."""
    whole = Path(os.path.abspath(folder.expanduser()))
    above = next(p for p in (whole, *whole.parents) if os.path.lexists(p))
    if not above.is_dir():
        raise UsageError(f"cache: {above} is not a folder; name another place for it")
    names = os.listdir(above) if os.access(above, os.R_OK) else []
    weights = sorted(n for n in names if n.endswith(_WEIGHTS) and not _ENTRY.fullmatch(n))
    if "model_index.json" in names or weights:
        holds = "model_index.json" if "model_index.json" in names else weights[0]
        raise UsageError(f"cache: {above} holds {holds}, which looks like a checkpoint's; name a folder of its own")
    own = whole / FOLDER
    if os.path.lexists(own):
        if own.is_symlink() or not own.is_dir() or (os.listdir(own) and not _marked(own / MARKER)):
            raise UsageError(f"cache: {own} was not made by iedit; move it away, or name another folder")
        above = own
    if not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(f"cache: {above} may not be written to; name another folder")
    return own


def _marked(path: Path) -> bool:
    return path.is_file() and path.read_bytes()[:1000].startswith(_MARK.encode())


def _packed(key: str, result: Tensor) -> bytes:
    from safetensors.torch import save

    held = result.detach().cpu().contiguous()
    return save({"value": held}, {"iedit": key, "digest": _content(key, held)})


def _read(path: Path, key: str, shape: Sequence[int] | None) -> Tensor:
    """What `_packed` made.

    Raises:
        FileNotFoundError, OSError, SafetensorError; ValueError: it is something else.
    """
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError("not a file")
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("iedit") != key or list(file.keys()) != ["value"]:
            raise ValueError("it is not what was written")
        value: Tensor = file.get_tensor("value")
    if metadata.get("digest") != _content(key, value):
        raise ValueError("it is not what was written")
    if shape is not None and tuple(value.shape) != tuple(shape):
        raise ValueError(f"its shape is {tuple(value.shape)}, expected {tuple(shape)}")
    if not value.isfinite().all():
        raise ValueError("it holds NaN or infinity")
    return value


def _content(key: str, result: Tensor) -> str:
    return hashlib.sha256(f"{key}value={tensor_digest(result)};".encode()).hexdigest()[:32]


def _note(text: str) -> None:
    running = profile.current()
    if running is not None:
        running.note(text)
