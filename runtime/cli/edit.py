"""The commands that make pictures: `edit`, `mask`, `layouts` and `replay`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import BACKENDS
from ..errors import UsageError
from ..files import check_outputs, printable, write_outputs
from ..model.checkpoint import MAX_GUIDANCE, MAX_INNER_STEPS
from ..options import CORRECTIONS, REPLACEMENTS, UNMASKED, mask_mode
from ..presets import PRESETS
from . import params
from .help import Choice, Grouped
from .live import live_progress, quiet_libraries, show_notes

if TYPE_CHECKING:
    from ..editor import EditRequest, EditResult


edit_options = params.together([
    params.method_option("--mask", type=params.FilePath(), default=None, help="White is edited, black is kept; estimated if not given."),
    params.method_option("--lambda", "lambdas", multiple=True, type=params.Between(0, 1), default=(),
                  help="Weight of preservation against guidance; 1 makes no guidance image. Repeat for a sweep. Default: 0.6; or 1 where the mask "
                       "is as small as the checkpoint recommends it for."),
    params.method_option("--t-u", "t_u", type=click.IntRange(0), default=None,
                  help="Steps that ITO updates. Default: 15 of 25, or what the checkpoint recommends for edits without layouts."),
    params.method_option("--k", type=click.IntRange(1, MAX_INNER_STEPS), default=1, show_default=True, help="Inner steps at each."),
    params.method_option("--update", type=Choice(["clipped", "adam"]), default="clipped", show_default=True,
                  help="How ITO moves the latent: by a Newton step of bounded length, or by Adam as in the paper."),
    params.method_option("--ratio", type=params.Between(0, 1, min_open=True), default=None,
                  help="Share of the steps that the other methods noise the picture by. Default: the method's own."),
    params.method_option("--refine", is_flag=True, help="Refine the guidance image with the input (ITO A.5)."),
    params.method_option("--cross-replace", type=params.Between(0, 1), default=0.8, show_default=True,
                  help="Share of the steps in which the edit takes the source's cross-attention maps: where each word looks."),
    params.method_option("--self-replace", type=params.Between(0, 1), default=0.4, show_default=True,
                  help="Share of the steps in which it takes the source's self-attention maps: which parts belong together."),
    params.method_option("--replacement", type=Choice(REPLACEMENTS), default="auto", show_default=True,
                  help="replace: word for word; refine: only the words that both prompts have; auto: replace for equally many words."),
    params.method_option("--reweight", multiple=True, callback=params.factors, metavar="WORD=FACTOR",
                  help="Weight of a word of the prompt; repeat for more."),
    params.method_option("--inversion-correction", type=Choice(CORRECTIONS), default="direct", show_default=True,
                  help="What becomes of the inversion's errors: direct puts the source back on it at every step; "
                       "null-text fits the unconditional half by gradients, which takes minutes on a CPU."),
    params.method_option("--source-guidance-scale", type=params.Between(0, MAX_GUIDANCE), default=None,
                  help="Classifier-free guidance while the noise of the picture is found. Default: 3.5 of 7.5 of the checkpoint's."),
    params.method_option("--image-guidance-scale", type=params.Between(0, MAX_GUIDANCE), default=1.5, show_default=True,
                  help="How far the picture is followed; --guidance-scale is for the text."),
    params.method_option("--composite", type=Choice(["none", "latent", "pixel"]), default="none", show_default=True,
                  help="pixel leaves everything outside the mask exactly as it was."),
    click.option("--count", type=click.IntRange(1, 1000), default=1, show_default=True, help="Variants: seeds SEED, SEED+1, ..."),
    click.option("--output", type=params.FilePath(), default=None, help="PNG. Default: NAME-edited.png in this folder."),
    params.overwrite_option,
    click.option("--no-receipt", is_flag=True, help="Leave out the receipt: prompts, options, versions, names of the inputs."),
    click.option("--stages", type=params.FilePath(), default=None, help="Also a sheet: input, layout, mask, guidance, result."),
    click.option("--profile", type=params.FilePath(), default=None, help="Also seconds and evaluations per stage, as JSON."),
    click.option("--cache", type=params.FilePath(file_okay=False), default=None,
                 help="Keep stage results in this folder: a second edit of the picture runs only what changed."),
    click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON."),
])  # fmt: skip


@click.command(cls=Grouped)
@click.argument("image", type=params.FilePath())
@params.request_options
@edit_options
@params.speed_options
@params.model_options
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
    p2p                  inverts the picture and denoises it with the attention of the source prompt (Prompt-to-prompt)
    ddpm                 finds the noise that would draw the picture, and draws with it under the prompt
    ip2p                 follows an instruction ("make it night"); needs an InstructPix2Pix checkpoint

    The output PNG carries a receipt; `iedit replay OUT.png` makes it again. Exit code 2: it cannot be done as asked, and
    nothing was written. 1: it failed while running; nothing was written but what the error says.
    """
    from ..images import png_bytes

    first = Path(output or f"{Path(image).stem}-edited.png")
    wanted = [(seed, lam) for seed in range(values["seed"], values["seed"] + count) for lam in lambdas or (None,)]
    targets = [first]
    if len(wanted) > 1:
        targets = [first.parent / f"{first.stem}-{i}{first.suffix}" for i in range(len(wanted))]
    params.check_given(values, lambdas or (None,))
    figures = [Path(profile)] if profile else []
    check_outputs([*targets, *([Path(stages)] if stages else [])], figures, params.files_read(image, values), overwrite)
    inputs = params.read_inputs(image, values)
    with live_progress(values["model"]) as tell:
        requests = [params.make_request(inputs, values, seed, lam) for seed, lam in wanted]
        results = params.load_editor(values, inputs, cache).edit_many(requests, tell)
    from .. import receipt as receipts

    files = {"image": image, "mask": values["mask"]}
    files |= {"layouts": values["layout"], "source_layouts": values["source_layout"]}
    ran = [r.receipt["request"]["options"]["lam"] for r in results]  # what was left open is chosen by now
    members = [{"seed": seed, "lam": lam} for (seed, _), lam in zip(wanted, ran, strict=True)]
    outputs = {}
    for i, (target, result) in enumerate(zip(targets, results, strict=True)):
        written = None if no_receipt else receipts.of_command(result.receipt, files, values, members, i)
        outputs[target] = png_bytes(result.image, written)
    if stages:
        outputs[Path(stages)] = png_bytes(_sheet(requests, results))
    if profile:
        outputs[Path(profile)] = (json.dumps(results[0].profile.as_dict(), indent=1) + "\n").encode()
    write_outputs(outputs)
    if as_json:
        rows = [
            {"output": str(t), "seed": m["seed"], "lambda": m["lam"], "mask": r.receipt["mask"], "notes": r.notes}
            for t, m, r in zip(targets, members, results, strict=True)
        ]
        click.echo(json.dumps({"results": rows, "profile": results[0].profile.as_dict()}, indent=1))
        return
    if values["preset"] is not None:
        show_notes([f"preset {values['preset']}: {PRESETS[values['preset']].says}; what was given beside it stays"])
    for note in dict.fromkeys(note for result in results for note in result.notes):
        about = [t.name for t, r in zip(targets, results, strict=True) if note in r.notes]
        where = "" if len(about) == len(targets) else f" ({', '.join(about)})"
        show_notes([note + where])
    spent = sum(results[0].profile.seconds.values())
    for target, result, lam in zip(targets, results, ran, strict=True):
        area = "" if result.receipt["mask"] is None else f", mask {result.receipt['mask']['area']:.0%}"
        chosen = "" if lambdas or lam is None else f", lambda {lam:g}"
        click.echo(f"{printable(str(target))}: {result.image.width}x{result.image.height}{area}{chosen}")
    click.echo(f"{spent:.1f} s, {sum(results[0].profile.evaluations.values())} network evaluations", err=True)


