"""Fine-tuning of iEdit on pairs (iEdit sections 3.3 and 3.4): `iedit train finetune`.

One step: the source's latent under noise (Eq. 2) goes through the UNet with the edit prompt, and the prediction is held to the noise of
the pseudo-target and of the source (Eqs. 3-4 or 8-9), and, decoded (Eqs. 6-7), to the prompts and to the pseudo-target's looks (Eqs. 5,
10, 11). The input blocks and the middle of the UNet are trained in turn, one group a step; everything else is frozen.

- What a step computes depends on the seed and on the numbers of its samples alone, which are counted over all processes: two processes
  see what one with twice the accumulation sees, and a run that was stopped goes on as if it had not been.
- Gradients are averaged over the processes by one reduction of the group in turn. torch's DistributedDataParallel is not used: it decides
  once which parameters have gradients, and would keep memory for the gradients of both groups.
- `OUT/state.pt` is what a run goes on from, `OUT/model` the last good checkpoint in diffusers' layout; both are written whole or not at all.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..runtime import machine
from ..runtime.backends.base import missing
from ..runtime.backends.torch_modules import why_not_xformers
from ..runtime.errors import RunError, UsageError, first_line
from ..runtime.files import share_weights, write_whole
from ..runtime.images import contact_sheet, png_bytes
from ..runtime.model.checkpoint import find_folder, weights_of
from ..runtime.model.model import Model, load_model, no_progress_bars
from ..runtime.profile import peak_memory
from . import losses
from .objective import (
    LOSSES,
    Batch,
    Objective,
    Pairs,
    as_mask,
    group_of_step,
    make_batch,
    squared,
    trained_groups,
)

PRECISIONS = ("auto", "no", "fp16", "bf16")
STATE, HISTORY, MODEL = "state.pt", "losses.csv", "model"
MOST_SKIPPED = 20  # steps in a row that a loss scale may be too large for; it halves at each


@dataclass(frozen=True)
class Settings:
    """How a model is fine-tuned; the defaults are the paper's (section 4.1), and Eq. 12.

    Attributes:
        steps: optimiser steps.
        batch: pairs of one process at a time.
        accumulate: batches of one process before a step.
        size: side of the square that pictures are cut to, pixels; None is the side that the model was trained on.
        learning_rate, weight_decay: of AdamW; constant.
        losses: of `LOSSES`.
        perceptual_weight: lambda_perc; the paper does not give it, 0.1 is ours.
        precision: of `PRECISIONS`: "auto" is bf16 or else fp16 on a GPU, float32 on a CPU. Weights that are trained stay in float32.
        gradient_checkpointing: of the UNet and of the VAE's decoder.
        attention: "auto" is xformers where it can run and else SDPA; or one of the two.
        ema: decay of a moving average of the trained weights, which is then what is saved; None keeps none.
        adam8bit: AdamW with its state in 8 bits (bitsandbytes, on a GPU).
        clip_gradient: largest norm of the gradient.
        seed: of the order of the pairs, the timesteps and the noise.
        save_every, sample_every: steps between checkpoints, and between sheets of sample edits (0 is none); a sheet needs a checkpoint.
        samples: edits on a sheet.
    """

    steps: int = 10_000
    batch: int = 1
    accumulate: int = 1
    size: int | None = None
    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    losses: tuple[str, ...] = ("mask", "global", "local", "perceptual")
    perceptual_weight: float = 0.1
    precision: str = "auto"
    gradient_checkpointing: bool = True
    attention: str = "auto"
    ema: float | None = None
    adam8bit: bool = False
    clip_gradient: float = 1.0
    seed: int = 0
    save_every: int = 500
    sample_every: int = 500
    samples: int = 4

    def __post_init__(self) -> None:
        unknown = [n for n in self.losses if n not in LOSSES]
        if unknown:
            raise UsageError(f"losses: {unknown[0]!r} is none of {', '.join(LOSSES)}")
        if ("paired" in self.losses) == ("mask" in self.losses):
            raise UsageError("losses: name either paired (Eq. 4) or mask (Eqs. 8-9), which takes its place")
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision is {self.precision!r}, expected one of {', '.join(PRECISIONS)}")
        if self.attention not in ("auto", "sdpa", "xformers"):
            raise UsageError(f"attention is {self.attention!r}, expected auto, sdpa or xformers")


def _ignore(_: Any) -> None:
    """For who listens to nothing."""


# --- what is loaded -------------------------------------------------------------------------------------------------


def load_clip(where: str | None, model: Model) -> tuple[losses.ClipEmbedder, Any, str]:
    """A CLIPModel in float32 with its preprocessing, its tokenizer, and where it came from.

    Args:
        where: folder or hub id; None is the `clip` folder of `model`, else the ViT-L/14 that SD 1.x takes its text encoder from.

    Raises:
        UsageError: it cannot be had or read.
    """
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    inside = model.folder / "clip"
    name = where or (str(inside) if inside.is_dir() else "openai/clip-vit-large-patch14")
    name = str(find_folder("picturebook") / "clip") if name == "picturebook" else name
    try:
        with no_progress_bars():
            clip = CLIPModel.from_pretrained(name, dtype=torch.float32)
        embedder = losses.ClipEmbedder(clip, CLIPImageProcessor.from_pretrained(name))
        lacks_tokenizer = Path(name).is_dir() and not (Path(name) / "tokenizer_config.json").is_file()
        tokenizer = model.tokenizer if lacks_tokenizer else AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise UsageError(
            f"clip: {name} cannot be read as a CLIPModel ({first_line(error)}); name a folder or hub id with --clip, or leave "
            "global and local out of --losses"
        ) from error
    known = embedder.vocabulary
    if len(tokenizer) > known:
        raise UsageError(f"clip: {name} knows {known} tokens, its tokenizer {len(tokenizer)}; they do not go together")
    return embedder, tokenizer, name


def choose_attention(unet: Any, asked: str, device: torch.device) -> str:
    """Set how the UNet computes attention, and say it in a line.

    Raises:
        UsageError: xformers was asked for and cannot run.
    """
    reasons = why_not_xformers(device) if asked != "sdpa" else ["sdpa was asked for"]
    if not reasons:
        unet.enable_xformers_memory_efficient_attention()
        return "xformers memory-efficient attention"
    if asked == "xformers":
        raise UsageError(f"attention: {reasons[0]}; use --attention sdpa")
    return f"SDPA ({reasons[0]})"


def choose_precision(asked: str, device: torch.device) -> str:
    """accelerate's name of the mixed precision: "no", "fp16" or "bf16"."""
    if asked != "auto":
        return asked
    if device.type != "cuda":
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def make_optimiser(parameters: list[nn.Parameter], settings: Settings, device: torch.device) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' with 8-bit state.

    Raises:
        UsageError: 8 bits were asked for and cannot be had.
    """
    chosen: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if not settings.adam8bit:
        return torch.optim.AdamW(parameters, **chosen)
    reasons = missing("bitsandbytes", extra="gpu") or ([] if device.type == "cuda" else ["it needs a CUDA GPU"])
    if reasons:
        raise UsageError(f"adam8bit: {reasons[0]}; leave --adam8bit out")
    from bitsandbytes.optim import AdamW8bit

    optimiser: torch.optim.Optimizer = AdamW8bit(parameters, **chosen)
    return optimiser


# --- the run --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What `finetune` reports of a step: its number (from 1), the mean of each term over the samples, and how the run goes on.

    `memory`: peak so far in bytes, of the GPU or of the process.
    """

    number: int
    steps: int
    terms: Mapping[str, float]
    group: str
    seconds_left: float
    steps_per_second: float
    memory: int


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _folder_digest(where: str) -> str:
    """Of the weights in a local folder; a hub id stands for itself."""
    return "+".join(_file_digest(p) for p in weights_of(Path(where))) if Path(where).is_dir() else where


