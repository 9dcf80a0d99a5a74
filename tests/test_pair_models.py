"""The networks of the pairs against the same models used by hand, on random ones of the same classes; and what is no such model is one line."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from iedit.runtime.errors import UsageError
from iedit.training import pair_models
from iedit.training.pair_models import Captioner, Clip, Segmenter, find_model, folder_digest, load


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.spec_from_file_location("small_models", Path(__file__).with_name("small_models.py"))
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("models")
    for name in ("clip", "clipseg", "blip"):
        getattr(module, name)(folder / name)
    return folder


PICTURES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((64, 64))
    for i in range(5)
]
TEXTS = ["red car", "boat", "a very long text about a dog and a man near a house", "", "blue"]


def test_clip_embeds_as_transformers_own_functions_do(models: Path) -> None:
    from transformers import AutoProcessor, CLIPModel

    clip = Clip(models / "clip", "cpu")
    net, processor = CLIPModel.from_pretrained(models / "clip"), AutoProcessor.from_pretrained(models / "clip")
    inputs = processor(
        text=TEXTS, images=PICTURES, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        output = net(**inputs)
    for got, expected in ((clip.images(PICTURES), output.image_embeds), (clip.texts(TEXTS), output.text_embeds)):
        assert got.dtype == np.float32 and np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
        assert np.abs(got - expected.numpy()).max() < 1e-6
        assert len({tuple(row) for row in got.round(4)}) == 5
    assert np.abs(clip.texts(TEXTS[:1]) - clip.texts(TEXTS)[:1]).max() < 1e-6  # whatever else is in the batch


def test_the_embedded_clip_finds_the_caption_of_a_render() -> None:
    import random

    from iedit.training import world

    scenes = [world.random_scene(random.Random(f"clip-{i}"), 1) for i in range(12)]
    clip = load("picturebook", "clip", "cpu")
    cosines = clip.images([world.render(s) for s in scenes]) @ clip.texts([world.caption(s) for s in scenes]).T
    assert (cosines.argmax(1) == np.arange(12)).sum() >= 9
    assert load("picturebook", "clip", "cpu") is clip  # loaded once


def test_captions_are_the_likeliest_words_and_those_of_a_picture_alone(models: Path) -> None:
    from transformers import BlipForConditionalGeneration, BlipProcessor

    captioner = Captioner(models / "blip", "cpu")
    captions = captioner.captions(PICTURES)
    net: Any = BlipForConditionalGeneration.from_pretrained(models / "blip")
    processor: Any = BlipProcessor.from_pretrained(models / "blip")
    for picture, caption in zip(PICTURES, captions, strict=True):
        pixels = processor(images=picture, return_tensors="pt").pixel_values
        with torch.no_grad():
            states = net.vision_model(pixels).last_hidden_state
            ids = [net.config.text_config.bos_token_id]
            while len(ids) <= pair_models.LONGEST_CAPTION and ids[-1] != net.config.text_config.sep_token_id:
                logits = net.text_decoder(torch.tensor([ids]), encoder_hidden_states=states).logits
                ids.append(int(logits[0, -1].argmax()))
        assert caption == processor.decode(ids[1:], skip_special_tokens=True)
    assert len(set(captions)) > 1


def test_masks_are_clipseg_s_sigmoid_above_the_threshold_at_the_picture_s_size(models: Path) -> None:
    from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

    segmenter = Segmenter(models / "clipseg", "cpu")
    net, processor = (c.from_pretrained(models / "clipseg") for c in (CLIPSegForImageSegmentation, CLIPSegProcessor))
    wide = [PICTURES[0].resize((96, 72)), *PICTURES[1:]]
    got = segmenter.masks(wide, TEXTS, 0.48)
    for picture, text, mask in zip(wide, TEXTS, got, strict=True):
        inputs = processor(
            text=[text], images=[picture], padding="max_length", max_length=16, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            share = torch.sigmoid(net(**inputs).logits).reshape(1, 1, 32, 32)
        large = torch.nn.functional.interpolate(share, size=picture.size[::-1], mode="bilinear")[0, 0]
        assert mask.dtype == bool and mask.shape == picture.size[::-1]
        sure = (large - 0.48).abs() > 1e-5
        assert (torch.from_numpy(mask) == (large > 0.48))[sure].all() and sure.float().mean() > 0.99
    assert 0 < sum(m.mean() for m in got) < 5
    assert all((low >= high).all() for low, high in zip(got, segmenter.masks(wide, TEXTS, 0.5), strict=True))


def test_what_is_no_such_model_is_one_line(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    broken, weightless, odd = (shutil.copytree(models / "clip", tmp_path / n) for n in ("broken", "weightless", "odd"))
    (broken / "model.safetensors").write_bytes(b"no weights")
    (weightless / "model.safetensors").unlink()
    config = json.loads((odd / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (odd / "config.json").write_text(json.dumps(config))
    (tmp_path / "empty").mkdir()
    for name, purpose, says in (
        (models / "clipseg", "clip", "is of model_type 'clipseg', expected a CLIPModel, such as openai/"),
        (models / "clip", "masks", "is of model_type 'clip', expected a CLIPSegForImageSegmentation, such as CIDAS/"),
        (models / "clip", "captions", "is of model_type 'clip', expected an image-to-text model, such as Salesforce/"),
        ("no-such-model", "clip", "no-such-model is not a folder; give the folder or the hub id of a CLIPModel"),
        ("picturebook", "masks", "picturebook is not a folder; give the folder or the hub id of a CLIPSeg"),
        ("nobody/nothing", "masks", "nobody/nothing is not a folder here and could not be fetched from the hub"),
        (tmp_path / "empty", "clip", "holds no config.json with weights beside it"),
        (weightless, "clip", "holds no config.json with weights beside it"),
        (broken, "clip", "cannot be loaded as a CLIPModel"),
        (odd, "clip", "lacks 16 of the weights of a CLIPModel"),
    ):
        with pytest.raises(UsageError) as error:
            load(str(name), purpose, "cpu")
        assert says in str(error.value) and "\n" not in str(error.value), error.value


def test_a_digest_is_of_the_weights_the_config_and_the_words(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "clip", tmp_path / "copy")
    before = folder_digest(find_model(str(folder), "clip"))
    assert before == folder_digest(models / "clip")
    for name in ("model.safetensors", "config.json", "merges.txt", "preprocessor_config.json"):
        files = [p for p in folder.iterdir() if p.name == name]
        for path in files:
            data = path.read_bytes()
            path.write_bytes(data + b" ")
            assert folder_digest(folder) != before, name
            path.write_bytes(data)
    assert folder_digest(folder) == before
