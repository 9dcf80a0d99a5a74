"""What an edit cannot take into account is a note: words and pictures that the embedded model does not know, transparency, frames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageFilter

from iedit.runtime import images
from iedit.runtime.cli.main import main
from iedit.runtime.editor import Editor, EditRequest
from iedit.runtime.model.checkpoint import find_checkpoint
from iedit.training import embed, world


@pytest.fixture(scope="module")
def picturebook() -> Editor:
    return Editor.load(device="cpu", layouts=[])


@pytest.fixture
def small(tiny_checkpoint_cli: Path) -> Editor:
    return Editor.load(str(tiny_checkpoint_cli), device="cpu", layouts=[])


def like_a_photograph(size: int = 128) -> Image.Image:
    """Noise with the spectrum of photographs: amplitude falls as 1/f, the same in all colours with a little of each."""
    rng = np.random.default_rng(0)
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.rfftfreq(size), indexing="ij"))
    shades = [np.fft.irfft2(np.fft.rfft2(rng.normal(size=(size, size))) / np.maximum(f, 1 / size)) for _ in range(4)]
    stacked = np.stack([shades[0] + 0.3 * c for c in shades[1:]], axis=-1)
    scaled = (stacked - stacked.mean()) / stacked.std() * 50 + 120
    return Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8))


def notes_of(editor: Editor, image: Any, prompt: str = "a blue car", source: str = "") -> list[str]:
    return editor.edit(EditRequest(image, prompt, source, "sdedit", steps=1)).notes


def test_words_that_the_embedded_model_does_not_know_are_named_once(picturebook: Editor) -> None:
    picture = world.render(world.scene_of_seed(3))
    found = notes_of(picturebook, picture, "A red dog, on Main street: a DOG!")
    assert len(found) == 1
    assert 'picturebook does not know "dog", "main", "street"' in found[0]
    assert notes_of(picturebook, picture, world.caption(world.scene_of_seed(4)).upper() + ".") == []


def test_its_words_are_those_of_its_tokenizer_s_training_and_every_caption_has_no_other(picturebook: Editor) -> None:
    assert find_checkpoint("picturebook").recommended.words == embed.WORDS
    for seed in range(200):
        assert set(world.caption(world.scene_of_seed(seed)).split()) <= picturebook.model.words
    shown = CliRunner().invoke(main, ["info", "--json"])
    assert "mushroom" in json.loads(shown.stdout)["model"]["words"]


def test_a_picture_of_another_world_is_told_at_every_size_and_one_of_its_own_is_not(picturebook: Editor) -> None:
    for size in (128, 96):
        photo = like_a_photograph(size)
        assert ["no picture of the world that picturebook draws" in n for n in notes_of(picturebook, photo)] == [True]
    for seed in (1, 2, 3):
        own = world.render(world.scene_of_seed(seed))
        assert notes_of(picturebook, own) == []
    softened = own.filter(ImageFilter.GaussianBlur(0.8))
    assert notes_of(picturebook, softened) == []
    assert notes_of(picturebook, own.resize((256, 256), Image.Resampling.BICUBIC)) == []


def test_the_judgement_costs_no_network_evaluation_and_is_kept_with_the_picture(
    picturebook: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo, decoded = like_a_photograph(), []
    decode = type(picturebook.codec).decode

    def counted(self: Any, *words: Any, **more: Any) -> Any:
        decoded.append(1)
        return decode(self, *words, **more)

    monkeypatch.setattr(type(picturebook.codec), "decode", counted)
    picturebook.cache = type(picturebook.cache)()
    request = EditRequest(photo, "a blue car", method="sdedit", steps=1)
    first = picturebook.edit(request)
    assert (len(decoded), first.profile.evaluations) == (2, {"encode": 0, "sample": 2, "decode": 0})
    second = picturebook.edit(request)
    assert len(decoded) == 3 and second.notes == first.notes


def test_a_model_that_says_nothing_of_its_world_is_not_judged(small: Editor) -> None:
    assert notes_of(small, like_a_photograph(32), "a zebra") == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("clear.png", "transparency was dropped: it was laid on white"),
        ("moving.gif", "the file holds several pictures: only the first was used"),
        ("opaque.png", ""),
    ],
)
def test_transparency_and_frames_that_are_dropped_are_noted(
    small: Editor, tiny_checkpoint_cli: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    frame = Image.new("RGB", (32, 32), "green")
    frame.convert("RGBA").save("opaque.png")
    hole = frame.convert("RGBA")
    hole.putpixel((3, 3), (0, 0, 0, 0))
    hole.save("clear.png")
    frame.save("moving.gif", save_all=True, append_images=[Image.new("RGB", (32, 32), c) for c in ("red", "blue")])
    found = notes_of(small, images.load_image(name))
    assert [says in note for note in found] == ([True] if says else [])
    if name == "clear.png":
        assert notes_of(small, hole) == found
    words = ["edit", name, "--prompt", "x", "--model", str(tiny_checkpoint_cli), "--method", "sdedit", "--steps", "1"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert (f"note: {found[0]}" in result.stderr) if says else ("note" not in result.stderr)
