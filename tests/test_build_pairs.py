"""Pairs are what section 3.1 of iEdit says, the same bytes however they were made, and what goes wrong is one line and loses nothing."""

from __future__ import annotations

import csv
import fcntl
import importlib.util
import io
import multiprocessing
import os
import resource
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from iedit.runtime.cli.main import main
from iedit.runtime.errors import RunError, UsageError
from iedit.training import demo_corpus, pair_models, pair_stages
from iedit.training.build_pairs import Settings, build
from iedit.training.corpus import Sample, open_corpus
from iedit.training.edit_prompts import EditPrompts, vocabulary_of
from iedit.training.pairs import MANIFEST, SKIPPED, read_manifest, read_pairs
from iedit.training.wordnet import WordNet

RENDERS, SHARD = 60, 20


def as_png(image: Image.Image) -> bytes:
    held = io.BytesIO()
    image.save(held, "PNG")
    return held.getvalue()


GREY = as_png(Image.new("RGB", (128, 128), "grey"))
BAD = {"a.png": b"no picture", "a.txt": b"a red car", "b.png": GREY[: len(GREY) // 2], "b.txt": b"a red car", "c.png": GREY, "d.txt": b"a red car",
       "e.png": GREY, "e.txt": b"a red car", "e.red-car.mask.png": as_png(Image.new("L", (64, 128))), "f.png": GREY,
       "f.txt": b"a red car", "f.red-car.mask.png": b"no mask"}  # fmt: skip


def module_beside(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus of renders in three tars, a WordNet, and the pairs that were made of them."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_corpus, "SHARD", SHARD)
        demo_corpus.write_renders(folder / "renders", RENDERS)
    with tarfile.open(folder / "renders" / "00003.tar", "w") as tar:
        for name, data in BAD.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    module_beside("small_wordnet").write(folder / "wordnet")
    build(settings(folder))
    return folder


def settings(folder: Path, **more: Any) -> Settings:
    values: dict[str, Any] = {"corpus": str(folder / "renders"), "out": str(folder / "pairs"), "wordnet": str(folder / "wordnet"),
                              "clip": "picturebook", "masks": "own", "size": 128, "candidates": 8, "batch": 8}  # fmt: skip
    return Settings(**(values | more))


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def samples_of(corpus: Path) -> list[Sample]:
    return [s for shard in open_corpus(corpus) for s in shard if isinstance(s, Sample)]


# --- what they are ------------------------------------------------------------------------------------------------


def test_every_pair_is_what_the_paper_says_found_by_brute_force(world: Path) -> None:
    samples = samples_of(world / "renders")
    samples = [s for s in samples if s.key.isdigit()]
    assert len(samples) == RENDERS
    data, asked = read_pairs(world / "pairs"), settings(world)
    clip = pair_models.load("picturebook", "clip", "cpu")
    images = clip.images([s.image for s in samples])
    prompts = EditPrompts(WordNet(world / "wordnet"), vocabulary_of(s.caption for s in samples))
    rows = {data.row(i).source_key: (i, data.row(i)) for i in range(len(data))}
    assert len(rows) == len(data) > 10
    for n, source in enumerate(samples):
        edit = prompts.make(source.caption, asked.seed)
        if edit is None:
            assert source.key not in rows
            continue
        mean = images[n] + clip.texts([edit.prompt])[0]
        query = mean / np.linalg.norm(mean)
        order = sorted((j for j in range(RENDERS) if j != n and images[n] @ images[j] < asked.duplicate),
                       key=lambda j: -float(images[j] @ query))  # fmt: skip

        def mask(sample: Sample, text: str) -> np.ndarray:
            found = np.zeros((128, 128), bool)
            for label, held in sample.masks.items():
                if set(text.split()) <= set(label.split("-")):
                    found |= np.asarray(Image.open(io.BytesIO(held))) > 127
            return found

        good = [j for j in order[: asked.candidates] if mask(samples[j], edit.differences[1]).any()]
        if not good:
            assert source.key not in rows
            continue
        i, row = rows[source.key]
        pair, target = data[i], samples[good[0]]
        assert (row.target_key, row.edit_prompt, row.word, row.replacement) == (
            target.key, edit.prompt, edit.word, edit.replacement,
        )  # fmt: skip
        assert pair.source.tobytes() == source.image.tobytes() and pair.target.tobytes() == target.image.tobytes()
        assert (pair.source_mask == mask(source, edit.differences[0])).all()
        assert (pair.target_mask == mask(target, edit.differences[1])).all()
        assert abs(row.similarity - float(images[good[0]] @ query)) < 1e-5
        assert abs(row.image_similarity - float(images[good[0]] @ images[n])) < 1e-5
        assert abs(row.text_similarity - float(images[good[0]] @ clip.texts([edit.prompt])[0])) < 1e-5
        assert abs(row.source_share - pair.source_mask.mean()) < 1e-6
        assert abs(row.target_latent_share - pair.target_latent_mask.mean()) < 1e-6


def test_a_build_leaves_its_process_as_it_was(world: Path, tmp_path: Path) -> None:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        build(settings(world, out=str(tmp_path / "pairs")))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert pair_models.load.cache_info().currsize == 0  # networks are gone


def test_the_manifest_accounts_for_every_sample(world: Path) -> None:
    manifest = read_manifest(world / "pairs")
    assert manifest.samples == RENDERS and manifest.pairs + sum(manifest.skipped.values()) == RENDERS + 6
    with (world / "pairs" / SKIPPED).open(newline="") as file:
        skipped = list(csv.DictReader(file))
    assert {r["key"]: r["reason"] for r in skipped if r["stage"] == "read"} == {
        "a": "not a picture that can be read (of no known format)",
        "b": "not a picture that can be read (image file is truncated)",
        "c": "no caption",
        "d": "no picture among .txt",
        "e": "mask red-car is 64x128, its picture 128x128",
        "f": "mask red-car cannot be read (UnidentifiedImageError)",
    }
    kinds = {"no word of the caption can be replaced", "the pseudo-target's mask is empty"}
    assert len(skipped) == sum(manifest.skipped.values()) and kinds < set(manifest.skipped)
    assert manifest.index == {"kind": "flat", "vectors": RENDERS} and manifest.settings["masks"] == "own"
    assert set(manifest.digests) == {"corpus", "samples", "wordnet", "clip"}
    assert not (world / "pairs" / "work").exists()


def test_a_seed_decides_the_prompts_and_a_threshold_who_is_a_duplicate(world: Path, tmp_path: Path) -> None:
    build(settings(world, out=str(tmp_path / "seed"), seed=1))
    rows = [[(r.row(i).source_key, r.row(i).edit_prompt) for i in range(len(r))]
            for r in (read_pairs(world / "pairs"), read_pairs(tmp_path / "seed"))]  # fmt: skip
    assert rows[0] != rows[1]
    build(settings(world, out=str(tmp_path / "strict"), duplicate=0.6))
    data = read_pairs(tmp_path / "strict")
    assert len(data) and all(data.row(i).image_similarity < 0.6 for i in range(len(data)))
    with pytest.raises(RunError, match=r"not one pair was found; .* times: all \d+ neighbours are near-duplicates"):
        build(settings(world, out=str(tmp_path / "none"), duplicate=-1.0))


def test_a_large_corpus_is_searched_by_ivf_pq_and_its_recall_is_measured(world: Path, tmp_path: Path) -> None:
    found = build(settings(world, out=str(tmp_path / "ivf"), flat_below=0))
    # All 60 are among the neighbours that are looked at, which are put into order exactly.
    assert found.index == {"kind": "ivf-pq", "recall": 1.0, "vectors": RENDERS}
    assert [s.tar for s in found.shards] == [s.tar for s in read_manifest(world / "pairs").shards]


def test_the_recall_is_of_the_index_against_an_exact_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss

    rng = np.random.default_rng(0)
    vectors, texts = (rng.standard_normal((n, 32)).astype(np.float32) for n in (4000, 256))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)

    class Prompts:
        @staticmethod
        def make(caption: str, seed: int) -> Any:
            return type("Edit", (), {"prompt": caption})

    monkeypatch.setattr(pair_stages, "_edit_prompts", lambda s: Prompts)
    monkeypatch.setattr(pair_stages, "_embed", lambda s, some: texts[: len(some)])
    asked = Settings("", str(tmp_path), "", duplicate=0.9)
    asked.work.mkdir()
    made = pair_stages._make_ivf(asked, vectors, ["x"] * len(vectors), lambda share: None)
    index = faiss.deserialize_index(np.fromfile(asked.work / "index.faiss", np.uint8))
    assert isinstance(faiss.downcast_index(index), faiss.IndexIVFPQ) and index.ntotal == len(vectors)
    hits = 0
    numbers = np.linspace(0, len(vectors) - 1, 256).astype(int)
    for n, text in zip(numbers, texts, strict=True):
        query = ((vectors[n] + text) / np.linalg.norm(vectors[n] + text)).astype(np.float32)
        exact = vectors @ query
        exact[vectors @ vectors[n] >= 0.9] = -2
        near = index.search(query[None], 64)[1][0]
        near = [j for j in near if j >= 0 and vectors[j] @ vectors[n] < 0.9]
        hits += bool(near) and exact.argmax() == max(near, key=lambda j: exact[j])
    assert 0.2 < made["recall"] < 1 and abs(made["recall"] - hits / 256) < 0.005


# --- the same bytes -----------------------------------------------------------------------------------------------


def killed_in(stage: str, asked: Settings) -> None:
    """Build, and be killed in the second shard of a stage."""

    def tell(now: str, done: float, of: int) -> None:
        if now == stage and done > 1.2:
            os.kill(os.getpid(), signal.SIGKILL)

    build(asked, tell=tell)


@pytest.mark.parametrize("stage", ["read", "pair"])
def test_kill_9_loses_the_shard_in_flight_and_the_bytes_are_the_same(world: Path, tmp_path: Path, stage: str) -> None:
    out = tmp_path / "pairs"
    asked = settings(world, out=str(out))
    process = multiprocessing.get_context("fork").Process(target=killed_in, args=(stage, asked))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    first = out / "work" / "read-00000.json" if stage == "read" else out / "pairs-00000.tar"
    second = out / "work" / "read-00001.json" if stage == "read" else out / "work" / "pair-00001.json"
    assert first.is_file() and not second.exists() and not (out / MANIFEST).exists()
    assert list(out.rglob(".*.tmp"))  # what was being written
    with pytest.raises(UsageError, match=r"manifest.json is not there; .* or run it again"):
        read_pairs(out)
    before, told = first.stat().st_ino, list[tuple[str, float]]()
    build(asked, tell=lambda stage, done, of: told.append((stage, done)))
    assert (stage, 1) in told and (stage, 0) not in told
    assert not first.exists() or first.stat().st_ino == before
    assert content(out) == content(world / "pairs")
    assert build(asked) == read_manifest(out)  # finished: nothing is done again


@pytest.mark.slow
def test_ray_gives_the_same_bytes(world: Path, tmp_path: Path) -> None:
    build(settings(world, out=str(tmp_path / "pairs")), ray="local")
    assert content(tmp_path / "pairs") == content(world / "pairs")
    (tmp_path / "bad").mkdir()
    shutil.copy(world / "renders" / "00003.tar", tmp_path / "bad")
    with pytest.raises(UsageError, match="0 of 6 pictures can be used; 2 times: "):  # raised in a worker
        build(settings(world, corpus=str(tmp_path / "bad"), out=str(tmp_path / "none")), ray="local")
    with pytest.raises(UsageError, match="a shard wants 4096 cores, this machine has"):
        build(settings(world, out=str(tmp_path / "none2"), threads=4096), ray="local")


# --- what goes wrong ----------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path, world: Path) -> Path:
    """A folder of pictures with captions, of which some are of no use."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for n, sample in enumerate(samples_of(world / "renders")[:24]):
        image = sample.image.resize((160, 128)) if n % 2 else sample.image
        image.save(folder / f"{n:03d}.{'jpg' if n % 3 else 'png'}", quality=90)
        (folder / f"{n:03d}.txt").write_text(sample.caption)
    (folder / "004.jpg").write_bytes((folder / "004.jpg").read_bytes()[:-400])
    (folder / "005.txt").unlink()
    (folder / "006.png").write_text("no picture")
    Image.new("RGB", (100, 200)).save(folder / "007.jpg")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small, folder = module_beside("small_models"), tmp_path_factory.mktemp("models")
    for name in ("clip", "clipseg", "blip"):
        getattr(small, name)(folder / name)
    return folder


def call(*words: Any) -> Result:
    return CliRunner().invoke(main, ["train", "pairs", *map(str, words)])


def test_blip_clip_and_clipseg_make_pairs_of_photographs_and_what_is_bad_is_listed(
    photos: Path, world: Path, models: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pairs"
    words = [photos, "--out", out, "--wordnet", world / "wordnet", "--size", "128", "--shard", "10", "--batch", "4", "--captions",
             models / "blip", "--clip", models / "clip", "--masks", models / "clipseg", "--mask-threshold", "0.48", "--duplicate",
             "0.9999", "--candidates", "8", "--show", "3"]  # fmt: skip
    result = call(*words)
    assert result.exit_code == 0, result.output
    data = read_pairs(out)
    assert f"{out}: {len(data)} pairs of 21 pictures" in result.stdout.replace("\n", "")
    assert "skipped 2: not a picture that can be read" in result.stdout
    assert Image.open(out / "sheet.png").width > 900
    with (out / SKIPPED).open(newline="") as file:
        reasons = {r["key"]: r["reason"] for r in csv.DictReader(file) if r["stage"] == "read"}
    assert set(reasons) == {"004.jpg", "006.png", "007.jpg"}  # 005 has no caption, and is given one
    assert reasons["007.jpg"] == "picture is smaller than --size (100x200, 128 is wanted)"
    captioner, segmenter = (
        pair_models.load(str(models / n), p, "cpu") for n, p in (("blip", "captions"), ("clipseg", "masks"))
    )
    assert len(data) > 3
    for pair in data:
        assert pair.source.size == pair.target.size == (128, 128)
        texts = list(pair.difference_prompts)
        for mask, expected in zip(
            (pair.source_mask, pair.target_mask), segmenter.masks([pair.source, pair.target], texts, 0.48)
        ):
            assert (mask == expected).mean() > 0.999 and 0 < mask.mean() < 1
        if pair.row.source_key.endswith("png"):  # a JPEG was captioned before it was cut and written again
            assert pair.source_caption == captioner.captions([pair.source])[0]
    settled = read_manifest(out).settings
    assert (settled["captions"], settled["clip"], settled["masks"]) == ("blip", "clip", "clipseg")  # no folders
    again = call(*words[:-2])
    assert again.exit_code == 0 and f"{len(data)} pairs" in again.stdout
    shown = call(out, "--show", "500")
    assert shown.exit_code == 0 and shown.stdout.strip() == str(out / "sheet.png")


def test_a_picture_that_needs_no_change_keeps_its_bytes(
    photos: Path, world: Path, models: Path, tmp_path: Path
) -> None:
    asked = settings(world, corpus=str(photos), out=str(tmp_path / "out"), clip=str(models / "clip"), masks=str(models / "clipseg"),
                     mask_threshold=0.48, duplicate=2.0)  # fmt: skip
    build(asked)
    data = read_pairs(tmp_path / "out")
    kept = 0
    for i in range(len(data)):
        row = data.row(i)
        with tarfile.open(tmp_path / "out" / f"{data.manifest.shards[0].name}.tar") as tar:
            (name,) = [n for n in tar.getnames() if n.startswith(f"{row.key}.source.")]
            held = tar.extractfile(name)
            assert held is not None
            same = held.read() == (photos / row.source_key).read_bytes()
        assert same == (int(row.source_key[:3]) % 2 == 0) and name[-3:] == row.source_key[-3:]
        kept += same
    assert kept


@pytest.fixture
def refuse(world: Path, models: Path, tmp_path: Path) -> Iterator[Callable[..., str]]:
    def check(*words: str | Path, says: str, code: int = 2) -> None:
        result = call(
            *words, "--wordnet", world / "wordnet", "--clip", models / "clip", "--masks", "own", "--size", "128"
        )
        lines = [
            line
            for line in result.stderr.splitlines()
            if not line.startswith(("loading", "reading", "indexing", "pairing", "Usage", "Try"))
        ]
        assert result.exit_code == code and len([*filter(None, lines)]) == 1 and says in lines[-1], result.output

    yield check  # type: ignore[misc]


def test_bad_input_is_one_line(refuse: Any, world: Path, models: Path, photos: Path, tmp_path: Path) -> None:
    renders, out = world / "renders", tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    refuse(tmp_path / "gone", "--out", out, says="gone is not there; name a folder of pictures")
    refuse(empty, "--out", out, says="holds no pictures")
    refuse(renders, says="--out is missing: name the folder that the pairs go to")
    refuse(world / "pairs", says="holds finished pairs; --show N writes a sheet of them")
    refuse(renders, "--out", out, "--captions", models / "clip", says="expected an image-to-text model")
    refuse(renders, "--out", photos, says="holds 000.png, which is not of pairs; choose an empty folder")
    refuse(renders, "--out", photos / "000.png", says="000.png")
    refuse(renders, "--out", world / "pairs", says="holds pairs of clip (picturebook, now clip); candidates (8, now 1)")
    refuse(renders, "--out", renders / "pairs", says="lies in the corpus, which it would become a part of")
    refuse(renders, "--out", tmp_path / "gpu", "--device", "cuda:97", says="device: cuda:97 cannot be used")
    damaged = shutil.copytree(tmp_path / "gpu", tmp_path / "damaged")
    (damaged / "work" / "settings.json").write_text("{")
    refuse(renders, "--out", damaged, says="settings.json is damaged")
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(photos / "000.png", one)
    shutil.copy(photos / "000.txt", one)
    refuse(one, "--out", tmp_path / "of-one", says="1 of 1 pictures can be used; a pseudo-target needs another picture")
    words = shutil.copytree(world / "wordnet", tmp_path / "words")
    (words / "index.noun").write_text("nonsense\n")
    result = call(renders, "--out", out, "--wordnet", words, "--clip", "picturebook", "--masks", "own")
    assert result.exit_code == 2 and "index.noun holds a line of another format: 'nonsense" in result.stderr
    refuse(
        photos,
        "--out",
        tmp_path / "bare",
        says="photos brings none (NAME.LABEL.mask.png beside its pictures); give --masks",
    )
    for file in photos.glob("*.txt"):
        file.unlink()
    refuse(
        photos,
        "--out",
        out,
        says="0 of 24 pictures can be used; 22 times: no caption; 2 times: not a picture that can be read (image file is truncated",
    )
    assert (out / "work").is_dir() and not (out / MANIFEST).exists()
    bare = [world / "renders", "--out", tmp_path / "barer", "--clip", models / "clip", "--masks", "own"]
    result = call(*bare, "--size", "128", "--wordnet", empty)
    assert result.exit_code == 2 and "apt-get install wordnet-base" in result.stderr
    result = call(*bare, "--size", "132", "--wordnet", world / "wordnet")
    assert result.exit_code == 2 and "size: 132 is no multiple of 8" in result.stderr
    result = call(*bare, "--size", "256", "--wordnet", world / "wordnet")
    assert (
        result.exit_code == 2
        and "0 of 66 pictures can be used; 62 times: picture is smaller than --size (128x128, 256 is wanted)"
        in result.stderr
    )


def test_another_corpus_or_a_second_run_is_refused(world: Path, tmp_path: Path) -> None:
    renders = shutil.copytree(world / "renders", tmp_path / "renders")
    asked = settings(world, corpus=str(renders), out=str(tmp_path / "out"))
    handle = os.open(tmp_path, os.O_RDONLY)
    (tmp_path / "out").mkdir()
    handle = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match="another command is building pairs in"):
        build(asked)
    os.close(handle)
    build(asked)
    assert content(tmp_path / "out") == content(world / "pairs")  # a copy of a corpus is the same corpus
    (renders / "00002.tar").unlink()
    before = content(tmp_path / "out")
    with pytest.raises(
        UsageError, match="holds pairs of another corpus, or the corpus has changed; choose another folder"
    ):
        build(asked)
    assert content(tmp_path / "out") == before


def test_a_full_disk_is_one_line_and_what_was_done_stays(world: Path, tmp_path: Path) -> None:
    asked = settings(world, out=str(tmp_path / "pairs"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def tell(stage: str, done: float, of: int) -> None:
        if stage == "pair" and done > 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    try:
        with pytest.raises(RunError, match=r"pairs-00001.tar: could not be written \(File too large\)"):
            build(asked, tell=tell)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "pairs").rglob(".*.tmp")) and (tmp_path / "pairs" / "pairs-00000.tar").is_file()
    build(asked)
    assert content(tmp_path / "pairs") == content(world / "pairs")


def test_a_damaged_tar_costs_what_comes_after_the_damage(world: Path, tmp_path: Path) -> None:
    renders = shutil.copytree(world / "renders", tmp_path / "renders")
    tar = renders / "00001.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    found = build(settings(world, corpus=str(renders), out=str(tmp_path / "out")))
    assert 2 * SHARD < found.samples < RENDERS and found.skipped["the tar is damaged"] == 1
