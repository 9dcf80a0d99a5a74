"""What several commands share: their options, the request that the options make, and the editor that runs it.

Heavy packages are imported inside the functions: `iedit --help` imports no torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import BACKENDS, METHODS, machine
from ..errors import UsageError
from ..model.checkpoint import MAX_CONTROL, MAX_GUIDANCE, MAX_REWEIGHT, MAX_SIDE, MIN_SIDE, check_engines
from ..options import P2P, PATHS, SPACINGS, TEXT_ONLY, USES, OptionContext, check_uses, mask_mode, used_by
from ..presets import PRESETS, with_preset
from .help import Choice
from .live import quiet_libraries

if TYPE_CHECKING:
    from ..editor import Editor, EditRequest, Options

_BUSY = machine.BusyMeter()  # from here on, for the seconds until the libraries are loaded


class FilePath(click.Path):
    """A path that is not empty: an unset variable of a shell script is no wish for the default."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the name is empty; name a file, or leave the option out", param, ctx)
        return super().convert(value, param, ctx)


class Between(click.FloatRange):
    """click's range of numbers, in which "nan" lies in every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return number


def pairs(
    ctx: click.Context,
    parameter: click.Parameter,
    values: tuple[str, ...],
    wanted: str = "NAME=FILE, for example pose=skeleton.png",
) -> dict[str, str]:
    """NAME=FILE, given any number of times, as a mapping of name to file."""
    paths: dict[str, str] = {}
    for value in values:
        name, sign, path = value.partition("=")
        if not sign or not name or not path:
            raise click.BadParameter(f"{value!r}: expected {wanted}")
        if name in paths:
            raise click.BadParameter(f"{name} is given twice")
        paths[name] = path
    return paths


def factors(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    """WORD=FACTOR, given any number of times, as pairs."""
    found: dict[str, float] = {}
    for word, text in pairs(ctx, parameter, values, "WORD=FACTOR, for example red=2").items():
        try:
            found[word] = float(text)
        except ValueError:
            raise click.BadParameter(f"{word}={text}: {text!r} is no number") from None
        if not -MAX_REWEIGHT <= found[word] <= MAX_REWEIGHT:
            raise click.BadParameter(f"{word}={text}: expected {-MAX_REWEIGHT:g} to {MAX_REWEIGHT:g}")
    return tuple(found.items())


# --- options ------------------------------------------------------------------------------------------------------


def together(options: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """One decorator of several, in the order in which the help shows them."""

    def wrap(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return wrap


def method_option(name: str, *more: Any, help: str, **settings: Any) -> Callable[[Any], Any]:
    """An option that some methods do not use, which its help says."""
    return click.option(name, *more, help=f"{help} {used_by(name)}", **settings)


model_options = together([
    click.option("--model", default="picturebook", show_default=True,
                 help="The embedded model, a diffusers folder, or a hub id (owner/name)."),
    click.option("--controlnet", multiple=True, callback=pairs, metavar="NAME=FOLDER",
                 help="ControlNet or T2I-Adapter that reads layout NAME; repeat for more. Default: those inside the model's folder."),
    click.option("--backend", default="auto", show_default=True, type=Choice(["auto", *BACKENDS]),
                 help="What runs the networks; auto takes the first that can, per module and size, and says why not the others."),
    click.option("--engines", type=FilePath(file_okay=False), default=None,
                 help="Folder of exported engines. Default: the user's cache, by the digest of the model's weights."),
    click.option("--trust-engines", is_flag=True,
                 help="Use engines even if every user of this machine may change them; they run with your rights."),
    click.option("--attention", type=Choice(["sdpa", "xformers"]), default="sdpa", show_default=True,
                 help="Of the networks that torch runs."),
    click.option("--channels-last", is_flag=True, help="Memory format that tensor cores read, of torch, compile and graphs; fastest on a GPU with --backend graphs."),
    click.option("--device", default=None, help="cpu, cuda, cuda:1. Default: the GPU if there is one."),
    click.option("--dtype", default=None, type=Choice(["float32", "float16", "bfloat16"]),
                 help="Default: float16 on a GPU, float32 on a CPU; a half that a CPU has no arithmetic for becomes float32, with a note."),
])  # fmt: skip


overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace output files that exist. Inputs are never replaced."
)


request_options = together([
    click.option("--prompt", required=True, help="What the edited picture shows; for ip2p the instruction."),
    click.option("--source-prompt", default="", help="What the picture shows now; sharpens mask and inversion."),
    click.option("--layout", multiple=True, callback=pairs, metavar="NAME=FILE",
                 help="Pose, scribble, edge or line map of the edited picture; repeat for several at once."),
    click.option("--source-layout", multiple=True, callback=pairs, metavar="NAME=FILE",
                 help="The same for the picture as it is; edge, line and scribble are annotated if not given."),
    click.option("--method", default="ito", show_default=True, type=Choice(METHODS), help="How to edit."),
    click.option("--steps", default=None, type=click.IntRange(1, 1000),
                 help="Sampling steps. Default: 50 for iedit, 25 for the other methods."),
    click.option("--seed", default=0, show_default=True, type=int, help="Seed of every noise; 0 is a seed."),
    click.option("--guidance-scale", type=Between(0, MAX_GUIDANCE), default=None,
                 help="Classifier-free guidance. Default: what the checkpoint recommends, else 7.5, and 15 for ddpm."),
    method_option("--negative-prompt", default="", help="Text of the unconditional half."),
    method_option("--control-scale", type=Between(0, MAX_CONTROL), default=1.0, show_default=True, help="Weight of the layouts."),
    click.option("--resize", type=click.IntRange(MIN_SIDE, MAX_SIDE), default=None, metavar="N",
                 help="Work on a larger picture with its longer side at N pixels, and paste the edit back at full size."),
    method_option("--mask-mode", type=Choice(["single", "trajectory", "none"]), default=None,
                 help="How the mask is estimated: one evaluation per seed, whole trajectories, or not at all. Default: single; none for p2p, ddpm and ip2p."),
    method_option("--mask-threshold", type=Between(0, 1), default=None,
                 help="Cells above it are edited; lower edits more. Default: what the checkpoint recommends, else 0.1."),
    method_option("--mask-strength", type=Between(0, 1, min_open=True), default=None,
                 help="Noise that the mask is estimated at, as a share of the steps. Default: the checkpoint's, else 0.5."),
    method_option("--mask-seeds", type=click.IntRange(1, 1000), default=None,
                 help="Noises that the mask is averaged over. Default: what the checkpoint recommends for ito, else 10."),
])  # fmt: skip


speed_options = together([
    click.option("--preset", type=Choice(list(PRESETS)), default=None,
                 help="Of method ito: paper is the papers' letter; exact is the full method; fast and faster leave out steps that it hardly misses "
                      "(docs/presets.md). What is given beside it stays. Default: what the checkpoint recommends, else exact."),
    method_option("--timestep-spacing", type=Choice(SPACINGS), default=None,
                  help="Which timesteps the steps are at. Default: the checkpoint's; with few steps trailing begins at full noise."),
    method_option("--guidance-until", type=Between(0, 1), default=None,
                  help="Share of the steps, the noisiest first, with classifier-free guidance; the rest costs half. Default: what the checkpoint "
                       "recommends for ito, else 1."),
    method_option("--guidance-path", type=Choice(PATHS), default=None,
                  help="The guidance image at every step: inverted, or as it was drawn, which saves its inversion. Default: what the checkpoint "
                       "recommends, else inverted."),
])  # fmt: skip


# Fields of `Options` that are options of the command line by the same name.
RIVAL_FIELDS = (
    "cross_replace",
    "self_replace",
    "replacement",
    "reweight",
    "inversion_correction",
    "source_guidance_scale",
    "image_guidance_scale",
)


def check_given(values: dict[str, Any], lambdas: Sequence[float | None] = (None,)) -> None:
    """Refuse what was given on the command line, at whatever value, and would not be used."""
    command = click.get_current_context().command
    given = {name for parameter in command.params if _is_given(str(parameter.name)) for name in parameter.opts}
    if values.get("preset") is not None and values["method"] != "ito":
        raise UsageError(f"--preset: method {values['method']} has none; leave it out, or use --method ito")
    check_uses(option_context(values, lambdas), [use for use in USES if use.option in given])


def option_context(values: dict[str, Any], lambdas: Sequence[float | None] = (None,)) -> OptionContext:
    """What of a command's values decides which options matter."""
    return OptionContext(
        values["method"],
        lambdas=tuple(lambdas),
        mask_given=bool(values.get("mask")),
        mask_mode=mask_mode(values["method"], values["mask_mode"]),
        layouts=bool(values["layout"]),
        composite=values.get("composite", "none"),
        refine=values.get("refine", False),
        cross_replace=values.get("cross_replace", 0.8),
        self_replace=values.get("self_replace", 0.4),
        guidance_scale=values["guidance_scale"],
    )


