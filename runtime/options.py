"""How an edit is made: everything about it that is not its inputs, with bounds; and which method uses which option.

The table `USES` is where the checks, the command line's help and docs/options.md come from. Nothing heavy is imported, so
that the command line can refuse an option before torch is loaded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import METHODS
from .errors import UsageError
from .model.checkpoint import MAX_CONTROL, MAX_GUIDANCE, MAX_INNER_STEPS, MAX_REWEIGHT, MAX_SIDE, MIN_SIDE

if TYPE_CHECKING:
    from .model.model import Model

# METHOD section 3, row 3; ITO's section 4 compares with DiffEdit at 0.7 and with ControlNet + DiffEdit at 1.0.
RATIOS = {"iedit": 0.7, "sdedit": 0.7, "controlnet": 0.7, "diffedit": 0.7, "controlnet-diffedit": 1.0, "p2p": 1.0,
          "ddpm": 0.64}  # fmt: skip
# Of ddpm: the paper's for the edit, for a checkpoint that recommends no scale; and its 3.5 for the source in units of the usual scale of its
# checkpoint. On world edits the embedded model's own scale (5) beats twice that: L1 inside and outside 0.091 and 0.015 against 0.130 and 0.042.
DDPM_SCALE, DDPM_SOURCE_SHARE = 15.0, 3.5 / 7.5
CORRECTIONS = ("none", "direct", "null-text")  # of the errors of an inversion
REPLACEMENTS = ("auto", "replace", "refine")  # of cross-attention maps, see `alignment`
PATHS = ("inverted", "drawn")  # of the guidance image
SPACINGS = ("leading", "linspace", "trailing")  # of timesteps, by diffusers' names
DEFAULT_LAMBDA = 0.6  # ITO section 4
STEPS = {"iedit": 50}  # METHOD section 3, row 3; ITO's section 4 uses 25 for all that it compares


@dataclass(frozen=True)
class ItoSettings:
    """How one pass of ITO updates its latent (METHOD section 2, rows 5-8; A.2 reports t_u 20, k 30 for the guidance).

    Attributes:
        t_u: steps that are updated, the noisiest first; None is 15 of 25, or what the checkpoint recommends for edits without layouts.
        k: inner steps at each.
        lr: the longest step of a value (clipped), or Adam's learning rate.
        update: "clipped", the Newton step of the preservation loss, never longer than lr; or "adam", as in the papers.
        carry: keep Adam's state across timesteps in place of a fresh one at each.
    """

    t_u: int | None = None
    k: int = 1
    lr: float = 0.1
    update: str = "clipped"
    carry: bool = False

    def updates(self, steps: int, share: float | None = None) -> int:
        """t_u for a run of `steps` steps; `share` is what the checkpoint recommends, if anything."""
        return round(steps * (15 / 25 if share is None else share)) if self.t_u is None else self.t_u


@dataclass(frozen=True)
class MaskOptions:
    """How the edit mask is estimated (ITO Eq. 7; METHOD section 2, rows 11-14).

    Attributes:
        mode: "single" (one evaluation at the noise level of `strength`), "trajectory" (both conditions are denoised and
            compared at the last step) or "none" (ITO then preserves everywhere, Eq. 3; other methods do not blend). None is the
            method's own, see `mask_mode`.
        seeds: noises that the difference is averaged over; None is what the checkpoint recommends for ITO, else 10.
        strength: where the comparison starts, share of the steps; None is what the checkpoint recommends, else 0.5.
        guided: compare predictions after guidance.
        sigma: of the Gaussian smoothing, latent pixels.
        norm: "minmax", or "clamp" at 3x the mean as diffusers does; per image.
        threshold: cells above it are edited; None is 0.5 for clamp, and for minmax what the checkpoint recommends, else 0.1.
    """

    mode: str | None = None
    seeds: int | None = None
    strength: float | None = None
    guided: bool = True
    sigma: float = 1.0
    norm: str = "minmax"
    threshold: float | None = None

    def settled(self, model: Model, method: str) -> MaskOptions:
        """With a number for what was left to the checkpoint."""
        strength, threshold, seeds = self.strength, self.threshold, self.seeds
        if seeds is None:
            seeds = model.mask_seeds if method in ITO and model.mask_seeds is not None else 10
        if strength is None:
            strength = 0.5 if model.mask_strength is None else model.mask_strength
        if threshold is None and self.norm == "minmax":
            threshold = 0.1 if model.mask_threshold is None else model.mask_threshold
        return dataclasses.replace(
            self, seeds=seeds, strength=strength, threshold=0.5 if threshold is None else threshold
        )


@dataclass(frozen=True)
class Options:
    """Everything about an edit that is not its inputs.

    Attributes:
        lam: weight of preservation against guidance, lambda of ITO Eq. 6; 1 skips the guidance image. None is 0.6; or, of an edit without layouts,
            1 where the mask covers no more of the picture than the checkpoint recommends (`chosen_lambda`).
        guidance_scale: classifier-free guidance; None is what the checkpoint recommends, else 7.5; 15 for ddpm.
        source_guidance_scale: of ddpm, while the noise of the picture is found; None is 3.5 / 7.5 of the checkpoint's.
        negative_prompt: text of the unconditional half.
        guidance_until: share of the steps of denoising, from the noisiest on, that have classifier-free guidance; the rest asks for the
            prompt alone, at half the evaluations (limited-interval guidance, arXiv:2404.07724). None is what the checkpoint recommends for
            ITO, else 1.
        control_scale: of every ControlNet's residuals.
        control_scales: (name, scale) pairs that differ from `control_scale`.
        timestep_spacing: "leading", "linspace" or "trailing", as diffusers calls it; None is the checkpoint's. With few steps "leading", which
            Stable Diffusion 1.x has, begins far from the last timestep, so that the picture shows through its noise.
        encoding_ratio: share of the steps that ITO encodes, t_E / N.
        ratio: share of the steps that the other methods encode; None is 0.7, and 1.0 for ControlNet + DiffEdit.
        mask: how the mask is estimated.
        guidance, final: ITO's updates while the guidance image is made and in the final pass.
        guidance_path: what the final pass takes for the guidance image at every level: the guidance image "inverted", as in the
            paper, or the latents that it was "drawn" through, which saves that inversion. None is what the checkpoint recommends, else
            inverted; and inverted where it is refined or goes through the VAE.
        refine: refine the guidance image with the input (ITO A.5).
        refinement: the updates of that refinement.
        inversion: condition of the inversion: the "source" prompt or "unconditional".
        inversion_scale: classifier-free guidance during the inversion; 1 is off.
        inversion_evaluate: timestep told during inversion: of the "target" level (as diffusers does) or the "source".
        round_trip: pass the guidance image through the VAE before it is inverted.
        kept_area: normalise the preservation loss by the kept area.
        composite: "none"; "latent" (source latent outside the mask at the end); "pixel" (feathered paste of the input).
        feather: width of the pixel paste's edge, pixels.
        image_guidance_scale: of ip2p, how far the picture is followed, beside `guidance_scale` for the text.
        cross_replace: share of p2p's steps, from the noisiest on, in which the edit takes the source's cross-attention maps.
        self_replace: likewise of self-attention maps.
        self_replace_cells: self-attention is replaced where a picture has at most this share of the latent's cells; the published code for
            real pictures takes 32x32 of 64x64.
        replacement: how tokens take each other's maps: "replace", "refine" or "auto", see `alignment.alignment`.
        reweight: (word, factor) pairs: the maps of each such word of the prompt are multiplied while cross-attention is replaced.
        inversion_correction: what becomes of the errors of p2p's inversion: "none" leaves them, "direct" puts the source's branch back on the
            inversion at every step (PnP inversion), "null-text" fits the unconditional embeddings of every step to it, by gradients.
        resize: a picture with a longer side is worked on at this size of it, pixels, and the edit is pasted back into the picture
            as it was: where there is a mask, nothing outside it changes.
    """

    lam: float | None = None
    guidance_scale: float | None = None
    source_guidance_scale: float | None = None
    negative_prompt: str = ""
    guidance_until: float | None = None
    control_scale: float = 1.0
    control_scales: tuple[tuple[str, float], ...] = ()
    timestep_spacing: str | None = None
    encoding_ratio: float = 1.0
    ratio: float | None = None
    mask: MaskOptions = MaskOptions()
    guidance: ItoSettings = ItoSettings()
    final: ItoSettings = ItoSettings()
    guidance_path: str | None = None
    refine: bool = False
    refinement: ItoSettings = ItoSettings(t_u=6)
    inversion: str = "source"
    inversion_scale: float = 1.0
    inversion_evaluate: str = "target"
    round_trip: bool = False
    kept_area: bool = False
    composite: str = "none"
    feather: float = 4.0
    image_guidance_scale: float = 1.5
    cross_replace: float = 0.8
    self_replace: float = 0.4
    self_replace_cells: float = 0.25
    replacement: str = "auto"
    reweight: tuple[tuple[str, float], ...] = ()
    inversion_correction: str = "direct"
    resize: int | None = None

    def settled(self, model: Model, steps: int, method: str = "ito", layouts: bool = False) -> Options:
        """With a value for what was left to the checkpoint; `layouts`: the edit has some."""
        share = None if layouts else model.text_update_share
        guidance, final = (dataclasses.replace(s, t_u=s.updates(steps, share)) for s in (self.guidance, self.final))
        scale, of_source = self.guidance_scale, self.source_guidance_scale
        if scale is None:
            scale = DDPM_SCALE if method in DDPM and not model.recommends_guidance else model.guidance_scale
        if of_source is None and method in DDPM:
            of_source = model.guidance_scale * DDPM_SOURCE_SHARE
        until, path = self.guidance_until, self.guidance_path
        if until is None:
            until = model.guidance_until if method in ITO and model.guidance_until is not None else 1.0
        if path is None:
            path = "inverted" if self.refine or self.round_trip else model.guidance_path or "inverted"
        return dataclasses.replace(
            self,
            guidance_scale=scale,
            source_guidance_scale=of_source,
            guidance_until=until,
            guidance_path=path,
            mask=self.mask.settled(model, method),
            guidance=guidance,
            final=final,
        )

    def chosen_lambda(self, model: Model, area: float, layouts: bool = False) -> float:
        """lambda of an edit whose mask covers `area` (0 to 1) of the picture; `layouts`: it has some.

        A thing is redrawn in its place by the prompt alone, better and with fewer evaluations than towards a guidance image. What covers most of
        a picture shows through its inversion, and takes a guidance image to become another (docs/defaults.md).
        """
        if self.lam is not None:
            return self.lam
        small = model.lambda_area is not None and 0 < area <= model.lambda_area
        return 1.0 if small and not (layouts or self.refine or self.round_trip) else DEFAULT_LAMBDA

    def guided_steps(self, steps: int) -> int:
        """How many of a run's steps have classifier-free guidance."""
        return steps if self.guidance_until is None else round(steps * self.guidance_until)

    def check(self) -> None:
        """Raises UsageError for a value that no stage could use."""
        from ..kernels.ito_step import UPDATES

        def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
            if value not in allowed:
                raise UsageError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")

        def within(name: str, value: float, low: float, high: float) -> None:
            if not low <= value <= high:
                raise UsageError(f"{name} is {value}, expected {low:g} to {high:g}")

        if self.mask.mode is not None:
            one_of("mask mode", self.mask.mode, ("single", "trajectory", "none"))
        one_of("mask norm", self.mask.norm, ("minmax", "clamp"))
        if self.timestep_spacing is not None:
            one_of("timestep_spacing", self.timestep_spacing, SPACINGS)
        if self.guidance_path is not None:
            one_of("guidance_path", self.guidance_path, PATHS)
        one_of("inversion", self.inversion, ("source", "unconditional"))
        one_of("inversion_evaluate", self.inversion_evaluate, ("target", "source"))
        one_of("replacement", self.replacement, REPLACEMENTS)
        one_of("inversion_correction", self.inversion_correction, CORRECTIONS)
        one_of("composite", self.composite, ("none", "latent", "pixel"))
        within("lambda", 0 if self.lam is None else self.lam, 0, 1)
        within("guidance_until", 0 if self.guidance_until is None else self.guidance_until, 0, 1)
        within("cross_replace", self.cross_replace, 0, 1)
        within("self_replace", self.self_replace, 0, 1)
        within("self_replace_cells", self.self_replace_cells, 0, 1)
        for word, factor in self.reweight:
            within(f"reweight {word}", factor, -MAX_REWEIGHT, MAX_REWEIGHT)
        within("mask threshold", 0 if self.mask.threshold is None else self.mask.threshold, 0, 1)
        within("mask seeds", 1 if self.mask.seeds is None else self.mask.seeds, 1, 1000)
        within("mask sigma", self.mask.sigma, 0, 1000)
        within("feather", self.feather, 0, 1000)
        within("resize", MIN_SIDE if self.resize is None else self.resize, MIN_SIDE, MAX_SIDE)
        within("guidance_scale", 0 if self.guidance_scale is None else self.guidance_scale, 0, MAX_GUIDANCE)
        within("source_guidance_scale", self.source_guidance_scale or 0, 0, MAX_GUIDANCE)
        within("image_guidance_scale", self.image_guidance_scale, 0, MAX_GUIDANCE)
        within("inversion_scale", self.inversion_scale, 0, MAX_GUIDANCE)
        within("control_scale", self.control_scale, 0, MAX_CONTROL)
        if self.guidance_path == "drawn" and (self.refine or self.round_trip):
            raise UsageError(
                "guidance_path drawn goes with neither refine nor round_trip, which change the guidance image after it was drawn; "
                "use guidance_path inverted"
            )
        for name, scale in self.control_scales:
            within(f"control_scales {name}", scale, 0, MAX_CONTROL)
        ratios = {"encoding_ratio": self.encoding_ratio, "mask strength": self.mask.strength, "ratio": self.ratio}
        for name, ratio in ratios.items():
            if ratio is not None and not 0 < ratio <= 1:
                raise UsageError(f"{name} is {ratio}, expected a number above 0 and at most 1")
        for settings in (self.guidance, self.final, self.refinement):
            t_u = 0 if settings.t_u is None else settings.t_u
            if not (1 <= settings.k <= MAX_INNER_STEPS and t_u >= 0 and 0 < settings.lr < math.inf):
                raise UsageError(f"{settings}: expected t_u >= 0, k >= 1 (at most {MAX_INNER_STEPS}) and lr > 0")
            one_of("update", settings.update, UPDATES)
            if settings.carry and settings.update != "adam":
                raise UsageError(
                    f"carry keeps Adam's state, and update {settings.update!r} has none; use update='adam'"
                )


