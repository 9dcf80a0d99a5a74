"""Networks whose activations lie channels last from end to end, with norms and gates as one kernel each.

Tensor cores read convolutions in half precision channels last. Weights in that format alone do not get there: eager's GroupNorm on CUDA, and the
transformers of diffusers on their way out, answer in the other one, so that each convolution begins with a copy. Here GroupNorm reads and writes
channels last (`kernels.group_norm`), with the SiLU behind it and what a residual block adds before it; the gate of a feed-forward layer is
`kernels.geglu`. The same arithmetic, rounded less often.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.geglu import geglu
from ...kernels.group_norm import group_norm


class Norm(nn.Module):
    """A `GroupNorm`, with the SiLU behind it where asked."""

    def __init__(self, norm: nn.GroupNorm, silu: bool):
        super().__init__()
        self.norm, self.silu = norm, silu

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """(B, C, h, w), and (B, C) that is added first -> (B, C, h, w) channels last."""
        n = self.norm
        return group_norm(x, n.num_groups, n.weight, n.bias, n.eps, shift=shift, silu=self.silu)


class ResidualBlock(nn.Module):
    """A `ResnetBlock2D` that `takes` allows; the first convolution's bias and the time embedding are added as the second norm reads."""

    def __init__(self, block: Any):
        super().__init__()
        self.norm1, self.norm2 = Norm(block.norm1, silu=True), Norm(block.norm2, silu=True)
        self.conv1, self.conv2 = block.conv1, block.conv2
        self.time_emb_proj, self.conv_shortcut = block.time_emb_proj, block.conv_shortcut

    @staticmethod
    def takes(part: nn.Module) -> bool:
        """Whether a module is a residual block without anything that `forward` leaves out."""
        return (
            isinstance(part, ResnetBlock2D)
            and type(part).forward is ResnetBlock2D.forward
            and part.time_embedding_norm in (("default",) if part.time_emb_proj is not None else ("default", "group"))
            and not part.skip_time_act
            and part.upsample is None
            and part.downsample is None
            and part.output_scale_factor == 1
            and isinstance(part.nonlinearity, nn.SiLU)
        )

    def forward(self, x: Tensor, temb: Tensor | None) -> Tensor:
        """(B, C, h, w) and the time embedding, None in a VAE, before its activation."""
        first = self.conv1
        added = first.bias.expand(len(x), -1) if temb is None else self.time_emb_proj(F.silu(temb)) + first.bias
        hidden = F.conv2d(self.norm1(x), first.weight, None, first.stride, first.padding)
        hidden = self.conv2(self.norm2(hidden, added))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden


class Gate(nn.Module):
    """A `GEGLU` of diffusers."""

    def __init__(self, gate: Any):
        super().__init__()
        self.proj = gate.proj

    def forward(self, x: Tensor) -> Tensor:
        return geglu(self.proj(x))


class Transformer(Transformer2DModel):
    """The same without the copy to channels first before what it adds up."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        def picture(x: Tensor) -> Tensor:
            return x.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)

        if self.use_linear_projection:
            output = picture(self.proj_out(hidden_states))
        else:
            output = self.proj_out(picture(hidden_states))
        made: Tensor = output + residual
        return made


def keep_channels_last(net: Any) -> None:
    """Make the modules of a UNet, ControlNet or VAE those of this file, in place, and its weights channels last. What is not known stays as it is."""
    net.to(memory_format=torch.channels_last)
    for parent in list(net.modules()):
        for name, part in list(parent.named_children()):
            if ResidualBlock.takes(part):
                setattr(parent, name, ResidualBlock(part))
            elif type(part) is GEGLU:
                setattr(parent, name, Gate(part))
            elif type(part) is Transformer2DModel and part.is_input_continuous:
                part.__class__, part.norm = Transformer, Norm(part.norm, silu=False)
            elif name == "conv_norm_out" and isinstance(part, nn.GroupNorm) and isinstance(parent.conv_act, nn.SiLU):
                parent.conv_norm_out, parent.conv_act = Norm(part, silu=True), nn.Identity()