# --- a request and the editor that runs it ------------------------------------------------------------------------


def _make_options(values: dict[str, Any], lam: float | None) -> Options:
    from ..options import ItoSettings, MaskOptions, Options

    settings = ItoSettings(t_u=values.get("t_u"), k=values.get("k", 1), update=values.get("update", "clipped"))
    return Options(
        lam=lam,
        guidance_scale=values["guidance_scale"],
        negative_prompt=values["negative_prompt"],
        control_scale=values["control_scale"],
        ratio=values.get("ratio"),
        mask=MaskOptions(
            mode=values["mask_mode"],
            seeds=values["mask_seeds"],
            strength=values["mask_strength"],
            threshold=values["mask_threshold"],
        ),
        guidance=settings,
        final=settings,
        refine=values.get("refine", False),
        timestep_spacing=values.get("timestep_spacing"),
        guidance_until=values.get("guidance_until"),
        guidance_path=values.get("guidance_path"),
        composite=values.get("composite", "none"),
        resize=values["resize"],
        **{name: values[name] for name in RIVAL_FIELDS if name in values},
    )


def files_read(image: str, values: dict[str, Any]) -> list[str]:
    """Every file and folder that a request is read from."""
    named = [image, values.get("mask"), *values["layout"].values(), *values["source_layout"].values()]
    return [n for n in (*named, values["model"], values["engines"], *values["controlnet"].values()) if n]