def _sheet(requests: list[EditRequest], results: list[EditResult]) -> Any:
    """A contact sheet: for each edit the input, its layouts, mask, guidance image and result."""
    from ..images import contact_sheet

    rows = []
    for request, result in zip(requests, results, strict=True):
        row = [("input", request.image)] + [(f"{n} layout", p) for n, p in request.layouts.items()]
        row += [("mask", result.mask)] if result.mask else []
        row += [("guidance image", result.guidance)] if result.guidance else []
        lam = result.receipt["request"]["options"]["lam"]
        said = "" if lam is None else f", lambda {lam:g}"
        rows.append([*row, (f"result, seed {request.seed}{said}", result.image)])
    return contact_sheet(rows, titles=[r.prompt for r in requests])


@click.command("mask", cls=Grouped)
@click.argument("image", type=params.FilePath())
@params.request_options
@click.option("--output", type=params.FilePath(), default=None, help="PNG. Default: NAME-mask.png in this folder.")
@params.overwrite_option
@params.model_options
def mask_command(image: str, output: str | None, overwrite: bool, **values: Any) -> None:
    """Estimate where an edit would happen, and write it: white is edited. Paint over it and give it back with --mask."""
    from ..images import mask_coverage, png_bytes

    target = Path(output or f"{Path(image).stem}-mask.png")
    check_outputs([target], [], params.files_read(image, values), overwrite)
    if values["method"] in UNMASKED:
        raise UsageError(f"method {values['method']} uses no mask; name one that does, such as --method ito")
    if mask_mode(values["method"], values["mask_mode"]) == "none":
        raise UsageError(
            "--mask-mode none, which is the default of p2p, ddpm and ip2p, estimates no mask; use single or trajectory"
        )
    params.check_given(values)
    inputs = params.read_inputs(image, values)
    with live_progress(values["model"]) as tell:
        request = params.make_request(inputs, values, values["seed"])
        mask, profile = params.load_editor(values, inputs).mask(request, tell)
    assert mask is not None
    write_outputs({target: png_bytes(mask)})
    show_notes(profile.notes)
    click.echo(f"{printable(str(target))}: {mask_coverage(mask):.0%} of the picture")


