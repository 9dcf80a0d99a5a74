"""The main path: `Editor.edit(EditRequest) -> EditResult`.

Requests that can share network calls (same size, method, steps and options) form a batch and run stage by stage; every
stage first asks the cache for what it has (see `stages.py`), so a second edit of the same image runs only what changed.

    encode -> mask -> invert -> guidance -> (refine) -> invert-guidance -> final -> decode       ito
    encode -> mask -> invert -> sample -> decode                                             diffedit
    encode -> (mask) -> sample -> decode                                            sdedit and iedit
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor

from ..kernels.guided_step import blend
from ..kernels.mask_map import mask_map
from . import METHODS, VERSION
from . import images as pictures
from . import layouts as layout_maps
from .backend_torch import TorchDenoiser
from .backends import choose
from .denoiser import Condition, Denoiser, Network, NoisedReference, Reference, TrajectoryReference, invert
from .errors import RunError, UsageError
from .ito import Phase, ito_pass, masked_sampling
from .mask import estimate
from .models import PICTUREBOOK, Model, load_model
from .profile import Callback, Profile
from .schedule import Levels, add_noise, seeded_noise
from .stages import Result, StageCache, key_of, tensor_digest

# METHOD section 3, row 3 for iEdit; DiffEdit's own 0.8; ITO's section 4 uses 1.0 for ControlNet + DiffEdit.
RATIOS = {"iedit": 0.7, "sdedit": 0.7, "controlnet": 0.7, "diffedit": 0.8, "controlnet-diffedit": 1.0}


@dataclass(frozen=True)
class MaskOptions:
    """How the edit mask is estimated (ITO Eq. 7; METHOD section 2, rows 11-14).

    Attributes:
        mode: "single" (one evaluation at the noise level of `strength`), "trajectory" (both conditions are denoised and
            compared at the last step) or "none" (ITO then preserves everywhere, Eq. 3; other methods do not blend).
        seeds: noises that the difference is averaged over.
        strength: where the comparison starts, share of the steps.
        guided: compare predictions after guidance.
        sigma: of the Gaussian smoothing, latent pixels.
        norm: "minmax", or "clamp" at 3x the mean as diffusers does; per image.
        threshold: cells above it are edited; None is 0.1 for minmax and 0.5 for clamp.
    """

    mode: str = "single"
    seeds: int = 10
    strength: float = 0.5
    guided: bool = True
    sigma: float = 1.0
    norm: str = "minmax"
    threshold: float | None = None

    @property
    def cut(self) -> float:
        """The threshold in force."""
        return (0.1 if self.norm == "minmax" else 0.5) if self.threshold is None else self.threshold


@dataclass(frozen=True)
class Options:
    """Everything about an edit that is not its inputs.

    Attributes:
        lam: weight of preservation against guidance, lambda of ITO Eq. 6; 1 skips the guidance image.
        guidance_scale: classifier-free guidance; None is what the checkpoint recommends, else 7.5.
        negative_prompt: text of the unconditional half.
        control_scale: of every ControlNet's residuals.
        control_scales: (name, scale) pairs that differ from `control_scale`.
        encoding_ratio: share of the steps that ITO encodes, t_E / N.
        ratio: share of the steps that the other methods encode; None is 0.7 (SDEdit, iEdit, ControlNet), 0.8 (DiffEdit),
            1.0 (ControlNet + DiffEdit).
        mask: how the mask is estimated.
        guidance, final: ITO's updates while the guidance image is made and in the final pass.
        refine: refine the guidance image with the input (ITO A.5).
        refinement: the updates of that refinement.
        inversion: condition of the inversion: the "source" prompt or "unconditional".
        inversion_scale: classifier-free guidance during the inversion; 1 is off.
        inversion_evaluate: timestep told during inversion: of the "target" level (as diffusers does) or the "source".
        round_trip: pass the guidance image through the VAE before it is inverted.
        kept_area: normalise the preservation loss by the kept area.
        composite: "none"; "latent" (source latent outside the mask at the end); "pixel" (feathered paste of the input).
        feather: width of the pixel paste's edge, pixels.
    """

    lam: float = 0.6
    guidance_scale: float | None = None
    negative_prompt: str = ""
    control_scale: float = 1.0
    control_scales: tuple[tuple[str, float], ...] = ()
    encoding_ratio: float = 1.0
    ratio: float | None = None
    mask: MaskOptions = MaskOptions()
    guidance: Phase = Phase()
    final: Phase = Phase()
    refine: bool = False
    refinement: Phase = Phase(t_u=6)
    inversion: str = "source"
    inversion_scale: float = 1.0
    inversion_evaluate: str = "target"
    round_trip: bool = False
    kept_area: bool = False
    composite: str = "none"
    feather: float = 4.0

    def check(self) -> None:
        """Raises UsageError for a value that no stage could use."""

        def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
            if value not in allowed:
                raise UsageError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")

        def within(name: str, value: float, low: float, high: float) -> None:
            if not low <= value <= high:
                raise UsageError(f"{name} is {value}, expected {low} to {high}")

        one_of("mask mode", self.mask.mode, ("single", "trajectory", "none"))
        one_of("mask norm", self.mask.norm, ("minmax", "clamp"))
        one_of("inversion", self.inversion, ("source", "unconditional"))
        one_of("inversion_evaluate", self.inversion_evaluate, ("target", "source"))
        one_of("composite", self.composite, ("none", "latent", "pixel"))
        within("lambda", self.lam, 0, 1)
        within("mask threshold", self.mask.cut, 0, 1)
        within("mask seeds", self.mask.seeds, 1, 1000)
        within("mask sigma", self.mask.sigma, 0, 1000)
        within("feather", self.feather, 0, 1000)
        scales = {"guidance_scale": self.guidance_scale, "inversion_scale": self.inversion_scale,
                  "control_scale": self.control_scale}  # fmt: skip
        for name, value in {**scales, **{f"control_scales {n}": s for n, s in self.control_scales}}.items():
            if value is not None and not math.isfinite(value):
                raise UsageError(f"{name} is {value}, expected a number")
        for name, ratio in (("encoding_ratio", self.encoding_ratio), ("mask strength", self.mask.strength),
                            ("ratio", 1.0 if self.ratio is None else self.ratio)):  # fmt: skip
            if not 0 < ratio <= 1:
                raise UsageError(f"{name} is {ratio}, expected a number above 0 and at most 1")
        for phase in (self.guidance, self.final, self.refinement):
            if phase.k < 1 or (phase.t_u is not None and phase.t_u < 0) or not 0 < phase.lr < math.inf:
                raise UsageError(f"{phase}: expected t_u >= 0, k >= 1 and lr > 0")


@dataclass(frozen=True)
class EditRequest:
    """One edit.

    Attributes:
        image: any PIL mode and size; it is padded to what the model takes and cropped back.
        prompt: what the edited picture shows.
        source_prompt: what the picture shows now. With layouts and no source prompt, `prompt` stands for both.
        method: one of `METHODS`.
        layouts: ControlNet name -> map of the picture's size, for the edited picture.
        source_layouts: the same for the picture as it is; those not given are annotated from it where that can be done.
        mask: "L" picture of the same size, white edits; None estimates one.
        seed: of every noise; 0 is a seed.
        steps: sampling steps.
    """

    image: Image.Image
    prompt: str
    source_prompt: str = ""
    method: str = "ito"
    layouts: Mapping[str, Image.Image] = field(default_factory=dict)
    source_layouts: Mapping[str, Image.Image] = field(default_factory=dict)
    mask: Image.Image | None = None
    seed: int = 0
    steps: int = 25
    options: Options = Options()


@dataclass(frozen=True)
class EditResult:
    """What an edit returns.

    Attributes:
        image: RGB, the size of the input.
        mask: "L", white where the edit was allowed; None without a mask.
        guidance: RGB guidance image, None where it was skipped.
        latent, source_latent: (C, h, w) float32 on the CPU, of the result and of the input (padded size).
        profile: what the batch cost that this edit was part of.
        receipt: JSON-ready: the request, model digest, versions, backend, mask statistics, notes.
    """

    image: Image.Image
    mask: Image.Image | None
    guidance: Image.Image | None
    latent: Tensor
    source_latent: Tensor
    profile: Profile
    receipt: dict[str, Any]


@dataclass
class _Job:
    """A checked request with its tensors on the device; `found` holds stage results by stage name."""

    request: EditRequest
    size: tuple[int, int]
    pixels: Tensor
    digest: str
    maps: dict[str, Tensor]
    source_maps: dict[str, Tensor]
    given_mask: Tensor | None
    chunks: int
    source_prompt: str
    keys: dict[str, str] = field(default_factory=dict)
    found: dict[str, Result] = field(default_factory=dict)
    mask: Tensor | None = None


class Editor:
    """A loaded model with its backend and stage cache. `edit` may be called from several threads.

    Args:
        model: a loaded checkpoint.
        denoiser: the backend that answers for the UNet and ControlNets.
        backend: its name, for the receipt.
        cache: stage results; None makes one of 512 MiB in memory.
        memory: bound in bytes for one network call's activations; decides how many samples share a call.
    """

    def __init__(
        self,
        model: Model,
        denoiser: Denoiser,
        *,
        backend: str = "torch",
        cache: StageCache | None = None,
        memory: int = 1 << 30,
    ):
        self.model, self.denoiser, self.backend = model, denoiser, backend
        self.cache = StageCache() if cache is None else cache
        self.memory = memory

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
    ) -> Editor:
        """Load the embedded model, a diffusers folder or a hub id; see `models.load_model`.

        Raises:
            UsageError: the model cannot be loaded, or the backend is not one that can run.
        """
        name = choose(backend)
        loaded = load_model(model, layouts, device=device, dtype=dtype)
        return cls(loaded, TorchDenoiser(loaded), backend=name, cache=cache, memory=memory)

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

        Each result equals its single run, up to the network's own rounding between batch sizes.
        """
        jobs = [self._check(r) for r in requests]
        groups: dict[str, list[int]] = {}
        for i, job in enumerate(jobs):
            groups.setdefault(self._group_key(job), []).append(i)
        results: list[EditResult | None] = [None] * len(jobs)
        for members in groups.values():
            for i, result in zip(members, self._run([jobs[i] for i in members], callback), strict=True):
                results[i] = result
        return [r for r in results if r is not None]

    def mask(self, request: EditRequest, callback: Callback | None = None) -> tuple[Image.Image | None, Profile]:
        """Only the mask that `edit` would use: "L", white where the edit is allowed; None where there is none."""
        job = self._check(request)
        profile = self._run([job], callback, only_mask=True)[0].profile
        return self._mask_picture(job), profile

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
        side = model.unet.config.sample_size * model.factor
        width, height = size or (side, side)
        chunks = max(len(model.token_chunks(p)) for p in prompts)
        maps = {n: torch.cat([(pictures.to_tensor(m) + 1) / 2 for m in given]) for n, given in (layouts or {}).items()}
        condition = Condition(
            model.encode_text(prompts, chunks),
            tuple((n, m.to(model.device), 1.0) for n, m in maps.items()),
        )
        uncond = condition.with_text(model.encode_text([""], chunks))
        shape = (model.channels, height // model.factor, width // model.factor)
        numbers = range(len(prompts)) if seeds is None else seeds
        levels = model.schedule.levels(steps)
        noise = torch.stack([seeded_noise(s, "generate", shape) for s in numbers]).to(model.device)
        scale = model.guidance_scale if guidance_scale is None else guidance_scale
        network = Network(self.denoiser, model.schedule.prediction, self.max_batch(shape), profile)
        with profile.stage("sample"):
            latents = masked_sampling(network, noise, levels, 0, condition, uncond, scale, source=None, mask=None)
        return [pictures.to_image(i) for i in self._decode(latents)]

    def reconstruct(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """The VAE's round trip of pictures whose size the model takes."""
        latents = self._batched(self.model.encode, torch.cat([pictures.to_tensor(i) for i in images]))
        return [pictures.to_image(i) for i in self._decode(latents)]

    def max_batch(self, shape: tuple[int, ...]) -> int:
        """Samples per network call for latents of `shape` (C, h, w) within the memory setting.

        60 floats per latent cell and channel of the first level is what a UNet of SD's shape holds at its peak.
        """
        cells = shape[-1] * shape[-2] * self.model.unet.config.block_out_channels[0]
        return max(1, self.memory // (cells * 60 * 4))

    # --- requests -----------------------------------------------------------------------------------------------

    def _check(self, request: EditRequest) -> _Job:
        """Everything that can be wrong with a request, before anything is run."""
        model = self.model
        if request.method not in METHODS:
            raise UsageError(f"method is {request.method!r}, expected one of {', '.join(METHODS)}")
        if not request.prompt.strip():
            raise UsageError("the prompt is empty: say what the edited picture shows")
        if request.method.startswith("controlnet") and not request.layouts:
            raise UsageError(f"method {request.method} needs at least one layout (--layout pose=FILE)")
        request.options.check()
        model.schedule.levels(request.steps)
        for name in {**request.layouts, **request.source_layouts}:
            if name not in model.controlnets:
                known = ", ".join(model.controlnets) or "none"
                raise UsageError(f"layout {name!r}: {model.name} has no ControlNet of that name; it has {known}")
        for name, _ in request.options.control_scales:
            if name not in model.controlnets:
                known = ", ".join(model.controlnets) or "none"
                raise UsageError(f"control_scales: {model.name} has no ControlNet {name!r}; it has {known}")
        extra = sorted(set(request.source_layouts) - set(request.layouts))
        if extra:
            raise UsageError(f"source layout {extra[0]!r} has no layout to go with it: give layouts[{extra[0]!r}] too")
        pictures.check_size(request.image)
        image = pictures.as_rgb(request.image)
        padded, size = pictures.pad_to_multiple(image, model.multiple)

        def tensor_of(name: str, picture: Image.Image) -> Tensor:
            layout = layout_maps.check_layout(picture, name, size)
            framed = Image.new("RGB", padded.size)
            framed.paste(layout, (0, 0))
            return ((pictures.to_tensor(framed) + 1) / 2).to(model.device)

        maps = {name: tensor_of(name, picture) for name, picture in request.layouts.items()}
        compares = (
            request.mask is None
            and request.options.mask.mode != "none"
            and request.method not in ("sdedit", "controlnet")
        )
        source_maps = {}
        if compares:
            for name in maps:
                given = request.source_layouts.get(name)
                source_maps[name] = tensor_of(name, layout_maps.annotate(image, name) if given is None else given)
        given_mask = None
        if request.mask is not None:
            mask = pictures.load_mask(request.mask, size)
            latent = (padded.height // model.factor, padded.width // model.factor)
            given_mask = pictures.mask_to_latent(mask, latent, padded.size).to(model.device)
        source_prompt = request.source_prompt or (request.prompt if request.layouts else "")
        texts = (request.prompt, source_prompt, request.options.negative_prompt)
        return _Job(
            request=request,
            size=size,
            pixels=pictures.to_tensor(padded),
            digest=hashlib.sha256(f"{padded.size}".encode() + padded.tobytes()).hexdigest()[:32],
            maps=maps,
            source_maps=source_maps,
            given_mask=given_mask,
            chunks=max(len(model.token_chunks(t)) for t in texts),
            source_prompt=source_prompt,
        )

    def _group_key(self, job: _Job) -> str:
        """Requests of one group share every network call."""
        r = job.request
        shared = dataclasses.replace(r.options, lam=0.0)
        return key_of("group", list(job.pixels.shape), r.method, r.steps, sorted(job.maps), sorted(job.source_maps),
                      job.given_mask is None, job.chunks, dataclasses.asdict(shared))  # fmt: skip

    # --- the main path ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _run(self, jobs: list[_Job], callback: Callback | None, only_mask: bool = False) -> list[EditResult]:
        model, first = self.model, jobs[0].request
        options, method = first.options, first.method
        profile = Profile(callback=callback)
        shape = (model.channels, jobs[0].pixels.shape[-2] // model.factor, jobs[0].pixels.shape[-1] // model.factor)
        network = Network(self.denoiser, model.schedule.prediction, self.max_batch(shape), profile)
        levels = model.schedule.levels(first.steps)
        scale = model.guidance_scale if options.guidance_scale is None else options.guidance_scale
        run = _Stages(self, jobs, profile)
        profile.expected = self._expected(jobs, levels, scale)

        texts = {t for j in jobs for t in (j.request.prompt, j.source_prompt, options.negative_prompt)}
        states = {t: model.encode_text([t], jobs[0].chunks) for t in sorted(texts)}
        control = dict(options.control_scales)

        def condition(members: list[_Job], *, source: bool, layouts: bool = True) -> Condition:
            text = torch.cat([states[j.source_prompt if source else j.request.prompt] for j in members])
            names = sorted(jobs[0].maps) if layouts else []
            maps = [torch.cat([(j.source_maps if source else j.maps)[n] for j in members]) for n in names]
            scales = [control.get(n, options.control_scale) for n in names]
            return Condition(text, tuple(zip(names, maps, scales, strict=True)))

        negative = states[options.negative_prompt]

        def latents(members: list[_Job], stage: str) -> Tensor:
            return torch.stack([j.found[stage]["value"] for j in members])

        def noises(members: list[_Job], purpose: str) -> Tensor:
            return torch.stack([seeded_noise(j.request.seed, purpose, shape) for j in members]).to(model.device)

        # 1. The input's latent.
        run.stage(
            "encode", lambda j: [j.digest], lambda m: self._batched(model.encode, torch.cat([j.pixels for j in m]))
        )

        # 2. The mask.
        masked = method not in ("sdedit", "controlnet")
        if masked and jobs[0].given_mask is None and options.mask.mode != "none":
            o = options.mask

            def compare(members: list[_Job]) -> Tensor:
                noise = torch.stack([noises(members, f"mask-{i}") for i in range(o.seeds)], dim=1)
                return estimate(
                    network, latents(members, "encode"), noise, levels, condition(members, source=False),
                    condition(members, source=True), uncond=negative if o.guided else None, scale=scale,
                    strength=o.strength, mode=o.mode,
                )  # fmt: skip

            compared = [o.mode, o.seeds, o.strength, o.guided]
            run.stage("mask", lambda j: [j.digest, self._condition_key(j), self._condition_key(j, True), j.request.seed,
                                         levels.steps, scale, compared], compare)  # fmt: skip
            for j in jobs:
                heat = j.found["mask"]["value"].unsqueeze(0)
                j.mask = mask_map(heat, sigma=o.sigma, norm=o.norm, threshold=o.cut)
        for j in jobs:
            if masked and j.given_mask is not None:
                j.mask = j.given_mask
            self._note_mask(j, profile)
        if only_mask:
            return self._finish(run, "encode", profile)

        # 3. Masked sampling, for every method but ITO.
        uncond = partial(self._uncond, negative)
        if method != "ito":
            start = levels.start(RATIOS[method] if options.ratio is None else options.ratio)
            inverts = method in ("diffedit", "controlnet-diffedit")
            if inverts:
                self._invert(run, "invert", network, levels, start, condition, negative, options)

            def sample(members: list[_Job]) -> Tensor:
                x0, edit = latents(members, "encode"), condition(members, source=False)
                source: Reference
                if inverts:
                    trajectory = torch.stack([j.found["invert"]["value"] for j in members], dim=1)
                    y, source = trajectory[0], TrajectoryReference(trajectory, levels)
                else:
                    noise = noises(members, "sample")
                    y, source = add_noise(x0, noise, levels.abar[start]), NoisedReference(x0, noise, levels)
                mask = None if members[0].mask is None else torch.cat([j.mask for j in members if j.mask is not None])
                return masked_sampling(network, y, levels, start, edit, uncond(edit), scale, source=source, mask=mask)

            run.always("sample", sample)
            return self._finish(run, "sample", profile)

        # 4. ITO: the inversion of the input.
        start = levels.start(options.encoding_ratio)
        self._invert(run, "invert", network, levels, start, condition, negative, options)

        def preserve(members: list[_Job]) -> Tensor:
            return torch.cat(
                [torch.zeros(1, 1, *shape[1:], device=model.device) if j.mask is None else j.mask for j in members]
            )

        # 5. The guidance image, and its inversion under the edit prompt; not for lambda = 1.
        guided = [j for j in jobs if j.request.options.lam < 1]
        if guided:
            phase = options.guidance
            mask_keys = {id(j): "none" if j.mask is None else tensor_digest(j.mask) for j in jobs}
            made_with = [levels.steps, start, scale, options.negative_prompt, options.control_scale, list(options.control_scales),
                         dataclasses.asdict(phase), options.kept_area]  # fmt: skip

            def make_guidance(members: list[_Job]) -> Tensor:
                x0, noise, edit = (
                    latents(members, "encode"),
                    noises(members, "guidance"),
                    condition(members, source=False),
                )
                return ito_pass(
                    network, add_noise(x0, noise, levels.abar[start]), levels, start, edit, uncond(edit), scale,
                    source=NoisedReference(x0, noise, levels), guidance=None, mask=preserve(members),
                    lam=torch.ones(len(members), device=model.device), phase=phase, kept_area=options.kept_area,
                )  # fmt: skip

            run.stage("guidance", lambda j: [j.digest, self._condition_key(j), mask_keys[id(j)], j.request.seed, made_with],
                      make_guidance, guided)  # fmt: skip
            if options.round_trip:
                for j in guided:
                    image = self.model.decode(j.found["guidance"]["value"].unsqueeze(0)).clamp(-1, 1)
                    j.found["guidance"] = {"value": self.model.encode(image)[0]}
            self._invert_guidance(run, guided, network, levels, start, condition, negative, options)
            if options.refine:
                self._refine(run, guided, network, levels, start, condition, uncond, scale, options, preserve)
                self._invert_guidance(run, guided, network, levels, start, condition, negative, options)

        # 6. The final pass: every lambda of a sweep in one batch.
        def final(members: list[_Job]) -> Tensor:
            trajectory = torch.stack([j.found["invert"]["value"] for j in members], dim=1)
            edit, g = condition(members, source=False), None
            if guided:
                nothing = torch.zeros_like(members[0].found["invert"]["value"])
                g = torch.stack([j.found.get("invert-guidance", {"value": nothing})["value"] for j in members], dim=1)
            return ito_pass(
                network, trajectory[0], levels, start, edit, uncond(edit), scale,
                source=TrajectoryReference(trajectory, levels), guidance=None if g is None else TrajectoryReference(g, levels),
                mask=preserve(members), lam=torch.tensor([j.request.options.lam for j in members], device=model.device),
                phase=options.final, kept_area=options.kept_area,
            )  # fmt: skip

        run.always("final", final)
        return self._finish(run, "final", profile)

    # --- pieces of the main path --------------------------------------------------------------------------------

    @staticmethod
    def _uncond(negative: Tensor, edit: Condition) -> Condition:
        return edit.with_text(negative)

    @staticmethod
    def _condition_key(job: _Job, source: bool = False) -> list[Any]:
        maps, o = (job.source_maps if source else job.maps), job.request.options
        return [job.source_prompt if source else job.request.prompt, o.negative_prompt, job.chunks, o.control_scale,
                list(o.control_scales), {n: tensor_digest(m) for n, m in maps.items()}]  # fmt: skip

    def _invert(self, run: _Stages, name: str, network: Network, levels: Levels, start: int,
                condition: Callable[..., Condition], negative: Tensor, options: Options) -> None:  # fmt: skip
        """DDIM inversion of the input under the source prompt; never with a ControlNet (METHOD section 2, row 9)."""
        how = [levels.steps, start, options.inversion, options.inversion_scale, options.inversion_evaluate]

        def go(members: list[_Job]) -> Tensor:
            x0 = torch.stack([j.found["encode"]["value"] for j in members])
            told = condition(members, source=True, layouts=False)
            if options.inversion == "unconditional":
                told = told.with_text(negative)
            found = invert(network, x0, levels, start, told, uncond=told.with_text(negative), scale=options.inversion_scale,
                           evaluate=options.inversion_evaluate)  # fmt: skip
            return found.transpose(0, 1)

        run.stage(name, lambda j: [j.digest, j.source_prompt, options.negative_prompt, j.chunks, how], go)

    def _invert_guidance(self, run: _Stages, guided: list[_Job], network: Network, levels: Levels, start: int,
                         condition: Callable[..., Condition], negative: Tensor, options: Options) -> None:  # fmt: skip
        """DDIM inversion of the guidance latent under the edit prompt (METHOD section 2, row 10)."""
        how = [levels.steps, start, options.inversion, options.inversion_scale, options.inversion_evaluate]

        def go(members: list[_Job]) -> Tensor:
            g0 = torch.stack([j.found["guidance"]["value"] for j in members])
            told = condition(members, source=False, layouts=False)
            if options.inversion == "unconditional":
                told = told.with_text(negative)
            found = invert(network, g0, levels, start, told, uncond=told.with_text(negative), scale=options.inversion_scale,
                           evaluate=options.inversion_evaluate)  # fmt: skip
            return found.transpose(0, 1)

        run.stage("invert-guidance", lambda j: [tensor_digest(j.found["guidance"]["value"]), j.request.prompt,
                                                options.negative_prompt, j.chunks, how], go, guided)  # fmt: skip

    def _refine(self, run: _Stages, guided: list[_Job], network: Network, levels: Levels, start: int,
                condition: Callable[..., Condition], uncond: Callable[[Condition], Condition], scale: float, options: Options,
                preserve: Callable[[list[_Job]], Tensor]) -> None:  # fmt: skip
        """ITO A.5: the guidance image is the input, the input's inversion the guidance, lambda 0."""

        def go(members: list[_Job]) -> Tensor:
            g = torch.stack([j.found["invert-guidance"]["value"] for j in members], dim=1)
            x = torch.stack([j.found["invert"]["value"] for j in members], dim=1)
            edit = condition(members, source=False)
            return ito_pass(
                network, g[0], levels, start, edit, uncond(edit), scale, source=TrajectoryReference(g, levels),
                guidance=TrajectoryReference(x, levels), mask=preserve(members),
                lam=torch.zeros(len(members), device=self.model.device), phase=options.refinement,
            )  # fmt: skip

        run.stage("refine", lambda j: [j.keys["guidance"], j.keys["invert-guidance"], j.keys["invert"], options.round_trip,
                                       dataclasses.asdict(options.refinement)], go, guided)  # fmt: skip
        for j in guided:
            j.found["guidance"] = j.found["refine"]

    def _expected(self, jobs: list[_Job], levels: Levels, scale: float) -> int:
        """Network evaluations if nothing is cached, for the progress bar."""
        r = jobs[0].request
        o, both = r.options, 1 if scale == 1 else 2
        inversion = 1 if o.inversion_scale == 1 else 2
        total = 0
        if r.method not in ("sdedit", "controlnet") and jobs[0].given_mask is None and o.mask.mode != "none":
            start = levels.start(o.mask.strength)
            halves = both if (o.mask.guided and (jobs[0].maps or o.mask.mode == "trajectory")) else 1
            total += (
                o.mask.seeds * 2 * halves * (levels.steps - start if o.mask.mode == "trajectory" else 1) * len(jobs)
            )
        if r.method != "ito":
            run = levels.steps - levels.start(RATIOS[r.method] if o.ratio is None else o.ratio)
            return total + run * (both + ("diffedit" in r.method) * inversion) * len(jobs)
        run = levels.steps - levels.start(o.encoding_ratio)
        guided = sum(j.request.options.lam < 1 for j in jobs)
        total += run * (inversion + both) * len(jobs) + run * (inversion + both) * guided
        return total + (run * (inversion + both) * guided if o.refine else 0)

    @staticmethod
    def _note_mask(job: _Job, profile: Profile) -> None:
        if job.mask is None:
            return
        area = float((job.mask > 0).float().mean())
        if not 0.01 <= area <= 0.8:
            what = "almost nothing can change" if area < 0.01 else "almost nothing is kept"
            profile.note(
                f"the mask covers {area:.1%} of the picture: {what}; change the mask threshold, or give a mask"
            )

    def _batched(self, run: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        """The VAE in pieces of 8, one by one where memory runs out."""
        try:
            return torch.cat([run(piece) for piece in batch.split(8)])
        except (RuntimeError, MemoryError) as error:
            if "allocate memory" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
                raise
        try:
            return torch.cat([run(piece) for piece in batch.split(1)])
        except (RuntimeError, MemoryError) as error:
            raise RunError(
                f"out of memory in the VAE with one picture of {tuple(batch.shape[-2:])}; use a smaller one"
            ) from error

    def _decode(self, latents: Tensor) -> Tensor:
        return self._batched(self.model.decode, latents)

    def _mask_picture(self, job: _Job) -> Image.Image | None:
        if job.mask is None:
            return None
        cells = (job.mask[0, 0].cpu() * 255).round().byte()
        large = Image.fromarray(cells.numpy()).resize(
            (job.pixels.shape[-1], job.pixels.shape[-2]), Image.Resampling.NEAREST
        )
        return pictures.crop_back(large, job.size)

    def _finish(self, run: _Stages, stage: str, profile: Profile) -> list[EditResult]:
        """Composite, decode, and write the receipts."""
        jobs, options = run.jobs, run.jobs[0].request.options
        for j in jobs:
            if options.composite == "latent" and j.mask is not None:
                x0, y = j.found["encode"]["value"], j.found[stage]["value"]
                j.found[stage] = {"value": blend(j.mask, y.unsqueeze(0), x0.unsqueeze(0))[0]}
        with profile.stage("decode"):
            finals = self._decode(torch.stack([j.found[stage]["value"] for j in jobs]))
            shown = [j for j in jobs if "guidance" in j.found]
            guides: Iterator[Tensor] = iter(
                self._decode(torch.stack([j.found["guidance"]["value"] for j in shown])) if shown else []
            )
            results = []
            for j, pixels in zip(jobs, finals, strict=True):
                image = pictures.crop_back(pictures.to_image(pixels), j.size)
                guidance = (
                    pictures.crop_back(pictures.to_image(next(guides)), j.size) if "guidance" in j.found else None
                )
                mask = self._mask_picture(j)
                if options.composite == "pixel" and mask is not None:
                    image = paste(pictures.as_rgb(j.request.image), image, mask, options.feather)
                # Copies: what the caller does with them must not reach the cache.
                latent, source = (j.found[s]["value"].cpu().clone() for s in (stage, "encode"))
                results.append(EditResult(image, mask, guidance, latent, source, profile, self._receipt(j, profile)))
        profile.notes += [n for n in self.model.notes if n not in profile.notes]
        return results

    def _receipt(self, job: _Job, profile: Profile) -> dict[str, Any]:
        r = job.request
        receipt: dict[str, Any] = {
            "iedit": VERSION,
            "model": {"name": self.model.name, "digest": self.model.digest, "dtype": str(self.model.dtype).removeprefix("torch.")},
            "request": {"prompt": r.prompt, "source_prompt": r.source_prompt, "method": r.method, "seed": r.seed,
                        "steps": r.steps, "options": dataclasses.asdict(r.options)},
            "inputs": {"image": picture_digest(r.image), "mask": None if r.mask is None else picture_digest(r.mask),
                       "layouts": {n: picture_digest(p) for n, p in r.layouts.items()},
                       "source_layouts": {n: picture_digest(p) for n, p in r.source_layouts.items()}},
            "backend": {"name": self.backend, "device": str(self.model.device), "threads": torch.get_num_threads()},
            "versions": versions(),
            "mask": None,
            "notes": profile.notes,
        }  # fmt: skip
        if job.mask is not None:
            receipt["mask"] = {"area": round(float(job.mask.mean()), 6), "estimated": job.given_mask is None}
        return receipt


class _Stages:
    """Runs a stage for the jobs that the cache cannot answer, as one batch; equal keys are computed once."""

    def __init__(self, editor: Editor, jobs: list[_Job], profile: Profile):
        self.cache, self.jobs, self.profile = editor.cache, jobs, profile
        model = editor.model
        self.base = [
            model.digest,
            editor.backend,
            str(model.dtype),
            model.device.type,
            list(dataclasses.astuple(model.schedule)[1:]),
        ]

    def stage(
        self,
        name: str,
        parts: Callable[[_Job], list[Any]],
        compute: Callable[[list[_Job]], Tensor],
        members: list[_Job] | None = None,
    ) -> None:
        """`job.found[name]["value"]` for every member; `compute` gets the jobs that are missing and returns a batch."""
        members = self.jobs if members is None else members
        with self.profile.stage(name):
            missing: dict[str, _Job] = {}
            answers: dict[str, Result] = {}
            for j in members:
                j.keys[name] = key_of(name, self.base, *parts(j))
                held = self.cache.get(j.keys[name])
                if held is None:
                    missing.setdefault(j.keys[name], j)
                else:
                    answers[j.keys[name]] = held
            if missing:
                for key, value in zip(missing, compute(list(missing.values())), strict=True):
                    answers[key] = {"value": value.contiguous().clone()}
                    self.cache.put(key, answers[key])
            else:
                self.profile.cached.append(name)
            for j in members:
                device = j.found["encode"]["value"].device if "encode" in j.found else None
                value = answers[j.keys[name]]["value"]
                j.found[name] = {"value": value if device is None else value.to(device)}

    def always(self, name: str, compute: Callable[[list[_Job]], Tensor]) -> None:
        """A stage that is not kept: what it depends on changes with every edit."""
        with self.profile.stage(name):
            for j, value in zip(self.jobs, compute(self.jobs), strict=True):
                j.found[name] = {"value": value}


def paste(source: Image.Image, edited: Image.Image, mask: Image.Image, feather: float) -> Image.Image:
    """The edited picture inside the mask, the source outside it, with a soft edge that lies inside the mask.

    Pixels outside the mask are the source's, bit for bit. `feather`: width of the edge in pixels.
    """
    if feather > 0:
        radius = max(1, round(feather))
        inner = mask.filter(ImageFilter.MinFilter(2 * (radius // 2) + 1)).filter(ImageFilter.GaussianBlur(feather / 2))
        mask = ImageChops.darker(mask, inner)
    return Image.composite(edited, source, mask)


def picture_digest(image: Image.Image) -> str:
    """32 hex digits of a picture's mode, size and pixels."""
    return hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()[:32]


def versions() -> dict[str, str]:
    """Of everything that can change a pixel."""
    from importlib import metadata

    found = {"python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers", "numpy", "pillow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found
