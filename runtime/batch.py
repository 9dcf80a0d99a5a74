"""One batch of edits that share every network call: what each stage computes, and which results it may reuse.

`Batch.run` is the main path of an edit, top to bottom; the methods below it are its stages in the same order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import ImageOps
from torch import Tensor

from ..kernels.guided_step import blend
from ..kernels.mask_map import mask_map
from . import images as pictures
from .denoiser import (
    Condition,
    Denoiser,
    Loop,
    Network,
    NoisedReference,
    Reference,
    TrajectoryReference,
    invert,
    joined,
)
from .errors import RunError
from .ito import ito_pass, masked_sampling
from .mask import estimate, rounding_level
from .models import Model
from .profile import Profile
from .requests import RATIOS, Job, estimates_mask
from .schedule import add_noise, seeded_noise
from .stages import Result, StageCache, key_of, tensor_digest
from .uses import UNMASKED


@dataclass(frozen=True)
class Stage:
    """A stage that loops over levels and whose results are kept.

    Attributes:
        name: of the stage.
        parts: what a job's result depends on, beside the model and the backend: JSON-ready parts of its key.
        loop: makes the loop for some jobs.
        members: the jobs that need it.
        batch_dim: which dimension of the loop's result counts the jobs.
    """

    name: str
    parts: Callable[[Job], list[Any]]
    loop: Callable[[list[Job]], Loop[Tensor]]
    members: list[Job]
    batch_dim: int = 0


class Batch:
    """Jobs of one group (see `requests.group_key`), at one model and backend.

    Args:
        jobs: at least one; their results end up in `job.found`, stage by stage, and their masks in `job.mask`.
        backend: name of the backend, part of every key: backends round differently.
        max_batch: samples per network call.
        share: let stages that do not depend on each other share calls.
    """

    def __init__(
        self,
        model: Model,
        denoiser: Denoiser,
        backend: str,
        jobs: list[Job],
        cache: StageCache,
        profile: Profile,
        max_batch: int,
        share: bool = True,
    ):
        self.model, self.jobs, self.cache, self.profile, self.share = model, jobs, cache, profile, share
        self.request = jobs[0].request
        self.options = o = self.request.options
        self.network = Network(denoiser, model.schedule.prediction, max_batch, profile)
        self.levels = model.schedule.levels(jobs[0].steps)
        assert o.guidance_scale is not None  # `requests.check_request` has settled what was left to the checkpoint
        self.scale = o.guidance_scale
        height, width = jobs[0].pixels.shape[-2:]
        self.shape = (model.channels, height // model.factor, width // model.factor)
        ratio = RATIOS.get(self.request.method, 1.0) if o.ratio is None else o.ratio
        self.start = self.levels.start(o.encoding_ratio if self.request.method == "ito" else ratio)
        self.guided = [j for j in jobs if j.request.options.lam < 1] if self.request.method == "ito" else []
        self.base = [model.digest, backend, str(model.dtype), model.device.type, model.schedule.digest]
        self.states: dict[str, Tensor] = {}
        mask = o.mask.settled(model)  # a request settles it only where it estimates a mask
        assert mask.strength is not None and mask.threshold is not None
        self.strength, self.threshold = mask.strength, mask.threshold

    def run(self, only_mask: bool = False) -> str:
        """All stages up to the clean latent; the name of the stage that holds it."""
        # 1. What the network is told, and the input's latent.
        self.encode_texts()
        self.encode()
        self.judge_pictures()
        # 2. Where the edit may happen.
        self.find_masks()
        if only_mask:
            return "encode"
        # 3. Every method but ITO: masked sampling from the noised or inverted input.
        if self.request.method != "ito":
            if self.inverts:
                self.run_stages(self.inversion_of_input())
            return self.sample()
        # 4. ITO: the input at every level; and what the edit should look like, not for lambda = 1. They share calls.
        if not self.guided:
            self.run_stages(self.inversion_of_input())
        elif self.share:
            self.run_stages(self.inversion_of_input(), self.guidance_image())
        else:
            self.run_stages(self.inversion_of_input())
            self.run_stages(self.guidance_image())
        # 5. The guidance at every level.
        if self.guided:
            self.round_trip()
            self.run_stages(self.inversion_of_guidance())
            if self.options.refine:
                self.refine_guidance()
                self.run_stages(self.inversion_of_guidance())
        # 6. The edit: every lambda of a sweep in one batch.
        return self.final_pass()

    # --- stages -------------------------------------------------------------------------------------------------

    def encode_texts(self) -> None:
        chunks, negative = self.jobs[0].chunks, self.options.negative_prompt
        texts = {t for j in self.jobs for t in (j.request.prompt, j.source_prompt, negative)}
        with self.profile.stage("encode"):
            self.states = {t: self.model.encode_text([t], chunks) for t in sorted(texts)}

    def encode(self) -> None:
        self._stage(
            "encode", lambda j: [j.digest], lambda m: self.vae(self.model.encode, joined([j.pixels for j in m]))
        )

    def judge_pictures(self) -> None:
        """A note where a picture is not of the world that the model was trained on, if the model can tell: at its own size its
        autoencoder then loses much of it. One decoding (68 ms of the embedded model on one core) for each new picture."""
        limit, side = self.model.reconstruction_error, self.model.side
        if limit is None or side is None:
            return
        with self.profile.stage("encode"):
            for j in self.jobs:
                key = key_of("reconstruction", self.base, j.digest)
                held = self.cache.get(key)
                if held is None:
                    pixels, latent = j.pixels, j.found["encode"]["value"].unsqueeze(0)
                    if j.size != (side, side):
                        fitted = ImageOps.fit(pictures.as_rgb(j.request.image), (side, side))
                        pixels = pictures.to_tensor(fitted)
                        latent = self.vae(self.model.encode, pixels)
                    again = self.vae(self.model.decode, latent).clamp(-1, 1).cpu()
                    held = {"value": (again - pixels).abs().mean() / 2}
                    self.cache.put(key, held)
                error = float(held["value"])
                if not error <= limit:
                    j.note(
                        f"this is no picture of the world that {self.model.name} draws: its autoencoder is off by {error:.3f} of the "
                        f"range (its own: up to {limit:g}), so an edit is of no use; name another model with --model"
                    )

    def find_masks(self) -> None:
        """Given, or estimated (ITO Eq. 7), or none; the threshold is applied outside the stage and costs nothing."""
        o = self.options.mask
        if self.request.method in UNMASKED:
            return
        if self.jobs[0].given_mask is None and estimates_mask(self.request):

            def compare(members: list[Job]) -> Tensor:
                noise = torch.stack([self._noise(members, f"mask-{i}") for i in range(o.seeds)], dim=1)
                return self.network.drive(estimate(
                    self.network, self._found(members, "encode"), noise, self.levels, self._told(members),
                    self._told(members, source=True), uncond=self.states[self.options.negative_prompt], scale=self.scale,
                    strength=self.strength, mode=o.mode, guided=o.guided, rounding=rounding_level(self.model.dtype),
                ))  # fmt: skip

            how = [self.levels.steps, self.scale, o.mode, o.seeds, self.strength, o.guided]
            self._stage(
                "mask", lambda j: [j.digest, self._told_key(j), self._told_key(j, True), j.request.seed, how], compare
            )
            for j in self.jobs:
                heat = j.found["mask"]["value"].unsqueeze(0)
                j.mask = mask_map(heat, sigma=o.sigma, norm=o.norm, threshold=self.threshold)
        for j in self.jobs:
            if j.given_mask is not None:
                j.mask = j.given_mask
            self._note_mask(j)

    def inversion_of_input(self) -> Stage:
        """DDIM inversion under the source prompt; never with a ControlNet (METHOD section 2, row 9)."""
        return self._inversion("invert", "encode", self.jobs, lambda j: j.digest, source=True)

    def sample(self) -> str:
        def go(members: list[Job]) -> Loop[Tensor]:
            source: Reference
            if self.inverts:
                trajectory = self._trajectory(members, "invert")
                y, source = trajectory[0], TrajectoryReference(trajectory, self.levels)
            else:
                x0, noise = self._found(members, "encode"), self._noise(members, "sample")
                y = add_noise(x0, noise, self.levels.abar[self.start])
                source = NoisedReference(x0, noise, self.levels)
            masks = [j.mask for j in members if j.mask is not None]
            told, uncond = self._both(members)
            return masked_sampling(self.network, y, self.levels, self.start, told, uncond, self.scale, source=source,
                                   mask=torch.cat(masks) if masks else None)  # fmt: skip

        return self._always("sample", go)

    def guidance_image(self) -> Stage:
        """ITO with lambda 1 from random noise: more freedom than an inversion gives (METHOD section 2, row 10)."""
        o = self.options

        def go(members: list[Job]) -> Loop[Tensor]:
            x0, noise = self._found(members, "encode"), self._noise(members, "guidance")
            y = add_noise(x0, noise, self.levels.abar[self.start])
            told, uncond = self._both(members)
            return ito_pass(
                self.network, y, self.levels, self.start, told, uncond, self.scale,
                source=NoisedReference(x0, noise, self.levels), guidance=None, mask=self._masks(members),
                lam=torch.ones(len(members), device=y.device), phase=o.guidance, kept_area=o.kept_area,
            )  # fmt: skip

        how = [self.levels.steps, self.start, self.scale, dataclasses.asdict(o.guidance), o.kept_area]

        def key(j: Job) -> list[Any]:
            mask = "none" if j.mask is None else tensor_digest(j.mask)
            return [j.digest, self._told_key(j), mask, j.request.seed, how]

        return Stage("guidance", key, go, self.guided)

    def round_trip(self) -> None:
        """The guidance latent through the VAE and back, where that was asked for."""
        for j in self.guided if self.options.round_trip else ():
            image = self.vae(self.model.decode, j.found["guidance"]["value"].unsqueeze(0)).clamp(-1, 1)
            j.found["guidance"] = {"value": self.vae(self.model.encode, image)[0]}

    def inversion_of_guidance(self) -> Stage:
        """DDIM inversion of the guidance latent under the edit prompt (METHOD section 2, row 10)."""
        return self._inversion(
            "invert-guidance",
            "guidance",
            self.guided,
            lambda j: tensor_digest(j.found["guidance"]["value"]),
            source=False,
        )

    def refine_guidance(self) -> None:
        """ITO A.5: the input is the guidance image, the guidance is the input's inversion, lambda 0."""

        def go(members: list[Job]) -> Loop[Tensor]:
            g, x = self._trajectory(members, "invert-guidance"), self._trajectory(members, "invert")
            told, uncond = self._both(members)
            return ito_pass(
                self.network, g[0], self.levels, self.start, told, uncond, self.scale,
                source=TrajectoryReference(g, self.levels), guidance=TrajectoryReference(x, self.levels),
                mask=self._masks(members), lam=torch.zeros(len(members), device=g.device), phase=self.options.refinement,
            )  # fmt: skip

        how = [self.options.round_trip, dataclasses.asdict(self.options.refinement)]
        self.run_stages(
            Stage(
                "refine",
                lambda j: [j.keys["guidance"], j.keys["invert-guidance"], j.keys["invert"], how],
                go,
                self.guided,
            )
        )
        for j in self.guided:
            j.found["guidance"] = j.found["refine"]

    def final_pass(self) -> str:
        def go(members: list[Job]) -> Loop[Tensor]:
            x, guidance = self._trajectory(members, "invert"), None
            if self.guided:  # beside others, an edit with lambda 1 has a zero guidance: no gradient, at weight 0
                nothing = {"value": torch.zeros_like(members[0].found["invert"]["value"])}
                g = torch.stack([j.found.get("invert-guidance", nothing)["value"] for j in members], dim=1)
                guidance = TrajectoryReference(g, self.levels)
            told, uncond = self._both(members)
            return ito_pass(
                self.network, x[0], self.levels, self.start, told, uncond, self.scale,
                source=TrajectoryReference(x, self.levels), guidance=guidance, mask=self._masks(members),
                lam=torch.tensor([j.request.options.lam for j in members], device=x.device), phase=self.options.final,
                kept_area=self.options.kept_area,
            )  # fmt: skip

        return self._always("final", go)

    def composite(self, stage: str) -> None:
        """The source's latent outside the mask, with `composite="latent"`."""
        for j in self.jobs:
            if self.options.composite == "latent" and j.mask is not None:
                x0, y = j.found["encode"]["value"], j.found[stage]["value"]
                j.found[stage] = {"value": blend(j.mask, y.unsqueeze(0), x0.unsqueeze(0))[0]}

    def vae(self, run: Callable[..., Tensor], batch: Tensor) -> Tensor:
        """`model.encode` or `model.decode` on any number of pictures; what it has to say goes into the profile."""
        return vae_batches(partial(run, note=self.profile.note), batch)

    # --- pieces -------------------------------------------------------------------------------------------------

    @property
    def inverts(self) -> bool:
        """Whether masked sampling starts from an inversion."""
        return self.request.method in ("diffedit", "controlnet-diffedit")

    def _told(self, members: list[Job], *, source: bool = False, layouts: bool = True) -> Condition:
        o = self.options
        own = dict(o.control_scales)
        text = torch.cat([self.states[j.source_prompt if source else j.request.prompt] for j in members])
        names = sorted(self.jobs[0].maps) if layouts else []
        maps = [torch.cat([(j.source_maps if source else j.maps)[n] for j in members]) for n in names]
        return Condition(text, tuple(zip(names, maps, [own.get(n, o.control_scale) for n in names], strict=True)))

    def _both(self, members: list[Job]) -> tuple[Condition, Condition]:
        """The edit's condition and its unconditional half."""
        told = self._told(members)
        return told, told.with_text(self.states[self.options.negative_prompt])

    def _told_key(self, job: Job, source: bool = False) -> list[Any]:
        maps, o = (job.source_maps if source else job.maps), self.options
        return [job.source_prompt if source else job.request.prompt, o.negative_prompt, job.chunks, o.control_scale,
                list(o.control_scales), {n: tensor_digest(m) for n, m in maps.items()}]  # fmt: skip

    def _noise(self, members: list[Job], purpose: str) -> Tensor:
        return torch.stack([seeded_noise(j.request.seed, purpose, self.shape) for j in members]).to(self.model.device)

    def _found(self, members: list[Job], stage: str) -> Tensor:
        return torch.stack([j.found[stage]["value"] for j in members])

    def _trajectory(self, members: list[Job], stage: str) -> Tensor:
        """(N - start + 1, B, C, h, w)."""
        return torch.stack([j.found[stage]["value"] for j in members], dim=1)

    def _masks(self, members: list[Job]) -> Tensor:
        """(B, 1, h, w); with no mask all of the picture is preserved (ITO Eq. 3)."""
        nothing = torch.zeros(1, 1, *self.shape[1:], device=self.model.device)
        return torch.cat([nothing if j.mask is None else j.mask for j in members])

    def _inversion(
        self, name: str, of: str, members: list[Job], content: Callable[[Job], str], *, source: bool
    ) -> Stage:
        o = self.options

        def go(jobs: list[Job]) -> Loop[Tensor]:
            told = self._told(jobs, source=source, layouts=False)
            low = told.with_text(self.states[o.negative_prompt])
            told = low if o.inversion == "unconditional" else told
            return invert(self.network, self._found(jobs, of), self.levels, self.start, told, uncond=low,
                          scale=o.inversion_scale, evaluate=o.inversion_evaluate)  # fmt: skip

        how = [self.levels.steps, self.start, o.inversion, o.inversion_scale, o.inversion_evaluate, o.negative_prompt]
        return Stage(
            name,
            lambda j: [content(j), j.source_prompt if source else j.request.prompt, j.chunks, how],
            go,
            members,
            batch_dim=1,
        )

    def _note_mask(self, job: Job) -> None:
        if job.mask is None:
            return
        area = float((job.mask > 0).float().mean())
        if job.given_mask is None and not job.found["mask"]["value"].any():
            job.note(
                "the mask is empty: to the network both prompts say the same, so nothing is to change; say in the prompt what "
                "the edited picture shows and in the source prompt what it shows now, or give a mask"
            )
        elif not 0.01 <= area <= 0.8:
            what = "almost nothing can change" if area < 0.01 else "almost nothing is kept"
            job.note(f"the mask covers {area:.1%} of the picture: {what}; change the mask threshold, or give a mask")

    def _stage(self, name: str, parts: Callable[[Job], list[Any]], compute: Callable[[list[Job]], Tensor]) -> None:
        """A stage of one call in place of a loop."""
        with self.profile.stage(name):
            missing, answers = self._look_up(name, parts, self.jobs)
            self._keep(name, self.jobs, missing, answers, compute(missing) if missing else None)

    def run_stages(self, *stages: Stage) -> None:
        """`job.found[stage.name]["value"]` for every member: from the cache, and the missing ones as one batch; equal keys
        are computed once. Several stages, which must not depend on each other, go in lock-step and share calls."""
        with self.profile.stage(*(s.name for s in stages)):
            looked = [self._look_up(s.name, s.parts, s.members) for s in stages]
            loops = {s.name: s.loop(missing) for s, (missing, _) in zip(stages, looked) if missing}
            outputs = self.network.drive_together(loops)
            for stage, (missing, answers) in zip(stages, looked):
                values = outputs.get(stage.name)
                if values is not None and stage.batch_dim:
                    values = values.transpose(0, stage.batch_dim)
                self._keep(stage.name, stage.members, missing, answers, values)

    def _look_up(
        self, name: str, parts: Callable[[Job], list[Any]], members: list[Job]
    ) -> tuple[list[Job], dict[str, Result]]:
        """Members whose results must be computed, one for each key, and the cache's answers."""
        missing: dict[str, Job] = {}
        answers: dict[str, Result] = {}
        for j in members:
            key = j.keys[name] = key_of(name, self.base, *parts(j))
            held = self.cache.get(key, name, self._shape_of(name))
            if held is None:
                missing.setdefault(key, j)
            else:
                answers[key] = held
        if not missing:
            self.profile.cached.append(name)
        self.profile.expected -= self.costs().get(name, 0) * (len(members) - len(missing))
        return list(missing.values()), answers

    def _shape_of(self, stage: str) -> tuple[int, ...]:
        """Of one job's result of a stage that is kept."""
        levels = (self.levels.steps - self.start + 1, *self.shape)
        return {"mask": (1, *self.shape[1:]), "invert": levels, "invert-guidance": levels}.get(stage, self.shape)

    def _keep(
        self, name: str, members: list[Job], missing: list[Job], answers: dict[str, Result], values: Tensor | None
    ) -> None:
        for j, value in zip(missing, values if values is not None else (), strict=True):
            answers[j.keys[name]] = {"value": value.contiguous().clone()}
            self.cache.put(j.keys[name], answers[j.keys[name]])
        for j in members:
            j.found[name] = {"value": answers[j.keys[name]]["value"].to(self.model.device)}

    def _always(self, name: str, loop: Callable[[list[Job]], Loop[Tensor]]) -> str:
        """A stage that is not kept: what it depends on changes with every edit."""
        with self.profile.stage(name):
            for j, value in zip(self.jobs, self.network.drive(loop(self.jobs)), strict=True):
                j.found[name] = {"value": value}
        return name

    # --- progress -----------------------------------------------------------------------------------------------

    def costs(self) -> dict[str, int]:
        """Network evaluations of each stage for one edit that finds nothing in the cache."""
        o, method = self.options, self.request.method
        both, inversion = 1 if self.scale == 1 else 2, 1 if o.inversion_scale == 1 else 2
        run, costs = self.levels.steps - self.start, {}
        if self.jobs[0].given_mask is None and estimates_mask(self.request):
            if (
                o.mask.mode == "single"
            ):  # where the halves without a condition cancel for two texts (see `mask.estimate`)
                each = both if o.mask.guided and self.jobs[0].maps else 1
            else:
                each = (self.levels.steps - self.levels.start(self.strength)) * both - (
                    0 if o.mask.guided else both - 1
                )
            costs["mask"] = o.mask.seeds * 2 * each
        if method != "ito":
            return costs | {"sample": run * both} | ({"invert": run * inversion} if self.inverts else {})
        costs |= {"invert": run * inversion, "final": run * both}
        if self.guided:
            costs |= {"guidance": run * both, "invert-guidance": run * inversion * (2 if o.refine else 1)}
            costs |= {"refine": run * both} if o.refine else {}
        return costs

    def expected(self) -> int:
        """Network evaluations of the batch that finds nothing in the cache."""
        per_guided = ("guidance", "invert-guidance", "refine")
        return sum(n * len(self.guided if name in per_guided else self.jobs) for name, n in self.costs().items())


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
