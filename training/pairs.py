"""iEdit's training data: pairs of a source and a pseudo-target with prompts, difference prompts and masks (iEdit section 3.1), on disk.

A folder of pairs holds

- `manifest.json`: a `Manifest`; written last, so that a folder without one is not finished.
- `pairs-00000.tar`, ...: webdataset shards. A pair is KEY.source.png (or .jpg), KEY.target.png, KEY.source_mask.png, KEY.target_mask.png (0
  and 255, at the pictures' size) and KEY.json (its `Row` without the masks).
- `pairs-00000.parquet`, ...: the same `Row`s as a table, with both masks at the latent's resolution.
- `skipped.csv`: what of the corpus became no pair: key, stage, reason.

The bytes of all of them depend on the corpus, the models and the settings alone: tar members have neither time nor owner.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from ..runtime.errors import UsageError, first_line
from ..runtime.files import Match, open_whole, parse_json, typed
from ..runtime.images import contact_sheet

FORMAT = 1
MANIFEST = "manifest.json"
SKIPPED = "skipped.csv"
FACTOR = 8  # pixels of a side that become one latent cell (Stable Diffusion 1.x)
_LONGEST = 64 << 20  # characters of a manifest


@dataclass(frozen=True)
class Row:
    """What is known of a pair beside its pictures.

    Attributes:
        key: its name in the shards, unique in the folder.
        source_key, target_key: of the two pictures in the corpus.
        source_caption, edit_prompt: y1 and y2; they differ in `word`, and in the article before it where that must change.
        word, replacement, relation: what was replaced, by what, and what they are to each other ("antonym", "co-hyponym").
        source_difference, target_difference: the difference prompts y1^diff and y2^diff (iEdit section 3.4).
        similarity: cosine of the combined embedding, of source and edit prompt, and the pseudo-target's.
        image_similarity: cosine of the pictures' embeddings.
        text_similarity: cosine of the edit prompt's embedding and the pseudo-target's.
        source_share, target_share: of the picture that its mask covers, in (0, 1).
        source_latent_share, target_latent_share: the same at the latent's resolution.
        source_cells, target_cells: the masks at the latent's resolution, 8 cells a byte in rows (`numpy.packbits`).
    """

    key: str
    source_key: str
    target_key: str
    source_caption: str
    edit_prompt: str
    word: str
    replacement: str
    relation: str
    source_difference: str
    target_difference: str
    similarity: float
    image_similarity: float
    text_similarity: float
    source_share: float
    target_share: float
    source_latent_share: float
    target_latent_share: float
    source_cells: bytes
    target_cells: bytes


@dataclass(frozen=True)
class Pair:
    """One sample for training.

    Attributes:
        row: everything but the pictures and masks.
        source, target: x1 and its pseudo-target x2, RGB, both `Manifest.size` pixels wide and high.
        source_mask, target_mask: M1 and M2, (H, W) bool at the pictures' size: where the difference prompts are seen.
        source_latent_mask, target_latent_mask: the same at the latent's resolution, (H / 8, W / 8) float32 of 0 and 1.
    """

    row: Row
    source: Image.Image
    target: Image.Image
    source_mask: np.ndarray
    target_mask: np.ndarray
    source_latent_mask: np.ndarray
    target_latent_mask: np.ndarray

    @property
    def key(self) -> str:
        return self.row.key

    @property
    def source_caption(self) -> str:
        return self.row.source_caption

    @property
    def edit_prompt(self) -> str:
        return self.row.edit_prompt

    @property
    def difference_prompts(self) -> tuple[str, str]:
        """What changed, in the source and in the pseudo-target."""
        return self.row.source_difference, self.row.target_difference


@dataclass(frozen=True)
class ShardFiles:
    """One shard of pairs.

    Attributes:
        name: of its files, without ".tar" and ".parquet".
        rows: its pairs.
        tar, parquet: sha256 of the two files, 64 hex digits.
    """

    name: Annotated[str, Match(r"[\w-]+", "a name without folders")]
    rows: int
    tar: str
    parquet: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of pairs holds and what it was made from.

    Attributes:
        format: `FORMAT`.
        size: pixels of a picture's side. latent: cells of a latent mask's side.
        samples: pictures of the corpus that could be read. pairs: those that became a pair, of all shards together.
        skipped: reason -> how many of the corpus became no pair for it.
        settings: what decides the result beside the data, by the options' names.
        digests: "corpus", "wordnet", "clip", "captions", "masks" -> sha256 of what was read; what was not used is left out.
        index: how neighbours were found: "kind" ("flat" or "ivf-pq"), "vectors", and of the latter its "recall" against the former.
        versions: of the libraries that the bytes depend on.
        shards: in order.
    """

    format: int
    size: int
    latent: int
    samples: int
    pairs: int
    skipped: Mapping[str, int]
    settings: Mapping[str, Any]
    digests: Mapping[str, str]
    index: Mapping[str, Any]
    versions: Mapping[str, str]
    shards: tuple[ShardFiles, ...]


