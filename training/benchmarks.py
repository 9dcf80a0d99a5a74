"""Benchmarks of editing as folders that the user points at: PIE-Bench, ImageNet by DiffEdit's protocol, image-prompt pairs with masks as
iEdit's; and held-out edits of the picture-book world, which need no folder.

Each is a `evaluate.Benchmark`. Every picture that is going to be edited is opened when a benchmark is, so that one that cannot be read is said
before anything runs.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..runtime import images
from ..runtime.errors import UsageError, first_line
from ..runtime.files import parse_json, printable
from .figures import Case
from .pairs import MANIFEST, PairDataset, read_pairs

LONGEST = 256 << 20  # characters of a mapping file; PIE-Bench's has 4 million
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
Tell = Callable[[int, int], object]


def _nothing(done: int, of: int) -> None:
    return None


def square(picture: Image.Image, side: int | None, mask: bool = False) -> Image.Image:
    """The middle square of a picture at `side` pixels; the picture itself where `side` is None."""
    if side is None:
        return picture
    shortest = min(picture.size)
    left, top = (picture.width - shortest) // 2, (picture.height - shortest) // 2
    box = (left, top, left + shortest, top + shortest)
    return picture.resize((side, side), Image.Resampling.NEAREST if mask else Image.Resampling.LANCZOS, box)


def _digest(*parts: bytes | str | None) -> str:
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part or b""
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()[:16]


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}); it is to be {what}") from None


def _inside(folder: Path, name: str, where: str) -> Path:
    """A file in a folder by a name that others wrote.

    Raises:
        UsageError: the name leads out of the folder.
    """
    path = folder / name
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UsageError(f"{where}: {printable(name)!r} is no file in {folder}; give names below it")
    return path


def _case_name(path: str) -> str:
    """A file's name without its ending, as `figures.Case.name` wants it."""
    return re.sub(r"[^\w./-]", "_", str(Path(path).with_suffix("")))


def _choose(items: Sequence[Any], n: int | None) -> list[Any]:
    return list(items if n is None else items[:n])


def _check_unique(cases: Sequence[Case], where: Path) -> None:
    names = [c.name for c in cases]
    twice = (
        next((name for i, name in enumerate(names) if name in names[:i]), None)
        if len(set(names)) < len(names)
        else None
    )
    if twice is not None:
        raise UsageError(f"{where}: two cases are named {twice}; name every case once")
    if not cases:
        raise UsageError(f"{where}: holds no case")


# --- PIE-Bench ----------------------------------------------------------------------------------------------------

PIE_KINDS = ("random", "change object", "add object", "delete object", "change content", "change pose", "change colour", "change material",
             "change background", "change style")  # fmt: skip


def decode_mask(runs: Sequence[int], height: int, width: int) -> np.ndarray:
    """PIE-Bench's run-length code: start and length, start and length, ..., over the pixels in rows; (H, W) bool.

    The outermost pixels belong to the edit, as in its published program ("to avoid annotation errors in boundary").

    Raises:
        ValueError: the runs are no pairs of whole numbers, or lie outside the picture.
    """
    numbers = np.asarray(runs)
    if numbers.size and (numbers.ndim != 1 or numbers.dtype.kind != "i" or len(numbers) % 2):
        raise ValueError("the mask is no list of starts and lengths")
    pixels = np.zeros(height * width, bool)
    for start, length in numbers.reshape(-1, 2).astype(int):
        if not 0 <= start < pixels.size or length < 0:
            raise ValueError(f"a run of the mask begins at {start} in a picture of {pixels.size} pixels")
        pixels[start : start + length] = True
    mask = pixels.reshape(height, width)
    mask[[0, -1]] = True
    mask[:, [0, -1]] = True
    return mask


