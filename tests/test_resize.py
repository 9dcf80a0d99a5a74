"""A picture far larger than the model's is refused, or worked on smaller and pasted back; the VAE says how far it is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from iedit.runtime.cli.main import main
from iedit.runtime.editor import Editor, EditRequest, MaskOptions, Options
from iedit.runtime.errors import Cancelled, UsageError
from iedit.runtime.images import read_receipt
from iedit.runtime.profile import Progress


@pytest.fixture
def large(picture: Callable[..., Any]) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 40, (192, 256, 3), dtype=np.uint8)
    return Image.fromarray(np.asarray(picture(0, (256, 192))) // 2 + noise)


def square() -> Image.Image:
    mask = Image.new("L", (256, 192))
    mask.paste(255, (61, 47, 150, 131))
    return mask


def ask(image: Image.Image, **more: Any) -> EditRequest:
    options = more.pop("options", Options(resize=64))
    return EditRequest(image, "a red car", **({"steps": 2, "options": options} | more))


def test_a_given_mask_is_pasted_back_and_outside_it_nothing_changes(editor: Editor, large: Image.Image) -> None:
    result = editor.edit(ask(large, mask=square()))
    assert result.image.size == large.size and result.latent.shape[-2:] == (6, 8)  # worked on at 64x48
    outside = np.asarray(square()) == 0
    assert (np.asarray(result.image)[outside] == np.asarray(large)[outside]).all()
    assert (np.asarray(result.image)[~outside] != np.asarray(large)[~outside]).any()
    assert result.mask is not None and result.mask.tobytes() == square().tobytes()
    assert result.receipt["request"]["options"]["resize"] == 64


def test_an_estimated_mask_is_enlarged_and_outside_it_nothing_changes(editor: Editor, large: Image.Image) -> None:
    result = editor.edit(ask(large, options=Options(resize=64, mask=MaskOptions(seeds=1, threshold=0.5))))
    assert result.mask is not None and result.mask.size == large.size
    outside = np.asarray(result.mask) == 0
    assert 0.05 < outside.mean() < 0.95
    assert (np.asarray(result.image)[outside] == np.asarray(large)[outside]).all()


def test_without_a_mask_everything_is_the_edit_enlarged(editor: Editor, large: Image.Image) -> None:
    result = editor.edit(ask(large, method="sdedit"))
    small = editor.edit(ask(large.resize((64, 48), Image.Resampling.LANCZOS), method="sdedit", options=Options()))
    assert result.mask is None
    enlarged = small.image.resize(large.size, Image.Resampling.LANCZOS)
    assert result.image.tobytes() == enlarged.tobytes()


def test_layouts_are_resized_with_the_picture_and_checked_against_it(editor: Editor, large: Image.Image) -> None:
    maps = {"scribble": large}
    assert editor.edit(ask(large, layouts=maps)).image.size == large.size
    with pytest.raises(UsageError, match="layout scribble: it is 100x100 and the image 256x192"):
        editor.edit(ask(large, layouts={"scribble": large.resize((100, 100))}))


def test_a_picture_that_is_small_enough_is_left_alone(editor: Editor, picture: Callable[..., Any]) -> None:
    plain, asked = ask(picture(0), options=Options()), ask(picture(0), options=Options(resize=64))
    assert editor.edit(plain).image.tobytes() == editor.edit(asked).image.tobytes()


def test_the_cache_keeps_sizes_apart(editor: Editor, large: Image.Image) -> None:
    first = editor.edit(ask(large))
    again = editor.edit(ask(large))
    other = editor.edit(ask(large, options=Options(resize=48)))
    assert "invert" in again.profile.cached and again.image.tobytes() == first.image.tobytes()
    assert other.profile.cached == []


def test_a_picture_far_larger_than_the_model_s_is_refused_with_what_to_do(editor: Editor, large: Image.Image) -> None:
    huge = large.resize((300, 300))
    with pytest.raises(
        UsageError, match=r"300x300 is more than 4x4 times the 64x64 .* --resize 64 \(to --resize 256\)"
    ):
        editor.edit(ask(huge, options=Options()))
    assert editor.edit(ask(huge, method="sdedit")).image.size == (300, 300)
    with pytest.raises(UsageError, match="resize is 3, expected 8 to 4096"):
        editor.edit(ask(huge, options=Options(resize=3)))


def test_the_command_line_resizes_and_replays_and_refuses_before_loading(
    tiny_checkpoint_cli: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: Image.Image
) -> None:
    monkeypatch.chdir(tmp_path)
    large.save("in.png")
    square().save("mask.png")
    words = ["edit", "in.png", "--prompt", "a red car", "--model", str(tiny_checkpoint_cli), "--steps", "2"]
    done = CliRunner().invoke(main, [*words, "--mask", "mask.png", "--resize", "32", "--output", "out.png"])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("out.png: 256x192, mask 15%")
    assert read_receipt("out.png")["request"]["options"]["resize"] == 32
    again = CliRunner().invoke(main, ["replay", "out.png", "--model", str(tiny_checkpoint_cli)])
    assert again.stdout == "out.png: identical\n", again.output
    monkeypatch.setattr(Editor, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 2 and "256x192 is more than 4x4 times the 32x32" in refused.stderr
    assert "--resize 32" in refused.stderr and len(refused.stderr.splitlines()) == 1


def test_encoding_and_decoding_tell_their_steps_and_the_time_left_and_can_be_cancelled(
    editor: Editor, picture: Callable[..., Any]
) -> None:
    seen: list[Progress] = []
    editor.edit(ask(picture(0), method="sdedit", options=Options()), callback=lambda p: seen.append(p))
    for stage in ("encode", "decode"):
        steps = [(p.step, p.steps) for p in seen if p.stage == stage and p.step]
        assert steps == [(i, steps[0][1]) for i in range(1, len(steps) + 1)] and len(steps) > 3, stage
    lefts = [p.seconds_left for p in seen if p.stage == "encode" and p.step > 1]
    assert lefts and all(left is not None and left >= 0 for left in lefts)
    with pytest.raises(Cancelled, match="stage encode, step 3"):
        other = ask(picture(1), method="sdedit", options=Options())
        editor.edit(other, callback=lambda p: (p.stage, p.step) != ("encode", 3))
    assert not any(m._forward_pre_hooks for m in editor.model.vae.modules())
    assert json.dumps(dataclasses.asdict(seen[0]))
