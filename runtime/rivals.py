"""The samplers of the methods that ITO and iEdit are compared with. Each is a generator, as those of `sampling`.

Prompt-to-prompt (Hertz et al. 2022, arXiv:2208.01626) on the inversion of a picture, whose errors direct inversion takes out (PnP inversion,
Ju et al. 2024, arXiv:2310.01506) or null-text optimisation makes up for (Mokady et al. 2023, arXiv:2211.09794); edit-friendly DDPM inversion (Huberman-Spiegelglas et al. 2024, arXiv:2304.06140);
InstructPix2Pix (Brooks et al. 2023, arXiv:2211.09800).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from .denoise_step import AttentionControl, Blend, Condition, DenoiseStep, Sampler, Transition, interleaved
from .sampling import Path, Reference, TrajectoryReference
from .schedule import Level, add_noise, ddim_coefficients


def prompt_to_prompt(
    trajectory: Tensor,
    path: Path,
    source: Condition,
    edit: Condition,
    uncond: Condition | None,
    scale: float,
    *,
    cross: Tensor,
    own: Tensor,
    cross_steps: int,
    self_steps: int,
    self_queries: int,
    direct: bool,
    prediction: str,
    null_text: Tensor | None = None,
    mask: Tensor | None = None,
    guided: int | None = None,
) -> Sampler[Tensor]:
    """Source and edit denoised side by side from one latent; the attention maps of the source are the edit's in the first steps.

    Args:
        trajectory: (len(path), B, C, h, w), the inversion of the pictures.
        source, edit: what the two branches are told, (B, ...).
        uncond: the unconditional half of the guidance of both; None, or a scale of 1, is without.
        cross, own: (B, L, L) and (B, L) as of `AttentionControl`, in the first `cross_steps` steps.
        self_steps: self-attention of at most `self_queries` cells is replaced in the first so many steps.
        direct: the source is put back on its trajectory at every level (PnP inversion, Algorithm 1), so it needs no guidance of its own.
        prediction: what the network predicts (see `schedule.PREDICTIONS`).
        null_text: (guided steps, B, L, D) embeddings in the place of `uncond`'s at each step, from `optimise_null_text`.
        mask: (B, 1, h, w); outside it the trajectory is put back after each step.
        guided: the first so many steps have classifier-free guidance; None is all.

    Returns:
        (2, B, C, h, w) clean latents: of the source's branch, which is the input bit for bit where it is direct, and the edit.
    """
    x = y = trajectory[0]
    reference, batch = TrajectoryReference(trajectory, path), len(y)
    told: dict[tuple[int | None, bool, bool], Condition] = {}

    def condition(number: int, low: Condition | None) -> Condition:
        """Of a step's rows, which lie sample by sample: the unconditional ones, the source, the edit. The same object where it is the same."""
        cross_on, self_on = number < cross_steps, number < self_steps
        key = (None if low is None else -1 if null_text is None else number, cross_on, self_on)
        if key not in told:
            control = AttentionControl(
                torch.ones(batch, dtype=torch.bool, device=y.device),
                cross if cross_on else torch.zeros_like(cross),
                own if cross_on else torch.ones_like(own),
                self_queries if self_on else 0,
            )
            halves = [] if low is None else [low] if direct else [low, low]
            rows = [*halves, source, replace(edit, attention=control if cross_on or self_on else None)]
            made = Condition.interleave(*rows)
            told[key] = replace(made, together=1 if made.attention is None else len(rows))
        return told[key]

    for number, (level, cleaner) in enumerate(pairwise(path)):
        low = uncond if scale != 1 and (guided is None or number < guided) else None
        if low is not None and null_text is not None:
            low = low.with_prompt(null_text[number])
        rows = [*([] if low is None else [y] if direct else [x, y]), x, y]
        order = interleaved(len(rows), batch).to(y.device)
        step = DenoiseStep(torch.cat(rows)[order], level, None, condition(number, low))
        answers = (yield step).unflatten(0, (batch, len(rows))).unbind(1)
        blend = None if mask is None else reference.blend(mask, cleaner)
        y = _next(y, level, cleaner, answers[-1], answers[-3] if low is not None else None, scale, prediction, blend)
        if direct:
            x = reference.at(cleaner)
        else:
            x = _next(x, level, cleaner, answers[-2], answers[-4] if low is not None else None, scale, prediction)
    return torch.stack([x, y])


