"""Trains the embedded picture-book model: autoencoder -> text encoder + UNet -> ControlNets -> CLIP.

Every part is a standard diffusers / transformers module in the standard folder layout, so the embedded model is loaded by
the very code that loads Stable Diffusion. One command, `iedit train embed --work DIR`, runs the parts in order; each one
checkpoints (weights, optimiser, step) and goes on where it was stopped. What was learnt on the way:

- GroupNorm's backward, not the convolutions, is what training the autoencoder costs on a CPU, so the levels at full
  resolution are narrow (16 and 32 channels); most of its steps see 64x64 crops, the last ones whole pictures (the mid
  attention and the GroupNorm statistics are global).
- The encoder fixes the latent space; the decoder goes on alone afterwards while the UNet already trains.
- The min-SNR weight (gamma 5) on the epsilon loss gets shapes right in a fraction of the steps of the plain loss.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from . import world

VAE_CHANNELS = (16, 32, 64, 128)


@dataclass(frozen=True)
class Part:
    """How one part is trained: `steps` of `batch` samples, learning rate `lr` with 2 % warm-up and cosine decay."""

    steps: int
    batch: int
    lr: float
    seed: int = 0
    ema: float = 0.999


def images_to_tensor(images: list[Any]) -> Tensor:
    """PIL pictures -> (B, 3, H, W) float32 in [-1, 1]."""
    stacked = np.stack([np.asarray(i.convert("RGB")) for i in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def training_scene(rng: random.Random) -> world.Scene:
    """A scene for training; people and pairs are drawn more often than chance, being the hardest."""
    things = 1 if rng.random() < 0.4 else 2
    scene = world.random_scene(rng, things)
    if rng.random() < 0.12:
        index = rng.randrange(things)
        scene = world.edit(scene, world.Change("thing", index, "person"))
    return scene


def learning_rate(part: Part, step: int) -> float:
    """Linear warm-up over 2 % of the steps, then cosine decay to 2 % of the peak."""
    warm = max(1, part.steps // 50)
    if step < warm:
        return part.lr * (step + 1) / warm
    done = (step - warm) / max(1, part.steps - warm)
    return part.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def write_whole(path: Path, data: Any) -> None:
    """`torch.save` to a temporary name beside `path`, then rename: a checkpoint is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    torch.save(data, temporary)
    os.replace(temporary, path)


def train_loop(
    name: str,
    part: Part,
    modules: nn.ModuleDict,
    loss_of: Callable[[int, int, random.Random], tuple[Tensor, dict[str, float]]],
    work: Path,
    log: Callable[[str], None],
    every: int = 500,
) -> None:
    """Train the parameters of `modules` that require a gradient; ends with their moving average loaded.

    With torch.distributed initialised each process takes its share of the batch and gradients are averaged: on a CPU two
    processes of one thread are about twice as fast as one process of two threads. `loss_of` gets the share's size.

    Checkpoints to `work/NAME.pt` every `every` steps; a finished part returns at once. Batches are drawn from
    a generator seeded by (seed, step), so a resumed run sees the batches that an uninterrupted one would have seen.
    """
    path = work / f"{name}.pt"
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = part.batch // processes
    trained = {k: p for k, p in modules.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(list(trained.values()), lr=part.lr, betas=(0.9, 0.99), weight_decay=0.01)
    average = {k: p.detach().clone() for k, p in trained.items()}
    start, seconds = 0, 0.0
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        modules.load_state_dict(state["modules"])
        optimiser.load_state_dict(state["optimiser"])
        average, start, seconds = state["average"], state["step"], state["seconds"]
        log(f"{name}: resumed at step {start} of {part.steps}")
    began = time.perf_counter()
    running: dict[str, float] = {}

    def save(step: int) -> None:
        if rank:
            return
        spent = seconds + time.perf_counter() - began
        write_whole(path, {"modules": modules.state_dict(), "optimiser": optimiser.state_dict(), "average": average,
                           "step": step, "seconds": spent})  # fmt: skip

    step = start
    try:
        for step in range(start, part.steps):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(part, step)
            torch.manual_seed((part.seed * 1_000_003 + step) * processes + rank)
            loss, terms = loss_of(step, share, random.Random(f"{name}-{part.seed}-{step}-{rank}"))
            if not torch.isfinite(loss):
                raise FloatingPointError(f"{name}: the loss is {loss.item()} at step {step}; resume with a lower lr")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            if processes > 1:
                flat = torch.cat([p.grad.flatten() for p in trained.values()]) / processes
                dist.all_reduce(flat)
                for p, g in zip(trained.values(), flat.split([p.numel() for p in trained.values()]), strict=True):
                    p.grad = g.view_as(p)
            nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
            optimiser.step()
            decay = min(part.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in trained.values()], 1 - decay)
            for key, value in ({"loss": loss.item()} | terms).items():
                running[key] = running.get(key, value) * 0.98 + value * 0.02
            if (step + 1) % 50 == 0 and rank == 0:
                speed = (step + 1 - start) / (time.perf_counter() - began)
                left = (part.steps - step - 1) / speed / 60
                shown = " ".join(f"{k} {v:.5f}" for k, v in running.items())
                log(f"{name}: step {step + 1}/{part.steps} {shown} {speed * part.batch:.1f} samples/s {left:.1f} min left")
            if (step + 1) % every == 0:
                save(step + 1)
    except KeyboardInterrupt:
        save(step)
        log(f"{name}: stopped at step {step}, saved; the same command goes on from here")
        raise
    if start < part.steps:
        save(part.steps)
    with torch.no_grad():
        for key, p in trained.items():
            p.copy_(average[key])


