"""What this machine's processor is good at: the dtypes it computes in by itself, and how many threads to compute with."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

# The features that oneDNN needs to compute in a dtype. Without them every product is converted to float32 and back: with AVX2
# alone a training step in bfloat16 took 20 times as long as in float32, an edit in float16 27 times.
_FEATURES = {torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}


def features() -> Mapping[str, Any]:
    """The processor's features by torch's names; empty for a torch before 2.10, which cannot say."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    found: Mapping[str, Any] = {} if ask is None else ask()
    return found


def has_arithmetic(dtype: torch.dtype) -> bool:
    """Whether the processor computes in `dtype` by itself; float32 is the fast choice where it does not."""
    if dtype not in _FEATURES:
        return True
    known = features()
    return any(known.get(name) for name in _FEATURES[dtype])


def training_dtype() -> torch.dtype:
    """What training multiplies in on this processor: bfloat16 (under autocast) where it has arithmetic for it, else float32."""
    return torch.bfloat16 if has_arithmetic(torch.bfloat16) else torch.float32


def autocast() -> contextlib.AbstractContextManager[Any]:
    """A block in which networks on the CPU compute in `training_dtype`; their weights stay float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=training_dtype() is torch.bfloat16)


def describe() -> str:
    """A line for `iedit info`: the dtypes with arithmetic, and what the others would cost."""
    named = {d: str(d).removeprefix("torch.") for d in (torch.float32, *_FEATURES)}
    able = [name for d, name in named.items() if has_arithmetic(d)]
    unable = [name for d, name in named.items() if not has_arithmetic(d)]
    rest = f"; no arithmetic for {', '.join(unable)}, so float32 is used in their place" if unable else ""
    return f"computes in {', '.join(able)}{rest}"
