"""This machine: how many threads to compute with, and the dtypes that its processor computes in. It imports nothing heavy.

With two OpenMP threads on two processors of which one is busy, an edit takes four times as long as with one thread: the
threads wait for each other at every operation. So there are as many threads as processors that nobody else keeps busy.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_STAT = Path("/proc/stat")
_SHORTEST = 0.3  # seconds that a measurement covers at least; a process's start takes longer anyway
# The features that oneDNN needs to compute in a dtype. Without them every product is converted to float32 and back: with AVX2
# alone a training step in bfloat16 took 20 times as long as in float32, an edit in float16 27 times.
_FEATURES = {"bfloat16": ("avx512_bf16", "amx_bf16", "bf16"), "float16": ("avx512_fp16", "amx_fp16")}


# --- threads ------------------------------------------------------------------------------------------------------


def processors() -> list[int]:
    """The numbers of the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@dataclass(frozen=True)
class ThreadChoice:
    """How many threads to compute with, and why so many."""

    threads: int
    why: str

    def __str__(self) -> str:
        return f"{self.threads} ({self.why})"


class BusyMeter:
    """Measures how busy other processes keep the processors, from when it is made to when it is asked."""

    def __init__(self) -> None:
        self._began, self._busy, self._own = time.monotonic(), _busy_seconds(), _own_seconds()

    def others(self) -> float:
        """How many of this process's processors other processes kept busy on average; from the load average where the system
        does not count by processor, which then lags by a minute."""
        if self._busy is None:
            return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        time.sleep(max(0.0, _SHORTEST - (time.monotonic() - self._began)))
        elapsed, busy = time.monotonic() - self._began, _busy_seconds()
        assert busy is not None
        return max(0.0, (busy - self._busy - (_own_seconds() - self._own)) / elapsed)


def choose_threads(meter: BusyMeter, most: int) -> ThreadChoice:
    """The number of threads to use.

    Args:
        meter: made when the process started.
        most: what the library would use on an idle machine.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        return ThreadChoice(most, "OMP_NUM_THREADS")
    count, others = len(processors()), meter.others()
    threads = max(1, min(most, count - round(others)))
    return ThreadChoice(threads, f"of {count} processor{'s' * (count != 1)} {others:.1f} are busy with other work")


def _busy_seconds() -> float | None:
    """Seconds that the processors of this process have worked since the machine started, for anybody."""
    own, ticks = {f"cpu{n}" for n in processors()}, 0
    try:
        rows = [line.split() for line in _STAT.read_text().splitlines() if line.startswith("cpu")]
        for name, user, nice, system, _idle, _wait, irq, soft, *_ in rows:
            if name in own:
                ticks += sum(map(int, (user, nice, system, irq, soft)))
                own.discard(name)
    except (OSError, ValueError):
        return None
    return None if own else ticks / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


# --- dtypes -------------------------------------------------------------------------------------------------------


def features() -> Mapping[str, Any]:
    """The processor's features by torch's names; empty for a torch before 2.10, which cannot say."""
    import torch

    ask = getattr(torch.cpu, "get_capabilities", None)
    capabilities: Mapping[str, Any] = {} if ask is None else ask()
    return capabilities


def has_arithmetic(dtype: torch.dtype | str) -> bool:
    """Whether the processor computes in `dtype` by itself; float32 is the fast choice where it does not."""
    needed = _FEATURES.get(str(dtype).removeprefix("torch."))
    return needed is None or any(features().get(name) for name in needed)


def training_dtype(device: torch.device | None = None) -> torch.dtype:
    """What training multiplies in: bfloat16 (under autocast) where the device has arithmetic for it, else float32.

    Args:
        device: None is this machine's processor.
    """
    import torch

    if device is not None and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if has_arithmetic("bfloat16") else torch.float32


def autocast(device: torch.device | None = None) -> contextlib.AbstractContextManager[Any]:
    """A block in which networks on a device compute in `training_dtype`; their weights stay float32.

    Args:
        device: None is this machine's processor.
    """
    import torch

    kind = "cpu" if device is None else device.type
    return torch.autocast(kind, torch.bfloat16, enabled=training_dtype(device) is torch.bfloat16)


def describe_processor() -> str:
    """A line for `iedit info`: the dtypes with arithmetic, and what the others would cost."""
    dtypes = ("float32", *_FEATURES)
    able, unable = [d for d in dtypes if has_arithmetic(d)], [d for d in dtypes if not has_arithmetic(d)]
    rest = f"; no arithmetic for {', '.join(unable)}, so float32 is used in their place" if unable else ""
    return f"computes in {', '.join(able)}{rest}"