# --- which method uses which option -------------------------------------------------------------------------------

UNMASKED = ("sdedit", "controlnet")
ITO = ("ito",)
MASKED = tuple(m for m in METHODS if m not in UNMASKED)
INVERTING = ("ito", "diffedit", "controlnet-diffedit", "p2p")
P2P = ("p2p",)
DDPM = ("ddpm",)
IP2P = ("ip2p",)
LOCALISED = (
    *P2P,
    *DDPM,
    *IP2P,
)  # they keep what the prompt leaves alone without a mask: one is used where it is given or asked for
TEXT_ONLY = (*P2P, *DDPM, *IP2P)  # they take no layouts
LAYOUTS = tuple(m for m in METHODS if m not in TEXT_ONLY)
NOISING = tuple(m for m in METHODS if m not in (*ITO, "ip2p"))


def mask_mode(method: str, asked: str | None) -> str:
    """`MaskOptions.mode` for a method: what was asked for, else "single", or "none" for a method that needs no mask."""
    return asked or ("none" if method in LOCALISED else "single")


@dataclass(frozen=True)
class OptionContext:
    """What of an edit decides which of its options matter.

    Attributes:
        lambdas: of all edits that are asked for together; None where it is chosen when the mask is known.
        mask_mode: as `mask_mode` says it.
        mask_given: a mask was given, so none is estimated.
        guidance_scale: None where it is left to a checkpoint that is not loaded yet.
        inverts_with_negative: the inversion reads the negative prompt too.
    """

    method: str
    lambdas: tuple[float | None, ...] = (None,)
    mask_given: bool = False
    mask_mode: str = "single"
    layouts: bool = False
    composite: str = "none"
    refine: bool = False
    resize: bool = False
    cross_replace: float = 0.8
    self_replace: float = 0.4
    guidance_scale: float | None = None
    inverts_with_negative: bool = False

    @property
    def estimates_mask(self) -> bool:
        """Whether the method uses a mask that it has to find itself."""
        return self.method in MASKED and not self.mask_given and self.mask_mode != "none"

    def lacks(self, need: str) -> str:
        """What is missing for `OptionUse.needs`, as a clause; "" if it is there."""
        there_is_one, estimated = (
            self.mask_given or self.mask_mode != "none",
            not self.mask_given and self.mask_mode != "none",
        )
        given, guided = "a mask is given, so none is estimated", self.guidance_scale != 1 or self.inverts_with_negative
        pasted = self.composite == "pixel" or self.resize
        fulfilled, why = {
            "": (True, ""),
            "a mask": (there_is_one, "there is no mask with mask mode none; give a mask, or mask mode single"),
            "a mask to estimate": (estimated, given if self.mask_given else "mask mode none estimates no mask"),
            "no given mask": (not self.mask_given, given),
            "layouts": (self.layouts, "no layout is given (--layout NAME=FILE)"),
            "guidance": (guided, "guidance scale 1 is without the unconditional half"),
            "a guidance image": (any(lam != 1 for lam in self.lambdas), "lambda 1 makes no guidance image"),
            "refinement": (self.refine, "the guidance image is not refined (--refine)"),
            "replaced cross-attention": (self.cross_replace > 0, "cross_replace 0 replaces none"),
            "replaced self-attention": (self.self_replace > 0, "self_replace 0 replaces none"),
            "the pixel composite or resize": (pasted, "the composite is not pixel, and nothing is resized"),
        }[need]
        return "" if fulfilled else why