class Pie:
    """PIE-Bench (Ju et al. 2024, PnP Inversion): `mapping_file.json` and `annotation_images/`, 700 pictures of ten kinds of edits.

    Args:
        folder: holds the two.
        n: the first so many cases.
        size: the middle square at so many pixels; by default the pictures as they are.
        tell: called with how many cases have been read, and of how many.

    Raises:
        UsageError: the folder is none of this kind, or a picture cannot be read.
    """

    title = "PIE-Bench"
    columns: tuple[str, ...] = (
        "structure",
        "psnr_kept",
        "lpips_kept",
        "mse_kept",
        "ssim_kept",
        "clip_whole",
        "clip_edited",
    )
    rank: tuple[str, ...] = ("clip_edited", "ssim_kept")

    def __init__(self, folder: Path, n: int | None = None, size: int | None = None, tell: Tell = _nothing):
        self.folder, self.size = folder, size
        path = folder / "mapping_file.json"
        if not path.is_file():
            raise UsageError(
                f"{folder}: holds no mapping_file.json; name the folder of PIE-Bench that holds it and annotation_images/"
            )
        try:
            content = parse_json(path.read_text(encoding="utf-8"), LONGEST)
            if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
                raise ValueError("it is no object of cases")
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: is no mapping file of PIE-Bench ({first_line(error)})") from None
        self._items: dict[str, dict[str, Any]] = {}
        chosen, cases = _choose(list(content.items()), n), []
        for number, (key, item) in enumerate(chosen):
            where = f"{path}: case {printable(str(key))}"
            texts = {}
            for name in ("image_path", "original_prompt", "editing_prompt"):
                if not isinstance(item.get(name), str):
                    raise UsageError(f"{where} has no {name}; take the mapping file that comes with the pictures")
                texts[name] = item[name].replace("[", "").replace("]", "") if name != "image_path" else item[name]
            if not texts["editing_prompt"].strip():
                raise UsageError(f"{where}: editing_prompt is empty; say what the edited picture shows")
            file = _inside(folder / "annotation_images", item["image_path"], where)
            picture = images.load_image(file)
            try:
                decode_mask(item.get("mask", []), picture.height, picture.width)
            except (ValueError, TypeError) as error:
                raise UsageError(f"{where}: {first_line(error)}") from None
            kind = str(item.get("editing_type_id", ""))
            kind = PIE_KINDS[int(kind)] if kind.isdecimal() and int(kind) < len(PIE_KINDS) else "other"
            name = _case_name(texts["image_path"])
            self._items[name] = {"path": file, "mask": item.get("mask", [])}
            shown = square(picture, size)
            digest = _digest(
                _read(file, "a picture"),
                json.dumps(item.get("mask", [])),
                texts["original_prompt"],
                texts["editing_prompt"],
                str(size),
            )
            cases.append(Case(name, kind, texts["original_prompt"], texts["editing_prompt"], digest, shown.size))
            tell(number + 1, len(chosen))
        _check_unique(cases, path)
        self.cases: Sequence[Case] = cases

    def picture(self, case: Case) -> Image.Image:
        return square(images.load_image(self._items[case.name]["path"]), self.size)

    def mask(self, case: Case) -> np.ndarray | None:
        full = images.load_image(self._items[case.name]["path"])
        mask = decode_mask(self._items[case.name]["mask"], full.height, full.width)
        return np.asarray(square(Image.fromarray(mask), self.size, mask=True))

    def real(self) -> Iterator[tuple[str, Image.Image]]:
        for case in self.cases:
            yield "", self.picture(case)


# --- image-prompt pairs -------------------------------------------------------------------------------------------


