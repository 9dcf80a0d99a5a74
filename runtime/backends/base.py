"""What a backend is; imports none.

A backend runs the modules of one model: the UNet alone or with its ControlNets, the VAE's encoder and decoder, and the text encoder. Why
one cannot run is a list of reasons.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..denoise_step import Condition, Transition
from ..errors import IeditError, UsageError, first_line
from ..model.module_io import ADAPTER_PREFIX, CONTROLLED_UNET


@dataclass(frozen=True)
class BackendOptions:
    """What a backend can be loaded with; each takes what concerns it.

    Attributes:
        engines: folder of exported engines; None is `engine_spec.engines_folder(model.weights_digest)`.
        trust_engines: also use engines that every user of this machine may change.
        attention: of the backends that run torch modules, "sdpa" or "xformers".
        channels_last: of the backends that run torch modules, the memory format of convolution weights.
    """

    engines: Path | None = None
    trust_engines: bool = False
    attention: str = "sdpa"
    channels_last: bool = False


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
class Differentiable(Protocol):
    """A denoiser that can say how its answer changes with the prompt's embeddings."""

    def gradient(self, x: Tensor, t: Tensor, condition: Condition, wanted: Tensor) -> Tensor:
        """(B, L * D + 1) float32: see `DenoiseStep.wanted`. Arguments as of `Denoiser.predict`."""
        ...


class Modules(Protocol):
    """What runs the VAE and the text encoder."""

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, h, w) float32: the posterior's mode, not scaled."""
        ...

    def decode_latent(self, latents: Tensor) -> Tensor:
        """(B, C, h, w), unscaled -> (B, 3, H, W) float32, about [-1, 1]."""
        ...

    def encode_tokens(self, ids: Tensor) -> Tensor:
        """(B, L) int64 -> (B, L, D) float32."""
        ...


@runtime_checkable
class Backend(Denoiser, Modules, Protocol):
    """Networks of one model; no state that a caller could see. Tensors come and go on the model's device."""

    name: str

    def why_not(self, module: str, batch: int, height: int, width: int) -> list[str]:
        """Reasons why it cannot run `module` at this shape; empty if it can.

        Args:
            module: see `engine_spec.EngineSpec`.
            height, width: pixels; of no meaning to the text encoder.
        """
        ...


def unet_module(condition: Condition) -> str:
    """The name of the module that answers for a condition: "unet", or "unet+pose+scribble", names sorted, "adapter-" before those
    of T2I-Adapters; with control of attention `CONTROLLED_UNET` in the place of "unet"."""
    unet = "unet" if condition.attention is None else CONTROLLED_UNET
    return "+".join([unet, *sorted(ADAPTER_PREFIX * c.adapter + c.name for c in condition.controls)])


class UnavailableError(UsageError):
    """A backend cannot run on this machine; `reasons` says why."""

    def __init__(self, name: str, reasons: Sequence[str]):
        super().__init__(f"backend {name!r} was requested but cannot run: {'; '.join(reasons)}")
        self.reasons = list(reasons)


def missing(*modules: str, extra: str) -> list[str]:
    """A reason for each package that is not installed. One that is may still be broken: see `import_failure`.

    The extra `gpu` has all that `onnx` has, with onnxruntime-gpu in the place of onnxruntime: both install the same files, so on a
    machine with a GPU nobody is told to put the one beside the other.
    """
    extra = "gpu" if extra == "onnx" and torch.cuda.is_available() else extra
    return [f'{m} is not installed (pip install "iedit[{extra}]")' for m in modules if not _is_installed(m)]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # imported already, by something that is no usual import
        return True


def import_failure(package: str, load: Callable[[], Any]) -> list[str]:
    """A reason if an installed package cannot be imported: a library of its own or of CUDA that is not there, another Python's
    build. Whatever it raises is a reason, as a broken package may raise anything.

    Args:
        load: imports it.
    """
    try:
        load()
    except Exception as error:
        return [f"{package} is installed but cannot be imported ({described(error)}); install it again"]
    return []


def described(error: BaseException) -> str:
    """An error in a line: one of iedit's own words, another one by its type and its first line."""
    if isinstance(error, IeditError):
        return str(error)
    line = first_line(error, 300)
    return line if line == type(error).__name__ else f"{type(error).__name__}: {line}"


def even(samples: int) -> int:
    """The largest even number up to `samples`; 1 below 2."""
    return samples - samples % 2 or 1


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of a backend's call is one that a smaller batch may get around."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def refuse(backend: Backend, module: str, batch: int, height: int, width: int) -> None:
    """Raises UsageError with the reasons where `backend` cannot run `module` at this shape."""
    why = backend.why_not(module, batch, height, width)
    if why:
        raise UsageError(f"backend {backend.name!r} cannot run {module}: {'; '.join(why)}")


def cuda_missing() -> list[str]:
    """A reason if there is no CUDA device."""
    return [] if torch.cuda.is_available() else ["no CUDA device"]
