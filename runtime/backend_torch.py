"""Eager PyTorch: the backend that runs everywhere and that the others are measured against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .denoiser import Condition
from .models import Model


class TorchDenoiser:
    """UNet and ControlNets of a `Model`, called as diffusers does; residuals of several ControlNets are summed."""

    def __init__(self, model: Model):
        self.unet, self.controlnets, self.dtype = model.unet, model.controlnets, model.dtype

    @torch.no_grad()
    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `denoiser.Denoiser`."""
        x, text = x.to(self.dtype), condition.text.to(self.dtype)
        extra: dict[str, Any] = {}
        for name, maps, scale in condition.layouts:
            down, mid = self.controlnets[name](
                x, t, text, controlnet_cond=maps.to(self.dtype), conditioning_scale=scale, return_dict=False
            )
            if extra:
                down = [a + b for a, b in zip(extra["down_block_additional_residuals"], down, strict=True)]
                mid = extra["mid_block_additional_residual"] + mid
            extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return self.unet(x, t, text, return_dict=False, **extra)[0].float()
