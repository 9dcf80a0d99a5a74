"""Eager PyTorch: the backend that runs everywhere and that the others are measured against.

What does not change from step to step is computed once: the keys and values that cross-attention takes from a text, the
embedding of a layout, and the embeddings of all timesteps. The modules that run are copies that share the model's weights,
so the model itself stays as diffusers made it.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..denoise_step import Condition, IdentityCache
from ..errors import UsageError
from ..model.model import Model
from ..profile import current, module_call

ATTENTION = ("sdpa", "xformers")


def why_unavailable() -> list[str]:
    """No reasons: eager PyTorch runs everywhere."""
    return []


@dataclass
class Prepared:
    """What one condition is to the networks.

    Attributes:
        condition: kept, so that its identity stays its own.
        text: its states in the networks' dtype.
        hints: ControlNet name -> (B, C0, h, w) embedding of the layout.
        scales: ControlNet name -> its scale, a scalar tensor.
        kv: attention module -> its keys and values of the text, (B, L, inner) each; filled at the first step.
    """

    condition: Condition
    text: Tensor
    hints: dict[str, Tensor]
    scales: dict[str, Tensor]
    kv: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Running(threading.local):
    """The condition that this thread's call is about; edits may run in several threads."""

    prepared: Prepared | None = None


class Attention:
    """Attention processor: a text's keys and values from `running` (None: computed), the rest as diffusers' AttnProcessor2_0."""

    def __init__(self, running: Running | None, attention: str):
        self.running, self.attention = running, attention

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        query = attn.to_q(hidden_states)
        if encoder_hidden_states is None:
            key, value = attn.to_k(hidden_states), attn.to_v(hidden_states)
        else:
            held = None if self.running is None else self.running.prepared
            found = None if held is None else held.kv.get(id(attn))
            key, value = found or (attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
            if held is not None:
                held.kv[id(attn)] = (key, value)
        query, key, value = (v.unflatten(-1, (attn.heads, -1)) for v in (query, key, value))
        if self.attention == "xformers":
            from xformers.ops import memory_efficient_attention

            mixed = memory_efficient_attention(query, key, value)
        else:
            query, key, value = (v.transpose(1, 2) for v in (query, key, value))
            mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        mixed = attn.to_out[0](mixed.flatten(2))
        return (mixed + hidden_states if attn.residual_connection else mixed) / attn.rescale_output_factor

    @staticmethod
    def takes(attn: Any) -> bool:
        """Whether the module is plain enough; the others keep diffusers' own processor."""
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


def sharing_weights(module: Any) -> Any:
    """A copy of a module tree with the very same parameters and buffers."""
    return copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})


def runnable(net: Any, timesteps: int, running: Running | None, attention: str) -> Any:
    """A copy of a UNet or ControlNet that shares its weights, with what this module's docstring says in place."""
    made = sharing_weights(net)
    made.time_proj, made.time_embedding = TimeTable(made, timesteps), AsIs()
    for part in made.modules():
        if hasattr(part, "set_processor") and Attention.takes(part):
            part.set_processor(Attention(running, attention))
    return made


def why_not_xformers(device: torch.device) -> list[str]:
    """Reasons why xformers cannot compute attention on a device; empty if it can, which a small call has then shown."""
    import importlib.util

    if importlib.util.find_spec("xformers") is None:
        return ['xformers is not installed (pip install "iedit[gpu]")']
    if device.type != "cuda":
        return ["xformers has no attention for a CPU"]
    try:
        from xformers.ops import memory_efficient_attention

        probe = torch.zeros(1, 16, 1, 64, dtype=torch.float16, device=device)
        memory_efficient_attention(probe, probe, probe)
    except (ImportError, NotImplementedError, RuntimeError) as error:
        return [f"xformers cannot run here ({(str(error).splitlines() or [type(error).__name__])[0]})"]
    return []


