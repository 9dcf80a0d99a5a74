"""The denoising loops of an edit: the ITO pass and masked sampling. Stateless loops: tensors in, a latent out;
`Network.drive` runs them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.ito_step import AdamState
from .denoiser import Condition, Loop, Network, Reference
from .schedule import Levels
from .steps import Update


@dataclass(frozen=True)
class Phase:
    """How one pass of ITO updates its latent (METHOD section 2, rows 5-8; A.2 reports t_u 20, k 30 for the guidance).

    Attributes:
        t_u: steps that are updated, the noisiest first; None is 15 of 25, or what the checkpoint recommends for edits without layouts.
        k: inner steps at each.
        lr: the longest step of a value (clipped), or Adam's learning rate.
        update: "clipped", the Newton step of the preservation loss, never longer than lr; or "adam", the papers' letter.
        carry: keep Adam's state across timesteps in place of a fresh one at each.
    """

    t_u: int | None = None
    k: int = 1
    lr: float = 0.1
    update: str = "clipped"
    carry: bool = False

    def updates(self, steps: int, share: float | None = None) -> int:
        """t_u for a run of `steps` steps; `share` is what the checkpoint recommends, if anything."""
        return round(steps * (15 / 25 if share is None else share)) if self.t_u is None else self.t_u


def ito_pass(
    network: Network,
    y: Tensor,
    levels: Levels,
    start: int,
    condition: Condition,
    uncond: Condition | None,
    scale: float,
    *,
    source: Reference,
    guidance: Reference | None,
    mask: Tensor,
    lam: Tensor,
    phase: Phase,
    kept_area: bool = False,
) -> Loop[Tensor]:
    """Denoise `y` from level `start`, moving it toward source and guidance after each of the first t_u steps.

    The update comes after the DDIM step, at the level that the latent is then at (METHOD section 2, row 7; ITO Eq. 6).

    Args:
        y: (B, C, h, w) at level `start`.
        guidance: the guidance latent at every level, or None where every lam is 1.
        mask: (B, 1, h, w); 1 edits.
        lam: (B,) weight of the preservation loss.

    Returns:
        (B, C, h, w) clean latent.
    """
    updates = phase.updates(levels.steps)
    state = AdamState(torch.zeros_like(y), torch.zeros_like(y)) if phase.carry else None
    for i in range(start, levels.steps):
        network.profile.step(i - start + 1, levels.steps - start)
        update = None
        if i - start < updates:
            g = guidance(i + 1) if guidance else None
            update = Update(source(i + 1), g, mask, lam, phase.k, phase.lr, kept_area, phase.update, state)
        y = yield from network.guided_move(y, levels, i, i + 1, condition, uncond, scale, update=update)
    return y


def masked_sampling(
    network: Network,
    y: Tensor,
    levels: Levels,
    start: int,
    condition: Condition,
    uncond: Condition | None,
    scale: float,
    *,
    source: Reference | None,
    mask: Tensor | None,
) -> Loop[Tensor]:
    """DDIM sampling from level `start`; with a mask, everything outside is put back after each step.

    The blend is at the level that the latent is then at, the clean source after the last step (iEdit Eq. 13; METHOD
    section 3, row 1), so an empty mask returns the source bit for bit. With no mask this is SDEdit.
    """
    for i in range(start, levels.steps):
        network.profile.step(i - start + 1, levels.steps - start)
        y = yield from network.guided_move(y, levels, i, i + 1, condition, uncond, scale, mask=mask, source=source)
    return y
