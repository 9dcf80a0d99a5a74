"""Eager PyTorch: the backend that runs everywhere and that the others are measured against."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..denoise_step import Condition
from ..errors import UsageError
from ..model.model import Model
from ..model.module_io import CONTROLNET_PREFIX
from ..profile import current, module_call
from .base import BackendOptions
from .torch_modules import PreparedCondition, TorchModules, decode_latent, encode_image, summed_residuals, unet_extras


def why_unavailable() -> list[str]:
    """No reasons: eager PyTorch runs everywhere."""
    return []


def load(model: Model, options: BackendOptions) -> TorchBackend:
    """See `backends.load_backend`."""
    return TorchBackend(model, attention=options.attention, channels_last=options.channels_last)


@contextlib.contextmanager
def blocks_as_steps(network: Any, stage: str) -> Iterator[None]:
    """While a half of a VAE runs in `stage`, each of its residual blocks is a step of the profile: a large picture takes minutes on a CPU.
    Another thread's call of the same network passes the same hooks, and each call reports to the profile of its own thread."""
    named = [(name, part) for name, part in network.named_modules() if type(part).__name__ == "ResnetBlock2D"]
    if stage == "decode":  # a decoder begins with its middle block, where an encoder ends
        named.sort(key=lambda one: not one[0].startswith("mid_block"))
    blocks = [part for _, part in named]

    def hook(number: int) -> Any:
        def tell(*_: Any) -> None:
            running = current()
            if running is not None and running.stage_name == stage:
                running.step(number, len(blocks))

        return tell

    handles = [block.register_forward_pre_hook(hook(i)) for i, block in enumerate(blocks, 1)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class TorchBackend(TorchModules):
    """The parts of a `Model`, called as diffusers does. Arguments as of `TorchModules`."""

    name = "torch"

    @torch.no_grad()
    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `base.Denoiser`."""
        self.current.prepared = prepared = self.prepared(condition)
        try:
            return self._predict(condition.network_input(x.to(self.dtype)), t, prepared)
        finally:
            self.current.prepared = None

    def _predict(self, x: Tensor, t: Tensor, prepared: PreparedCondition) -> Tensor:
        prompt_embeds = prepared.prompt_embeds

        def residuals() -> Iterator[Any]:
            for c in prepared.condition.controls:
                if c.adapter:
                    continue
                embedding = prepared.control_embeddings[c.name]
                with module_call(CONTROLNET_PREFIX + c.name, self.name, len(x), device=x.device):
                    outputs = self.controlnets[c.name](
                        x, t, prompt_embeds, controlnet_cond=embedding, conditioning_scale=c.scale, return_dict=False
                    )
                yield outputs

        added = summed_residuals(residuals()) | unet_extras(prepared.control, prepared.features)
        with module_call("unet", self.name, len(x), device=x.device):
            output: Tensor = self.unet(x, t, prompt_embeds, return_dict=False, **added)[0].float()
        return output

    def gradient(self, x: Tensor, t: Tensor, condition: Condition, wanted: Tensor) -> Tensor:
        """See `base.Differentiable`; without ControlNets.

        Raises:
            UsageError: in a half, in which gradients as small as these are zero.
        """
        if self.dtype != torch.float32:
            raise UsageError(
                f"a gradient is computed in float32, not in {str(self.dtype).removeprefix('torch.')}; use --dtype float32"
            )
        with torch.enable_grad(), module_call("unet", self.name, len(x), device=x.device):
            prompt_embeds = condition.prompt_embeds.detach().float().requires_grad_()
            output = self.unet(condition.network_input(x), t, prompt_embeds, return_dict=False)[0]
            distance = (output - wanted).square().flatten(1).mean(1)
            (gradient,) = torch.autograd.grad(distance.sum(), prompt_embeds)
        return torch.cat([gradient.flatten(1), distance.detach().unsqueeze(1)], dim=1)

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        steps = blocks_as_steps(self.vae.encoder, "encode")
        with steps, module_call("vae_encoder", self.name, len(images), device=images.device):
            return encode_image(self.vae, images.to(self.dtype))

    @torch.no_grad()
    def decode_latent(self, latents: Tensor) -> Tensor:
        steps = blocks_as_steps(self.vae.decoder, "decode")
        with steps, module_call("vae_decoder", self.name, len(latents), device=latents.device):
            return decode_latent(self.vae, latents.to(self.dtype))

    @torch.no_grad()
    def encode_tokens(self, ids: Tensor) -> Tensor:
        with module_call("text_encoder", self.name, len(ids), device=ids.device):
            prompt_embeds: Tensor = self.model.text_encoder(ids)[0].float()
        return prompt_embeds
