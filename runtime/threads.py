"""How many threads to compute with: as many as there are processors that nobody else keeps busy.

With two OpenMP threads on two processors of which one is busy, an edit takes four times as long as with one thread: the
threads wait for each other at every operation. It imports nothing heavy.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_STAT = Path("/proc/stat")
_SHORTEST = 0.3  # seconds that a measurement covers at least; a process's start takes longer anyway


def processors() -> list[int]:
    """The numbers of the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@dataclass(frozen=True)
class Choice:
    """So many threads, and why."""

    threads: int
    why: str

    def __str__(self) -> str:
        return f"{self.threads} ({self.why})"


class Busy:
    """Measures what other processes do, from when it is made to when it is asked."""

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


def choose(busy: Busy, most: int) -> Choice:
    """The number of threads to use.

    Args:
        busy: made when the process started.
        most: what the library would use on an idle machine.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        return Choice(most, "OMP_NUM_THREADS")
    have, others = len(processors()), busy.others()
    threads = max(1, min(most, have - round(others)))
    return Choice(threads, f"of {have} processor{'s' * (have != 1)} {others:.1f} are busy with other work")


def _busy_seconds() -> float | None:
    """Seconds that the processors of this process have worked since the machine started, for anybody."""
    wanted, ticks = {f"cpu{n}" for n in processors()}, 0
    try:
        rows = [line.split() for line in _STAT.read_text().splitlines() if line.startswith("cpu")]
        for name, user, nice, system, _idle, _wait, irq, soft, *_ in rows:
            if name in wanted:
                ticks += sum(map(int, (user, nice, system, irq, soft)))
                wanted.discard(name)
    except (OSError, ValueError):
        return None
    return None if wanted else ticks / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
