"""The three stages of iEdit's training pairs (iEdit section 3.1); `build_pairs.py` says who runs them, and when.

1. `read_shard`: pictures are cut to a square, captioned, and embedded by CLIP.
2. `make_index`: the words of all captions, and an index of all embeddings.
3. `pair_shard`: an edit prompt for each caption, the pseudo-target by the mean of source's and prompt's embeddings, difference prompts, masks.

Each leaves its results in OUT/work, written whole, STAGE-00000.json last. What they are depends on the corpus, the models and `Settings`: batches
are cut within a shard, and all arithmetic runs on `Settings.threads` threads.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..runtime.errors import RunError, UsageError, first_line
from ..runtime.files import open_whole, write_whole
from . import pair_models, pairs
from .corpus import Sample, Shard, Skipped, open_corpus
from .edit_prompts import EditPrompt, EditPrompts, vocabulary_of
from .pairs import Row
from .wordnet import WordNet

WORK = "work"
OWN = "own"  # captions or masks: those that the corpus brings
NEIGHBOURS = 64  # pictures that are looked at for a pseudo-target
LISTS = 64  # of an IVF-PQ index that are looked through for them
CHUNK = 8  # batches that are paired at a time: as many pictures are in memory
QUERIES = 256  # that an approximate index is measured with


@dataclass(frozen=True)
class Settings:
    """How pairs are built.

    Attributes:
        corpus, out, wordnet: where the corpus is, where the pairs go, and WordNet's database folder. On a cluster these are the same for all.
        captions: "own", or a captioning checkpoint. clip: a CLIPModel. masks: "own", or a CLIPSeg checkpoint.
        size: pixels of the square that pictures are cut to; a multiple of 8.
        seed: of the edit prompts.
        duplicate: a picture whose embedding's cosine with the source's is as high as this is no pseudo-target.
        candidates: how many neighbours are tried, the nearest first, for one in which the new word is seen; the paper tries 1.
        mask_threshold: of CLIPSeg's sigmoid.
        flat_below: a corpus of fewer pictures is searched exactly, a larger one by IVF-PQ.
        shard: pictures in a shard, where the corpus is not in shards already. batch: pictures in one call of a network.
        threads: of each process, for all arithmetic on a CPU. device: of the networks.
    """

    corpus: str
    out: str
    wordnet: str
    captions: str = OWN
    clip: str = "openai/clip-vit-large-patch14"
    masks: str = "CIDAS/clipseg-rd64-refined"
    size: int = 384
    seed: int = 0
    duplicate: float = 0.95
    candidates: int = 1
    mask_threshold: float = 0.5
    flat_below: int = 50_000
    shard: int = 1000
    batch: int = 32
    threads: int = 1
    device: str = "cpu"

    @property
    def work(self) -> Path:
        return Path(self.out) / WORK

    def decisive(self) -> dict[str, Any]:
        """What decides the bytes beside what is digested, by the options' names; of a model in a folder, the folder's own name."""
        values = dataclasses.asdict(self)
        for name in ("corpus", "out", "wordnet"):
            del values[name]
        for name in ("captions", "clip", "masks"):
            if Path(values[name]).expanduser().is_dir():
                values[name] = Path(values[name]).expanduser().resolve().name
        return values | {"device": self.device.partition(":")[0]}


# --- what the stages share ---------------------------------------------------------------------------------------


def _prepare(settings: Settings) -> None:
    """What every process does before it computes."""
    import faiss
    import torch

    from ..runtime.cli.live import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(settings.threads)
    faiss.omp_set_num_threads(1)  # its sums would depend on how they are shared out


def result(settings: Settings, stage: str, number: int) -> dict[str, Any]:
    path = settings.work / f"{stage}-{number:05d}.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"pairs: {path} cannot be read ({first_line(error)}); remove {path} and run it again") from error
    return content


def _write_result(settings: Settings, stage: str, number: int, **found: Any) -> None:
    write_whole(settings.work / f"{stage}-{number:05d}.json", (json.dumps(found) + "\n").encode())


def forget() -> None:
    """Drop what a process keeps between shards: networks, the corpus' list of files, WordNet, embeddings."""
    for held in (_corpus, _words, _samples, pair_models.load):
        held.cache_clear()


