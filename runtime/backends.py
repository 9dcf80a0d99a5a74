"""What can run the networks here, and why the rest cannot. One question, answered in one place, by a list of reasons.

A backend answers for five kinds of modules: the UNet (alone, or fused with its ControlNets, whose embeddings of the layouts
belong to the call), the VAE's encoder and decoder, and the text encoder. `auto` is a `Ladder`: per module and per shape the first backend that can; why the ones above it
could not is told to the running profile, once, and from there to the result, the receipt and the command line.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from . import BACKENDS, profile
from .denoiser import Condition
from .errors import UsageError
from .models import Model, Modules
from .module_io import CONTROLNET_PREFIX


@runtime_checkable
class Backend(Modules, Protocol):
    """Networks of one model; no state that a caller could see. Tensors come and go on the model's device."""

    name: str

    def why_not(self, module: str, batch: int, height: int, width: int) -> list[str]:
        """Reasons why it cannot run `module` at this shape (pixels); empty if it can."""
        ...

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `denoiser.Denoiser`; float32."""
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
    return "+".join(["unet", *sorted(name for name, _, _ in condition.layouts)])


def unet_inputs(x: Tensor, t: Tensor, condition: Condition, hints: Mapping[str, Tensor]) -> list[Tensor]:
    """What the engine of a condition's UNet is given, in the order of `module_io.inputs`.

    Args:
        hints: layout -> (B, C0, h, w) embedding.
    """
    given = [x, t.expand(len(x)), condition.text]
    for name, _, scale in sorted(condition.layouts, key=lambda one: one[0]):
        given += [hints[name], torch.full((len(x),), scale, device=x.device)]
    return given


class Ladder:
    """The first backend of several that can run a module at a shape. The last one must be able to run everything.

    Args:
        steps: from the top.
        factor: pixels per latent cell.
        above: reasons why backends that are not among the steps cannot run at all, by name.
        ran: module -> the only backends that may run it, as a receipt has them; a module that is not there may be run by
            each of the steps.
    """

    name = "auto"

    def __init__(
        self,
        steps: Sequence[Backend],
        factor: int,
        above: dict[str, list[str]] | None = None,
        ran: Mapping[str, Sequence[str]] | None = None,
    ):
        self.steps, self.factor, self.above, self.ran = list(steps), factor, above or {}, ran or {}

    def why_not(self, module: str, batch: int, height: int, width: int) -> list[str]:
        return self.steps[-1].why_not(module, batch, height, width)

    def choose(self, module: str, batch: int, height: int, width: int) -> Backend:
        """The backend for one call; the reasons of those above it go to the running profile."""
        running = profile.current()
        if running is not None:
            for name, why in self.above.items():
                running.step_down("all", name, why)
        steps = self._allowed(module)
        for step in steps[:-1]:
            why = step.why_not(module, batch, height, width)
            if not why:
                return step
            if running is not None:
                running.step_down(module, step.name, why)
        return steps[-1]

    def _allowed(self, module: str) -> list[Backend]:
        """Torch runs a UNet and its ControlNets apart, engines are of both together; the receipt names what ran."""
        names = self.ran.get(module)
        if names is None and module.startswith("unet+"):
            names = self.ran.get(CONTROLNET_PREFIX + module.split("+")[1])
        return [s for s in self.steps if names is None or s.name in names] or self.steps

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        size = (x.shape[-2] * self.factor, x.shape[-1] * self.factor)
        return self.choose(unet_module(condition), len(x), *size).predict(x, t, condition)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.choose("vae_encoder", len(images), *images.shape[-2:]).encode_image(images)

    def decode_latent(self, latents: Tensor) -> Tensor:
        size = (latents.shape[-2] * self.factor, latents.shape[-1] * self.factor)
        return self.choose("vae_decoder", len(latents), *size).decode_latent(latents)

    def encode_tokens(self, ids: Tensor) -> Tensor:
        return self.choose("text_encoder", len(ids), 0, 0).encode_tokens(ids)


def why_unavailable(name: str) -> list[str]:
    """Reasons why backend `name` cannot run on this machine at all; empty if it can (given engines, where it needs them)."""
    if name == "torch":
        return []
    if name == "tensorrt":
        from . import backend_tensorrt

        return backend_tensorrt.why_unavailable()
    if name == "compile":
        from . import backend_compile

        return backend_compile.why_unavailable()
    if name == "onnx":
        from . import backend_onnx

        return backend_onnx.why_unavailable()
    return [f"there is no such backend; known are auto, {', '.join(BACKENDS)}"]


def check_backend(name: str) -> None:
    """Raises UsageError where `name` was asked for and cannot run on this machine; before a model is loaded for it."""
    why = [] if name == "auto" else why_unavailable(name)
    if why:
        raise UsageError(f"backend {name!r} was requested but cannot run: {'; '.join(why)}")


def missing(*modules: str, extra: str) -> list[str]:
    """A reason for each package that is not installed."""
    return [
        f'{m} is not installed (pip install "iedit[{extra}]")' for m in modules if importlib.util.find_spec(m) is None
    ]


def reasons() -> dict[str, list[str]]:
    """Every backend with its reasons, for `iedit info`."""
    return {name: why_unavailable(name) for name in BACKENDS}


def load_backend(
    name: str, model: Model, engines: Path | None = None, *, trust_engines: bool = False, **options: Any
) -> Backend:
    """A backend of a loaded model, or for "auto" the ladder.

    Args:
        engines: folder of exported engines; None is `engine_spec.engines_folder(model.weights_digest)`.
        trust_engines: also use engines that every user of this machine may change.
        options: `attention` ("sdpa" or "xformers") and `channels_last`, of the backends that run torch modules.

    Raises:
        UsageError: it was asked for by name and cannot run, or has no usable engine: never a silent step down.
    """
    from .backend_torch import TorchBackend

    check_backend(name)
    if name == "auto":
        steps: list[Backend] = []
        above: dict[str, list[str]] = {}
        step: str
        for step in BACKENDS[:-1]:
            if step == "compile":
                above[step] = ["it compiles for half a minute and more for each shape; ask for it by name"]
                continue
            why = why_unavailable(step)
            if why:
                above[step] = why
                continue
            try:
                steps.append(load_backend(step, model, engines, trust_engines=trust_engines, **options))
            except UsageError as error:
                above[step] = [str(error)]
        return Ladder([*steps, TorchBackend(model, **options)], model.factor, above)
    if name == "tensorrt":
        from .backend_tensorrt import TensorrtBackend

        return TensorrtBackend(model, engines, trust_engines=trust_engines)
    if name == "compile":
        from .backend_compile import CompileBackend

        return CompileBackend(model, **options)
    if name == "onnx":
        from .backend_onnx import OnnxBackend

        return OnnxBackend(model, engines, trust_engines=trust_engines)
    return TorchBackend(model, **options)


def load_recorded(
    model: Model,
    ran: Mapping[str, Sequence[str]],
    built: Sequence[tuple[str, str, str]],
    engines: Path | None = None,
    **options: Any,
) -> Backend:
    """What ran a model's modules when a picture was made, whatever else could run them now.

    Args:
        ran: module -> backends.
        built: (module, backend, digest) of the engines that were used.
        engines, options: as for `load_backend`.

    Raises:
        UsageError: an engine is gone, or is another one; which and where it was looked for.
    """
    names = [b for b in BACKENDS if any(b in used for used in ran.values())] or ["torch"]
    steps: list[Backend] = []
    for name in names:
        try:
            steps.append(load_backend(name, model, engines, **options))
        except UsageError as error:
            modules = ", ".join(m for m, used in sorted(ran.items()) if name in used)
            raise UsageError(
                f"the picture was made with backend {name} for {modules}, which cannot run now: {error}"
            ) from error
    engined = {s.name: s for s in steps if isinstance(s, Engined)}
    for module, name, digest in built:
        runs = engined.get(name)
        found = [] if runs is None else runs.engine_digests(module)
        if digest not in found:
            state = f"is another one now ({', '.join(found)})" if found else "is gone"
            where = "" if runs is None else f" in {runs.folder}"
            raise UsageError(f"the picture was made with the {name} engine {digest} of {module}, which {state}{where}")
    return steps[0] if len(steps) == 1 else Ladder(steps, model.factor, ran=ran)


def refuse(backend: Backend, module: str, batch: int, height: int, width: int) -> None:
    """Raises UsageError with the reasons where `backend` cannot run `module` at this shape."""
    why = backend.why_not(module, batch, height, width)
    if why:
        raise UsageError(f"backend {backend.name!r} cannot run {module}: {'; '.join(why)}")


def cuda_missing() -> list[str]:
    """A reason if there is no CUDA device."""
    return [] if torch.cuda.is_available() else ["no CUDA device"]
