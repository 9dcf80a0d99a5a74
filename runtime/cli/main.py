"""The command line `iedit`. Heavy packages are imported inside the commands: `iedit --help` imports no torch."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import json
import math
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import BACKENDS, METHODS, VERSION, machine
from ..errors import IeditError, UsageError
from ..files import check_outputs, printable, write_outputs
from ..model.checkpoint import MAX_CONTROL, MAX_GUIDANCE, MAX_INNER_STEPS, MAX_SIDE, MIN_SIDE, check_engines
from ..options import UNMASKED, USES, OptionContext, check_uses, used_by
from .help import Choice, Grouped, show, suggestion

if TYPE_CHECKING:
    from ..editor import Editor, EditRequest, EditResult, Options
    from ..profile import Progress

_BUSY = machine.BusyMeter()  # from here on, for the seconds until the libraries are loaded

# Groups of the packages above this one, by name so that imports keep pointing one way.
_GROUPS = {
    "export": ("iedit.export.cli", "export", "Write a model's networks as engines, and check them."),
    "engines": ("iedit.export.cli", "engines", "List, check and clean up engines."),
    "train": ("iedit.training.cli", "train", "Train the embedded model and measure it."),
}


class _Failure(click.ClickException):
    """One line on stderr and the error's exit code."""


class _Usage(_Failure):
    exit_code = 2


class _Commands(click.Group):
    """Loads the groups of other packages when they are used, and turns the project's errors into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.commands, *_GROUPS]  # in the order of a first reading, not of the alphabet

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in _GROUPS:
            module, attribute, _ = _GROUPS[name]
            command: click.Command = getattr(importlib.import_module(module), attribute)
            return command
        return super().get_command(ctx, name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}.{suggestion(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            command = None if name in _GROUPS else self.get_command(ctx, name)
            rows.append((name, _GROUPS[name][2] if command is None else command.get_short_help_str(90)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for word in args:
            try:
                word.encode()
            except UnicodeEncodeError:  # bytes that are no UTF-8, which could be neither printed nor kept in a receipt
                raise click.UsageError(f"{word!a} is not UTF-8; rename the file, or type the text again") from None
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except IeditError as error:
            raise (_Usage if error.exit_code == 2 else _Failure)(printable(" ".join(str(error).split()))) from error
        except MemoryError as error:
            raise _Failure("out of memory; use a smaller picture, --dtype float16 or another machine") from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of the output went away: click's own business
                raise
            raise _Failure(printable(f"{error.filename or 'system'}: {error.strerror or error}")) from error
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as error:  # a mistake of this program's: a line for the user, the rest for whoever repairs it
            if os.environ.get("IEDIT_DEBUG") == "1":
                raise
            line = f"unexpected {type(error).__name__}: {_one_line(error)}; {_write_report(error)}"
            raise _Failure(printable(line)) from error


def _one_line(error: BaseException, longest: int = 200) -> str:
    line = " ".join(str(error).split()) or "no message"
    return line if len(line) <= longest else line[: longest - 3] + "..."


def _write_report(error: BaseException) -> str:
    """Everything about an error in a file that only the user can read; says where it is."""
    import platform
    import tempfile
    import traceback
    from importlib import metadata

    versions = {
        d.name: d.version
        for d in metadata.distributions()
        if d.name in ("torch", "diffusers", "transformers", "numpy", "pillow")
    }
    lines = [
        f"iedit {VERSION}, Python {platform.python_version()}, {platform.platform()}",
        ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        f"command: {sys.argv}",
        "",
        *traceback.format_exception(error),
    ]
    try:
        handle, path = tempfile.mkstemp(prefix="iedit-report-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join(lines))
    except OSError as problem:
        return f"a report could not be written ({problem.strerror}); IEDIT_DEBUG=1 shows where it happened"
    return f"a full report is in {path} (IEDIT_DEBUG=1 shows it here)"


class _Path(click.Path):
    """A path that is not empty: an unset variable of a shell script is no wish for the default."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the name is empty; name a file, or leave the option out", param, ctx)
        return super().convert(value, param, ctx)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="iedit")
def main() -> None:
    """Localised image editing with diffusion models.

    \b
    iedit edit photo.png --source-prompt "a red car on grass at noon" --prompt "a blue car on grass at noon"

    With no --model the embedded picture-book model is used: it draws its own small world and nothing else. Give a folder
    of a Stable Diffusion 1.x checkpoint (diffusers layout) or a hub id for photographs.
    """


