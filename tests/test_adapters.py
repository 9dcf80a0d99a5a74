"""T2I-Adapters as readers of layouts: diffusers' pipeline, their place beside ControlNets, what cannot run them, and what does not fit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
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
from iedit.runtime.model.checkpoint import (
    ADAPTER_TYPES,
    adapter_features,
    features_taken,
    find_checkpoint,
    fitting_adapter,
    unet_features,
)
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
        net: Any = T2IAdapter(in_channels=channels, channels=[16, 32], num_res_blocks=1)
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


def assert_as_diffusers_pipeline(model: Any, names: tuple[str, ...]) -> None:
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


@pytest.mark.parametrize("names", [("sketch",), ("edge",), ("sketch", "edge")])
def test_it_is_diffusers_adapter_pipeline(model: Any, names: tuple[str, ...]) -> None:
    assert_as_diffusers_pipeline(model, names)


DOWN = ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")  # of the embedded model
WIDE = (16, 16, 32)


@pytest.fixture(scope="module")
def plain_first(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random checkpoint with a UNet whose first block has no cross-attention, an adapter for its three blocks, and one that adds to the
    middle too, as SDXL's."""
    from diffusers import T2IAdapter, UNet2DConditionModel

    made = tmp_path_factory.mktemp("plain") / "checkpoint"
    shutil.copytree(tiny_folder, made, ignore=shutil.ignore_patterns("controlnet-*", "unet"))
    torch.manual_seed(1)
    net: Any = UNet2DConditionModel(
        sample_size=8, block_out_channels=WIDE, layers_per_block=1, down_block_types=DOWN, norm_num_groups=8, attention_head_dim=2,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32,
    )  # fmt: skip
    net.save_pretrained(made / "unet")
    for name, widths in (("sketch", WIDE), ("middle", (*WIDE, WIDE[-1]))):
        reader: Any = T2IAdapter(3, list(widths), num_res_blocks=1, downscale_factor=16, adapter_type="full_adapter_xl")
        reader.save_pretrained(made / f"adapter-{name}")
    return made


@pytest.mark.parametrize("name", ["sketch", "middle"])
def test_on_a_unet_whose_first_block_has_no_cross_attention_it_is_diffusers_adapter_pipeline(
    plain_first: Path, name: str
) -> None:
    model = load_model(str(plain_first), [name], device="cpu")
    assert_as_diffusers_pipeline(model, (name,))
    if name == "middle":  # its last feature is used
        told = control(name, layout(0))
        features = TorchBackend(model).adapter_features(name, told.image)
        text, x, t = Codec(model).encode_text([PROMPT]), torch.ones(1, *SHAPE), torch.tensor([400])
        with torch.no_grad():
            without = model.unet(x, t, text, down_intrablock_additional_residuals=features[:3]).sample
        assert gap(TorchBackend(model).predict(x, t, Condition(text, (told,))), without) > 1e-3


