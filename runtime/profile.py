"""What a run cost: seconds, network evaluations and calls per stage, step and module; and the live progress that comes with it.

The running profile is a context variable, so a backend can say what it ran, and why not something faster, without being
handed anything: `profile.current()` and `profile.module_call(...)`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import Cancelled

_CURRENT: ContextVar[Profile | None] = ContextVar("iedit_profile", default=None)


def current() -> Profile | None:
    """The profile of the stage that is running in this thread, if any."""
    return _CURRENT.get()


@contextmanager
def module_call(
    module: str, backend: str, batch: int, *, cold: bool = False, device: Any = None, engine: str = ""
) -> Iterator[None]:
    """Record one call of a module in the running profile; nothing where none is running.

    Args:
        cold: this call compiles, builds or warms up; such calls are counted apart.
        device: where it runs; on CUDA the time is that of the device, by events, without waiting for it.
        engine: digest of the engine that ran it (`engine_spec.EngineSpec.digest`), if one did.
    """
    running = _CURRENT.get()
    if running is None:
        yield
        return
    events = None
    if device is not None and device.type == "cuda":
        import torch

        events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        events[0].record()
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    if events is not None:
        events[1].record()
    start, where = began - running.began, (running.label, running.step_number)
    running.modules.append(ModuleCall(*where, module, backend, batch, start, seconds, cold, events, engine))


@dataclass(frozen=True)
class Progress:
    """One step of a run, as a callback sees it.

    Attributes:
        stage: encode, mask, invert, guidance, invert-guidance, refine, final, decode or sample.
        step, steps: 1-based step of the stage and how many it has; 0 when the stage begins.
        fraction: share of the run's network evaluations that is done, [0, 1].
        seconds_left: estimate of the time left, None before there is one; before the first evaluation that of the stage.
    """

    stage: str
    step: int
    steps: int
    fraction: float
    seconds_left: float | None


Callback = Callable[[Progress], bool | None]


@dataclass
class ModuleCall:
    """One call of one module.

    Attributes:
        stage, step: where in the run; step 0 is outside the stage's steps.
        module, backend: what ran and who ran it.
        batch: samples in the call.
        start: seconds from the beginning of the profile, on the host.
        host: seconds that the host spent in the call; on a GPU that is the launching only.
        cold: the call compiled, built or warmed up.
        events: on a GPU the events around the call, by which the device's time is known.
        engine: digest of the engine that ran it, "" where none did.
    """

    stage: str
    step: int
    module: str
    backend: str
    batch: int
    start: float
    host: float
    cold: bool
    events: Any = field(default=None, repr=False)
    engine: str = ""

    def __getstate__(self) -> dict[str, Any]:
        """For pickling: with the device's time in place of its events, which are of this process."""
        return self.__dict__ | {"host": self.seconds, "events": None}

    @property
    def seconds(self) -> float:
        """What the call took: on the device where there were events, else on the host."""
        if self.events is None:
            return self.host
        self.events[1].synchronize()
        return float(self.events[0].elapsed_time(self.events[1])) / 1e3


@dataclass
class Step:
    """One step of a stage on the host's clock, seconds from the beginning of the profile; step 0 is before the first."""

    stage: str
    step: int
    start: float
    seconds: float


