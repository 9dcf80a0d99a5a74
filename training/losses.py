"""The losses of iEdit, Eqs. 2-12: pure functions of tensors, a value for each sample.

Shapes: latents and noise (B, C, h, w); pictures (B, 3, H, W) in [-1, 1] as the VAE's decoder returns them; masks (B, 1, ...) with 1 where
the edit is; abar (B,), the cumulative alpha of each sample's timestep. Index 1 is the source and 2 the pseudo-target. Everything is
computed in the dtype it comes in: give float32.

A loss is a value for each sample because Eq. 12 weights each by its own timestep: the noise of Eq. 3 has a standard deviation of 34 at t = 1
(SD's schedule), and only the weight t / T, applied before the mean over the batch, keeps such a sample from blowing up a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _per_sample(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def _mean(values: Tensor) -> Tensor:
    """(B, ...) -> (B,)."""
    return values.flatten(1).mean(1)


def noised_latent(z1: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """The source under noise, `z_t` (Eq. 2); (B, C, h, w)."""
    return _per_sample(abar.sqrt()) * z1 + _per_sample((1 - abar).sqrt()) * noise


def target_noise(z_t: Tensor, z2: Tensor, abar: Tensor) -> Tensor:
    """`eps_2`: the noise that would lead from `z_t` to the pseudo-target (Eq. 3); (B, C, h, w). Its size goes with 1 / sqrt(1 - abar)."""
    return (z_t - _per_sample(abar.sqrt()) * z2) / _per_sample((1 - abar).sqrt())


def predicted_latent(z_t: Tensor, predicted: Tensor, abar: Tensor) -> Tensor:
    """The clean latent that a predicted noise means, `z^_1` (Eq. 7); (B, C, h, w)."""
    return (z_t - _per_sample((1 - abar).sqrt()) * predicted) / _per_sample(abar.sqrt())


def paired_loss(predicted: Tensor, noise2: Tensor) -> Tensor:
    """Squared error of the predicted noise against `eps_2`, mean over the elements (Eq. 4); (B,)."""
    return _mean((noise2 - predicted) ** 2)


def mask_loss(predicted: Tensor, noise1: Tensor, noise2: Tensor, mask1: Tensor, mask2: Tensor) -> tuple[Tensor, Tensor]:
    """Foreground and background terms of the location-aware loss (Eqs. 8 and 9), mean over all elements; (B,) each.

    As printed: the foreground is inside the pseudo-target's mask and the background outside the source's, so a cell can be in both or
    in neither (`mask_overlap`).

    Args:
        mask1, mask2: (B, 1, h, w), 0 or 1, at the latent's resolution.
    """
    foreground = _mean((noise2 * mask2 - predicted * mask2) ** 2)
    background = _mean((noise1 * (1 - mask1) - predicted * (1 - mask1)) ** 2)
    return foreground, background


def mask_overlap(mask1: Tensor, mask2: Tensor) -> tuple[Tensor, Tensor]:
    """Share of the cells that both terms of Eq. 9 claim, and of those that neither does; (B,) each."""
    return _mean(mask2 * (1 - mask1)), _mean((1 - mask2) * mask1)


def clip_distance(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """`D_CLIP` of Eqs. 5 and 11: 1 - cosine of (B, D) embeddings; (B,) in [0, 2]."""
    return 1 - F.cosine_similarity(image_embeds, text_embeds, dim=-1)


def masked_picture(images: Tensor, mask: Tensor) -> Tensor:
    """`x (.) M`: black outside the mask.

    Pictures are multiplied in [0, 1], where nothing is black; in [-1, 1] it would be grey. (The paper leaves the range open.)

    Args:
        mask: (B, 1, H, W) at the resolution of the pictures.
    """
    return (images + 1) * mask - 1


def perceptual_loss(
    features: Callable[[Tensor], Tensor], image1: Tensor, image2: Tensor, mask1: Tensor, mask2: Tensor
) -> Tensor:
    """Squared error between the features of the masked prediction and of the masked pseudo-target (Eq. 10); (B,).

    Args:
        features: (B, 3, H, W) in [-1, 1] -> (B, ...); the paper's is VGG-16's relu3_3 (`VggFeatures`).
        image1: the decoded prediction, `x^_1`.
        image2: the pseudo-target; no gradient flows to it.
        mask1, mask2: (B, 1, H, W).
    """
    with torch.no_grad():
        wanted = features(masked_picture(image2, mask2))
    return _mean((features(masked_picture(image1, mask1)) - wanted) ** 2)


@dataclass(frozen=True)
class Terms:
    """The terms of Eq. 12, each (B,) and not weighted yet; a term that an ablation leaves out is None.

    Attributes:
        global_clip, local_clip: Eqs. 5 and 11.
        noise: Eq. 4 or, with masks, the sum of both terms of Eq. 8.
        perceptual: Eq. 10.
    """

    noise: Tensor
    global_clip: Tensor | None = None
    local_clip: Tensor | None = None
    perceptual: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """The terms that are there, by name."""
        return {k: v for k, v in self.__dict__.items() if v is not None}


def total_loss(terms: Terms, timesteps: Tensor, count: int, perceptual_weight: float = 0.1) -> Tensor:
    """`(1 - t/T) (L_loc + L_global) + t/T L_mask + lambda_perc L_perc`, mean over the batch (Eq. 12); a scalar.

    Args:
        timesteps: (B,) int64, in [0, T).
        count: T, the timesteps of the schedule.
        perceptual_weight: lambda_perc, which the paper does not give; 0.1 is ours.
    """
    share = timesteps.to(terms.noise.dtype) / count
    loss = share * terms.noise
    for clip in (terms.local_clip, terms.global_clip):
        if clip is not None:
            loss = loss + (1 - share) * clip
    if terms.perceptual is not None:
        loss = loss + perceptual_weight * terms.perceptual
    return loss.mean()


# --- networks that judge: frozen, but gradients flow through them to the picture ----------------------------------


class ClipEmbedder(nn.Module):
    """CLIP embeddings of pictures as tensors, prepared as CLIP's image processor does, so that gradients flow through.

    Args:
        clip: a transformers `CLIPModel`; it is frozen.
        processor: its `CLIPImageProcessor`, for size, crop, mean and standard deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, clip: Any, processor: Any):
        super().__init__()
        self.clip = clip.eval().requires_grad_(False)
        self.edge, self.crop = int(processor.size["shortest_edge"]), int(processor.crop_size["height"])
        self.register_buffer("mean", torch.tensor(processor.image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(processor.image_std).view(1, 3, 1, 1), persistent=False)

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the text model knows."""
        return int(self.clip.config.text_config.vocab_size)

    def prepare(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 3, crop, crop): bicubic to the shortest edge, middle cut out, normalised."""
        height, width = images.shape[-2:]
        short = min(height, width)
        size = (int(self.edge * height / short), int(self.edge * width / short))  # cut off, as the processor does
        pixels = (images + 1) / 2
        if size != (height, width):
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (size[0] - self.crop) // 2, (size[1] - self.crop) // 2
        pixels = pixels[..., top : top + self.crop, left : left + self.crop]
        return (pixels - self.mean) / self.std

    def images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, D)."""
        embeds: Tensor = self.clip.visual_projection(
            self.clip.vision_model(pixel_values=self.prepare(images)).pooler_output
        )
        return embeds

    @torch.no_grad()
    def texts(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, L) token ids -> (B, D)."""
        output = self.clip.text_model(input_ids=ids, attention_mask=attention_mask)
        embeds: Tensor = self.clip.text_projection(output.pooler_output)
        return embeds