NULL_TEXT_STEPS = 10  # of Adam at each timestep at most, as published


def optimise_null_text(
    trajectory: Tensor,
    path: Path,
    source: Condition,
    uncond: Condition,
    scale: float,
    *,
    prediction: str,
    guided: int | None = None,
    inner: int = NULL_TEXT_STEPS,
) -> Sampler[Tensor]:
    """Unconditional embeddings for each step, with which guided sampling under the source prompt stays on the inversion (Algorithm 1 of
    the paper).

    At each step Adam moves the embeddings of the step before towards the next latent of the inversion. Learning rate and the distance
    at which a picture is left alone are the published code's, which has 50 steps, by the share of the steps that are done: 0.01 falls to
    half, 1e-5 rises by 1e-3. Pictures do not depend on each other.

    Args:
        trajectory: (len(path), B, C, h, w), the inversion of the pictures.
        source, uncond: the condition of the pictures, and where the embeddings begin.
        scale: guidance scale; not 1.
        guided: so many steps have guidance, so that embeddings are needed; None is all.
        inner: steps of Adam at each timestep at most.

    Returns:
        (guided steps, B, L, D).
    """
    z, embeds, found, steps = trajectory[0], uncond.prompt_embeds, list[Tensor](), len(path) - 1
    for number, (level, cleaner) in enumerate(list(pairwise(path))[:guided]):
        done = number / steps
        c_x, c_out = ddim_coefficients(level.abar, cleaner.abar, prediction)
        cond = yield DenoiseStep(z, level, None, source)
        # The next latent is c_x z + c_out (scale cond + (1 - scale) uncond): what `uncond` has to be for it to be the trajectory's.
        weight = c_out * (1 - scale)
        wanted = (trajectory[number + 1] - c_x * z - c_out * scale * cond) / (weight or 1.0)
        moved = [one.clone() for one in embeds]
        adam = torch.optim.Adam(moved, lr=1e-2 * (1 - done / 2))
        active = list(range(len(z)))
        for _ in range(inner if weight else 0):  # a step between equal levels asks nothing of the network
            index = torch.tensor(active, device=z.device)
            told = replace(source.take(index), prompt_embeds=torch.stack([moved[i] for i in active]))
            answer = weight**2 * (yield DenoiseStep(z[index], level, None, told, wanted=wanted[index]))
            adam.zero_grad()
            for i, gradient in zip(active, answer[:, :-1], strict=True):
                moved[i].grad = gradient.view_as(moved[i])
            adam.step()
            active = [i for i, loss in zip(active, answer[:, -1].tolist()) if loss >= 1e-5 + 1e-3 * done]
            if not active:
                break
        embeds = torch.stack(moved)
        found.append(embeds)
        low = yield DenoiseStep(z, level, None, source.with_prompt(embeds))
        z = _next(z, level, cleaner, cond, low, scale, prediction)
    return torch.stack(found)


@dataclass(frozen=True)
class IndependentReference:
    """The clean latent under a noise of its own at every level, as `ddpm_invert` has it.

    Attributes:
        x0: (B, C, h, w).
        noise: (len(path) - 1, B, C, h, w), of each level but the clean one.
    """

    x0: Tensor
    noise: Tensor
    path: Path

    def at(self, level: Level) -> Tensor:
        """(B, C, h, w) at `level`; itself at the path's last."""
        number = level.index - self.path[0].index
        return self.x0 if number == len(self.noise) else add_noise(self.x0, self.noise[number], level.abar)


def ddpm_invert(
    reference: IndependentReference, condition: Condition, uncond: Condition | None, scale: float
) -> Sampler[Tensor]:
    """The noise that DDPM sampling would have to draw to go through the levels of the reference (Algorithm 1 of the paper).

    Independent noises at the levels, in place of one path of sampling, make the noise maps larger and the picture's layout part of them.

    Args:
        condition, uncond, scale: what the network is told of the picture, and its guidance.

    Returns:
        (len(path), B, C, h, w): the latent at the path's first level, then the noise of every step at its standard deviation: what lies
        between the step's mean and the next level. Where a step has no noise of its own (to a level of abar 1) it is the error of the
        mean, so that `ddpm_sample` under the same condition returns the picture to rounding whatever the schedule.
    """
    x = reference.at(reference.path[0])
    maps = [x]
    for level, cleaner in pairwise(reference.path):
        mean = yield DenoiseStep(x, level, cleaner, condition, uncond, scale, eta=1.0)
        maps.append(reference.at(cleaner) - mean)
        x = mean + maps[-1]  # as sampling will add it, so that its rounding does not add up
    return torch.stack(maps)


