"""Trains a T2I-Adapter of the picture-book world for one layout (Mou et al. 2024, arXiv:2302.08453).

The paper's recipe in small: beside the frozen UNet of a trained model a small network learns to add what it reads off a layout map on the UNet's
way down (section 3.2), by the plain epsilon loss, with timesteps that are mostly those of much noise, where a layout is decided (section 3.3). Half
of the captions are dropped, as for the embedded ControlNets, so that it reads the map. The renderer draws pictures and maps.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime import machine
from ..runtime.errors import UsageError
from ..runtime.model.checkpoint import features_taken, fitting_adapter
from ..runtime.model.model import Model
from ..runtime.model.module_io import ADAPTER_PREFIX, CONTROLNET_PREFIX
from . import embed, world

PART = embed.Part(1500, 24, 1e-3)
SHARDS = 4  # of `embed.SHARD` pictures each
LAYOUTS = embed.CONTROLS


def scene_for(layout: str) -> Callable[[int, int], world.Scene]:
    """The scene of a shard and a number in it that a layout's adapter is trained on; for "pose" each has a person."""

    def scene_of(shard: int, i: int) -> world.Scene:
        scene = embed.shard_scene(shard, i)
        if layout == "pose" and all(thing.kind != "person" for thing in scene.things):
            index = random.Random(f"adapter-{shard}-{i}").randrange(len(scene.things))
            scene = world.edit(scene, world.Change("thing", index, "person"))
        return scene

    return scene_of


def cubic_timesteps(share: Tensor, count: int) -> Tensor:
    """Timesteps (1 - (t/T)^3) T, rounded down, of t/T drawn evenly (section 3.3): few of little noise.

    Args:
        share: t/T, (B,) in [0, 1].
        count: T.

    Returns: (B,) int64 in 0..T-1.
    """
    return ((1 - share**3) * count).long().clamp(max=count - 1)


def new_adapter(model: Model) -> Any:
    """The T2IAdapter, of random weights, whose features have the channels and sizes that a model's UNet takes.

    Raises:
        UsageError: no type of adapter makes those.
    """
    from diffusers import T2IAdapter

    try:
        taken = features_taken(model.unet.config, model.vae.config)
        kind = fitting_adapter(taken)
        has = f"that adds features of {taken}"
    except ValueError as error:
        kind, has = None, f"of {error}"
    if kind is None:
        raise UsageError(
            f"base: no T2I-Adapter makes what can be added to a UNet {has}; expected a model of `iedit train embed`"
        )
    return T2IAdapter(3, list(taken.channels), num_res_blocks=2, downscale_factor=kind[1], adapter_type=kind[0])


def task_of(model: Model, adapter: Any, layout: str, latents: embed.Latents) -> embed.Task:
    """The epsilon loss of a batch of scenes with their maps.

    Args:
        model: whose frozen UNet, text encoder, VAE's scale and noise schedule it is.
        adapter: that is trained.
        latents: of `scene_for(layout)`.
    """
    alphas = torch.tensor(model.schedule.alphas_cumprod, device=model.device)
    scale = model.vae.config.scaling_factor

    def draw(step: int, count: int, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
        z, scenes = latents.draw(rng, count)
        texts = ["" if rng.random() < 0.5 else world.caption(s) for s in scenes]
        tokens = embed.tokens_of(model.tokenizer, texts, model.text_length)
        return z, tokens, embed.images_to_bytes([world.layout(s, layout) for s in scenes])

    def loss_of(batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        z, tokens, maps = batch
        share = torch.rand(len(z)).to(z.device)
        x, t, noise, _ = embed.noisy(z * scale, alphas, cubic_timesteps(share, len(alphas)))
        with machine.autocast(model.device):
            with torch.no_grad():
                told = model.text_encoder(tokens).last_hidden_state
            features = adapter((embed.signed(maps) + 1) / 2)
            got = model.unet(x, t, told, down_intrablock_additional_residuals=features).sample
        return ((got.float() - noise) ** 2).mean(), {}

    return embed.Task(draw, loss_of)


def part_of(layout: str) -> str:
    """The name of what is trained for a layout: its checkpoint in the work folder, and its folder in the model."""
    return ADAPTER_PREFIX + layout


def train(
    work: Path, base: Path, out: Path, layout: str, log: Callable[[str], None], device: torch.device = embed.CPU
) -> Path:
    """Train on top of a model of the world and write the checkpoint.

    Args:
        work: encoded pictures, the base and the checkpoint; the same call goes on where it was stopped.
        base: folder of the model, of `iedit train embed`; its weights stay as they are.
        out: folder of the whole model with the adapter, in diffusers' layout; what is there is replaced.
        layout: one of `LAYOUTS`.
        device: where.

    Returns:
        `out`.

    Raises:
        UsageError: the base is no model of the world that an adapter can be added to; ValueError: `work` holds a run on top of another.
    """
    model = embed.load_base(base, device)
    torch.manual_seed(0)
    adapter = new_adapter(model).train().to(device)
    base = embed.keep_base(work, base)
    scene_of, folder = scene_for(layout), work / f"latents-{layout}"
    embed.make_shards(model.vae, folder, log, range(SHARDS), scene_of)
    if machine.training_dtype(device) is torch.float32:
        model.unet.to(memory_format=torch.channels_last)  # as `embed.train_loop` does with what it trains
    task = task_of(model, adapter, layout, embed.Latents(folder, scene_of=scene_of))
    embed.train_loop(
        part_of(layout), PART, nn.ModuleDict({"adapter": adapter}), task, work, log, every=100, device=device
    )
    return write_checkpoint(adapter, layout, base, work, out)


def is_checkpoint(folder: Path, layout: str) -> bool:
    """Whether a folder is what `train` wrote for this layout, which may be replaced."""
    try:
        history = embed.read_history(folder)
    except ValueError:
        return False
    return bool(history) and history[-1]["part"] == part_of(layout)


def write_checkpoint(adapter: Any, layout: str, base: Path, work: Path, out: Path) -> Path:
    """The base with the adapter in float16 in place of what read that layout, and without its card; there whole or not at all."""
    left_out = (CONTROLNET_PREFIX + layout, part_of(layout), "README.md")
    with embed.checkpoint_from(base, out, left_out) as made:
        embed.save_folder(adapter.half(), made / part_of(layout))
        history = embed.training_history(embed.Plan(work, {part_of(layout): PART}, base))
        (made / embed.HISTORY_FILE).write_text(json.dumps(history, indent=1) + "\n")
    return out
