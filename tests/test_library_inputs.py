"""The Python interface takes pictures as people have them, names what it cannot take, and gives results that can be sent on."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from iedit.runtime.editor import Editor, EditRequest, ItoSettings, MaskOptions, Options
from iedit.runtime.errors import Cancelled, UsageError


@pytest.fixture
def asked(picture: Callable[..., Any]) -> EditRequest:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    return EditRequest(picture(0), "a red car", "a tree", layouts={"pose": picture(1)}, mask=mask, steps=2)


def test_paths_and_arrays_are_pictures(editor: Editor, asked: EditRequest, tmp_path: Path) -> None:
    want = editor.edit(asked)
    layout = asked.layouts["pose"]
    held: Any
    for name, held in (("image", asked.image), ("layout", layout), ("mask", asked.mask)):
        held.save(tmp_path / f"{name}.png")
    array, mask = np.asarray(asked.image), np.asarray(asked.mask)
    for image, pose, cut in (
        (tmp_path / "image.png", tmp_path / "layout.png", tmp_path / "mask.png"),
        (str(tmp_path / "image.png"), str(tmp_path / "layout.png"), str(tmp_path / "mask.png")),
        (array, np.asarray(layout), mask),
        (array / 255, np.asarray(layout).astype(np.float32) / 255, mask > 127),
        (array, np.asarray(layout), mask[..., None]),
    ):
        given = dataclasses.replace(asked, image=image, layouts={"pose": pose}, mask=cut)
        assert torch.equal(editor.edit(given).latent, want.latent)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image": None}, "image is a NoneType, expected a PIL image, a path or an array"),
        ({"image": np.zeros((64, 64, 3), np.int64)}, "image: the array is of int64"),
        ({"mask": 5}, "mask is a int"),
        ({"layouts": ["pose"]}, "layouts is a list, expected a mapping"),
        ({"layouts": {"pose": b"x"}}, r"layouts\['pose'\] is a bytes"),
        ({"prompt": None}, "prompt is None, a NoneType; expected str"),
        ({"source_prompt": 3}, "source_prompt is 3, a int; expected str"),
        ({"method": None}, "method is None"),
        ({"seed": 1.5}, "seed is 1.5, a float; expected int"),
        ({"seed": True}, "seed is True, a bool; expected int"),
        ({"steps": "25"}, "steps is '25', a str; expected int or None"),
        ({"options": {"lam": 0.5}}, "options is a dict, expected Options"),
        ({"options": Options(lam="0.5")}, "options.lam is '0.5', a str; expected float"),  # type: ignore[arg-type]
        ({"options": Options(refine=1)}, "options.refine is 1, a int; expected bool"),  # type: ignore[arg-type]
        ({"options": Options(mask=None)}, "options.mask is a NoneType, expected MaskOptions"),  # type: ignore[arg-type]
        ({"options": Options(mask=MaskOptions(seeds=2.0))}, "options.mask.seeds is 2.0"),  # type: ignore[arg-type]
        ({"options": Options(final=ItoSettings(k="1"))}, "options.final.k is '1'"),  # type: ignore[arg-type]
        ({"options": Options(control_scales=[("pose", 1.0)])}, "options.control_scales is"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_type_is_a_type_error_with_the_name(
    editor: Editor, asked: EditRequest, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(TypeError, match=says):
        editor.edit(dataclasses.replace(asked, **changes))


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((64,), np.uint8), r"the array is \(64,\)"),
        (np.zeros((2, 64, 64, 3), np.uint8), r"the array is \(2, 64, 64, 3\)"),
        (np.zeros((0, 64, 3), np.uint8), "the array is"),
        (np.full((64, 64, 3), 2.0), "values outside 0 to 1"),
        (np.full((64, 64, 3), np.nan), "values outside 0 to 1"),
    ],
)
def test_an_array_that_is_no_picture_is_refused(editor: Editor, asked: EditRequest, array: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        editor.edit(dataclasses.replace(asked, image=array))


def test_numbers_of_numpy_are_numbers_and_the_receipt_is_json(editor: Editor, asked: EditRequest) -> None:
    given = dataclasses.replace(asked, seed=np.int64(3), steps=np.int32(2), options=Options(lam=np.float32(0.5)))  # type: ignore[arg-type]
    receipt = json.loads(json.dumps(editor.edit(given).receipt))
    assert (receipt["request"]["seed"], receipt["request"]["options"]["lam"]) == (3, 0.5)


@pytest.mark.parametrize("send", [lambda r: pickle.loads(pickle.dumps(r)), copy.deepcopy])
def test_a_result_can_be_pickled_with_its_guidance_image(
    editor: Editor, asked: EditRequest, send: Callable[[Any], Any]
) -> None:
    result = editor.edit(asked, callback=lambda progress: None)
    back = send(result)
    assert torch.equal(back.latent, result.latent) and back.receipt == result.receipt
    assert back.image.tobytes() == result.image.tobytes()
    assert back.guidance.tobytes() == result.guidance.tobytes()  # type: ignore[union-attr]
    assert back.profile.as_dict() == result.profile.as_dict()


@pytest.mark.parametrize("answer", [False, np.False_])
def test_false_of_python_or_numpy_cancels_and_nothing_else_does(
    editor: Editor, asked: EditRequest, answer: Any
) -> None:
    with pytest.raises(Cancelled):
        editor.edit(asked, callback=lambda progress: answer)
    for going_on in (None, True, np.True_, 0):
        editor.edit(asked, callback=lambda progress, a=going_on: a)  # type: ignore[misc]
