"""Fine-tunes an InstructPix2Pix checkpoint of the picture-book world (Brooks et al. 2023, arXiv:2211.09800).

The paper's recipe in small: the UNet of a trained model whose first convolution takes the picture's latent beside the noisy one, its new
weights zero (section 3.2), learns from pictures before and after an edit. Here the renderer draws both, so nothing has to be generated
and filtered. The embedded model's text encoder knows the world's captions and no imperatives, so the instruction is the caption of the
picture after the edit, which is also what the truth suite gives as the prompt. VAE and text encoder stay as they are.
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
from ..runtime.model.checkpoint import read_json
from ..runtime.model.model import Model
from ..runtime.model.module_io import ADAPTER_PREFIX, CONTROLNET_PREFIX
from . import embed, world

PART = embed.Part(1700, 24, 4e-4)
SHARDS = 5  # of `embed.SHARD` pictures each
KINDS = ("thing", "colour", "ground or sky")
GROUP = 1 + len(KINDS)  # a scene, then that scene after an edit of each kind
PIPELINE = "StableDiffusionInstructPix2PixPipeline"
# Of `iedit.json`; what the base recommends for masks and for ITO was measured on another network.
_KEPT_HINTS = ("guidance_scale", "words", "reconstruction_error")
_LEFT_OUT = (f"{CONTROLNET_PREFIX}*", f"{ADAPTER_PREFIX}*", "clip", "samples", "README.md", "unet", "iedit.json")


def edited_scene(shard: int, i: int) -> world.Scene:
    """Picture `i` of a shard: of each `GROUP` the first is a scene, and the others are that scene after one edit."""
    rng = random.Random(f"instruct-{shard}-{i // GROUP}")
    scene = embed.training_scene(rng)
    if i % GROUP == 0:
        return scene
    kind = KINDS[i % GROUP - 1]
    kind = rng.choice(("ground", "sky")) if kind == KINDS[-1] else kind
    return world.edit(scene, world.random_change(rng, scene, kind))


def draw_pairs(rng: random.Random, names: list[tuple[int, int]], count: int) -> list[list[tuple[int, int]]]:
    """The names of `count` pictures before and of those after, in either direction of an edit."""
    before, after = [], []
    for _ in range(count):
        shard, i = rng.choice(names)
        first = i - i % GROUP
        before.append((shard, i))
        after.append((shard, first if i != first else first + rng.randrange(1, GROUP)))
    return [before, after]


def dropped(share: float) -> tuple[bool, bool]:
    """Whether a sample loses its picture and its text, of a number that is drawn evenly from [0, 1).

    5 % lose the picture, 5 % the text and 5 % both, so that both can be guided (section 3.2.1).
    """
    return share < 0.05 or 0.10 <= share < 0.15, 0.05 <= share < 0.15


def widened(unet: Any) -> Any:
    """A UNet that takes the picture's latent as further channels; while their weights are zero it answers as `unet` whatever they hold."""
    wide = type(unet).from_config(dict(unet.config) | {"in_channels": 2 * unet.config.in_channels}).to(unet.device)
    state = unet.state_dict()
    first = state["conv_in.weight"]
    wide.load_state_dict(state | {"conv_in.weight": torch.cat([first, torch.zeros_like(first)], 1)})
    return wide


def task_of(model: Model, unet: Any, latents: embed.Latents) -> embed.Task:
    """The min-SNR weighted epsilon loss of a batch of pairs.

    Args:
        model: whose VAE's scale, text encoder and noise schedule it is.
        unet: that is trained, of twice the latent's channels.
        latents: of `edited_scene`.
    """
    alphas = torch.tensor(model.schedule.alphas_cumprod, device=model.device)
    scale = model.vae.config.scaling_factor

    def draw(step: int, count: int, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
        (source, _), (target, scenes) = map(latents.take, draw_pairs(rng, latents.names, count))
        no_picture, no_text = zip(*(dropped(rng.random()) for _ in range(count)), strict=True)
        source[list(no_picture)] = 0
        texts = ["" if no else world.caption(s) for no, s in zip(no_text, scenes, strict=True)]
        return source, target, embed.tokens_of(model.tokenizer, texts, model.text_length)

    def loss_of(batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        source, target, tokens = batch
        x, t, noise, weight = embed.noisy(target * scale, alphas)
        with machine.autocast(model.device):
            with torch.no_grad():
                told = model.text_encoder(tokens).last_hidden_state
            got = unet(torch.cat([x, source], 1), t, told).sample
        error = (got.float() - noise) ** 2
        return (weight * error).mean(), {"mse": error.mean()}

    return embed.Task(draw, loss_of)


def train(work: Path, base: Path, out: Path, log: Callable[[str], None], device: torch.device = embed.CPU) -> Path:
    """Train on top of a model of the world and write the checkpoint.

    Args:
        work: encoded pictures, the base and the checkpoint; the same call goes on where it was stopped.
        base: folder of the model, of `iedit train embed`.
        out: folder of the checkpoint, in diffusers' layout, for `--method ip2p`; what is there is replaced.
        device: where.

    Returns:
        `out`.

    Raises:
        UsageError: the base is no model of the world's pictures that text alone guides; ValueError: `work` holds a run on top of another.
    """
    model = embed.load_base(base, device)
    base = embed.keep_base(work, base)
    embed.make_shards(model.vae, work / "edits", log, range(SHARDS), edited_scene)
    torch.manual_seed(0)
    unet = widened(model.unet).train()
    task = task_of(model, unet, embed.Latents(work / "edits", scene_of=edited_scene))
    embed.train_loop("instruct", PART, nn.ModuleDict({"unet": unet}), task, work, log, every=100, device=device)
    return write_checkpoint(unet, base, work, out)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is an InstructPix2Pix checkpoint in diffusers' layout, which may be replaced."""
    index = folder / "model_index.json"
    return index.is_file() and read_json(index).get("_class_name") == PIPELINE


def write_checkpoint(unet: Any, base: Path, work: Path, out: Path) -> Path:
    """The base with the UNet in float16 in place of its own, without what reads layouts or shows the base; there whole or not at all."""
    with embed.checkpoint_from(base, out, _LEFT_OUT) as made:
        embed.save_folder(unet.half(), made / "unet")
        index = read_json(base / "model_index.json") | {"_class_name": PIPELINE}
        (made / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")
        hints = read_json(base / "iedit.json") if (base / "iedit.json").is_file() else {}
        (made / "iedit.json").write_text(json.dumps({k: hints[k] for k in _KEPT_HINTS if k in hints}) + "\n")
        history = embed.training_history(embed.Plan(work, {"instruct": PART}, base))
        (made / embed.HISTORY_FILE).write_text(json.dumps(history, indent=1) + "\n")
    return out