class Pairs:
    """Pictures with an edit prompt and a mask, as iEdit is evaluated on (section 4.1): a folder that `iedit train pairs` wrote, of which the
    source, its mask and the edit prompt are taken; or a folder with `pairs.csv`, whose columns are `image`, `prompt`, and if there are any
    `source_prompt` and `mask` (white where the edit is).

    Args:
        folder, n, size, tell: as of `Pie`.
        compared: folder of the real pictures that FID compares with; by default the sources.

    Raises:
        UsageError: the folder is none of this kind, or a picture cannot be read.
    """

    title = "image-prompt pairs"
    columns: tuple[str, ...] = ("clip_score", "fid", "ssim_m", "ssim_not_m", "l1_not_m")
    rank: tuple[str, ...] = ("clip_score", "ssim_not_m", "l1")

    def __init__(
        self,
        folder: Path,
        n: int | None = None,
        size: int | None = None,
        compared: Path | None = None,
        tell: Tell = _nothing,
    ):
        self.folder, self.size, self.compared = folder, size, compared
        self._data: PairDataset | None = None
        self._files: dict[str, tuple[Path, Path | None]] = {}
        self._numbers: dict[str, int] = {}
        if compared is not None and not _pictures(compared):
            raise UsageError(f"{compared}: holds no picture to compare the edits with")
        if (folder / MANIFEST).is_file():
            self.cases: Sequence[Case] = self._from_shards(n, tell)
        elif (folder / "pairs.csv").is_file():
            self.cases = self._from_table(n, tell)
        else:
            raise UsageError(
                f"{folder}: holds neither {MANIFEST} nor pairs.csv; name a folder that `iedit train pairs` wrote, or one with a pairs.csv "
                "(image,source_prompt,prompt,mask)"
            )
        _check_unique(self.cases, folder)

    def _from_shards(self, n: int | None, tell: Tell) -> list[Case]:
        data = self._data = read_pairs(self.folder)
        count, cases = len(data) if n is None else min(n, len(data)), []
        for number in range(count):
            row, pair = data.row(number), data[number]
            name, side = _case_name(f"{row.key}.png"), self.size or data.manifest.size
            self._numbers[name] = number
            picture = (pair.source.tobytes(), pair.source_mask.tobytes())
            digest = _digest(*picture, row.source_caption, row.edit_prompt, str(self.size))
            cases.append(Case(name, row.relation, row.source_caption, row.edit_prompt, digest, (side, side)))
            tell(number + 1, count)
        return cases

    def _from_table(self, n: int | None, tell: Tell) -> list[Case]:
        path = self.folder / "pairs.csv"
        try:
            lines = list(
                csv.DictReader(
                    io.StringIO(_read(path, "a table of pairs").decode("utf-8-sig"), newline=""), strict=True
                )
            )
        except (UnicodeDecodeError, csv.Error) as error:
            raise UsageError(f"{path}: is no CSV in UTF-8 ({first_line(error)})") from None
        missing = [c for c in ("image", "prompt") if lines and c not in lines[0]]
        if missing:
            raise UsageError(
                f"{path}: has no column {missing[0]}; its columns are to be image, source_prompt, prompt, mask"
            )
        cases, lines = [], _choose(lines, n)
        for number, line in enumerate(lines):
            where = f"{path}: line {number + 2}"
            prompt, told = (line.get("prompt") or "").strip(), (line.get("source_prompt") or "").strip()
            if not prompt:
                raise UsageError(f"{where}: the prompt is empty; say what the edited picture shows")
            file = _inside(self.folder, line.get("image") or "", where)
            picture, mask = images.load_image(file), None
            if line.get("mask"):
                mask = _inside(self.folder, line["mask"], where)
                images.load_mask(mask, picture.size)
            name = f"{number:05d}-{_case_name(file.name)}"  # a picture has several prompts
            self._files[name] = (file, mask)
            masked = _read(mask, "a mask") if mask is not None else None
            digest = _digest(_read(file, "a picture"), masked, told, prompt, str(self.size))
            cases.append(Case(name, "all", told, prompt, digest, square(picture, self.size).size))
            tell(number + 1, len(lines))
        return cases

    def picture(self, case: Case) -> Image.Image:
        if self._data is not None:
            return square(self._data[self._numbers[case.name]].source, self.size)
        return square(images.load_image(self._files[case.name][0]), self.size)

    def mask(self, case: Case) -> np.ndarray | None:
        if self._data is not None:
            mask = Image.fromarray(self._data[self._numbers[case.name]].source_mask)
        else:
            file, path = self._files[case.name]
            if path is None:
                return None
            mask = images.load_mask(path, images.load_image(file).size)
        return np.asarray(square(mask, self.size, mask=True)) > 0

    def real(self) -> Iterator[tuple[str, Image.Image]]:
        if self.compared is not None:
            for path in _pictures(self.compared):
                yield "", square(images.load_image(path), self.size)
            return
        seen = set()
        for case in self.cases:
            picture = self.picture(case)
            if (key := _digest(picture.tobytes())) not in seen:
                seen.add(key)
                yield "", picture