# --- autoencoder ------------------------------------------------------------------------------------------------


def new_vae() -> Any:
    """AutoencoderKL, f=8, 4 latent channels, for 128x128."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=VAE_CHANNELS,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.SIZE,
        scaling_factor=1.0,
    )


def _crops(rng: random.Random, count: int, size: int) -> Tensor:
    """(count, 3, size, size) in [-1, 1]: crops of fresh scenes, every second one around a thing."""
    made = []
    while len(made) < count:
        scene = training_scene(rng)
        picture = world.render(scene)
        if size == world.SIZE:
            made.append(picture)
            continue
        thing = rng.choice(scene.things)
        for cx, cy in ((thing.x, thing.base - thing.size / 2), (rng.uniform(0, 128), rng.uniform(0, 128))):
            x = int(min(max(cx - size / 2 + rng.uniform(-12, 12), 0), world.SIZE - size))
            y = int(min(max(cy - size / 2 + rng.uniform(-12, 12), 0), world.SIZE - size))
            made.append(picture.crop((x, y, x + size, y + size)))
    return images_to_tensor(made[:count])


def reconstruction_loss(got: Tensor, want: Tensor) -> Tensor:
    """L1 + 4 MSE + half the L1 of the finite differences (edges), on (B, 3, H, W)."""
    dx = (got[..., 1:] - got[..., :-1]) - (want[..., 1:] - want[..., :-1])
    dy = (got[..., 1:, :] - got[..., :-1, :]) - (want[..., 1:, :] - want[..., :-1, :])
    return F.l1_loss(got, want) + 4 * F.mse_loss(got, want) + 0.5 * (dx.abs().mean() + dy.abs().mean())


def train_vae(work: Path, log: Callable[[str], None], part: Part = Part(8000, 32, 1.5e-3)) -> Any:
    """The autoencoder: crops of 64 for the first 80 % of the steps, then whole pictures, a quarter as many."""
    torch.manual_seed(part.seed)
    vae = new_vae()

    def loss_of(step: int, batch: int, rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        whole = step >= 0.8 * part.steps
        images = _crops(rng, batch // 4 if whole else batch, world.SIZE if whole else 64)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            got = vae.decode(posterior.sample()).sample
        got = got.float()
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        mse = F.mse_loss(got.detach(), images).item() / 4
        return reconstruction_loss(got, images) + 2e-4 * kl, {"psnr": -10 * math.log10(mse), "kl": kl.item()}

    train_loop("vae", part, nn.ModuleDict({"vae": vae}), loss_of, work, log)
    return vae