class _Between(click.FloatRange):
    """click's range of numbers, in which "nan" lies in every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return number


# --- shared options ---------------------------------------------------------------------------------------------


def _pairs(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for value in values:
        name, sign, path = value.partition("=")
        if not sign or not name or not path:
            raise click.BadParameter(f"{value!r}: expected NAME=FILE, for example pose=skeleton.png")
        if name in found:
            raise click.BadParameter(f"{name} is given twice")
        found[name] = path
    return found


def _apply(options: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def wrap(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return wrap


def _told(option: str, text: str) -> str:
    """An option's help with the methods that use it."""
    return f"{text} {used_by(option)}"


def _check_uses(values: dict[str, Any], lambdas: Sequence[float] = (0.6,)) -> None:
    """Refuse what was given on the command line, at whatever value, and would not be used."""
    source, context = click.core.ParameterSource, click.get_current_context()
    given = {
        name
        for parameter in context.command.params
        if context.get_parameter_source(str(parameter.name)) not in (source.DEFAULT, source.DEFAULT_MAP, None)
        for name in parameter.opts
    }
    check_uses(_option_context(values, lambdas), [use for use in USES if use.option in given])


def _option_context(values: dict[str, Any], lambdas: Sequence[float] = (0.6,)) -> OptionContext:
    return OptionContext(
        values["method"],
        lambdas=tuple(lambdas),
        mask_given=bool(values.get("mask")),
        mask_mode=values["mask_mode"],
        layouts=bool(values["layout"]),
        composite=values.get("composite", "none"),
        refine=values.get("refine", False),
        guidance_scale=values["guidance_scale"],
    )


_model_options = _apply([
    click.option("--model", default="picturebook", show_default=True,
                 help="The embedded model, a diffusers folder, or a hub id (owner/name)."),
    click.option("--controlnet", multiple=True, callback=_pairs, metavar="NAME=FOLDER",
                 help="ControlNet that reads layout NAME; repeat for more. Default: those inside the model's folder."),
    click.option("--backend", default="auto", show_default=True, type=Choice(["auto", *BACKENDS]),
                 help="What runs the networks; auto takes the first that can, per module and size, and says why not the others."),
    click.option("--engines", type=_Path(file_okay=False), default=None,
                 help="Folder of exported engines. Default: the user's cache, by the digest of the model's weights."),
    click.option("--trust-engines", is_flag=True,
                 help="Use engines even if every user of this machine may change them; they run with your rights."),
    click.option("--attention", type=Choice(["sdpa", "xformers"]), default="sdpa", show_default=True,
                 help="Of the networks that torch runs."),
    click.option("--channels-last", is_flag=True, help="Memory format that convolutions on a GPU prefer; torch only."),
    click.option("--device", default=None, help="cpu, cuda, cuda:1. Default: the GPU if there is one."),
    click.option("--dtype", default=None, type=Choice(["float32", "float16", "bfloat16"]),
                 help="Default: float16 on a GPU, float32 on a CPU; a half that a CPU has no arithmetic for becomes float32, with a note."),
])  # fmt: skip

_overwrite = click.option(
    "--overwrite", is_flag=True, help="Replace output files that exist. Inputs are never replaced."
)