def kind_of(reason: str) -> str:
    """A reason without what it says of one sample: numbers and what stands in parentheses or after a colon."""
    words = "".join("N" if c.isdigit() else c for c in reason.partition(" (")[0].partition(":")[0])
    while "NN" in words:
        words = words.replace("NN", "N")
    return words


def most_common(skipped: Sequence[Sequence[str]]) -> str:
    """The two most common reasons, each as the first sample has it."""
    counts = Counter(kind_of(row[2]) for row in skipped).most_common(2)
    shown = [f"{count} times: {next(r[2] for r in skipped if kind_of(r[2]) == kind)}" for kind, count in counts]
    return "; ".join(shown) or "the corpus has no samples"


# --- 1. read ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _corpus(path: str, shard: int) -> list[Shard]:
    return open_corpus(Path(path), shard)


@dataclass(frozen=True)
class _Square:
    """A sample as it goes into pairs: its picture cut to the square, and as the bytes that are kept of it."""

    key: str
    caption: str
    image: Image.Image
    data: bytes
    masks: Mapping[str, bytes]


def read_shard(settings: Settings, number: int, tell: Callable[[float], object] = lambda share: None) -> None:
    """Stage 1 of one shard: work/read-00000.bin (pictures and masks), .parquet (a row for each), .json (written last)."""
    import pyarrow as pa
    from pyarrow import parquet

    _prepare(settings)
    clip = pair_models.load(settings.clip, "clip", settings.device)
    captioner = None if settings.captions == OWN else pair_models.load(settings.captions, "captions", settings.device)
    shard = _corpus(settings.corpus, settings.shard)[number]
    rows: list[dict[str, Any]] = []
    skipped: list[tuple[str, str, str]] = []
    whole = hashlib.sha256()

    def squares() -> Iterator[_Square]:
        for done, sample in enumerate(shard):
            tell(done / max(1, shard.size))
            try:
                yield _square(settings, sample)
            except UsageError as error:
                skipped.append((sample.key, "read", str(error)))

    with open_whole(settings.work / f"read-{number:05d}.bin") as file:
        for batch in _batched(squares(), settings.batch):
            images = [s.image for s in batch]
            captions = [s.caption for s in batch] if captioner is None else captioner.captions(images)
            for square, caption, embedding in zip(batch, captions, clip.images(images), strict=True):
                if not caption:
                    skipped.append((square.key, "read", "no caption"))
                    continue
                kept = {"": square.data, **square.masks}
                places = {}
                for label, data in kept.items():
                    places[label] = (file.tell(), len(data))
                    file.write(data)
                    whole.update(data)
                whole.update(f"{square.key!a} {caption!a} {[*kept]!a} {[len(d) for d in kept.values()]}".encode())
                rows.append({"key": square.key, "caption": caption, "embedding": embedding.tolist(), "labels": [*places],
                             "offsets": [o for o, _ in places.values()], "lengths": [n for _, n in places.values()]})  # fmt: skip
    schema = pa.schema([
        ("key", pa.string()), ("caption", pa.string()), ("embedding", pa.list_(pa.float32())), ("labels", pa.list_(pa.string())),
        ("offsets", pa.list_(pa.int64())), ("lengths", pa.list_(pa.int64())),
    ])  # fmt: skip
    with open_whole(settings.work / f"read-{number:05d}.parquet") as file:
        parquet.write_table(pa.Table.from_pylist(rows, schema), file)
    _write_result(
        settings,
        "read",
        number,
        rows=len(rows),
        masks=sum(len(r["labels"]) - 1 for r in rows),
        skipped=skipped,
        digest=whole.hexdigest(),
    )


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    source = iter(items)
    while batch := list(itertools.islice(source, size)):
        yield batch


