"""Which implementation of an operation runs, and why not another: one question, answered by a list of reasons.

`IEDIT_KERNELS` in the environment is `auto` (default: Triton where it can run, plain torch elsewhere), `reference` (plain
torch always), `compiled` (plain torch through torch.compile) or `triton` (an error, with the reasons, where it cannot run).

`auto` does not compile: on one core an ITO step of two 4x16x16 latents takes 0.12 ms compiled and 0.43 ms plain, 1 % of an
edit, and compiling takes 3 to 9 s. For many edits, or large ones (eight 4x64x64 latents: 0.47 and 1.55 ms), ask for it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch import Tensor

VARIABLE = "IEDIT_KERNELS"
CHOICES = ("auto", "reference", "compiled", "triton")
P = ParamSpec("P")
R = TypeVar("R")


def definition(function: Callable[P, R]) -> Callable[P, R]:
    """A definition in plain torch; through torch.compile where `IEDIT_KERNELS=compiled`."""

    @functools.cache
    def compiled() -> Callable[P, R]:
        import torch

        made: Callable[P, R] = torch.compile(function)
        return made

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        chosen = compiled() if os.environ.get(VARIABLE) == "compiled" else function
        return chosen(*args, **kwargs)

    return run


def triton_installed() -> bool:
    """Whether Triton can be imported; asked once per process by Python's own module cache."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on a CPU (tests)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not_triton(*tensors: Tensor | None) -> list[str]:
    """Reasons why the Triton kernels cannot take these tensors; empty if they can."""
    reasons = []
    if not triton_installed():
        reasons.append('triton is not installed (pip install "iedit[gpu]")')
    present = [t for t in tensors if t is not None]
    if not interpreted() and any(t.device.type != "cuda" for t in present):
        reasons.append("the tensors are not on a CUDA device")
    if len({t.device for t in present}) > 1:
        reasons.append("the tensors are on several devices")
    wide = [str(t.dtype) for t in present if t.is_floating_point() and t.element_size() > 4]
    if wide:
        reasons.append(f"{wide[0]} is computed by the definition in plain torch")
    return reasons


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not interpreted()


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's CUDA device the current one: Triton launches on the current device, whatever its arguments lie on,
    and a kernel on another device reads memory that is not its own. Every launch stands inside it; on a CPU it does nothing."""
    if tensor.device.type != "cuda":
        return contextlib.nullcontext()
    import torch

    return torch.cuda.device(tensor.device)


def use_triton(operation: str, *tensors: Tensor | None) -> bool:
    """Whether `operation` runs as a Triton kernel on these tensors.

    Raises:
        RuntimeError: `IEDIT_KERNELS=triton` and it cannot, with the reasons.
        ValueError: the variable has another value.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in CHOICES:
        raise ValueError(f"{VARIABLE} is {wanted!r}, expected one of {', '.join(CHOICES)}")
    if wanted in ("reference", "compiled") or (wanted == "auto" and tensors[0] is not None and _on_cpu(tensors[0])):
        return False
    reasons = why_not_triton(*tensors)
    if wanted == "triton" and reasons:
        raise RuntimeError(f"{operation}: {VARIABLE}=triton, but Triton cannot run: {'; '.join(reasons)}")
    return not reasons
