"""One thread unless told otherwise: with more OpenMP threads than free cores torch runs tens of times slower."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, which no test has done yet
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    # Engines that whoever runs the tests has exported would be found, and used, by `--backend auto`.
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="iedit-tests-")

    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def taped() -> Any:
    """The module `tests/taped.py`: CUDA graphs without CUDA."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("taped", ROOT / "tests" / "taped.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_checkpoint_cli(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint of random weights with ControlNets for pose and scribble: seconds to make, milliseconds to run.

    Sizes are multiples of 8; it was made for 32x32 pictures. To be copied before it is changed.
    """
    import torch
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from iedit.training.embed import MAX_TOKENS, make_tokenizer, new_scheduler

    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder / "tokenizer")
    new_scheduler().save_pretrained(folder / "scheduler")
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    parts: dict[str, Any] = {"vae": vae, "text_encoder": text, "unet": unet}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    for name in ("pose", "scribble"):
        control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8))
        for zero in control.controlnet_down_blocks:  # from_unet makes them zero, and the layout would have no effect
            torch.nn.init.normal_(zero.weight, std=0.3)
        control.save_pretrained(folder / f"controlnet-{name}")
    return folder


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's folder."""
    return ROOT


# --- small models -----------------------------------------------------------------------------------------------

# What is exported of the random checkpoint: not all of it, a fused UNet takes ten seconds.
TINY_MODULES = ("unet", "unet+pose", "unet+pose+scribble", "control-embedding-pose", "control-embedding-scribble", "vae_encoder", "vae_decoder",
                "text_encoder")  # fmt: skip

# The embedded model is one of those that every identity is tested on, as soon as its weights are in the tree.
EMBEDDED = ["picturebook"]


def _build_checkpoint(folder: Path, latent_channels: int = 4, seed: int = 0) -> Path:
    """A random checkpoint in the diffusers layout: 64x64 pictures, 8x8 latents, ControlNets for pose and scribble."""
    import torch
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from iedit.training import embed

    torch.manual_seed(seed)
    tokenizer = embed.make_tokenizer(folder / "tokenizer")
    width = 32
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=0.9,
    )
    unet: Any = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    with torch.no_grad():
        # A fresh network hardly listens to its text and returns little; these make both matter.
        for name, p in unet.named_parameters():
            if "attn2.to_out.0.weight" in name or "conv_out.weight" in name:
                p *= 3
        unet.save_pretrained(folder / "unet")
        vae.save_pretrained(folder / "vae")
        text_encoder.save_pretrained(folder / "text_encoder")
        embed.new_scheduler().save_pretrained(folder / "scheduler")
        for name in ("pose", "scribble"):
            net: Any = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
            for zero in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
                for p in zero.parameters():
                    p.copy_(0.3 * torch.randn_like(p))
            net.save_pretrained(folder / f"controlnet-{name}")
    return folder


@pytest.fixture(scope="session")
def build_checkpoint() -> Callable[..., Path]:
    """`build_checkpoint(folder, latent_channels=4, seed=0)` writes a random checkpoint."""
    return _build_checkpoint


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint; not to be changed, copy it."""
    return _build_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Any:
    """The random checkpoint, loaded."""
    from iedit.runtime.model.model import load_model

    return load_model(str(tiny_folder), device="cpu")


@pytest.fixture(scope="session")
def tiny_engines(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ONNX engines of the random checkpoint, exported once, also by several workers; not to be changed, copy them."""
    from iedit.export.onnx import export_onnx

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # whoever comes second waits, and finds them there
        folder = folder.parent
    export_onnx(tiny, folder / "tiny_engines", modules=TINY_MODULES)
    return folder / "tiny_engines"


@pytest.fixture(scope="session", params=["tiny", *EMBEDDED])
def model(request: pytest.FixtureRequest) -> Any:
    """Every model that the identities must hold on."""
    from iedit.runtime.model.model import load_model

    return request.getfixturevalue("tiny") if request.param == "tiny" else load_model(request.param, device="cpu")


@pytest.fixture
def picture() -> Callable[..., Any]:
    """`picture(seed, size=(64, 64))`: a scene of the world, shrunk; PIL RGB."""
    from iedit.training import world

    def make(seed: int = 0, size: tuple[int, int] = (64, 64)) -> Any:
        return world.render(world.random_scene(random.Random(seed), 1)).resize(size)

    return make


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)
