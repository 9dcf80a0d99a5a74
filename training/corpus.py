"""A corpus of captioned pictures, in shards: what iEdit's pairs are built from (iEdit section 3.1).

Three kinds of corpora are read: a folder of pictures with a `.txt` beside each or one CSV for all of them; Parquet files with pictures or
their paths in a column; and tar shards as img2dataset writes them in webdataset's format (`000000012.jpg`, `.txt`, `.json`).

A picture may bring masks of what it shows, each a PNG of the picture's size in which white is inside: NAME.LABEL.mask.png beside the
picture NAME.png, or such a member of its sample in a tar. The label is the words that say what it is, joined by hyphens: `car`, `red-car`.

Shards are the unit of work: the same corpus has the same shards in the same order on every machine. A picture that cannot be used is no
error: it is skipped with its reason.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from ..runtime.errors import UsageError
from ..runtime.images import as_rgb, check_size

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SHARD = 1000  # samples of a folder, a CSV or a Parquet file; a tar is one shard
MIN_SIDE = 64  # pixels; a smaller picture shows too little
MASK = ".mask.png"  # how the names of masks end
_PATH_COLUMNS = ("file", "filename", "file_name", "path", "image_path", "image")
_CAPTION_COLUMNS = ("caption", "text", "prompt")
_BYTES_COLUMNS = ("jpg", "png", "webp", "image", "image_bytes", "bytes")


@dataclass(frozen=True)
class Sample:
    """One picture with its caption.

    Attributes:
        key: its name in the corpus, the same on every machine.
        image: RGB.
        caption: the corpus' own, stripped; "" if it has none.
        data: the picture's bytes, as the corpus holds them.
        masks: label -> the bytes of a mask that the corpus brings.
    """

    key: str
    image: Image.Image
    caption: str
    data: bytes
    masks: Mapping[str, bytes]


@dataclass(frozen=True)
class Skipped:
    """A sample that cannot be used, and why."""

    key: str
    reason: str


class Raw(NamedTuple):
    """A sample before its picture is decoded."""

    key: str
    data: bytes
    caption: str
    masks: Mapping[str, bytes]


@dataclass(frozen=True)
class Shard:
    """A part of a corpus. Its samples are read when they are iterated over, one at a time.

    Attributes:
        name: unique in the corpus, fit for a file name.
        size: how many samples it has; of a tar, about how many.
        read: yields each as a `Raw` or a `Skipped`.
    """

    name: str
    size: int
    read: Callable[[], Iterator[Raw | Skipped]]

    def __iter__(self) -> Iterator[Sample | Skipped]:
        for one in self.read():
            if isinstance(one, Skipped):
                yield one
                continue
            try:
                image = decode(one.data)
            except UsageError as error:
                yield Skipped(one.key, str(error))
                continue
            yield Sample(one.key, image, " ".join(one.caption.split()), one.data, one.masks)


def decode(data: bytes) -> Image.Image:
    """A picture's bytes as RGB, upright.

    Raises:
        UsageError: it is no picture, is cut off, or is too small or too large; without a name, which the caller knows.
    """
    from PIL import ImageOps

    try:
        file = Image.open(io.BytesIO(data))
        check_size(file, "picture")
        file.load()
        image = as_rgb(ImageOps.exif_transpose(file), "picture")
    except UsageError:
        raise
    except UnidentifiedImageError:  # its message holds an address in memory, another one each time
        raise UsageError("not a picture that can be read (of no known format)") from None
    except Exception as error:  # Pillow's plugins raise what they like on damaged files
        raise UsageError(
            f"not a picture that can be read ({(str(error).splitlines() or [type(error).__name__])[0][:120]})"
        ) from error
    if min(image.size) < MIN_SIDE:
        raise UsageError(f"picture is {image.width}x{image.height}, smaller than {MIN_SIDE} pixels")
    return image


def open_corpus(path: Path, shard: int = SHARD) -> list[Shard]:
    """The shards of a corpus: a folder, a CSV, a Parquet file or a tar.

    Args:
        shard: samples in one, where the corpus is not in shards already.

    Raises:
        UsageError: there is nothing there, or nothing that could be read as a corpus; what was looked for is named.
    """
    if not path.exists():
        raise UsageError(f"corpus: {path} is not there; name a folder of pictures, a CSV, Parquet files or tar shards")
    if path.is_file():
        shards = _of_file(path, shard)
    else:
        names = sorted(os.listdir(path))
        tars, tables = ([path / n for n in names if n.lower().endswith(end)] for end in (".tar", ".parquet"))
        lists = [path / n for n in names if n.lower().endswith(".csv")]
        if tars:
            shards = [
                one for file in tars for one in _of_file(file, shard)
            ]  # img2dataset puts a Parquet of metadata beside each
        elif tables:
            shards = [one for file in tables for one in _of_file(file, shard)]
        elif len(lists) == 1:
            shards = _of_file(lists[0], shard)
        elif lists:
            raise UsageError(f"corpus: {path} holds {len(lists)} CSV files; name the one to read")
        else:
            shards = _of_folder(path, shard)
    if not shards:
        raise UsageError(f"corpus: {path} holds no pictures ({', '.join(PICTURES)}), Parquet files or tar shards")
    return shards


def _of_file(path: Path, shard: int) -> list[Shard]:
    kinds = {".tar": _of_tar, ".parquet": _of_parquet, ".csv": _of_csv}
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise UsageError(f"corpus: {path} is none of {', '.join(kinds)}; name one of these, or a folder")
    return kind(path, shard)


def _cut(stem: str, items: Sequence[Any], size: int, read: Callable[[Sequence[Any]], Iterator[Any]]) -> list[Shard]:
    """Shards of `size` items each."""
    made = []
    for number, start in enumerate(range(0, len(items), size)):
        some = items[start : start + size]
        made.append(Shard(f"{stem}-{number:05d}", len(some), lambda some=some: read(some)))  # type: ignore[misc]
    return made


def fingerprint(path: Path) -> str:
    """Which corpus it is, without reading it: sha256 over the names and sizes of its files, 64 hex digits."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    whole = hashlib.sha256()
    for file in files:
        name = file.relative_to(path).as_posix() if file != path else file.name
        whole.update(f"{name!a} {file.stat().st_size}\n".encode())
    return whole.hexdigest()


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


