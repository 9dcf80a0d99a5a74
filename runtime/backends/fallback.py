"""`auto`: per module and per shape the first backend that can run it.

Why the ones above it could not is told to the running profile, once, and from there to the result, the receipt and the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from .. import profile
from ..denoise_step import Condition
from ..model.module_io import CONTROLNET_PREFIX
from .base import Backend, unet_module


class FallbackBackend:
    """The first backend of several that can run a module at a shape. The last one must be able to run everything.

    Args:
        steps: from the top.
        vae_scale_factor: pixels per latent cell.
        above: reasons why backends that are not among the steps cannot run at all, by name.
        ran: module -> the only backends that may run it, as a receipt has them; a module that is not there may be run by
            each of the steps.
    """

    name = "auto"

    def __init__(
        self,
        steps: Sequence[Backend],
        vae_scale_factor: int,
        above: dict[str, list[str]] | None = None,
        ran: Mapping[str, Sequence[str]] | None = None,
    ):
        self.steps, self.vae_scale_factor, self.above, self.ran = list(steps), vae_scale_factor, above or {}, ran or {}

    def why_not(self, module: str, batch: int, height: int, width: int) -> list[str]:
        return self.steps[-1].why_not(module, batch, height, width)

    def choose(self, module: str, batch: int, height: int, width: int) -> Backend:
        """The backend for one call; the reasons of those above it go to the running profile."""
        running = profile.current()
        if running is not None:
            for name, why in self.above.items():
                running.fallback("all", name, why)
        steps = self._allowed(module)
        for step in steps[:-1]:
            why = step.why_not(module, batch, height, width)
            if not why:
                return step
            if running is not None:
                running.fallback(module, step.name, why)
        return steps[-1]

    def _allowed(self, module: str) -> list[Backend]:
        """Torch runs a UNet and its ControlNets apart, engines are of both together; the receipt names what ran."""
        names = self.ran.get(module)
        if names is None and module.startswith("unet+"):
            names = self.ran.get(CONTROLNET_PREFIX + module.split("+")[1])
        return [s for s in self.steps if names is None or s.name in names] or self.steps

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        size = (x.shape[-2] * self.vae_scale_factor, x.shape[-1] * self.vae_scale_factor)
        return self.choose(unet_module(condition), len(x), *size).predict(x, t, condition)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.choose("vae_encoder", len(images), *images.shape[-2:]).encode_image(images)

    def decode_latent(self, latents: Tensor) -> Tensor:
        size = (latents.shape[-2] * self.vae_scale_factor, latents.shape[-1] * self.vae_scale_factor)
        return self.choose("vae_decoder", len(latents), *size).decode_latent(latents)

    def encode_tokens(self, ids: Tensor) -> Tensor:
        return self.choose("text_encoder", len(ids), 0, 0).encode_tokens(ids)
