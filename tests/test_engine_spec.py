"""What an engine was built for is checked field by field, and nothing that is not whole counts as one."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from iedit.runtime.backends import engine_spec
from iedit.runtime.backends.engine_spec import (
    SPEC_FILE,
    EngineSpec,
    Shapes,
    build_lock,
    damaged,
    find_builds,
    find_engines,
    is_build,
    new_build,
    read_spec,
    writable_by_all,
    write_spec,
)
from iedit.runtime.errors import RunError, UsageError

SPEC = EngineSpec(
    format="onnx", module="unet+pose", model="m", weights="12ab", graph="34cd", precision="fp32",
    shapes=(Shapes((1, 2, 4), (64, 512, 768), (64, 512, 768)), Shapes((1, 1, 1), (64, 1024, 1024), (64, 1024, 1024))),
    opset=23, versions={"torch": "2.13"},
)  # fmt: skip


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    folder = tmp_path / "deep" / "unet"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"graph")
    write_spec(folder, SPEC, ["model.onnx"])
    return folder


def test_a_spec_comes_back_as_it_was_written(engine: Path) -> None:
    found = read_spec(engine)
    assert dataclasses.replace(found, files={}) == SPEC
    assert list(found.files) == ["model.onnx"]
    assert damaged(engine, found) == []
    assert [(p, s) for p, s in find_engines(engine.parent.parent)] == [(engine, found)]


def test_every_field_that_differs_is_named() -> None:
    assert SPEC.differs(weights="12ab", precision="fp32") == []
    assert SPEC.differs(weights="ffff", opset=22) == [
        "weights: the engine has 12ab, wanted ffff",
        "opset: the engine has 23, wanted 22",
    ]


def test_a_call_must_fit_one_of_the_ranges() -> None:
    assert SPEC.out_of_range(4, 512, 768) == []
    assert SPEC.out_of_range(1, 1024, 1024) == []
    (why,) = SPEC.out_of_range(2, 1024, 512)
    assert why == "onnx unet+pose engine was built for height 64-768, asked for 1024 or batch 1-1, asked for 2"
    assert dataclasses.replace(SPEC, shapes=(Shapes(),)).out_of_range(64, 4096, 4096) == []


def test_a_missing_or_changed_file_is_named(engine: Path) -> None:
    spec = read_spec(engine)
    (engine / "model.onnx").write_bytes(b"grapf")
    assert damaged(engine, spec) == ["files: model.onnx is not what was built (its digest differs)"]
    (engine / "model.onnx").unlink()
    assert damaged(engine, spec) == ["files: model.onnx is missing"]


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda s: s | {"extra": 1}, "field extra is missing or unknown"),
        (lambda s: {k: v for k, v in s.items() if k != "weights"}, "field weights is missing or unknown"),
        (lambda s: s | {"shapes": [{"batch": [1, 2]}]}, r"shapes\[0\]"),
        (lambda s: s | {"module": 5}, "module is 5, expected a text"),
        (lambda s: s | {"format": "exe"}, "format is 'exe', expected one of onnx, tensorrt"),
        (lambda s: s | {"files": {"../x": "0"}}, "a name in it is not one of a file in this folder"),
        (lambda s: s | {"versions": {"a": {"b": [[[[[[[[[[[[]]]]]]]]]]]]}}}, "nested more than 12 deep"),
        (lambda s: s | {"files": None}, "files is None, expected an object"),
        (lambda s: s | {"opset": "x"}, "opset is 'x', expected a whole number"),
        (
            lambda s: s | {"attention": "sparse"},
            "attention is 'sparse', expected one of operator, decomposed, decomposable or empty",
        ),
        (lambda s: s | {"shapes": []}, "shapes: they hold no range"),
        (
            lambda s: s | {"shapes": [dataclasses.asdict(Shapes((1, 2, -8)))]},
            "shapes: they hold no range, or one that is out",
        ),
        (
            lambda s: s | {"shapes": [dataclasses.asdict(Shapes((9, 2, 8)))]},
            "shapes: they hold no range, or one that is out",
        ),
        (lambda s: [], "field everything is missing or unknown"),
    ],
)
def test_a_spec_of_another_version_is_refused_by_the_field(engine: Path, change: Any, told: str) -> None:
    path = engine / SPEC_FILE
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UsageError, match=told):
        read_spec(engine)
    (found,) = find_engines(engine.parent)
    assert isinstance(found[1], UsageError)


def test_a_half_written_spec_and_a_build_under_way_are_no_engines(engine: Path) -> None:
    path = engine / SPEC_FILE
    path.write_text(path.read_text()[:40])
    with pytest.raises(UsageError, match="cannot be read"):
        read_spec(engine)
    path.unlink()
    with pytest.raises(UsageError, match="not an engine, or a build that was stopped"):
        read_spec(engine)
    write_spec(engine, SPEC, ["model.onnx"])
    engine.rename(engine.with_name(".unet.0123abcd.building"))
    assert list(find_engines(engine.parent)) == []


def test_weights_that_a_spec_leaves_out_are_named(engine: Path) -> None:
    """Their bytes may be anything: no digest of them is known."""
    (engine / "model.onnx").write_bytes(b"graph\x0alocation\x12\x0fmodel.onnx.data")
    (engine / "model.onnx.data").write_bytes(b"weights")
    (engine / "notes.txt").write_bytes(b"not of the engine")
    assert damaged(engine, write_spec(engine, SPEC, ["model.onnx"])) == [
        "files: model.onnx.data belongs to the graph and is not among them"
    ]
    assert damaged(engine, write_spec(engine, SPEC, ["model.onnx", "model.onnx.data"])) == []


def test_a_folder_behind_a_link_is_an_engine_and_links_in_a_circle_end(engine: Path, tmp_path: Path) -> None:
    where = tmp_path / "engines"
    where.mkdir()
    (where / "linked").symlink_to(engine)
    (where / "circle").symlink_to(where)
    (where / "nowhere").symlink_to(tmp_path / "gone")
    assert [p for p, _ in find_engines(where)] == [where / "linked"]
    assert find_builds(where) == []


def test_what_changes_under_the_reader_is_no_traceback(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process removes engines while they are listed and compared."""
    spec = read_spec(engine)
    other = engine.with_name("vae")
    shutil.copytree(engine, other)
    listed = find_engines(engine.parent)
    next(listed)
    shutil.rmtree(other)
    assert [(p, str(s)) for p, s in listed if not isinstance(s, EngineSpec)] == []
    digest = engine_spec.file_digest

    def gone(path: Path) -> str:
        shutil.rmtree(engine)
        return digest(path)

    monkeypatch.setattr(engine_spec, "file_digest", gone)
    assert damaged(engine, spec) == ["files: model.onnx cannot be read (No such file or directory)"]


