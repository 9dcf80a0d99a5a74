"""What a run cost: seconds, network evaluations and calls per stage; and the live progress that comes with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .errors import Cancelled


@dataclass(frozen=True)
class Progress:
    """One step of a run, as a callback sees it.

    Attributes:
        stage: encode, mask, invert, guidance, invert-guidance, refine, final, decode or sample.
        step, steps: 1-based step of the stage and how many it has; 0 when the stage begins.
        fraction: share of the run's network evaluations that is done, [0, 1].
        seconds_left: estimate of the time left, None before there is one.
    """

    stage: str
    step: int
    steps: int
    fraction: float
    seconds_left: float | None


Callback = Callable[[Progress], bool | None]


@dataclass
class Profile:
    """Figures of one run (of one batch of requests, which share it).

    Attributes:
        evaluations: stage -> network evaluations, in samples (guidance counts twice).
        calls: stage -> network calls.
        seconds: stage -> wall-clock seconds; a stage answered from the cache is there with what the look-up took.
        cached: stages answered from the cache for every request of the batch.
        notes: what a user should know: smaller batches, steps down, unusual masks.
    """

    evaluations: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    cached: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    expected: int = 0  # evaluations of the whole run, for the progress: all batches, less what the cache answered
    before: int = 0  # evaluations of the batches before this one
    callback: Callback | None = field(default=None, repr=False)
    _stage: str = field(default="", repr=False)
    _step: int = field(default=0, repr=False)
    _began: float = field(default_factory=time.perf_counter, repr=False)

    @property
    def where(self) -> str:
        """The running stage and step, for messages."""
        return f"stage {self._stage}, step {self._step}" if self._step else f"stage {self._stage}"

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage. Stages do not nest."""
        self._stage, self._step = name, 0
        self.evaluations.setdefault(name, 0)
        self.calls.setdefault(name, 0)
        began = time.perf_counter()
        self._tell(0, 0)
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def step(self, step: int, steps: int) -> None:
        """A step of the running stage begins.

        Raises:
            Cancelled: the callback returned False.
        """
        self._step = step
        self._tell(step, steps)

    def _tell(self, step: int, steps: int) -> None:
        if self.callback is None:
            return
        done = min(1.0, (self.before + sum(self.evaluations.values())) / self.expected) if self.expected > 0 else 0.0
        spent = time.perf_counter() - self._began
        left = spent * (1 - done) / done if done > 0 else None
        if self.callback(Progress(self._stage, step, steps, done, left)) is False:
            raise Cancelled(f"cancelled in {self.where}; nothing was written")

    def count(self, samples: int) -> None:
        """One network call of `samples` samples in the running stage."""
        self.evaluations[self._stage] = self.evaluations.get(self._stage, 0) + samples
        self.calls[self._stage] = self.calls.get(self._stage, 0) + 1

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "evaluations": dict(self.evaluations),
            "calls": dict(self.calls),
            "seconds": {k: round(v, 6) for k, v in self.seconds.items()},
            "cached": list(self.cached),
            "notes": list(self.notes),
            "total_seconds": round(sum(self.seconds.values()), 6),
        }
