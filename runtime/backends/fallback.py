"""`auto`: per module and per shape the first backend that can run it, and the next one where that fails.

Why the backends before it could not goes to the running profile, once, and from there to the result, the receipt and the command line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from .. import profile
from ..denoise_step import Condition
from ..errors import Cancelled, RunError, UsageError
from ..model.module_io import CONTROLNET_PREFIX
from .base import Backend, Differentiable, described, out_of_memory, unet_module


class FallbackBackend:
    """The first backend of several that can run a module at a shape. The last one must be able to run everything.

    A backend that can and then fails (its engine cannot be loaded, a provider is not there, the device refuses, its answer is not finite) steps
    down too: the next one answers that call, and the module is not given to it again. Where memory runs out the caller makes smaller
    batches first; only one sample that does not fit is a failure.

    Args:
        usable: best first.
        vae_scale_factor: pixels per latent cell.
        unusable: reasons why other backends cannot run at all, by name.
        ran: module -> the only backends that may run it, as a receipt has them; a module that is not there may be run by any.
    """

    name = "auto"

    def __init__(
        self,
        usable: Sequence[Backend],
        vae_scale_factor: int,
        unusable: Mapping[str, Sequence[str]] | None = None,
        ran: Mapping[str, Sequence[str]] | None = None,
    ):
        self.usable, self.vae_scale_factor = list(usable), vae_scale_factor
        self.unusable, self.ran = unusable or {}, ran or {}
        self.failed: dict[tuple[str, str], list[str]] = {}  # (module, backend) -> how it failed

    def why_not(self, module: str, batch: int, height: int, width: int) -> list[str]:
        """See `base.Backend`."""
        return self.usable[-1].why_not(module, batch, height, width)

    def _run(self, module: str, batch: int, height: int, width: int, call: Callable[[Backend], Tensor]) -> Tensor:
        """`call` on the first backend that can take it; why those before it did not goes to the running profile."""
        running = profile.current()
        if running is not None:
            for name, why in self.unusable.items():
                running.fallback("all", name, why)
        allowed = self._allowed(module)
        for backend in allowed[:-1]:
            reasons = self.failed.get((module, backend.name), [])
            try:
                reasons = reasons or backend.why_not(module, batch, height, width)
                if not reasons:
                    output = call(backend)
                    # On a GPU to look is to wait for the call, which leaves it idle for the tens of microseconds until the next one is
                    # launched; an engine's call takes milliseconds.
                    if math.isfinite(output.sum().item()):
                        return output
                    raise RunError("its answer holds NaN or infinity")
            except Cancelled:
                raise
            except UsageError as error:  # refused at a closer look: of this call only
                reasons = [str(error)]
            except Exception as error:
                if batch > 1 and out_of_memory(error):
                    raise
                reasons = self.failed[module, backend.name] = [f"it failed: {described(error)}"]
            if running is not None:
                running.fallback(module, backend.name, reasons)
        return call(allowed[-1])

    def _allowed(self, module: str) -> list[Backend]:
        """The backends that may run a module. Torch runs a UNet and its ControlNets one after the other and engines are of both
        together, so a receipt may name the ControlNet alone."""
        names = self.ran.get(module)
        if names is None and module.startswith("unet+"):
            names = self.ran.get(CONTROLNET_PREFIX + module.split("+")[1])
        return [b for b in self.usable if names is None or b.name in names] or self.usable

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `base.Denoiser`."""
        size = (x.shape[-2] * self.vae_scale_factor, x.shape[-1] * self.vae_scale_factor)
        return self._run(unet_module(condition), len(x), *size, lambda b: b.predict(x, t, condition))

    def gradient(self, x: Tensor, t: Tensor, condition: Condition, wanted: Tensor) -> Tensor:
        """See `base.Differentiable`: of the last backend, which can run everything."""
        last = self.usable[-1]
        assert isinstance(last, Differentiable)
        return last.gradient(x, t, condition, wanted)

    def encode_image(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        return self._run("vae_encoder", len(images), height, width, lambda b: b.encode_image(images))

    def decode_latent(self, latents: Tensor) -> Tensor:
        size = (latents.shape[-2] * self.vae_scale_factor, latents.shape[-1] * self.vae_scale_factor)
        return self._run("vae_decoder", len(latents), *size, lambda b: b.decode_latent(latents))

    def encode_tokens(self, ids: Tensor) -> Tensor:
        return self._run("text_encoder", len(ids), 0, 0, lambda b: b.encode_tokens(ids))
