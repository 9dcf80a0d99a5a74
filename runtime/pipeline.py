"""The main path of an edit: one batch of requests that share every network call.

`Pipeline.run` is that path, top to bottom; the methods below it are its stages in the same order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from PIL import ImageOps
from torch import Tensor

from ..kernels.guided_step import blend
from ..kernels.mask_map import mask_map
from . import images as pictures
from .backends.base import Backend, Denoiser, Differentiable, refuse
from .codec import Codec
from .denoise_step import Condition, ControlInput, Sampler, joined
from .errors import RunError, UsageError
from .model.model import Model
from .model.module_io import ADAPTER_PREFIX, CONTROLLED_UNET
from .network import Network
from .options import DDPM, INVERTING, IP2P, ITO, P2P, RATIOS, UNMASKED, mask_mode
from .profile import Profile
from .request import PreparedRequest, estimates_mask
from .rivals import (
    NULL_TEXT_STEPS,
    IndependentReference,
    ddpm_invert,
    ddpm_sample,
    instruct,
    optimise_null_text,
    prompt_to_prompt,
)
from .sampling import (
    NoisedReference,
    Reference,
    TrajectoryReference,
    estimate_mask,
    invert,
    ito_pass,
    masked_sampling,
    rounding_level,
)
from .schedule import add_noise, seeded_noise
from .stage_cache import Stage, StageCache, StageRunner, key_of, tensor_digest

Requests = list[PreparedRequest]


class Pipeline:
    """Requests of one group (see `group_key`), at one model and backend.

    Args:
        requests: at least one; their results end up in `request.results`, stage by stage, and their masks in `request.mask`.
        backend: name of the backend, part of every key: backends round differently.
        max_batch: samples per network call.
        share: let stages that do not depend on each other share calls.
    """

    def __init__(
        self,
        model: Model,
        codec: Codec,
        denoiser: Denoiser,
        backend: str,
        requests: Requests,
        cache: StageCache,
        profile: Profile,
        max_batch: int,
        share: bool = True,
    ):
        self.model, self.codec, self.requests = model, codec, requests
        self.cache, self.profile, self.share = cache, profile, share
        first = requests[0].request
        self.method, self.options = first.method, first.options
        o = self.options
        assert o.guidance_scale is not None  # `check_request` has settled what was left to the checkpoint
        self.scale = o.guidance_scale
        schedule = model.schedule.spaced(o.timestep_spacing)
        self.levels = schedule.levels(requests[0].steps)
        ratio = RATIOS.get(self.method, 1.0) if o.ratio is None else o.ratio
        self.path = self.levels.path(self.levels.start(o.encoding_ratio if self.method == "ito" else ratio))
        height, width = requests[0].pixels.shape[-2:]
        self.guided_steps = o.guided_steps(len(self.path) - 1)
        self.shape = (model.channels, height // model.vae_scale_factor, width // model.vae_scale_factor)
        # Until the masks are known (`choose_lambdas`) every edit whose lambda is open counts as guided.
        self.guided = [r for r in requests if r.request.options.lam != 1] if self.method == "ito" else []
        self.prompt_embeds: dict[str, Tensor] = {}
        mask = o.mask.settled(model, self.method)  # a request settles it only where it estimates a mask
        assert mask.strength is not None and mask.threshold is not None and mask.seeds is not None
        self.mask_mode = mask_mode(self.method, o.mask.mode)
        self.strength, self.threshold, self.seeds = mask.strength, mask.threshold, mask.seeds
        if isinstance(denoiser, Backend):  # what no engine can ever run is refused before anything is run
            adapters = [ADAPTER_PREFIX + name for name in requests[0].maps if name in model.adapters]
            for module in [CONTROLLED_UNET] * (self.method in P2P) + ["+".join(["unet", *adapters])] * bool(adapters):
                refuse(denoiser, module, len(requests), height, width)
        if self.fits_null_text and not isinstance(denoiser, Differentiable):
            raise UsageError(
                f"inversion_correction null-text needs gradients, and backend {backend!r} has none; use --backend torch, or auto"
            )
        self.network = Network(denoiser, model.schedule.prediction, max_batch, profile)
        self.model_key = [model.digest, backend, str(model.dtype), model.device.type, schedule.digest]
        self.run_stages = StageRunner(self.network, cache, profile, model.device, self.model_key).run

    def run(self, only_mask: bool = False) -> str:
        """All stages up to the clean latent; the name of the stage that holds it."""
        # 1. What the network is told, and the input's latent.
        self.encode_texts()
        self.run_stages(self.encoding())
        self.judge_pictures()
        # 2. Where the edit may happen.
        self.find_masks()
        if only_mask:
            return "encode"
        # 3. Every method but ITO: sampling from the noised or inverted input.
        if self.method != "ito":
            if self.method in DDPM:
                self.run_stages(self.noise_of_input())
            elif self.inverts:
                self.run_stages(self.inversion_of_input())
                if self.fits_null_text:
                    self.run_stages(self.null_text())
            self.run_stages(self.sampling())
            return "sample"
        # 4. ITO: the input at every level; and what the edit should look like, not for lambda = 1. They share calls.
        self.choose_lambdas()
        if not self.guided:
            self.run_stages(self.inversion_of_input())
        elif self.share:
            self.run_stages(self.inversion_of_input(), self.guidance_image())
        else:
            self.run_stages(self.inversion_of_input())
            self.run_stages(self.guidance_image())
        # 5. The guidance at every level.
        if self.guided and self.options.guidance_path == "drawn":
            for r in self.guided:
                r.results["invert-guidance"] = r.results["guidance"]
                r.results["guidance"] = r.results["guidance"][-1]
        elif self.guided:
            self.round_trip()
            self.run_stages(self.inversion_of_guidance())
            if self.options.refine:
                self.refine_guidance()
                self.run_stages(self.inversion_of_guidance())
        # 6. The edit: every lambda of a sweep in one batch.
        self.run_stages(self.final_pass())
        return "final"

    # --- stages -------------------------------------------------------------------------------------------------

    def encode_texts(self) -> None:
        chunks, negative = self.requests[0].chunks, self.options.negative_prompt
        texts = {t for r in self.requests for t in (r.request.prompt, r.source_prompt, negative)}
        with self.profile.stage("encode"):
            self.prompt_embeds = {t: self.codec.encode_text([t], chunks) for t in sorted(texts)}

    def encoding(self) -> Stage:
        """The input's latent."""

        def encode(members: Requests) -> Tensor:
            return self.vae(self.codec.encode, joined([r.pixels for r in members]))

        return Stage("encode", self.requests, encode, lambda r: [r.digest], shape=self.shape)

    def judge_pictures(self) -> None:
        """A note where a picture is not of the world that the model was trained on, if the model can tell: at its own size its
        autoencoder then loses much of it. One decoding (68 ms of the embedded model on one core) for each new picture."""
        limit, side = self.model.reconstruction_error, self.model.side
        if limit is None or side is None:
            return
        with self.profile.stage("encode"):
            for r in self.requests:
                key = key_of("reconstruction", self.model_key, r.digest)
                error = self.cache.get(key)
                if error is None:
                    pixels, latent = r.pixels, r.results["encode"].unsqueeze(0)
                    if r.size != (side, side):
                        fitted = ImageOps.fit(pictures.as_rgb(r.request.image), (side, side))
                        pixels = pictures.to_tensor(fitted)
                        latent = self.vae(self.codec.encode, pixels)
                    again = self.vae(self.codec.decode, latent).clamp(-1, 1).cpu()
                    error = (again - pixels).abs().mean() / 2
                    self.cache.put(key, error)
                if not float(error) <= limit:
                    r.note(
                        f"this is no picture of the world that {self.model.name} draws: its autoencoder is off by {float(error):.3f} of "
                        f"the range (its own: up to {limit:g}), so an edit is of no use; name another model with --model"
                    )

    def find_masks(self) -> None:
        """Given, or estimated (ITO Eq. 7), or none; the threshold is applied outside the stage and costs nothing."""
        if self.method in UNMASKED:
            return
        o = self.options.mask
        if self.estimates_mask:
            self.run_stages(self.mask_estimation())
            for r in self.requests:
                heat = r.results["mask"].unsqueeze(0)
                r.mask = mask_map(heat, sigma=o.sigma, norm=o.norm, threshold=self.threshold)
        for r in self.requests:
            if r.given_mask is not None:
                r.mask = r.given_mask
            self._note_mask(r)

    def mask_estimation(self) -> Stage:
        """The difference map of the edit's and the source's condition, before blur and threshold."""
        o, path = self.options.mask, self.levels.path(self.levels.start(self.strength))

        def compare(members: Requests) -> Sampler[Tensor]:
            noise = torch.stack([self._noise(members, f"mask-{i}") for i in range(self.seeds)], dim=1)
            return estimate_mask(
                self._stacked(members, "encode"), noise, path, self._condition(members), self._condition(members, source=True),
                uncond=self.prompt_embeds[self.options.negative_prompt], scale=self.scale, mode=self.mask_mode,
                prediction=self.model.schedule.prediction, guided=o.guided, rounding=rounding_level(self.model.dtype),
            )  # fmt: skip

        settings = [self.levels.steps, self.scale, self.mask_mode, self.seeds, self.strength, o.guided]

        def key_parts(r: PreparedRequest) -> list[Any]:
            return [r.digest, self._condition_key(r), self._condition_key(r, source=True), r.request.seed, settings]

        steps = 1 if self.mask_mode == "single" else len(path) - 1
        return self._stage("mask", self.requests, compare, key_parts, steps=steps, shape=(1, *self.shape[1:]))

    def choose_lambdas(self) -> None:
        """A number for every lambda that was left open, by the area of the mask."""
        expected = self.expected()
        for r in self.requests:
            o, area = r.request.options, 0.0 if r.mask is None else _area(r.mask)
            lam = o.chosen_lambda(self.model, area, bool(r.maps))
            r.request = dataclasses.replace(r.request, options=dataclasses.replace(o, lam=lam))
        self.guided = [r for r in self.requests if r.request.options.lam != 1]
        for r in () if self.guided else self.requests:  # the receipt says nothing of a guidance image that nothing has
            options = dataclasses.replace(r.request.options, guidance_path=None)
            r.request = dataclasses.replace(r.request, options=options)
        self.profile.expected += self.expected() - expected

    def inversion_of_input(self) -> Stage:
        """DDIM inversion under the source prompt; never with a ControlNet (METHOD section 2, row 9)."""
        return self._inversion("invert", "encode", self.requests, lambda r: r.digest, source=True)

    def null_text(self) -> Stage:
        """Unconditional embeddings with which guided sampling under the source prompt stays on the inversion."""

        def fit(members: Requests) -> Sampler[Tensor]:
            condition = self._condition(members, source=True)
            uncond = condition.with_prompt(self.prompt_embeds[self.options.negative_prompt])
            found = yield from optimise_null_text(
                self._trajectory(members, "invert"), self.path, condition, uncond, self.scale,
                prediction=self.model.schedule.prediction, guided=self.guided_steps,
            )  # fmt: skip
            # Most pictures are left alone before the last step of Adam.
            self.profile.expected -= self.costs()["null-text"] * len(members) - self.profile.evaluations["null-text"]
            return found

        def key_parts(r: PreparedRequest) -> list[Any]:
            return [r.keys["invert"], self._condition_key(r, source=True), self.scale, self.guided_steps]

        first = self.requests[0]
        shape = (
            self.guided_steps,
            first.chunks * self.model.text_length,
            int(self.model.text_encoder.config.hidden_size),
        )
        steps = self.guided_steps * (NULL_TEXT_STEPS + 2)
        return self._stage("null-text", self.requests, fit, key_parts, batch_dim=1, steps=steps, shape=shape)

    def noise_of_input(self) -> Stage:
        """DDPM inversion under the source prompt."""
        o = self.options
        assert o.source_guidance_scale is not None  # settled by `check_request`

        def find(members: Requests) -> Sampler[Tensor]:
            condition = self._condition(members, source=True)
            uncond = condition.with_prompt(self.prompt_embeds[o.negative_prompt])
            return ddpm_invert(self._independent(members), condition, uncond, o.source_guidance_scale or 0.0)

        settings = [self.levels.steps, self.path[0].index, o.source_guidance_scale]

        def key_parts(r: PreparedRequest) -> list[Any]:
            return [r.digest, self._condition_key(r, source=True), r.request.seed, settings]

        shape = (len(self.path), *self.shape)
        return self._stage("invert", self.requests, find, key_parts, batch_dim=1, shape=shape)

    def sampling(self) -> Stage:
        """Of every method but ITO: masked sampling, or the sampler of its own."""

        def sample(members: Requests) -> Sampler[Tensor]:
            if self.method in P2P:
                return (yield from self._prompt_to_prompt(members))
            condition, uncond = self._both(members)
            if self.method in DDPM:
                return (yield from ddpm_sample(self._trajectory(members, "invert"), self.path, condition, uncond, self.scale,
                                               source=self._independent(members), mask=self._mask(members),
                                               guided=self.guided_steps))  # fmt: skip
            source: Reference
            if self.method in IP2P:
                x0, y = self._stacked(members, "encode"), self._noise(members, "sample")
                told = dataclasses.replace(condition, image=x0 / self.codec.scaling + self.codec.shift)
                return (yield from instruct(
                    y, self.path, told, self.prompt_embeds[self.options.negative_prompt], self.scale,
                    self.options.image_guidance_scale, prediction=self.model.schedule.prediction,
                    source=NoisedReference(x0, y, self.path), mask=self._mask(members), guided=self.guided_steps,
                ))  # fmt: skip
            if self.inverts:
                trajectory = self._trajectory(members, "invert")
                y, source = trajectory[0], TrajectoryReference(trajectory, self.path)
            else:
                x0, noise = self._stacked(members, "encode"), self._noise(members, "sample")
                y = add_noise(x0, noise, self.path[0].abar)
                source = NoisedReference(x0, noise, self.path)
            return (yield from masked_sampling(y, self.path, condition, uncond, self.scale, source=source,
                                               mask=self._mask(members), guided=self.guided_steps))  # fmt: skip

        return self._stage("sample", self.requests, sample)

    def _prompt_to_prompt(self, members: Requests) -> Sampler[Tensor]:
        """From the input's inversion."""
        o, steps, trajectory = self.options, len(self.path) - 1, self._trajectory(members, "invert")
        cross, own = (torch.stack(v).to(trajectory.device) for v in zip(*(r.aligned for r in members if r.aligned)))
        edit, uncond = self._both(members)
        latents = yield from prompt_to_prompt(
            trajectory, self.path, self._condition(members, source=True), edit, uncond, self.scale, cross=cross, own=own,
            cross_steps=int(steps * o.cross_replace), self_steps=int(steps * o.self_replace),
            self_queries=int(o.self_replace_cells * self.shape[1] * self.shape[2]), direct=o.inversion_correction == "direct",
            prediction=self.model.schedule.prediction, mask=self._mask(members), guided=self.guided_steps,
            null_text=self._trajectory(members, "null-text") if self.fits_null_text else None,
        )  # fmt: skip
        return latents[1]

    def guidance_image(self) -> Stage:
        """ITO with lambda 1 from random noise: more freedom than an inversion gives (METHOD section 2, row 10)."""
        o, whole = self.options, self.options.guidance_path == "drawn"

        def draw(members: Requests) -> Sampler[Tensor]:
            x0, noise = self._stacked(members, "encode"), self._noise(members, "guidance")
            y = add_noise(x0, noise, self.path[0].abar)
            condition, uncond = self._both(members)
            latents = yield from ito_pass(
                y, self.path, condition, uncond, self.scale, source=NoisedReference(x0, noise, self.path), guidance=None,
                mask=self._masks(members), lam=torch.ones(len(members), device=y.device), settings=o.guidance, kept_area=o.kept_area,
                guided=self.guided_steps,
            )  # fmt: skip
            return latents if whole else latents[-1]

        settings = [
            self.levels.steps,
            self.path[0].index,
            self.scale,
            dataclasses.asdict(o.guidance),
            o.kept_area,
            self.guided_steps,
            whole,
        ]

        def key_parts(r: PreparedRequest) -> list[Any]:
            mask = "none" if r.mask is None else tensor_digest(r.mask)
            return [r.digest, self._condition_key(r), mask, r.request.seed, settings]

        if whole:
            return self._stage(
                "guidance", self.guided, draw, key_parts, batch_dim=1, shape=(len(self.path), *self.shape)
            )
        return self._stage("guidance", self.guided, draw, key_parts)

    def round_trip(self) -> None:
        """The guidance latent through the VAE and back, where that was asked for."""
        for r in self.guided if self.options.round_trip else ():
            image = self.vae(self.codec.decode, r.results["guidance"].unsqueeze(0)).clamp(-1, 1)
            r.results["guidance"] = self.vae(self.codec.encode, image)[0]

    def inversion_of_guidance(self) -> Stage:
        """DDIM inversion of the guidance latent under the edit prompt (METHOD section 2, row 10)."""
        return self._inversion(
            "invert-guidance", "guidance", self.guided, lambda r: tensor_digest(r.results["guidance"]), source=False
        )

    def refine_guidance(self) -> None:
        """ITO A.5: the input is the guidance image, the guidance is the input's inversion, lambda 0."""

        def refine(members: Requests) -> Sampler[Tensor]:
            g, x = self._trajectory(members, "invert-guidance"), self._trajectory(members, "invert")
            condition, uncond = self._both(members)
            latents = yield from ito_pass(
                g[0], self.path, condition, uncond, self.scale,
                source=TrajectoryReference(g, self.path), guidance=TrajectoryReference(x, self.path),
                mask=self._masks(members), lam=torch.zeros(len(members), device=g.device), settings=self.options.refinement,
                guided=self.guided_steps,
            )  # fmt: skip
            return latents[-1]

        settings = [self.options.round_trip, dataclasses.asdict(self.options.refinement), self.guided_steps]

        def key_parts(r: PreparedRequest) -> list[Any]:
            return [r.keys["guidance"], r.keys["invert-guidance"], r.keys["invert"], settings]

        self.run_stages(self._stage("refine", self.guided, refine, key_parts))
        for r in self.guided:
            r.results["guidance"] = r.results["refine"]

    def final_pass(self) -> Stage:
        """ITO from the input's inversion, between the source and the guidance at every level."""

        def edit(members: Requests) -> Sampler[Tensor]:
            x, guidance = self._trajectory(members, "invert"), None
            if self.guided:  # beside others, an edit with lambda 1 has a zero guidance: no gradient, at weight 0
                nothing = torch.zeros_like(members[0].results["invert"])
                g = torch.stack([r.results.get("invert-guidance", nothing) for r in members], dim=1)
                guidance = TrajectoryReference(g, self.path)
            condition, uncond = self._both(members)
            latents = yield from ito_pass(
                x[0], self.path, condition, uncond, self.scale,
                source=TrajectoryReference(x, self.path), guidance=guidance, mask=self._masks(members),
                lam=torch.tensor([r.request.options.lam for r in members], device=x.device), settings=self.options.final,
                kept_area=self.options.kept_area, guided=self.guided_steps,
            )  # fmt: skip
            return latents[-1]

        return self._stage("final", self.requests, edit)

    def composite(self, stage: str) -> None:
        """The source's latent outside the mask, with `composite="latent"`."""
        for r in self.requests:
            if self.options.composite == "latent" and r.mask is not None:
                x0, y = r.results["encode"], r.results[stage]
                r.results[stage] = blend(r.mask, y.unsqueeze(0), x0.unsqueeze(0))[0]

    def vae(self, run: Callable[..., Tensor], batch: Tensor) -> Tensor:
        """`codec.encode` or `codec.decode` on any number of pictures; what it has to say goes into the profile."""
        return vae_batches(partial(run, note=self.profile.note), batch)

    # --- pieces -------------------------------------------------------------------------------------------------

    @property
    def fits_null_text(self) -> bool:
        """Whether the inversion's errors are made up for by unconditional embeddings."""
        return self.method in P2P and self.options.inversion_correction == "null-text"

    @property
    def inverts(self) -> bool:
        """Whether sampling starts from an inversion."""
        return self.method in INVERTING and self.method not in ITO

    @property
    def estimates_mask(self) -> bool:
        return self.requests[0].given_mask is None and estimates_mask(self.requests[0].request)

    def _stage(
        self,
        name: str,
        members: Requests,
        compute: Callable[[Requests], Sampler[Tensor]],
        key_parts: Callable[[PreparedRequest], list[Any]] | None = None,
        *,
        batch_dim: int = 0,
        steps: int | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> Stage:
        """A stage that goes along the path and returns a latent, if nothing else is said."""
        steps, shape = len(self.path) - 1 if steps is None else steps, self.shape if shape is None else shape
        return Stage(name, members, compute, key_parts, batch_dim, steps, shape, self.costs()[name])

    def _inversion(
        self, name: str, of: str, members: Requests, content: Callable[[PreparedRequest], str], *, source: bool
    ) -> Stage:
        o = self.options

        def go(requests: Requests) -> Sampler[Tensor]:
            condition = self._condition(requests, source=source, controls=False)
            uncond = condition.with_prompt(self.prompt_embeds[o.negative_prompt])
            return invert(self._stacked(requests, of), self.path, uncond if o.inversion == "unconditional" else condition,
                          uncond, o.inversion_scale, evaluate=o.inversion_evaluate)  # fmt: skip

        settings = [
            self.levels.steps,
            self.path[0].index,
            o.inversion,
            o.inversion_scale,
            o.inversion_evaluate,
            o.negative_prompt,
        ]

        def key_parts(r: PreparedRequest) -> list[Any]:
            return [content(r), r.source_prompt if source else r.request.prompt, r.chunks, settings]

        return self._stage(name, members, go, key_parts, batch_dim=1, shape=(len(self.path), *self.shape))

    def _condition(self, members: Requests, *, source: bool = False, controls: bool = True) -> Condition:
        """Prompt and layouts of the edited pictures, or of the source pictures."""
        o = self.options
        scales = dict(o.control_scales)
        embeds = torch.cat([self.prompt_embeds[r.source_prompt if source else r.request.prompt] for r in members])
        names = sorted(self.requests[0].maps) if controls else []
        return Condition(embeds, tuple(
            ControlInput(n, torch.cat([(r.source_maps if source else r.maps)[n] for r in members]), scales.get(n, o.control_scale),
                         n in self.model.adapters)
            for n in names
        ))  # fmt: skip

    def _both(self, members: Requests) -> tuple[Condition, Condition]:
        """The edit's condition and its unconditional half."""
        condition = self._condition(members)
        return condition, condition.with_prompt(self.prompt_embeds[self.options.negative_prompt])

    def _condition_key(self, r: PreparedRequest, source: bool = False) -> list[Any]:
        maps, o = (r.source_maps if source else r.maps), self.options
        return [r.source_prompt if source else r.request.prompt, o.negative_prompt, r.chunks, o.control_scale,
                list(o.control_scales), {n: tensor_digest(m) for n, m in maps.items()}]  # fmt: skip

    def _noise(self, members: Requests, purpose: str) -> Tensor:
        return torch.stack([seeded_noise(r.request.seed, purpose, self.shape) for r in members]).to(self.model.device)

    def _independent(self, members: Requests) -> IndependentReference:
        """The input under a noise of its own at every level."""
        noise = torch.stack([self._noise(members, f"level-{level.index}") for level in self.path[:-1]])
        return IndependentReference(self._stacked(members, "encode"), noise, self.path)

    def _stacked(self, members: Requests, stage: str) -> Tensor:
        """(B, ...) results of a stage."""
        return torch.stack([r.results[stage] for r in members])

    def _trajectory(self, members: Requests, stage: str) -> Tensor:
        """(len(path), B, C, h, w) results of an inversion."""
        return torch.stack([r.results[stage] for r in members], dim=1)

    def _mask(self, members: Requests) -> Tensor | None:
        """(B, 1, h, w), or None where nothing is blended."""
        masks = [r.mask for r in members if r.mask is not None]
        return torch.cat(masks) if masks else None

    def _masks(self, members: Requests) -> Tensor:
        """(B, 1, h, w); with no mask all of the picture is preserved (ITO Eq. 3)."""
        nothing = torch.zeros(1, 1, *self.shape[1:], device=self.model.device)
        return torch.cat([nothing if r.mask is None else r.mask for r in members])

    def _note_mask(self, r: PreparedRequest) -> None:
        if r.mask is None:
            return
        area = _area(r.mask)
        if r.given_mask is None and not r.results["mask"].any():
            r.note(
                "the mask is empty: to the network both prompts say the same, so nothing is to change; say in the prompt what "
                "the edited picture shows and in the source prompt what it shows now, or give a mask"
            )
        elif not 0.01 <= area <= 0.8:
            what = "almost nothing can change" if area < 0.01 else "almost nothing is kept"
            r.note(f"the mask covers {area:.1%} of the picture: {what}; change the mask threshold, or give a mask")

    # --- progress -----------------------------------------------------------------------------------------------

    def costs(self) -> dict[str, int]:
        """Network evaluations of each stage for one edit that finds nothing in the cache."""
        o = self.options
        both, inversion = 1 if self.scale == 1 else 2, 1 if o.inversion_scale == 1 else 2
        run, costs = len(self.path) - 1, {}
        denoise = run + self.guided_steps * (both - 1)
        if self.estimates_mask:
            if self.mask_mode == "single":
                # The unconditional halves of two texts cancel (see `sampling.estimate_mask`), those of two layouts do not.
                each = both if o.mask.guided and self.requests[0].maps else 1
            else:
                compared = self.levels.steps - self.levels.start(self.strength)
                each = compared * both - (0 if o.mask.guided else both - 1)
            costs["mask"] = self.seeds * 2 * each
        if self.method in P2P:  # beside each evaluation of the edit one of its source, where that needs one
            if self.fits_null_text:
                costs["null-text"] = self.guided_steps * (NULL_TEXT_STEPS + 2)
            denoise = run * 2 + self.guided_steps * (both - 1) * (1 if o.inversion_correction == "direct" else 2)
        if self.method in IP2P:
            weights = (self.scale, o.image_guidance_scale - self.scale, 1 - o.image_guidance_scale)
            denoise = run + self.guided_steps * (sum(w != 0 for w in weights) - 1)
        if self.method in DDPM:
            costs["invert"] = run * (1 if o.source_guidance_scale == 1 else 2)
        if self.method != "ito":
            return costs | {"sample": denoise} | ({"invert": run * inversion} if self.inverts else {})
        costs |= {"invert": run * inversion, "final": denoise}
        if self.guided:
            costs |= {"guidance": denoise}
            if o.guidance_path != "drawn":
                costs |= {"invert-guidance": run * inversion * (2 if o.refine else 1)}
            costs |= {"refine": denoise} if o.refine else {}
        return costs

    def expected(self) -> int:
        """Network evaluations of the batch that finds nothing in the cache."""
        per_guided = ("guidance", "invert-guidance", "refine")
        return sum(n * len(self.guided if name in per_guided else self.requests) for name, n in self.costs().items())


def group_key(r: PreparedRequest) -> str:
    """Requests with equal keys share every network call: size, method, steps, layouts and all options but lambda."""
    shared = dataclasses.replace(r.request.options, lam=0.0)
    return key_of("group", list(r.pixels.shape), r.request.method, r.steps, sorted(r.maps), sorted(r.source_maps),
                  r.given_mask is None, r.chunks, dataclasses.asdict(shared))  # fmt: skip


def _area(mask: Tensor) -> float:
    """Share of the picture that a mask lets change."""
    return float((mask > 0).float().mean())


def vae_batches(run: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """The VAE in pieces of 8, one by one where memory runs out.

    Raises:
        RunError: one picture does not fit.
    """
    for size in (8, 1):
        try:
            return joined([run(piece) for piece in batch.split(size)])
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
                raise
    raise RunError(f"out of memory in the VAE with one picture of {tuple(batch.shape[-2:])}; use a smaller one")
