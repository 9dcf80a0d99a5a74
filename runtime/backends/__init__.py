"""Which backend runs the networks, by name, and why one cannot. Each has a file of its own, which is imported when it is asked for.

`base` says what a backend is and imports none; the backends import it and not each other; `fallback` is what `auto` means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .. import BACKENDS
from ..errors import UsageError
from ..model.model import Model
from .base import Backend, BackendOptions, UnavailableError, described
from .engine import EngineBackend
from .fallback import FallbackBackend

# name -> module of this package, with `why_unavailable()` and `load(model, options)`
REGISTRY = {"tensorrt": "trt", "onnx": "ort", "compile": "compiled", "graphs": "graphs", "torch": "eager"}
# Why `auto` leaves a backend out that could run.
NOT_IN_AUTO = {"compile": "it compiles for half a minute and more for each shape; ask for it by name",
               "graphs": "two to three times faster, and it keeps the memory of every shape that it has recorded; ask for it by name"}  # fmt: skip


def _module(name: str) -> Any:
    return import_module(f".{REGISTRY[name]}", __name__)


def why_unavailable(name: str) -> list[str]:
    """Reasons why backend `name` cannot run on this machine at all; empty if it can (given engines, where it needs them). What it
    needs is imported to know that."""
    if name not in REGISTRY:
        return [f"there is no such backend; known are auto, {', '.join(BACKENDS)}"]
    reasons: list[str] = _module(name).why_unavailable()
    return reasons


def check_backend(name: str) -> None:
    """Raises UsageError where `name` was asked for and cannot run on this machine; before a model is loaded for it."""
    why = [] if name == "auto" else why_unavailable(name)
    if why:
        raise UnavailableError(name, why)


def reasons() -> dict[str, list[str]]:
    """Every backend with the reasons why it cannot run on this machine, for `iedit info`."""
    return {name: why_unavailable(name) for name in BACKENDS}


def load_backend(name: str, model: Model, engines: Path | None = None, **options: Any) -> Backend:
    """A backend of a loaded model; "auto" is a `FallbackBackend` of all that can run.

    Args:
        engines, options: see `base.BackendOptions`.

    Raises:
        UsageError: it was asked for by name and cannot run, or has no usable engine: never a silent fallback.
    """
    check_backend(name)
    if name != "auto":
        backend: Backend = _module(name).load(model, BackendOptions(engines, **options))
        return backend
    usable: list[Backend] = []
    unusable: dict[str, list[str]] = {}
    for candidate in BACKENDS:
        if candidate in NOT_IN_AUTO:
            unusable[candidate] = why_unavailable(candidate) or [NOT_IN_AUTO[candidate]]
            continue
        try:
            usable.append(_module(candidate).load(model, BackendOptions(engines, **options)))
        except UnavailableError as error:
            unusable[candidate] = error.reasons
        except Exception as error:  # of a library that is broken in whatever way: a reason, and not the end of an edit
            if candidate == BACKENDS[-1]:  # eager torch runs everywhere, so this is a mistake in its options
                raise
            unusable[candidate] = [described(error)]
    return FallbackBackend(usable, model.vae_scale_factor, unusable)


def load_recorded(
    model: Model,
    ran: Mapping[str, Sequence[str]],
    built: Sequence[tuple[str, str, str]],
    engines: Path | None = None,
    **options: Any,
) -> Backend:
    """What ran a model's modules when a picture was made, whatever else could run them now.

    Args:
        ran: module -> names of the backends that ran it.
        built: (module, backend, digest) of each engine that was used.
        engines, options: as for `load_backend`.

    Raises:
        UsageError: an engine is gone, or is another one; which and where it was looked for.
    """
    names = [b for b in BACKENDS if any(b in used for used in ran.values())] or ["torch"]
    usable: list[Backend] = []
    for name in names:
        try:
            usable.append(load_backend(name, model, engines, **options))
        except UsageError as error:
            modules = ", ".join(m for m, used in sorted(ran.items()) if name in used)
            raise UsageError(
                f"the picture was made with backend {name} for {modules}, which cannot run now: {error}"
            ) from error
    engined = {b.name: b for b in usable if isinstance(b, EngineBackend)}
    for module, name, digest in built:
        backend = engined.get(name)
        digests = [] if backend is None else backend.engine_digests(module)
        if digest not in digests:
            state = f"is another one now ({', '.join(digests)})" if digests else "is gone"
            where = "" if backend is None else f" in {backend.folder}"
            raise UsageError(f"the picture was made with the {name} engine {digest} of {module}, which {state}{where}")
    return usable[0] if len(usable) == 1 else FallbackBackend(usable, model.vae_scale_factor, ran=ran)