class Finetuning:
    """One run in one of its processes: what `finetune` does, in pieces.

    Args:
        out: the run's folder.
        model: picturebook, a folder or a hub id.
        pairs: what is trained on.
        clip: folder or hub id of the CLIPModel (`load_clip`).
        vgg: file of VGG-16's weights, for the perceptual loss.
        device: cpu or cuda; None is the GPU if there is one.
        command: for the model card.

    Attributes:
        step: optimiser steps taken so far.
        stop: set it, in any process, to have all of them end after the step that they are in, with a checkpoint.
        stopped: whether that has happened; the processes agree on it.

    Raises:
        UsageError: something cannot be loaded, or `out` holds another run; nothing has been written.
    """

    def __init__(
        self,
        out: Path,
        model: str,
        pairs: Pairs,
        settings: Settings,
        *,
        clip: str | None = None,
        vgg: Path | None = None,
        device: str | None = None,
        command: str = "",
        say: Callable[[str], None] = _ignore,
    ):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        if not len(pairs):
            raise UsageError("pairs: there is none to train on; look at its skipped.csv for the reasons")
        self.out, self.pairs, self.settings, self.command, self.say = out, pairs, settings, command, say
        cpu = device == "cpu" or not torch.cuda.is_available()
        if cpu and device not in (None, "cpu"):
            raise UsageError(f"device: {device} was asked for, but no CUDA device is here; use cpu")
        precision = choose_precision(settings.precision, torch.device("cpu" if cpu else "cuda"))
        AcceleratorState._reset_state()  # it outlives a run, and a second one in this process may have another precision
        self.accelerator = Accelerator(mixed_precision=precision, cpu=cpu)
        self.device, self.precision = self.accelerator.device, precision
        self.model = load_model(model, [], device=self.device, dtype=torch.float32)
        self.side = self._check_side()
        self.features, self.clip, tokenizer, self.clip_name = None, None, None, ""
        if "perceptual" in settings.losses:
            if vgg is None:
                raise UsageError("vgg: the perceptual loss needs VGG-16's weights; name their file with --vgg, or leave perceptual "
                                 "out of --losses")  # fmt: skip
            try:
                self.features = losses.VggFeatures.load(vgg).to(self.device)
            except (FileNotFoundError, ValueError) as error:
                raise UsageError(str(error)) from error
        if {"global", "local"} & set(settings.losses):
            self.clip, tokenizer, self.clip_name = load_clip(clip, self.model)
            self.clip.to(self.device)
        if precision != "no":  # what is frozen needs no more than it is computed in
            for part in (self.model.vae, self.model.text_encoder, self.clip, self.features):
                if part is not None:
                    part.to(torch.float16 if precision == "fp16" else torch.bfloat16)
        self.identity = self._identity(vgg)
        self._state: dict[str, Any] | None
        self._check_folder()
        unet = self.model.unet
        self.attention = choose_attention(unet, settings.attention, self.device)
        if settings.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
            self.model.vae.enable_gradient_checkpointing()
        self.groups = trained_groups(unet)
        self.trained = [p for group in self.groups.values() for p in group]
        self.objective = Objective(
            self.model, settings.losses, self.clip, tokenizer, self.features, autocast=self.accelerator.autocast
        )
        self.optimiser = self.accelerator.prepare(make_optimiser(self.trained, settings, self.device))
        # diffusers' EMAModel takes a parameter without a gradient as it is, which half of these are at every step.
        self.average = None if settings.ema is None else [p.detach().clone() for p in self.trained]
        self.step, self.seconds, self.skipped = 0, 0.0, 0
        self.stop = self.stopped = False
        self._before: list[Image.Image] = []

    # --- before it starts

    def _check_side(self) -> int:
        blocks, config = len(self.model.vae.config.block_out_channels), self.model.unet.config
        self.factor = 2 ** (blocks - 1)
        side = self.settings.size or int(config.sample_size) * self.factor
        # The UNet halves the latent once for each block but the last, and needs what it adds back to fit.
        multiple = self.factor * 2 ** (len(config.block_out_channels) - 1)
        if side % multiple:
            raise UsageError(f"size is {side}, expected a multiple of {multiple} for this model")
        if any(a <= 0 for a in self.model.schedule.alphas_cumprod):
            raise UsageError("model: its schedule has a level of pure noise, from which Eq. 7 tells nothing; it cannot be fine-tuned here")  # fmt: skip
        return side

    def _identity(self, vgg: Path | None) -> dict[str, Any]:
        """All that the losses of a run depend on, beside its length."""
        s = self.settings
        chosen = {k: v for k, v in dataclasses.asdict(s).items()
                  if k not in ("steps", "save_every", "sample_every", "samples", "batch", "accumulate", "losses",
                               "gradient_checkpointing", "attention", "precision", "size")}  # fmt: skip
        samples = s.batch * s.accumulate * self.accelerator.num_processes
        return chosen | {
            "model": self.model.digest, "pairs": self.pairs.digest, "losses": sorted(s.losses), "samples a step": samples,
            "precision": self.precision, "size": self.side, "clip": _folder_digest(self.clip_name) if self.clip_name else "",
            "vgg": _file_digest(vgg) if vgg and self.features is not None else "",
        }  # fmt: skip

    def _check_folder(self) -> None:
        path, self._state = self.out / STATE, None
        if not path.is_file():
            own = (HISTORY, MODEL, "samples", "tensorboard")
            there = sorted(p.name for p in self.out.iterdir()) if self.out.is_dir() else []
            # What a run that was killed was writing is in nobody's way.
            strangers = [n for n in there if n not in own and not n.endswith((".tmp", ".old"))]
            if strangers:
                raise UsageError(
                    f"out: {self.out} holds {strangers[0]}, which is no part of a run; name a folder of its own"
                )
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            before = json.loads(state["identity"])
            self._state = state
        except Exception as error:
            raise UsageError(f"out: {path} cannot be read ({first_line(error)}); remove it to start over") from error
        now = json.loads(json.dumps(self.identity))
        for name in now:
            if before.get(name) != now[name]:
                raise UsageError(
                    f"out: {self.out} holds a run with {name} {before.get(name)}, not {now[name]}; go on with that, or name another folder"
                )

    # --- checkpoints

    def resume(self) -> None:
        """Go on from `OUT/state.pt`, if it is there."""
        state, self._state = self._state, None
        if state is None:
            return
        with torch.no_grad():
            for p, kept in zip(self.trained, state["trained"], strict=True):
                p.copy_(kept)
        self.optimiser.load_state_dict(state["optimiser"])
        if self.average is not None:
            self.average = [a.to(self.device) for a in state["average"]]
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.say(f"resumed after step {self.step}")

    def save(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the state and the model, whole or not at all; only the first process does.

        Raises:
            RunError: they cannot be written; what was there before stays.
        """
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "identity": json.dumps(self.identity), "step": self.step, "seconds": self.seconds,
            "trained": [p.detach().cpu() for p in self.trained], "optimiser": self.optimiser.state_dict(),
            "average": None if self.average is None else [a.cpu() for a in self.average],
            "scaler": None if scaler is None else scaler.state_dict(),
        }  # fmt: skip
        try:
            held = io.BytesIO()
            torch.save(state, held)
            write_whole(self.out / STATE, held.getvalue())
            self._write_model(rows)
        except OSError as error:
            raise RunError(f"out: {self.out} cannot be written ({error.strerror or error}); the checkpoint before stays, and the "
                           "same command goes on from it") from error  # fmt: skip

    def _write_model(self, rows: Sequence[Mapping[str, Any]]) -> None:
        base, target = self.model.folder, self.out / MODEL
        temporary, old = self.out / f"{MODEL}.{os.getpid()}.tmp", self.out / f"{MODEL}.{os.getpid()}.old"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            for name in sorted(p.name for p in base.iterdir() if p.is_dir() and p.name not in ("unet", "samples")):
                shutil.copytree(base / name, temporary / name, copy_function=_link)
            for file in ("model_index.json", "iedit.json"):
                if (base / file).is_file():
                    shutil.copyfile(base / file, temporary / file)
            self._write_unet(temporary / "unet")
            (temporary / "README.md").write_text(self.card(rows))
            if target.exists():
                os.replace(target, old)
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)

    def _write_unet(self, folder: Path) -> None:
        """The UNet with the trained weights or their average, in the dtype that the base's weights are stored in."""
        from safetensors import safe_open
        from safetensors.torch import save_file

        stored = torch.float32
        files = weights_of(self.model.folder / "unet")
        if files and files[0].suffix == ".safetensors":
            with safe_open(files[0], "pt") as weights:
                stored = weights.get_tensor(next(iter(weights.keys()))).dtype
        saved = {id(p): a for p, a in zip(self.trained, self.average or self.trained, strict=True)}
        tensors = {
            name: saved.get(id(p), p).detach().to("cpu", stored).contiguous()
            for name, p in self.model.unet.state_dict(keep_vars=True).items()
        }
        folder.mkdir(parents=True)
        shutil.copyfile(self.model.folder / "unet" / "config.json", folder / "config.json")
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        share_weights(folder)

    # --- steps

    def _samples_of(self, batch: int) -> list[int]:
        """Numbers of the samples of this process's `batch`-th batch of the step."""
        s, processes = self.settings, self.accelerator.num_processes
        place = (self.step * s.accumulate + batch) * processes + self.accelerator.process_index
        return list(range(place * s.batch, (place + 1) * s.batch))

    def _make(self, numbers: Sequence[int]) -> Batch:
        latent = (int(self.model.vae.config.latent_channels), self.side // self.factor)
        timesteps = len(self.model.schedule.alphas_cumprod)
        return make_batch(self.pairs, numbers, self.side, latent, timesteps, self.settings.seed).to(self.device)

    def take_step(self) -> dict[str, float]:
        """One optimiser step; returns the loss and each of its terms, means over the samples of all processes.

        Raises:
            RunError: a term or the gradient is not finite. Nothing of the step is kept.
        """
        s, group = self.settings, group_of_step(self.step)
        for name, members in self.groups.items():
            for p in members:
                p.requires_grad_(name == group)
        sums: dict[str, Tensor] = {}
        for i in range(s.accumulate):
            batch = self._make(self._samples_of(i))
            terms = self.objective.terms(batch)
            loss = losses.total_loss(
                terms, batch.timesteps, len(self.objective.abar), perceptual_weight=s.perceptual_weight
            )
            self.accelerator.backward(loss / s.accumulate)
            overlap, gap = losses.mask_overlap(batch.source_cells, batch.target_cells)
            shown = {
                "loss": loss,
                **{k: v.mean() for k, v in terms.named().items()},
                "overlap": overlap.mean(),
                "gap": gap.mean(),
            }
            for key, value in shown.items():
                sums[key] = sums.get(key, torch.zeros((), device=self.device)) + value.detach() / s.accumulate
        stop = torch.tensor(float(self.stop), device=self.device)
        *figures, stopped = self.accelerator.reduce(torch.stack([*sums.values(), stop]), reduction="mean").tolist()
        self.stopped = stopped > 0
        values = dict(zip(sums, figures, strict=True))
        bad = [k for k in (*list(values)[1:], "loss") if not math.isfinite(values[k])]
        if bad:
            raise RunError(f"step {self.step + 1}: the term {bad[0]} is {values[bad[0]]}; the checkpoint before stays. "
                           "Try a smaller --learning-rate, or --precision no")  # fmt: skip
        members = self.groups[group]
        if self.accelerator.num_processes > 1:
            grads = [p.grad for p in members if p.grad is not None]
            flat = self.accelerator.reduce(torch.cat([g.flatten() for g in grads]), reduction="mean")
            for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                g.copy_(part.view_as(g))
        norm = float(self.accelerator.clip_grad_norm_(members, s.clip_gradient))
        self._check_gradient(norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.average is not None:
            decay = min(float(s.ema or 0), (self.step + 1) / (self.step + 10))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.trained], 1 - decay)
        self.step += 1
        return values | {"gradient": norm}

    def _check_gradient(self, norm: float) -> None:
        """fp16's loss scale may be too large for a step, which is then skipped; anything else that is not finite ends the run."""
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if self.skipped and (self.accelerator.scaler is None or self.skipped > MOST_SKIPPED):
            raise RunError(f"step {self.step + 1}: the gradient is {norm}; the checkpoint before stays. Try a smaller --learning-rate, "
                           "or --precision no")  # fmt: skip

    def run(self) -> Iterator[Step]:
        """The steps that are left, one at a time; checkpoints, losses and sheets are written on the way and at the end.

        Raises:
            RunError: a loss is not finite, or a file cannot be written; the checkpoint before stays.
        """
        s, main = self.settings, self.accelerator.is_main_process
        self.accelerator.wait_for_everyone()  # the others look at the folder before the first one writes to it
        if main:
            self.out.mkdir(parents=True, exist_ok=True)
        self.resume()
        history = History(self.out / HISTORY, self.step) if main else None
        board = _tensorboard(self.out / "tensorboard", self.step, self.say) if main else None
        began, first, before = time.perf_counter(), self.step, self.seconds
        try:
            if self.step == 0:
                self.save([])
                self.write_samples(board)
            while self.step < s.steps and not self.stopped:
                values = self.take_step()
                taken = time.perf_counter() - began
                self.seconds = before + taken
                group = group_of_step(self.step - 1)
                if history is not None:
                    history.add({"step": self.step, "group": group, **values})
                if board is not None:
                    for name, value in values.items():
                        board.add_scalar(f"train/{name}", value, self.step)
                speed = (self.step - first) / taken
                yield Step(self.step, s.steps, values, group, (s.steps - self.step) / speed, speed, peak_memory())
                last = self.step == s.steps or self.stopped
                if last or self.step % s.save_every == 0:
                    self.save(history.rows if history is not None else [])
                    if last or (s.sample_every and self.step % s.sample_every == 0):
                        self.write_samples(board)
        finally:
            if history is not None:
                history.close()
            if board is not None:
                board.close()

    # --- what is shown

    def write_samples(self, board: Any) -> None:
        """Edit the first pairs' sources with the base and with the checkpoint, as `iedit edit --method iedit` would:
        `OUT/samples/step-N.png`.

        Only the first process does, if the settings ask for it.
        """
        if not (self.accelerator.is_main_process and self.settings.sample_every and self.settings.samples):
            return
        from ..runtime.editor import Editor, EditRequest

        some = [self.pairs[i] for i in range(min(self.settings.samples, len(self.pairs)))]
        masks = [as_mask(p.source_mask) for p in some]
        requests = [
            EditRequest(squared(p.source.convert("RGB"), self.side), p.edit_prompt, p.source_caption, "iedit",
                        mask=squared(m, self.side), seed=self.settings.seed)
            for p, m in zip(some, masks, strict=True)
        ]  # fmt: skip

        def edits(model: str) -> list[Image.Image]:
            editor = Editor.load(model, [], backend="torch", device=str(self.device))
            return [r.image for r in editor.edit_many(requests)]

        self._before = self._before or edits(self.model.name)
        now = edits(str(self.out / MODEL)) if self.step else self._before
        rows = [
            [("source", p.source), ("mask", m.convert("RGB")), ("before", before), (f"after {self.step} steps", after),
             ("pseudo-target", p.target)]
            for p, m, before, after in zip(some, masks, self._before, now, strict=True)
        ]  # fmt: skip
        sheet = contact_sheet(rows, titles=[f"{p.source_caption} -> {p.edit_prompt}" for p in some])
        (self.out / "samples").mkdir(exist_ok=True)
        write_whole(self.out / "samples" / f"step-{self.step:06d}.png", png_bytes(sheet))
        if board is not None:
            board.add_image("edits", np.asarray(sheet), self.step, dataformats="HWC")

    def card(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """The model card (markdown): base, data, losses, command and figures."""
        s = self.settings
        tenth = max(1, len(rows) // 10)
        names = [k for k in (rows[-1] if rows else {}) if k not in ("step", "group")]

        def mean(some: Sequence[Mapping[str, Any]], name: str) -> float:
            return sum(float(r[name]) for r in some) / len(some)

        figures = "\n".join(f"| {n} | {mean(rows[:tenth], n):.5g} | {mean(rows[-tenth:], n):.5g} |" for n in names)
        weights = "their moving average, decay " + f"{s.ema:g}" if s.ema is not None else "the weights themselves"
        table = f"\n| term | first tenth of the steps | last tenth |\n|---|---|---|\n{figures}\n" if rows else ""
        return f"""---
library_name: diffusers
tags: [iedit, image-editing]
---
# A model fine-tuned for editing (iEdit)

{self.model.name} (digest {self.model.digest}), its UNet's input and middle blocks fine-tuned in turn on {len(self.pairs)} pairs (digest {self.pairs.digest[:16]}).
Everything else is the base's; its licence applies.

- Losses: {", ".join(f"{n} ({LOSSES[n]})" for n in s.losses)}; weights as in Eq. 12, perceptual {s.perceptual_weight:g}.
- {self.step} steps of {s.batch * s.accumulate * self.accelerator.num_processes} pairs at {self.side}x{self.side}; AdamW{" with 8-bit state" if s.adam8bit else ""}, learning rate {s.learning_rate:g}, seed {s.seed}; saved: {weights}.
- {self.accelerator.num_processes} process(es) on {self.device.type}, precision {self.precision}, attention: {self.attention}; {self.seconds / 3600:.2f} h, peak memory {peak_memory() / 2**30:.2f} GiB.
- Command: `{self.command or "iedit.training.finetune"}`
{table}"""


def _link(source: str, target: str) -> str:
    """A hard link where the file system has them, else a copy: most of a checkpoint is the base's."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target


class History:
    """`OUT/losses.csv`: a row for each step, on disk as soon as it is taken; rows after `step` are of a run that was cut off, and go."""

    def __init__(self, path: Path, step: int):
        self.rows: list[dict[str, Any]] = []
        if step and path.is_file():
            with path.open(newline="") as file:
                self.rows = [r for r in csv.DictReader(file) if r["step"] and int(r["step"]) <= step]
        text = io.StringIO()
        if self.rows:
            writer = csv.DictWriter(text, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
        write_whole(path, text.getvalue().encode())
        self._file = path.open("a", newline="")

    def add(self, row: dict[str, Any]) -> None:
        writer = csv.DictWriter(self._file, list(self.rows[0] if self.rows else row))
        if not self.rows:
            writer.writeheader()
        writer.writerow(row)
        self._file.flush()
        self.rows.append(row)

    def close(self) -> None:
        self._file.close()


def _tensorboard(folder: Path, step: int, say: Callable[[str], None]) -> Any:
    """A writer of scalars and pictures; None, and a line, where tensorboard is not installed."""
    reasons = missing("tensorboard", extra="train")
    if reasons:
        say(f"no TensorBoard: {reasons[0]}")
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


# --- one process or several -------------------------------------------------------------------------------------------


def finetune(
    out: Path,
    model: str,
    pairs: Path,
    settings: Settings,
    *,
    processes: int = 1,
    clip: str | None = None,
    vgg: Path | None = None,
    device: str | None = None,
    command: str = "",
    tell: Callable[[Step], None] = _ignore,
    say: Callable[[str], None] = _ignore,
) -> Path:
    """Fine-tune a model on the pairs of a folder; the same call goes on where a run was stopped. Arguments as of `Finetuning`.

    Args:
        processes: on this machine. Under torchrun or `accelerate launch` leave it at 1: its processes are used.
        tell, say: told of every step, and of what happens, by the first process; with several they have to be picklable.

    Returns:
        The folder of the fine-tuned model, in diffusers' layout.

    Raises:
        UsageError, RunError: as `Finetuning` does.
        KeyboardInterrupt: Ctrl-C ended it before its last step; there is a checkpoint of what was reached.
    """
    options = {"clip": clip, "vgg": vgg, "device": device, "command": command}
    if processes == 1:
        return _train(out, model, pairs, settings, options, tell, say)
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out.mkdir(parents=True, exist_ok=True)
    error = out / f"error.{os.getpid()}.tmp"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the processes get it themselves, and end after their step
    try:
        spawn(_process, (processes, port, error, out, model, pairs, settings, options, tell, say), nprocs=processes)
        if error.is_file():
            raise KeyboardInterrupt
    except (ProcessRaisedException, ProcessExitedException) as raised:
        if not error.is_file():
            raise RunError(
                f"a process ended ({first_line(raised)}); the same command goes on from the last checkpoint"
            ) from raised
        name, _, text = error.read_text().partition(":")
        raise (UsageError if name == "UsageError" else RunError)(text) from raised
    finally:
        signal.signal(signal.SIGINT, before)
        error.unlink(missing_ok=True)
    return out / MODEL


def _process(rank: int, processes: int, port: int, error: Path, *arguments: Any) -> None:
    """One of several processes, as torch and accelerate expect them."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    if not (torch.cuda.is_available() or os.environ.get("OMP_NUM_THREADS")):
        torch.set_num_threads(max(1, len(machine.processors()) // processes))
    try:
        _train(*arguments)
    except KeyboardInterrupt:
        write_whole(error, b"KeyboardInterrupt")
    except (UsageError, RunError) as raised:
        write_whole(error, f"{type(raised).__name__}:{raised}".encode())
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _train(
    out: Path, model: str, pairs: Path, settings: Settings, options: Mapping[str, Any],
    tell: Callable[[Step], None], say: Callable[[str], None],
) -> Path:  # fmt: skip
    """The run in this process. Ctrl-C ends it after the step that it is in; a second one at once."""
    from .pairs import read_pairs

    run = Finetuning(out, model, read_pairs(pairs), settings, say=say, **options)
    main = run.accelerator.is_main_process
    if not main:
        run.say = _ignore
    run.say(f"{len(run.pairs)} pairs at {run.side}x{run.side}, {run.accelerator.num_processes} process(es) on {run.device.type}, "
            f"precision {run.precision}, attention: {run.attention}")  # fmt: skip

    def end(*_: Any) -> None:
        if run.stop:
            raise KeyboardInterrupt
        run.stop = True
        run.say("stopping after this step; Ctrl-C again ends it at once")

    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, end) if in_main_thread else None
    try:
        for step in run.run():
            if main:
                tell(step)
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, before)
    if run.step < settings.steps:
        run.say(f"stopped after step {run.step}; the same command goes on from there")
        raise KeyboardInterrupt
    run.say(f"finished after step {run.step}; the model is in {out / MODEL}")
    return out / MODEL
