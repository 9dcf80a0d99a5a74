"""Which option which method uses: one table, from which come the checks, the command line's help and docs/options.md.

It imports nothing heavy, so that the command line can refuse an option before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from . import METHODS
from .errors import UsageError

UNMASKED = ("sdedit", "controlnet")
ITO = ("ito",)
MASKED = tuple(m for m in METHODS if m not in UNMASKED)
INVERTING = ("ito", "diffedit", "controlnet-diffedit")
NOISING = tuple(m for m in METHODS if m not in ITO)


@dataclass(frozen=True)
class Asked:
    """What of an edit decides which options matter.

    Attributes:
        lambdas: of all edits that are asked for together.
        mask_given: a mask was given, so none is estimated.
        guidance_scale: None where it is left to a checkpoint that is not loaded yet.
        other_uses_of_negative: the inversion reads the negative prompt.
    """

    method: str
    lambdas: tuple[float, ...] = (0.6,)
    mask_given: bool = False
    mask_mode: str = "single"
    layouts: bool = False
    composite: str = "none"
    refine: bool = False
    resize: bool = False
    guidance_scale: float | None = None
    other_uses_of_negative: bool = False

    @property
    def estimates_mask(self) -> bool:
        """Whether the method uses a mask that it has to find itself."""
        return self.method in MASKED and not self.mask_given and self.mask_mode != "none"

    def lacks(self, need: str) -> str:
        """What is missing for a `Use.needs`, as a clause; "" if it is there."""
        masked = self.mask_given or self.mask_mode != "none"
        there, why = {
            "": (True, ""),
            "a mask": (masked, "there is no mask with mask mode none; give a mask, or mask mode single"),
            "a mask to estimate": (
                not self.mask_given and self.mask_mode != "none",
                "a mask is given, so none is estimated" if self.mask_given else "mask mode none estimates no mask",
            ),
            "no given mask": (not self.mask_given, "a mask is given, so none is estimated"),
            "layouts": (self.layouts, "no layout is given (--layout NAME=FILE)"),
            "guidance": (
                self.guidance_scale != 1 or self.other_uses_of_negative,
                "guidance scale 1 is without the unconditional half",
            ),
            "a guidance image": (min(self.lambdas) < 1, "lambda 1 makes no guidance image"),
            "refinement": (self.refine, "the guidance image is not refined (--refine)"),
            "the pixel composite or resize": (
                self.composite == "pixel" or self.resize,
                "the composite is not pixel, and nothing is resized",
            ),
        }[need]
        return "" if there else why


@dataclass(frozen=True)
class Use:
    """One option.

    Attributes:
        field: of `EditRequest`, or of its `Options` ("mask.threshold" is nested).
        methods: that use it.
        option: of the command line; "" where it is of the Python interface alone.
        needs: what else there must be, one of `Asked.lacks`.
    """

    field: str
    methods: tuple[str, ...]
    option: str = ""
    needs: str = ""


USES = (
    Use("mask", MASKED, "--mask"),
    Use("options.lam", ITO, "--lambda"),
    Use("options.negative_prompt", METHODS, "--negative-prompt", "guidance"),
    Use("options.control_scale", METHODS, "--control-scale", "layouts"),
    Use("options.control_scales", METHODS, needs="layouts"),
    Use("options.mask.mode", MASKED, "--mask-mode", "no given mask"),
    Use("options.mask.threshold", MASKED, "--mask-threshold", "a mask to estimate"),
    Use("options.mask.strength", MASKED, "--mask-strength", "a mask to estimate"),
    Use("options.mask.seeds", MASKED, "--mask-seeds", "a mask to estimate"),
    Use("options.mask.guided", MASKED, needs="a mask to estimate"),
    Use("options.mask.sigma", MASKED, needs="a mask to estimate"),
    Use("options.mask.norm", MASKED, needs="a mask to estimate"),
    Use("options.guidance", ITO),
    Use("options.final", ITO),
    Use("options.final.t_u", ITO, "--t-u"),
    Use("options.final.k", ITO, "--k"),
    Use("options.final.update", ITO, "--update"),
    Use("options.refine", ITO, "--refine", "a guidance image"),
    Use("options.refinement", ITO, needs="refinement"),
    Use("options.round_trip", ITO, needs="a guidance image"),
    Use("options.encoding_ratio", ITO),
    Use("options.kept_area", ITO),
    Use("options.ratio", NOISING, "--ratio"),
    Use("options.inversion", INVERTING),
    Use("options.inversion_scale", INVERTING),
    Use("options.inversion_evaluate", INVERTING),
    Use("options.composite", MASKED, "--composite", "a mask"),
    Use("options.feather", MASKED, needs="the pixel composite or resize"),
    Use("options.resize", METHODS, "--resize"),
)


def check(asked: Asked, given: Iterable[Use]) -> None:
    """Refuse the first of the options that were set although this edit would not use them.

    Raises:
        UsageError: naming the option and the methods that use it, or what it lacks.
    """
    for use in given:
        name = use.option or use.field.removeprefix("options.")
        if asked.method not in use.methods:
            raise UsageError(
                f"{name}: method {asked.method} does not use it; leave it out, or name a method that does: {', '.join(use.methods)}"
            )
        why = asked.lacks(use.needs)
        if why:
            raise UsageError(f"{name}: it would not be used, {why}; leave it out, or change that")


def notes(asked: Asked, source_prompt: bool, source_layouts: bool) -> list[str]:
    """What an edit does not use of what describes the picture: no reason to refuse it, as the same command serves several methods."""
    found = []
    if source_prompt and asked.method not in INVERTING and not asked.estimates_mask:
        found.append("the source prompt is not used: nothing is inverted and no mask is estimated")
    if source_layouts and not asked.estimates_mask:
        found.append("the source layouts are not used: no mask is estimated")
    return found


def who(option: str) -> str:
    """For an option's help: the methods that use it, where that is not all of them, and what it needs."""
    for use in USES:
        if use.option == option:
            few = len(use.methods) <= len(METHODS) // 2
            others = [m for m in METHODS if m not in use.methods]
            said = [] if not others else [f"{', '.join(use.methods)} only" if few else f"not {', '.join(others)}"]
            said += [f"needs {use.needs}"] if use.needs and use.needs != "no given mask" else []
            said += ["not with --mask"] if use.needs == "no given mask" else []
            return f"[{'; '.join(said)}]" if said else ""
    raise KeyError(option)


def table() -> str:
    """The table of docs/options.md, markdown."""
    lines = [f"| option | {' | '.join(METHODS)} | needs |", "|---" * (len(METHODS) + 2) + "|"]
    for use in USES:
        marks = ["x" if m in use.methods else "" for m in METHODS]
        name = f"`{use.option}`" if use.option else f"`{use.field}`"
        lines.append(f"| {name} | {' | '.join(marks)} | {use.needs} |")
    return "\n".join(lines) + "\n"
