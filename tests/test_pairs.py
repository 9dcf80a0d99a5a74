"""A folder of pairs gives back what was put into it, the same bytes every time, and what is wrong with it is one line."""

from __future__ import annotations

import importlib
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iedit.runtime.errors import UsageError
from iedit.training import pairs
from iedit.training.pairs import FORMAT, Manifest, Row, read_pairs

SIZE = 64


def picture(number: int, kind: str = "PNG") -> bytes:
    held = io.BytesIO()
    cells = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(cells).resize((SIZE, SIZE), Image.Resampling.NEAREST).save(held, kind)
    return held.getvalue()


def mask(number: int) -> np.ndarray:
    return np.random.default_rng(number).random((8, 8)).repeat(8, 0).repeat(8, 1) < 0.4


def row(number: int) -> Row:
    cells = [pairs.latent_mask(mask(number + i)) for i in (100, 200)]
    return Row(
        key=f"{number:09d}", source_key=f"a/{number}", target_key=f"b/{number}", source_caption=f"a red car, “{number}”",
        edit_prompt=f"a blue car, “{number}”", word="red", replacement="blue", relation="co-hyponym", source_difference="red car",
        target_difference="blue car", similarity=0.5 + number / 100, image_similarity=0.25, text_similarity=0.125,
        source_share=float(mask(number + 100).mean()), target_share=float(mask(number + 200).mean()),
        source_latent_share=float(cells[0].mean()), target_latent_share=float(cells[1].mean()),
        source_cells=pairs.pack_cells(cells[0]), target_cells=pairs.pack_cells(cells[1]),
    )  # fmt: skip


def write(folder: Path, counts: tuple[int, ...] = (3, 0, 2)) -> Path:
    folder.mkdir()
    shards, number = [], 0
    for i, count in enumerate(counts):
        some = [
            (row(n), picture(n), picture(n + 50, "JPEG"), mask(n + 100), mask(n + 200))
            for n in range(number, number + count)
        ]
        number += count
        shards.append(pairs.write_shard(folder, f"pairs-{i:05d}", iter(some)))
    made = tuple(s for s in shards if s is not None)
    manifest = Manifest(FORMAT, SIZE, SIZE // 8, 9, number, {"no neighbour": 4}, {"seed": 0}, {}, {}, {}, made)
    pairs.write_manifest(folder, manifest, [("x/1", "pairs", "no neighbour")])
    return folder


def test_a_pair_is_read_as_it_was_written_in_any_order(tmp_path: Path) -> None:
    data = read_pairs(write(tmp_path / "pairs"))
    assert len(data) == 5 and [p.key for p in data] == [f"{n:09d}" for n in range(5)]
    for n in (4, 0, 3, -4):
        pair, number = data[n], n % 5
        assert pair.row == row(number) == data.row(n)
        assert pair.difference_prompts == ("red car", "blue car") and pair.edit_prompt == f"a blue car, “{number}”"
        assert pair.source.tobytes() == Image.open(io.BytesIO(picture(number))).tobytes()
        assert pair.target.tobytes() == Image.open(io.BytesIO(picture(number + 50, "JPEG"))).tobytes()
        for got, cells, i in (
            (pair.source_mask, pair.source_latent_mask, 100),
            (pair.target_mask, pair.target_latent_mask, 200),
        ):
            assert got.dtype == bool and (got == mask(number + i)).all()
            assert cells.dtype == np.float32 and cells.shape == (8, 8)
            assert (cells.repeat(8, 0).repeat(8, 1) == mask(number + i)).all()
    with pytest.raises(IndexError, match="pair 5 of 5"):
        data[5]
    again = pickle.loads(pickle.dumps(data))
    assert again[2].row == data[2].row and again.digest == data.digest


def test_the_same_pairs_are_the_same_bytes(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one"), write(tmp_path / "other")
    assert sorted(p.name for p in one.iterdir()) == [
        "manifest.json", "pairs-00000.parquet", "pairs-00000.tar", "pairs-00002.parquet", "pairs-00002.tar", "skipped.csv",
    ]  # fmt: skip
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_a_latent_cell_belongs_to_the_mask_from_half_of_its_area_on() -> None:
    full = np.zeros((16, 24), bool)
    full[:8, :4] = True  # half of a cell
    full[8:, 8:16] = True
    full[15, 8:12] = False
    full[:4, 16:24] = True
    full[3, 16] = False  # one pixel less than half
    assert pairs.latent_mask(full).tolist() == [[1, 0, 0], [0, 1, 0]]
    cells = np.random.default_rng(0).integers(0, 2, (13, 13))
    assert (pairs.unpack_cells(pairs.pack_cells(cells), 13) == cells).all()


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    webdataset = importlib.import_module("webdataset")  # an independent reader
    folder = write(tmp_path / "pairs")
    data = webdataset.WebDataset(str(folder / "pairs-00002.tar"), shardshuffle=False).decode("pil")
    samples = list(data)
    assert [s["__key__"] for s in samples] == ["000000003", "000000004"]
    assert samples[0]["json"]["edit_prompt"] == "a blue car, “3”"
    assert samples[0]["source.png"].tobytes() == Image.open(io.BytesIO(picture(3))).tobytes()


def test_what_is_wrong_with_a_folder_is_one_line(tmp_path: Path) -> None:
    def refused(says: str, verify: bool = True) -> None:
        with pytest.raises(UsageError, match=says) as error:
            list(read_pairs(folder, verify))
        assert "\n" not in str(error.value)

    folder = tmp_path / "none"
    refused("manifest.json is not there; name a folder that `iedit train pairs` has finished")
    folder = write(tmp_path / "pairs")
    tar = folder / "pairs-00000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:600] + bytes([whole[600] ^ 1]) + whole[601:])
    refused("pairs-00000.tar is damaged")
    tar.write_bytes(whole[:1000])
    refused("pairs-00000.tar (cannot be read|holds no)|cannot be read", verify=False)
    tar.unlink()
    refused("pairs-00000.tar is not there, but")
    tar.write_bytes(whole)
    table = folder / "pairs-00002.parquet"
    table.write_bytes(table.read_bytes()[:-9])
    refused("pairs-00002.parquet is damaged", verify=False)
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    for changed, says in (
        (text[:50], "is no manifest of pairs"),
        ("[]", "is no manifest"),
        (text.replace('"format": 1', '"format": 2'), "format is 2, expected 1"),
        (text.replace('"pairs": 5', '"pairs": 6'), "contradicts itself"),
        (
            text.replace('"name": "pairs-00000"', '"name": "../../secret"'),
            "shards.0..name is .*expected a name without folders",
        ),
    ):
        manifest.write_text(changed)
        refused(says)


def test_a_shard_that_lacks_a_member_says_which(tmp_path: Path) -> None:
    folder = write(tmp_path / "pairs", (1,))
    with tarfile.open(folder / "pairs-00000.tar") as tar:
        names = tar.getnames()
        assert [n.split(".", 1)[1] for n in names] == [
            "source.png", "target.jpg", "source_mask.png", "target_mask.png", "json",
        ]  # fmt: skip
        words = json.loads(tar.extractfile(names[-1]).read())  # type: ignore[union-attr]
        assert words["target_difference"] == "blue car" and "source_cells" not in words
    with tarfile.open(folder / "pairs-00000.tar", "w"):
        pass
    with pytest.raises(UsageError, match=r"pairs-00000.tar holds no 000000000.source.png"):
        read_pairs(folder, verify=False)[0]
