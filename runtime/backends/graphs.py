"""Eager PyTorch recorded: the kernels of the `torch` backend, on CUDA each denoising step one replay of a CUDA graph.

An eager network is some hundred small kernels that the processor launches one by one, and a GPU is done with most of them before the next one comes.
A replay is one launch. Nothing is compiled, so there is nothing to wait for: a shape's first call runs as it is, its second one is recorded, and
what is computed is what eager computes, bit for bit, unless `channels_last` is asked for: then the networks are those of `channels_last`, which are
faster and round otherwise. Compiled kernels (`compiled`) are fewer, and take minutes to make.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.model import Model
from ..profile import module_call
from .base import BackendOptions
from .graph_modules import GraphModules


def why_unavailable() -> list[str]:
    """A reason if there is nothing to record on."""
    return [] if torch.cuda.is_available() else ["CUDA graphs are of CUDA devices, and there is none; use torch"]


def load(model: Model, options: BackendOptions) -> GraphsBackend:
    """See `backends.load_backend`."""
    return GraphsBackend(model, attention=options.attention, channels_last=options.channels_last)


class GraphsBackend(GraphModules):
    """See this file's docstring. Arguments as of `GraphModules`."""

    name = "graphs"
    fuses = True

    @torch.no_grad()
    def encode_tokens(self, ids: Tensor) -> Tensor:
        # transformers looks at values of its masks on the way, which waits for the GPU and cannot be recorded; three calls an edit.
        with module_call("text_encoder", self.name, len(ids), device=ids.device):
            prompt_embeds: Tensor = self.model.text_encoder(ids)[0].float()
        return prompt_embeds
