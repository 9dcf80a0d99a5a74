"""Stage results by content: what was computed once for an image is not computed again (invert once, edit many).

A key is the digest of everything that the stage's result depends on: picture, texts, model, schedule and the options that
matter to that stage. Results live in memory up to a bound, the least recently used going first; on request they are also
kept on disk, within a bound of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from torch import Tensor

Result = dict[str, Tensor]


def key_of(stage: str, *parts: Any) -> str:
    """32 hex digits of a stage and JSON-ready parts."""
    text = json.dumps([stage, *parts], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def tensor_digest(value: Tensor) -> str:
    """32 hex digits of a tensor's shape, dtype and content."""
    array = value.detach().cpu().contiguous()
    head = f"{tuple(array.shape)}{array.dtype}".encode()
    return hashlib.sha256(head + array.view(-1).numpy().tobytes()).hexdigest()[:32]


class StageCache:
    """Results by key. Safe to use from several threads.

    Args:
        memory: bound in bytes; 0 keeps nothing in memory.
        folder: also keep results as safetensors files there.
        disk: bound of the folder in bytes; the files read longest ago are removed first.
    """

    def __init__(self, memory: int = 512 << 20, folder: Path | None = None, disk: int = 4 << 30):
        self.memory, self.folder, self.disk = memory, folder, disk
        self._held: OrderedDict[str, Result] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @staticmethod
    def _size(result: Result) -> int:
        return sum(t.numel() * t.element_size() for t in result.values())

    def get(self, key: str) -> Result | None:
        """The result of `key`, or None. A file that cannot be read counts as absent and is removed."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        if self.folder is None:
            return None
        path = self.folder / f"{key}.safetensors"
        if not path.exists():
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            result = load_file(path)
            os.utime(path)
        except (SafetensorError, OSError):
            path.unlink(missing_ok=True)
            return None
        self._hold(key, result)
        return result

    def put(self, key: str, result: Result) -> None:
        """Keep `result`; a result larger than the bound is not kept."""
        self._hold(key, result)
        if self.folder is not None:
            from safetensors.torch import save_file

            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f".{key}.{os.getpid()}.{threading.get_ident()}.tmp"
            try:
                save_file({k: v.detach().cpu().contiguous() for k, v in result.items()}, temporary)
                os.replace(temporary, self.folder / f"{key}.safetensors")
            finally:
                temporary.unlink(missing_ok=True)
            self._trim()

    def _hold(self, key: str, result: Result) -> None:
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
        assert self.folder is not None
        files = []
        for path in self.folder.glob("*.safetensors"):
            try:
                stat = path.stat()
            except FileNotFoundError:  # another process trims the same folder
                continue
            files.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.disk:
                break
            path.unlink(missing_ok=True)
            total -= size
