"""T2I-Adapters as readers of layouts: diffusers' pipeline, their place beside ControlNets, what cannot run them, and what does not fit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from iedit.runtime.backends.eager import TorchBackend
from iedit.runtime.backends.engine import EngineBackend
from iedit.runtime.backends.fallback import FallbackBackend
from iedit.runtime.cli.main import main
from iedit.runtime.codec import Codec
from iedit.runtime.denoise_step import Condition, ControlInput
from iedit.runtime.editor import Editor, EditRequest, Options
from iedit.runtime.errors import UsageError
from iedit.runtime.images import to_tensor
from iedit.runtime.model.model import load_model, read_digests
from iedit.runtime.network import Network
from iedit.runtime.profile import Profile
from iedit.runtime.sampling import masked_sampling
from iedit.runtime.schedule import seeded_noise

PROMPT, SHAPE = "a blue house on sand at sunset", (4, 8, 8)
Picture = Callable[..., Image.Image]


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random checkpoint with two adapters: one that reads colour, one that reads brightness."""
    from diffusers import T2IAdapter

    made = Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("adapted") / "checkpoint"))
    shutil.rmtree(made / "controlnet-scribble")
    for seed, (name, channels) in enumerate((("sketch", 3), ("edge", 1))):
        torch.manual_seed(seed)
        net: Any = T2IAdapter(in_channels=channels, channels=[32, 64], num_res_blocks=1)
        net.save_pretrained(made / f"adapter-{name}")
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(str(folder), device="cpu")


def layout(seed: int, mode: str = "RGB") -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((64, 64), Image.Resampling.BICUBIC).convert(mode).convert("RGB")


