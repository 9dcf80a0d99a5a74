"""torch.compile: the networks of `TorchBackend` as fused kernels; on CUDA each call is the replay of a CUDA graph.

The UNet and the ControlNets of a condition are one graph, with the layouts' embeddings, their scales and the per-sample
timesteps as inputs, so another prompt, scale or level does not compile again; another number of samples or size does, once
for a first shape and once more for all the others. Compiling is not part of what a step costs: such calls are cold in the profile.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .backend_torch import Prepared, TorchBackend
from .backends import unet_module
from .models import Model
from .profile import module_call


def why_unavailable() -> list[str]:
    """Reasons why torch.compile cannot work on this machine; empty if it can."""
    if torch.cuda.is_available():
        from ..kernels.dispatch import triton_installed

        return [] if triton_installed() else ['triton is not installed (pip install "iedit[gpu]")']
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        return [f"no C++ compiler: {compiler} is not on the path (install one, or name it in CXX)"]
    return []


class CompileBackend(TorchBackend):
    """See the module's docstring. Arguments as of `TorchBackend`."""

    name = "compile"
    keeps_text = False  # inside the graph: 1 % of a step's arithmetic

    def __init__(self, model: Model, *, attention: str = "sdpa", channels_last: bool = False):
        super().__init__(model, attention=attention, channels_last=channels_last)
        self._graphs: dict[str, Callable[..., Tensor]] = {}
        self._seen: set[tuple[Any, ...]] = set()
        self._compiling = threading.RLock()  # Dynamo traces one function at a time

    def _run(self, module: str, of: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """`of(*inputs)` compiled; a call with new shapes is cold and holds the others up."""
        shapes = (module, *(tuple(i.shape) if isinstance(i, Tensor) else len(i) for i in inputs))
        cold = shapes not in self._seen
        with module_call(module, self.name, len(inputs[0]), cold=cold, device=inputs[0].device), self._lock_if(cold):
            graph = self._graphs.get(module)
            if graph is None:
                graph = self._graphs[module] = compiled(of, self.model.device)
            if self.model.device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            # A clone: the replay of a CUDA graph writes to the same memory every time.
            output = graph(*inputs).float().clone()
            self._seen.add(shapes)
        return output

    @contextmanager
    def _lock_if(self, cold: bool) -> Iterator[None]:
        if not cold:
            yield
            return
        with self._compiling:
            yield

    def _predict(self, x: Tensor, t: Tensor, ready: Prepared) -> Tensor:
        names = [name for name, _, _ in ready.condition.layouts]

        def both(x: Tensor, t: Tensor, text: Tensor, hints: list[Tensor], scales: list[Tensor]) -> Tensor:
            extra: dict[str, Any] = {}
            for name, hint, scale in zip(names, hints, scales, strict=True):
                down, mid = self.controlnets[name](
                    x, t, text, controlnet_cond=hint, conditioning_scale=scale, return_dict=False
                )
                if extra:
                    down = [a + b for a, b in zip(extra["down_block_additional_residuals"], down, strict=True)]
                    mid = extra["mid_block_additional_residual"] + mid
                extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            output: Tensor = self.unet(x, t, text, return_dict=False, **extra)[0]
            return output

        scales = [torch.tensor(scale, dtype=x.dtype, device=x.device) for _, _, scale in ready.condition.layouts]
        hints = [ready.hints[name] for name in names]
        return self._run(unet_module(ready.condition), both, x, t, ready.text, hints, scales)

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        def mode(images: Tensor) -> Tensor:
            moments: Tensor = self.model.vae._encode(images)
            return moments.chunk(2, dim=1)[0]

        return self._run("vae_encoder", mode, images.to(self.dtype))

    @torch.no_grad()
    def decode_latent(self, latents: Tensor) -> Tensor:
        def decode(latents: Tensor) -> Tensor:
            images: Tensor = self.model.vae.decode(latents, return_dict=False)[0]
            return images

        return self._run("vae_decoder", decode, latents.to(self.dtype))


def compiled(of: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """`of` by Inductor: whole or an error, never half of it in eager."""
    options: dict[str, Any] = {"freezing": True}  # weights are constants: repacked for the kernels that read them
    if device.type == "cuda":
        options |= {"triton.cudagraphs": True, "max_autotune_gemm": False}
    return torch.compile(of, fullgraph=True, dynamic=True, options=options)
