"""The Denoiser protocol and the one place that calls it: guidance batching, memory bound, counting, NaN and cancel checks.

A backend is anything with `predict(x, t, condition)`; the loops in `ito.py` and `mask.py` ask `Network`, which
wraps one, and do not know which backend answers.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from .errors import RunError
from .profile import Profile
from .schedule import Levels, add_noise, ddim_coefficients
from .steps import Move, Update

T = TypeVar("T")


@dataclass(frozen=True)
class Condition:
    """What the network is told, per sample.

    Attributes:
        text: (B, L, D) text encoder states.
        layouts: ControlNet name -> ((B, 3, H, W) map in [0, 1], scale). Residuals are summed with their scales.
    """

    text: Tensor
    layouts: tuple[tuple[str, Tensor, float], ...] = ()

    def __len__(self) -> int:
        return self.text.shape[0]

    @property
    def kind(self) -> tuple[Any, ...]:
        """Conditions of one kind can share a call: text length, and names, scales and sizes of the layouts."""
        return (self.text.shape[1:], *((name, scale, maps.shape[1:]) for name, maps, scale in self.layouts))

    def take(self, index: Tensor | slice) -> Condition:
        """The samples of `index`."""
        return Condition(self.text[index], tuple((name, maps[index], scale) for name, maps, scale in self.layouts))

    def repeat(self, times: int, block: int = 1) -> Condition:
        """Each block of `block` samples `times` times in a row."""
        return Condition(
            repeat(self.text, times, block),
            tuple((name, repeat(maps, times, block), scale) for name, maps, scale in self.layouts),
        )

    def with_text(self, text: Tensor) -> Condition:
        """The same layouts under another text; `text` may be (1, L, D)."""
        return replace(self, text=text.expand(len(self), -1, -1) if text.shape[0] == 1 else text)

    @staticmethod
    def interleave(a: Condition, b: Condition) -> Condition:
        """(2B, ...): the samples of the two in turn; both must have the same layouts, text length and number."""
        both, index = Condition.cat([a, b]), torch.arange(2 * len(a)).view(2, len(a)).T.flatten()
        return both.take(index.to(both.text.device))

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """One batch of several; all must have the same layouts and text length."""
        first = conditions[0]
        names = [(name, scale) for name, _, scale in first.layouts]
        if any([(name, scale) for name, _, scale in c.layouts] != names for c in conditions):
            raise ValueError("Condition.cat: the conditions have different layouts")
        return Condition(
            torch.cat([c.text for c in conditions]),
            tuple((n, torch.cat([c.layouts[i][1] for c in conditions]), s) for i, (n, s) in enumerate(names)),
        )


def repeat(values: Tensor, times: int, block: int = 1) -> Tensor:
    """Each block of `block` samples of dimension 0 `times` times in a row. Copies of a text's size stay in this thread: to wake
    torch's others, while those of ONNX Runtime wait for their next call, takes 8 ms."""
    blocks = values.unflatten(0, (-1, block))
    out = values.new_empty((len(blocks), times, *blocks.shape[1:]))
    for i in range(times):
        out[:, i] = blocks
    return out.flatten(0, 2)


class OncePerCondition(Generic[T]):
    """What a backend makes of a condition: made once for each object, as a loop asks with the same one at every step.

    Threads may share it; two that come with a new condition at the same time both make it.

    Args:
        held: conditions whose results are kept, the last used ones.
    """

    def __init__(self, make: Callable[[Condition], T], held: int = 4):
        self._make, self.held = make, held
        # With the condition, so that an id is not another object's by then.
        self._made: OrderedDict[int, tuple[Condition, T]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, condition: Condition) -> T:
        with self._lock:
            found = self._made.get(id(condition))
            if found is not None:
                self._made.move_to_end(id(condition))
                return found[1]
        made = self._make(condition)
        with self._lock:
            self._made[id(condition)] = (condition, made)
            while len(self._made) > self.held:
                self._made.popitem(last=False)
        return made


class Denoiser(Protocol):
    """A network that predicts; no state between calls. One that also has `Stepper.step` is asked for that first."""

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """(B, C, h, w) latents, (B,) int64 timesteps -> (B, C, h, w) float32 in the checkpoint's prediction type."""
        ...


Moved = tuple[Tensor, Tensor]


@runtime_checkable
class Stepper(Protocol):
    """A denoiser that can run a call of the network and all that follows it in the step as one."""

    def step(self, t: Sequence[Tensor], condition: Condition, moves: Sequence[Move]) -> list[Moved] | None:
        """For each move the sum of the network's output for it, a scalar, and the latent that it leads to; None if this is
        not to be run as one.

        Args:
            t: the timesteps of each move's samples, (B,) or (2B,) if it is guided.
            condition: of all samples, in the order of the moves.
        """
        ...