VGG_WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256)  # convolutions up to conv3_3; 0 is a pooling
VGG_MEAN, VGG_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VggFeatures(nn.Module):
    """VGG-16 up to relu3_3 (Eq. 10), with torchvision's names of weights; frozen.

    Args:
        weights: by torchvision's names (`features.0.weight`, ...), of the whole network or of this part. None leaves random ones.
        widths: as `VGG_WIDTHS`; another network of this form may be narrower.

    Raises:
        ValueError: a weight is missing or has another shape.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Mapping[str, Tensor] | None = None, widths: tuple[int, ...] = VGG_WIDTHS):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in widths:
            if width == 0:
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.register_buffer("mean", torch.tensor(VGG_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(VGG_STD).view(1, 3, 1, 1), persistent=False)
        if weights is not None:
            own = self.state_dict()
            wrong = [k for k, v in own.items() if k not in weights or weights[k].shape != v.shape]
            if wrong:
                got = f"is {tuple(weights[wrong[0]].shape)}" if wrong[0] in weights else "is not there"
                raise ValueError(
                    f"vgg: {wrong[0]} {got}, expected {tuple(own[wrong[0]].shape)}; give a VGG-16 with torchvision's names"
                )
            self.load_state_dict({k: weights[k] for k in own})
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path) -> VggFeatures:
        """Read the weights of a VGG-16 from a `.safetensors` file or one that torchvision saved (`.pth`).

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: it cannot be read, or is no VGG-16 (or a narrower network of its form).
        """
        if not path.is_file():
            raise FileNotFoundError(f"vgg: {path} is not there; give a VGG-16 with torchvision's names of weights")
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                weights: Any = load_file(path)
            else:
                weights = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"vgg: {path} cannot be read ({(str(error).splitlines() or [type(error).__name__])[0][:200]})"
            ) from error
        if not isinstance(weights, Mapping):
            raise ValueError(f"vgg: {path} holds a {type(weights).__name__}, expected weights by name")
        widths, layer = list(VGG_WIDTHS), 0
        for i, width in enumerate(VGG_WIDTHS):
            weight = weights.get(f"features.{layer}.weight")
            if width and isinstance(weight, Tensor) and weight.ndim == 4:
                widths[i] = len(weight)
            layer += 2 if width else 1  # a convolution has its activation behind it
        return cls(weights, tuple(widths))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, D, H / 4, W / 4), D the last width, VGG-16's 256."""
        output: Tensor = self.features(((images + 1) / 2 - self.mean) / self.std)
        return output