def test_a_linked_engine_that_all_may_write_to_is_not_trusted(engine: Path, tmp_path: Path) -> None:
    where = tmp_path / "engines"
    where.mkdir()
    (where / "linked").symlink_to(engine)
    spec = read_spec(engine)
    assert writable_by_all(where / "linked", spec, where) == []
    engine.parent.chmod(0o777)
    assert str(engine.parent) in writable_by_all(where / "linked", spec, where)[0]


@pytest.mark.parametrize("name", ["thesis.txt", "model.tex", "model.onnx"])
def test_a_build_never_takes_the_place_of_what_is_not_an_engine(engine: Path, tmp_path: Path, name: str) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / name).touch()
    if name != "model.onnx":
        (engine / name).touch()
    for target in [theirs, *([engine] if name != "model.onnx" else [])]:
        with pytest.raises(UsageError, match=f"{name} is there, which is of no engine of iedit"):
            new_build(target)
    if name == "model.onnx":
        assert is_build(new_build(engine))


def _hold(folder: str, held: Any) -> None:
    with build_lock(Path(folder)):
        held.set()
        time.sleep(60)


def test_a_lock_is_gone_with_the_process_that_held_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path / "unet"), held))
    process.start()
    assert held.wait(60)
    told: list[str] = []
    with pytest.raises(RunError, match="has been building"), build_lock(tmp_path / "unet", told.append, timeout=0.3):
        pass
    assert told == ["another process is building unet; waiting for it"]
    with build_lock(tmp_path / "vae_decoder", timeout=0.0):  # another engine is free
        pass
    process.kill()
    process.join()
    with build_lock(tmp_path / "unet", timeout=5.0):
        pass