def _of_folder(folder: Path, size: int) -> list[Shard]:
    pictures = sorted(
        (p for p in folder.rglob("*") if p.suffix.lower() in PICTURES and not p.name.endswith(MASK) and p.is_file()),
        key=lambda p: p.relative_to(folder).as_posix(),
    )

    def read(some: Sequence[Path]) -> Iterator[Raw | Skipped]:
        masks = _Masks()
        for picture in some:
            key, text = picture.relative_to(folder).as_posix(), picture.with_suffix(".txt")
            try:
                yield Raw(
                    key,
                    picture.read_bytes(),
                    text.read_text(encoding="utf-8", errors="replace") if text.is_file() else "",
                    masks.read(picture),
                )
            except OSError as error:
                yield Skipped(key, f"cannot be read ({error.strerror})")

    return _cut("folder", pictures, size, read)


def _column(columns: Sequence[str], known: Sequence[str], path: Path, what: str) -> str:
    for name in known:
        if name in columns:
            return name
    raise UsageError(
        f"corpus: {path} has no column of {what}: expected one of {', '.join(known)}, it has {', '.join(columns)}"
    )


def _of_csv(path: Path, size: int) -> list[Shard]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(f"corpus: {path} cannot be read as a CSV in UTF-8 ({error})") from error
    if not rows:
        raise UsageError(f"corpus: {path} has no rows")
    columns = list(rows[0])
    where, caption = (
        _column(columns, _PATH_COLUMNS, path, "files"),
        _column(columns, _CAPTION_COLUMNS, path, "captions"),
    )

    def read(some: Sequence[dict[str, str | None]]) -> Iterator[Raw | Skipped]:
        masks = _Masks()
        for row in some:
            yield _file_beside(path, row[where] or "", row[caption] or "", masks)

    return _cut(_safe(path.stem), rows, size, read)


class _Masks(dict[Path, dict[str, dict[str, Path]]]):
    """Folder -> name of a picture in it, without its ending -> label -> mask; a folder is looked through when it is first asked for."""

    def __missing__(self, folder: Path) -> dict[str, dict[str, Path]]:
        self[folder] = {}
        for file in sorted(folder.glob(f"*{MASK}")):
            name, _, label = file.name.removesuffix(MASK).rpartition(".")
            self[folder].setdefault(name, {})[label] = file
        return self[folder]

    def read(self, picture: Path) -> dict[str, bytes]:
        """Label -> mask of a picture."""
        return {label: file.read_bytes() for label, file in self[picture.parent].get(picture.stem, {}).items()}


