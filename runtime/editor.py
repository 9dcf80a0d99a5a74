"""The public API: `Editor.edit(EditRequest) -> EditResult`. The main path itself is `pipeline.Pipeline.run`.

Requests that can share network calls (same size, method, steps and options) run as one pipeline, stage by stage; every
stage first asks the cache for what it has (see `stage_cache`), so a second edit of the same image runs only what changed.

    encode -> mask -> invert -> guidance -> invert-guidance -> (refine -> invert-guidance ->) final -> decode    ito
    encode -> mask -> invert -> sample -> decode                                                            diffedit
    encode -> (mask) -> invert -> sample -> decode                                                    p2p, ddpm
    encode -> (mask) -> sample -> decode                                                        sdedit, iedit, ip2p
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import METHODS
from . import images as pictures
from . import receipt as receipts
from .backends import check_backend, load_backend
from .backends.base import Backend, Denoiser
from .codec import Codec, token_chunks
from .denoise_step import Condition, ControlInput
from .errors import UsageError
from .model.checkpoint import PICTUREBOOK, check_engines
from .model.model import Model, load_model
from .network import Network
from .options import RATIOS, ItoSettings, MaskOptions, Options
from .pipeline import Pipeline, group_key, vae_batches
from .profile import Callback, Profile
from .request import EditRequest, EditResult, PreparedRequest, check_request
from .sampling import masked_sampling
from .schedule import seeded_noise
from .stage_cache import StageCache

__all__ = ["METHODS", "RATIOS", "EditRequest", "EditResult", "Editor", "ItoSettings", "MaskOptions", "Options"]


MEMORY = 1 << 30  # bytes that one network call's activations may take, unless told otherwise


def samples_per_call(model: Model, height: int, width: int, memory: int = MEMORY) -> int:
    """Samples that one call of the UNet may have for latents of height x width cells.

    60 floats per latent cell and channel of the first level is what a UNet of SD's shape holds at its peak.
    """
    cells = width * height * int(model.unet.config.block_out_channels[0])
    return max(1, memory // (cells * 60 * 4))


class Editor:
    """A loaded model with its backend and stage cache. `edit` may be called from several threads.

    Args:
        model: a loaded checkpoint.
        denoiser: what answers for the UNet and ControlNets; a `backends.base.Backend` answers for the other modules too.
        backend: its name, for the receipt and the cache; its own by default.
        cache: stage results; None makes one of 512 MiB in memory.
        memory: bound in bytes for one network call's activations; decides how many samples share a call.
        share: the inversion of the input shares network calls with the guidance image, 75 sequential steps in place of 100.
            A network rounds differently in another batch, so an edit whose inversion the cache held differs from a fresh one by
            that rounding: with the clipped update by at most 1 of 255, with Adam's by up to 30. Without sharing not at all.
    """

    def __init__(
        self,
        model: Model,
        denoiser: Denoiser,
        *,
        backend: str | None = None,
        cache: StageCache | None = None,
        memory: int = MEMORY,
        share: bool = True,
    ):
        # A bare denoiser (a test's, a user's own network) leaves the other modules to eager torch.
        self.model, self.codec = model, Codec(model, denoiser if isinstance(denoiser, Backend) else None)
        self.denoiser, self.backend = denoiser, backend or str(getattr(denoiser, "name", "torch"))
        self.cache = StageCache() if cache is None else cache
        self.memory, self.share = memory, share
        self.folders = [model.folder]  # their paths are left out of receipts

    @classmethod
    def load(
        cls,
        model: str = PICTUREBOOK,
        layouts: Mapping[str, str] | Sequence[str] | None = None,
        backend: str = "auto",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        cache: StageCache | None = None,
        memory: int = MEMORY,
        share: bool = True,
        engines: str | os.PathLike[str] | None = None,
        used_layouts: Collection[str] | None = None,
        **options: Any,
    ) -> Editor:
        """Load the embedded model, a diffusers folder or a hub id (see `model.load_model`) and its backend.

        Args:
            backend: torch, compile, onnx, tensorrt, or auto: per module and shape the first that can run.
            engines: folder of exported engines; by default the user's cache, by the weights' digest.
            used_layouts: names of the layouts that requests will have; the networks of others are not loaded. None loads them all.
            options: of the backends: `attention`, `channels_last` and `trust_engines`, see `backends.load_backend`.

        Raises:
            UsageError: the model cannot be loaded, or the backend is not one that can run.
        """
        check_backend(backend)
        check_engines(engines)
        loaded = load_model(model, layouts, device=device, dtype=dtype, used_layouts=used_layouts)
        runs = load_backend(backend, loaded, None if engines is None else Path(engines), **options)
        editor = cls(loaded, runs, cache=cache, memory=memory, share=share)
        editor.folders += [] if engines is None else [Path(engines)]
        return editor

    # --- public calls -------------------------------------------------------------------------------------------

    def edit(self, request: EditRequest, callback: Callback | None = None) -> EditResult:
        """Run one edit. `callback` sees every step and cancels by returning False.

        Raises:
            UsageError: the request cannot be run as asked; nothing has been run.
            RunError: NaN from a network (stage and step named), or out of memory with the smallest batch.
            Cancelled: the callback said so.
        """
        return self.edit_many([request], callback)[0]

    @torch.no_grad()
    def edit_many(self, requests: Sequence[EditRequest], callback: Callback | None = None) -> list[EditResult]:
        """Run several edits, batched where size, method, steps and options agree (lambda and seed may differ).

        Each result equals its single run up to the network's own rounding between batch sizes: with the clipped update within
        1 of 255, with Adam's within some 30.
        """
        # A request that is none, or without options, is named by its check.
        lambdas = [r.options.lam for r in requests if isinstance(r.options, Options)]
        prepared = [check_request(self.model, r, lambdas) for r in requests]
        pipelines = self._pipelines(prepared, callback)
        results: dict[int, EditResult] = {}
        evaluated = 0
        for number, pipeline in enumerate(pipelines):
            # The progress runs over all pipelines: what those before this one evaluated, and what is expected of the rest.
            pipeline.profile.before = evaluated
            pipeline.profile.expected = evaluated + sum(p.expected() for p in pipelines[number:])
            for r, result in zip(pipeline.requests, self._finish(pipeline, pipeline.run()), strict=True):
                results[id(r)] = result
            evaluated += sum(pipeline.profile.evaluations.values())
        return [results[id(r)] for r in prepared]

    @torch.no_grad()
    def mask(self, request: EditRequest, callback: Callback | None = None) -> tuple[Image.Image | None, Profile]:
        """Only the mask that `edit` would use: "L", white where the edit is allowed; None where there is none."""
        prepared = check_request(self.model, request)
        (pipeline,) = self._pipelines([prepared], callback)
        pipeline.profile.expected = pipeline.expected()
        pipeline.run(only_mask=True)
        for note in prepared.notes:  # the profile is this one request's
            pipeline.profile.note(note)
        return prepared.edited_area(), pipeline.profile

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        layouts: Mapping[str, Sequence[Image.Image]] | None = None,
        seeds: Sequence[int] | None = None,
        steps: int = 25,
        guidance_scale: float | None = None,
        size: tuple[int, int] | None = None,
        guidance_until: float | None = None,
        eta: float | None = None,
    ) -> list[Image.Image]:
        """Plain text-to-image, to see what a model can draw.

        Args:
            layouts: name -> one map per prompt.
            seeds: one per prompt; 0, 1, ... by default.
            size: (width, height); the UNet's training size by default.
            guidance_until: share of the steps, the noisiest first, with guidance; what the checkpoint recommends by default, else 1.
            eta: share of each level's noise that is fresh: 0 is DDIM, 1 is DDPM (DDIM Eq. 16), whose errors do not add up from step to step;
                what the checkpoint recommends by default, else 0.
        """
        model, profile = self.model, Profile()
        if size is None and model.side is None:
            raise UsageError("size: the model's config does not say what it was trained on; give (width, height)")
        width, height = size or (model.side or 0, model.side or 0)
        chunks = max(len(token_chunks(model, p)) for p in prompts)
        maps = {n: torch.cat([(pictures.to_tensor(m) + 1) / 2 for m in ms]) for n, ms in (layouts or {}).items()}
        condition = Condition(
            self.codec.encode_text(prompts, chunks),
            tuple(ControlInput(n, m.to(model.device), 1.0, n in model.adapters) for n, m in maps.items()),
        )
        uncond = condition.with_prompt(self.codec.encode_text([""], chunks))
        shape = (model.channels, height // model.vae_scale_factor, width // model.vae_scale_factor)
        numbers = range(len(prompts)) if seeds is None else seeds
        levels = model.schedule.levels(steps)
        noise = torch.stack([seeded_noise(s, "generate", shape) for s in numbers]).to(model.device)
        scale = model.guidance_scale if guidance_scale is None else guidance_scale
        until = (
            (1.0 if model.guidance_until is None else model.guidance_until)
            if guidance_until is None
            else guidance_until
        )
        network = Network(self.denoiser, model.schedule.prediction, self.max_batch(shape), profile)
        path, share = levels.path(), (model.generate_eta or 0.0) if eta is None else eta
        if not 0 <= share <= 1:
            raise UsageError(f"eta is {share:g}, expected 0 (DDIM) to 1 (DDPM)")
        fresh = None
        if share and steps > 1:  # of each picture its own, so that a batch is its pictures
            fresh = torch.stack([
                torch.stack([seeded_noise(s, f"generate-{number}", shape) for s in numbers]) for number in range(steps - 1)
            ]).to(model.device)  # fmt: skip
        with profile.stage("sample"):
            sampler = masked_sampling(
                noise, path, condition, uncond, scale, guided=round(steps * until), eta=share, noise=fresh
            )
            latents = network.run(sampler, steps)
        return [pictures.to_image(i) for i in vae_batches(self.codec.decode, latents)]

    def reconstruct(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """The VAE's round trip of pictures whose size the model takes."""
        latents = vae_batches(self.codec.encode, torch.cat([pictures.to_tensor(i) for i in images]))
        return [pictures.to_image(i) for i in vae_batches(self.codec.decode, latents)]

    def max_batch(self, shape: tuple[int, ...]) -> int:
        """Samples per network call for latents of `shape` (C, h, w) within the memory setting."""
        return samples_per_call(self.model, shape[-2], shape[-1], self.memory)

    # --- running ------------------------------------------------------------------------------------------------

    def _pipelines(self, requests: list[PreparedRequest], callback: Callback | None) -> list[Pipeline]:
        """One pipeline for every group of requests that can share network calls."""
        groups: dict[str, list[PreparedRequest]] = {}
        for r in requests:
            groups.setdefault(group_key(r), []).append(r)
        pipelines = []
        for members in groups.values():
            height, width = members[0].pixels.shape[-2:]
            shape = (self.model.channels, height // self.model.vae_scale_factor, width // self.model.vae_scale_factor)
            profile, most = Profile(callback=callback, notes=list(self.model.notes)), self.max_batch(shape)
            with_model = (self.model, self.codec, self.denoiser, self.backend)
            pipelines.append(Pipeline(*with_model, members, self.cache, profile, most, self.share))
        return pipelines

    def _finish(self, pipeline: Pipeline, stage: str) -> list[EditResult]:
        """Composites, pictures and receipts of a pipeline whose clean latents are the results of `stage`."""
        requests, options, profile = pipeline.requests, pipeline.options, pipeline.profile
        pipeline.composite(stage)
        with profile.stage("decode"):
            decoded = pipeline.vae(self.codec.decode, torch.stack([r.results[stage] for r in requests]))
            results = []
            for r, pixels in zip(requests, decoded, strict=True):
                image, mask = pictures.crop_back(pictures.to_image(pixels), r.size), r.edited_area()
                if r.full is not None:
                    image, mask = pictures.paste_enlarged(r.full, image, mask, options.feather)
                elif options.composite == "pixel" and mask is not None:
                    image = pictures.paste(pictures.as_rgb(r.request.image), image, mask, options.feather)
                # Copies: what the caller does with them must not reach the cache.
                latent, source = (r.results[s].cpu().clone() for s in (stage, "encode"))
                guidance = r.results["guidance"].cpu().clone() if "guidance" in r.results else None
                receipt = receipts.of_edit(r, mask, profile, self.model, self.backend, self.share)
                receipt, draw = receipts.without_paths(receipt, *self.folders), partial(self._draw, size=r.size)
                results.append(EditResult(image, mask, guidance, latent, source, profile, receipt, draw))
        return results

    def _draw(self, latent: Tensor, size: tuple[int, int]) -> Image.Image:
        """A latent (C, h, w) as a picture of `size` (width, height)."""
        return pictures.crop_back(pictures.to_image(self.codec.decode(latent.unsqueeze(0))[0]), size)
