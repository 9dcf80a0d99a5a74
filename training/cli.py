"""Commands of `iedit train`: make the embedded model, the reader that judges it, and the figures of its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .cli_finetune import ablation, finetune
from .cli_pairs import pairs, renders

WORK = Path("build/embed")
_work = click.option(
    "--work", type=click.Path(path_type=Path, file_okay=False), default=WORK, show_default=True,
    help="Folder of the checkpoints; a run that was stopped goes on from there.",
)  # fmt: skip
_model = click.option(
    "--model", default="picturebook", show_default=True,
    help="The model to judge: the embedded one, or a local folder in diffusers layout.",
)  # fmt: skip
_reader = click.option(
    "--reader", type=click.Path(path_type=Path, dir_okay=False), default=WORK / "classifier.safetensors",
    show_default=True, help="Weights of the reader, made by `iedit train classifier`.",
)  # fmt: skip
_steps = click.option("--steps", type=click.IntRange(1), default=25, show_default=True, help="Sampling steps.")
_seed = click.option("--seed", type=int, default=0, show_default=True, help="Which held-out scenes, and their noise.")


def _names(known: tuple[str, ...], given: str) -> list[str]:
    """A comma-separated list of known names; "all" is all of them."""
    names = list(known) if given == "all" else [n.strip() for n in given.split(",")]
    for name in names:
        if name not in known:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(known)}")
    return names


_backend = click.option(
    "--backend", type=click.Choice(["torch", "compile", "onnx", "tensorrt"]), default="torch", show_default=True,
    help="What runs the networks; onnx takes half the time on a CPU (run `iedit export onnx` first).",
)  # fmt: skip


def _load(model: str, reader: Path, backend: str) -> tuple[Any, Any]:
    from .classifier import Classifier

    try:
        judge = Classifier.load(reader)
    except FileNotFoundError as error:
        raise click.ClickException(str(error)) from error
    from ..runtime.editor import Editor
    from ..runtime.stage_cache import StageCache

    return Editor.load(
        model=model, backend=backend, cache=StageCache(memory=0)
    ), judge  # no cache: methods are compared by their cost


@click.group()
def train() -> None:
    """Train models: iEdit on pairs, and the embedded picture-book model; measure them.

    iEdit: `pairs` builds training pairs of captioned pictures, `finetune` fine-tunes a Stable Diffusion 1.x checkpoint
    on them, `ablation` shows what each loss does on `renders` of the picture-book world.

    The embedded model, in this order: `embed` trains it, `classifier` the reader of pictures that judges it (10 minutes
    on one core), `figures` measures the model, `truth` the edits. The last two write figures.json, and card.md for the
    card.
    """


@train.command()
@_work
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True, help="One for each core.")
@click.option("--base", default=None, metavar="MODEL",
              help="Train a finished model on (UNet, then the ControlNets): picturebook, or a folder.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=None,
              help="Folder of the model. Default: in place of the embedded one.")  # fmt: skip
def embed(work: Path, processes: int, base: str | None, out: Path | None) -> None:
    """Train the embedded model: autoencoder, UNet and text encoder, ControlNets, CLIP.

    Takes hours on two cores. Every part writes a checkpoint every few minutes: stop it with Ctrl-C and give the same
    command again to go on.
    """
    from ..runtime.model.checkpoint import picturebook_folder
    from . import embed as training

    start = picturebook_folder() if base == "picturebook" else None if base is None else Path(base)
    try:
        training.train_all(work=work, log=click.echo, processes=processes, out=out, base=start)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error


@train.command()
@_work
@click.option(
    "--pictures", type=click.IntRange(1), default=1000, show_default=True, help="Held-out renders to judge it."
)
def classifier(work: Path, pictures: int) -> None:
    """Train the reader of pictures on renders and report how often it is right on held-out ones.

    It names the things, colours, ground and sky, segments the things and finds the joints of people. It serves the
    figures and nothing else: no part of the model or of an edit sees it. Writes WORK/classifier.safetensors and, with
    its figures, WORK/classifier.json.
    """
    from . import classifier as training
    from .truth import write_json

    training.train_classifier(work, click.echo)
    net = training.Classifier.load(work / "classifier.safetensors")  # judged as it is stored, in float16
    figures = {
        "renders": training.examine(net, pictures),
        "softened renders": training.examine(net, pictures, seed=1, soft=True),
    }
    write_json(work / "classifier.json", figures)
    for name, values in figures.items():
        click.echo(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))


def _write_card(output: Path, reader: Path, **found: Any) -> None:
    from .truth import read_json, render_card, write_json

    figures = read_json(output / "figures.json") | found
    measured = read_json(reader.with_suffix(".json")).get("renders")
    if measured:
        figures["reader"] = measured
    write_json(output / "figures.json", figures)
    (output / "card.md").write_text(render_card(figures))
    click.echo(f"wrote {output / 'figures.json'} and {output / 'card.md'}")


_output = click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default=WORK / "truth", show_default=True,
    help="Folder for figures.json, card.md, cases.csv and the sheets.",
)  # fmt: skip


@train.command()
@_model
@_reader
@_output
@click.option(
    "--n", "count", type=click.IntRange(1), default=200, show_default=True, help="Held-out scenes per figure."
)
@_backend
@_steps
@_seed
def figures(model: str, reader: Path, output: Path, count: int, backend: str, steps: int, seed: int) -> None:
    """Measure the model on held-out scenes: autoencoder, text to image, ControlNets.

    Every figure is shown with its 95 % interval and with what is wanted of it.
    """
    from . import truth as suite

    editor, judge = _load(model, reader, backend)
    found = suite.model_figures(editor, judge, count, seed=seed, steps=steps, log=click.echo)
    for one in found:
        good = suite.met(one)
        verdict = "" if good is None else f"  wanted {one['wanted']}: {'met' if good else 'NOT MET'}"
        interval = f"({one['low']:.3f}-{one['high']:.3f}, n={one['n']})"
        click.echo(f"{one['name']}: {one['value']:.3f} {one['unit']} {interval}{verdict}")
    about = {"model": model, "seed": seed, "steps": steps, "backend": backend}
    _write_card(output, reader, model=found, about=about)


def _settings(editor: Any) -> str:
    """Everything of the model that an edit's result depends on: a case run under other recommendations is another case."""
    m = editor.model
    return f"{m.digest} guidance={m.guidance_scale:g} mask={m.mask_strength}/{m.mask_threshold} text updates={m.text_update_share}"


