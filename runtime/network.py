"""Runs samplers: the one place that calls a network.

It batches what samplers ask (both halves of a guidance, several samplers in lock-step), keeps calls within the memory bound and halves
them when memory runs out, counts evaluations, reports progress, and checks every answer for NaN.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .backends.base import Denoiser, Differentiable, Stepper, even, out_of_memory
from .denoise_step import Condition, DenoiseStep, IdentityCache, Sampler, Transition, joined
from .errors import RunError
from .profile import Profile
from .schedule import Level, ddim_coefficients

T = TypeVar("T")


class Network:
    """A denoiser for the length of one run.

    Args:
        denoiser: the backend.
        prediction: what it predicts (see `schedule`).
        max_batch: samples per call at most; halved, down to 1, when a call runs out of memory.
        profile: counts evaluations and calls, and passes progress on.
    """

    def __init__(self, denoiser: Denoiser, prediction: str, max_batch: int, profile: Profile):
        self.denoiser, self.prediction, self.max_batch, self.profile = denoiser, prediction, max_batch, profile
        self._whole_step = denoiser.step if isinstance(denoiser, Stepper) else None
        # Conditions that were put together or cut. The same ones come at every step, and a backend that keeps what it computed of a
        # text or a layout knows it again by the tensor.
        self._conditions: IdentityCache[Condition] = IdentityCache(16)
        # Timesteps and coefficients as tensors, two for each level and batch.
        self._constants: dict[tuple[Any, ...], Any] = {}

    def run(self, sampler: Sampler[T], steps: int = 0) -> T:
        """Run one sampler in the running stage; `steps`, if known, is how many it takes."""
        name = self.profile.stage_name
        result: T = self.run_lockstep({name: sampler}, steps)[name]
        return result

    def run_lockstep(self, samplers: Mapping[str, Sampler[Any]], steps: int = 0) -> dict[str, Any]:
        """Run samplers in lock-step, by the names of their stages; what can go into one call of the network does.

        Steps share a call where their conditions have the same controls and text length; each sample has its own timestep.
        The inversion of the input and the guidance image take 25 calls in place of 50 (METHOD section 2, cost).

        Raises:
            RunError: NaN or infinity in an answer, or out of memory with one sample.
            Cancelled: the profile's callback said so.
        """
        pending: dict[str, DenoiseStep] = {}
        results: dict[str, Any] = {}
        sums: list[tuple[str, Tensor]] = []

        def advance(name: str, answer: Tensor | None) -> None:
            try:
                pending[name] = next(samplers[name]) if answer is None else samplers[name].send(answer)
            except StopIteration as stop:
                pending.pop(name, None)
                results[name] = stop.value

        for name in samplers:
            advance(name, None)
        number = 0
        while pending:
            number += 1
            self.profile.step(number, steps)
            groups: dict[Any, list[str]] = {}
            for name, step in pending.items():
                kind = step.wanted is None
                groups.setdefault((step.condition.batching_key, step.x.shape[1:], kind), []).append(name)
            answers: dict[str, Tensor] = {}
            for names in groups.values():
                for name, (total, answer) in zip(names, self._answer({n: pending[n] for n in names}), strict=True):
                    sums.append((f"stage {name}, step {number}", total))
                    if not total.is_cuda:  # to look is to wait for a GPU, so there it is done once, at the end
                        self._check(sums)
                    answers[name] = answer
            # After all calls of this step, because a sampler that goes on begins its next one.
            for name, answer in answers.items():
                advance(name, answer)
        self._check(sums)
        return results

    def predict(
        self, x: Tensor, timestep: int, condition: Condition, uncond: Condition | None = None, scale: float = 1.0
    ) -> Tensor:
        """The network's output for latents at one timestep, (B, C, h, w) float32, guided if `uncond` is given and `scale` is not 1.

        Raises:
            RunError: NaN or infinity in the output, or out of memory with one sample.
        """

        def ask() -> Sampler[Tensor]:
            return (yield DenoiseStep(x, Level(0, timestep, 1.0), None, condition, uncond, scale))

        return self.run(ask())

    def _answer(self, steps: Mapping[str, DenoiseStep]) -> list[tuple[Tensor, Tensor]]:
        """For each step the sum of the network's output, and what is sent to its sampler. All in one call of the network."""
        together = list(steps.values())
        condition = self._cat([self._halves(s) for s in together])
        timesteps = [self._timesteps(s) for s in together]
        owners = [name for name, t in zip(steps, timesteps, strict=True) for _ in range(len(t))]
        transitions = [self._transition(s) for s in together]
        if self._whole_step is not None and None not in transitions and len(owners) <= self.max_batch:
            try:
                answers = self._whole_step(timesteps, condition, [t for t in transitions if t is not None])
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                answers = None  # what follows takes less at a time, and says so
            if answers is not None:
                self.profile.count(Counter(owners))
                return answers
        x = joined([s.x for s in together for _ in range(1 + s.guided)])
        wanted = [s.wanted for s in together if s.wanted is not None]
        answers_of = self._predict(x, joined(timesteps), condition, owners, joined(wanted) if wanted else None)
        parts = answers_of.split([len(t) for t in timesteps])
        return [
            (output.sum(), _guided(step, output) if transition is None else transition(output))
            for step, transition, output in zip(together, transitions, parts, strict=True)
        ]

    def _halves(self, step: DenoiseStep) -> Condition:
        """The condition of a step's samples: of both halves of its guidance, the unconditional one first."""
        return self._cat([step.uncond, step.condition] if step.guided and step.uncond is not None else [step.condition])

    def _cat(self, conditions: Sequence[Condition]) -> Condition:
        if len(conditions) == 1:
            return conditions[0]
        return self._conditions.get(conditions, lambda: Condition.cat(conditions))

    def _timesteps(self, step: DenoiseStep) -> Tensor:
        """(B or 2B,) int64; the same tensor whenever it is the same."""
        t = step.level.timestep if step.timestep is None else step.timestep
        key = (t, (1 + step.guided) * len(step.x), step.x.device)
        if key not in self._constants:
            self._constants[key] = torch.full((key[1],), t, dtype=torch.int64, device=step.x.device)
        timesteps: Tensor = self._constants[key]
        return timesteps

    def _transition(self, step: DenoiseStep) -> Transition | None:
        """What follows the network's answer; None for a step that leads to no other level."""
        if step.to is None:
            return None
        x = step.x
        key = (step.level.abar, step.to.abar, step.eta, len(x), x.dtype, x.device)
        if key not in self._constants:
            coefficients = ddim_coefficients(step.level.abar, step.to.abar, self.prediction, step.eta)
            # Filled where they are: a copy from the host waits for all that a GPU has been given.
            self._constants[key] = [torch.full((len(x),), c, dtype=x.dtype, device=x.device) for c in coefficients]
        c_x, c_out = self._constants[key]
        return Transition(x, step.guided, step.scale, c_x, c_out, step.blend, step.update, step.noise)

    def _predict(
        self, x: Tensor, t: Tensor, condition: Condition, owners: Sequence[str], wanted: Tensor | None = None
    ) -> Tensor:
        """In calls of at most `max_batch` samples, each of which counts for its owner's stage; of an even number where they are
        split, so that two samples that are compared (see `sampling.estimate_mask`) are in one call and rounded alike. Samples that belong
        together stay together, also where those are more than `max_batch`."""
        parts: list[Tensor] = []

        def ask(piece: slice, condition: Condition) -> Tensor:
            if wanted is None:
                return self.denoiser.predict(x[piece], t[piece], condition)
            assert isinstance(self.denoiser, Differentiable)  # `Pipeline` has asked
            return self.denoiser.gradient(x[piece], t[piece], condition, wanted[piece])

        start, least = 0, condition.together

        def size(most: int) -> int:
            return even(most) if least == 1 else max(least, most - most % least)

        while start < len(x):
            left = len(x) - start
            stop = len(x) if left <= self.max_batch else start + size(self.max_batch)
            piece = slice(start, stop)
            cut = condition
            if stop - start < len(x):
                cut = self._conditions.get([condition], lambda piece=piece: condition.take(piece), start, stop)  # type: ignore[misc]
            try:
                parts.append(ask(piece, cut))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if stop - start <= least:
                    what = "one sample" if least == 1 else f"one edit, which takes {least} samples together,"
                    raise RunError(
                        f"out of memory in {self.profile.where}: {what} of {tuple(x.shape[1:])} does not fit; "
                        "use a smaller image, a smaller dtype or another device"
                    ) from error
                self.max_batch = size((stop - start) // 2)
                self.profile.note(f"out of memory in {self.profile.where}: going on with batches of {self.max_batch}")
                continue
            self.profile.count(Counter(owners[piece]))
            start = stop
        return joined(parts)

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


def _guided(step: DenoiseStep, output: Tensor) -> Tensor:
    """The network's output after classifier-free guidance: `uncond + scale * (cond - uncond)`."""
    if not step.guided:
        return output
    uncond, cond = output.chunk(2)
    return uncond + step.scale * (cond - uncond)
