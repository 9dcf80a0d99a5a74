"""Files in and out: what may be read, what may be written over, whole or not at all; and what is believed of what others wrote.

Receipts inside pictures, specs of engines and configs of checkpoints come from anywhere. They are parsed here, and nothing
of them is used before it has the declared type and lies within the declared bounds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import secrets
import stat
import time
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import RunError, UsageError

_READER_WAIT = 5.0  # seconds that somebody has to open the other end of a pipe
# A process's own open files by name: what is behind them is written to, never replaced.
_OWN_STREAMS = ("/dev/stdin", "/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/self/fd/")

MAX_JSON = 1 << 20  # characters
MAX_DEPTH = 12
MAX_TEXT = 10_000  # characters of a string without a bound of its own
MAX_ENTRIES = 10_000  # of a list or an object


# --- reading and writing ------------------------------------------------------------------------------------------


def check_regular(path: str | os.PathLike[str], expected: str = "a file") -> None:
    """Only a regular file is opened: a pipe would wait for its writer, a device has no end.

    Raises:
        UsageError: there is none, or it is a folder, a pipe, a socket or a device; which is said.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path}: there is no such file; check the path") from None
    except PermissionError:
        raise UsageError(f"{path}: it may not be read; check its permissions") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be opened ({_reason(error)}); check the path") from None
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path}: this is {_kind_of_file(mode)}, expected {expected}")


def check_outputs(
    pictures: Sequence[Path], others: Sequence[Path], inputs: Iterable[str | os.PathLike[str]], overwrite: bool
) -> None:
    """Refuse output names before minutes of work, not after.

    Args:
        pictures: outputs that are PNGs.
        others: outputs of any name.
        inputs: files that the command reads; of a folder (a checkpoint's) all that is in it but pictures.
        overwrite: files that exist may be replaced, inputs never.

    Raises:
        UsageError: not a PNG's name, in a folder that is missing or may not be written to, a folder or a socket itself, an
            input of this command, another of its outputs, or a file that exists.
    """
    read = [Path(i) for i in inputs]
    taken: dict[str, Path] = {}
    for target in (*pictures, *others):
        if target in pictures and target.suffix.lower() != ".png":
            raise UsageError(f"{target}: the output is a PNG; give a name that ends in .png")
        mode = _mode(target)
        if mode is not None and _is_stream(target, mode):
            continue
        place = os.path.realpath(target)
        if target in pictures and not place.lower().endswith(".png"):
            raise UsageError(f"{target}: this is a link to {place}, and the output is a PNG; choose another name")
        folder = Path(place).parent
        if not folder.is_dir():
            raise UsageError(f"{target}: the folder {target.parent} does not exist; make it first")
        if mode is not None and not stat.S_ISREG(mode):
            raise UsageError(f"{target}: this is {_kind_of_file(mode)}, expected a file name")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UsageError(f"{target}: the folder {target.parent} may not be written to; choose another")
        for source in read:
            if _is_part_of(target, place, source):
                raise UsageError(f"{target}: would overwrite {source}, which this command reads; choose another name")
        if place in taken:
            raise UsageError(f"{target}: would overwrite another output of this command, {taken[place]}")
        if mode is not None and not overwrite:
            raise UsageError(
                f"{target}: there is such a file already; choose another name, or replace it with --overwrite"
            )
        taken[place] = target


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all; see `open_whole`. To a character device or a pipe (`/dev/null`, `/dev/stdout`, a FIFO) the
    bytes are written.

    Raises:
        UsageError: the folder does not exist, or the path is a folder, a socket or a block device; RunError: the system
            refused (full, read-only), or nobody reads the pipe.
    """
    mode = _mode(path)
    if mode is not None and _is_stream(path, mode):
        try:
            _write_stream(path, data)
        except OSError as error:
            raise _not_written(path, error) from error
        return
    with open_whole(path) as file:
        file.write(data)


@contextlib.contextmanager
def open_whole(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file that is written to in the block, and is there whole after it or not at all: a temporary file in the same folder, fsync, rename.

    Whatever interrupts the block (Ctrl-C included), `path` holds what it held before, and the temporary file is gone. Only
    regular files are replaced.

    Raises:
        UsageError: the folder does not exist, or the path is anything but a file; RunError: the system refused (full, read-only).
    """
    mode = _mode(path)
    if mode is not None and not stat.S_ISREG(mode):
        raise UsageError(f"{path}: this is {_kind_of_file(mode)}, expected a file name")
    target = Path(os.path.realpath(path))  # through a link: replace what it points at, not the link
    if not target.parent.is_dir():
        raise UsageError(f"{path}: the folder {target.parent} does not exist; make it first")
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}.tmp")
    try:
        # Not tempfile: its files are private (0600), an output should follow the umask.
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        # A write's error names no file; one that does is of another file that the block had to do with.
        if isinstance(error, OSError) and error.filename in (None, temporary, str(temporary)):
            raise _not_written(path, error) from error
        raise


