"""Commands of `iedit train`: make the embedded model, an InstructPix2Pix checkpoint and a T2I-Adapter of it, the reader that judges, and the figures of its card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..runtime.cli.help import Choice
from ..runtime.cli.params import together
from .cli_evaluate import WORK, load_suite, reader_option, write_card
from .cli_finetune import ablation, finetune
from .cli_pairs import pairs, renders

if TYPE_CHECKING:
    import torch

_work = click.option(
    "--work", type=click.Path(path_type=Path, file_okay=False), default=WORK, show_default=True,
    help="Folder of the checkpoints; a run that was stopped goes on from there.",
)  # fmt: skip
_model = click.option(
    "--model", default="picturebook", show_default=True,
    help="The model to judge: the embedded one, or a local folder in diffusers layout.",
)  # fmt: skip
_steps = click.option("--steps", type=click.IntRange(1), default=25, show_default=True, help="Sampling steps.")
_seed = click.option("--seed", type=int, default=0, show_default=True, help="Which held-out scenes, and their noise.")


_device = click.option("--device", default=None, help="cpu, cuda or cuda:NUMBER. Default: the GPU if there is one.")

_backend = click.option(
    "--backend", type=click.Choice(["torch", "graphs", "compile", "onnx", "tensorrt"]), default="torch", show_default=True,
    help="What runs the networks; onnx takes half the time on a CPU (run `iedit export onnx` first).",
)  # fmt: skip


@click.group()
def train() -> None:
    """Train models: iEdit on pairs, and the embedded picture-book model; measure them.

    iEdit: `pairs` builds training pairs of captioned pictures, `finetune` fine-tunes a Stable Diffusion 1.x checkpoint
    on them, `ablation` shows what each loss does on `renders` of the picture-book world.

    InstructPix2Pix: `instruct` fine-tunes the embedded model so that it takes the picture beside the noise, for --method ip2p.

    T2I-Adapter: `adapter` trains one of the embedded model that reads a layout in place of its ControlNet.

    The embedded model, in this order: `embed` trains it, `classifier` the reader of pictures that judges it (10 minutes
    on one core), `figures` measures the model and `iedit evaluate truth` the edits. The last two write figures.json, and
    card.md for the card.
    """


@train.command()
@_work
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="One for each core; on a GPU, which one process keeps busy, 1.",
)
@click.option("--base", default=None, metavar="MODEL",
              help="Train a finished model on (UNet, then the ControlNets; on a GPU the decoder too): picturebook, or a folder.")  # fmt: skip
@_device
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=None,
              help="Folder of the model. Default: in place of the embedded one.")  # fmt: skip
def embed(work: Path, processes: int, base: str | None, device: str | None, out: Path | None) -> None:
    """Train the embedded model: autoencoder, UNet and text encoder, ControlNets, CLIP.

    Takes hours on two cores. Every part writes a checkpoint every few minutes: stop it with Ctrl-C and give the same
    command again to go on.
    """
    from ..runtime.model.checkpoint import picturebook_folder
    from ..runtime.model.model import find_device
    from . import embed as training

    start = picturebook_folder() if base == "picturebook" else None if base is None else Path(base)
    try:
        where = find_device(device)
        training.train_all(work=work, log=click.echo, processes=processes, out=out, base=start, device=where)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error


_on_base = together([
    click.option("--base", default="picturebook", show_default=True, metavar="MODEL",
                 help="What is trained on: the embedded model, or a folder of `iedit train embed`."),
    click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=None,
                 help="Folder of the model, in diffusers' layout. Default: WORK/model."),
    click.option("--overwrite", is_flag=True, help="Replace OUT if it is there."),
    _device,
])  # fmt: skip


def _train_on(
    base: str,
    out: Path,
    overwrite: bool,
    device: str | None,
    is_ours: Callable[[Path], bool],
    train_it: Callable[[Path, torch.device], Path],
) -> None:
    """Run a training on top of a model and say where its checkpoint is.

    Args:
        is_ours: whether a folder is a checkpoint of the command, which --overwrite may replace.
        train_it: trains on the base's folder, on a device, and writes the checkpoint.
    """
    from ..runtime.cli.params import use_threads
    from ..runtime.errors import RunError, UsageError
    from ..runtime.model.checkpoint import find_folder
    from ..runtime.model.model import find_device

    if out.exists() and not is_ours(out):
        raise UsageError(f"--out: {out} is there and is no checkpoint of this command; name another folder")
    if out.exists() and not overwrite:
        raise UsageError(f"--out: {out} is there already; name another folder, or replace it with --overwrite")
    start, where = find_folder(base), find_device(device)
    use_threads()
    try:
        train_it(start, where)
    except ValueError as error:
        raise UsageError(str(error)) from error
    except FloatingPointError as error:
        raise RunError(str(error)) from error
    click.echo(f"wrote {out}")


@train.command()
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), default=Path("build/instruct"), show_default=True,
              help="Folder of the encoded pictures and the checkpoint; a run that was stopped goes on from there.")  # fmt: skip
@_on_base
def instruct(work: Path, base: str, out: Path | None, overwrite: bool, device: str | None) -> None:
    """Fine-tune an InstructPix2Pix checkpoint of the picture-book world, for `--method ip2p`.

    \b
    iedit train instruct
    iedit edit in.png --prompt "a blue car on grass at noon" --method ip2p --model build/instruct/model
    iedit evaluate truth --model build/instruct/model --methods ip2p

    The UNet takes the picture beside the noise and learns from renders before and after an edit of a thing, a colour, the ground or the sky.
    What it is told is the caption of the picture after the edit, as the text encoder knows captions alone. Half an hour on an idle core. Ctrl-C
    saves, and the same command goes on.
    """
    from . import instruct as training

    made = work / "model" if out is None else out
    _train_on(base, made, overwrite, device, training.is_checkpoint,
              lambda start, where: training.train(work, start, made, click.echo, where))  # fmt: skip


@train.command()
@click.option(
    "--layout",
    type=Choice(["pose", "scribble"]),
    required=True,
    help="What the adapter reads: skeletons of people, or outlines of things.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Folder of the encoded pictures and the checkpoint; a run that was stopped goes on from there. Default: build/adapter-LAYOUT.",
)
@_on_base  # fmt: skip
def adapter(layout: str, work: Path | None, base: str, out: Path | None, overwrite: bool, device: str | None) -> None:
    """Train a T2I-Adapter of the picture-book world, which reads a layout in place of a ControlNet.

    \b
    iedit train adapter --layout pose
    iedit edit in.png --prompt "a red person on grass at noon" --method controlnet --layout pose=map.png --model build/adapter-pose/model
    iedit evaluate truth --model build/adapter-pose/model --kinds pose --methods t2i-adapter

    The model's UNet stays as it is; the adapter learns from renders with their maps to add to it what the map shows. OUT is the whole model with
    `adapter-LAYOUT` in place of `controlnet-LAYOUT`; what reads other layouts stays. Half an hour on an idle core. Ctrl-C saves, and the same command
    goes on.
    """
    from . import t2i_adapter as training

    folder = Path(f"build/adapter-{layout}") if work is None else work
    made = folder / "model" if out is None else out
    _train_on(base, made, overwrite, device, lambda at: training.is_checkpoint(at, layout),
              lambda start, where: training.train(folder, start, made, layout, click.echo, where))  # fmt: skip


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
    from .workers import write_json

    training.train_classifier(work, click.echo)
    net = training.Classifier.load(work / "classifier.safetensors")  # judged as it is stored, in float16
    figures = {
        "renders": training.examine(net, pictures),
        "softened renders": training.examine(net, pictures, seed=1, soft=True),
    }
    write_json(work / "classifier.json", figures)
    for name, values in figures.items():
        click.echo(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))


_output = click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default=WORK / "truth", show_default=True,
    help="Folder for figures.json and card.md.",
)  # fmt: skip


@train.command()
@_model
@reader_option
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

    editor, judge = load_suite(model, reader, backend)
    found = suite.model_figures(editor, judge, count, seed=seed, steps=steps, log=click.echo)
    for one in found:
        good = suite.met(one)
        verdict = "" if good is None else f"  wanted {one['wanted']}: {'met' if good else 'NOT MET'}"
        interval = f"({one['low']:.3f}-{one['high']:.3f}, n={one['n']})"
        click.echo(f"{one['name']}: {one['value']:.3f} {one['unit']} {interval}{verdict}")
    about = {"model": model, "seed": seed, "steps": steps, "backend": backend}
    write_card(output, reader, model=found, about=about)


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
    """Write the model card: data, steps and hours from its training.json, figures of `iedit train figures` and `evaluate truth` from OUTPUT.

    It is the model's README.md; a card that is there is replaced.
    """
    from ..runtime.files import check_outputs, write_whole
    from ..runtime.model.checkpoint import picturebook_folder
    from . import embed as training
    from .truth import render_card
    from .workers import read_json

    found = read_json(output / "figures.json")
    if not found:
        raise click.ClickException(
            f"{output / 'figures.json'} is not there; run `iedit train figures` and `iedit evaluate truth` first"
        )
    model = picturebook_folder() if folder is None else folder
    target, made = model / "README.md", training.card(model, render_card(found))
    head = made.split("\n\n", 1)[0]  # up to the heading
    check_outputs([], [target], [], overwrite or (target.is_file() and target.read_text().startswith(head)))
    write_whole(target, made.encode())
    click.echo(f"wrote {model / 'README.md'}")


for _command in (renders, pairs, finetune, ablation):
    train.add_command(_command)
