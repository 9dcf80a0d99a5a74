"""What a fine-tuning step of SD 1.4's shapes takes: the paper's setting (384x384, batch 1, fp16), and with each saving switched off.

    python bench/training_memory.py count [bench/results.csv]   counts the bytes alive at the peak, on tensors without data
    python bench/training_memory.py step [bench/results.csv]    runs real steps with random weights: on a GPU each setting, mixed
                                                                precision, measured; on a CPU one step in float32

`count` runs the same objective and the same networks as `iedit train finetune` on torch's fake tensors, and adds up the storages that are
alive. It leaves out what only a device has: the allocator's slack, workspaces of the libraries, and the CUDA context (about 1 GiB together).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import full_size
import torch
from results import write_rows
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from iedit.runtime.model.model import Model
from iedit.runtime.profile import peak_memory
from iedit.runtime.schedule import Schedule
from iedit.training import losses
from iedit.training.embed import make_tokenizer, new_image_processor, new_scheduler
from iedit.training.objective import Batch, Objective, group_of_step, trained_groups

SIDE, CELLS = 384, 48
SCHEDULE = Schedule.from_config(new_scheduler().config)
ALL = ("mask", "global", "local", "perceptual")
SETTINGS = {  # name -> gradient checkpointing, memory-efficient attention
    "checkpointing, memory-efficient attention": (True, True),
    "memory-efficient attention alone": (False, True),
    "checkpointing alone": (True, False),
    "neither": (False, False),
}


class Alive(TorchDispatchMode):
    """Adds up the bytes of the storages that operations made and that are still alive; `peak` is the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for value in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(value, Tensor):
                self.count(value)
        return made


def new_clip() -> Any:
    """CLIP ViT-L/14, whose text half SD 1.x has: 428 M parameters."""
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
              "patch_size": 14, "image_size": 224}  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768))


def new_objective(
    device: str, half: torch.dtype | None, checkpointing: bool, folder: Path
) -> tuple[Objective, dict[str, list[Any]]]:
    """The objective of the paper's setting with random weights, and its trained groups; frozen parts in `half`."""
    tokenizer = make_tokenizer(folder)
    tokenizer.model_max_length = full_size.TOKENS
    processor = new_image_processor()
    processor.size, processor.crop_size = {"shortest_edge": 224}, {"height": 224, "width": 224}
    usual = torch.get_default_dtype()
    try:
        with torch.device(device):
            unet = full_size.new_unet()
            torch.set_default_dtype(half or usual)
            vae, text = full_size.new_vae(), full_size.new_text_encoder()
            clip, features = losses.ClipEmbedder(new_clip(), processor), losses.VggFeatures()
    finally:
        torch.set_default_dtype(usual)
    for part in (unet, vae, text):
        part.requires_grad_(False)
    if checkpointing:
        unet.enable_gradient_checkpointing()
        vae.enable_gradient_checkpointing()
    model = Model(
        "random", folder, unet, vae, text, tokenizer, SCHEDULE, {}, torch.device(device), torch.float32, "", ""
    )
    kind = torch.device(device).type

    def autocast() -> Any:
        return contextlib.nullcontext() if half is None else torch.autocast(kind, half)

    return Objective(model, ALL, clip, tokenizer, features, autocast), trained_groups(unet)


def new_batch(device: str) -> Batch:
    """One pair of noise."""
    images = torch.rand(1, 3, SIDE, SIDE, device=device) * 2 - 1
    mask, cells = (torch.ones(1, 1, s, s, device=device) for s in (SIDE, CELLS))
    return Batch(images, -images, mask, mask, cells, cells, ["a blue car on grass"], ["blue car"],
                 torch.full((1,), 500, device=device), torch.randn(1, 4, CELLS, CELLS, device=device))  # fmt: skip


def backward(objective: Objective, groups: dict[str, list[Any]], batch: Batch, step: int) -> Tensor:
    """What a step does up to the optimiser; returns the loss."""
    for name, members in groups.items():
        for p in members:
            p.requires_grad_(name == group_of_step(step))
    loss = losses.total_loss(objective.terms(batch), batch.timesteps, 1000)
    loss.backward()
    return loss.detach()


def attention(efficient: bool) -> Any:
    """Without the efficient kernels SDPA makes the whole matrix."""
    return contextlib.nullcontext() if efficient else sdpa_kernel(SDPBackend.MATH)


