"""What a backend is, and what its modules take; imports no backend.

A backend answers for five kinds of modules: the UNet (alone, or fused with its ControlNets, whose control embeddings belong to the call),
the VAE's encoder and decoder, and the text encoder. Why one cannot run is a list of reasons.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..denoise_step import Condition, Transition
from ..errors import UsageError
from ..model.model import Modules


class Denoiser(Protocol):
    """A network that predicts; no state between calls. One that is also a `Stepper` is asked for whole steps first."""

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """(B, C, h, w) latents, (B,) int64 timesteps -> (B, C, h, w) float32 in the checkpoint's prediction type."""
        ...


@runtime_checkable
class Stepper(Protocol):
    """A denoiser that can run a call of the network and all that follows it in the step as one."""

    def step(
        self, t: Sequence[Tensor], condition: Condition, transitions: Sequence[Transition]
    ) -> list[tuple[Tensor, Tensor]] | None:
        """For each transition the sum of the network's output for it, a scalar, and the latent that it leads to; None if this
        is not to be run as one.

        Args:
            t: the timesteps of each transition's samples, (B,) or (2B,) if it is guided.
            condition: of all samples, in the order of the transitions.
        """
        ...


@runtime_checkable
class Backend(Modules, Protocol):
    """Networks of one model; no state that a caller could see. Tensors come and go on the model's device."""

    name: str

    def why_not(self, module: str, batch: int, height: int, width: int) -> list[str]:
        """Reasons why it cannot run `module` at this shape (pixels); empty if it can."""
        ...

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `base.Denoiser`; float32."""
        ...


@runtime_checkable
class Engined(Protocol):
    """A backend that runs engines out of a folder."""

    name: str
    folder: Path

    def engine_digests(self, module: str) -> list[str]:
        """`EngineSpec.digest` of everything that could run `module`; empty if nothing does."""
        ...


def unet_module(condition: Condition) -> str:
    """The name of the module that answers for a condition: "unet", or "unet+pose+scribble", names sorted."""
    return "+".join(["unet", *sorted(c.name for c in condition.controls)])


def unet_inputs(x: Tensor, t: Tensor, condition: Condition, hints: Mapping[str, Tensor]) -> list[Tensor]:
    """What the engine of a condition's UNet is given, in the order of `module_io.inputs`.

    Args:
        hints: layout -> (B, C0, h, w) embedding.
    """
    given = [x, t.expand(len(x)), condition.prompt_embeds]
    for control in sorted(condition.controls, key=lambda c: c.name):
        given += [hints[control.name], torch.full((len(x),), control.scale, device=x.device)]
    return given


def missing(*modules: str, extra: str) -> list[str]:
    """A reason for each package that is not installed."""
    return [
        f'{m} is not installed (pip install "iedit[{extra}]")' for m in modules if importlib.util.find_spec(m) is None
    ]


def refuse(backend: Backend, module: str, batch: int, height: int, width: int) -> None:
    """Raises UsageError with the reasons where `backend` cannot run `module` at this shape."""
    why = backend.why_not(module, batch, height, width)
    if why:
        raise UsageError(f"backend {backend.name!r} cannot run {module}: {'; '.join(why)}")


def cuda_missing() -> list[str]:
    """A reason if there is no CUDA device."""
    return [] if torch.cuda.is_available() else ["no CUDA device"]
