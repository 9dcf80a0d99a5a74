"""One thread unless told otherwise: with more OpenMP threads than free cores torch runs tens of times slower."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, which no test has done yet
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


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
