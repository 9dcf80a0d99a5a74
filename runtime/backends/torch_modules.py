"""A model's networks as torch modules that compute once what does not change from step to step; what eager and compile share.

What is computed once: the keys and values that cross-attention takes from a text, the embedding of a layout, and the embeddings of all
timesteps. The modules that run are copies that share the model's weights, so the model itself stays as diffusers made it.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..denoise_step import AttentionControl, Condition, IdentityCache
from ..errors import UsageError
from ..model.model import Model
from .base import described, missing

ATTENTION = ("sdpa", "xformers")
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, what Pillow's "L" takes


@dataclass(frozen=True)
class PreparedControl:
    """An `AttentionControl` as the attention processors take it.

    Attributes:
        edited, sources: (n,) int64, the samples that are edited, and of each its source.
        whose: (B,) int64, whose self-attention map each sample takes.
        cross, own: (n, L, L) and (B, L, 1) of the networks' dtype; L counts the text's tokens.
        self_queries: as of `AttentionControl`.
    """

    edited: Tensor
    sources: Tensor
    whose: Tensor
    cross: Tensor
    own: Tensor
    self_queries: int

    @staticmethod
    def of(control: AttentionControl, dtype: torch.dtype) -> PreparedControl:
        edited = control.edited.nonzero().flatten()
        whose = torch.arange(len(control.edited), device=edited.device) - control.edited.long()
        return PreparedControl(edited, edited - 1, whose, control.cross[edited].to(dtype),
                               control.own.unsqueeze(-1).to(dtype), control.self_queries)  # fmt: skip


@dataclass
class PreparedCondition:
    """A condition as the networks take it.

    Attributes:
        condition: what it was made of.
        prompt_embeds: (B, L, D) in the networks' dtype.
        control_embeddings: ControlNet name -> (B, C0, h, w) embedding of the layout.
        scales: ControlNet name -> its scale, a scalar tensor.
        control: of the UNet's attention maps.
        features: of the T2I-Adapters, summed with their scales, one for each block on the way down.
        keys_values: attention module -> its keys and values of the text, (B, L, inner) each; filled at the first step.
    """

    condition: Condition
    prompt_embeds: Tensor
    control_embeddings: dict[str, Tensor]
    scales: dict[str, Tensor]
    control: PreparedControl | None = None
    features: list[Tensor] = field(default_factory=list)
    keys_values: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class CurrentCondition(threading.local):
    """The condition of the call that this thread is in; edits may run in several threads."""

    prepared: PreparedCondition | None = None


class Attention:
    """Attention processor that takes a text's keys and values from `current`; the rest is diffusers' AttnProcessor2_0.

    Args:
        current: None computes keys and values at every call.
        attention: "sdpa" (torch's own) or "xformers".
    """

    def __init__(self, current: CurrentCondition | None, attention: str):
        self.current, self.attention = current, attention

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        control: PreparedControl | None = None,
        **_: Any,
    ) -> Tensor:
        """See diffusers; `control` comes through the UNet's `cross_attention_kwargs`.

        Maps are never formed: as `(P @ M) @ V = P @ (M @ V)`, what is injected is an attention of the source's queries and keys to values
        that were moved, in place of maps that were.
        """
        query = attn.to_q(hidden_states)
        if encoder_hidden_states is None:
            key, value = attn.to_k(hidden_states), attn.to_v(hidden_states)
        else:
            prepared = None if self.current is None else self.current.prepared
            kept = None if prepared is None else prepared.keys_values.get(id(attn))
            key, value = kept or (attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
            if prepared is not None:
                prepared.keys_values[id(attn)] = (key, value)
        if control is None:
            mixed = self._mix(attn, query, key, value)
        elif encoder_hidden_states is None:
            whose = control.whose if query.shape[1] <= control.self_queries else slice(None)
            mixed = self._mix(attn, query[whose], key[whose], value)
        else:
            mixed = self._mix(attn, query, key, value * control.own)
            source, edited = control.sources, control.edited
            mixed[edited] += self._mix(attn, query[source], key[source], control.cross @ value[edited])
        mixed = attn.to_out[0](mixed)
        mixed = mixed + hidden_states if attn.residual_connection else mixed
        return mixed if attn.rescale_output_factor == 1 else mixed / attn.rescale_output_factor

    def _mix(self, attn: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, N, inner), (B, M, inner) and (B, M, inner) -> (B, N, inner), in heads."""
        query, key, value = (v.unflatten(-1, (attn.heads, -1)) for v in (query, key, value))
        if self.attention == "xformers":
            from xformers.ops import memory_efficient_attention

            mixed: Tensor = memory_efficient_attention(query, key, value)
        else:
            query, key, value = (v.transpose(1, 2) for v in (query, key, value))
            mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return mixed.flatten(2)

    @staticmethod
    def takes(attn: Any) -> bool:
        """Whether an attention module has nothing that this processor leaves out; the others keep diffusers' own."""
        extras = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj")
        return all(getattr(attn, name, None) is None or getattr(attn, name) is False for name in extras)


class TimeTable(nn.Module):
    """Timesteps (B,) -> the network's embeddings of them: one gather in place of sines, two products and an activation."""

    rows: Tensor

    def __init__(self, net: Any, timesteps: int):
        super().__init__()
        weight = next(net.time_embedding.parameters())
        with torch.no_grad():
            sines = net.time_proj(torch.arange(timesteps, device=weight.device)).to(weight.dtype)
            self.register_buffer("rows", net.time_embedding(sines), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        return self.rows.index_select(0, t)


class AsIs(nn.Module):
    """Passes its first argument on."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x


_ATOMS = frozenset((bool, int, float, str, type(None), torch.dtype))  # what need not be copied


def sharing(net: Any) -> Any:
    """A copy of a network that shares its weights.

    `copy.deepcopy` with the weights taken for copied, in less than half of its time (9.0 and 3.7 ms for a small UNet): nearly all that a module of torch holds are numbers, the modules
    in it, and a dozen dicts of hooks that are empty.
    """
    known: dict[int, Any] = {id(t): t for t in (*net.parameters(), *net.buffers())}

    def copied(value: Any) -> Any:
        kind = type(value)
        if kind in _ATOMS:
            return value
        if id(value) in known:
            return known[id(value)]
        if kind in (dict, OrderedDict):
            made = known[id(value)] = kind()
            for key, item in value.items():
                made[key] = item if type(item) in _ATOMS else copied(item)
        elif kind in (tuple, list, set) and _ATOMS.issuperset(map(type, value)):
            made = known[id(value)] = value if kind is tuple else value.copy()
        elif isinstance(value, nn.Module) and not hasattr(kind, "__deepcopy__"):
            made = known[id(value)] = object.__new__(kind)
            made.__dict__.update({k: v if type(v) in _ATOMS else copied(v) for k, v in value.__dict__.items()})
        else:
            made = copy.deepcopy(value, known)
        return made

    return copied(net)


def runnable(net: Any, timesteps: int, current: CurrentCondition | None, attention: str) -> Any:
    """A copy of a UNet or ControlNet that shares its weights, with `TimeTable` and `Attention` in place.

    Args:
        timesteps: that the table is made for, 0 to `timesteps - 1`.
    """
    made = sharing(net)
    made.time_proj, made.time_embedding = TimeTable(made, timesteps), AsIs()
    for part in made.modules():
        if hasattr(part, "set_processor") and Attention.takes(part):
            part.set_processor(Attention(current, attention))
    return made


def summed_residuals(outputs: Iterable[tuple[Sequence[Tensor], Tensor]]) -> dict[str, Any]:
    """What ControlNets add to a UNet, as keyword arguments of its call; none for no ControlNet.

    Args:
        outputs: of each ControlNet, scaled: the residuals of its blocks from the top down, and the middle's.
    """
    sums: list[Tensor] = []
    for down, mid in outputs:
        residuals = [*down, mid]
        sums = [a + b for a, b in zip(sums, residuals, strict=True)] if sums else residuals
    return {"down_block_additional_residuals": sums[:-1], "mid_block_additional_residual": sums[-1]} if sums else {}


def unet_extras(control: PreparedControl | None, features: Sequence[Tensor]) -> dict[str, Any]:
    """Control of attention and the features of T2I-Adapters as keyword arguments of a UNet's call; none where there is neither."""
    extras: dict[str, Any] = {} if control is None else {"cross_attention_kwargs": {"control": control}}
    if features:
        extras["down_intrablock_additional_residuals"] = list(features)  # the UNet takes them out of it
    return extras


def encode_image(vae: Any, images: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] and the VAE's dtype -> (B, C, h, w) float32: the posterior's mode, not scaled."""
    mode: Tensor = vae.encode(images).latent_dist.mode().float()
    return mode


def decode_latent(vae: Any, latents: Tensor) -> Tensor:
    """(B, C, h, w) unscaled and in the VAE's dtype -> (B, 3, H, W) float32, about [-1, 1]."""
    images: Tensor = vae.decode(latents).sample.float()
    return images


def why_not_xformers(device: torch.device) -> list[str]:
    """Reasons why xformers cannot compute attention on a device; empty if it can, which a small call has then shown."""
    absent = missing("xformers", extra="gpu")
    if absent:
        return absent
    if device.type != "cuda":
        return ["xformers has no attention for a CPU"]
    try:
        from xformers.ops import memory_efficient_attention

        probe = torch.zeros(1, 16, 1, 64, dtype=torch.float16, device=device)
        memory_efficient_attention(probe, probe, probe)
    except Exception as error:  # of a broken installation too, which may raise anything
        return [f"xformers cannot run here ({described(error)})"]
    return []


class TorchModules:
    """The networks of a `Model` as a backend of torch modules calls them.

    Args:
        attention: "sdpa" (torch's own) or "xformers".
        channels_last: convolution weights in that memory format, which tensor cores prefer; of the model itself.

    Raises:
        UsageError: that attention cannot run here.
    """

    keeps_text = True  # whether keys and values of a text are kept from step to step
    # With `channels_last`, whether activations are kept so by kernels of this project (`channels_last.py`).
    fuses = False
    held = 4  # prepared conditions that are kept; keys and values of one are 3.8 MB a sample for SD 1.5 in float16

    def __init__(self, model: Model, *, attention: str = "sdpa", channels_last: bool = False):
        if attention not in ATTENTION:
            raise UsageError(f"attention is {attention!r}, expected one of {', '.join(ATTENTION)}")
        why = why_not_xformers(model.device) if attention == "xformers" else []
        if why:
            raise UsageError(f"attention 'xformers' was requested but cannot run: {'; '.join(why)}")
        self.model, self.dtype = model, model.dtype
        self.current = CurrentCondition()
        timesteps, current = len(model.schedule.alphas_cumprod), self.current if self.keeps_text else None
        self.unet = runnable(model.unet, timesteps, current, attention)
        self.controlnets, self.embeddings = {}, {}
        for name, net in model.controlnets.items():
            made = runnable(net, timesteps, current, attention)
            self.embeddings[name], made.controlnet_cond_embedding = made.controlnet_cond_embedding, AsIs()
            self.controlnets[name] = made
        self.vae = model.vae
        if channels_last and self.fuses:
            from .channels_last import keep_channels_last

            self.vae = sharing(model.vae)
            for net in (self.unet, self.vae, *self.controlnets.values()):
                keep_channels_last(net)
        elif channels_last:
            for net in (self.unet, self.vae, *self.controlnets.values()):
                net.to(memory_format=torch.channels_last)
        self._conditions: IdentityCache[PreparedCondition] = IdentityCache(self.held)

    def why_not(self, module: str, batch: int, height: int, width: int) -> list[str]:
        """No reasons: torch modules take every shape."""
        return []

    def prepared(self, condition: Condition) -> PreparedCondition:
        """A condition as the networks take it; the same object for the same condition."""
        return self._conditions.get([condition], lambda: self._prepare(condition))

    def _prepare(self, condition: Condition) -> PreparedCondition:
        nets = [c for c in condition.controls if not c.adapter]
        embeddings = {c.name: self.control_embedding(c.name, c.image) for c in nets}
        prompt_embeds = condition.prompt_embeds.to(self.dtype)
        scales = {c.name: prompt_embeds.new_tensor(c.scale) for c in nets}
        control = None if condition.attention is None else PreparedControl.of(condition.attention, self.dtype)
        features: list[Tensor] = []
        for c in condition.controls:
            if c.adapter:
                own = [c.scale * f for f in self.adapter_features(c.name, c.image)]
                features = [a + b for a, b in zip(features, own, strict=True)] if features else own
        return PreparedCondition(condition, prompt_embeds, embeddings, scales, control, features)

    @torch.no_grad()
    def adapter_features(self, name: str, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) layout maps in [0, 1] -> a T2I-Adapter's features, (B, C, h, w) for each block on the way down; unscaled."""
        net = self.model.adapters[name]
        if net.config.in_channels == 1:  # as a picture in colour becomes grey
            images = (images * images.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)
        features: list[Tensor] = net(images.to(self.dtype))
        return features

    @torch.no_grad()
    def control_embedding(self, name: str, images: Tensor) -> Tensor:
        """(B, 3, H, W) layout maps in [0, 1] -> (B, C0, h, w) embedding in the networks' dtype."""
        embedding: Tensor = self.embeddings[name](images.to(self.dtype))
        return embedding
