"""What is written is whole or not there and replaces only what it may; values out of JSON have the declared type and bounds."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest

from iedit.runtime import files
from iedit.runtime.errors import RunError, UsageError
from iedit.runtime.files import MAX_DEPTH, Match, Range, parse_json, printable, typed

# --- one file -----------------------------------------------------------------------------------------------------


def test_a_folder_that_is_missing_or_in_the_way_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the folder .*gone does not exist"):
        files.write_whole(tmp_path / "gone" / "a.json", b"{}")
    with pytest.raises(UsageError, match=r"this is a folder"):
        files.write_whole(tmp_path, b"{}")


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(3), OSError(28, "No space left on device")])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_whatever_interrupts_a_write_leaves_the_old_file_and_nothing_else(
    where: str, stop: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise stop

    (tmp_path / "out.json").write_bytes(b"old")
    with monkeypatch.context() as patched:
        patched.setattr(os, where, refuse)
        with pytest.raises(RunError if isinstance(stop, OSError) else type(stop)) as caught:
            files.write_whole(tmp_path / "out.json", b"new")
    if isinstance(stop, OSError):
        assert "No space left on device" in str(caught.value)
    assert os.listdir(tmp_path) == ["out.json"]
    assert (tmp_path / "out.json").read_bytes() == b"old"
    files.write_whole(tmp_path / "out.json", b"new")
    assert (tmp_path / "out.json").read_bytes() == b"new"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_process_leaves_the_old_file(tmp_path: Path, root: Path) -> None:
    (tmp_path / "out.json").write_bytes(b"old")
    code = (
        f"import os, signal, sys; sys.path.insert(0, {str(root / '.types')!r})\n"
        "from iedit.runtime import files\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.write_whole(sys.argv[1], b'n' * 1000)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out.json")], timeout=120)
    assert ran.returncode == -signal.SIGKILL
    assert (tmp_path / "out.json").read_bytes() == b"old"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions and links")
def test_weights_may_be_read_by_whom_their_config_may(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "config.json").chmod(0o640)
    (tmp_path / "a.safetensors").touch(0o600)
    files.share_weights(tmp_path)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


def test_an_output_follows_the_umask_and_a_link(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_whole(tmp_path / "a", b"1")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    (tmp_path / "link").symlink_to(tmp_path / "a")
    files.write_whole(tmp_path / "link", b"2")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a").read_bytes() == b"2"


@pytest.mark.skipif(sys.platform == "win32", reason="no such devices")
def test_bytes_for_a_device_or_a_pipe_go_into_it_and_it_stays_what_it_is(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    files.write_whole(pipe, b"x" * 100_000)
    reader.join(10)
    assert got == [b"x" * 100_000]
    assert pipe.is_fifo()
    (tmp_path / "null").symlink_to("/dev/null")
    files.write_whole(tmp_path / "null", b"gone")
    assert Path("/dev/null").is_char_device()
    assert sorted(os.listdir(tmp_path)) == ["null", "pipe"]


@pytest.mark.skipif(sys.platform == "win32", reason="no such devices")
def test_a_pipe_that_nobody_reads_and_a_socket_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_READER_WAIT", 0.1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RunError, match=r"pipe: could not be written"):
        files.write_whole(tmp_path / "pipe", b"x")
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(tmp_path)  # a socket's name may have 108 characters
        listening.bind("socket.png")
        with pytest.raises(UsageError, match=r"socket\.png: this is a socket"):
            files.write_whole("socket.png", b"x")
        with pytest.raises(UsageError, match=r"socket\.png: this is a socket"):
            files.check_outputs([Path("socket.png")], [], [], overwrite=True)


@pytest.mark.skipif(sys.platform == "win32", reason="no /dev/stdout")
def test_standard_output_by_its_name_is_written_to_and_not_replaced(tmp_path: Path, root: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(root / '.types')!r})\n"
        "from iedit.runtime.files import write_whole\n"
        "print('before', flush=True); write_whole('/dev/stdout', b'it\\n'); print('after')\n"
    )
    with (tmp_path / "log").open("a") as log:
        subprocess.run([sys.executable, "-c", code], stdout=log, timeout=120, check=True)
    assert (tmp_path / "log").read_text() == "before\nit\nafter\n"


# --- the outputs of a command -------------------------------------------------------------------------------------


def test_an_input_is_never_an_output_by_whatever_name(tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"photo")
    (tmp_path / "link.png").symlink_to(photo)
    os.link(photo, tmp_path / "hard.png")
    (tmp_path / "sub").mkdir()
    for name in ("photo.png", "link.png", "hard.png", "sub/../photo.png"):
        with pytest.raises(UsageError, match=r"would overwrite .*photo\.png, which this command reads"):
            files.check_outputs([tmp_path / name], [], [photo], overwrite=True)


def test_the_files_of_a_checkpoint_are_inputs_and_pictures_beside_them_are_not(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    (tmp_path / "old.png").write_bytes(b"")
    with pytest.raises(UsageError, match="which this command reads"):
        files.check_outputs([], [tmp_path / "unet" / "config.json"], [tmp_path], overwrite=True)
    files.check_outputs([tmp_path / "old.png"], [tmp_path / "new.json"], [tmp_path], overwrite=True)


def test_a_file_that_exists_is_refused_without_overwrite(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "p.json").write_bytes(b"")
    for pictures, others in (([tmp_path / "a.png"], []), ([], [tmp_path / "p.json"])):
        with pytest.raises(UsageError, match="replace it with --overwrite"):
            files.check_outputs(pictures, others, [], overwrite=False)
        files.check_outputs(pictures, others, [], overwrite=True)
    files.check_outputs([tmp_path / "b.png"], [Path(os.devnull)], [], overwrite=False)
    (tmp_path / "link.png").symlink_to(tmp_path / "p.json")
    with pytest.raises(UsageError, match=r"link\.png: this is a link to .*p\.json, and the output is a PNG"):
        files.check_outputs([tmp_path / "link.png"], [], [], overwrite=True)


@pytest.mark.skipif(sys.platform == "win32", reason="links")
@pytest.mark.parametrize(
    ("name", "says"),
    [("loop.png", "cannot be a file's name"), ("x" * 300 + ".png", "cannot be a file's name"), ("a\0b.png", "cannot be a file's name"),
     ("gone/a.png", "the folder .* does not exist"), ("file.txt/a.png", "the folder .* does not exist"), (".png", "give a name that ends")],
)  # fmt: skip
def test_a_name_that_no_output_can_have_is_refused_before_the_work(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "file.txt").touch()
    with pytest.raises(UsageError, match=says):
        files.check_outputs([tmp_path / name], [], [], overwrite=False)


def test_a_full_disk_is_one_line_that_says_what_was_written_and_what_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, calls = os.fsync, []

    def full_at_the_second(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full_at_the_second)
    monkeypatch.chdir(tmp_path)
    outputs = {Path(name): name.encode() for name in ("a.png", "b.png", "p.json")}
    with pytest.raises(RunError) as caught:
        files.write_outputs(outputs)
    assert str(caught.value) == "b.png: could not be written (No space left on device); written: a.png, p.json"
    assert sorted(os.listdir()) == ["a.png", "p.json"]
    with pytest.raises(RunError, match=r"; nothing was written$"):
        calls[:] = [0]
        files.write_outputs({Path("c.png"): b""})


# --- what others wrote --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    size: tuple[int, int]
    name: Annotated[str, Match("[a-z]+", "small letters")]


@dataclass(frozen=True)
class Outer:
    count: Annotated[int, Range(1, 9)]
    share: float | None
    inner: Inner
    pairs: tuple[tuple[str, float], ...]
    files: Mapping[str, str]
    yes: bool = False
    made: int = field(default=3, init=False)


GOOD: dict[str, Any] = {"count": 2, "share": 1, "inner": {"size": [1, 2], "name": "abc"}, "pairs": [["a", 0.5]],
                        "files": {"x": "y"}, "yes": True}  # fmt: skip


def test_a_value_comes_back_as_the_declared_type() -> None:
    assert typed(Outer, json.loads(json.dumps(GOOD)), "") == Outer(
        2, 1.0, Inner((1, 2), "abc"), (("a", 0.5),), {"x": "y"}, True
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"count": 0}, "count is 0, expected 1 to 9"),
        ({"count": True}, "count is True, expected a whole number"),
        ({"count": 1.0}, "count is 1.0, expected a whole number"),
        ({"count": 10**4000}, "count is a huge number, expected 1 to 9"),
        ({"share": float("nan")}, "share is nan, expected a finite number"),
        ({"share": 10**400}, "share is a huge number, expected a finite number"),
        ({"share": "1"}, "share is '1', expected a finite number"),
        ({"share": [1]}, "share is a list of 1, expected a finite number"),
        ({"inner": None}, "inner is None, expected an object"),
        ({"inner": {"size": [1], "name": "a"}}, "inner.size is a list of 1, expected 2 values"),
        ({"inner": {"size": [1, 2], "name": "a\x1b[31m"}}, r"inner.name is 'a\x1b[31m', expected small letters"),
        ({"inner": {"size": [1, 2]}}, "inner.name is missing"),
        ({"pairs": [["a"]]}, "pairs[0] is a list of 1, expected 2 values"),
        ({"files": {"x": 1}}, "files.x is 1, expected a text of at most 10000 characters"),
        ({"files": {"x": "y" * 20_000}}, "expected a text of at most 10000 characters"),
        ({"pairs": [["a", 1]] * 20_000}, "pairs is a list of 20000, expected a list"),
        ({"sparkle": 1}, "'sparkle' is unknown"),
        ({"made": 1}, "'made' is unknown"),
    ],
)
def test_anything_else_is_refused_by_the_field(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        typed(Outer, GOOD | change, "")
    assert says in str(caught.value)
    assert len(str(caught.value)) < 200 and str(caught.value).isprintable()


def test_json_that_is_too_deep_too_long_or_none_is_refused() -> None:
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    for text in (
        "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
        "[" * 200_000,
        '{"a":' * 100_000,
        "1" * 2_000_000,
        "{",
        "1" * 5000,
    ):
        with pytest.raises(ValueError):
            parse_json(text)


def test_what_is_printed_cannot_drive_a_terminal() -> None:
    hostile = "a\x1b]0;owned\x07\r\n\x9b31m\u202e\u2066\x00\udce9"
    shown = printable(hostile)
    assert shown.isprintable() and shown.startswith(r"a\x1b]0;owned\x07\r\n\x9b31m\u202e")
    assert printable("grünes Auto 緑 🚗") == "grünes Auto 緑 🚗"
