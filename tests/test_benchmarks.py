"""Benchmarks as small generated folders of the published shapes, and what is wrong with a folder."""

from __future__ import annotations

import csv
import importlib.util
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iedit.runtime.errors import UsageError
from iedit.training import benchmarks, truth, world
from iedit.training.benchmarks import ImageNet, Pairs, Pie, World


def runs(mask: np.ndarray) -> list[int]:
    """PIE-Bench's code of a mask: start, length, start, length, ..."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.ravel().astype(np.int8), [0]))))
    return [int(v) for a, b in edges.reshape(-1, 2) for v in (a, b - a)]


def pie_folder(folder: Path, n: int = 3) -> Path:
    mapping = {}
    for i, case in enumerate(truth.edit_cases("thing", n)):
        path = f"1_change_object_80/1_artificial/{i:012d}.jpg"
        (folder / "annotation_images" / path).parent.mkdir(parents=True, exist_ok=True)
        case.source.save(folder / "annotation_images" / path, quality=95)
        mapping[f"{i:012d}"] = {
            "image_path": path, "original_prompt": case.prompts[0], "editing_prompt": "[" + case.prompts[1].replace(" on", "] on", 1),
            "editing_instruction": "", "editing_type_id": str(i % 2), "blended_word": "", "mask": runs(np.asarray(case.region) > 127),
        }  # fmt: skip
    (folder / "mapping_file.json").write_text(json.dumps(mapping))
    return folder


def test_a_pie_mask_is_what_the_published_loop_makes_of_it() -> None:
    code = [70, 5, 130, 200, 1020, 99]  # the last runs over the end
    pixels = np.zeros(32 * 32)
    for i in range(0, len(code), 2):
        for j in range(min(code[i + 1], 32 * 32 - code[i])):
            pixels[code[i] + j] = 1
    mask = pixels.reshape(32, 32)
    mask[0, :] = mask[-1, :] = mask[:, 0] = mask[:, -1] = 1
    assert (benchmarks.decode_mask(code, 32, 32) == mask.astype(bool)).all()
    assert benchmarks.decode_mask([], 8, 8).sum() == 28
    for wrong in ([1], [-1, 3], [64, 1], [0.5, 2.0], [[1, 2]], ["a", "b"]):
        with pytest.raises(ValueError):
            benchmarks.decode_mask(wrong, 8, 8)  # type: ignore[arg-type]


def test_pie_bench_is_read_as_its_program_reads_it(tmp_path: Path) -> None:
    found = pickle.loads(pickle.dumps(Pie(pie_folder(tmp_path))))  # as another process gets it
    exact = truth.edit_cases("thing", 3)
    assert [c.name for c in found.cases] == [f"1_change_object_80/1_artificial/{i:012d}" for i in range(3)]
    assert [(c.source_prompt, c.prompt) for c in found.cases] == [c.prompts for c in exact]
    assert [c.kind for c in found.cases] == ["random", "change object", "random"]
    for case, wanted in zip(found.cases, exact, strict=True):
        assert np.abs(np.asarray(found.picture(case), float) - np.asarray(wanted.source, float)).mean() < 3  # JPEG
        region = np.asarray(wanted.region) > 127
        assert (found.mask(case)[1:-1, 1:-1] == region[1:-1, 1:-1]).all() and found.mask(case)[0].all()
    small = Pie(tmp_path, n=1, size=64)
    mask = small.mask(small.cases[0])
    assert (
        small.cases[0].size == small.picture(small.cases[0]).size == (64, 64)
        and mask is not None
        and mask.shape == (64, 64)
    )
    assert small.cases[0].digest != found.cases[0].digest


def change(folder: Path, to: Callable[[dict[str, Any]], None]) -> None:
    mapping = json.loads((folder / "mapping_file.json").read_text())
    to(mapping["000000000001"])
    (folder / "mapping_file.json").write_text(json.dumps(mapping))


@pytest.mark.parametrize(
    ("to", "says"),
    [
        (lambda i: i.update(image_path="../mapping_file.json"), "case 000000000001: '../mapping_file.json' is no file in"),
        (lambda i: i.update(image_path="none.jpg"), "none.jpg"),
        (lambda i: i.update(mask=[1, 2, 3]), "case 000000000001: the mask is no list of starts and lengths"),
        (lambda i: i.update(mask=[20000, 2]), "a run of the mask begins at 20000 in a picture of 16384 pixels"),
        (lambda i: i.pop("editing_prompt"), "case 000000000001 has no editing_prompt"),
        (lambda i: i.update(editing_prompt="[]"), "editing_prompt is empty"),
        (lambda i: i.update(image_path="1_change_object_80/1_artificial/000000000000.jpg"), "two cases are named"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_mapping_file_is_a_line_that_names_the_case(tmp_path: Path, to: Any, says: str) -> None:
    change(pie_folder(tmp_path), to)
    with pytest.raises(UsageError) as error:
        Pie(tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_a_mapping_file_and_one_that_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no mapping_file.json; name the folder"):
        Pie(tmp_path)
    for text in ("[]", "{", '{"a": 1}', "{}"):
        (tmp_path / "mapping_file.json").write_text(text)
        with pytest.raises(UsageError, match=r"is no mapping file of PIE-Bench|holds no case"):
            Pie(tmp_path)


# --- pairs --------------------------------------------------------------------------------------------------------


def table_folder(folder: Path, header: str = "image,source_prompt,prompt,mask", lines: tuple[str, ...] = ()) -> Path:
    cases = truth.edit_cases("colour", 2)
    for i, case in enumerate(cases):
        case.source.save(folder / f"{i}.png")
        case.region.save(folder / f"{i}-mask.png")
    own = (f"0.png,{cases[0].prompts[0]},{cases[0].prompts[1]},0-mask.png", "0.png,,a green car,", f"1.png,{cases[1].prompts[0]},a tree,1-mask.png")  # fmt: skip
    (folder / "pairs.csv").write_text("\n".join((header, *(lines or own))) + "\n", encoding="utf-8-sig")
    return folder


def test_pairs_in_a_table(tmp_path: Path) -> None:
    found = Pairs(table_folder(tmp_path))
    exact = truth.edit_cases("colour", 2)
    assert [c.name for c in found.cases] == ["00000-0", "00001-0", "00002-1"]
    assert [c.source_prompt for c in found.cases] == [exact[0].prompts[0], "", exact[1].prompts[0]]
    assert found.picture(found.cases[1]).tobytes() == exact[0].source.tobytes()
    masks = [found.mask(c) for c in found.cases]
    assert masks[1] is None and masks[0] is not None and (masks[0] == (np.asarray(exact[0].region) > 127)).all()
    assert len(list(found.real())) == 2  # two pictures, one of them with two prompts
    real = tmp_path / "real" / "more"
    real.mkdir(parents=True)
    exact[0].target.save(real / "a.jpg")
    assert len(list(Pairs(tmp_path, compared=tmp_path / "real").real())) == 1
    with pytest.raises(UsageError, match="holds no picture to compare"):
        empty = tmp_path / "empty"
        empty.mkdir()
        Pairs(tmp_path, compared=empty)


@pytest.mark.parametrize(
    ("header", "line", "says"),
    [
        ("image,mask", "0.png,", "has no column prompt; its columns are to be image, source_prompt, prompt, mask"),
        ("image,prompt", "0.png,", "line 2: the prompt is empty"),
        ("image,prompt", "/etc/passwd,x", "line 2: '/etc/passwd' is no file in"),
        ("image,prompt", "none.png,x", "none.png"),
        ("image,prompt,mask", "0.png,x,none.png", "none.png"),
        ("image,prompt,mask", "0.png,x,small.png", "small.png: the mask is 8x8 and the image 128x128"),
        ("image,prompt", ",x", "line 2: '' is no file in"),
    ],
)
def test_what_is_wrong_with_a_table_of_pairs(tmp_path: Path, header: str, line: str, says: str) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    with pytest.raises(UsageError) as error:
        Pairs(table_folder(tmp_path, header, (line,)))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_folder_of_neither_kind_of_pairs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds neither manifest.json nor pairs.csv"):
        Pairs(tmp_path)
    (tmp_path / "pairs.csv").write_bytes(b"image,prompt\n\xff,\n")
    with pytest.raises(UsageError, match="is no CSV in UTF-8"):
        Pairs(tmp_path)


def test_pairs_of_iedit_train_pairs_are_their_sources_masks_and_edit_prompts(tmp_path: Path) -> None:
    from iedit.training import pairs

    cases = truth.edit_cases("thing", 2)
    rows: list[Any] = []
    for i, case in enumerate(cases):
        region, target = np.asarray(case.term) > 127, np.asarray(case.region) > 127
        cells = [pairs.pack_cells(pairs.latent_mask(m)) for m in (region, target)]
        row = pairs.Row(f"{i:09d}", "s", "t", *case.prompts, "car", "boat", "co-hyponym", "a car", "a boat", 0.9, 0.9, 0.9, 0.2, 0.2, 0.2, 0.2, *cells)  # fmt: skip
        rows.append((row, *(png(p) for p in (case.source, case.target)), region, target))
    shard = pairs.write_shard(tmp_path, "pairs-00000", rows)
    assert shard is not None
    pairs.write_manifest(tmp_path, pairs.Manifest(pairs.FORMAT, 128, 16, 2, 2, {}, {}, {}, {}, {}, (shard,)), [])
    found = pickle.loads(pickle.dumps(Pairs(tmp_path)))
    assert [(c.source_prompt, c.prompt, c.kind, c.size) for c in found.cases] == [
        (*c.prompts, "co-hyponym", (128, 128)) for c in cases
    ]
    for case, wanted in zip(found.cases, cases, strict=True):
        assert found.picture(case).tobytes() == wanted.source.tobytes()
        assert (found.mask(case) == (np.asarray(wanted.term) > 127)).all()


def png(picture: Image.Image) -> bytes:
    import io

    held = io.BytesIO()
    picture.save(held, "PNG")
    return held.getvalue()


# --- ImageNet -----------------------------------------------------------------------------------------------------


def class_folder(folder: Path, classes: tuple[str, ...]) -> Path:
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            scene = world.random_scene(random.Random(f"held-out-{name}-{i}"), 1, (world.KINDS[number],))
            world.render(scene).resize((160, 128)).save(folder / name / f"val_{i}.JPEG", quality=90)
    return folder


def queries(path: Path, lines: list[tuple[str, str, str, str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("", "path", "source", "source_id", "target", "target_id", "is_test")] + [(i, p, s, 0, t, 1, test) for i, (p, s, t, test) in enumerate(lines)])  # fmt: skip
    return path


def test_imagenet_by_flexit_s_table_edits_its_test_cases_into_their_targets(tmp_path: Path) -> None:
    root = class_folder(tmp_path / "val", ("n01", "n02"))
    table = queries(tmp_path / "q.csv", [("n01/val_0.JPEG", "red fox", "hyena", "True"), ("n01/val_1.JPEG", "red fox", "hyena", "False"), ("n02/val_2.JPEG", "hyena", "red fox", "True")])  # fmt: skip
    found = pickle.loads(pickle.dumps(ImageNet(root, size=64, queries=table, template="a photo of a {}")))
    assert [(c.old, c.new, c.prompt) for c in found.cases] == [("red fox", "hyena", "a photo of a hyena"), ("hyena", "red fox", "a photo of a red fox")]  # fmt: skip
    shown = found.picture(found.cases[0])
    whole = Image.open(root / "n01" / "val_0.JPEG")
    assert shown.size == (64, 64) and found.mask(found.cases[0]) is None
    middle = whole.crop((16, 0, 144, 128)).resize((64, 64), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(shown, int) - np.asarray(middle, int)).max() <= 2
    assert [name for name, _ in found.real()] == ["hyena"] * 3 + ["red fox"] * 3


def test_imagenet_by_wordnet_edits_each_class_into_classes_of_its_kind(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("small_wordnet", Path(__file__).with_name("small_wordnet.py"))
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from iedit.training.wordnet import NOUN, WordNet

    folder = module.write(tmp_path / "wordnet")
    net = WordNet(folder)
    ids = {w: f"n{net.senses(w, NOUN)[0].key[1]:08d}" for w in ("car", "bus", "dog", "wolf")}
    root = class_folder(tmp_path / "val", tuple(ids.values()))
    found = ImageNet(root, size=64, wordnet=folder, per_class=2)
    kinds = {frozenset(("car", "bus")), frozenset(("dog", "wolf"))}
    words = {net.synset((NOUN, int(i[1:]))).words[0].replace("_", " "): w for w, i in ids.items()}
    asked = [(words[c.old], words[c.new]) for c in found.cases]
    assert len(asked) == 8 and {frozenset(pair) for pair in asked} == kinds
    assert sorted(n for n, _ in found.real()) == sorted(n for n in words for _ in range(3))
    with pytest.raises(UsageError, match="says nothing of what is edited into what"):
        ImageNet(root, size=64)
    with pytest.raises(UsageError, match=r"index\.noun is not there"):
        ImageNet(root, size=64, wordnet=tmp_path)
    with pytest.raises(UsageError, match=r"bus is no synset \(n02119022\).*give --queries"):
        ImageNet(class_folder(tmp_path / "named", ("car", "bus")), size=64, wordnet=folder)


def test_what_is_wrong_with_an_imagenet(tmp_path: Path) -> None:
    root = class_folder(tmp_path / "val", ("n01", "n02"))
    good = [("n01/val_0.JPEG", "fox", "hyena", "True")]
    for lines, template, says in (
        ([("n01/none.JPEG", "fox", "hyena", "True")], "{}", "none.JPEG"),
        ([("../q.csv", "fox", "hyena", "True")], "{}", "is no file in"),
        ([("n01/val_0.JPEG", "fox", "", "True")], "{}", "case 1 has an empty path, source or target"),
        ([], "{}", "has no column path or no line"),
        (good, "a photo", r"has no \{\}, where the class goes"),
    ):
        with pytest.raises(UsageError, match=says):
            ImageNet(root, queries=queries(tmp_path / "q.csv", lines), template=template)
    with pytest.raises(UsageError, match="holds no picture of hyena, which CSFID compares with"):
        list(ImageNet(root, queries=queries(tmp_path / "q.csv", good)).real())
    with pytest.raises(UsageError, match="holds no folder"):
        ImageNet(tmp_path / "nowhere")


def test_the_world_s_masks_are_the_exact_regions() -> None:
    found = World(2, seed=3)
    assert [c.kind for c in found.cases] == ["thing", "colour", "background"] * 2
    assert found.cases[:3] == World(1, seed=3).cases
    exact = truth.edit_cases("colour", 2, 3)[1]
    case = found.cases[4]
    assert found.picture(case).tobytes() == exact.source.tobytes() and case.prompt == exact.prompts[1]
    mask = found.mask(case)
    assert mask is not None and (mask == (np.asarray(exact.region) > 127)).all()
    assert len({p.tobytes() for _, p in found.real()}) == 6
