"""What a receipt may hold and what is believed of one: types, bounds, names without folders."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from iedit.runtime import METHODS, receipt
from iedit.runtime.backends.eager import TorchBackend
from iedit.runtime.editor import Editor, EditRequest, MaskOptions, Options
from iedit.runtime.errors import UsageError

RUN: dict[str, Any] = {"backend": "auto", "device": None, "dtype": None, "attention": "sdpa", "channels_last": False, "model": "picturebook",
       "controlnet": {}}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tiny: Any) -> dict[str, Any]:
    """As `iedit edit` would write it, for an edit with a layout and an estimated mask."""
    from iedit.training import world

    picture = world.render(world.random_scene(random.Random(0), 1)).resize((64, 64))
    request = EditRequest(picture, "a blue car", "a red car", layouts={"pose": picture}, source_layouts={"pose": picture},
                          steps=2, options=Options(mask=MaskOptions(seeds=1)))  # fmt: skip
    result = Editor(tiny, TorchBackend(tiny)).edit(request)
    files = {
        "image": "/home/jane/in.png",
        "mask": None,
        "layouts": {"pose": "../p/pose.png"},
        "source_layouts": {"pose": "old.png"},
    }
    members = [{"seed": 0, "lam": 0.6}, {"seed": 1, "lam": 0.6}]
    made = receipt.of_command(result.receipt, files, RUN, members, 1)
    return dict(json.loads(json.dumps(made)))


def test_what_an_edit_writes_is_what_replay_takes(sound: dict[str, Any]) -> None:
    found = receipt.parse(sound, "out.png")
    assert found.files == receipt.FilesPart("in.png", None, {"pose": "pose.png"}, {"pose": "old.png"})
    assert found.batch == receipt.BatchPart((receipt.Member(0, 0.6), receipt.Member(1, 0.6)), 1)
    assert found.request.options.mask.seeds == 1 and found.request.method in METHODS
    assert found.backend.modules["unet"] == ("torch",) and found.backend.threads == torch.get_num_threads()


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ("backend.threads", 1_000_000, "backend.threads is 1000000, expected 1 to 4096"),
        ("backend.threads", 0, "expected 1 to 4096"),
        ("backend.threads", "4", "expected a whole number"),
        ("backend.modules", {"unet": ["evil"]}, "expected one of"),
        ("backend.engines", [{"module": "unet", "backend": "onnx", "digest": "../../x"}], "expected a digest"),
        ("request.steps", 10**9, "expected 1 to 1000"),
        ("request.prompt", "x" * 20_000, "at most 10000 characters"),
        ("request.options.lam", float("nan"), "expected a finite number"),
        ("request.options.mask.seeds", 10**6, "mask seeds is 1000000, expected 1 to 1000"),
        ("request.options.final.k", 10**12, "k"),
        ("inputs.image", "zz", "expected a digest"),
        ("inputs.layouts", {}, "files and inputs name different layouts"),
        ("files.mask", "mask.png", "files and inputs disagree about a mask"),
        ("run.engines", "/tmp/evil", "run.'engines' is unknown"),
        ("run.device", "cuda:0; rm -rf /", "expected cpu or cuda:NUMBER"),
        ("run.controlnet", {"pose": 1}, "expected a text"),
        ("batch.index", 2, "batch.index is 2 of 2 members"),
        ("batch.index", -1, "expected 0 to 9999"),
        ("batch.members", [], "batch.index is 1 of 0 members"),
        ("versions.torch", "\x1b[31m", "expected at most 200 characters"),
        ("iedit", ["\x1b"], "iedit is a list of 1"),
        ("sparkle", 1, "'sparkle' is unknown"),
    ],
)
def test_a_field_out_of_its_bounds_is_refused_by_name(sound: dict[str, Any], place: str, value: Any, says: str) -> None:
    told = copy.deepcopy(sound)
    *path, last = place.split(".")
    holder = told
    for key in path:
        holder = holder[key]
    holder[last] = value
    with pytest.raises(UsageError, match=r"out\.png: its receipt cannot be used: ") as caught:
        receipt.parse(told, "out.png")
    assert says in str(caught.value) and str(caught.value).isprintable()


def test_every_field_is_needed(sound: dict[str, Any]) -> None:
    """An option that is missing had another default in another version."""

    def walk(holder: dict[str, Any], path: str) -> None:
        for key in list(holder):
            if path.endswith((".layouts", ".source_layouts", ".modules", ".controlnet")) or path == ".versions":
                continue
            kept = holder.pop(key)
            with pytest.raises(UsageError, match=r"is missing|has no"):
                receipt.parse(told, "out.png")
            holder[key] = kept
            if isinstance(kept, dict):
                walk(kept, f"{path}.{key}")

    told = copy.deepcopy(sound)
    walk(told, "")
    receipt.parse(told, "out.png")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("no engine in /data/jane/engines: run `iedit export`", "no engine in engines: run `iedit export`"),
        ("cannot read '/home/jane/x.png'", "cannot read 'x.png'"),
        ("../../secret/in.png: transparency was dropped", "in.png: transparency was dropped"),
        ("~/models/sd15/unet: weights: the engine has 12ab", "unet: weights: the engine has 12ab"),
        ("in /Users/Jane Doe/my models/sd15: it is slow", "in sd15: it is slow"),
        (
            "120 MB/s, 4/5 of it, and/or more, see https://example.com/a",
            "120 MB/s, 4/5 of it, and/or more, see https://example.com/a",
        ),
    ],
)
def test_texts_keep_the_last_names_of_paths(sound: dict[str, Any], text: str, left: str) -> None:
    told = sound | {"notes": [text]}
    assert receipt.without_paths(told, Path("/Users/Jane Doe/my models/sd15"))["notes"] == [left]


@pytest.mark.parametrize(
    ("model", "name"),
    [("picturebook", "picturebook"), ("owner/model-1.5", "owner/model-1.5"), ("/home/jane/models/sd15/", "sd15"), ("../jane/sd15", "sd15"),
     ("sub/ckpt", "ckpt"), ("caf\udce9/x\x1b", r"x\x1b")],
)  # fmt: skip
def test_a_model_s_name_has_no_folder(model: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub" / "ckpt").mkdir(parents=True)
    assert receipt.public_name(model) == name