def count(checkpointing: bool, efficient: bool, folder: Path) -> dict[str, float]:
    """GiB at the peak of a step that trains the input group, by far the larger, and how much of it stays between steps."""
    with FakeTensorMode(allow_non_fake_inputs=True), Alive() as alive:
        objective, groups = new_objective("cpu", torch.bfloat16, checkpointing, folder)
        # Adam's two moments of both groups.
        moments = [torch.zeros_like(p) for members in groups.values() for p in members for _ in range(2)]
        batch, kept = new_batch("cpu"), alive.now
        with attention(efficient):
            backward(objective, groups, batch, step=0)
        del moments
    return {"peak": alive.peak / 2**30, "kept": kept / 2**30}


def measure(checkpointing: bool, efficient: bool, folder: Path, steps: int = 10) -> dict[str, float]:
    """The same on the GPU, with AdamW: peak that torch held in GiB, and steps per second. The gradients are not scaled: they are noise."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    objective, groups = new_objective("cuda", torch.float16, checkpointing, folder)
    optimiser = torch.optim.AdamW([p for members in groups.values() for p in members], lr=1e-6)
    batch, began = new_batch("cuda"), 0.0
    with attention(efficient):
        for step in range(steps + 2):
            if step == 2:  # both groups have their moments now
                torch.cuda.synchronize()
                began = time.perf_counter()
            backward(objective, groups, batch, step)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
    return {
        "peak": torch.cuda.max_memory_allocated() / 2**30,
        "steps_per_second": steps / (time.perf_counter() - began),
    }


def one_step(folder: Path) -> dict[str, float]:
    """A step of each group in float32 on the CPU: the losses, seconds, and peak resident GiB of the process."""
    torch.manual_seed(0)
    objective, groups = new_objective("cpu", None, True, folder)
    optimiser = torch.optim.AdamW([p for members in groups.values() for p in members], lr=1e-6)
    batch, found = new_batch("cpu"), dict[str, float]()
    for step in range(2):
        began = time.perf_counter()
        before = {name: members[0].detach().clone() for name, members in groups.items()}
        found[f"loss {step + 1}"] = float(backward(objective, groups, batch, step))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        changed = [name for name, members in groups.items() if not torch.equal(before[name], members[0])]
        assert changed == [group_of_step(step)], changed
        found[f"seconds {step + 1}"] = time.perf_counter() - began
    return found | {"peak": peak_memory() / 2**30}


def main(words: list[str]) -> None:
    import tempfile

    from transformers.utils import logging

    logging.disable_progress_bar()
    kind, table = words[0], Path(words[1]) if len(words) > 1 else None
    shared = {
        "name": "training/step, SD 1.4 shapes",
        "shape": f"{SIDE}x{SIDE}, batch 1",
        "versions": f"torch {torch.__version__}",
    }

    def write(row: dict[str, Any]) -> None:
        """As it is measured: a run that is cut off keeps what it has."""
        if table is not None:
            write_rows(table, [shared | row])

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        on_cpu = kind == "step" and not torch.cuda.is_available()
        if on_cpu:
            found = one_step(folder)
            print(", ".join(f"{k} {v:.4g}" for k, v in found.items()))
            write({"variant": "input group, checkpointing", "dtype": "float32", "p50": round(found["seconds 1"], 1), "unit": "s",
                   "peak_mib": round(found["peak"] * 1024), "device": "cpu"})  # fmt: skip
        for title, (checkpointing, efficient) in () if on_cpu else SETTINGS.items():
            if kind == "count":
                found = count(checkpointing, efficient, folder)
                print(f"{title}: {found['peak']:.2f} GiB at the peak, {found['kept']:.2f} GiB of it between steps")
                write({"variant": f"counted on tensors without data: {title}", "dtype": "bfloat16 autocast", "unit": "MiB",
                       "peak_mib": round(found["peak"] * 1024), "device": "cpu"})  # fmt: skip
            else:
                found = measure(checkpointing, efficient, folder)
                print(f"{title}: {found['peak']:.2f} GiB at the peak, {found['steps_per_second']:.2f} steps/s")
                write({"variant": title, "dtype": "float16 autocast", "p50": round(1 / found["steps_per_second"], 4), "unit": "s",
                       "peak_mib": round(found["peak"] * 1024), "device": torch.cuda.get_device_name()})  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] in (["count"], ["step"]) and len(sys.argv) in (2, 3):
        main(sys.argv[1:])
    else:
        sys.exit(str(__doc__).split("\n\n")[1])