class Reference(Protocol):
    """The source latent at every level: what a preservation loss or a blend compares with."""

    def __call__(self, i: int) -> Tensor:
        """(B, C, h, w) at level i."""
        ...

    def parts(self, i: int) -> dict[str, Tensor]:
        """The same as the `reference`, `noise` and `reference_abar` of `kernels.guided_step`."""
        ...


@dataclass(frozen=True)
class NoisedReference:
    """The clean latent under one fixed noise; itself at the last level (METHOD section 2 row 10, section 3 rows 1-2)."""

    x0: Tensor
    noise: Tensor
    levels: Levels

    def __call__(self, i: int) -> Tensor:
        return self.x0 if i == self.levels.steps else add_noise(self.x0, self.noise, self.levels.abar[i])

    def parts(self, i: int) -> dict[str, Tensor]:
        if i == self.levels.steps:
            return {"reference": self.x0}
        abar = torch.full((len(self.x0),), self.levels.abar[i], dtype=self.x0.dtype, device=self.x0.device)
        return {"reference": self.x0, "noise": self.noise, "reference_abar": abar}


@dataclass(frozen=True)
class TrajectoryReference:
    """The latents of an inversion, (N - start + 1, B, C, h, w)."""

    trajectory: Tensor
    levels: Levels

    def __call__(self, i: int) -> Tensor:
        return self.trajectory[i - (self.levels.steps + 1 - len(self.trajectory))]

    def parts(self, i: int) -> dict[str, Tensor]:
        return {"reference": self(i)}


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _even(samples: int) -> int:
    """The largest even number up to `samples`; 1 below 2."""
    return samples - samples % 2 or 1


@dataclass(frozen=True)
class Ask:
    """What a loop needs of the network next.

    Attributes:
        x: (B, C, h, w) latents.
        t: (times * B,) timesteps.
        condition: of the times * B samples.
        times: how often the network answers for `x`: twice for the halves of a guidance.
        move: what becomes of the answer; the loop is sent what it leads to, or without one the answer itself.
    """

    x: Tensor
    t: Tensor
    condition: Condition
    times: int = 1
    move: Move | None = None


# A denoising loop asks and is sent the answer, so that loops that do not depend on each other can share calls.
Loop = Generator[Ask, Tensor, T]