def read_inputs(image: str, values: dict[str, Any]) -> dict[str, Any]:
    """The files of a request, read before the slow imports so that what is wrong with them, or with the model, is said at once."""
    from ..images import load_image, load_layout, load_mask, mask_coverage

    check_engines(values["engines"])
    if not values["prompt"].strip():
        raise UsageError("the prompt is empty: say what the edited picture shows")
    if values["method"] in P2P and not values["source_prompt"].strip():
        raise UsageError(
            f"method {values['method']} needs a source prompt, whose attention it takes: say what the picture shows now with --source-prompt"
        )
    picture = load_image(image)
    inputs: dict[str, Any] = {
        "image": picture,
        "layouts": {n: load_layout(p) for n, p in values["layout"].items()},
        "source_layouts": {n: load_layout(p) for n, p in values["source_layout"].items()},
        "mask": None,
    }
    if values.get("mask"):
        inputs["mask"] = load_mask(values["mask"], picture.size)
        covered = mask_coverage(inputs["mask"])
        if covered == 0:
            raise UsageError(f"{values['mask']}: the mask is empty, nothing could change; paint what to edit in white")
        if covered == 1:
            raise UsageError(
                f"{values['mask']}: the mask covers everything, nothing is kept; leave --mask out to have one estimated, or "
                "repaint the whole picture with --method sdedit"
            )
    _check_layouts(inputs, values)
    return inputs


def _check_layouts(inputs: dict[str, Any], values: dict[str, Any]) -> None:
    """What is wrong with the layouts or with the model's files, from its configs alone."""
    from ..images import fit
    from ..layouts import check_annotator, check_layout
    from ..model.checkpoint import check_layouts, check_side, find_checkpoint

    maps, source_maps = inputs["layouts"], inputs["source_layouts"]
    if values["method"].startswith("controlnet") and not maps:
        raise UsageError(f"method {values['method']} needs at least one layout (--layout pose=FILE)")
    if maps and values["method"] in TEXT_ONLY:
        raise UsageError(f"method {values['method']} takes no layouts; leave them out, or name a method that does")
    checkpoint = find_checkpoint(values["model"], values["controlnet"] or None)
    check_layouts(values["model"], [*checkpoint.controlnets, *checkpoint.adapters], [*maps, *source_maps])
    image, longest = inputs["image"], values["resize"]
    worked_on = image if longest is None or max(image.size) <= longest else fit(image, longest)
    check_side(worked_on.size, checkpoint.side, values["model"])
    for name, picture in [*maps.items(), *source_maps.items()]:
        check_layout(picture, name, image.size)
    for name in maps:
        if option_context(values).estimates_mask and name not in source_maps:
            check_annotator(name)


def make_request(inputs: dict[str, Any], values: dict[str, Any], seed: int, lam: float | None = None) -> EditRequest:
    """The request of a command's values and the inputs that were read; what a command has no option for is the default."""
    from ..editor import EditRequest

    request = EditRequest(
        **inputs,
        prompt=values["prompt"],
        source_prompt=values["source_prompt"],
        method=values["method"],
        seed=seed,
        steps=values["steps"],
        options=_make_options(values, lam),
    )
    preset = values.get("preset")
    if preset is None:
        return request
    keep = {"k": {"final.k"}, "update": {"guidance.update", "final.update"}}
    return with_preset(request, preset, {field for name, fields in keep.items() if _is_given(name) for field in fields})


def _is_given(parameter: str) -> bool:
    """Whether the caller of the running command has set a parameter, to whatever value."""
    source = click.get_current_context().get_parameter_source(parameter)
    return source not in (click.core.ParameterSource.DEFAULT, click.core.ParameterSource.DEFAULT_MAP, None)


def load_editor(values: dict[str, Any], inputs: Mapping[str, Any], cache: str | None = None) -> Editor:
    """The model and its backend out of a command's values, with the networks that read the layouts among its inputs (`read_inputs`).

    Args:
        cache: folder where stage results are kept.
    """
    quiet_libraries()
    from ..editor import Editor
    from ..stage_cache import StageCache

    use_threads()
    return Editor.load(
        values["model"],
        layouts=values["controlnet"] or None,
        backend=values["backend"],
        device=values["device"],
        dtype=values["dtype"],
        cache=StageCache(folder=Path(cache)) if cache else None,
        engines=values["engines"],
        attention=values["attention"],
        channels_last=values["channels_last"],
        trust_engines=values["trust_engines"],
        used_layouts={*inputs["layouts"], *inputs["source_layouts"]},
    )


@functools.cache
def use_threads() -> machine.ThreadChoice:
    """Compute with the threads that suit this moment; decided once."""
    import torch

    choice = machine.choose_threads(_BUSY, torch.get_num_threads())
    torch.set_num_threads(choice.threads)
    return choice