def _file_beside(table: Path, name: str, caption: str, masks: _Masks) -> Raw | Skipped:
    """A picture that a table names: it lies in the table's folder, or below it."""
    file = (table.parent / name).resolve()
    if not name or not file.is_relative_to(table.parent.resolve()):
        return Skipped(name or "(no name)", f"{table.name} names no file in its own folder")
    try:
        return Raw(name, file.read_bytes(), caption, masks.read(file))
    except OSError as error:
        return Skipped(name, f"cannot be read ({error.strerror})")


def _of_parquet(path: Path, size: int) -> list[Shard]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as table:
            columns, rows = list(table.schema_arrow.names), int(table.metadata.num_rows)
    except (ArrowException, OSError) as error:
        raise UsageError(f"corpus: {path} cannot be read as Parquet ({str(error).splitlines()[0][:120]})") from error
    caption = _column(columns, _CAPTION_COLUMNS, path, "captions")
    picture = _column(columns, (*_BYTES_COLUMNS, *_PATH_COLUMNS), path, "pictures or files")
    key = next((c for c in ("key", "id", "__key__") if c in columns), None)

    def sample(number: int, row: dict[str, Any], masks: _Masks) -> Raw | Skipped:
        name, value, text = str(row[key]) if key else f"{path.stem}-{number:09d}", row[picture], row[caption] or ""
        text = str(text[0] if isinstance(text, list) else text)  # of several captions the first
        value = value.get("bytes") if isinstance(value, dict) else value  # as `datasets` stores pictures
        if isinstance(value, bytes):
            return Raw(name, value, text, {})
        if isinstance(value, str):
            found = _file_beside(path, value, text, masks)
            return found if isinstance(found, Skipped) else found._replace(key=name)
        return Skipped(name, f"column {picture} holds no picture")

    def read(some: Sequence[int]) -> Iterator[Raw | Skipped]:
        first, last, masks = some[0], some[-1], _Masks()
        with ParquetFile(path) as table:
            begin = 0
            for batch in table.iter_batches(64, columns=[c for c in (key, picture, caption) if c]):
                low, high = max(first - begin, 0), min(last + 1 - begin, len(batch))
                if low < high:
                    for i, row in enumerate(batch.slice(low, high - low).to_pylist(), begin + low):
                        yield sample(i, row, masks)
                begin += len(batch)
                if begin > last:
                    return

    return _cut(_safe(path.stem), range(rows), size, read)


def _of_tar(path: Path, size: int) -> list[Shard]:
    def read() -> Iterator[Raw | Skipped]:
        held: dict[str, bytes] = {}
        last = ""
        try:
            with tarfile.open(path) as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    # webdataset: what stands before the first dot of the last part of the name is the key.
                    folder, _, file = member.name.rpartition("/")
                    stem, _, ending = file.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    if key != last and held:
                        yield _of_members(last, held)
                        held = {}
                    last = key
                    data = tar.extractfile(member)
                    held[f".{ending.lower()}"] = data.read() if data is not None else b""
        except (tarfile.TarError, OSError, EOFError) as error:
            yield Skipped(f"{path.name} after {last or 'its beginning'}", f"the tar is damaged ({error})")
            return
        if held:
            yield _of_members(last, held)

    return [Shard(_safe(path.stem), _about_how_many(path), read)]


def _about_how_many(tar: Path) -> int:
    """How many samples a tar has, if all are as large as its first."""
    whole, first = tar.stat().st_size, ""
    try:
        with tarfile.open(tar) as opened:
            for member in opened:
                key = member.name.rpartition("/")[2].partition(".")[0]
                if first not in ("", key):
                    return max(1, whole // member.offset)
                first = key
    except (tarfile.TarError, OSError, EOFError):
        pass  # whoever reads it will say so
    return 1


def _of_members(key: str, held: dict[str, bytes]) -> Raw | Skipped:
    masks = {e.removesuffix(MASK).strip("."): data for e, data in sorted(held.items()) if e.endswith(MASK)}
    for ending in PICTURES:
        if ending in held:
            return Raw(key, held[ending], held.get(".txt", b"").decode("utf-8", "replace"), masks)
    return Skipped(key, f"no picture among {', '.join(sorted(held))}")
