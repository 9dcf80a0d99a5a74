"""Presets of ITO: the full method, and cheaper ways of it with a measured price (docs/presets.md).

What a preset leaves out is in the options of an edit, and so in its cache keys and its receipt; what the caller has set stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .options import DEFAULT_LAMBDA, USES, ItoSettings, MaskOptions, Options

if TYPE_CHECKING:
    from .request import EditRequest


@dataclass(frozen=True)
class Preset:
    """What an edit is made with where the caller has set nothing else.

    Attributes:
        steps: of sampling; None is the method's own.
        options: all of them; those that differ from the default are what the preset is.
        says: the same in words.
    """

    steps: int | None
    options: Options
    says: str


_ADAM = ItoSettings(t_u=15, update="adam")
PRESETS = {
    "paper": Preset(
        None,
        Options(
            lam=DEFAULT_LAMBDA,
            guidance_scale=7.5,
            guidance_until=1.0,
            guidance_path="inverted",
            guidance=_ADAM,
            final=_ADAM,
            mask=MaskOptions(seeds=10, strength=0.5, threshold=0.1),
        ),
        "the papers' letter: Adam for the first 15 steps, guidance scale 7.5, a mask of 10 seeds at half the noise, cut at 0.1",
    ),
    "exact": Preset(
        None,
        Options(lam=DEFAULT_LAMBDA, guidance_until=1.0, guidance_path="inverted", mask=MaskOptions(seeds=10)),
        "the full method",
    ),
    "fast": Preset(
        None,
        Options(guidance_until=0.32, guidance_path="drawn", mask=MaskOptions(seeds=4)),
        "classifier-free guidance for the first third of the steps, the guidance image as it was drawn in place of inverted, a mask of 4 seeds",
    ),
    # ITO moves a latent by `lr` at most in an update, so half the steps reach half as far; inner steps, which ask no network, make up for it:
    # two lose 3 to 10 % of skies and grounds, three none of 130, and four keep less than three. And 12 timesteps with leading spacing begin
    # at 914 of 1000, where the sky that is to change still shows.
    "faster": Preset(
        12,
        Options(
            guidance_until=0.42,
            guidance_path="drawn",
            timestep_spacing="trailing",
            guidance=ItoSettings(k=3),
            final=ItoSettings(k=3),
            mask=MaskOptions(seeds=4),
        ),
        "as fast, in 12 steps from full noise, 5 of them guided, with 3 inner steps of the update",
    ),
}
# Of `Options`, what a preset may set.
FIELDS = ("lam", "guidance_scale", "guidance_until", "guidance_path", "timestep_spacing", "guidance.t_u", "guidance.k", "guidance.update", "final.t_u", "final.k",
          "final.update", "mask.seeds", "mask.strength", "mask.threshold")  # fmt: skip


def with_preset(request: EditRequest, name: str, keep: Collection[str] = ()) -> EditRequest:
    """The request as a preset makes it.

    Args:
        name: of `PRESETS`.
        keep: fields that stay as they are although they have their default's value: "steps", or of `FIELDS`. A field with another
            value stays anyway.

    Raises:
        UsageError: there is no such preset, or the method is not ITO.
    """
    from .request import option_context  # the command line lists the presets before it imports torch

    if name not in PRESETS:
        raise UsageError(f"preset is {name!r}, expected one of {', '.join(PRESETS)}")
    if request.method != "ito":
        raise UsageError(f"preset: method {request.method} has none; leave it out, or use method ito")
    preset, context = PRESETS[name], option_context(request)
    options = request.options
    for field in FIELDS:
        needs = [u.needs for u in USES if u.field == f"options.{field}"]
        if field in keep or _get(options, field) != _get(Options(), field) or any(map(context.lacks, needs)):
            continue
        options = _set(options, field, _get(preset.options, field))
    steps = preset.steps if request.steps is None and "steps" not in keep else request.steps
    return dataclasses.replace(request, options=options, steps=steps)


def _get(options: Any, field: str) -> Any:
    for name in field.split("."):
        options = getattr(options, name)
    return options


def _set(options: Any, field: str, value: Any) -> Any:
    name, _, rest = field.partition(".")
    return dataclasses.replace(options, **{name: _set(getattr(options, name), rest, value) if rest else value})
