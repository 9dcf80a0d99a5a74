"""Which implementation of an operation runs, and why not another: one question, answered by a list of reasons.

`IEDIT_KERNELS` in the environment is `auto` (default: Triton where it can run, plain torch elsewhere), `reference` (plain
torch always) or `triton` (an error, with the reasons, where it cannot run). Every operation `x` has its definition in plain
torch beside it, `x_reference`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os

import torch
from torch import Tensor

VARIABLE = "IEDIT_KERNELS"
CHOICES = ("auto", "reference", "triton")


@functools.cache
def triton_missing() -> tuple[str, ...]:
    """A reason if Triton cannot be imported, found out once for a process: it may be there and broken, and then raise anything."""
    if importlib.util.find_spec("triton") is None:
        return ('triton is not installed (pip install "iedit[gpu]")',)
    try:
        importlib.import_module("triton.language")
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        return (f"triton is installed but cannot be imported ({type(error).__name__}: {reason}); install it again",)
    return ()


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on a CPU (tests)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not_triton(*tensors: Tensor | None) -> list[str]:
    """Reasons why the Triton kernels cannot take these tensors; empty if they can."""
    reasons = list(triton_missing())
    present = [t for t in tensors if t is not None]
    if not interpreted() and any(t.device.type != "cuda" for t in present):
        reasons.append("the tensors are not on a CUDA device")
    if len({t.device for t in present}) > 1:
        reasons.append("the tensors are on several devices")
    wide = [str(t.dtype) for t in present if t.is_floating_point() and t.element_size() > 4]
    if wide:
        reasons.append(f"{wide[0]} is computed by the reference in plain torch")
    return reasons


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's CUDA device the current one. Every launch stands inside it; on a CPU it does nothing.

    Triton launches on the current device, whatever its arguments lie on, and a kernel on another device reads memory that is not its own.
    """
    if tensor.device.type != "cuda":
        return contextlib.nullcontext()
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
    on_cpu = tensors[0] is not None and tensors[0].device.type == "cpu" and not interpreted()
    if wanted == "reference" or (wanted == "auto" and on_cpu):
        return False
    reasons = why_not_triton(*tensors)
    if wanted == "triton" and reasons:
        raise RuntimeError(f"{operation}: {VARIABLE}=triton, but Triton cannot run: {'; '.join(reasons)}")
    return not reasons