@contextlib.contextmanager
def told_of(network: Any, stage: str) -> Iterator[None]:
    """While a half of a VAE runs in `stage`, the profile is told of each of its residual blocks as a step: a large picture takes
    minutes on a CPU. Another thread's call of the same network passes the same hooks, and tells its own profile.
    """
    named = [(name, part) for name, part in network.named_modules() if type(part).__name__ == "ResnetBlock2D"]
    if stage == "decode":  # which begins in the middle; the encoder ends there
        named.sort(key=lambda one: not one[0].startswith("mid_block"))
    blocks = [part for _, part in named]

    def hook(number: int) -> Any:
        def tell(*_: Any) -> None:
            running = current()
            if running is not None and running.stage_name == stage:
                running.step(number, len(blocks))

        return tell

    handles = [block.register_forward_pre_hook(hook(i)) for i, block in enumerate(blocks, 1)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class TorchBackend:
    """The parts of a `Model`, called as diffusers does; residuals of several ControlNets are summed.

    Args:
        attention: "sdpa" (torch's own) or "xformers".
        channels_last: convolution weights in that memory format, which tensor cores prefer; of the model itself.

    Raises:
        UsageError: that attention cannot run here.
    """

    name = "torch"
    keeps_text = True  # keys and values of a text across steps
    held = 4  # conditions whose keys and values are kept; SD 1.5 has 3.8 MB of them a sample in float16

    def __init__(self, model: Model, *, attention: str = "sdpa", channels_last: bool = False):
        if attention not in ATTENTION:
            raise UsageError(f"attention is {attention!r}, expected one of {', '.join(ATTENTION)}")
        why = why_not_xformers(model.device) if attention == "xformers" else []
        if why:
            raise UsageError(f"attention 'xformers' was requested but cannot run: {'; '.join(why)}")
        self.model, self.dtype, self.attention, self.channels_last = model, model.dtype, attention, channels_last
        self.running = Running()
        steps, running = len(model.schedule.alphas_cumprod), self.running if self.keeps_text else None
        self.unet = runnable(model.unet, steps, running, attention)
        self.controlnets, self.embeddings = {}, {}
        for name, net in model.controlnets.items():
            made = runnable(net, steps, running, attention)
            self.embeddings[name], made.controlnet_cond_embedding = made.controlnet_cond_embedding, AsIs()
            self.controlnets[name] = made
        if channels_last:
            for net in (self.unet, model.vae, *self.controlnets.values()):
                net.to(memory_format=torch.channels_last)
        self._cache: IdentityCache[Prepared] = IdentityCache(self.held)

    def why_not(self, module: str, batch: int, height: int, width: int) -> list[str]:
        return []

    def _prepared(self, condition: Condition) -> Prepared:
        return self._cache.get([condition], lambda: self._prepare(condition))

    def _prepare(self, condition: Condition) -> Prepared:
        hints = {c.name: self.hint(c.name, c.image) for c in condition.controls}
        text = condition.prompt_embeds.to(self.dtype)
        scales = {c.name: torch.tensor(c.scale, dtype=text.dtype, device=text.device) for c in condition.controls}
        return Prepared(condition, text, hints, scales)

    @torch.no_grad()
    def hint(self, name: str, maps: Tensor) -> Tensor:
        """(B, 3, H, W) map in [0, 1] -> (B, C0, h, w) embedding in the networks' dtype."""
        embedded: Tensor = self.embeddings[name](maps.to(self.dtype))
        return embedded

    @torch.no_grad()
    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `base.Denoiser`."""
        self.running.prepared = ready = self._prepared(condition)
        try:
            return self._predict(x.to(self.dtype), t, ready)
        finally:
            self.running.prepared = None

    def _predict(self, x: Tensor, t: Tensor, ready: Prepared) -> Tensor:
        extra: dict[str, Any] = {}
        for name, scale in ((c.name, c.scale) for c in ready.condition.controls):
            with module_call(f"controlnet-{name}", self.name, len(x), device=x.device):
                down, mid = self.controlnets[name](
                    x, t, ready.text, controlnet_cond=ready.hints[name], conditioning_scale=scale, return_dict=False
                )
            if extra:
                down = [a + b for a, b in zip(extra["down_block_additional_residuals"], down, strict=True)]
                mid = extra["mid_block_additional_residual"] + mid
            extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        with module_call("unet", self.name, len(x), device=x.device):
            output: Tensor = self.unet(x, t, ready.text, return_dict=False, **extra)[0].float()
        return output

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        blocks = told_of(self.model.vae.encoder, "encode")
        with blocks, module_call("vae_encoder", self.name, len(images), device=images.device):
            mode: Tensor = self.model.vae.encode(images.to(self.dtype)).latent_dist.mode().float()
        return mode

    @torch.no_grad()
    def decode_latent(self, latents: Tensor) -> Tensor:
        blocks = told_of(self.model.vae.decoder, "decode")
        with blocks, module_call("vae_decoder", self.name, len(latents), device=latents.device):
            images: Tensor = self.model.vae.decode(latents.to(self.dtype)).sample.float()
        return images

    @torch.no_grad()
    def encode_tokens(self, ids: Tensor) -> Tensor:
        with module_call("text_encoder", self.name, len(ids), device=ids.device):
            states: Tensor = self.model.text_encoder(ids)[0].float()
        return states
