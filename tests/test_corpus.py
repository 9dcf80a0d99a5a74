"""A corpus is read the same in every form, in the same shards, and what is bad in it costs itself alone."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iedit.runtime.errors import UsageError
from iedit.training.corpus import Sample, Shard, Skipped, fingerprint, open_corpus

COUNT = 7


def picture(number: int) -> Image.Image:
    cells = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((80, 64), Image.Resampling.NEAREST)


def data(number: int) -> bytes:
    held = io.BytesIO()
    picture(number).save(held, "PNG")
    return held.getvalue()


def caption(number: int) -> str:
    return f"a  picture\nof number {number}"


def as_folder(folder: Path) -> Path:
    for i in range(COUNT):
        place = folder / ("deep" if i % 2 else "") / f"{i:03d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data(i))
        place.with_suffix(".txt").write_text(caption(i))
    return folder


def as_csv(folder: Path) -> Path:
    folder.mkdir()
    for i in range(COUNT):
        (folder / f"{i:03d}.png").write_bytes(data(i))
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "caption"], *([f"{i:03d}.png", caption(i)] for i in range(COUNT))])
    return folder


def as_parquet(folder: Path, images: Any = None) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir()
    held = [data(i) for i in range(COUNT)] if images is None else images
    parquet.write_table(pa.table({"jpg": held, "caption": [caption(i) for i in range(COUNT)]}), folder / "part.parquet")
    return folder


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def as_tars(folder: Path) -> Path:
    folder.mkdir()
    for number, some in enumerate((range(4), range(4, COUNT))):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for i in some:
                for ending, content in (
                    (".jpg", data(i)),
                    (".json", json.dumps({"key": i}).encode()),
                    (".txt", caption(i).encode()),
                ):
                    add(tar, f"{i:09d}{ending}", content)
    (folder / "00000.parquet").write_bytes(b"img2dataset puts its metadata beside each shard")
    return folder


FORMS: dict[str, Callable[[Path], Path]] = {"folder": as_folder, "csv": as_csv, "parquet": as_parquet, "tars": as_tars}


def read(shards: list[Shard]) -> tuple[list[Sample], list[Skipped]]:
    everything = [one for shard in shards for one in shard]
    return [s for s in everything if isinstance(s, Sample)], [s for s in everything if isinstance(s, Skipped)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [3, 1000])
def test_every_form_gives_the_same_samples_in_the_same_shards(tmp_path: Path, form: str, size: int) -> None:
    where = FORMS[form](tmp_path / "corpus")
    shards = open_corpus(where, size)
    samples, skipped = read(shards)
    assert skipped == []
    by_caption = {s.caption: s for s in samples}
    assert set(by_caption) == {f"a picture of number {i}" for i in range(COUNT)}
    for i in range(COUNT):
        assert by_caption[f"a picture of number {i}"].image.tobytes() == picture(i).tobytes()
    assert len({s.key for s in samples}) == COUNT and len({s.name for s in shards}) == len(shards)
    assert len(shards) == (2 if form == "tars" else -(-COUNT // size))
    again = open_corpus(where, size)
    assert [s.name for s in again] == [s.name for s in shards]
    assert [s.key for s in read(again)[0]] == [s.key for s in samples]
    for shard in reversed(shards):  # each is read on its own
        assert [s.key for s in shard] == [s.key for s in next(a for a in again if a.name == shard.name)]


def test_bad_pictures_are_skipped_with_their_reasons(tmp_path: Path) -> None:
    folder = as_folder(tmp_path / "corpus")
    (folder / "000.png").write_bytes(data(0)[:-300])
    (folder / "002.png").write_text("no picture")
    Image.new("RGB", (20, 200)).save(folder / "004.png")
    samples, skipped = read(open_corpus(folder))
    assert len(samples) == COUNT - 3
    reasons = {s.key: s.reason for s in skipped}
    assert set(reasons) == {"000.png", "002.png", "004.png"}
    assert "not a picture that can be read" in reasons["000.png"] and "not a picture" in reasons["002.png"]
    assert not any(" at 0x" in r for r in reasons.values())  # an address in memory is another one each time
    assert reasons["004.png"] == "picture is 20x200, smaller than 64 pixels"


def test_a_damaged_tar_gives_what_comes_before_the_damage(tmp_path: Path) -> None:
    folder = as_tars(tmp_path / "corpus")
    tar = folder / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    samples, skipped = read(open_corpus(folder))
    assert {s.caption for s in samples} >= {"a picture of number 0"} | {
        f"a picture of number {i}" for i in range(4, COUNT)
    }
    (one,) = skipped
    assert one.key.startswith("00000.tar after") and "damaged" in one.reason


def test_a_tar_sample_without_a_picture_and_one_without_a_caption(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x/one.txt", b"words")
        add(tar, "x/two.png", data(2))
    samples, skipped = read(open_corpus(tmp_path / "a.tar"))
    assert [(s.key, s.caption) for s in samples] == [("x/two", "")]
    assert [(s.key, s.reason) for s in skipped] == [("x/one", "no picture among .txt")]


def test_a_table_reads_nothing_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(data(0))
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [
        ["file", "text"],
        ["../secret.png", "no"],
        [str(tmp_path / "secret.png"), "no"],
        ["gone.png", "no"],
        ["", "no"],
    ]
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    samples, skipped = read(open_corpus(folder))
    assert samples == []
    assert [s.reason for s in skipped] == [
        "list.csv names no file in its own folder",
        "list.csv names no file in its own folder",
        "cannot be read (No such file or directory)",
        "list.csv names no file in its own folder",
    ]


def test_parquet_as_datasets_writes_it_and_a_row_without_a_picture(tmp_path: Path) -> None:
    images = [{"bytes": data(i), "path": None} for i in range(COUNT - 1)] + [None]
    samples, skipped = read(open_corpus(as_parquet(tmp_path / "corpus", images), 4))
    assert len(samples) == COUNT - 1
    assert [s.reason for s in skipped] == ["column jpg holds no picture"] and skipped[0].key == "part-000000006"


def test_captions_of_other_types_are_read_as_text(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    for i, captions in enumerate(([["one", "two"], []], [7, None])):
        parquet.write_table(pa.table({"jpg": [data(0), data(1)], "caption": captions}), tmp_path / f"{i}.parquet")
    samples, _ = read(open_corpus(tmp_path))
    assert [s.caption for s in samples] == ["one", "", "7", ""]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: None, "is not there; name a folder of pictures"),
        (lambda p: p.mkdir(), "holds no pictures"),
        (lambda p: p.write_text("x"), "is none of .tar, .parquet, .csv"),
    ],
)
def test_no_corpus_is_one_line(tmp_path: Path, make: Callable[[Path], Any], says: str) -> None:
    make(tmp_path / "corpus")
    with pytest.raises(UsageError, match=says):
        open_corpus(tmp_path / "corpus")


@pytest.mark.parametrize(
    ("text", "says"),
    [("file,words\na,b\n", "no column of captions: expected one of caption, text, prompt, it has file, words"),
     ("caption\nx\n", "no column of files"), ("file,caption\n", "has no rows")],
)  # fmt: skip
def test_a_csv_that_lacks_something_says_what(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UsageError, match=says):
        open_corpus(tmp_path)


def test_two_lists_and_a_parquet_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("file,caption\n")
    (tmp_path / "b.csv").write_text("file,caption\n")
    with pytest.raises(UsageError, match="holds 2 CSV files; name the one to read"):
        open_corpus(tmp_path)
    (tmp_path / "c.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UsageError, match="cannot be read as Parquet"):
        open_corpus(tmp_path / "c.parquet")


def as_files(folder: Path) -> Path:
    """Parquet that names files."""
    import pyarrow as pa
    from pyarrow import parquet

    as_folder(folder)
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png") if not p.name.endswith(".mask.png"))
    parquet.write_table(pa.table({"file": names, "caption": ["x"] * COUNT}), folder / "list.parquet")
    return folder / "list.parquet"


@pytest.mark.parametrize("make", [as_folder, as_csv, as_files])
def test_masks_beside_a_picture_are_its_own_and_no_pictures(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    where = make(tmp_path / "corpus")
    folder = tmp_path / "corpus"
    for name, content in (
        ("002.red-car.mask.png", b"one"),
        ("002.grass.mask.png", b"two"),
        ("00.car.mask.png", b"of nothing"),
    ):
        (folder / name).write_bytes(content)
    samples, skipped = read(open_corpus(where, 3))
    assert skipped == [] and len(samples) == COUNT
    held = {s.key: dict(s.masks) for s in samples if s.masks}
    (key,) = held
    assert "002" in key or make is as_files
    assert held[key] == {"grass": b"two", "red-car": b"one"}
    assert all(picture(i).tobytes() in {s.image.tobytes() for s in samples} for i in range(COUNT))


def test_masks_in_a_tar_and_about_how_many_samples_it_has(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(30):
            add(tar, f"x/{i:03d}.png", data(i % COUNT))
            add(tar, f"x/{i:03d}.txt", b"words")
            add(tar, f"x/{i:03d}.red-car.mask.png", b"mask %d" % i)
    (shard,) = open_corpus(tmp_path / "a.tar")
    samples, skipped = read([shard])
    assert skipped == [] and [dict(s.masks) for s in samples] == [{"red-car": b"mask %d" % i} for i in range(30)]
    assert samples[3].data == data(3)
    assert 20 <= shard.size <= 40
    (tmp_path / "b.tar").write_bytes(b"no tar")
    assert open_corpus(tmp_path / "b.tar")[0].size == 1


@pytest.mark.parametrize("form", FORMS)
def test_a_fingerprint_is_of_the_files_wherever_they_lie(tmp_path: Path, form: str) -> None:
    one, other = FORMS[form](tmp_path / "one"), FORMS[form](tmp_path / "other")
    before = fingerprint(one)
    assert before == fingerprint(other) and len(before) == 64
    victim = sorted(p for p in one.rglob("*") if p.is_file())[0]
    content = victim.read_bytes()
    victim.write_bytes(content + b"x")
    assert fingerprint(one) != before
    victim.write_bytes(content)
    assert fingerprint(one) == before
    victim.rename(victim.with_name("renamed" + victim.suffix))
    assert fingerprint(one) != before