def control(name: str, picture: Image.Image, scale: float = 1.0, adapter: bool = True) -> ControlInput:
    return ControlInput(name, (to_tensor(picture) + 1) / 2, scale, adapter)


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference in units of the largest value."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("names", [("sketch",), ("edge",), ("sketch", "edge")])
def test_it_is_diffusers_adapter_pipeline(model: Any, names: tuple[str, ...]) -> None:
    from diffusers import DDIMScheduler, StableDiffusionAdapterPipeline

    maps = [layout(i, "L" if name == "edge" else "RGB") for i, name in enumerate(names)]
    scales = [1.0, 0.6][: len(names)]
    text, noise = Codec(model).encode_text([PROMPT, ""]), seeded_noise(3, "generate", SHAPE)[None]
    told = Condition(text[:1], tuple(control(n, m, s) for n, m, s in zip(names, maps, scales)))
    network = Network(TorchBackend(model), model.schedule.prediction, 64, Profile())
    path = model.schedule.levels(20).path()
    got = network.run(masked_sampling(noise, path, told, told.with_prompt(text[1:]), 7.5))
    pipe = StableDiffusionAdapterPipeline(
        vae=model.vae, text_encoder=model.text_encoder, tokenizer=model.tokenizer, unet=model.unet,
        adapter=[model.adapters[n] for n in names] if len(names) > 1 else model.adapters[names[0]],
        scheduler=DDIMScheduler.from_pretrained(model.folder / "scheduler"), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    given = [m.convert("L") if model.adapters[n].config.in_channels == 1 else m for n, m in zip(names, maps)]
    want = pipe(prompt=PROMPT, image=given if len(names) > 1 else given[0], height=64, width=64, num_inference_steps=20,
                guidance_scale=7.5, latents=noise, adapter_conditioning_scale=scales if len(names) > 1 else scales[0],
                output_type="latent").images  # fmt: skip
    assert gap(got, want) < 1e-5
    free = network.run(masked_sampling(noise, path, Condition(text[:1]), Condition(text[1:]), 7.5))
    assert gap(free, got) > 1e-3  # the adapter matters


def test_brightness_is_pillows(model: Any) -> None:
    colour = layout(5)
    grey = control("edge", colour.convert("L").convert("RGB")).image
    a, b = (TorchBackend(model).adapter_features("edge", x) for x in (control("edge", colour).image, grey))
    assert all(gap(x, y) < 0.02 for x, y in zip(a, b, strict=True))  # Pillow rounds to 1 of 255


def test_it_stands_beside_a_controlnet(model: Any) -> None:
    pose, sketch = control("pose", layout(1), 0.7, adapter=False), control("sketch", layout(2), 0.5)
    text = Codec(model).encode_text([PROMPT])
    x, t = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([400])
    with torch.no_grad():
        down, mid = model.controlnets["pose"](x, t, text, pose.image, conditioning_scale=0.7, return_dict=False)
        features = [0.5 * f for f in model.adapters["sketch"](sketch.image)]
        want = model.unet(x, t, text, down_block_additional_residuals=down, mid_block_additional_residual=mid,
                          down_intrablock_additional_residuals=features).sample  # fmt: skip
    backend = TorchBackend(model)
    told = Condition(text, (pose, sketch))
    for _ in range(2):  # the second time from what was kept
        assert gap(backend.predict(x, t, told), want) < 1e-5


def test_features_are_computed_once_for_an_edit(model: Any, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = list[int](), model.adapters["sketch"].forward

    def counted(x: Tensor) -> Any:
        calls.append(len(x))
        return forward(x)

    monkeypatch.setattr(model.adapters["sketch"], "forward", counted)
    asked = EditRequest(picture(0), PROMPT, "a red car", "controlnet", {"sketch": layout(1)}, steps=6)
    result = Editor(model, TorchBackend(model)).edit(asked)
    assert calls == [2] and result.profile.evaluations["sample"] == 2 * 4  # both halves of the guidance


def edited(model: Any, picture: Picture, **options: Any) -> Tensor:
    asked = EditRequest(picture(0), PROMPT, "a red car", "controlnet", {"sketch": layout(1)}, steps=4,
                        options=Options(guidance_scale=5.0, **options))  # fmt: skip
    return Editor(model, TorchBackend(model)).edit(asked).latent


def test_its_scale_is_an_option_and_the_cache_and_the_digest_know_it(
    model: Any, folder: Path, picture: Picture
) -> None:
    one, half = edited(model, picture), edited(model, picture, control_scales=(("sketch", 0.5),))
    assert gap(half, one) > 1e-4
    assert (
        gap(edited(model, picture, control_scale=0.0), edited(model, picture, control_scales=(("sketch", 0.0),))) == 0
    )
    assert set(model.part_digests) == {
        "unet",
        "vae",
        "text_encoder",
        "controlnet-pose",
        "adapter-sketch",
        "adapter-edge",
    }
    assert read_digests(str(folder)).whole == model.digest != load_model(str(folder), ["pose"], device="cpu").digest


@pytest.mark.parametrize("method", ["ito", "iedit", "controlnet-diffedit"])
def test_every_method_with_layouts_takes_it(model: Any, picture: Picture, method: str) -> None:
    maps, sources = {"sketch": layout(1)}, {"sketch": layout(2)}
    requests = [EditRequest(picture(i), PROMPT, "a red car", method, maps, sources, seed=i, steps=4) for i in range(2)]
    for asked, result in zip(requests, Editor(model, TorchBackend(model)).edit_many(requests), strict=True):
        assert torch.isfinite(result.latent).all()
        assert gap(result.latent, Editor(model, TorchBackend(model)).edit(asked).latent) < 1e-3


class Engines(TorchBackend):
    """Torch that refuses what engines refuse whatever they were built for."""

    name = "onnx"

    def why_not(self, module: str, batch: int, height: int, width: int) -> list[str]:
        return (
            EngineBackend.why_not(cast(EngineBackend, self), module, batch, height, width)
            if "adapter" in module
            else []
        )


def test_engines_refuse_before_anything_is_run_and_auto_gives_it_to_torch(model: Any, picture: Picture) -> None:
    asked = EditRequest(picture(0), PROMPT, "a red car", "controlnet", {"sketch": layout(1)}, steps=2)
    onnx = Engines(model)
    with pytest.raises(UsageError, match=r"'onnx' cannot run unet\+adapter-sketch: .* --backend torch, or auto"):
        Editor(model, onnx).edit(asked)
    result = Editor(model, FallbackBackend([onnx, TorchBackend(model)], model.vae_scale_factor)).edit(asked)
    assert torch.equal(result.latent, Editor(model, TorchBackend(model)).edit(asked).latent)
    (why,) = [f for f in result.receipt["backend"]["fallbacks"] if f["module"] == "unet+adapter-sketch"]
    assert "no engine takes the features of a T2I-Adapter" in why["reasons"][0]


def test_from_the_command_line_inside_and_outside_the_checkpoint(
    folder: Path, picture: Picture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(0).save("in.png")
    layout(1).save("sketch.png")
    words = [
        "edit",
        "in.png",
        "--prompt",
        "a blue house",
        "--method",
        "controlnet",
        "--steps",
        "2",
        "--backend",
        "torch",
    ]
    done = CliRunner().invoke(
        main, [*words, "--model", str(folder), "--layout", "sketch=sketch.png", "--output", "a.png"]
    )
    assert done.exit_code == 0, done.output
    shutil.copytree(folder / "adapter-sketch", tmp_path / "mine")
    outside = [*words, "--model", str(folder), "--controlnet", "drawing=mine", "--layout", "drawing=sketch.png"]
    done = CliRunner().invoke(main, [*outside, "--output", "b.png"])
    assert done.exit_code == 0, done.output
    assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()
    info = CliRunner().invoke(main, ["info", "--model", str(folder)])
    assert "pose, edge, sketch" in info.stdout
    again = CliRunner().invoke(main, ["replay", "a.png", "--model", str(folder)])
    assert again.exit_code == 0 and "identical" in again.stdout, again.output


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"channels": [32, 128]},
            r"features of \[32, 128\] channels, the UNet's blocks have \[32, 64\]; it is for another model",
        ),
        ({"adapter_type": "light_adapter"}, r"features of \[32, 64, 64\] channels"),
        ({"downscale_factor": 16}, "reads a layout at 1/16 of its size, the VAE's latent is 1/8"),
        ({"adapter_type": "full_adapter_xl"}, "adapter_type 'full_adapter_xl', expected full_adapter or light_adapter"),
        ({"in_channels": 4}, "in_channels 4, expected 3, or 1"),
        ({"_class_name": "MultiAdapter"}, "is of a MultiAdapter, expected a ControlNetModel"),
    ],
)
def test_an_adapter_of_another_model_is_refused_by_field(
    folder: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    copied = Path(shutil.copytree(folder / "adapter-sketch", tmp_path / "adapter"))
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UsageError, match=says):
        load_model(str(folder), {"sketch": str(copied)}, device="cpu")