def _not_written(path: str | os.PathLike[str], error: OSError) -> RunError:
    return RunError(f"{path}: could not be written ({_reason(error)}); nothing was left behind")


def share_weights(part: Path) -> None:
    """Let the weights in a part's folder be read by whom its config.json may, which follows the umask; safetensors makes its files private (0600)."""
    mode = stat.S_IMODE((part / "config.json").stat().st_mode)
    for path in part.glob("*.safetensors"):
        path.chmod(mode)


def write_outputs(outputs: Mapping[Path, bytes]) -> None:
    """Write the files of a command, each whole or not at all; one that fails does not keep the others from being written.

    Raises:
        RunError: some could not be written; one line that says which, why, and which were.
    """
    failed: dict[Path, str] = {}
    for path, data in outputs.items():
        try:
            write_whole(path, data)
        except (RunError, UsageError) as error:
            failed[path] = str(error).split(": ", 1)[-1].removesuffix("; nothing was left behind")
    if failed:
        written = ", ".join(str(p) for p in outputs if p not in failed)
        why = "; ".join(f"{p}: {reason}" for p, reason in failed.items())
        raise RunError(f"{why}; {f'written: {written}' if written else 'nothing was written'}")


def _write_stream(path: str | os.PathLike[str], data: bytes) -> None:
    """Write into a pipe or a device, which stays what it is; raises OSError where nobody opens the other end in time."""
    end = time.monotonic() + _READER_WAIT
    while True:
        try:  # not blocking: a pipe without a reader would wait for one without end
            handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_APPEND)
            break
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() > end:
                raise
            time.sleep(0.05)
    os.set_blocking(handle, True)
    with os.fdopen(handle, "wb") as file:
        file.write(data)


def _mode(path: str | os.PathLike[str]) -> int | None:
    """The mode of what a path leads to, through links; None where there is nothing.

    Raises:
        UsageError: a name that no file can have: links in a circle, too long, a zero byte.
    """
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        raise UsageError(f"{path}: the folder {Path(path).parent} may not be looked into; choose another") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be a file's name ({_reason(error)}); choose another") from None


def _is_stream(path: str | os.PathLike[str], mode: int) -> bool:
    """Whether bytes are written into what is there, in place of replacing it."""
    if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
        return True
    name = os.path.abspath(path)
    return any(name == own or (own.endswith("/") and name.startswith(own)) for own in _OWN_STREAMS) and stat.S_ISREG(
        mode
    )


def _is_part_of(target: Path, place: str, source: Path) -> bool:
    """Whether a target is the file `source`, also by another name, or a file of the folder `source` that is no picture."""
    real = os.path.realpath(source)
    if os.path.isdir(real):
        return os.path.isfile(place) and place.startswith(real + os.sep) and target.suffix.lower() != ".png"
    if place == real:
        return True
    with contextlib.suppress(OSError):
        return os.path.samefile(place, real)
    return False


