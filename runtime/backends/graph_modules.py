"""A model's networks as functions of tensors that CUDA graphs record: what the backends `compile` and `graphs` share.

The UNet and the ControlNets of a condition are one function, with the control embeddings, their scales and the per-sample timesteps as inputs. On CUDA
a step's graph holds that function, the guidance, the DDIM step, the blend and the ITO update (`step`), recorded when an outline of inputs comes for
the second time. Where recording fails the functions run without, and the profile says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..denoise_step import Condition, Transition, joined
from ..model.model import Model
from ..profile import module_call
from .base import unet_module
from .cuda_graphs import CudaGraphCache, capture
from .torch_modules import PreparedCondition, PreparedControl, TorchModules, summed_residuals, unet_extras


class GraphModules(TorchModules):
    """See this file's docstring. Arguments as of `TorchModules`, and:

    Args:
        graphs: CUDA graphs of the model's device; by default new ones, which record on CUDA and nowhere else.
    """

    name: str  # of the backend
    keeps_text = False  # the function computes them: 0.4 % of the arithmetic of SD 1.5 at 512x512

    def __init__(
        self,
        model: Model,
        *,
        attention: str = "sdpa",
        channels_last: bool = False,
        graphs: CudaGraphCache | None = None,
    ):
        super().__init__(model, attention=attention, channels_last=channels_last)
        self.graphs = graphs or CudaGraphCache(model.device, capture=capture if model.device.type == "cuda" else None)

    def _function(self, module: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """What runs for a module's `function`: itself, or what a compiler made of the first that came for the module."""
        return function

    def _call(
        self, module: str, name: str, function: Callable[[Any], list[Tensor]], inputs: Any, batch: int
    ) -> list[Tensor]:
        """`function(inputs)` as a call of `module`, from a CUDA graph where there are any; `name` is the function's."""
        cold = self.graphs.cold(name, inputs)
        with module_call(module, self.name, batch, cold=cold, device=self.model.device):
            outputs = self.graphs(name, function, inputs)
        self.graphs.tell_failure(module)
        return outputs

    def _run(self, module: str, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """A call of `function` compiled, float32."""

        def run(inputs: tuple[Any, ...]) -> list[Tensor]:
            return [self._function(module, function)(*inputs).float()]

        return self._call(module, module, run, inputs, len(inputs[0]))[0]

    def _unet(self, condition: Condition) -> Callable[..., Tensor]:
        """The UNet and the ControlNets of a condition: (x, t, prompt_embeds, control embeddings, scales, features of T2I-Adapters, control of
        attention) -> what the UNet predicts."""
        names = _names(condition)

        def fused(
            x: Tensor,
            t: Tensor,
            prompt_embeds: Tensor,
            embeddings: list[Tensor],
            scales: list[Tensor],
            features: list[Tensor],
            control: tuple[Any, ...],
        ) -> Tensor:
            outputs = [
                self.controlnets[name](
                    x, t, prompt_embeds, controlnet_cond=embedding, conditioning_scale=scale, return_dict=False
                )
                for name, embedding, scale in zip(names, embeddings, scales, strict=True)
            ]
            added = summed_residuals(outputs) | unet_extras(PreparedControl(*control) if control else None, features)
            output: Tensor = self.unet(x, t, prompt_embeds, return_dict=False, **added)[0]
            return output

        return fused

    @torch.no_grad()
    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `base.Denoiser`."""
        prepared = self.prepared(condition)
        inputs = (condition.network_input(x.to(self.dtype)), t, prepared.prompt_embeds, *_controls(prepared))
        return self._run(unet_module(condition), self._unet(condition), *inputs)

    @torch.no_grad()
    def step(
        self, t: Sequence[Tensor], condition: Condition, transitions: Sequence[Transition]
    ) -> list[tuple[Tensor, Tensor]] | None:
        """See `base.Stepper`; None where there are no graphs, or a state is carried from step to step."""
        if not self.graphs.enabled or condition.image is not None or not all(s.stateless for s in transitions):
            return None
        prepared, module = self.prepared(condition), unet_module(condition)

        def run(inputs: tuple[Any, ...]) -> list[Tensor]:
            t, transitions, prompt_embeds, *controls = inputs
            x = joined([s.x for s in transitions for _ in range(1 + s.guided)]).to(self.dtype)
            unet = self._function(module, self._unet(condition))
            output = unet(x, joined(t), prompt_embeds, *controls).float()
            parts = output.split([(1 + s.guided) * len(s.x) for s in transitions])
            return [p.sum() for p in parts] + [s(p) for s, p in zip(transitions, parts, strict=True)]

        inputs = (tuple(t), tuple(transitions), prepared.prompt_embeds, *_controls(prepared))
        outputs = self._call(module, f"step of {module}", run, inputs, len(condition))
        return list(zip(outputs[: len(transitions)], outputs[len(transitions) :], strict=True))

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        # The first half of the channels is the posterior's mean, which is its mode.
        return self._run("vae_encoder", lambda x: self.vae._encode(x).chunk(2, dim=1)[0], images.to(self.dtype))

    @torch.no_grad()
    def decode_latent(self, latents: Tensor) -> Tensor:
        return self._run("vae_decoder", lambda z: self.vae.decode(z, return_dict=False)[0], latents.to(self.dtype))

    @torch.no_grad()
    def encode_tokens(self, ids: Tensor) -> Tensor:
        return self._run("text_encoder", lambda ids: self.model.text_encoder(ids)[0], ids)


def _names(condition: Condition) -> list[str]:
    """Names of a condition's ControlNets, in the order in which the function takes them."""
    return sorted(c.name for c in condition.controls if not c.adapter)


def _controls(prepared: PreparedCondition) -> tuple[list[Tensor], list[Tensor], list[Tensor], tuple[Any, ...]]:
    """What the function takes of a condition beside its text; control of attention as its fields, () for none."""
    names, c = _names(prepared.condition), prepared.control
    control = () if c is None else (c.edited, c.sources, c.whose, c.cross, c.own, c.self_queries)
    return (
        [prepared.control_embeddings[n] for n in names],
        [prepared.scales[n] for n in names],
        prepared.features,
        control,
    )