@pytest.mark.parametrize("kind", ADAPTER_TYPES)
@pytest.mark.parametrize("channels", [[8], [8, 16], [8, 16, 24], [8, 16, 24, 24]])
def test_what_an_adapter_makes_is_known_from_its_config(kind: str, channels: list[int]) -> None:
    from diffusers import T2IAdapter

    net: Any = T2IAdapter(3, channels, num_res_blocks=1, downscale_factor=4, adapter_type=kind)
    with torch.no_grad():
        made = net(torch.zeros(1, 3, 64, 64))
    said = adapter_features(kind, channels, 4)
    assert [tuple(f.shape) for f in made] == [(1, c, 64 // n, 64 // n) for c, n in zip(said.channels, said.cells)]


@pytest.mark.parametrize("down", list(itertools.product((False, True), repeat=3)), ids=str)
def test_what_a_unet_takes_is_known_from_its_config(down: tuple[bool, ...]) -> None:
    from diffusers import UNet2DConditionModel

    names = [("DownBlock2D", "CrossAttnDownBlock2D")[cross] for cross in down]
    net: Any = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16, 24), layers_per_block=1, down_block_types=tuple(names), norm_num_groups=4, attention_head_dim=2,
        up_block_types=("UpBlock2D",) * 3, cross_attention_dim=8,
    )  # fmt: skip
    taken = features_taken(net.config, {"block_out_channels": [1, 2, 3]})
    assert taken.channels == (8, 16, 24)

    @torch.no_grad()
    def run(cells: Sequence[int]) -> Tensor:
        features = [torch.ones(1, c, 32 // n, 32 // n) for c, n in zip(taken.channels, cells)]
        out: Tensor = net(
            torch.ones(1, 4, 8, 8), 7, torch.ones(1, 1, 8), down_intrablock_additional_residuals=features
        ).sample
        assert not features  # all were added
        return out

    assert run(taken.cells).shape == (1, 4, 8, 8)
    for i, n in enumerate(taken.cells):
        for other in (n // 2, n * 2):
            if other != 32:  # a feature of one cell is spread over all
                with pytest.raises(RuntimeError, match="must match"):
                    run([*taken.cells[:i], other, *taken.cells[i + 1 :]])


def test_the_adapter_for_a_unet_is_named_where_there_is_one() -> None:
    cross, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    sd = unet_features((320, 640, 1280, 1280), [cross] * 3 + [plain], 8)
    assert sd == adapter_features("full_adapter", (320, 640, 1280, 1280), 8)
    assert sd == adapter_features("light_adapter", (320, 640, 1280), 8)
    assert fitting_adapter(sd) == ("full_adapter", 8)
    sdxl = unet_features((320, 640, 1280), [plain, cross, cross], 8)
    assert fitting_adapter(sdxl) == ("full_adapter_xl", 16)
    assert fitting_adapter(unet_features((8, 8, 8), [plain, plain, plain], 8)) is None


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
            {"channels": [16, 128]},
            r"makes features of 16 channels at 1/8, 128 channels at 1/16 of the picture's size; the UNet adds features of 16 channels at 1/8, "
            r"32 channels at 1/16 of the picture's size; one for this UNet has channels \[16, 32\] in place of \[16, 128\]$",
        ),
        (
            {"adapter_type": "light_adapter"},
            "makes features of 16 channels at 1/8, 32 channels at 1/16, 32 channels at 1/32 .*adapter_type full_adapter in place of light_adapter$",
        ),
        (
            {"downscale_factor": 16},
            "makes features of 16 channels at 1/16, 32 channels at 1/32 .* has downscale_factor 8 in place of 16$",
        ),
        (
            {"adapter_type": "full_adapter_xl"},
            "makes features of 16 channels at 1/8, 32 channels at 1/8 .* has adapter_type full_adapter in place of full_adapter_xl$",
        ),
        (
            {"adapter_type": "half_adapter"},
            "adapter_type 'half_adapter', expected full_adapter, light_adapter, full_adapter_xl",
        ),
        ({"channels": "many"}, "channels 'many', expected a list of whole numbers above 0"),
        ({"channels": [16, 32, 32]}, r"channels \[16, 32\] in place of \[16, 32, 32\]$"),
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


@pytest.mark.parametrize(
    ("adapter", "unet", "says"),
    [
        (
            {"adapter_type": "full_adapter", "downscale_factor": 8},
            {},
            "makes features of 16 channels at 1/8, 16 channels at 1/16, .* adds features of 16 channels at 1/16, 16 channels at 1/16, .* has "
            "adapter_type full_adapter_xl in place of full_adapter and downscale_factor 16 in place of 8$",
        ),
        (
            {},
            {"down_block_types": ["DownBlock2D"] * 3},
            "at 1/32 of the picture's size; no type of adapter makes those",
        ),
        (
            {},
            {"down_block_types": ["AttnDownBlock2D", *DOWN[1:]]},
            "UNet of down_block_types .*AttnDownBlock2D.* needs down blocks of",
        ),
        ({}, {"down_block_types": "DownBlock2D"}, "UNet of down_block_types 'DownBlock2D'"),
        ({}, {"block_out_channels": [16, True, 32]}, r"UNet of block_out_channels \[16, True, 32\]"),
        (
            {"channels": [*WIDE, 32]},
            {"mid_block_type": None},
            r"has channels \[16, 16, 32\] in place of \[16, 16, 32, 32\]",
        ),
        ({"channels": [*WIDE, 16]}, {}, r"has channels \[16, 16, 32\] in place of \[16, 16, 32, 16\]"),
    ],
)
def test_an_adapter_whose_features_are_not_added_where_they_fit_is_refused(
    plain_first: Path, tmp_path: Path, adapter: dict[str, Any], unet: dict[str, Any], says: str
) -> None:
    made = Path(shutil.copytree(plain_first, tmp_path / "checkpoint"))
    for part, changes in (("adapter-sketch", adapter), ("unet", unet)):
        path = made / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UsageError, match=says) as caught:
        find_checkpoint(str(made), ["sketch"])
    assert "\n" not in str(caught.value) and "adapter-sketch" in str(caught.value)


def test_a_name_with_two_readers_or_none_is_refused(folder: Path, tmp_path: Path) -> None:
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
