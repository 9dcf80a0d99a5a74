"""A checkpoint that cannot be run here is refused by the name of the field, before any of its weights are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from iedit.runtime.cli.main import main
from iedit.runtime.codec import Codec
from iedit.runtime.editor import Options
from iedit.runtime.errors import UsageError
from iedit.runtime.model import model as models
from iedit.runtime.model.checkpoint import SCHEDULERS, find_checkpoint
from iedit.runtime.model.model import load_model


@pytest.fixture
def copy(tiny_checkpoint_cli: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return shutil.copytree(tiny_checkpoint_cli, tmp_path / "model")


def put(file: str, **changes: Any) -> Callable[[Path], None]:
    """Set fields of a JSON file of a checkpoint; makes the file where there is none."""

    def change(folder: Path) -> None:
        path = folder / file
        held = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(held | changes))

    return change


UNET, VAE, TEXT, POSE = (f"{p}/config.json" for p in ("unet", "vae", "text_encoder", "controlnet-pose"))
SCHEDULER, HINTS, INDEX = "scheduler/scheduler_config.json", "iedit.json", "model_index.json"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (put(HINTS, guidance_scale=1e9), "recommends guidance_scale 1000000000.0, expected a number from 0 to 100"),
        (put(HINTS, guidance_scale=-5), "recommends guidance_scale -5"),
        (put(HINTS, guidance_scale="7.5"), "recommends guidance_scale '7.5'"),
        (put(HINTS, mask_threshold=1.5), "recommends mask_threshold 1.5, expected a number from 0 to 1"),
        (put(HINTS, mask_threshold=float("nan")), "recommends mask_threshold nan"),
        (put(HINTS, mask_strength=0), "recommends mask_strength 0, expected a number from above 0 to 1"),
        (put(HINTS, mask_strength=True), "recommends mask_strength True"),
        (put(HINTS, text_update_share=[1]), "recommends text_update_share"),
        (put(HINTS, guidance_until=1.1), "recommends guidance_until 1.1, expected a number from 0 to 1"),
        (put(HINTS, guidance_path="bent"), "recommends guidance_path 'bent', expected inverted or drawn"),
        (put(HINTS, mask_seeds=0), "recommends mask_seeds 0, expected 1 to 1000"),
        (put(HINTS, lambda_area=26), "recommends lambda_area 26, expected a number from 0 to 1"),
        (put(HINTS, generate_eta=2), "recommends generate_eta 2, expected a number from 0 to 1"),
        (put(HINTS, mask_seeds=True), "recommends mask_seeds True"),
        (put(HINTS, mask_seeds=[4]), r"recommends mask_seeds \[4\]"),
        (put(SCHEDULER, _class_name="FlowMatchEulerDiscreteScheduler"), "FlowMatchEulerDiscreteScheduler, which DDIM cannot be built"),
        (put(SCHEDULER, _class_name="LCMScheduler"), "is of a LCMScheduler"),
        (put(SCHEDULER, _class_name=None), "is of a None"),
        (put(SCHEDULER, use_flow_sigmas=True), "use_flow_sigmas"),
        (put(SCHEDULER, num_train_timesteps=10**9), "num_train_timesteps 1000000000, expected a whole number"),
        (put(SCHEDULER, num_train_timesteps=None), "num_train_timesteps None"),
        (put(INDEX, _class_name="StableDiffusionXLPipeline"), "is of a StableDiffusionXLPipeline, which cannot be run here"),
        (put(INDEX, _class_name="StableDiffusionInpaintPipeline"), "StableDiffusionInpaintPipeline"),
        (put(INDEX, _class_name="FluxPipeline"), "FluxPipeline"),
        (put(INDEX, other=1), "is of a None"),
        (put(VAE, scaling_factor=-1), "scaling_factor -1, expected a number above 0"),
        (put(VAE, scaling_factor=None), "scaling_factor None"),
        (put(VAE, shift_factor="0.1"), "shift_factor '0.1', expected a number or null"),
        (put(VAE, latents_mean=[0.0] * 4), "latents_mean, which is not used here"),
        (put(VAE, latent_channels=None), "latent_channels None, expected a whole number above 0"),
        (put(VAE, _class_name="AutoencoderTiny"), "is of a AutoencoderTiny, expected an AutoencoderKL"),
        (put(UNET, addition_embed_type="text_time"), "addition_embed_type 'text_time', an input that Stable Diffusion 1.x has not"),
        (put(UNET, num_class_embeds=10), "num_class_embeds 10"),
        (put(UNET, class_embed_type="timestep"), "class_embed_type 'timestep'"),
        (put(UNET, time_cond_proj_dim=256), "time_cond_proj_dim 256"),
        (put(UNET, in_channels="4"), "in_channels '4', expected a whole number above 0"),
        (put(UNET, cross_attention_dim=[16, 16]), "cross_attention_dim \\[16, 16\\]"),
        (put(UNET, _class_name="Transformer2DModel"), "Transformer2DModel, expected a UNet2DConditionModel"),
        (put(TEXT, hidden_size=None), "hidden_size None"),
        (put(TEXT, max_position_embeddings=0), "max_position_embeddings 0"),
        (put(POSE, conditioning_channels=6), "conditioning_channels 6, expected 3"),
        (put(POSE, conditioning_embedding_out_channels=[8, 8]), "reads a layout at 1/2 of its size, the VAE's latent is 1/4"),
        (put(POSE, num_class_embeds=3), "num_class_embeds 3"),
        (put(POSE, _class_name="ControlNetUnionModel"), "ControlNetUnionModel, expected a ControlNetModel"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_run_is_refused_by_field_before_weights_are_read(
    copy: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], says: str
) -> None:
    monkeypatch.setattr(models, "_read", lambda *_: pytest.fail("weights were read"))
    damage(copy)
    with pytest.raises(UsageError, match=says) as caught:
        load_model(str(copy), device="cpu")
    assert "\n" not in str(caught.value)
    assert models.describe(str(copy))["problem"] == str(caught.value)


def test_noise_levels_outside_0_to_1_are_refused(copy: Path) -> None:
    put(SCHEDULER, beta_start=-0.5)(copy)
    with pytest.raises(UsageError, match="is not a schedule that DDIM can follow"):
        load_model(str(copy), device="cpu")
    put(SCHEDULER, beta_start=3.0, beta_end=3.5)(copy)
    with pytest.raises(UsageError, match="its betas give noise levels outside 0 to 1"):
        load_model(str(copy), device="cpu")


def test_a_tokenizer_without_the_tokens_that_frame_a_prompt_is_refused(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CLIPTokenizer

    monkeypatch.setattr(CLIPTokenizer, "pad_token_id", None, raising=False)
    with pytest.raises(UsageError, match="tokenizer has no pad_token_id"):
        load_model(str(copy), device="cpu")


@pytest.mark.parametrize("longest", ["", 2, -1, True, 7.5, [32]])
def test_a_tokenizer_without_room_for_a_word_is_refused(copy: Path, longest: object) -> None:
    path = copy / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": longest}))
    with pytest.raises(UsageError, match=r"tokenizer.*(model_max_length|cannot be read)"):
        load_model(str(copy), device="cpu")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_with_ddim_s_noise_levels_is_accepted(copy: Path, scheduler: str) -> None:
    put(SCHEDULER, _class_name=scheduler)(copy)
    assert find_checkpoint(str(copy)).folder == copy


def test_a_vae_s_shift_is_used_both_ways(copy: Path) -> None:
    plain = load_model(str(copy), [], device="cpu")
    put(VAE, shift_factor=0.25)(copy)
    shifted = load_model(str(copy), [], device="cpu")
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scale = plain.vae.config.scaling_factor
    latent = Codec(plain).encode(images)
    torch.testing.assert_close(Codec(shifted).encode(images), latent - 0.25 * scale)
    torch.testing.assert_close(
        Codec(shifted).decode(Codec(shifted).encode(images)), Codec(plain).decode(latent), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--guidance-scale", "1e9"], "1000000000.0 is not in the range 0<=x<=100"),
        (["--guidance-scale", "-5"], "-5.0 is not in the range 0<=x<=100"),
        (["--guidance-scale", "nan"], "nan is not in the range"),
        (["--control-scale", "1e9", "--layout", "pose=in.png"], "1000000000.0 is not in the range 0<=x<=10"),
        (["--lambda", "nan"], "nan is not in the range"),
        (["--k", "100000"], "100000 is not in the range 1<=x<=1000"),
    ],
)
def test_the_command_line_bounds_its_numbers_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("in.png")
    result = CliRunner().invoke(main, ["edit", "in.png", "--prompt", "x", "--model", "no/such/folder", *words])
    assert result.exit_code == 2 and says in result.stderr, result.output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Options(guidance_scale=1e9), "guidance_scale is 1000000000.0, expected 0 to 100"),
        (Options(guidance_scale=-5), "guidance_scale is -5, expected 0 to 100"),
        (Options(inversion_scale=200), "inversion_scale is 200"),
        (Options(control_scale=1e9), "control_scale is 1000000000.0, expected 0 to 10"),
        (Options(control_scales=(("pose", -1),)), "control_scales pose is -1"),
    ],
)
def test_python_s_options_have_the_same_bounds(options: Options, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        options.check()
