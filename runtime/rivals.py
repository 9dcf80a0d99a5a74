"""The samplers of the methods that ITO and iEdit are compared with. Each is a generator, as those of `sampling`.

Prompt-to-prompt (Hertz et al. 2022, arXiv:2208.01626) on the inversion of a picture, whose errors direct inversion takes out (PnP inversion,
Ju et al. 2024, arXiv:2310.01506).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from .denoise_step import AttentionControl, Blend, Condition, DenoiseStep, Sampler, Transition, interleaved
from .sampling import Path, TrajectoryReference
from .schedule import Level, ddim_coefficients


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
        mask: (B, 1, h, w); outside it the trajectory is put back after each step.
        guided: the first so many steps have classifier-free guidance; None is all.

    Returns:
        (2, B, C, h, w) clean latents: of the source's branch, which is the input bit for bit where it is direct, and the edit.
    """
    x = y = trajectory[0]
    reference, batch = TrajectoryReference(trajectory, path), len(y)
    told: dict[tuple[bool, bool, bool], Condition] = {}

    def condition(low: bool, cross_on: bool, self_on: bool) -> Condition:
        """Of a step's rows, which lie sample by sample: the unconditional ones, the source, the edit."""
        if (low, cross_on, self_on) not in told:
            control = AttentionControl(
                torch.ones(batch, dtype=torch.bool, device=y.device),
                cross if cross_on else torch.zeros_like(cross),
                own if cross_on else torch.ones_like(own),
                self_queries if self_on else 0,
            )
            halves = [] if uncond is None or not low else [uncond] if direct else [uncond, uncond]
            rows = [*halves, source, replace(edit, attention=control if cross_on or self_on else None)]
            made = Condition.interleave(*rows)
            told[low, cross_on, self_on] = replace(made, together=1 if made.attention is None else len(rows))
        return told[low, cross_on, self_on]

    for number, (level, cleaner) in enumerate(pairwise(path)):
        low = uncond is not None and scale != 1 and (guided is None or number < guided)
        rows = [*([] if not low else [y] if direct else [x, y]), x, y]
        order = interleaved(len(rows), batch).to(y.device)
        step = DenoiseStep(
            torch.cat(rows)[order], level, None, condition(low, number < cross_steps, number < self_steps)
        )
        answers = (yield step).unflatten(0, (batch, len(rows))).unbind(1)
        blend = None if mask is None else reference.blend(mask, cleaner)
        y = _next(y, level, cleaner, answers[-1], answers[-3] if low else None, scale, prediction, blend)
        if direct:
            x = reference.at(cleaner)
        else:
            x = _next(x, level, cleaner, answers[-2], answers[-4] if low else None, scale, prediction)
    return torch.stack([x, y])


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