@dataclass(frozen=True)
class OptionUse:
    """One option and the methods that use it.

    Attributes:
        field: of `EditRequest`, or of its `Options` ("mask.threshold" is nested).
        methods: that use it.
        option: of the command line; "" where it is of the Python interface alone.
        needs: what else there must be, one of those that `OptionContext.lacks` knows.
    """

    field: str
    methods: tuple[str, ...]
    option: str = ""
    needs: str = ""


USES = (
    OptionUse("mask", MASKED, "--mask"),
    OptionUse("options.lam", ITO, "--lambda"),
    OptionUse("options.negative_prompt", METHODS, "--negative-prompt", "guidance"),
    OptionUse("options.timestep_spacing", METHODS, "--timestep-spacing"),
    OptionUse("options.guidance_until", METHODS, "--guidance-until", "guidance"),
    OptionUse("options.guidance_path", ITO, "--guidance-path", "a guidance image"),
    OptionUse("options.control_scale", LAYOUTS, "--control-scale", "layouts"),
    OptionUse("options.control_scales", LAYOUTS, needs="layouts"),
    OptionUse("options.mask.mode", MASKED, "--mask-mode", "no given mask"),
    OptionUse("options.mask.threshold", MASKED, "--mask-threshold", "a mask to estimate"),
    OptionUse("options.mask.strength", MASKED, "--mask-strength", "a mask to estimate"),
    OptionUse("options.mask.seeds", MASKED, "--mask-seeds", "a mask to estimate"),
    OptionUse("options.mask.guided", MASKED, needs="a mask to estimate"),
    OptionUse("options.mask.sigma", MASKED, needs="a mask to estimate"),
    OptionUse("options.mask.norm", MASKED, needs="a mask to estimate"),
    OptionUse("options.guidance", ITO),
    OptionUse("options.final", ITO),
    OptionUse("options.final.t_u", ITO, "--t-u"),
    OptionUse("options.final.k", ITO, "--k"),
    OptionUse("options.final.update", ITO, "--update"),
    OptionUse("options.refine", ITO, "--refine", "a guidance image"),
    OptionUse("options.refinement", ITO, needs="refinement"),
    OptionUse("options.round_trip", ITO, needs="a guidance image"),
    OptionUse("options.encoding_ratio", ITO),
    OptionUse("options.kept_area", ITO),
    OptionUse("options.ratio", NOISING, "--ratio"),
    OptionUse("options.inversion", INVERTING),
    OptionUse("options.inversion_scale", INVERTING),
    OptionUse("options.inversion_evaluate", INVERTING),
    OptionUse("options.cross_replace", P2P, "--cross-replace"),
    OptionUse("options.self_replace", P2P, "--self-replace"),
    OptionUse("options.self_replace_cells", P2P, needs="replaced self-attention"),
    OptionUse("options.replacement", P2P, "--replacement", "replaced cross-attention"),
    OptionUse("options.reweight", P2P, "--reweight", "replaced cross-attention"),
    OptionUse("options.inversion_correction", P2P, "--inversion-correction"),
    OptionUse("options.source_guidance_scale", DDPM, "--source-guidance-scale"),
    OptionUse("options.image_guidance_scale", IP2P, "--image-guidance-scale"),
    OptionUse("options.composite", MASKED, "--composite", "a mask"),
    OptionUse("options.feather", MASKED, needs="the pixel composite or resize"),
    OptionUse("options.resize", METHODS, "--resize"),
)