@train.command()
@_model
@_reader
@_output
@click.option("--n", "count", type=click.IntRange(1), default=100, show_default=True, help="Held-out edits per kind.")
@click.option("--kinds", default="all", show_default=True, metavar="LIST",
              help="Comma-separated: thing, colour, background (sky or ground), pose, scribble.")  # fmt: skip
@click.option("--methods", default="all", show_default=True, metavar="LIST",
              help="Comma-separated: ito, ito adam (the paper's update), ito lambda=1, diffedit, sdedit, iedit, p2p, "
                   "p2p without correction, ddpm (text kinds), controlnet, controlnet-diffedit (layout kinds), round trip of the target.")  # fmt: skip
@click.option("--sheet", type=click.IntRange(0), default=0, show_default=True,
              help="Show the first so many cases of each kind and method in OUTPUT/METHOD-KIND.png.")  # fmt: skip
@click.option("--by-things", is_flag=True, help="Scenes of one and two things in rows of their own.")
@click.option("--batch", type=click.IntRange(1), default=10, show_default=True, help="Edits per call.")
@_backend
@_steps
@_seed
def truth(
    model: str, reader: Path, output: Path, count: int, kinds: str, methods: str, sheet: int, by_things: bool,
    batch: int, backend: str, steps: int, seed: int,
) -> None:  # fmt: skip
    """Run editing methods on held-out edits whose exact result can be drawn, and score them.

    Half of the scenes have two things, of which one must stay as it is. Every case is a row of OUTPUT/cases.csv; a case
    that is there already, of the same model, steps and seed, is not run again, so a stopped run goes on and a larger
    --n adds to a smaller one.

    \b
    A quick look:  iedit train truth --n 4 --sheet 4
    One method:    iedit train truth --methods ito --kinds pose,scribble
    """
    from rich.console import Console

    from . import truth as suite

    asked_kinds, asked_methods = _names(suite.KINDS, kinds), _names(tuple(suite.METHODS), methods)
    editor, judge = _load(model, reader, backend)
    rows = suite.run(
        editor, judge, asked_methods, asked_kinds, count, settings=_settings(editor),
        seed=seed, steps=steps, batch=batch, output=output, sheet=sheet, log=click.echo,
    )  # fmt: skip
    summary = suite.summarise(rows)
    console = Console()
    if not console.is_terminal:  # 17 columns: a file or a pipe takes them in one line
        console.width = 220
    console.print(suite.table(suite.summarise(rows, by_things) if by_things else summary))
    for one in suite.verdicts(summary):
        click.echo(
            f"{one['name']}: {one['value']:.3f}, wanted {one['wanted']}: {'met' if suite.met(one) else 'NOT MET'}"
        )
    _write_card(output, reader, edits=summary)


@train.command()
@_output
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="The model. Default: the embedded one.",
)
@click.option("--overwrite", is_flag=True, help="Also replace a README.md that is not such a card.")
def card(output: Path, folder: Path | None, overwrite: bool) -> None:
    """Write the model card: data, steps and hours from its training.json, figures of `figures` and `truth` from OUTPUT.

    It is the model's README.md; a card that is there is replaced.
    """
    from ..runtime.files import check_outputs, write_whole
    from ..runtime.model.checkpoint import picturebook_folder
    from . import embed as training
    from .truth import read_json, render_card

    found = read_json(output / "figures.json")
    if not found:
        raise click.ClickException(
            f"{output / 'figures.json'} is not there; run `iedit train figures` and `truth` first"
        )
    model = picturebook_folder() if folder is None else folder
    target, made = model / "README.md", training.card(model, render_card(found))
    head = made.split("\n\n", 1)[0]  # up to the heading
    check_outputs([], [target], [], overwrite or (target.is_file() and target.read_text().startswith(head)))
    write_whole(target, made.encode())
    click.echo(f"wrote {model / 'README.md'}")


for _command in (renders, pairs, finetune, ablation):
    train.add_command(_command)