def _kind_of_file(mode: int) -> str:
    for test, name in ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
                       (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a block device")):  # fmt: skip
        if test(mode):
            return name
    return "a file" if stat.S_ISREG(mode) else "something special"


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


# --- what others wrote --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included; for `Annotated[int, Range(1, 1000)]`."""

    low: float
    high: float


@dataclass(frozen=True)
class Match:
    """A regular expression that the whole text must match, and what that is in words; for `Annotated[str, Match(...)]`."""

    pattern: str
    words: str


def parse_json(text: str | bytes, longest: int = MAX_JSON) -> Any:
    """JSON of at most `longest` characters, nested at most `MAX_DEPTH` deep.

    Raises:
        ValueError: it is no JSON, too long or too deep; in a few words.
    """
    if len(text) > longest:
        raise ValueError(f"{len(text)} characters of JSON, the limit is {longest}")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    level, depth = [v for v in [value] if isinstance(v, (dict, list))], 1
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        inside = (v for container in level for v in (container.values() if isinstance(container, dict) else container))
        level, depth = [v for v in inside if isinstance(v, (dict, list))], depth + 1
    return value


def printable(text: str) -> str:
    """Text with its control characters, terminal escapes and direction marks written out as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def typed(declared: Any, value: Any, where: str) -> Any:
    """A value out of JSON as the declared type: dataclasses are built, every field of them has to be there, and no other.

    Args:
        declared: bool, int, float, str, None, Any, unions, tuples, mappings with names as keys, dataclasses, and
            `Annotated` with a `Range` or a `Match`. Numbers are finite. Without a bound of its own a text has at most
            `MAX_TEXT` characters; lists and objects have at most `MAX_ENTRIES` entries.
        where: name of the value, for messages.

    Raises:
        ValueError: it is something else; the field, what came and what was expected.
    """
    origin, args = typing.get_origin(declared), typing.get_args(declared)
    if origin is typing.Annotated:
        inner = typed(args[0], value, where)
        for bound in args[1:]:
            _check_bound(bound, inner, where)
        return inner
    if declared is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for one in args:
            if (value is None) == (one is type(None)):
                return typed(one, value, where)
        raise ValueError(f"{where} is {_short(value)}, which it cannot be")
    if declared is type(None) or declared is None:
        return _expect(value is None, value, where, "null")
    if declared is bool:
        return _expect(isinstance(value, bool), value, where, "true or false")
    if declared is int:
        return _expect(isinstance(value, int) and not isinstance(value, bool), value, where, "a whole number")
    if declared is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        _expect(number and abs(value) < 1e300 and math.isfinite(value), value, where, "a finite number")
        return float(value)
    if declared is str:
        return _expect(
            isinstance(value, str) and len(value) <= MAX_TEXT, value, where, f"a text of at most {MAX_TEXT} characters"
        )
    if dataclasses.is_dataclass(declared):
        return _dataclass(declared, value, where)
    if origin is tuple:
        _expect(isinstance(value, (list, tuple)) and len(value) <= MAX_ENTRIES, value, where, "a list")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(typed(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        _expect(len(value) == len(args), value, where, f"{len(args)} values")
        return tuple(typed(one, v, f"{where}[{i}]") for i, (one, v) in enumerate(zip(args, value, strict=True)))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        _expect(isinstance(value, dict) and len(value) <= MAX_ENTRIES, value, where, "an object")
        return {
            typed(args[0], k, f"a name in {where}"): typed(args[1], v, f"{where}.{k[:60]}") for k, v in value.items()
        }
    raise TypeError(f"typed: {declared} of {where} is not known here")


def _dataclass(declared: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), value, where, "an object")
    hints = typing.get_type_hints(declared, include_extras=True)
    fields = [f.name for f in dataclasses.fields(declared) if f.init]
    prefix = f"{where}." if where else ""
    for name in sorted(set(value) - set(fields)):
        raise ValueError(f"{prefix}{_short(name)} is unknown")
    for name in fields:
        if name not in value:
            raise ValueError(f"{prefix}{name} is missing")
    return declared(**{name: typed(hints[name], value[name], f"{prefix}{name}") for name in fields})


def _check_bound(bound: Any, value: Any, where: str) -> None:
    if isinstance(bound, Range):
        _expect(bound.low <= value <= bound.high, value, where, f"{bound.low:g} to {bound.high:g}")
    elif isinstance(bound, Match):
        _expect(re.fullmatch(bound.pattern, value) is not None, value, where, bound.words)


def _expect(fine: bool, value: Any, where: str, wanted: str) -> Any:
    if not fine:
        raise ValueError(f"{where or 'it'} is {_short(value)}, expected {wanted}")
    return value


def _short(value: Any) -> str:
    """What came, in a few safe characters."""
    if isinstance(value, (dict, list, tuple)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    shown = printable(repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number")
    return shown if len(shown) <= 60 else shown[:57] + "..."