_request_options = _apply([
    click.option("--prompt", required=True, help="What the edited picture shows."),
    click.option("--source-prompt", default="", help="What the picture shows now; sharpens mask and inversion."),
    click.option("--layout", multiple=True, callback=_pairs, metavar="NAME=FILE",
                 help="Pose, scribble, edge or line map of the edited picture; repeat for several at once."),
    click.option("--source-layout", multiple=True, callback=_pairs, metavar="NAME=FILE",
                 help="The same for the picture as it is; edge, line and scribble are annotated if not given."),
    click.option("--method", default="ito", show_default=True, type=Choice(METHODS), help="How to edit."),
    click.option("--steps", default=None, type=click.IntRange(1, 1000),
                 help="Sampling steps. Default: 50 for iedit, 25 for the other methods."),
    click.option("--seed", default=0, show_default=True, type=int, help="Seed of every noise; 0 is a seed."),
    click.option("--guidance-scale", type=_Between(0, MAX_GUIDANCE), default=None,
                 help="Classifier-free guidance. Default: what the checkpoint recommends, else 7.5."),
    click.option("--negative-prompt", default="", help=_told("--negative-prompt", "Text of the unconditional half.")),
    click.option("--control-scale", type=_Between(0, MAX_CONTROL), default=1.0, show_default=True, help=_told("--control-scale", "Weight of the layouts.")),
    click.option("--resize", type=click.IntRange(MIN_SIDE, MAX_SIDE), default=None, metavar="N",
                 help="Work on a larger picture with its longer side at N pixels, and paste the edit back at full size."),
    click.option("--mask-mode", type=Choice(["single", "trajectory", "none"]), default="single", show_default=True,
                 help=_told("--mask-mode", "How the mask is estimated: one evaluation per seed, whole trajectories, or not at all.")),
    click.option("--mask-threshold", type=_Between(0, 1), default=None,
                 help=_told("--mask-threshold", "Cells above it are edited; lower edits more. Default: what the checkpoint recommends, else 0.1.")),
    click.option("--mask-strength", type=_Between(0, 1, min_open=True), default=None,
                 help=_told("--mask-strength", "Noise that the mask is estimated at, as a share of the steps. Default: the checkpoint's, else 0.5.")),
    click.option("--mask-seeds", type=click.IntRange(1, 1000), default=10, show_default=True,
                 help=_told("--mask-seeds", "Noises that the mask is averaged over.")),
])  # fmt: skip


def _options(values: dict[str, Any], lam: float = 0.6) -> Options:
    from ..options import ItoSettings, MaskOptions, Options

    phase = ItoSettings(t_u=values.get("t_u"), k=values.get("k", 1), update=values.get("update", "clipped"))
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
        guidance=phase,
        final=phase,
        refine=values.get("refine", False),
        composite=values.get("composite", "none"),
        resize=values["resize"],
    )


def _inputs(image: str, values: dict[str, Any]) -> dict[str, Any]:
    """The files of a request, read before the slow imports so that what is wrong with them, or with the model, is told at once."""
    from ..images import load_image, load_layout, load_mask, mask_coverage

    check_engines(values["engines"])
    if not values["prompt"].strip():
        raise UsageError("the prompt is empty: say what the edited picture shows")
    picture = load_image(image)
    found: dict[str, Any] = {
        "image": picture,
        "layouts": {n: load_layout(p) for n, p in values["layout"].items()},
        "source_layouts": {n: load_layout(p) for n, p in values["source_layout"].items()},
        "mask": None,
    }
    if values.get("mask"):
        found["mask"] = load_mask(values["mask"], picture.size)
        covered = mask_coverage(found["mask"])
        if covered == 0:
            raise UsageError(f"{values['mask']}: the mask is empty, nothing could change; paint what to edit in white")
        if covered == 1:
            raise UsageError(
                f"{values['mask']}: the mask covers everything, nothing is kept; leave --mask out to have one estimated, or "
                "repaint the whole picture with --method sdedit"
            )
    _check_layouts(found, values)
    return found


def _check_layouts(inputs: dict[str, Any], values: dict[str, Any]) -> None:
    """What is wrong with the layouts or with the model's files, from its configs alone."""
    from ..images import fit
    from ..layouts import check_annotator, check_layout
    from ..model.checkpoint import check_layouts, check_side, find_checkpoint

    maps, source_maps = inputs["layouts"], inputs["source_layouts"]
    if values["method"].startswith("controlnet") and not maps:
        raise UsageError(f"method {values['method']} needs at least one layout (--layout pose=FILE)")
    checkpoint = find_checkpoint(values["model"], values["controlnet"] or None)
    check_layouts(values["model"], checkpoint.controlnets, [*maps, *source_maps])
    image, longest = inputs["image"], values["resize"]
    check_side(
        image.size if longest is None or max(image.size) <= longest else fit(image, longest).size,
        checkpoint.side,
        values["model"],
    )
    for name, picture in [*maps.items(), *source_maps.items()]:
        check_layout(picture, name, inputs["image"].size)
    for name in maps:
        if _option_context(values).estimates_mask and name not in source_maps:
            check_annotator(name)


def _request(inputs: dict[str, Any], values: dict[str, Any], seed: int, options: Options) -> EditRequest:
    from ..editor import EditRequest

    return EditRequest(
        **inputs,
        prompt=values["prompt"],
        source_prompt=values["source_prompt"],
        method=values["method"],
        seed=seed,
        steps=values["steps"],
        options=options,
    )