def _pictures(folder: Path) -> list[Path]:
    """The pictures in a folder and below it, in order."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())


# --- ImageNet -----------------------------------------------------------------------------------------------------


class ImageNet:
    """DiffEdit's protocol on ImageNet (FlexIT's benchmark; ITO Table 1): a picture of one class is edited into a neighbouring class.

    The folder holds a folder for each class, named by its synset (n02119022) or its name. What is edited into what is told by a CSV with FlexIT's
    columns `path`, `source`, `target` (and `is_test`, of which only the true are taken where there are any); or, where there is none, by WordNet: a
    picture of each class is edited into the classes of the folder that are the same kind of thing.

    Args:
        folder, n, size, tell: as of `Pie`; DiffEdit edits the middle square.
        queries: the CSV.
        wordnet: folder of WordNet's database, for classes by synset.
        per_class: pictures of each class, where there is no CSV.
        template: of the prompts, with the class in place of {}.
        compared: folder of real pictures in a folder for each class, for CSFID; by default the pictures of the folder itself.

    Raises:
        UsageError: the folder is none of this kind, a picture cannot be read, or a class has no neighbour.
    """

    title = "ImageNet, DiffEdit's protocol"
    columns: tuple[str, ...] = ("l1", "lpips", "csfid", "new", "old", "pickscore", "preference")
    rank: tuple[str, ...] = ("pickscore", "clip_score", "l1")

    def __init__(
        self, folder: Path, n: int | None = None, size: int | None = None, queries: Path | None = None, wordnet: Path | None = None,
        per_class: int = 4, template: str = "{}", compared: Path | None = None, tell: Tell = _nothing,
    ):  # fmt: skip
        if "{}" not in template:
            raise UsageError(
                f"template: {template!r} has no {{}}, where the class goes; say for example 'a photo of a {{}}'"
            )
        self.folder, self.size, self.compared = folder, size, compared
        self._folders: dict[str, str] = {}  # class -> its folder
        asked = _from_queries(folder, queries) if queries is not None else self._neighbours(wordnet, per_class)
        if queries is not None:
            self._folders = {source: Path(path).parts[0] for path, source, _ in asked}
        self._files: dict[str, Path] = {}
        asked, cases = _choose(asked, n), []
        for number, (path, source, target) in enumerate(asked):
            file = _inside(folder, path, str(queries or folder))
            picture = images.load_image(file)
            name = f"{number:05d}-{_case_name(path)}"
            self._files[name] = file
            texts = template.replace("{}", source), template.replace("{}", target)
            digest = _digest(_read(file, "a picture"), *texts, str(size))
            cases.append(Case(name, "all", *texts, digest, square(picture, size).size, source, target))
            tell(number + 1, len(asked))
        _check_unique(cases, folder)
        self.cases: Sequence[Case] = cases

    def _neighbours(self, wordnet: Path | None, per_class: int) -> list[tuple[str, str, str]]:
        classes = sorted(p.name for p in self.folder.iterdir() if p.is_dir()) if self.folder.is_dir() else []
        if not classes:
            raise UsageError(f"{self.folder}: holds no folder; name one with a folder of pictures for each class")
        names, parents = _from_wordnet(self.folder, classes, wordnet)
        self._folders = {names[c]: c for c in classes}
        asked = []
        for own in classes:
            near = [c for c in classes if c != own and parents[c] & parents[own]]
            files = _pictures(self.folder / own)[:per_class]
            for number, file in enumerate(files if near else []):
                target = near[number % len(near)]
                asked.append((str(file.relative_to(self.folder)), names[own], names[target]))
        if not asked:
            raise UsageError(
                f"{self.folder}: no two of its classes are the same kind of thing in WordNet; say with --queries what to edit into what"
            )
        return asked

    def picture(self, case: Case) -> Image.Image:
        return square(images.load_image(self._files[case.name]), self.size)

    def mask(self, case: Case) -> np.ndarray | None:
        return None

    def real(self) -> Iterator[tuple[str, Image.Image]]:
        root = self.compared or self.folder
        for name in dict.fromkeys(c.new for c in self.cases):
            place = next((p for p in (root / self._folders.get(name, name), root / name) if p.is_dir()), None)
            found = _pictures(place) if place is not None else []
            if not found:
                raise UsageError(
                    f"{root}: holds no picture of {name}, which CSFID compares with; add some, or leave --features out"
                )
            for path in found:
                yield name, square(images.load_image(path), self.size)


def _from_queries(folder: Path, path: Path) -> list[tuple[str, str, str]]:
    """(picture, class before, class after) of FlexIT's table."""
    try:
        lines = list(csv.DictReader(io.StringIO(_read(path, "FlexIT's table").decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: is no CSV in UTF-8 ({first_line(error)})") from None
    missing = [c for c in ("path", "source", "target") if not lines or c not in lines[0]]
    if missing:
        raise UsageError(f"{path}: has no column {missing[0]} or no line; its columns are to be path, source, target")
    tested = [line for line in lines if str(line.get("is_test", "")).strip().lower() == "true"] or lines
    asked = [(line["path"] or "", (line["source"] or "").strip(), (line["target"] or "").strip()) for line in tested]
    empty = next((i for i, a in enumerate(asked) if not all(a)), None)
    if empty is not None:
        raise UsageError(f"{path}: case {empty + 1} has an empty path, source or target; fill it in")
    return asked


def _from_wordnet(
    folder: Path, classes: Sequence[str], wordnet: Path | None
) -> tuple[dict[str, str], dict[str, set[Any]]]:
    """Of each class's folder its name, and what WordNet says it is a kind of."""
    from .wordnet import NOUN, WordNet

    other = next((c for c in classes if not re.fullmatch(r"n\d{8}", c)), None)
    if other is not None:
        raise UsageError(
            f"{folder}: {printable(other)} is no synset (n02119022), so that WordNet does not know its neighbours; give --queries"
        )
    if wordnet is None:
        raise UsageError(
            f"{folder}: says nothing of what is edited into what; give --queries (FlexIT's table) or --wordnet"
        )
    try:
        net = WordNet(wordnet)
        senses = {c: net.synset((NOUN, int(c[1:]))) for c in classes}
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{wordnet}: {first_line(error)}") from None
    parents = {c: {key for symbol, key, _, _ in s.pointers if symbol == "@"} for c, s in senses.items()}
    names = {c: s.words[0].replace("_", " ") for c, s in senses.items()}
    for name in {
        n for n in names.values() if list(names.values()).count(n) > 1
    }:  # ImageNet has a crane that flies and one that lifts
        for c in [c for c, own in names.items() if own == name]:
            names[c] = f"{name}, {net.synset(min(parents[c])).words[0].replace('_', ' ')}"
    return names, parents


# --- the picture-book world ---------------------------------------------------------------------------------------


class World:
    """Held-out edits of the picture-book world by text (`truth.edit_cases`): thing, colour, sky or ground; the exact region is the mask.

    Args:
        n: of each kind.
        seed: which.
    """

    title = "the picture-book world"
    columns: tuple[str, ...] = ("l1", "ssim", "l1_not_m", "ssim_not_m", "clip_score", "clip_edited")
    rank: tuple[str, ...] = ("clip_score",)

    def __init__(self, n: int, seed: int = 0):
        from . import truth

        by_kind = [truth.edit_cases(kind, n, seed) for kind in truth.TEXT_KINDS]
        # Taken in turns: a case's place, and so its noise, does not depend on `n`.
        self.exact = {cases[i].name: cases[i] for i in range(n) for cases in by_kind}
        self.cases: Sequence[Case] = [
            Case(c.name, c.kind, *c.prompts, _digest(c.source.tobytes(), *c.prompts), c.source.size)
            for c in self.exact.values()
        ]

    def picture(self, case: Case) -> Image.Image:
        return self.exact[case.name].source

    def mask(self, case: Case) -> np.ndarray | None:
        mask: np.ndarray = np.asarray(self.exact[case.name].region) > 127
        return mask

    def real(self) -> Iterator[tuple[str, Image.Image]]:
        """Renders of the scenes after the edits, shuffled so that they are of other cases' kinds too."""
        exact = list(self.exact.values())
        random.Random(0).shuffle(exact)
        for case in exact:
            yield "", case.target