def _square(settings: Settings, sample: Sample | Skipped) -> _Square:
    """A sample cut to the square.

    Raises:
        UsageError: it cannot be used, and why.
    """
    if isinstance(sample, Skipped):
        raise UsageError(sample.reason)
    if settings.captions == OWN and not sample.caption:
        raise UsageError("no caption")
    image, size = sample.image, settings.size
    if min(image.size) < size:
        raise UsageError(f"picture is smaller than --size ({image.width}x{image.height}, {size} is wanted)")
    masks = {}
    if settings.masks == OWN:
        for label, data in sample.masks.items():
            masks[label] = _png(_cut(_own_mask(label, data, image.size), size).point(lambda v: 255 if v > 127 else 0))
    square = _cut(image, size)
    return _Square(sample.key, sample.caption, square, _kept(sample.data, square), masks)


def _cut(image: Image.Image, size: int) -> Image.Image:
    """The middle square, at `size` pixels."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if side == size:
        return image.crop((left, top, left + side, top + side))
    return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))


def _own_mask(label: str, data: bytes, size: tuple[int, int]) -> Image.Image:
    try:
        mask = Image.open(io.BytesIO(data))
        if mask.size != size:
            raise UsageError(f"mask {label} is {mask.width}x{mask.height}, its picture {size[0]}x{size[1]}")
        return mask.convert("L")
    except UsageError:
        raise
    except Exception as error:  # Pillow's plugins raise what they like on damaged files
        raise UsageError(f"mask {label} cannot be read ({type(error).__name__})") from error


def _kept(data: bytes, square: Image.Image) -> bytes:
    """The bytes that a picture is kept as: its own, if they are this square's; else a PNG if it was one, or a JPEG."""
    is_png = data.startswith(b"\x89PNG")
    with Image.open(io.BytesIO(data)) as file:
        same = file.size == square.size and file.mode == "RGB" and not file.getexif()
        if same and file.format in ("PNG", "JPEG") and "transparency" not in file.info:
            return data
    held = io.BytesIO()
    if is_png:
        return _png(square)
    square.save(held, "JPEG", quality=95, subsampling=0)
    return held.getvalue()


def _png(image: Image.Image) -> bytes:
    held = io.BytesIO()
    image.save(held, "PNG")
    return held.getvalue()


# --- 2. index -----------------------------------------------------------------------------------------------------


def make_index(settings: Settings, number: int = 0, tell: Callable[[float], object] = lambda share: None) -> None:
    """Stage 2: work/embeddings.npy, vocabulary.txt, index.faiss (of a large corpus), index-00000.json (written last)."""
    from pyarrow import parquet

    _prepare(settings)
    count = len(_corpus(settings.corpus, settings.shard))
    read = [result(settings, "read", i) for i in range(count)]
    total = sum(r["rows"] for r in read)
    if total < 2:
        skipped = [row for r in read for row in r["skipped"]]
        why = most_common(skipped) if skipped or not total else "a pseudo-target needs another picture"
        hint = "; describe them with --captions CHECKPOINT" if "no caption" in why else ""
        raise UsageError(f"corpus: {total} of {total + len(skipped)} pictures can be used; {why}{hint}")
    if settings.masks == OWN and not any(r["masks"] for r in read):
        raise UsageError(
            f"masks: {settings.corpus} brings none (NAME.LABEL.mask.png beside its pictures); give --masks a CLIPSeg checkpoint"
        )
    captions: list[str] = []
    embeddings: list[np.ndarray] = []
    for i in range(count):
        if read[i]["rows"]:
            table = parquet.read_table(settings.work / f"read-{i:05d}.parquet", columns=["caption", "embedding"])
            captions += table["caption"].to_pylist()
            embeddings.append(np.array(table["embedding"].combine_chunks().flatten()).reshape(len(table), -1))
        tell(0.2 * (i + 1) / count)
    vectors = np.concatenate(embeddings)
    write_whole(settings.work / "vocabulary.txt", "\n".join(sorted(vocabulary_of(captions))).encode())
    with open_whole(settings.work / "embeddings.npy") as file:
        np.save(file, vectors)
    found: dict[str, Any] = {"kind": "flat", "vectors": total}
    if total >= settings.flat_below:
        found |= _make_ivf(settings, vectors, captions, tell)
    digest = hashlib.sha256("".join(r["digest"] for r in read).encode()).hexdigest()
    _write_result(settings, "index", number, **found, samples=digest)