def _editor(values: dict[str, Any], cache: str | None = None) -> Editor:
    _quiet_libraries()
    from ..editor import Editor
    from ..stage_cache import StageCache

    _use_threads()
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
    )


@functools.cache
def _use_threads() -> machine.ThreadChoice:
    """Compute with the threads that suit this moment; decided once."""
    import torch

    choice = machine.choose_threads(_BUSY, torch.get_num_threads())
    torch.set_num_threads(choice.threads)
    return choice


def _quiet_libraries() -> None:
    """Progress bars of loading libraries would tear the live display."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextlib.contextmanager
def _prompt_interrupts(patience: float = 0.8) -> Iterator[None]:
    """Ctrl-C acts within a second: Python sees it only when a network's operation has ended, which in a large VAE takes long. Who does
    not come out of this block in `patience` seconds is ended then, and a second Ctrl-C ends it at once. Nothing is written here."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    receive, send = os.pipe()
    os.set_blocking(send, False)
    before = signal.set_wakeup_fd(send, warn_on_full_buffer=False)

    def watch() -> None:
        while (number := os.read(receive, 1)) and number[0] != signal.SIGINT:
            pass
        if not number:
            return  # the block was left
        ready, _, _ = select.select([receive], [], [], patience)
        if not ready or os.read(receive, 1):
            show_cursor = b"\x1b[?25h" if os.isatty(2) else b""
            os.write(2, show_cursor + b"\nAborted!\n")
            os._exit(1)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(send)
        watcher.join()
        os.close(receive)


