"""What follows a call of the network within one denoising step, as data: guidance, DDIM step, blend and ITO update.

A loop hands its `Move` over together with the question to the network, so a backend may run both as one recorded step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..kernels.guided_step import guided_step
from ..kernels.ito_step import AdamState, ito_step


@dataclass(frozen=True)
class Update:
    """An ITO update; all fields as the arguments of `kernels.ito_step.ito_step`, `rule` as its `update`."""

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
class Move:
    """From one level to another, once the network has answered.

    Attributes:
        x: (B, C, h, w) at the level that is left.
        guided: the network answers for `x` twice, the unconditional half first.
        scale: of the guidance.
        c_x, c_out: (B,) as of `kernels.guided_step.guided_step`.
        kept: `mask`, `reference`, `noise` and `reference_abar` of the same, or nothing.
        update: what is done to the latent at the level that is reached.
    """

    x: Tensor
    guided: bool
    scale: float
    c_x: Tensor
    c_out: Tensor
    kept: Mapping[str, Tensor]
    update: Update | None = None

    def __call__(self, output: Tensor) -> Tensor:
        """(B or 2B, C, h, w) of the network -> (B, C, h, w) at the level that is reached."""
        low, cond = output.chunk(2) if self.guided else (None, output)
        y = guided_step(self.x, cond, low, self.scale, self.c_x, self.c_out, **self.kept)
        return y if self.update is None else self.update(y)

    @property
    def stateless(self) -> bool:
        """Whether it is a function of its tensors alone. Adam's state, if carried, counts its steps."""
        return self.update is None or self.update.state is None