# --- masks ------------------------------------------------------------------------------------------------------


def latent_mask(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool -> (H / 8, W / 8) float32 of 0 and 1: averaged over each cell's area, 1 from a half on (METHOD.md section 3, row 5)."""
    h, w = (side // FACTOR for side in mask.shape)
    share = mask.reshape(h, FACTOR, w, FACTOR).mean(axis=(1, 3))
    cells: np.ndarray = (share >= 0.5).astype(np.float32)
    return cells


def pack_cells(cells: np.ndarray) -> bytes:
    """(h, w) of 0 and 1 -> 8 cells a byte, in rows."""
    return np.packbits(cells.astype(bool).ravel()).tobytes()


def unpack_cells(data: bytes, side: int) -> np.ndarray:
    """Undo `pack_cells`: (side, side) float32 of 0 and 1."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=side * side)
    return bits.reshape(side, side).astype(np.float32)


# --- writing ----------------------------------------------------------------------------------------------------


def encode_mask(mask: np.ndarray) -> bytes:
    """(H, W) bool as a PNG of 0 and 255."""
    held = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(held, "PNG")
    return held.getvalue()


def picture_ending(data: bytes) -> str:
    """ "png" or "jpg", by the first bytes of a picture."""
    return "png" if data.startswith(b"\x89PNG") else "jpg"


def write_shard(
    folder: Path, name: str, pairs: Iterable[tuple[Row, bytes, bytes, np.ndarray, np.ndarray]]
) -> ShardFiles | None:
    """Write one shard, the tar first; each file whole or not at all.

    Args:
        pairs: row, source and pseudo-target (PNG or JPEG), and their masks, (H, W) bool. They are taken one at a time.

    Returns:
        What was written; None, and no file, if there are no pairs.

    Raises:
        RunError: it could not be written.
    """
    import pyarrow as pa
    from pyarrow import parquet

    rows: list[Row] = []
    paths = folder / f"{name}.tar", folder / f"{name}.parquet"
    with open_whole(paths[0]) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row, source, target, source_mask, target_mask in pairs:
            words = {k: v for k, v in dataclasses.asdict(row).items() if not isinstance(v, bytes)}
            for ending, data in (
                (f"source.{picture_ending(source)}", source),
                (f"target.{picture_ending(target)}", target),
                ("source_mask.png", encode_mask(source_mask)),
                ("target_mask.png", encode_mask(target_mask)),
                ("json", json.dumps(words, ensure_ascii=False, indent=1).encode()),
            ):
                member = tarfile.TarInfo(f"{row.key}.{ending}")  # its defaults: time 0, owner 0
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            rows.append(row)
    if not rows:
        paths[0].unlink()
        return None
    with open_whole(paths[1]) as file:
        parquet.write_table(pa.Table.from_pylist([dataclasses.asdict(r) for r in rows]), file)
    return ShardFiles(name, len(rows), *(_sha256(p) for p in paths))


def write_manifest(folder: Path, manifest: Manifest, skipped: Sequence[tuple[str, str, str]]) -> None:
    """Finish a folder: what was skipped (key, stage, reason), then the manifest.

    Raises:
        RunError: it could not be written.
    """
    held = io.StringIO()
    csv.writer(held, lineterminator="\n").writerows([("key", "stage", "reason"), *skipped])
    for name, text in (
        (SKIPPED, held.getvalue()),
        (MANIFEST, json.dumps(dataclasses.asdict(manifest), ensure_ascii=False, indent=1) + "\n"),
    ):
        with open_whole(folder / name) as file:
            file.write(text.encode())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- reading ----------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of pairs.

    Raises:
        UsageError: there is none, or it is of something else.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(
            f"pairs: {path} is not there; name a folder that `iedit train pairs` has finished, or run it again"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"pairs: {path} cannot be read ({first_line(error)})") from error
    try:
        content = parse_json(text, _LONGEST)
        if isinstance(content, dict) and content.get("format") != FORMAT:
            raise ValueError(f"format is {content.get('format')!r}, expected {FORMAT}")
        manifest: Manifest = typed(Manifest, content, "")
    except ValueError as error:
        raise UsageError(f"pairs: {path} is no manifest of pairs ({first_line(error)}); make the pairs again") from None
    if manifest.size != manifest.latent * FACTOR or manifest.pairs != sum(s.rows for s in manifest.shards):
        raise UsageError(f"pairs: {path} contradicts itself; make the pairs again")
    return manifest


def read_pairs(
    folder: str | Path, verify: bool = True, tell: Callable[[int, int], object] | None = None
) -> PairDataset:
    """Open a folder of pairs.

    Args:
        verify: compare every tar with its digest, which reads all of them; the tables are compared always.
        tell: called with how many shards have been looked at, and of how many.

    Raises:
        UsageError: there is no manifest, it is of something else, or a shard is missing or is not the one that was written.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for number, shard in enumerate(manifest.shards):
        for ending, digest in (("parquet", shard.parquet), ("tar", shard.tar)):
            path = folder / f"{shard.name}.{ending}"
            if not path.is_file():
                raise UsageError(f"pairs: {path} is not there, but {folder / MANIFEST} names it; make the pairs again")
            if (verify or ending == "parquet") and _sha256(path) != digest:
                raise UsageError(
                    f"pairs: {path} is damaged: it is not the file that {folder / MANIFEST} names; make the pairs again"
                )
        if tell is not None:
            tell(number + 1, len(manifest.shards))
    return PairDataset(folder, manifest)


class PairDataset(Sequence[Pair]):
    """The pairs of a folder, in the manifest's order; any of them by its number. Processes may share one, forked or pickled.

    Attributes:
        folder, manifest: what was opened.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        import pyarrow as pa
        from pyarrow import parquet

        self.folder, self.manifest = folder, manifest
        tables = [parquet.read_table(folder / f"{s.name}.parquet") for s in manifest.shards]
        self._rows = pa.concat_tables(tables) if tables else None
        self._shards = np.repeat(np.arange(len(manifest.shards)), [s.rows for s in manifest.shards])
        if self._rows is not None and len(self._rows) != len(self._shards):
            raise UsageError(f"pairs: the tables of {folder} have {len(self._rows)} rows, expected {len(self._shards)}")
        self._members = functools.cache(self._read_members)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], state["manifest"])  # type: ignore[misc]

    @property
    def digest(self) -> str:
        """sha256 of the manifest, which holds those of all shards: 64 hex digits."""
        return _sha256(self.folder / MANIFEST)

    def __len__(self) -> int:
        return len(self._shards)

    def row(self, index: int) -> Row:
        """The row of a pair, without opening its pictures."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        assert self._rows is not None
        return Row(**self._rows.slice(index % len(self), 1).to_pylist()[0])

    def __getitem__(self, index: int) -> Pair:  # type: ignore[override] # slices are not needed
        """A pair by its number.

        Raises:
            IndexError: there is no such pair.
            UsageError: its shard lacks it, or a picture in it cannot be read.
        """
        row, side = self.row(index), self.manifest.latent
        shard = self.manifest.shards[self._shards[index % len(self)]]
        source, target = (self._picture(shard, row.key, (f"{n}.png", f"{n}.jpg")) for n in ("source", "target"))
        masks = [self._picture(shard, row.key, (f"{n}.png",)) for n in ("source_mask", "target_mask")]
        return Pair(
            row,
            source.convert("RGB"),
            target.convert("RGB"),
            *(np.asarray(m.convert("L")) > 127 for m in masks),
            *(unpack_cells(c, side) for c in (row.source_cells, row.target_cells)),
        )

    def _read_members(self, name: str) -> dict[str, tuple[int, int]]:
        """Member -> where its bytes begin in the tar, and how many they are."""
        try:
            with tarfile.open(self.folder / f"{name}.tar") as tar:
                return {m.name: (m.offset_data, m.size) for m in tar}
        except (tarfile.TarError, OSError) as error:
            raise UsageError(
                f"pairs: {self.folder / f'{name}.tar'} cannot be read ({first_line(error)}); make the pairs again"
            ) from error

    def _picture(self, shard: ShardFiles, key: str, endings: Sequence[str]) -> Image.Image:
        members, path = self._members(shard.name), self.folder / f"{shard.name}.tar"
        name = next((n for n in (f"{key}.{e}" for e in endings) if n in members), None)
        if name is None:
            raise UsageError(f"pairs: {path} holds no {key}.{endings[0]}; make the pairs again")
        offset, size = members[name]
        try:
            with path.open("rb") as file:
                file.seek(offset)
                picture = Image.open(io.BytesIO(file.read(size)))
            picture.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise UsageError(f"pairs: {name} of {path} cannot be read ({first_line(error)})") from error
        if picture.size != (self.manifest.size, self.manifest.size):
            raise UsageError(
                f"pairs: {name} of {path} is {picture.width}x{picture.height}, expected {self.manifest.size}x{self.manifest.size}"
            )
        return picture


# --- looking at them ----------------------------------------------------------------------------------------------


def contact_sheet_of(data: PairDataset, count: int, cell: int = 192) -> Image.Image:
    """A sheet of `count` pairs, evenly over all: source, its mask on it, pseudo-target, its mask on it; prompts above.

    Args:
        cell: pixels of each picture.

    Raises:
        UsageError: there is no pair.
    """
    numbers = sorted({i * len(data) // count for i in range(count)}) if len(data) else []
    rows, titles = [], []
    for pair in (data[n] for n in numbers):
        row = pair.row
        titles.append(f"{row.source_caption}  ->  {row.edit_prompt}")
        rows.append([
            (f"source {row.source_key}", pair.source),
            (f"“{row.source_difference}”, {row.source_share:.0%}", _overlay(pair.source, pair.source_mask)),
            (f"pseudo-target {row.target_key}", pair.target),
            (f"“{row.target_difference}”, {row.target_share:.0%}", _overlay(pair.target, pair.target_mask)),
            (f"{row.relation}; cosines: combined {row.similarity:.2f}, pictures {row.image_similarity:.2f}, text {row.text_similarity:.2f}",
             _side_by_side(pair.source_latent_mask, pair.target_latent_mask)),
        ])  # fmt: skip
    return contact_sheet(rows, cell, titles)


def _side_by_side(one: np.ndarray, other: np.ndarray) -> Image.Image:
    """Two latent masks, 8 pixels a cell, with grey between them."""
    between = np.full((len(one), 1), 0.5)
    values = np.concatenate([one, between, other], axis=1).repeat(FACTOR, 0).repeat(FACTOR, 1)
    return Image.fromarray((values * 255).astype(np.uint8))


def _overlay(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """The picture, dimmed outside the mask, which is outlined in red."""
    inside = Image.fromarray(mask.astype(np.uint8) * 255)
    shown = Image.composite(picture, Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.7), inside)
    edge = ImageChops.subtract(inside.filter(ImageFilter.MaxFilter(3)), inside.filter(ImageFilter.MinFilter(3)))
    shown.paste((255, 0, 0), mask=edge)
    return shown