def check_uses(context: OptionContext, given: Iterable[OptionUse]) -> None:
    """Refuse the first of the options that were set although this edit would not use them.

    Raises:
        UsageError: naming the option and the methods that use it, or what it lacks.
    """
    for use in given:
        name = use.option or use.field.removeprefix("options.")
        if context.method not in use.methods:
            raise UsageError(
                f"{name}: method {context.method} does not use it; leave it out, or name a method that does: {', '.join(use.methods)}"
            )
        why = context.lacks(use.needs)
        if why:
            raise UsageError(f"{name}: it would not be used, {why}; leave it out, or change that")


def unused_notes(context: OptionContext, source_prompt: bool, source_layouts: bool) -> list[str]:
    """What an edit does not use of what describes the picture: no reason to refuse it, as the same command serves several methods."""
    notes = []
    if source_prompt and context.method not in (*INVERTING, *DDPM) and not context.estimates_mask:
        notes.append("the source prompt is not used: nothing is inverted and no mask is estimated")
    if source_layouts and not context.estimates_mask:
        notes.append("the source layouts are not used: no mask is estimated")
    return notes


def used_by(option: str) -> str:
    """For an option's help: the methods that use it, where that is not all of them, and what it needs."""
    for use in USES:
        if use.option == option:
            few = len(use.methods) <= len(METHODS) // 2
            others = [m for m in METHODS if m not in use.methods]
            clauses = [] if not others else [f"{', '.join(use.methods)} only" if few else f"not {', '.join(others)}"]
            clauses += [f"needs {use.needs}"] if use.needs and use.needs != "no given mask" else []
            clauses += ["not with --mask"] if use.needs == "no given mask" else []
            return f"[{'; '.join(clauses)}]" if clauses else ""
    raise KeyError(option)
