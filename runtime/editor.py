"""The public API: `Editor.edit(EditRequest) -> EditResult`. The main path itself is `pipeline.Pipeline.run`.

Requests that can share network calls (same size, method, steps and options) form a batch and run stage by stage; every
stage first asks the cache for what it has (see `stages.py`), so a second edit of the same image runs only what changed.

    encode -> mask -> invert -> guidance -> invert-guidance -> (refine ->) final -> decode       ito
    encode -> mask -> invert -> sample -> decode                                             diffedit
    encode -> (mask) -> sample -> decode                                            sdedit and iedit
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor

from . import METHODS, VERSION
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


class Editor:
    """A loaded model with its backend and stage cache. `edit` may be called from several threads.

    Args:
        model: a loaded checkpoint.
        denoiser: what answers for the UNet and ControlNets; a `backends.Backend` answers for the other modules too.
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
        memory: int = 1 << 30,
        share: bool = True,
    ):
        # A bare denoiser (a test's, a user's own network) leaves the other modules to eager torch.
        self.model, self.codec = model, Codec(model, denoiser if isinstance(denoiser, Backend) else None)
        self.denoiser, self.backend = denoiser, backend or str(getattr(denoiser, "name", "torch"))
        self.cache = StageCache() if cache is None else cache
        self.memory, self.share = memory, share
        self.folders = [model.folder]  # which receipts do not tell

    @classmethod
    def load(
        cls,
        model: str = PICTUREBOOK,
        layouts: Mapping[str, str] | Sequence[str] | None = None,
        backend: str = "torch",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        cache: StageCache | None = None,
        memory: int = 1 << 30,
        share: bool = True,
        engines: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Editor:
        """Load the embedded model, a diffusers folder or a hub id (see `models.load_model`) and its backend.

        Args:
            backend: torch, compile, onnx, tensorrt, or auto: the first that can run, per module and shape.
            engines: folder of exported engines; by default the user's cache, by the weights' digest.
            options: of the backends: `attention` and `channels_last` (`backend_torch.TorchBackend`), `trust_engines`
                (`backends.load_backend`).

        Raises:
            UsageError: the model cannot be loaded, or the backend is not one that can run.
        """
        check_backend(backend)
        check_engines(engines)
        loaded = load_model(model, layouts, device=device, dtype=dtype)
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

    def edit_many(self, requests: Sequence[EditRequest], callback: Callback | None = None) -> list[EditResult]:
        """Run several edits, batched where size, method, steps and options agree (lambda and seed may differ).

        Each result equals its single run up to the network's own rounding between batch sizes: with the clipped update within
        1 of 255, with Adam's within some 30.
        """
        lambdas = [r.options.lam for r in requests if isinstance(r.options, Options)]  # the check says who is none
        return self._run([check_request(self.model, r, lambdas) for r in requests], callback)

    def mask(self, request: EditRequest, callback: Callback | None = None) -> tuple[Image.Image | None, Profile]:
        """Only the mask that `edit` would use: "L", white where the edit is allowed; None where there is none."""
        result = self._run([check_request(self.model, request)], callback, only_mask=True)[0]
        for note in result.notes:  # the profile is this one request's
            result.profile.note(note)
        return result.mask, result.profile

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        layouts: Mapping[str, Sequence[Image.Image]] | None = None,
        seeds: Sequence[int] | None = None,
        steps: int = 25,
        guidance_scale: float | None = None,
        size: tuple[int, int] | None = None,
    ) -> list[Image.Image]:
        """Plain text-to-image with DDIM, to see what a model can draw.

        Args:
            layouts: name -> one map per prompt.
            seeds: one per prompt; 0, 1, ... by default.
            size: (width, height); the UNet's training size by default.
        """
        model, profile = self.model, Profile()
        if size is None and model.side is None:
            raise UsageError("size: the model's config does not say what it was trained on; give (width, height)")
        width, height = size or (model.side or 0, model.side or 0)
        chunks = max(len(token_chunks(model, p)) for p in prompts)
        maps = {n: torch.cat([(pictures.to_tensor(m) + 1) / 2 for m in given]) for n, given in (layouts or {}).items()}
        condition = Condition(
            self.codec.encode_text(prompts, chunks),
            tuple(ControlInput(n, m.to(model.device), 1.0) for n, m in maps.items()),
        )
        uncond = condition.with_prompt(self.codec.encode_text([""], chunks))
        shape = (model.channels, height // model.vae_scale_factor, width // model.vae_scale_factor)
        numbers = range(len(prompts)) if seeds is None else seeds
        levels = model.schedule.levels(steps)
        noise = torch.stack([seeded_noise(s, "generate", shape) for s in numbers]).to(model.device)
        scale = model.guidance_scale if guidance_scale is None else guidance_scale
        network = Network(self.denoiser, model.schedule.prediction, self.max_batch(shape), profile)
        with profile.stage("sample"):
            latents = network.run(masked_sampling(noise, levels.path(), condition, uncond, scale), steps)
        return [pictures.to_image(i) for i in vae_batches(self.codec.decode, latents)]

    def reconstruct(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """The VAE's round trip of pictures whose size the model takes."""
        latents = vae_batches(self.codec.encode, torch.cat([pictures.to_tensor(i) for i in images]))
        return [pictures.to_image(i) for i in vae_batches(self.codec.decode, latents)]

    def max_batch(self, shape: tuple[int, ...]) -> int:
        """Samples per network call for latents of `shape` (C, h, w) within the memory setting.

        60 floats per latent cell and channel of the first level is what a UNet of SD's shape holds at its peak.
        """
        cells = shape[-1] * shape[-2] * self.model.unet.config.block_out_channels[0]
        return max(1, self.memory // (cells * 60 * 4))

    # --- running ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _run(self, jobs: list[PreparedRequest], callback: Callback | None, only_mask: bool = False) -> list[EditResult]:
        """Every group of jobs as one batch; results in the order of the jobs."""
        groups: dict[str, list[PreparedRequest]] = {}
        for job in jobs:
            groups.setdefault(group_key(job), []).append(job)
        batches = []
        for members in groups.values():
            height, width = members[0].pixels.shape[-2:]
            shape = (self.model.channels, height // self.model.vae_scale_factor, width // self.model.vae_scale_factor)
            batches.append(
                Pipeline(
                    self.model,
                    self.codec,
                    self.denoiser,
                    self.backend,
                    members,
                    self.cache,
                    Profile(callback=callback, notes=list(self.model.notes)),
                    self.max_batch(shape),
                    self.share,
                )
            )
        ahead, behind, results = sum(b.expected() for b in batches), 0, {}
        for batch in batches:
            # The bar runs over all batches: what is done before this one, and what is expected in all.
            batch.profile.before, batch.profile.expected = behind, behind + ahead
            ahead -= batch.expected()
            for job, result in zip(batch.requests, self._finish(batch, batch.run(only_mask)), strict=True):
                results[id(job)] = result
            behind += sum(batch.profile.evaluations.values())
        return [results[id(job)] for job in jobs]

    def _finish(self, batch: Pipeline, stage: str) -> list[EditResult]:
        """Composite, decode, and write the receipts."""
        jobs, options, profile = batch.requests, batch.options, batch.profile
        batch.composite(stage)
        with profile.stage("decode"):
            decoded = batch.vae(self.codec.decode, torch.stack([j.results[stage] for j in jobs]))
            results = []
            for j, pixels in zip(jobs, decoded, strict=True):
                image, mask = pictures.crop_back(pictures.to_image(pixels), j.size), self._mask_picture(j)
                if j.full is not None:
                    image, mask = restored(j, image, mask)
                elif options.composite == "pixel" and mask is not None:
                    image = paste(pictures.as_rgb(j.request.image), image, mask, options.feather)
                # Copies: what the caller does with them must not reach the cache.
                latent, source = (j.results[s].cpu().clone() for s in (stage, "encode"))
                guidance = j.results["guidance"].cpu().clone() if "guidance" in j.results else None
                receipt, draw = self._receipt(j, mask, profile), partial(self._draw, size=j.size)
                results.append(EditResult(image, mask, guidance, latent, source, profile, receipt, draw))
        return results

    def _draw(self, latent: Tensor, size: tuple[int, int]) -> Image.Image:
        """A latent (C, h, w) as a picture of `size` (width, height)."""
        return pictures.crop_back(pictures.to_image(self.codec.decode(latent.unsqueeze(0))[0]), size)

    def _mask_picture(self, job: PreparedRequest) -> Image.Image | None:
        """Where the edit was allowed, at the size of the picture; see `EditResult.mask`."""
        if job.mask is None:
            return None
        if job.mask_picture is not None and (job.request.options.composite == "pixel" or job.full is not None):
            return job.mask_picture
        cells = (job.mask[0, 0].cpu() * 255).round().byte()
        large = Image.fromarray(cells.numpy()).resize(
            (job.pixels.shape[-1], job.pixels.shape[-2]), Image.Resampling.NEAREST
        )
        return pictures.crop_back(large, job.size)

    def _receipt(self, job: PreparedRequest, mask: Image.Image | None, profile: Profile) -> dict[str, Any]:
        r = job.request
        receipt: dict[str, Any] = {
            "iedit": VERSION,
            "model": {"name": self.model.name, "digest": self.model.digest, "schedule": self.model.schedule.digest,
                      "dtype": str(self.model.dtype).removeprefix("torch.")},
            "request": {"prompt": r.prompt, "source_prompt": r.source_prompt, "method": r.method, "seed": r.seed,
                        "steps": r.steps, "options": dataclasses.asdict(r.options)},
            "inputs": {"image": picture_digest(r.image), "mask": None if r.mask is None else picture_digest(r.mask),
                       "layouts": {n: picture_digest(p) for n, p in r.layouts.items()},
                       "source_layouts": {n: picture_digest(p) for n, p in r.source_layouts.items()}},
            "backend": {"name": self.backend, "device": str(self.model.device), "threads": torch.get_num_threads(), "share": self.share,
                        "modules": profile.ran(), "engines": profile.engines(), "fallbacks": profile.fallback_reasons()},
            "versions": versions(),
            "mask": None,
            "notes": [*job.notes, *profile.notes],
        }  # fmt: skip
        if mask is not None:
            area = round(pictures.mask_coverage(mask), 6)
            receipt["mask"] = {"area": area, "estimated": job.given_mask is None}
        return receipts.without_paths(receipt, *self.folders)


def restored(
    job: PreparedRequest, edited: Image.Image, mask: Image.Image | None
) -> tuple[Image.Image, Image.Image | None]:
    """An edit that was made on a smaller picture (`Options.resize`), at the size of the picture that was given, with its mask.

    With a mask all outside it is the given picture, bit for bit; without one everything is the edit, enlarged.
    """
    assert job.full is not None
    large = edited.resize(job.full.size, Image.Resampling.LANCZOS)
    if mask is None:
        return large, None
    mask = mask.resize(job.full.size, Image.Resampling.NEAREST)  # a given one is of that size already
    return paste(job.full, large, mask, job.request.options.feather), mask


def paste(source: Image.Image, edited: Image.Image, mask: Image.Image, feather: float) -> Image.Image:
    """The edited picture inside the mask, the source outside it, with a soft edge that lies inside the mask.

    Pixels outside the mask are the source's, bit for bit. The edge is a ramp over `feather` pixels, or over as many as the
    mask is deep where that is less; parts of a mask that are thinner than its edge get a hard one, for they would fade away.

    Args:
        source, edited: RGB of one size.
        mask: "L" of that size, 0 or 255.
        feather: width of the edge in pixels; up to 1 it is hard.
    """
    weight, inner, depth = np.asarray(mask, np.uint32), mask, 1
    while depth < round(feather):
        smaller = inner.filter(ImageFilter.MinFilter(3))
        if smaller.getbbox() is None:
            break
        inner, depth = smaller, depth + 1
        weight = weight + np.asarray(inner)
    ramp = Image.fromarray((weight / depth).round().astype(np.uint8))
    # Grown back by a pixel more than it was shrunk by: the corners of a thick part are not thin.
    thick = inner.filter(ImageFilter.MaxFilter(2 * depth + 1)) if depth > 1 else mask
    return Image.composite(edited, source, ImageChops.lighter(ramp, ImageChops.subtract(mask, thick)))


def picture_digest(image: Image.Image) -> str:
    """32 hex digits of a picture's mode, size and pixels."""
    return hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()[:32]


def versions() -> dict[str, str]:
    """Of everything that can change a pixel."""
    return dict(_versions())


@functools.cache  # to read them takes 7 ms, of an edit that can take 700
def _versions() -> dict[str, str]:
    from importlib import metadata

    # Torch says its build too (+cpu, +cu130), which the wheel's metadata may leave out.
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("diffusers", "transformers", "numpy", "pillow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found