@click.command("layouts")
@click.argument("image", type=params.FilePath())
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=Choice(["pose", "scribble", "edge", "line"]),
    help="Which map; repeat for more. Default: all that can be made from a picture.",
)
@click.option("--output", type=params.FilePath(), default=None, help="PNG, for one kind. Default: NAME-KIND.png.")
@params.overwrite_option
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


replay_options = params.together([
    click.option("--image", type=params.FilePath(), default=None, help="The input, if it is not beside OUTPUT under its name."),
    click.option("--mask", type=params.FilePath(), default=None, help="The mask, likewise."),
    click.option("--layout", "layouts", multiple=True, callback=params.pairs, metavar="NAME=FILE", help="A layout, likewise."),
    click.option("--source-layout", "source_layouts", multiple=True, callback=params.pairs, metavar="NAME=FILE",
                 help="A layout of the picture as it was, likewise."),
    click.option("--model", default=None, help="The model, if it is not the embedded one; its weights must be the same."),
    click.option("--controlnet", "controlnets", multiple=True, callback=params.pairs, metavar="NAME=FOLDER",
                 help="A ControlNet that was not inside the model; its weights must be the same."),
    click.option("--engines", type=params.FilePath(file_okay=False), default=None,
                 help="Folder of the engines that ran it. Default: the user's cache."),
    click.option("--trust-engines", is_flag=True, help="Use engines even if every user of this machine may change them."),
    click.option("--backend", type=Choice(["auto", *BACKENDS]), default=None,
                 help="Compare with another backend. Default: what ran each module then."),
    click.option("--write", type=params.FilePath(), default=None, help="Write the picture made again to this PNG."),
    params.overwrite_option,
])  # fmt: skip


@click.command()
@click.argument("output", type=params.FilePath())
@replay_options
def replay(output: str, write: str | None, overwrite: bool, **named: Any) -> None:
    """Make the picture OUTPUT again from the receipt inside it, and compare.

    Says "identical", or "within 1 of 255" and how many pixels where the network's calls were grouped otherwise (a cache,
    another backend in float32). Exits with 1 if a pixel differs by more, which another machine, thread count or library
    version can cause; the differences in those are named.

    The receipt opens no folder and fetches nothing: a model that is not the embedded one is named with --model, inputs lie
    beside OUTPUT or are named.
    """
    from ..images import png_bytes

    with live_progress("the model") as tell:
        quiet_libraries()
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
