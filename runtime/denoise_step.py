"""One denoising step as plain data: what the network is asked, and what becomes of its answer.

A sampler yields a `DenoiseStep`. The driver (`network.Network`) asks the network, and a `Transition` takes the latent to the next level:
guidance, DDIM step, blend and ITO update. It is data too, so that a backend may run the call and all that follows as one recorded graph.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..kernels.guided_step import guided_step
from ..kernels.ito_step import AdamState, ito_step
from .schedule import Level

T = TypeVar("T")


@dataclass(frozen=True)
class ControlInput:
    """What one ControlNet or T2I-Adapter is given.

    Attributes:
        name: of the layout and of the network that reads it.
        image: (B, 3, H, W) layout map in [0, 1], at picture resolution.
        scale: factor of what that network adds to the UNet.
        adapter: a T2I-Adapter reads it, whose features are of no timestep; else a ControlNet.
    """

    name: str
    image: Tensor
    scale: float
    adapter: bool = False


@dataclass(frozen=True)
class AttentionControl:
    """What becomes of the attention maps of the samples of a call (Prompt-to-prompt, Hertz et al. 2022, arXiv:2208.01626).

    With P the attention probabilities of an edited sample and P_source those of the sample before it, its source, cross-attention takes
    `P_source @ cross + P * own`, and self-attention of a picture of at most `self_queries` cells takes P_source. Samples that are not
    edited keep their maps.

    Attributes:
        edited: (B,) bool; the sample before an edited one is its source.
        cross: (B, L, L): from which token of the source (rows) each token of the edit (columns) takes its map, and with which weight.
        own: (B, L): weight of each token's own map.
        self_queries: 0 replaces no self-attention.
    """

    edited: Tensor
    cross: Tensor
    own: Tensor
    self_queries: int

    @staticmethod
    def none(like: AttentionControl, samples: int) -> AttentionControl:
        """For `samples` samples that keep their maps, to go into a call with those of `like`."""
        return AttentionControl(
            like.edited.new_zeros(samples), like.cross.new_zeros(samples, *like.cross.shape[1:]),
            like.own.new_ones(samples, like.own.shape[1]), like.self_queries,
        )  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """What the network is told about each sample.

    Attributes:
        prompt_embeds: (B, L, D) output of the text encoder.
        controls: one for each ControlNet and T2I-Adapter; the residuals of each kind are summed.
        image: (B, C, h, w) latents that an InstructPix2Pix UNet takes beside the noisy ones, as further channels; else None.
        attention: what becomes of the attention maps; None leaves them.
        together: so many samples in a row belong together: they are never split into two calls.
    """

    prompt_embeds: Tensor
    controls: tuple[ControlInput, ...] = ()
    image: Tensor | None = None
    attention: AttentionControl | None = None
    together: int = 1

    def __len__(self) -> int:
        return self.prompt_embeds.shape[0]

    @property
    def batching_key(self) -> tuple[Any, ...]:
        """Conditions with equal keys can share a call of the network: text length, and names, scales and sizes of the controls; with
        control of attention only those with the same."""
        attention = None if self.attention is None else (self.attention.self_queries, self.together)
        image = None if self.image is None else self.image.shape[1:]
        return (
            self.prompt_embeds.shape[1:],
            image,
            attention,
            *((c.name, c.scale, c.image.shape[1:]) for c in self.controls),
        )

    def network_input(self, x: Tensor) -> Tensor:
        """What the UNet takes for noisy latents x: (B, C, h, w), or (B, 2C, h, w) with the image beside them."""
        return x if self.image is None else torch.cat([x, self.image.to(x.dtype)], dim=1)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """With every tensor of samples changed."""
        a = self.attention
        return replace(
            self,
            prompt_embeds=change(self.prompt_embeds),
            controls=tuple(replace(c, image=change(c.image)) for c in self.controls),
            image=None if self.image is None else change(self.image),
            attention=a and replace(a, edited=change(a.edited), cross=change(a.cross), own=change(a.own)),
        )

    def take(self, index: Tensor | slice) -> Condition:
        """The samples of `index`."""
        return self._each(lambda values: values[index])

    def repeat(self, times: int, block: int = 1) -> Condition:
        """Each block of `block` samples `times` times in a row."""
        return self._each(lambda values: repeat(values, times, block))

    def with_prompt(self, prompt_embeds: Tensor) -> Condition:
        """The same controls under another prompt; `prompt_embeds` may be (1, L, D)."""
        same = prompt_embeds.expand(len(self), -1, -1) if prompt_embeds.shape[0] == 1 else prompt_embeds
        return replace(self, prompt_embeds=same)

    @staticmethod
    def interleave(*conditions: Condition) -> Condition:
        """(nB, ...): the samples of n conditions in turn; all must have the same controls, text length and number."""
        every, index = Condition.cat(conditions), interleaved(len(conditions), len(conditions[0]))
        return every.take(index.to(every.prompt_embeds.device))

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """One batch of several; all must have the same controls and text length, and an image each or none. Where some have control of attention, the samples of
        the others keep their maps."""
        first = conditions[0]
        names = [(c.name, c.scale) for c in first.controls]
        if any([(c.name, c.scale) for c in one.controls] != names for one in conditions):
            raise ValueError("Condition.cat: the conditions have different controls")
        controlled = [one.attention for one in conditions if one.attention is not None]
        attention = None
        if controlled:
            every = [one.attention or AttentionControl.none(controlled[0], len(one)) for one in conditions]
            edited, cross, own = (torch.cat(tensors) for tensors in zip(*((a.edited, a.cross, a.own) for a in every)))
            attention = AttentionControl(edited, cross, own, controlled[0].self_queries)
        images = [one.image for one in conditions if one.image is not None]
        return Condition(
            torch.cat([one.prompt_embeds for one in conditions]),
            tuple(
                replace(c, image=torch.cat([one.controls[i].image for one in conditions]))
                for i, c in enumerate(first.controls)
            ),
            torch.cat(images) if images else None,
            attention,
            max(one.together for one in conditions),
        )


@dataclass(frozen=True)
class Blend:
    """What is put back outside a mask after a step; arguments of `kernels.guided_step.guided_step` by these names.

    Attributes:
        mask: (B, 1, h, w) in [0, 1]; 1 edits, 0 keeps.
        reference: (B, C, h, w) latent that is kept: at the level that is reached or, with `noise`, the clean one.
        noise, reference_abar: (B, C, h, w) and (B,): the noise and the level that the reference is noised to.
    """

    mask: Tensor
    reference: Tensor
    noise: Tensor | None = None
    reference_abar: Tensor | None = None


@dataclass(frozen=True)
class ItoUpdate:
    """An ITO update (ITO Eq. 6); all fields as the arguments of `kernels.ito_step.ito_step`, `rule` as its `update`."""

    source: Tensor
    guidance: Tensor | None
    mask: Tensor
    lam: Tensor
    k: int
    lr: float
    kept_area: bool
    rule: str
    state: AdamState | None = None

    def __call__(self, y: Tensor) -> Tensor:
        return ito_step(y, self.source, self.guidance, self.mask, self.lam, update=self.rule, k=self.k, lr=self.lr,
                        kept_area=self.kept_area, state=self.state)  # fmt: skip


@dataclass(frozen=True)
class DenoiseStep:
    """One step of a sampler. What is sent back is the latent at level `to` or, without one, the network's guided output.

    Attributes:
        x: (B, C, h, w) latents at `level`.
        level, to: where the step begins and ends; sampling goes to less noise and inversion to more.
        condition: what the network is told.
        uncond: the unconditional half of the guidance; None, or a scale of 1, leaves it out.
        scale: of the guidance: `uncond + scale * (cond - uncond)`.
        timestep: what the network is told of the level; None is the timestep of `level`.
        blend: what is put back at level `to`.
        update: the ITO update at level `to`.
        eta: share of the noise at level `to` that is fresh, 0 (DDIM) to 1 (DDPM), as in `schedule.ddim_coefficients`.
        noise: (B, C, h, w) that fresh noise at its standard deviation, added before the blend; None adds none.
        wanted: (B, C, h, w) what the network should answer; not guided, and of no level `to`. What is sent back then is (B, L * D + 1): the
            gradient of the mean squared distance to it with respect to the prompt's embeddings, and that distance.
    """

    x: Tensor
    level: Level
    to: Level | None
    condition: Condition
    uncond: Condition | None = None
    scale: float = 1.0
    timestep: int | None = None
    blend: Blend | None = None
    update: ItoUpdate | None = None
    eta: float = 0.0
    noise: Tensor | None = None
    wanted: Tensor | None = None

    @property
    def guided(self) -> bool:
        """Whether the network answers twice for each sample, the unconditional half first."""
        return self.uncond is not None and self.scale != 1


# A sampler does not know what answers it, so those that do not depend on each other can share calls of the network.
Sampler = Generator[DenoiseStep, Tensor, T]


@dataclass(frozen=True)
class Transition:
    """From one level to another, once the network has answered: a `DenoiseStep` with its coefficients as tensors.

    Attributes:
        x: (B, C, h, w) at the level that is left.
        guided, scale: as of `DenoiseStep`.
        c_x, c_out: (B,) as of `kernels.guided_step.guided_step`.
        blend, update: what follows at the level that is reached.
        noise: (B, C, h, w) fresh noise, added before the blend.
    """

    x: Tensor
    guided: bool
    scale: float
    c_x: Tensor
    c_out: Tensor
    blend: Blend | None = None
    update: ItoUpdate | None = None
    noise: Tensor | None = None

    def __call__(self, output: Tensor) -> Tensor:
        """(B or 2B, C, h, w) of the network -> (B, C, h, w) at the level that is reached."""
        uncond, cond = output.chunk(2) if self.guided else (None, output)
        b = self.blend
        kept = (
            {}
            if b is None
            else {"mask": b.mask, "reference": b.reference, "noise": b.noise, "reference_abar": b.reference_abar}
        )
        y = guided_step(self.x, cond, uncond, self.scale, self.c_x, self.c_out, **kept)
        if self.noise is not None:  # m (y + noise) + (1 - m) reference
            y = y + (self.noise if b is None else b.mask * self.noise)
        return y if self.update is None else self.update(y)

    @property
    def stateless(self) -> bool:
        """Whether it is a function of its tensors alone. Adam's state, if it is carried, counts its steps."""
        return self.update is None or self.update.state is None