def ddpm_sample(
    maps: Tensor,
    path: Path,
    condition: Condition,
    uncond: Condition | None,
    scale: float,
    *,
    source: IndependentReference,
    mask: Tensor | None = None,
    guided: int | None = None,
) -> Sampler[Tensor]:
    """DDPM sampling with the noise of `ddpm_invert` in place of fresh noise.

    Args:
        maps: (len(path), B, C, h, w), what `ddpm_invert` returned.
        mask: (B, 1, h, w); outside it the source is put back after each step.
        guided: the first so many steps have classifier-free guidance; None is all.

    Returns:
        (B, C, h, w) clean latents.
    """
    y = maps[0]
    for number, (level, cleaner) in enumerate(pairwise(path)):
        low = uncond if guided is None or number < guided else None
        blend = None if mask is None else Blend(mask, source.at(cleaner))
        y = yield DenoiseStep(y, level, cleaner, condition, low, scale, blend=blend, eta=1.0, noise=maps[number + 1])
    return y


def instruct(
    y: Tensor,
    path: Path,
    edit: Condition,
    uncond: Tensor,
    scale: float,
    image_scale: float,
    *,
    prediction: str,
    source: Reference | None = None,
    mask: Tensor | None = None,
    guided: int | None = None,
) -> Sampler[Tensor]:
    """Sampling of an InstructPix2Pix network, guided by text and image apart (Eq. 3 of the paper).

    With e of no image and no text, of the image alone, and of both:
    `e(0, 0) + image_scale (e(image, 0) - e(0, 0)) + scale (e(image, text) - e(image, 0))`. Terms of weight 0 are not evaluated.

    Args:
        y: (B, C, h, w) noise at the path's first level.
        edit: the instructions, with the pictures as `Condition.image`.
        uncond: (1 or B, L, D) embeddings of the negative prompt.
        source, mask: outside the mask the source is put back after each step.
        guided: the first so many steps are guided; the rest asks for text and image alone. None is all.

    Returns:
        (B, C, h, w) clean latents.
    """
    assert edit.image is not None
    untold = edit.with_prompt(uncond)
    unseen = replace(untold, image=torch.zeros_like(edit.image))

    def rows(scale: float, image_scale: float) -> tuple[list[float], Condition]:
        terms = [(edit, scale), (untold, image_scale - scale), (unseen, 1 - image_scale)]
        kept = [(c, w) for c, w in terms if w != 0]
        return [w for _, w in kept], Condition.cat([c for c, _ in kept])

    asked, free = rows(scale, image_scale), rows(1.0, 1.0)
    for number, (level, cleaner) in enumerate(pairwise(path)):
        weights, condition = asked if guided is None or number < guided else free
        answers = yield DenoiseStep(y.repeat(len(weights), 1, 1, 1), level, None, condition)
        output = torch.stack([w * e for w, e in zip(weights, answers.chunk(len(weights)), strict=True)]).sum(0)
        blend = source.blend(mask, cleaner) if mask is not None and source is not None else None
        y = _next(y, level, cleaner, output, None, 1.0, prediction, blend)
    return y


def _next(
    x: Tensor,
    level: Level,
    to: Level,
    cond: Tensor,
    uncond: Tensor | None,
    scale: float,
    prediction: str,
    blend: Blend | None = None,
) -> Tensor:
    """The guided DDIM step of answers that a sampler has put together itself."""
    c_x, c_out = (x.new_full((len(x),), c) for c in ddim_coefficients(level.abar, to.abar, prediction))
    answers = cond if uncond is None else torch.cat([uncond, cond])
    return Transition(x, uncond is not None, scale, c_x, c_out, blend)(answers)