def _make_ivf(
    settings: Settings, vectors: np.ndarray, captions: Sequence[str], tell: Callable[[float], object]
) -> dict[str, Any]:
    """Write an IVF-PQ index of the embeddings, and measure how often it finds the pseudo-target that an exact search finds."""
    import faiss

    total, width = vectors.shape
    lists = max(1, min(int(4 * total**0.5), total // 39))  # faiss wants 39 vectors for each
    parts = max(m for m in range(1, width // 4 + 1) if width % m == 0)
    bits = 8 if total >= 39 * 256 else 4
    index = faiss.IndexIVFPQ(faiss.IndexFlatIP(width), width, lists, parts, bits, faiss.METRIC_INNER_PRODUCT)
    index.nprobe = min(lists, LISTS)
    wanted = max(64 * lists, 256 << bits)
    index.train(vectors[:: max(1, total // wanted)])
    for start in range(0, total, 1 << 16):
        tell(0.6 + 0.3 * start / total)
        index.add(vectors[start : start + (1 << 16)])
    tell(0.9)
    write_whole(settings.work / "index.faiss", faiss.serialize_index(index).tobytes())
    sample = [int(i) for i in np.linspace(0, total - 1, min(QUERIES, total))]
    prompts = _edit_prompts(settings)
    made = [(i, p.prompt) for i in sample if (p := prompts.make(captions[i], settings.seed)) is not None]
    if not made:
        return {"kind": "ivf-pq", "recall": None}
    sources, texts = [i for i, _ in made], [t for _, t in made]
    queries = _combined(vectors[sources], _embed(settings, texts))
    exact = []
    for number, query in zip(sources, queries, strict=True):
        scores = np.where(vectors @ vectors[number] < settings.duplicate, vectors @ query, -np.inf)
        scores[number] = -np.inf
        exact.append([int(scores.argmax())] if scores.max() > -np.inf else [])
    near = _neighbours(index, queries, NEIGHBOURS, vectors)
    found = [_targets(settings, i, q, n, vectors, 1) for i, q, n in zip(sources, queries, near, strict=True)]
    return {"kind": "ivf-pq", "recall": round(sum(a == b for a, b in zip(exact, found, strict=True)) / len(made), 4)}


def _embed(settings: Settings, texts: Sequence[str]) -> np.ndarray:
    clip = pair_models.load(settings.clip, "clip", settings.device)
    return np.concatenate([clip.texts(batch) for batch in _batched(texts, settings.batch)])


def _combined(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """The mean of two embeddings of length 1, at length 1 again."""
    mean = images + texts
    return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)


def _neighbours(index: Any, queries: np.ndarray, count: int, vectors: np.ndarray) -> list[np.ndarray]:
    """For each query the numbers of its neighbours, the nearest first by the exact product."""
    _, numbers = index.search(np.ascontiguousarray(queries), min(count, len(vectors)))
    ordered = []
    for query, found in zip(queries, numbers, strict=True):
        found = np.sort(found[found >= 0])
        ordered.append(found[np.argsort(-(vectors[found] @ query), kind="stable")])
    return ordered


def _targets(
    settings: Settings, source: int, query: np.ndarray, near: np.ndarray, vectors: np.ndarray, count: int
) -> list[int]:
    """The first `count` neighbours that are neither the source nor its near-duplicates."""
    found: list[int] = []
    for number in near:
        if number != source and float(vectors[number] @ vectors[source]) < settings.duplicate:
            found.append(int(number))
            if len(found) == count:
                break
    return found


# --- 3. pair ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _words(wordnet: str, vocabulary: Path) -> EditPrompts:
    return EditPrompts(WordNet(Path(wordnet)), frozenset(vocabulary.read_text().split("\n")))


def _edit_prompts(settings: Settings) -> EditPrompts:
    return _words(settings.wordnet, settings.work / "vocabulary.txt")


class _Samples:
    """All samples that were read, by their number: rows of stage 1 and what lies in its .bin files."""

    def __init__(self, settings: Settings, count: int):
        import faiss

        self.work = settings.work
        self.vectors = np.load(self.work / "embeddings.npy", mmap_mode="r")
        self.starts = np.cumsum([0, *(result(settings, "read", i)["rows"] for i in range(count))])
        self._table = functools.lru_cache(maxsize=256)(self._read_table)
        if (self.work / "index.faiss").is_file():
            self.index = faiss.deserialize_index(np.fromfile(self.work / "index.faiss", np.uint8))
        else:
            self.index = faiss.IndexFlatIP(self.vectors.shape[1])
            self.index.add(np.ascontiguousarray(self.vectors))

    def _read_table(self, shard: int) -> Any:
        from pyarrow import parquet

        columns = ["key", "caption", "labels", "offsets", "lengths"]
        return parquet.read_table(self.work / f"read-{shard:05d}.parquet", columns=columns)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The row of a sample, and which shard it is of."""
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        row: dict[str, Any] = self._table(shard).slice(number - int(self.starts[shard]), 1).to_pylist()[0]
        return row | {"shard": shard}

    def blob(self, row: Mapping[str, Any], label: str = "") -> bytes:
        """A picture's bytes, or those of its mask with this label."""
        i = row["labels"].index(label)
        with (self.work / f"read-{row['shard']:05d}.bin").open("rb") as file:
            file.seek(row["offsets"][i])
            return file.read(row["lengths"][i])


@functools.lru_cache(maxsize=1)
def _samples(settings: Settings) -> _Samples:
    return _Samples(settings, len(_corpus(settings.corpus, settings.shard)))


@dataclass
class _Open:
    """A pair in the making."""

    number: int
    row: dict[str, Any]
    prompt: EditPrompt
    query: np.ndarray
    text: np.ndarray
    targets: list[int]
    source_mask: np.ndarray | None = None
    target_mask: np.ndarray | None = None
    reason: str = ""


def pair_shard(settings: Settings, number: int, tell: Callable[[float], object] = lambda share: None) -> None:
    """Stage 3 of one shard: the files of `pairs.write_shard` in OUT, and work/pair-00000.json (written last)."""
    _prepare(settings)
    samples = _samples(settings)
    first, last = int(samples.starts[number]), int(samples.starts[number + 1])
    skipped: list[tuple[str, str, str]] = []

    def made() -> Iterator[tuple[Row, bytes, bytes, np.ndarray, np.ndarray]]:
        count = 0
        for chunk in _batched(range(first, last), CHUNK * settings.batch):
            for one in _pairs_of(settings, samples, chunk):
                if isinstance(one, Skipped):
                    skipped.append((one.key, "pair", one.reason))
                    continue
                row, target = _row(f"{number:05d}{count:05d}", one, samples)
                count += 1
                assert one.source_mask is not None and one.target_mask is not None
                yield row, samples.blob(one.row), samples.blob(target), one.source_mask, one.target_mask
            tell((chunk[-1] + 1 - first) / (last - first))

    files = pairs.write_shard(Path(settings.out), f"pairs-{number:05d}", made())
    _write_result(settings, "pair", number, files=files and dataclasses.asdict(files), skipped=skipped)


def _pairs_of(settings: Settings, samples: _Samples, numbers: Sequence[int]) -> list[_Open | Skipped]:
    """What becomes of some samples, in their order."""
    rows = {n: samples[n] for n in numbers}
    prompts = {n: p for n in numbers if (p := _edit_prompts(settings).make(rows[n]["caption"], settings.seed))}
    lost = {n: "no word of the caption can be replaced" for n in numbers if n not in prompts}
    opened: dict[int, _Open] = {}
    if prompts:
        vectors = samples.vectors
        texts = _embed(settings, [p.prompt for p in prompts.values()])
        queries = _combined(vectors[list(prompts)], texts)
        near = _neighbours(samples.index, queries, NEIGHBOURS, vectors)
        for n, text, query, found in zip(prompts, texts, queries, near, strict=True):
            targets = _targets(settings, n, query, found, vectors, settings.candidates)
            if targets:
                opened[n] = _Open(n, rows[n], prompts[n], query, text, targets)
            else:
                lost[n] = f"all {len(found)} neighbours are near-duplicates"
    _find_masks(settings, samples, list(opened.values()))
    return [
        Skipped(rows[n]["key"], lost.get(n) or opened[n].reason) if n in lost or opened[n].reason else opened[n]
        for n in numbers
    ]


def _find_masks(settings: Settings, samples: _Samples, opened: Sequence[_Open]) -> None:
    """Masks of the sources, then of the first target of each in which the new word is seen; or the reason why there are none."""
    wanted = [(o.row, o.prompt.differences[0]) for o in opened]
    for one, mask in zip(opened, _masks(settings, samples, wanted), strict=True):
        one.source_mask, one.reason = mask, _unfit(mask, "source")
        one.reason += f" (“{one.prompt.differences[0]}”)" if one.reason else ""
    left = [o for o in opened if not o.reason]
    for attempt in range(settings.candidates):
        left = [o for o in left if attempt < len(o.targets)]
        wanted = [(samples[o.targets[attempt]], o.prompt.differences[1]) for o in left]
        for one, mask in zip(left, _masks(settings, samples, wanted), strict=True):
            one.target_mask, one.reason = mask, _unfit(mask, "pseudo-target")
            one.reason += (
                f" ({samples[one.targets[attempt]]['key']}, “{one.prompt.differences[1]}”)" if one.reason else ""
            )
            if not one.reason:
                one.targets = one.targets[attempt : attempt + 1]
        left = [o for o in left if o.reason]


def _unfit(mask: np.ndarray, whose: str) -> str:
    """Why a mask is of no use, or ""."""
    for one, where in ((mask, ""), (pairs.latent_mask(mask), " at the latent's resolution")):
        if not one.any():
            return f"the {whose}'s mask is empty{where}"
        if one.all():
            return f"the {whose}'s mask covers everything{where}"
    return ""


def _masks(settings: Settings, samples: _Samples, wanted: Sequence[tuple[dict[str, Any], str]]) -> Iterator[np.ndarray]:
    """The mask of each sample for a difference prompt."""
    if settings.masks == OWN:
        for row, text in wanted:
            yield _labelled(settings, samples, row, text)
        return
    segmenter = pair_models.load(settings.masks, "masks", settings.device)
    for batch in _batched(wanted, settings.batch):
        pictures = [Image.open(io.BytesIO(samples.blob(row))).convert("RGB") for row, _ in batch]
        yield from segmenter.masks(pictures, [text for _, text in batch], settings.mask_threshold)


def _labelled(settings: Settings, samples: _Samples, row: Mapping[str, Any], text: str) -> np.ndarray:
    """The corpus' own masks whose labels have all words of a text, together."""
    singular = _edit_prompts(settings).wordnet.singular
    words = [{w, singular(w) or w} for w in text.split()]
    mask = np.zeros((settings.size, settings.size), bool)
    for label in row["labels"]:
        if label and all(w & set(label.lower().split("-")) for w in words):
            mask |= np.asarray(Image.open(io.BytesIO(samples.blob(row, label)))) > 127
    return mask


def _row(key: str, one: _Open, samples: _Samples) -> tuple[Row, dict[str, Any]]:
    """A pair's row, and its target's of stage 1."""
    (number,) = one.targets
    target, vectors, prompt = samples[number], samples.vectors, one.prompt
    assert one.source_mask is not None and one.target_mask is not None
    cells = [pairs.latent_mask(m) for m in (one.source_mask, one.target_mask)]
    row = Row(
        key=key,
        source_key=one.row["key"],
        target_key=target["key"],
        source_caption=prompt.caption,
        edit_prompt=prompt.prompt,
        word=prompt.word,
        replacement=prompt.replacement,
        relation=prompt.relation,
        source_difference=prompt.differences[0],
        target_difference=prompt.differences[1],
        similarity=round(float(vectors[number] @ one.query), 6),
        image_similarity=round(float(vectors[number] @ vectors[one.number]), 6),
        text_similarity=round(float(vectors[number] @ one.text), 6),
        source_share=round(float(one.source_mask.mean()), 6),
        target_share=round(float(one.target_mask.mean()), 6),
        source_latent_share=round(float(cells[0].mean()), 6),
        target_latent_share=round(float(cells[1].mean()), 6),
        source_cells=pairs.pack_cells(cells[0]),
        target_cells=pairs.pack_cells(cells[1]),
    )
    return row, target
