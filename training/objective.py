"""What iEdit's fine-tuning minimises (sections 3.3 and 3.4): pairs as batches of tensors, and the terms of Eq. 12 of a batch.

The source's latent under noise (Eq. 2) goes through the UNet with the edit prompt, and the prediction is held to the noise of the
pseudo-target and of the source (Eqs. 3-4 or 8-9), and, decoded (Eqs. 6-7), to the prompts and to the pseudo-target's looks (Eqs. 5, 10,
11). `losses.py` has the equations; here is what they are given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..runtime.backends.torch_modules import decode_latent, encode_image
from ..runtime.codec import Codec
from ..runtime.images import mask_to_latent, shrink_mask, to_tensor
from ..runtime.model.model import Model
from ..runtime.schedule import to_epsilon
from . import losses

# What a term is called, and where it stands. "paired" and "mask" are two forms of the same term, of which one is needed.
LOSSES = {"paired": "Eq. 4", "mask": "Eqs. 8-9", "global": "Eq. 5", "local": "Eq. 11", "perceptual": "Eq. 10"}
DECODED = frozenset(("global", "local", "perceptual"))  # terms that look at the decoded prediction
GROUPS = ("input", "middle")


class Pairs(Protocol):
    """What is trained on; `pairs.PairDataset` is one. `digest` changes with everything in it."""

    @property
    def digest(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


# --- data ---------------------------------------------------------------------------------------------------------


def pair_number(sample: int, count: int, seed: int) -> int:
    """Which pair the `sample`-th sample of a run is: a new order of all `count` pairs in every epoch, by the seed alone."""
    epoch, place = divmod(sample, count)
    return int(np.random.default_rng([seed, epoch]).permutation(count)[place])


def squared(picture: Image.Image, side: int) -> Image.Image:
    """A picture with its shorter side at `side` pixels, its middle cut out; a mask ("L") keeps its thin parts."""
    scale = side / min(picture.size)
    size = (max(side, round(picture.width * scale)), max(side, round(picture.height * scale)))
    if picture.mode == "L":
        smaller = scale < 1
        picture = shrink_mask(picture, size) if smaller else picture.resize(size, Image.Resampling.NEAREST)
    elif size != picture.size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return picture.crop((left, top, left + side, top + side))


def as_mask(values: Any) -> Image.Image:
    """An array (H, W), or a picture, as an "L" mask: 255 where it is above 0."""
    return Image.fromarray(np.where(np.asarray(values) > 0, 255, 0).astype(np.uint8))


@dataclass(frozen=True)
class Batch:
    """B samples on the device that computes, float32.

    Attributes:
        source, target: (B, 3, S, S) in [-1, 1].
        source_mask, target_mask: (B, 1, S, S), 0 or 1.
        source_cells, target_cells: (B, 1, h, w), likewise, at the latent's resolution.
        prompts: edit prompts.
        differences: what each edit prompt asks for that the caption does not (`y_2^diff`).
        timesteps: (B,) int64 in [0, T).
        noise: (B, C, h, w), `eps_1`.
    """

    source: Tensor
    target: Tensor
    source_mask: Tensor
    target_mask: Tensor
    source_cells: Tensor
    target_cells: Tensor
    prompts: Sequence[str]
    differences: Sequence[str]
    timesteps: Tensor
    noise: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in self.__dict__.items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **moved)


def _latent_mask(mask: Image.Image, cells: int) -> Tensor:
    """(1, 1, cells, cells): area-averaged, and 1 from a half on, as the pairs' own; any cell that the mask touches where
    that would leave none."""
    values = np.asarray(mask, dtype=np.float32) / 255
    share = values.reshape(cells, len(values) // cells, cells, -1).mean(axis=(1, 3))
    half = torch.from_numpy((share >= 0.5).astype(np.float32)).view(1, 1, cells, cells)
    return half if bool(half.any()) else mask_to_latent(mask, (cells, cells), mask.size)


def make_batch(
    pairs: Pairs, numbers: Sequence[int], side: int, latent: tuple[int, int], timesteps: int, seed: int
) -> Batch:
    """The samples `numbers` of a run, on the CPU.

    Args:
        side: of the pictures, pixels.
        latent: channels of the latent, and its side in cells.
        timesteps: T.
    """
    channels, cells = latent
    chosen = [pairs[pair_number(number, len(pairs), seed)] for number in numbers]
    sources, targets = ([squared(p.convert("RGB"), side) for p in column] for column in (
        [p.source for p in chosen], [p.target for p in chosen]))  # fmt: skip
    source_masks, target_masks = ([squared(as_mask(m), side) for m in column] for column in (
        [p.source_mask for p in chosen], [p.target_mask for p in chosen]))  # fmt: skip
    times, noise = [], []
    for number in numbers:
        rng = torch.Generator().manual_seed(seed * 1_000_003 + number)
        times.append(torch.randint(0, timesteps, (1,), generator=rng))
        noise.append(torch.randn((1, channels, cells, cells), generator=rng))

    def pixels(masks: Sequence[Image.Image]) -> Tensor:
        return torch.stack([torch.from_numpy(np.array(m, dtype=np.float32) / 255)[None] for m in masks])

    return Batch(
        source=torch.cat([to_tensor(p) for p in sources]),
        target=torch.cat([to_tensor(p) for p in targets]),
        source_mask=pixels(source_masks),
        target_mask=pixels(target_masks),
        source_cells=torch.cat([_latent_mask(m, cells) for m in source_masks]),
        target_cells=torch.cat([_latent_mask(m, cells) for m in target_masks]),
        prompts=[p.edit_prompt for p in chosen],
        differences=[p.difference_prompts[1] for p in chosen],
        timesteps=torch.cat(times),
        noise=torch.cat(noise),
    )


# --- what is minimised ----------------------------------------------------------------------------------------------


class Objective:
    """The terms of Eq. 12 for a batch.

    Args:
        model: its UNet is trained; VAE and text encoder are frozen.
        names: of the terms, from `LOSSES`.
        clip, tokenizer: for `global` and `local`.
        features: for `perceptual`; see `losses.perceptual_loss`.
        autocast: makes the context that the networks run in.
    """

    def __init__(
        self,
        model: Model,
        names: Sequence[str],
        clip: losses.ClipEmbedder | None = None,
        tokenizer: Any = None,
        features: Callable[[Tensor], Tensor] | None = None,
        autocast: Callable[[], Any] = nullcontext,
    ):
        self.model, self.names, self.autocast = model, frozenset(names), autocast
        self.clip, self.tokenizer, self.features, self.codec = clip, tokenizer, features, Codec(model)
        self.abar = torch.tensor(model.schedule.alphas_cumprod, dtype=torch.float32, device=model.device)

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        with self.autocast():
            latents = encode_image(self.model.vae, images.to(self.model.vae.dtype))
        return (latents - self.codec.shift) * float(self.model.vae.config.scaling_factor)

    def _decode(self, latents: Tensor) -> Tensor:
        z = latents / float(self.model.vae.config.scaling_factor) + self.codec.shift
        with self.autocast():
            return decode_latent(self.model.vae, z.to(self.model.vae.dtype))

    @torch.no_grad()
    def _prompt_embeds(self, prompts: Sequence[str]) -> Tensor:
        """(B, L, D); a long prompt loses its end, as everywhere in training."""
        tokenizer = self.model.tokenizer
        tokens = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=self.model.text_length,
                           return_tensors="pt").input_ids  # fmt: skip
        with self.autocast():
            embeds: Tensor = self.model.text_encoder(tokens.to(self.model.device))[0].float()
        return embeds

    def _text_features(self, texts: Sequence[str]) -> Tensor:
        assert self.clip is not None
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        with self.autocast():
            return self.clip.texts(
                tokens.input_ids.to(self.model.device), tokens.attention_mask.to(self.model.device)
            ).float()

    def _epsilon(self, output: Tensor, z_t: Tensor, abar: Tensor) -> Tensor:
        prediction = self.model.schedule.prediction
        if prediction == "epsilon":
            return output
        return torch.stack([to_epsilon(o, x, float(a), prediction) for o, x, a in zip(output, z_t, abar, strict=True)])

    def terms(self, batch: Batch) -> losses.Terms:
        """Each term (B,), with a gradient to the trained weights."""
        named, abar = self.names, self.abar[batch.timesteps]
        z1, z2 = self._encode(batch.source), self._encode(batch.target)
        z_t = losses.noised_latent(z1, batch.noise, abar)
        noise2 = losses.target_noise(z_t, z2, abar)
        with self.autocast():
            output = self.model.unet(z_t, batch.timesteps, self._prompt_embeds(batch.prompts)).sample.float()
        predicted = self._epsilon(output, z_t, abar)
        if "mask" in named:
            foreground, background = losses.mask_loss(
                predicted, batch.noise, noise2, batch.source_cells, batch.target_cells
            )
            noise = foreground + background
        else:
            noise = losses.paired_loss(predicted, noise2)
        terms = losses.Terms(noise=noise)
        if not named & DECODED:
            return terms
        image = self._decode(losses.predicted_latent(z_t, predicted, abar))
        with self.autocast():
            if "global" in named:
                terms = dataclasses.replace(terms, global_clip=self._clip(image, batch.prompts))
            if "local" in named:
                masked = losses.masked_picture(image, batch.source_mask)
                terms = dataclasses.replace(terms, local_clip=self._clip(masked, batch.differences))
            if "perceptual" in named:
                assert self.features is not None
                perceptual = losses.perceptual_loss(
                    self.features, image, batch.target, batch.source_mask, batch.target_mask
                )
                terms = dataclasses.replace(terms, perceptual=perceptual)
        return terms

    def _clip(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        assert self.clip is not None
        return losses.clip_distance(self.clip.images(images).float(), self._text_features(texts))


def trained_groups(unet: Any) -> dict[str, list[nn.Parameter]]:
    """The parameters that are trained, by group: the input convolution with the down blocks, and the middle block (section 4.1)."""
    return {
        "input": [*unet.conv_in.parameters(), *unet.down_blocks.parameters()],
        "middle": [*unet.mid_block.parameters()],
    }


def group_of_step(step: int) -> str:
    """The group that optimiser step `step`, from 0, trains: they take turns."""
    return GROUPS[step % len(GROUPS)]