def test_a_unet_whose_blocks_have_no_cross_attention_and_a_name_with_two_readers_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "checkpoint"))
    config = json.loads((copied / "unet" / "config.json").read_text())
    blocks = ["DownBlock2D", "CrossAttnDownBlock2D"]
    (copied / "unet" / "config.json").write_text(json.dumps(config | {"down_block_types": blocks}))
    with pytest.raises(UsageError, match=r"cannot be added to a UNet of DownBlock2D, CrossAttnDownBlock2D"):
        load_model(str(copied), device="cpu")
    (folder_with_both := tmp_path / "both").mkdir()
    shutil.copytree(folder, folder_with_both, dirs_exist_ok=True)
    shutil.copytree(folder / "adapter-sketch", folder_with_both / "adapter-pose")
    with pytest.raises(UsageError, match="has both controlnet-pose and adapter-pose; rename one"):
        load_model(str(folder_with_both), device="cpu")
    with pytest.raises(UsageError, match="no ControlNet or T2I-Adapter for depth; it has pose, edge, sketch"):
        load_model(str(folder), ["depth"], device="cpu")


def test_an_unknown_adapter_leaves_the_controlnets_alone(model: Any) -> None:
    """The fields of a model that has none are those of before."""
    assert dataclasses.replace(model, adapters={}).layouts == ["pose"] and model.layouts == ["pose", "edge", "sketch"]
