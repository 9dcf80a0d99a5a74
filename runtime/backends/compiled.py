"""torch.compile: the networks of `TorchBackend` as fused kernels; on CUDA each denoising step is one replay of a CUDA graph.

The UNet and the ControlNets of a condition are one function, with the layouts' embeddings, their scales and the per-sample
timesteps as inputs, so another prompt, scale or level does not compile again; another number of samples or size does, once
for a first shape and once more for all the others. Compiling is not part of what a step costs: such calls are cold in the profile.

On CUDA a step's graph holds the network, the guidance, the DDIM step, the blend and the ITO update (`step`), recorded when
an outline of inputs comes for the second time. Where recording fails the compiled functions run without, and the profile says why.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..denoise_step import Condition, Transition, joined
from ..model.model import Model
from ..profile import current, module_call
from .base import unet_module
from .cuda_graphs import CudaGraphCache, outline
from .eager import Prepared, TorchBackend


def why_unavailable() -> list[str]:
    """Reasons why torch.compile cannot work on this machine; empty if it can."""
    if torch.cuda.is_available():
        from ...kernels.dispatch import triton_installed

        return [] if triton_installed() else ['triton is not installed (pip install "iedit[gpu]")']
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        return [f"no C++ compiler: {compiler} is not on the path (install one, or name it in CXX)"]
    return []


class CompileBackend(TorchBackend):
    """See the module's docstring. Arguments as of `TorchBackend`, and:

    Args:
        recordings: CUDA graphs of the model's device; None is new ones on CUDA, and none elsewhere.
    """

    name = "compile"
    keeps_text = False  # inside the function: 0.4 % of the arithmetic of SD 1.5 at 512x512

    def __init__(
        self,
        model: Model,
        *,
        attention: str = "sdpa",
        channels_last: bool = False,
        recordings: CudaGraphCache | None = None,
    ):
        super().__init__(model, attention=attention, channels_last=channels_last)
        if recordings is None and model.device.type == "cuda":
            recordings = CudaGraphCache(model.device)
        self.recordings = recordings
        self._compiled: dict[str, Callable[..., Tensor]] = {}
        self._seen: set[Any] = set()
        self._compiling = threading.RLock()  # Dynamo traces one function at a time

    def _function(self, module: str, of: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`of` compiled, the first that came for the module."""
        if module not in self._compiled:
            self._compiled[module] = compiled(of)
        return self._compiled[module]

    def _call(
        self, module: str, what: str, function: Callable[[Any], list[Tensor]], inputs: Any, batch: int
    ) -> list[Tensor]:
        """`function(inputs)` as a call of `module`, from a graph where there are any. A call of a new outline is cold and
        holds the others up.

        Args:
            what: name of the function.
        """
        if self.recordings is None:
            key = (what, outline(inputs))
            cold = key not in self._seen
            with module_call(module, self.name, batch, cold=cold, device=self.model.device), self._lock_if(cold):
                outputs = function(inputs)
                self._seen.add(key)
            return outputs
        cold = self.recordings.cold(what, inputs)
        with module_call(module, self.name, batch, cold=cold, device=self.model.device):
            outputs = self.recordings(what, function, inputs)
        running = current()
        if self.recordings.failed and running is not None:
            running.fallback(module, "cuda graph", [self.recordings.failed])
        return outputs

    def _run(self, module: str, of: Callable[..., Tensor], *inputs: Any) -> Tensor:
        def go(inputs: tuple[Any, ...]) -> list[Tensor]:
            return [self._function(module, of)(*inputs).float()]

        return self._call(module, module, go, inputs, len(inputs[0]))[0]

    @contextmanager
    def _lock_if(self, cold: bool) -> Iterator[None]:
        if not cold:
            yield
            return
        with self._compiling:
            yield

    def _unet(self, condition: Condition) -> Callable[..., Tensor]:
        """UNet and ControlNets of a condition, compiled: (x, t, text, hints, scales) -> what the UNet predicts."""
        names = _names(condition)

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

        return self._function(unet_module(condition), both)

    def _predict(self, x: Tensor, t: Tensor, ready: Prepared) -> Tensor:
        def go(inputs: tuple[Any, ...]) -> list[Tensor]:
            return [self._unet(ready.condition)(*inputs).float()]

        module = unet_module(ready.condition)
        return self._call(module, module, go, (x, t, ready.text, *_layouts(ready)), len(x))[0]

    @torch.no_grad()
    def step(
        self, t: Sequence[Tensor], condition: Condition, transitions: Sequence[Transition]
    ) -> list[tuple[Tensor, Tensor]] | None:
        """See `base.Stepper`; None where there are no graphs, or a state is carried from step to step."""
        if self.recordings is None or not all(s.stateless for s in transitions):
            return None
        ready = self._prepared(condition)

        def go(inputs: tuple[Any, ...]) -> list[Tensor]:
            t, transitions, text, hints, scales = inputs
            x = joined([s.x for s in transitions for _ in range(1 + s.guided)]).to(self.dtype)
            output = self._unet(condition)(x, joined(t), text, hints, scales).float()
            parts = output.split([(1 + s.guided) * len(s.x) for s in transitions])
            return [p.sum() for p in parts] + [s(p) for s, p in zip(transitions, parts, strict=True)]

        module = unet_module(condition)
        inputs = (tuple(t), tuple(transitions), ready.text, *_layouts(ready))
        outputs = self._call(module, f"step of {module}", go, inputs, len(condition))
        return list(zip(outputs[: len(transitions)], outputs[len(transitions) :], strict=True))

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

    @torch.no_grad()
    def encode_tokens(self, ids: Tensor) -> Tensor:
        def encode(ids: Tensor) -> Tensor:
            states: Tensor = self.model.text_encoder(ids)[0]
            return states

        return self._run("text_encoder", encode, ids)


def _names(condition: Condition) -> list[str]:
    """Of the layouts, in the order in which the compiled function takes them."""
    return sorted(c.name for c in condition.controls)


def _layouts(ready: Prepared) -> tuple[list[Tensor], list[Tensor]]:
    """The embeddings and the scales of a condition's layouts, as the compiled function takes them."""
    names = _names(ready.condition)
    return [ready.hints[name] for name in names], [ready.scales[name] for name in names]


def compiled(of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`of` by Inductor: whole or an error, never half of it in eager."""
    options: dict[str, Any] = {"freezing": True}  # weights are constants: repacked for the kernels that read them
    return torch.compile(of, fullgraph=True, dynamic=True, options=options)