@contextlib.contextmanager
def _live(model: str) -> Iterator[Callable[[Progress], bool | None]]:
    """One live line on stderr: stage, step, share of the run, time left. Where stderr is no terminal one line that says what is loaded,
    at once."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<22}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(),
               TextColumn("{task.fields[left]}"))  # fmt: skip
    console = Console(stderr=True)
    if not console.is_terminal:
        click.echo(f"loading {printable(model)}", err=True)
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with _prompt_interrupts(), bar:
        task = bar.add_task(f"loading {printable(model)}"[:40], total=1.0, left="")

        def tell(progress: Any) -> bool | None:
            step = f" {progress.step}/{progress.steps}" if progress.steps else ""
            left = "" if progress.seconds_left is None else _time_left(progress.seconds_left)
            bar.update(task, description=progress.stage + step, completed=progress.fraction, left=left)
            return None

        yield tell


def _show_notes(notes: Sequence[str]) -> None:
    for note in notes:
        click.echo(f"note: {printable(note)}", err=True)


def _time_left(seconds: float) -> str:
    return f"{seconds:.0f} s left" if seconds < 120 else f"{seconds / 60:.0f} min left"


# --- commands ---------------------------------------------------------------------------------------------------


@main.command(cls=Grouped)
@click.argument("image", type=_Path())
@_request_options
@click.option(
    "--mask",
    type=_Path(),
    default=None,
    help=_told("--mask", "White is edited, black is kept; estimated if not given."),
)
@click.option("--lambda", "lambdas", multiple=True, type=_Between(0, 1), default=(0.6,), show_default=True,
              help=_told("--lambda", "Weight of preservation against guidance; 1 makes no guidance image. Repeat for a sweep."))  # fmt: skip
@click.option(
    "--t-u",
    "t_u",
    type=click.IntRange(0),
    default=None,
    help=_told(
        "--t-u",
        "Steps that ITO updates. Default: 15 of 25, or what the checkpoint recommends for edits without layouts.",
    ),
)
@click.option(
    "--k",
    type=click.IntRange(1, MAX_INNER_STEPS),
    default=1,
    show_default=True,
    help=_told("--k", "Inner steps at each."),
)
@click.option("--update", type=Choice(["clipped", "adam"]), default="clipped", show_default=True,
              help=_told("--update", "How ITO moves the latent: by a Newton step of bounded length, or by Adam as in the paper."))  # fmt: skip
@click.option("--ratio", type=_Between(0, 1, min_open=True), default=None,
              help=_told("--ratio", "Share of the steps that the other methods noise the picture by. Default: the method's own."))  # fmt: skip
@click.option("--refine", is_flag=True, help=_told("--refine", "Refine the guidance image with the input (ITO A.5)."))
@click.option("--composite", type=Choice(["none", "latent", "pixel"]), default="none", show_default=True,
              help=_told("--composite", "pixel leaves everything outside the mask exactly as it was."))  # fmt: skip
@click.option(
    "--count", type=click.IntRange(1, 1000), default=1, show_default=True, help="Variants: seeds SEED, SEED+1, ..."
)
@click.option("--output", type=_Path(), default=None, help="PNG. Default: NAME-edited.png in this folder.")
@_overwrite
@click.option(
    "--no-receipt", is_flag=True, help="Leave out the receipt: prompts, options, versions, names of the inputs."
)
@click.option("--stages", type=_Path(), default=None, help="Also a sheet: input, layout, mask, guidance, result.")
@click.option("--profile", type=_Path(), default=None, help="Also seconds and evaluations per stage, as JSON.")
@click.option("--cache", type=_Path(file_okay=False), default=None,
              help="Keep stage results in this folder: a second edit of the picture runs only what changed.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
@_model_options
def edit(image: str, lambdas: tuple[float, ...], count: int, output: str | None, overwrite: bool, no_receipt: bool,
         stages: str | None, profile: str | None, cache: str | None, as_json: bool, **values: Any) -> None:  # fmt: skip
    """Edit IMAGE as the prompt says and leave the rest alone.

    \b
    Text      iedit edit in.png --source-prompt "a red car ..." --prompt "a blue car ..."
    Pose      iedit edit in.png --prompt "a person ..." --layout pose=new.png --source-layout pose=old.png
    Outline   iedit layouts in.png --kind scribble, draw on it, then --layout scribble=in-scribble.png
    By hand   iedit mask in.png --prompt "..." and paint on it, then --mask in-mask.png
    Sweep     iedit edit in.png --prompt "..." --lambda 0.2 --lambda 0.6 --lambda 1

    \b
    Too much changed?    Say what is there with --source-prompt; raise --mask-threshold or --lambda; give a --mask;
                         --composite pixel leaves what is outside the mask exactly as it was.
    Too little changed?  Lower --mask-threshold or --lambda; raise --guidance-scale.

    \b
    ito                  finds where to edit, preserves the rest, follows a guidance image
    iedit                noises the picture and repaints inside the mask
    sdedit               noises the picture and repaints all of it
    diffedit             inverts the picture and repaints inside the mask
    controlnet           sdedit with layouts; controlnet-diffedit: diffedit with layouts

    The output PNG carries a receipt; `iedit replay OUT.png` makes it again. Exit code 2: it cannot be done as asked, and
    nothing was written. 1: it failed while running; nothing was written but what the error says.
    """
    from ..images import png_bytes

    first = Path(output or f"{Path(image).stem}-edited.png")
    wanted = [(seed, lam) for seed in range(values["seed"], values["seed"] + count) for lam in lambdas]
    targets = (
        [first]
        if len(wanted) == 1
        else [first.with_name(f"{first.stem}-{i}{first.suffix}") for i in range(len(wanted))]
    )
    _check_uses(values, lambdas)
    check_outputs(
        [*targets, *([Path(stages)] if stages else [])],
        [Path(profile)] if profile else [],
        _read(image, values),
        overwrite,
    )
    inputs = _inputs(image, values)
    with _live(values["model"]) as tell:
        requests = [_request(inputs, values, seed, _options(values, lam)) for seed, lam in wanted]
        results = _editor(values, cache).edit_many(requests, tell)
    from .. import receipt as receipts

    files = {
        "image": image,
        "mask": values["mask"],
        "layouts": values["layout"],
        "source_layouts": values["source_layout"],
    }
    members = [{"seed": seed, "lam": lam} for seed, lam in wanted]
    outputs = {}
    for i, (target, result) in enumerate(zip(targets, results, strict=True)):
        told = None if no_receipt else receipts.of_command(result.receipt, files, values, members, i)
        outputs[target] = png_bytes(result.image, told)
    if stages:
        outputs[Path(stages)] = png_bytes(_sheet(requests, results))
    if profile:
        outputs[Path(profile)] = (json.dumps(results[0].profile.as_dict(), indent=1) + "\n").encode()
    write_outputs(outputs)
    if as_json:
        rows = [{"output": str(t), "seed": s, "lambda": lam, "mask": r.receipt["mask"], "notes": r.notes}
                for t, (s, lam), r in zip(targets, wanted, results, strict=True)]  # fmt: skip
        click.echo(json.dumps({"results": rows, "profile": results[0].profile.as_dict()}, indent=1))
        return
    for note in dict.fromkeys(note for result in results for note in result.notes):
        about = [t.name for t, r in zip(targets, results, strict=True) if note in r.notes]
        where = "" if len(about) == len(targets) else f" ({', '.join(about)})"
        _show_notes([note + where])
    spent = sum(results[0].profile.seconds.values())
    for target, result in zip(targets, results, strict=True):
        area = "" if result.receipt["mask"] is None else f", mask {result.receipt['mask']['area']:.0%}"
        click.echo(f"{printable(str(target))}: {result.image.width}x{result.image.height}{area}")
    click.echo(f"{spent:.1f} s, {sum(results[0].profile.evaluations.values())} network evaluations", err=True)


def _read(image: str, values: dict[str, Any]) -> list[str]:
    """Every file and folder that a request is read from."""
    named = [image, values.get("mask"), *values["layout"].values(), *values["source_layout"].values()]
    return [n for n in (*named, values["model"], values["engines"], *values["controlnet"].values()) if n]


def _sheet(requests: list[EditRequest], results: list[EditResult]) -> Any:
    from ..images import contact_sheet

    rows = []
    for request, result in zip(requests, results, strict=True):
        row = [("input", request.image)] + [(f"{n} layout", p) for n, p in request.layouts.items()]
        row += [("mask", result.mask)] if result.mask else []
        row += [("guidance image", result.guidance)] if result.guidance else []
        rows.append([*row, (f"result, seed {request.seed}, lambda {request.options.lam:g}", result.image)])
    return contact_sheet(rows, titles=[r.prompt for r in requests])


@main.command("mask", cls=Grouped)
@click.argument("image", type=_Path())
@_request_options
@click.option("--output", type=_Path(), default=None, help="PNG. Default: NAME-mask.png in this folder.")
@_overwrite
@_model_options
def mask_command(image: str, output: str | None, overwrite: bool, **values: Any) -> None:
    """Estimate where an edit would happen, and write it: white is edited. Paint over it and give it back with --mask."""
    from ..images import mask_coverage, png_bytes

    target = Path(output or f"{Path(image).stem}-mask.png")
    check_outputs([target], [], _read(image, values), overwrite)
    if values["method"] in UNMASKED:
        raise UsageError(f"method {values['method']} uses no mask; name one that does, such as --method ito")
    if values["mask_mode"] == "none":
        raise UsageError("--mask-mode none estimates no mask; use single or trajectory")
    _check_uses(values)
    inputs = _inputs(image, values)
    with _live(values["model"]) as tell:
        request = _request(inputs, values, values["seed"], _options(values))
        mask, profile = _editor(values).mask(request, tell)
    assert mask is not None
    write_outputs({target: png_bytes(mask)})
    _show_notes(profile.notes)
    click.echo(f"{printable(str(target))}: {mask_coverage(mask):.0%} of the picture")


@main.command("layouts")
@click.argument("image", type=_Path())
@click.option("--kind", "kinds", multiple=True, type=Choice(["pose", "scribble", "edge", "line"]),
              help="Which map; repeat for more. Default: all that can be made from a picture.")  # fmt: skip
@click.option("--output", type=_Path(), default=None, help="PNG, for one kind. Default: NAME-KIND.png.")
@_overwrite
def layouts_command(image: str, kinds: tuple[str, ...], output: str | None, overwrite: bool) -> None:
    """Photograph to pose, scribble, edge or line map, to draw on and to give to --layout."""
    from ..images import load_image, png_bytes
    from ..layouts import annotate

    wanted = kinds or ("scribble", "edge", "line")
    if output and len(wanted) != 1:
        raise UsageError(f"--output names one file but {len(wanted)} maps were asked for; choose one with --kind")
    targets = [Path(output or f"{Path(image).stem}-{kind}.png") for kind in wanted]
    check_outputs(targets, [], [image], overwrite)
    picture = load_image(image)
    write_outputs({target: png_bytes(annotate(picture, kind)) for target, kind in zip(targets, wanted, strict=True)})
    for target in targets:
        click.echo(printable(str(target)))


@main.command()
@click.argument("output", type=_Path())
@click.option("--image", type=_Path(), default=None, help="The input, if it is not beside OUTPUT under its name.")
@click.option("--mask", type=_Path(), default=None, help="The mask, likewise.")
@click.option("--layout", "layouts", multiple=True, callback=_pairs, metavar="NAME=FILE", help="A layout, likewise.")
@click.option("--source-layout", "source_layouts", multiple=True, callback=_pairs, metavar="NAME=FILE",
              help="A layout of the picture as it was, likewise.")  # fmt: skip
@click.option("--model", default=None, help="The model, if it is not the embedded one; its weights must be the same.")
@click.option("--controlnet", "controlnets", multiple=True, callback=_pairs, metavar="NAME=FOLDER",
              help="A ControlNet that was not inside the model; its weights must be the same.")  # fmt: skip
@click.option("--engines", type=_Path(file_okay=False), default=None,
              help="Folder of the engines that ran it. Default: the user's cache.")  # fmt: skip
@click.option("--trust-engines", is_flag=True, help="Use engines even if every user of this machine may change them.")
@click.option("--backend", type=Choice(["auto", *BACKENDS]), default=None,
              help="Compare with another backend. Default: what ran each module then.")  # fmt: skip
@click.option("--write", type=_Path(), default=None, help="Write the picture made again to this PNG.")
@_overwrite
def replay(output: str, write: str | None, overwrite: bool, **named: Any) -> None:
    """Make the picture OUTPUT again from the receipt inside it, and compare.

    Says "identical", or "within 1 of 255" and how many pixels where the network's calls were grouped otherwise (a cache,
    another backend in float32). Exits with 1 if a pixel differs by more, which another machine, thread count or library
    version can cause; the differences in those are named.

    The receipt opens no folder and fetches nothing: a model that is not the embedded one is named with --model, inputs lie
    beside OUTPUT or are named.
    """
    from ..images import png_bytes

    with _live("the model") as tell:
        _quiet_libraries()
        from ..replay import Named, inputs_of
        from ..replay import replay as make_again

        if write:
            check_outputs([Path(write)], [], inputs_of(output, Named(**named)), overwrite)
        replayed = make_again(output, Named(**named), tell)
    if write:
        write_outputs({Path(write): png_bytes(replayed.image, replayed.receipt)})
    click.echo(f"{printable(output)}: {replayed}")
    if not replayed.same:
        sys.exit(1)


def _why_no_gpu() -> str:
    """The reason, or nothing if there is one."""
    import torch

    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "torch sees no device; check the driver and CUDA_VISIBLE_DEVICES"


@main.command("profile", cls=Grouped)
@click.argument("image", type=_Path())
@_request_options
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True,
              help="Edits; the first is cold, the last is shown. Nothing is kept between them.")  # fmt: skip
@click.option("--output", type=_Path(), default=None, help="Write all figures of the last run as JSON.")
@click.option("--trace", type=_Path(), default=None, help="Write a trace for chrome://tracing or ui.perfetto.dev.")
@click.option("--plot", type=_Path(), default=None, help="Write the timeline of the last run as a PNG.")
@click.option(
    "--launches", is_flag=True, help="One more run under torch's profiler: kernel launches, or operators on a CPU."
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@_overwrite
@_model_options
def profile_command(image: str, runs: int, output: str | None, trace: str | None, plot: str | None, launches: bool,
                    as_json: bool, overwrite: bool, **values: Any) -> None:  # fmt: skip
    """Where the time of an edit goes: by stage, step and module.

    Cold and warm apart, what ran each module, and why nothing faster did.

    \b
    iedit profile in.png --source-prompt "a red car ..." --prompt "a blue car ..." --plot time.png
    iedit profile in.png --prompt "..." --backend onnx --trace time.json     open it in ui.perfetto.dev
    """
    from ..images import png_bytes

    _check_uses(values)
    named = [Path(p) for p in (output, trace) if p]
    check_outputs([Path(plot)] if plot else [], named, _read(image, values), overwrite)
    inputs = _inputs(image, values)
    with _live(values["model"]) as tell:
        request = _request(inputs, values, values["seed"], _options(values))
        editor = _editor(values)
        from ..stage_cache import StageCache

        notes: list[str] = []

        def run() -> Any:
            editor.cache = StageCache(memory=0)
            result = editor.edit(request, tell)
            notes[:] = result.notes
            return result.profile

        profiles = [run() for _ in range(runs)]
        from . import report

        counted = report.count_launches(run) if launches else None
    last = profiles[-1]
    totals = [round(sum(p.seconds.values()), 6) for p in profiles]
    found = last.as_dict() | {"runs": totals, "launches": counted, "backend": editor.backend,
                              "first_is_cold": True, "threads": _use_threads().threads, "why_threads": _use_threads().why}  # fmt: skip
    outputs = {}
    if output:
        outputs[Path(output)] = (json.dumps(found, indent=1) + "\n").encode()
    if trace:
        outputs[Path(trace)] = json.dumps(report.trace(last)).encode()
    if plot:
        outputs[Path(plot)] = png_bytes(report.plot(last))
    write_outputs(outputs)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for table in report.tables(last, counted):
        show(table)
    cold, warm = totals[0], totals[1:]
    shown = f", then {', '.join(f'{t:.3f}' for t in warm)}" if warm else ""
    click.echo(f"threads: {_use_threads()}")
    click.echo(f"backend {editor.backend}; first run {cold:.3f} s (cold){shown}")
    _show_notes(notes)


@main.command()
@click.option("--model", default="picturebook", show_default=True, help="The model to describe.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def info(model: str, as_json: bool) -> None:
    """Versions, devices, what can run here and why not, and what a model holds."""
    _quiet_libraries()
    import torch

    from ..backends import reasons
    from ..backends.engine_spec import describe_engines
    from ..model.model import describe, read_digests
    from ..receipt import versions

    described = describe(model)
    if "problem" not in described:
        described["engines"] = describe_engines(read_digests(model).weights)
    chosen = _use_threads()
    found: dict[str, Any] = {
        "iedit": VERSION,
        "versions": versions(),
        "devices": ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))],
        "no_gpu": _why_no_gpu(),
        "processor": machine.describe_processor(),
        "threads": chosen.threads,
        "why_threads": chosen.why,
        "backends": reasons(),
        "model": described,
    }
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("iedit", VERSION)
    table.add_row("versions", ", ".join(f"{k} {v}" for k, v in found["versions"].items()))
    table.add_row("devices", ", ".join(found["devices"]))
    table.add_row("threads", str(chosen))
    table.add_row("processor", found["processor"])
    if found["no_gpu"]:
        table.add_row("", f"no GPU: {found['no_gpu']}")
    for name, why in found["backends"].items():
        table.add_row(f"backend {name}", "can run" if not why else escape(printable("cannot run: " + "; ".join(why))))
    for key, value in found["model"].items():
        table.add_row(f"model {key}", escape(printable(str(value))))
    show(table)


@main.command()
@click.option("--output", type=_Path(), default=None,
              help="The contact sheet. Default: demo/edits.png, which every demo writes anew.")  # fmt: skip
@_overwrite
@click.option("--bench", type=_Path(), default=None, help="Append the figures to this CSV of results.")
def demo(output: str | None, overwrite: bool, bench: str | None) -> None:
    """Run the shipped sample edits with the embedded model and write one contact sheet."""
    sheet = Path(output or "demo/edits.png")
    with _live("picturebook") as tell:
        _quiet_libraries()
        from .demo import run_demo

        _use_threads()
        figures = run_demo(sheet, tell, Path(bench) if bench else None, overwrite=overwrite or output is None)
    from rich.table import Table

    table = Table(title="seconds per stage (network evaluations)")
    table.add_column("stage", no_wrap=True)
    for f in figures:
        table.add_column(f["name"], justify="right")
    for stage in dict.fromkeys(s for f in figures for s in f["seconds"]):
        cells = (
            f"{f['seconds'][stage]:.2f} ({f['evaluations'].get(stage, 0)})" if stage in f["seconds"] else "-"
            for f in figures
        )
        table.add_row(stage, *cells)
    table.add_section()
    totals = (f"{sum(f['seconds'].values()):.2f} ({sum(f['evaluations'].values())})" for f in figures)
    table.add_row("total", *totals)
    table.add_row("peak MiB", *(f"{f['peak_mib']:.0f}" for f in figures))
    show(table)
    click.echo(f"{printable(str(sheet))}: {len(figures)} edits; a row is input, layout, mask, guidance image, result")
