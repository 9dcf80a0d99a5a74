"""Eager PyTorch: the backend that runs everywhere and that the others are measured against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .denoiser import Condition
from .models import Model
from .profile import module_call


class TorchBackend:
    """The parts of a `Model`, called as diffusers does; residuals of several ControlNets are summed.

    Args:
        attention: "sdpa" (torch's own) or "xformers"; not silently: see `set_attention`.
        channels_last: convolution weights in that memory format, which tensor cores prefer.
    """

    name = "torch"

    def __init__(self, model: Model, *, attention: str = "sdpa", channels_last: bool = False):
        self.model, self.unet, self.controlnets, self.dtype = model, model.unet, model.controlnets, model.dtype

    def why_not(self, module: str, batch: int, height: int, width: int) -> list[str]:
        return []

    @torch.no_grad()
    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `denoiser.Denoiser`."""
        x, text = x.to(self.dtype), condition.text.to(self.dtype)
        extra: dict[str, Any] = {}
        for name, maps, scale in condition.layouts:
            with module_call(f"controlnet-{name}", self.name, len(x), device=x.device):
                down, mid = self.controlnets[name](
                    x, t, text, controlnet_cond=maps.to(self.dtype), conditioning_scale=scale, return_dict=False
                )
            if extra:
                down = [a + b for a, b in zip(extra["down_block_additional_residuals"], down, strict=True)]
                mid = extra["mid_block_additional_residual"] + mid
            extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        with module_call("unet", self.name, len(x), device=x.device):
            output: Tensor = self.unet(x, t, text, return_dict=False, **extra)[0].float()
        return output

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        with module_call("vae_encoder", self.name, len(images), device=images.device):
            mode: Tensor = self.model.vae.encode(images.to(self.dtype)).latent_dist.mode().float()
        return mode

    @torch.no_grad()
    def decode_latent(self, latents: Tensor) -> Tensor:
        with module_call("vae_decoder", self.name, len(latents), device=latents.device):
            images: Tensor = self.model.vae.decode(latents.to(self.dtype)).sample.float()
        return images

    @torch.no_grad()
    def encode_tokens(self, ids: Tensor) -> Tensor:
        with module_call("text_encoder", self.name, len(ids), device=ids.device):
            states: Tensor = self.model.text_encoder(ids)[0].float()
        return states
