"""The way into a model and out of it: pictures to latents and back, texts to prompt embeddings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .backends.base import Modules
from .backends.torch_modules import decode_latent, encode_image
from .errors import RunError
from .model.model import Model

Note = Callable[[str], None]


class Codec:
    """A model's VAE and text encoder, with all that surrounds a call of them.

    Args:
        modules: the backend that runs them; None is eager torch, for a denoiser that answers for nothing else.
    """

    def __init__(self, model: Model, modules: Modules | None = None):
        self.model, self.modules = model, modules

    @property
    def scaling(self) -> float:
        """What the VAE's latents are multiplied by, once they are shifted."""
        return float(self.model.vae.config.scaling_factor)

    @property
    def shift(self) -> float:
        """What the VAE's latents are shifted by; Stable Diffusion's are not."""
        return float(getattr(self.model.vae.config, "shift_factor", None) or 0.0)

    @torch.no_grad()
    def encode(self, images: Tensor, note: Note | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, h, w) float32: the posterior's mode, less the shift, times the scaling factor.

        `note` is told when the VAE overflowed in its own dtype and float32 was used.

        Raises:
            RunError: NaN or infinity in float32 too.
        """
        images = images.to(self.model.device)
        if self.modules is None:
            latents = encode_image(self.model.vae, images.to(self.model.dtype))
        else:
            latents = self.modules.encode_image(images)
        if not _is_finite(latents):
            latents = encode_image(self._float32_vae("encoding", note), images.float())
        if not _is_finite(latents):
            raise RunError("stage encode: the VAE returned NaN or infinity, in float32 too; check the checkpoint")
        return (latents - self.shift) * self.scaling

    @torch.no_grad()
    def decode(self, latents: Tensor, note: Note | None = None) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W) float32, about [-1, 1]: the inverse of `encode`, and the same `note`.

        Raises:
            RunError: NaN or infinity in float32 too.
        """
        z = latents.to(self.model.device) / self.scaling + self.shift
        if self.modules is None:
            images = decode_latent(self.model.vae, z.to(self.model.dtype))
        else:
            images = self.modules.decode_latent(z)
        if not _is_finite(images):
            images = decode_latent(self._float32_vae("decoding", note), z.float())
        if not _is_finite(images):
            raise RunError(
                "stage decode: the VAE returned NaN or infinity, in float32 too; try a smaller guidance scale"
            )
        return images

    def _float32_vae(self, what: str, note: Note | None) -> Any:
        """A copy, because other threads may be using the VAE in its own dtype."""
        backend = getattr(self.modules, "name", "torch")
        if note is not None:
            dtype = str(self.model.dtype).removeprefix("torch.")
            where = f"in {dtype}" if backend == "torch" else f"on backend {backend}"
            note(f"the VAE gave NaN {where}; {what} was repeated in float32")
        return copy.deepcopy(self.model.vae).float()

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str], chunks: int = 1) -> Tensor:
        """(B, chunks * L, D) float32 prompt embeddings; texts of fewer chunks are filled up with empty ones."""
        tokenizer, length = self.model.tokenizer, self.model.text_length
        begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        rows = []
        for text in texts:
            parts = token_chunks(self.model, text)
            for ids in parts + [[]] * (chunks - len(parts)):
                row = [begin, *ids, end]
                rows.append(row + [pad] * (length - len(row)))
        tokens = torch.tensor(rows, device=self.model.device)
        if self.modules is None:
            prompt_embeds: Tensor = self.model.text_encoder(tokens)[0].float()
        else:
            prompt_embeds = self.modules.encode_tokens(tokens)
        return prompt_embeds.reshape(len(texts), -1, prompt_embeds.shape[-1])


def token_chunks(model: Model, text: str) -> list[list[int]]:
    """Token ids of a prompt, cut where the text encoder can take no more; a long prompt has several chunks, an empty one one."""
    room = model.text_length - 2  # each chunk has a token for its beginning and one for its end
    ids = model.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
    return [ids[i : i + room] for i in range(0, len(ids), room)] or [[]]


def _is_finite(values: Tensor) -> bool:
    """By NumPy on a CPU: for a picture torch wakes its other threads, which takes longer than to look at it."""
    if values.device.type == "cpu":
        return bool(np.isfinite(values.detach().float().numpy()).all())
    return bool(torch.isfinite(values).all())