class Network:
    """A Denoiser for the length of one run.

    Args:
        denoiser: the backend.
        prediction: what it predicts (see `schedule`).
        max_batch: samples per call at most; halved, down to 1, when a call runs out of memory.
        profile: counts evaluations and calls, and passes progress on.
    """

    def __init__(self, denoiser: Denoiser, prediction: str, max_batch: int, profile: Profile):
        self.denoiser, self.prediction, self.max_batch, self.profile = denoiser, prediction, max_batch, profile
        self._whole_step = denoiser.step if isinstance(denoiser, Stepper) else None
        # Conditions put together or cut before, with what they were made of: a loop asks with the same ones at every step,
        # and a backend that keeps what it computed of a text or a layout knows it again by the tensor.
        self._made: dict[tuple[Any, ...], tuple[Any, Condition]] = {}
        # Timesteps and coefficients as tensors, two for each level and batch.
        self._constants: dict[tuple[Any, ...], Any] = {}

    def drive(self, loop: Loop[T]) -> T:
        """Run one loop in the running stage."""
        result: T = self.drive_together({self.profile.stage_name: loop})[self.profile.stage_name]
        return result

    def drive_together(self, loops: Mapping[str, Loop[Any]]) -> dict[str, Any]:
        """Run loops in lock-step by the names of their stages; what can go into one call of the network does.

        Asks share a call where their conditions have the same layouts and text length; each sample has its own timestep.
        The inversion of the input and the guidance image take 25 calls in place of 50 (METHOD section 2, cost).
        """
        asks: dict[str, Ask] = {}
        results: dict[str, Any] = {}
        sums: list[tuple[str, Tensor]] = []

        def advance(name: str, output: Tensor | None) -> None:
            try:
                asks[name] = next(loops[name]) if output is None else loops[name].send(output)
            except StopIteration as stop:
                asks.pop(name, None)
                results[name] = stop.value

        for name in loops:
            advance(name, None)
        while asks:
            groups: dict[Any, list[str]] = {}
            for name, ask in asks.items():
                groups.setdefault((ask.condition.kind, ask.x.shape[1:]), []).append(name)
            answers: dict[str, Tensor] = {}
            for names in groups.values():
                for name, (total, answer) in zip(names, self._answer([(n, asks[n]) for n in names]), strict=True):
                    sums.append((f"stage {name}, step {self.profile.step_number}", total))
                    if not total.is_cuda:  # to look is to wait for a GPU, so there it is done once, at the end
                        self._check(sums)
                    answers[name] = answer
            # After all calls of this step: a loop that goes on begins the next one.
            for name, answer in answers.items():
                advance(name, answer)
        self._check(sums)
        return results

    def _answer(self, asks: Sequence[tuple[str, Ask]]) -> list[Moved]:
        """For each ask the sum of the network's output, and what is sent to its loop. All in one call of the network."""
        together = [ask for _, ask in asks]
        condition = self._cat([a.condition for a in together])
        owners = [name for name, a in asks for _ in range(len(a.t))]
        moves = [a.move for a in together if a.move is not None]
        if self._whole_step is not None and len(moves) == len(asks) and len(owners) <= self.max_batch:
            try:
                moved = self._whole_step([a.t for a in together], condition, moves)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                moved = None  # what follows takes less at a time, and says so
            if moved is not None:
                self.profile.count(Counter(owners))
                return moved
        x = joined([a.x for a in together for _ in range(a.times)])
        output = self._predict(x, joined([a.t for a in together]), condition, owners)
        parts = output.split([len(a.t) for a in together])
        return [(p.sum(), p if a.move is None else a.move(p)) for a, p in zip(together, parts, strict=True)]

    @staticmethod
    def _check(sums: list[tuple[str, Tensor]]) -> None:
        """Raises RunError for the first place whose sum is not finite; empties `sums`. A finite output has a finite sum:
        it would take 1e34 a value to overflow it."""
        finite = [math.isfinite(v) for v in torch.stack([s for _, s in sums]).tolist()] if len(sums) > 1 else [
            math.isfinite(s.item()) for _, s in sums]  # fmt: skip
        if not all(finite):
            raise RunError(
                f"the network returned NaN or infinity in {sums[finite.index(False)][0]}: "
                "load the model with dtype float32, or check the checkpoint"
            )
        sums.clear()

    def predict(self, x: Tensor, t: int | Tensor, condition: Condition) -> Tensor:
        """The network's output, (B, C, h, w) float32, in calls of at most `max_batch` samples.

        Raises:
            RunError: NaN or infinity in the output, or out of memory with one sample.
        """
        return self.drive(self._ask(x, t, condition, None))

    def _ask(
        self, x: Tensor, t: int | Tensor, condition: Condition, uncond: Condition | None, move: Move | None = None
    ) -> Loop[Tensor]:
        """One question; with `uncond` for both halves of the guidance, that one first."""
        times = 1 if uncond is None else 2
        told = condition if uncond is None else self._cat([uncond, condition])
        return (yield Ask(x, self._times(t, x, times), told, times, move))

    def _times(self, t: int | Tensor, x: Tensor, times: int) -> Tensor:
        """(times * B,) int64; the same tensor whenever it is the same."""
        if isinstance(t, Tensor):
            return t if times == 1 else torch.cat([t] * times)
        key = (t, times * len(x), x.device)
        if key not in self._constants:
            self._constants[key] = torch.full((times * len(x),), t, dtype=torch.int64, device=x.device)
        return self._constants[key]

    def _cat(self, conditions: Sequence[Condition]) -> Condition:
        if len(conditions) == 1:
            return conditions[0]
        return self._remember(tuple(map(id, conditions)), conditions, lambda: Condition.cat(conditions))

    def _cut(self, condition: Condition, start: int, stop: int) -> Condition:
        return self._remember((id(condition), start, stop), condition, lambda: condition.take(slice(start, stop)))

    def _remember(self, key: tuple[Any, ...], of: Any, make: Callable[[], Condition]) -> Condition:
        """`of` is kept with it, so that an id in the key is not another object's by then."""
        if key not in self._made:
            while len(self._made) >= 16:
                self._made.pop(next(iter(self._made)))
            self._made[key] = (of, make())
        return self._made[key][1]

    def _predict(self, x: Tensor, t: Tensor, condition: Condition, owners: Sequence[str]) -> Tensor:
        """In calls of at most `max_batch` samples, each of which counts for its owner's stage; of an even number where they are
        split, so that two samples that are compared (see `mask.estimate`) are in one call and rounded alike."""
        parts: list[Tensor] = []
        start = 0
        while start < len(x):
            left = len(x) - start
            stop = len(x) if left <= self.max_batch else start + _even(self.max_batch)
            piece = slice(start, stop)
            told = condition if stop - start == len(x) else self._cut(condition, start, stop)
            try:
                parts.append(self.denoiser.predict(x[piece], t[piece], told))
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                if self.max_batch == 1:
                    raise RunError(
                        f"out of memory in {self.profile.where}: one sample of {tuple(x.shape[1:])} does not fit; "
                        "use a smaller image, a smaller dtype or another device"
                    ) from error
                self.max_batch = _even(len(x[piece]) // 2)
                self.profile.note(f"out of memory in {self.profile.where}: going on with batches of {self.max_batch}")
                continue
            self.profile.count(Counter(owners[piece]))
            start = stop
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def guided(
        self, x: Tensor, t: int | Tensor, condition: Condition, uncond: Condition | None, scale: float
    ) -> Loop[Tensor]:
        """Classifier-free guidance, both halves in one call: `uncond + scale * (cond - uncond)`.

        With scale 1, or no `uncond`, the unconditional half is not evaluated.
        """
        if uncond is None or scale == 1:
            return (yield from self._ask(x, t, condition, None))
        low, high = (yield from self._ask(x, t, condition, uncond)).chunk(2)
        return low + scale * (high - low)

    def step(self, x: Tensor, output: Tensor, abar_from: float, abar_to: float) -> Tensor:
        """One DDIM step of the whole batch from one level to another, with an output that is guided already."""
        return self._move(x, 1.0, abar_from, abar_to)(output)

    def guided_move(
        self,
        x: Tensor,
        levels: Levels,
        i: int,
        j: int,
        condition: Condition,
        uncond: Condition | None,
        scale: float,
        *,
        t: int | None = None,
        mask: Tensor | None = None,
        source: Reference | None = None,
        update: Update | None = None,
    ) -> Loop[Tensor]:
        """Predict at level i and move to level j: both halves of the guidance in one call of the network, then guidance,
        DDIM step and blend in one pass (see `kernels.guided_step`), then the update.

        Args:
            x: (B, C, h, w) at level i.
            t: the timestep that the network is told; level i's by default.
            mask: (B, 1, h, w), 1 edits; with `source`, what is outside is put back at level j.
            update: of ITO, at level j.
        """
        told = levels.timesteps[i] if t is None else t
        low = None if scale == 1 else uncond
        kept: dict[str, Tensor] = {}
        if mask is not None and source is not None:
            kept = {"mask": mask} | source.parts(j)
        move = self._move(x, scale, levels.abar[i], levels.abar[j], guided=low is not None, kept=kept, update=update)
        return (yield from self._ask(x, told, condition, low, move))

    def _move(self, x: Tensor, scale: float, abar_from: float, abar_to: float, *, guided: bool = False,
              kept: Mapping[str, Tensor] | None = None, update: Update | None = None) -> Move:  # fmt: skip
        key = (abar_from, abar_to, len(x), x.dtype, x.device)
        if key not in self._constants:
            coefficients = ddim_coefficients(abar_from, abar_to, self.prediction)
            values = torch.tensor(coefficients, dtype=x.dtype, device=x.device)
            self._constants[key] = values.unsqueeze(1).expand(2, len(x)).contiguous().unbind()
        c_x, c_out = self._constants[key]
        return Move(x, guided, scale, c_x, c_out, kept or {}, update)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """One batch of several; of one, itself, not a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def invert(
    network: Network,
    x0: Tensor,
    levels: Levels,
    start: int,
    condition: Condition,
    *,
    uncond: Condition | None = None,
    scale: float = 1.0,
    evaluate: str = "target",
) -> Loop[Tensor]:
    """DDIM inversion from the clean level to level `start` (ITO Eq. 2).

    Args:
        x0: (B, C, h, w) clean latents.
        start: index of the noisiest level to reach.
        evaluate: tell the network the "target" level's timestep (as diffusers does) or the "source" level's.

    Returns:
        (N - start + 1, B, C, h, w): the latent at levels start..N; the last one is x0 itself.
    """
    trajectory = [x0]
    for i in range(levels.steps, start, -1):
        network.profile.step(levels.steps - i + 1, levels.steps - start)
        t = levels.timesteps[i - 1 if evaluate == "target" else i]
        moved = yield from network.guided_move(trajectory[-1], levels, i, i - 1, condition, uncond, scale, t=t)
        trajectory.append(moved)
    return torch.stack(trajectory[::-1])
