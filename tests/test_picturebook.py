"""The embedded model as it is shipped: complete, standard, and good enough to be edited with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from iedit.runtime.cli.demo import sample_requests
from iedit.runtime.editor import Editor, EditRequest
from iedit.runtime.images import load_image
from iedit.runtime.model.checkpoint import picturebook_folder
from iedit.training import metrics, world
from iedit.training.embed import images_to_tensor

LIMIT = 48e6


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor.load(backend="torch", device="cpu")


def test_it_is_at_most_48_megabytes_of_float16_safetensors() -> None:
    from safetensors import safe_open

    files = [p for p in picturebook_folder().rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= LIMIT
    weights = [p for p in files if p.suffix == ".safetensors"]
    assert {p.parent.name for p in weights} >= {
        "unet",
        "vae",
        "text_encoder",
        "clip",
        "controlnet-pose",
        "controlnet-scribble",
    }
    for path in weights:
        with safe_open(path, "pt") as file:
            kinds = {file.get_slice(k).get_dtype() for k in file.keys()}  # noqa: SIM118 (not a dict)
        assert kinds <= {"F16", "I64"}, path


def test_diffusers_loads_it_as_a_stable_diffusion_pipeline_with_the_same_picture() -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        picturebook_folder(), local_files_only=True, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    editor = Editor.load(backend="torch", device="cpu")
    caption = "a red car on grass at noon"
    from iedit.runtime.schedule import seeded_noise

    latents = seeded_noise(3, "generate", (4, 16, 16)).unsqueeze(0)
    theirs = pipeline(caption, num_inference_steps=10, guidance_scale=5.0, latents=latents).images[0]
    ours = editor.generate([caption], seeds=[3], steps=10, guidance_scale=5.0, guidance_until=1.0, eta=0)[0]
    # Rounding to bytes may differ by one where the networks' roundings do.
    assert np.abs(np.asarray(theirs).astype(int) - np.asarray(ours).astype(int)).max() <= 1


def test_the_card_carries_figures_and_the_commands_that_made_them() -> None:
    card = (picturebook_folder() / "README.md").read_text()
    for text in (
        "iedit train embed",
        "iedit train figures",
        "iedit evaluate truth",
        "iedit train classifier",
        "seed",
        "hours",
    ):
        assert text in card


def test_the_autoencoder_gives_held_out_scenes_back(editor: Editor) -> None:
    scenes = [world.scene_of_seed(10_000 + i) for i in range(12)]
    pictures = [world.render(s) for s in scenes]
    back = editor.reconstruct(pictures)
    ratios = [
        float(metrics.psnr((images_to_tensor([a]) + 1) / 2, (images_to_tensor([b]) + 1) / 2))
        for a, b in zip(pictures, back)
    ]
    assert sum(ratios) / len(ratios) >= 30


@pytest.mark.parametrize(
    ("change", "share"),
    [(world.Change("colour", 0, "blue"), 0.7), (world.Change("thing", 1, "mushroom"), 0.9)],
    ids=["recolour the left thing", "swap the right thing"],
)
def test_an_edit_of_one_thing_moves_it_toward_the_exact_target_and_leaves_the_other_alone(
    editor: Editor, change: world.Change, share: float
) -> None:
    before = world.Scene(
        (world.Thing("car", "red", 33, 108, 44), world.Thing("tree", "green", 95, 106, 43)), "sand", "noon", 78
    )
    after = world.edit(before, change)
    source, target = world.render(before), world.render(after)
    result = editor.edit(EditRequest(source, world.caption(after), world.caption(before)))

    def values(picture: Any) -> torch.Tensor:
        return (images_to_tensor([picture]) + 1) / 2

    region = torch.from_numpy(np.asarray(world.exact_region(before, after)) > 127)[None, None]
    got, start, exact = values(result.image), values(source), values(target)
    inside, unedited = metrics.l1(got, exact, region), metrics.l1(start, exact, region)
    assert inside < share * unedited  # the caption does not tell how large a new thing is, and where it stands
    assert metrics.l1(got, start, ~region) <= 0.03
    half = torch.zeros_like(region)
    half[..., :64] = True
    other = ~half if change.index == 0 else half
    assert metrics.l1(got, start, other) <= 0.03


def test_the_samples_are_complete_and_cover_four_kinds_of_edit() -> None:
    requests = sample_requests()
    assert len(requests) >= 4
    assert any("pose" in r.layouts for _, r in requests)
    assert any("scribble" in r.layouts for _, r in requests)
    assert sum(not r.layouts for _, r in requests) >= 2
    for _, request in requests:
        assert request.image.size == (world.SIZE, world.SIZE)
        for picture in (*request.layouts.values(), *request.source_layouts.values()):
            assert picture.size == request.image.size


def test_clip_finds_the_caption_of_a_picture() -> None:
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = picturebook_folder()
    clip = CLIPModel.from_pretrained(folder / "clip", local_files_only=True).float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    processor = CLIPImageProcessor.from_pretrained(folder / "clip", local_files_only=True)
    scenes = [world.scene_of_seed(20_000 + i) for i in range(32)]
    tokens = tokenizer([world.caption(s) for s in scenes], padding="max_length", return_tensors="pt")
    pixels = processor([world.render(s) for s in scenes], return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = clip(input_ids=tokens.input_ids, pixel_values=pixels).logits_per_image
    assert (logits.argmax(1) == torch.arange(32)).float().mean() >= 0.8


def test_its_index_names_every_part() -> None:
    index: dict[str, Any] = json.loads((picturebook_folder() / "model_index.json").read_text())
    for name, value in index.items():
        if isinstance(value, list) and value[0] is not None:
            assert (picturebook_folder() / name).is_dir(), name


def test_a_sample_is_a_png_that_loads() -> None:
    for path in sorted((picturebook_folder() / "samples").glob("*.png")):
        assert load_image(Path(path)).mode == "RGB"
