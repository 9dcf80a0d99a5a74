"""Writes a checkpoint of Stable Diffusion 1.5's exact shapes, with a ControlNet, from random weights: 2.8 GB in float16.

    python bench/full_size.py write FOLDER
    python bench/full_size.py edit FOLDER [bench/results.csv]     prints what an edit costs, and adds it to the table

It shows what loading and running the real size costs without fetching anything; its pictures are noise. The tokenizer is
the picture-book world's: fewer words than CLIP's, so the text encoder's table has rows that no prompt reaches.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results import append_rows
from torch import nn
from transformers.utils import logging

from iedit.training.embed import make_tokenizer, new_scheduler, save_folder

TOKENS = 77


def new_unet() -> Any:
    """UNet2DConditionModel as SD 1.5 configures it: 860 M parameters."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=768,
        attention_head_dim=8,
        norm_num_groups=32,
    )


def new_controlnet() -> Any:
    """ControlNetModel for that UNet: 361 M parameters."""
    from diffusers import ControlNetModel

    return ControlNetModel(
        in_channels=4,
        conditioning_channels=3,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        cross_attention_dim=768,
        attention_head_dim=8,
        conditioning_embedding_out_channels=(16, 32, 96, 256),
    )


def new_vae() -> Any:
    """AutoencoderKL as SD 1.5 configures it: 84 M parameters."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=512,
        scaling_factor=0.18215,
    )


def new_text_encoder() -> Any:
    """The text half of CLIP ViT-L/14: 123 M parameters."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=TOKENS,
            projection_dim=768,
            hidden_act="quick_gelu",
        )
    )


def fill(module: nn.Module, seed: int) -> None:
    """Random weights small enough that the outputs stay finite, in float16 too: deviation 0.5 / sqrt(inputs). Drawn where the module is."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(seed)
    for name, p in module.named_parameters():
        if p.dim() > 1:
            deviation = 0.02 if "embedding" in name and p.dim() == 2 else 0.5 / math.sqrt(p[0].numel())
            nn.init.normal_(p, std=deviation, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
        else:
            nn.init.ones_(p)  # of the norms


def write(folder: Path, log: Callable[[str], None] = print, layout: str = "pose") -> Path:
    """The checkpoint with a ControlNet for `layout`; parts that are there already are kept."""
    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer").exists():
        making = folder / "tokenizer.tmp"
        shutil.rmtree(making, ignore_errors=True)
        tokenizer = make_tokenizer(making)
        tokenizer.model_max_length = TOKENS
        tokenizer.save_pretrained(making)
        making.rename(folder / "tokenizer")
    new_scheduler().save_pretrained(folder / "scheduler")
    parts = {"vae": new_vae, "text_encoder": new_text_encoder, "unet": new_unet, f"controlnet-{layout}": new_controlnet}
    for seed, (name, make) in enumerate(parts.items()):
        if (folder / name).exists():
            continue
        began = time.perf_counter()
        with torch.device("meta"):  # no memory and no time for weights that are drawn below
            module = make()
        # A GPU draws in a second what takes a core a minute.
        module = module.half().to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
        fill(module, seed)
        save_folder(module, folder / name)
        size = sum(p.numel() for p in module.parameters())
        del module
        log(f"{name}: {size / 1e6:.0f} M parameters in {time.perf_counter() - began:.0f} s")
    return folder


def edit(folder: Path, table: Path | None = None) -> dict[str, Any]:
    """A 2-step ITO edit of a 256x256 picture in float32 with the ControlNet, on the CPU.

    Returns:
        What it cost: seconds to load and per stage, evaluations per stage, peak resident MiB; and what came out.
    """
    from PIL import Image, ImageDraw

    from iedit.runtime.cli.demo import PeakMemory
    from iedit.runtime.editor import Editor, EditRequest, MaskOptions, Options

    picture = Image.effect_noise((256, 256), 60)
    drawn, source = (Image.new("RGB", (256, 256)) for _ in range(2))
    ImageDraw.Draw(drawn).line((60, 200, 128, 60, 200, 200), fill="red", width=8)
    ImageDraw.Draw(source).line((128, 20, 128, 220), fill="red", width=8)
    request = EditRequest(picture, "a red person on sand at noon", layouts={"pose": drawn}, source_layouts={"pose": source},
                          steps=2, options=Options(mask=MaskOptions(seeds=2)))  # fmt: skip
    busy = f"load average {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores at the start"
    with PeakMemory() as memory:
        began = time.perf_counter()
        editor = Editor.load(str(folder), backend="torch", device="cpu", dtype="float32")
        loaded = time.perf_counter() - began
        result = editor.edit(request)
    spent, evaluations = sum(result.profile.seconds.values()), sum(result.profile.evaluations.values())
    if table is not None:
        row = {
            "variant": "torch, SD 1.5 shapes, 1 ControlNet, random weights",
            "shape": "256x256",
            "peak_mib": round(memory.peak),
            "quality": busy,
        }
        append_rows(table, [row | {"name": "full-size/load", "p50": round(loaded, 2), "evaluations": 0},
                           row | {"name": "full-size/ito, 2 steps", "p50": round(spent, 2), "evaluations": evaluations}],
                   editor)  # fmt: skip
    return {
        "load_seconds": round(loaded, 2),
        "peak_mib": round(memory.peak),
        "profile": result.profile.as_dict(),
        "size": result.image.size,
        "latent": list(result.latent.shape),
        "finite": bool(torch.isfinite(result.latent).all()),
        "deviation": float(result.latent.std()),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"] and len(sys.argv) == 3:
        write(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["edit"] and len(sys.argv) in (3, 4):
        print(json.dumps(edit(*map(Path, sys.argv[2:])), indent=1))
    else:
        sys.exit(str(__doc__).split("\n\n")[1])
