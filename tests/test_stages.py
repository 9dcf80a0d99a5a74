"""The stage cache: within its bounds, nobody else's files, and what comes out of it is what was put in."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from iedit.runtime import stage_cache as stages
from iedit.runtime.backends.eager import TorchBackend
from iedit.runtime.editor import Editor, EditRequest, EditResult, MaskOptions, Options
from iedit.runtime.errors import UsageError
from iedit.runtime.stage_cache import FOLDER, MARKER, StageCache, key_of, tensor_digest

KEYS = [key_of("test", i) for i in range(8)]


def result_of(value: float, count: int = 25) -> Tensor:
    return torch.full((count,), float(value))  # 100 bytes


def entries(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / FOLDER).iterdir() if p.name != MARKER)


def run(model: Any, picture: Any, cache: StageCache) -> EditResult:
    options = Options(mask=MaskOptions(seeds=2))
    request = EditRequest(picture(0), "a blue car on grass", "a red car on grass", steps=3, options=options)
    return Editor(model, TorchBackend(model), cache=cache).edit(request)


# --- bounds -----------------------------------------------------------------------------------------------------


def test_memory_is_bounded_and_the_least_recently_used_goes_first() -> None:
    cache = StageCache(memory=300)
    for i in range(3):
        cache.put(str(i), result_of(i))
    assert cache.get("0") is not None  # used last now
    cache.put("3", result_of(3))
    assert cache.get("1") is None
    assert [cache.get(k) is not None for k in "023"] == [True] * 3
    cache.put("large", result_of(9, 76))  # larger than all: not kept, and nothing thrown out for it
    assert cache.get("large") is None
    assert [cache.get(k) is not None for k in "023"] == [True] * 3
    for _ in range(5):
        cache.put("0", result_of(7))  # the same key again takes no more room
    assert [cache.get(k) is not None for k in "023"] == [True] * 3
    found = cache.get("0")
    assert found is not None and torch.equal(found, result_of(7))
    assert StageCache(memory=0).get("0") is None


def test_the_disk_is_bounded_and_what_was_read_longest_ago_goes_first(tmp_path: Path) -> None:
    one = StageCache(memory=0, folder=tmp_path)
    one.put(KEYS[0], result_of(0))
    files = [tmp_path / FOLDER / f"{k}.safetensors" for k in KEYS]
    size = files[0].stat().st_size
    os.utime(files[0], (0, 0))
    cache = StageCache(memory=0, folder=tmp_path, disk=3 * size + 10)
    for i in range(1, 6):
        cache.put(KEYS[i], result_of(i))
        os.utime(files[i], (i, i))  # long ago, in this order
        assert sum(f.stat().st_size for f in files if f.exists()) <= 3 * size + 10
        if i == 4:
            assert cache.get(KEYS[2]) is not None  # read now, so no longer the oldest
    assert [i for i in range(8) if files[i].exists()] == [2, 4, 5]
    assert len(entries(tmp_path)) == 3


# --- other people's files ---------------------------------------------------------------------------------------


def test_files_beside_and_inside_the_cache_that_are_not_its_own_are_never_removed(tmp_path: Path) -> None:
    StageCache(memory=0, folder=tmp_path).put(KEYS[0], result_of(0))
    own = tmp_path / FOLDER
    others = [tmp_path / "thesis.txt", tmp_path / f"{KEYS[1]}.safetensors", own / "my-finetune.safetensors", own / "notes.tmp",
              own / f"{KEYS[2]}.safetensors.bak"]  # fmt: skip
    for path in others:
        path.write_bytes(b"x" * 10_000)
        os.utime(path, (0, 0))
    (own / f"{KEYS[3]}.safetensors").symlink_to(others[0])
    StageCache(memory=0, folder=tmp_path, disk=0).put(KEYS[4], result_of(0))
    assert all(path.read_bytes() == b"x" * 10_000 for path in others)
    assert not (own / f"{KEYS[0]}.safetensors").exists() and not (own / f"{KEYS[4]}.safetensors").exists()


def test_what_a_stopped_process_left_is_cleaned_up_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    cache = StageCache(memory=0, folder=tmp_path)
    cache.put(KEYS[0], result_of(0))
    old, new = (tmp_path / FOLDER / f".{KEYS[i]}.0123456789abcdef.tmp" for i in (1, 2))
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    cache.put(KEYS[3], result_of(3))
    assert not old.exists() and new.exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [("model_index.json", "looks like a checkpoint's"), ("my-finetune.safetensors", "looks like a checkpoint's"),
     ("pytorch_model.bin", "looks like a checkpoint's")],
)  # fmt: skip
def test_a_folder_with_a_checkpoint_is_refused_and_so_is_a_new_one_in_it(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"{}")
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(UsageError, match=says):
            StageCache(folder=folder)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_folder_of_the_cache_s_name_that_is_not_the_cache_s_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a" / FOLDER).mkdir(parents=True)
    (tmp_path / "a" / FOLDER / "thesis.txt").touch()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / FOLDER).symlink_to(tmp_path / "a")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / FOLDER).touch()
    for folder in "abc":
        with pytest.raises(UsageError, match="was not made by iedit"):
            StageCache(folder=tmp_path / folder)
    with pytest.raises(UsageError, match="is not a folder"):
        StageCache(folder=tmp_path / "c" / FOLDER / "deeper")


def test_nothing_is_made_before_there_is_something_to_keep(tmp_path: Path) -> None:
    cache = StageCache(folder=tmp_path / "kept")
    assert cache.get(KEYS[0]) is None
    assert list(tmp_path.iterdir()) == []
    cache.put(KEYS[0], result_of(1))
    assert (tmp_path / "kept" / FOLDER / MARKER).read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")
    if os.name == "posix":
        assert (tmp_path / "kept" / FOLDER).stat().st_mode & 0o077 == 0


# --- what comes out ---------------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10  # of a float near the end: still a safetensors file, still finite
    path.write_bytes(data)


def _becomes_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _becomes_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _resave(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], sign: bool = True) -> None:
    """With other content; signed as the cache would, or with the old signature."""
    header = json.loads(path.read_bytes()[8 : 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]])
    told, held = header["__metadata__"], change(load_file(path))
    save_file(
        held, path, told | {"digest": stages._content(told["iedit"], next(iter(held.values())))} if sign else None
    )


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "empty": lambda p: p.write_bytes(b""),
    "no safetensors": lambda p: p.write_bytes(b"not safetensors"),
    "a huge header": lambda p: p.write_bytes(b"\xff" * 64),
    "cut off": lambda p: p.write_bytes(p.read_bytes()[:-4]),
    "a flipped bit": _flip,
    "no signature": lambda p: _resave(p, lambda held: held, sign=False),
    "foreign keys": lambda p: _resave(p, lambda held: {"weight": held["value"]}),
    "NaN": lambda p: _resave(p, lambda held: {"value": held["value"] * float("nan")}),
    "another shape": lambda p: _resave(p, lambda held: {"value": held["value"].flatten()}),
    "a folder": _becomes_a_folder,
    "a pipe": _becomes_a_pipe,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_computed_again_with_a_note(tiny: Any, picture: Any, tmp_path: Path, damage: str) -> None:
    first = run(tiny, picture, StageCache(folder=tmp_path))
    kept = entries(tmp_path)
    assert len(kept) == 5
    for name in kept:
        DAMAGE[damage](tmp_path / FOLDER / name)
    again = run(tiny, picture, StageCache(folder=tmp_path))
    assert again.profile.cached == []
    assert torch.equal(again.latent, first.latent)
    noted = [n for n in again.profile.notes if "the cache held a damaged result of stage" in n]
    assert {n.split("stage ")[1].split(" (")[0] for n in noted} == {
        "encode",
        "mask",
        "invert",
        "guidance",
        "invert-guidance",
    }
    if damage != "a folder":  # which is not the cache's to remove
        assert run(tiny, picture, StageCache(folder=tmp_path)).profile.evaluations["invert"] == 0


def test_an_entry_under_another_s_key_is_damaged(tmp_path: Path) -> None:
    StageCache(memory=0, folder=tmp_path).put(KEYS[0], result_of(1))
    os.rename(tmp_path / FOLDER / f"{KEYS[0]}.safetensors", tmp_path / FOLDER / f"{KEYS[1]}.safetensors")
    assert StageCache(memory=0, folder=tmp_path).get(KEYS[1]) is None
    assert entries(tmp_path) == []


@pytest.mark.parametrize("where", ["replace", "mkdir"])
def test_a_full_disk_is_a_note_and_the_edit_is_whole(
    tiny: Any, picture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    fresh = run(tiny, picture, StageCache())

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, where, full)
    result = run(tiny, picture, StageCache(folder=tmp_path / "kept"))
    assert torch.equal(result.latent, fresh.latent)
    (note,) = [n for n in result.profile.notes if "cache" in n]
    assert "could not be written (No space left on device)" in note
    if where == "replace":
        assert entries(tmp_path / "kept") == []


def test_a_note_needs_no_running_profile(tmp_path: Path) -> None:
    cache = StageCache(memory=0, folder=tmp_path)
    cache.put(KEYS[0], result_of(0))
    _flip(tmp_path / FOLDER / f"{KEYS[0]}.safetensors")
    assert cache.get(KEYS[0]) is None


def test_keys_tell_stages_and_parts_apart() -> None:
    keys = [
        key_of("a"),
        key_of("b"),
        key_of("a", 1),
        key_of("a", 1.5),
        key_of("a", "1"),
        key_of("a", [1]),
        key_of("a", None),
    ]
    assert len(set(keys)) == len(keys)
    assert key_of("a", {"x": 1, "y": 2}) == key_of("a", {"y": 2, "x": 1})
    x = torch.zeros(2, 3)
    assert len({tensor_digest(v) for v in (x, x.view(3, 2), x.int(), x + 1)}) == 4
    assert tensor_digest(torch.arange(6.0).view(2, 3).T) == tensor_digest(torch.arange(6.0).view(2, 3).T.contiguous())
