"""The folder of an engine while it is built: beside its place, by one process at a time, and put there whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from ..runtime.backends.engine_spec import (
    BUILD_MARKER,
    EngineSpec,
    build_lock,
    damaged,
    is_build,
    new_build,
    read_spec,
    write_spec,
)
from ..runtime.errors import UsageError


def build_once(
    target: Path,
    fits: Callable[[EngineSpec], bool],
    build: Callable[[Path], EngineSpec],
    tell: Callable[[str], None],
    force: bool,
) -> tuple[EngineSpec, bool]:
    """Build an engine in `target`, unless there is one that fits and is whole.

    Args:
        fits: whether an engine with this spec would do.
        build: writes every file of the engine into the folder that it is given; returns the spec but for its files.
        tell: told where another process is waited for.
        force: build anew even what is there.

    Returns:
        The spec, and whether the engine was there already.
    """
    with build_lock(target, tell):
        there = None if force else _whole_engine(target, fits)
        if there is not None:
            return there, True
        # This process has the lock, so what looks like a build of this engine is one that was killed.
        for stale in target.parent.glob(f".{target.name}.*.building"):
            if is_build(stale):
                shutil.rmtree(stale, ignore_errors=True)
        building = new_build(target)
        try:
            spec = build(building)
            files = [p.name for p in building.iterdir() if p.name != BUILD_MARKER]
            for name in files:
                _sync(building / name)
            spec = write_spec(building, spec, files)
            _replace_folder(building, target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return spec, False


def _whole_engine(folder: Path, fits: Callable[[EngineSpec], bool]) -> EngineSpec | None:
    try:
        spec = read_spec(folder)
    except UsageError:
        return None
    return spec if fits(spec) and not damaged(folder, spec) else None


def _replace_folder(new: Path, target: Path) -> None:
    """Put a finished folder in its place. Whatever stops it, `target` holds a whole engine or is not there."""
    old = target.parent / f".{target.name}.{secrets.token_hex(4)}.building"
    if target.exists():
        os.replace(target, old)
    os.replace(new, target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have the operating system write a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
