"""`iedit train finetune`."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from .finetune import Step

EVERY = 20.0  # seconds between two lines


class Lines:
    """Says how a run goes, a line at the first and last step and every `EVERY` seconds; picklable, as processes need it."""

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, step: Step) -> None:
        now = time.monotonic()
        if step.number not in (1, step.steps) and now - self.last < EVERY:
            return
        self.last = now
        from ..runtime.cli.live import time_left

        shown = " ".join(f"{k} {v:.4f}" for k, v in step.terms.items() if k not in ("overlap", "gap"))
        click.echo(
            f"step {step.number}/{step.steps} {shown} {step.steps_per_second:.2f} steps/s, {time_left(step.seconds_left)}, "
            f"{step.memory / 2**30:.1f} GiB"
        )


@click.command()
@click.option("--model", default="picturebook", show_default=True,
              help="What is fine-tuned: the embedded model, a diffusers folder, or a hub id of SD 1.x.")  # fmt: skip
@click.option("--pairs", required=True, type=click.Path(path_type=Path, file_okay=False),
              help="Folder that `iedit train pairs` wrote.")  # fmt: skip
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False),
              help="Folder of the run; its model is OUT/model. A run that was stopped goes on from there.")  # fmt: skip
@click.option("--steps", type=click.IntRange(1), default=10_000, show_default=True, help="Optimiser steps.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Pairs of a process at a time.")
@click.option("--accumulate", type=click.IntRange(1), default=1, show_default=True, help="Batches before a step.")
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True,
              help="On this machine, one for each GPU. Leave it at 1 under torchrun or `accelerate launch`.")  # fmt: skip
@click.option("--size", type=click.IntRange(8), default=None,
              help="Side of the pictures, pixels. Default: what the model was trained on; the paper's is 384.")  # fmt: skip
@click.option("--losses", default="mask,global,local,perceptual", show_default=True, metavar="LIST",
              help="Comma-separated: paired (Eq. 4) or mask (Eqs. 8-9); global (Eq. 5), local (Eq. 11), perceptual (Eq. 10).")  # fmt: skip
@click.option(
    "--perceptual-weight", type=click.FloatRange(0), default=0.1, show_default=True, help="lambda_perc of Eq. 12."
)
@click.option("--clip", default=None, metavar="MODEL",
              help="CLIPModel of the losses: a folder or hub id. Default: the model's own, else ViT-L/14.")  # fmt: skip
@click.option("--vgg", type=click.Path(path_type=Path, dir_okay=False), default=None,
              help="VGG-16's weights for the perceptual loss: .safetensors, or torchvision's .pth.")  # fmt: skip
@click.option(
    "--learning-rate", type=click.FloatRange(0, min_open=True), default=2e-4, show_default=True, help="Of AdamW."
)
@click.option("--weight-decay", type=click.FloatRange(0), default=0.01, show_default=True, help="Of AdamW.")
@click.option("--adam8bit", is_flag=True, help="AdamW with its state in 8 bits (bitsandbytes).")
@click.option(
    "--ema", type=click.FloatRange(0, 1, max_open=True), default=None, help="Save a moving average of this decay."
)
@click.option("--precision", type=click.Choice(["auto", "no", "fp16", "bf16"]), default="auto", show_default=True,
              help="Mixed precision; auto: bf16 or else fp16 on a GPU, none on a CPU.")  # fmt: skip
@click.option("--attention", type=click.Choice(["auto", "sdpa", "xformers"]), default="auto", show_default=True,
              help="auto: xformers where it can run, else SDPA; the reason is printed.")  # fmt: skip
@click.option("--gradient-checkpointing/--no-gradient-checkpointing", default=True, show_default=True,
              help="Of the UNet and of the decoder: less memory, a third more time.")  # fmt: skip
@click.option("--save-every", type=click.IntRange(1), default=500, show_default=True, help="Steps between checkpoints.")
@click.option("--sample-every", type=click.IntRange(0), default=500, show_default=True,
              help="Steps between sheets of sample edits, at checkpoints; 0 makes none.")  # fmt: skip
@click.option("--samples", type=click.IntRange(1), default=4, show_default=True, help="Edits on a sheet.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of order, timesteps and noise.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default=None, help="Default: the GPU if there is one.")
def finetune(
    model: str, pairs: Path, out: Path, processes: int, losses: str, clip: str | None, vgg: Path | None, device: str | None,
    **values: Any,
) -> None:  # fmt: skip
    """Fine-tune a Stable Diffusion 1.x checkpoint for editing on the pairs of `iedit train pairs` (iEdit section 3).

    \b
    Then:          iedit edit in.png --prompt "..." --method iedit --model OUT/model
    The paper's:   iedit train finetune --model CompVis/stable-diffusion-v1-4 --pairs DIR --out OUT --size 384
                   --processes 2 --vgg vgg16.pth

    Writes OUT/model (the last checkpoint, in diffusers' layout, with a model card), OUT/losses.csv (a row for each
    step), OUT/samples (sheets of edits) and OUT/tensorboard. Ctrl-C ends it after the step that it is in; the same
    command goes on from there, and with a larger --steps it goes on from its end.
    """
    from . import finetune as training

    names = tuple(n.strip() for n in losses.split(",") if n.strip())
    training.finetune(
        out, model, pairs, training.Settings(losses=names, **values), processes=processes, clip=clip, vgg=vgg, device=device,
        command=shlex.join(["iedit", *sys.argv[1:]]), tell=Lines(), say=click.echo,
    )  # fmt: skip


@click.command()
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), default=Path("build/ablation"), show_default=True,
              help="Folder that everything is kept in; a run that was stopped goes on from there.")  # fmt: skip
@click.option("--model", default="picturebook", show_default=True, help="What is fine-tuned.")
@click.option("--reader", type=click.Path(path_type=Path, dir_okay=False), default=Path("build/embed/classifier.safetensors"),
              show_default=True, help="Weights of the reader that judges edits, made by `iedit train classifier`.")  # fmt: skip
@click.option("--wordnet", type=click.Path(path_type=Path, file_okay=False), default=Path("/usr/share/wordnet"), show_default=True,
              help="Folder of WordNet 3.0's database files (apt-get install wordnet-base).")  # fmt: skip
@click.option("--pictures", type=click.IntRange(10), default=3000, show_default=True, help="Renders in the corpus.")
@click.option(
    "--n",
    "count",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Held-out edits of things, and of colours.",
)
@click.option("--steps", type=click.IntRange(1), default=400, show_default=True, help="Fine-tuning steps of a row.")
@click.option("--batch", type=click.IntRange(1), default=4, show_default=True, help="Pairs in a step.")
@click.option(
    "--learning-rate", type=click.FloatRange(0, min_open=True), default=2e-4, show_default=True, help="Of AdamW."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the held-out edits.")
@click.option("--write", type=click.Path(path_type=Path, dir_okay=False), default=None,
              help="A document whose ablation table is replaced, such as docs/training.md.")  # fmt: skip
def ablation(
    work: Path, model: str, reader: Path, wordnet: Path, pictures: int, count: int, steps: int, batch: int, learning_rate: float,
    seed: int, write: Path | None,
) -> None:  # fmt: skip
    """The paper's ablation in small (iEdit Table 2): fine-tune the embedded model once for each row of losses, and score edits.

    Renders become pairs, and 400 steps of 4 pairs a row take 8 minutes on a core. Held-out edits of the truth suite are the test.
    """
    from ..runtime.editor import Editor
    from ..runtime.files import write_whole
    from ..runtime.stage_cache import StageCache
    from . import ablation as study
    from .classifier import Classifier
    from .finetune import Settings

    try:
        judge = Classifier.load(reader)
    except FileNotFoundError as error:
        raise click.ClickException(str(error)) from error
    if write is not None:
        study.replace_table(write, [])  # before minutes of work, not after
    settings = Settings(
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        save_every=steps,
        sample_every=0,
        gradient_checkpointing=False,
    )
    done = study.run(
        work, model, lambda name: Editor.load(name, [], cache=StageCache(memory=0)), judge, settings,
        wordnet=wordnet, pictures=pictures, count=count, seed=seed, tell=Lines(), say=click.echo,
    )  # fmt: skip
    write_whole(work / "ablation.md", (study.table(done) + "\n").encode())
    click.echo(study.table(done))
    if write is not None:
        write_whole(write, study.replace_table(write, done).encode())