@dataclass
class Profile:
    """Figures of one run (of one batch of requests, which share it).

    Attributes:
        evaluations: stage -> network evaluations, in samples (guidance counts twice).
        calls: stage -> network calls; one that stages share counts for the last of them.
        seconds: stage -> wall-clock seconds; a stage answered from the cache is there with what the look-up took.
        cached: stages answered from the cache for every request of the batch.
        notes: what a user should know: smaller batches, unusual masks.
        modules: every call of a module, in order.
        steps: every step of every stage, in order; what a step spends outside its modules is this program's own.
        peak_bytes: most memory held: by this process on a CPU, by torch on a GPU.
        fallbacks: (module, backend) -> reasons why that backend did not run it.
        unverified: engines that ran and were never compared with eager torch -> the command that does.
    """

    evaluations: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    cached: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    modules: list[ModuleCall] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    peak_bytes: int = 0
    fallbacks: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    unverified: dict[str, str] = field(default_factory=dict)
    expected: int = 0  # evaluations of the whole run, for the progress: all batches, less what the cache answered
    before: int = 0  # evaluations of the batches before this one
    callback: Callback | None = field(default=None, repr=False)
    stage_name: str = field(default="", repr=False)
    label: str = field(default="", repr=False)  # the stages that run together
    step_number: int = field(default=0, repr=False)
    began: float = field(default_factory=time.perf_counter, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """For pickling: without the callback, which is the caller's own."""
        return self.__dict__ | {"callback": None}

    @property
    def where(self) -> str:
        """The running stage and step, for messages."""
        return f"stage {self.stage_name}, step {self.step_number}" if self.step_number else f"stage {self.stage_name}"

    @contextmanager
    def stage(self, *names: str) -> Iterator[None]:
        """Times a stage, or several that run together: their seconds are split by the samples that each evaluated.

        Stages do not nest. The last name is what progress and messages say.
        """
        self.label = " + ".join(names)
        for name in names:
            self._mark(name, 0)
            self.evaluations.setdefault(name, 0)
            self.calls.setdefault(name, 0)
            self._report(0, 0)
        counted = dict(self.evaluations)
        before, began = _CURRENT.set(self), time.perf_counter()
        try:
            yield
        finally:
            _CURRENT.reset(before)
            self._close()
            self.peak_bytes = max(self.peak_bytes, peak_memory())
            spent = time.perf_counter() - began
            samples = [self.evaluations[n] - counted[n] for n in names]
            for name, own in zip(names, samples):
                share = own / sum(samples) if sum(samples) else 1 / len(names)
                self.seconds[name] = self.seconds.get(name, 0.0) + spent * share

    def step(self, step: int, steps: int) -> None:
        """A step of the running stage begins.

        Raises:
            Cancelled: the callback returned False.
        """
        if step == self.step_number:  # stages that run together take their steps together
            return
        self._mark(self.stage_name, step)
        self._report(step, steps)

    def _mark(self, stage: str, step: int) -> None:
        """A step begins, and the one before it ends."""
        self._close()
        self.stage_name, self.step_number = stage, step
        self.steps.append(Step(self.label, step, time.perf_counter() - self.began, -1.0))

    def _close(self) -> None:
        """The step that is running ends now."""
        if self.steps and self.steps[-1].seconds < 0:
            self.steps[-1].seconds = time.perf_counter() - self.began - self.steps[-1].start

    def _report(self, step: int, steps: int) -> None:
        """Hands the progress to the callback, if there is one; raises Cancelled where that answers False."""
        if self.callback is None:
            return
        done = min(1.0, (self.before + sum(self.evaluations.values())) / self.expected) if self.expected > 0 else 0.0
        spent = time.perf_counter() - self.began
        left = spent * (1 - done) / done if done > 0 else None
        if left is None and step > 1:  # before the first evaluation: of this stage alone
            stage = next(x.start for x in reversed(self.steps) if x.step == 0)
            left = (spent - stage) / (step - 1) * (steps - step + 1)
        answer = self.callback(Progress(self.stage_name, step, steps, done, left))
        if isinstance(answer, (bool, np.bool_)) and not answer:
            raise Cancelled(f"cancelled in {self.where}; nothing was written")

    def count(self, samples: Mapping[str, int]) -> None:
        """One network call with so many samples of each stage; it counts as a call of the last of them."""
        for stage, number in samples.items():
            self.evaluations[stage] = self.evaluations.get(stage, 0) + number
        last = list(samples)[-1]
        self.calls[last] = self.calls.get(last, 0) + 1

    def note(self, text: str) -> None:
        """Something that the user should know of this run, once."""
        if text not in self.notes:
            self.notes.append(text)

    def fallback(self, module: str, backend: str, why: Sequence[str]) -> None:
        """`backend` did not run `module`, for these reasons; what was said of them before is not said again."""
        told = self.fallbacks.setdefault((module, backend), [])
        told.extend(reason for reason in why if reason not in told)

    def by_module(self) -> list[dict[str, Any]]:
        """A row for every module and backend: calls, samples, seconds, cold calls and their seconds."""
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        empty = {"calls": 0, "samples": 0, "seconds": 0.0, "cold_calls": 0, "cold_seconds": 0.0}
        for call in self.modules:
            new = {"module": call.module, "backend": call.backend} | empty
            row = rows.setdefault((call.module, call.backend), new)
            row["calls"] += 1
            row["samples"] += call.batch
            row["seconds"] += call.seconds
            row["cold_calls"] += call.cold
            row["cold_seconds"] += call.seconds if call.cold else 0.0
        return [{k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in rows.values()]

    def outside_modules(self) -> float:
        """Seconds of the run in no module: the loops, the kernels beside the networks, pictures in and out. Where a step is
        recorded as one (`compile` on CUDA) its kernels are in the module."""
        return max(0.0, sum(self.seconds.values()) - sum(c.seconds for c in self.modules))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "evaluations": dict(self.evaluations),
            "calls": dict(self.calls),
            "seconds": {k: round(v, 6) for k, v in self.seconds.items()},
            "cached": list(self.cached),
            "notes": list(self.notes),
            "modules": self.by_module(),
            "steps": [
                {"stage": x.stage, "step": x.step, "start": round(x.start, 6), "seconds": round(x.seconds, 6)}
                for x in self.steps
            ],
            "module_calls": [
                {"stage": c.stage, "step": c.step, "module": c.module, "backend": c.backend, "batch": c.batch}
                | {"start": round(c.start, 6), "seconds": round(c.seconds, 6), "cold": c.cold}
                for c in self.modules
            ],
            "outside_modules": round(self.outside_modules(), 6),
            "peak_mib": round(self.peak_bytes / 2**20),
            "fallbacks": self.fallback_reasons(),
            "unverified": list(self.unverified),
            "total_seconds": round(sum(self.seconds.values()), 6),
        }

    def ran(self) -> dict[str, list[str]]:
        """Module -> the backends that ran it, sorted."""
        backends: dict[str, set[str]] = {}
        for call in self.modules:
            backends.setdefault(call.module, set()).add(call.backend)
        return {module: sorted(names) for module, names in backends.items()}

    def engines(self) -> list[dict[str, str]]:
        """JSON-ready: module, backend and digest of every engine that ran."""
        used = sorted({(c.module, c.backend, c.engine) for c in self.modules if c.engine})
        return [{"module": m, "backend": b, "digest": d} for m, b, d in used]

    def fallback_reasons(self) -> list[dict[str, Any]]:
        """JSON-ready: what did not run which module, and why."""
        return [{"module": m, "backend": b, "reasons": why} for (m, b), why in self.fallbacks.items()]


def peak_memory() -> int:
    """Bytes: torch's peak on the GPU where one is in use, else the process's peak."""
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