class IdentityCache(Generic[T]):
    """Values that were made of objects, found again by the identity of those objects.

    A sampler yields the same condition at every step, so what was computed of it need not be computed again. An entry holds its objects:
    while it is there, their ids cannot become those of others. Threads may share a cache; two that miss at once both make the value.

    Args:
        held: entries that are kept, the last used ones.
    """

    def __init__(self, held: int):
        self.held = held
        self._entries: OrderedDict[tuple[Any, ...], tuple[tuple[Any, ...], T]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, objects: Sequence[Any], make: Callable[[], T], *more: Any) -> T:
        """The value of `objects` (by identity) and `more` (by equality); `make()` if there is none yet."""
        key = (*map(id, objects), *more)
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key][1]
        value = make()
        with self._lock:
            self._entries[key] = (tuple(objects), value)
            while len(self._entries) > self.held:
                self._entries.popitem(last=False)
        return value


def repeat(values: Tensor, times: int, block: int = 1) -> Tensor:
    """Each block of `block` samples of dimension 0 `times` times in a row.

    One copy after another, because copies of a text's size then stay in this thread: to wake torch's other threads takes 8 ms while
    those of ONNX Runtime wait for their next call.
    """
    blocks = values.unflatten(0, (-1, block))
    out = values.new_empty((len(blocks), times, *blocks.shape[1:]))
    for i in range(times):
        out[:, i] = blocks
    return out.flatten(0, 2)


def interleaved(conditions: int, samples: int) -> Tensor:
    """(conditions * samples,) int64: the samples of several batches, one after the other, in turn."""
    return torch.arange(conditions * samples).view(conditions, samples).T.flatten()


def joined(parts: Sequence[Tensor]) -> Tensor:
    """One batch of several; of one, itself and not a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
