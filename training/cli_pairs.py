"""The commands `iedit train renders` and `iedit train pairs`: a corpus of the picture-book world, and iEdit's training pairs of any corpus."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from ..runtime.cli.params import Between, FilePath
from ..runtime.errors import UsageError
from ..runtime.files import printable

SHEET = "sheet.png"
_STAGES = {"read": "reading", "index": "indexing", "pair": "pairing"}


@contextlib.contextmanager
def _progress(unit: str, first: str = "") -> Iterator[Callable[[str, float, int], None]]:
    """A bar on stderr for each stage, with the time left; where stderr is no terminal, a line when one begins.

    Args:
        first: what is done before the first stage.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    shown: dict[str, TaskID] = {}
    columns = (TextColumn("{task.description:<9}"), BarColumn(), TextColumn("{task.fields[of]}"), TimeRemainingColumn())
    if first and not console.is_terminal:
        click.echo(first, err=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        loading = bar.add_task(first, total=None, of="", visible=bool(first))

        def tell(stage: str, done: float, of: int) -> None:
            bar.update(loading, visible=False)
            if stage not in shown:
                shown[stage] = bar.add_task(_STAGES.get(stage, stage), total=of, of="")
                if not console.is_terminal:
                    click.echo(f"{_STAGES.get(stage, stage)}: {of} {unit}, {math.floor(done)} done before", err=True)
            bar.update(shown[stage], completed=done, of=f"{math.floor(done)}/{of} {unit}")

        yield tell


@click.command()
@click.option("--out", required=True, type=FilePath(file_okay=False), help="Folder of the corpus; it is made.")
@click.option("--n", "count", type=click.IntRange(1), default=2000, show_default=True, help="Renders.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the scenes; none of them is a held-out one.")
def renders(out: str, count: int, seed: int) -> None:
    """Draw a corpus of the picture-book world: renders with captions and exact masks, in webdataset tars.

    `iedit train pairs OUT --clip picturebook --masks own --size 128 ...` makes pairs of it. OUT/truth.json holds the
    scenes; nothing but a judge of the pairs needs it.
    """
    from . import demo_corpus

    with _progress("renders") as tell:
        tell("drawing", 0, count)
        demo_corpus.write_renders(Path(out), count, seed, lambda done, of: tell("drawing", done, of))
    click.echo(f"{printable(out)}: {count} renders")


@click.command()
@click.argument("corpus", type=FilePath())
@click.option(
    "--out",
    type=FilePath(file_okay=False),
    default=None,
    help="Folder of the pairs. A run that was stopped goes on there; without it only --show does something.",
)
@click.option(
    "--captions",
    default="own",
    show_default=True,
    metavar="own|CHECKPOINT",
    help="The corpus' own, or those of a captioning model: a folder or a hub id (Salesforce/blip-image-captioning-large).",
)
@click.option(
    "--clip",
    default="openai/clip-vit-large-patch14",
    show_default=True,
    metavar="CHECKPOINT",
    help="CLIPModel that finds the pseudo-targets: a folder, a hub id, or picturebook (the embedded one, for renders).",
)
@click.option(
    "--masks",
    default="CIDAS/clipseg-rd64-refined",
    show_default=True,
    metavar="own|CHECKPOINT",
    help="CLIPSeg model, or own: the masks that the corpus brings as NAME.LABEL.mask.png.",
)
@click.option(
    "--wordnet",
    default="/usr/share/wordnet",
    show_default=True,
    type=FilePath(file_okay=False),
    help="Folder of WordNet 3.0's database files (apt-get install wordnet-base).",
)
@click.option(
    "--size",
    type=click.IntRange(64),
    default=384,
    show_default=True,
    help="Pixels of the square that pictures are cut to, a multiple of 8; smaller pictures are skipped.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the edit prompts.")
@click.option(
    "--duplicate",
    type=Between(-1, 2),
    default=0.95,
    show_default=True,
    help="A picture whose cosine with the source is as high is a near-duplicate and no pseudo-target.",
)
@click.option(
    "--candidates",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Neighbours to try, the nearest first, for one in which the new word is seen; the paper tries 1.",
)
@click.option("--mask-threshold", type=Between(0, 1), default=0.5, show_default=True, help="Of CLIPSeg's masks.")
@click.option(
    "--flat-below",
    type=click.IntRange(0),
    default=50_000,
    show_default=True,
    metavar="N",
    help="Search exactly among fewer pictures than this, by IVF-PQ among more (its recall is measured).",
)
@click.option(
    "--shard",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    help="Pictures in a shard, where the corpus is not in tars; at most one shard is lost when a run is killed.",
)
@click.option(
    "--batch", type=click.IntRange(1), default=32, show_default=True, help="Pictures in one call of a network."
)
@click.option(
    "--ray",
    is_flag=False,
    flag_value="local",
    default=None,
    metavar="[ADDRESS]",
    help="Run the shards on Ray: on all cores of this machine, or on the cluster at ADDRESS (auto: the one here).",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="CPU threads of each process. Another number rounds differently, so that bytes may differ.",
)
@click.option("--device", default=None, help="Of the networks: cpu, cuda, cuda:1. Default: the GPU if there is one.")
@click.option(
    "--show",
    type=click.IntRange(1),
    default=None,
    metavar="N",
    help="Also a sheet of N pairs, OUT/sheet.png; CORPUS may be a finished folder of pairs then.",
)
def pairs(corpus: str, out: str | None, show: int | None, ray: str | None, device: str | None, **values: Any) -> None:
    """Build iEdit's training pairs from CORPUS, a set of captioned pictures.

    CORPUS is a folder of pictures with a .txt beside each, or one CSV for all; Parquet files; or tars as img2dataset
    writes them. For each picture one noun or adjective of its caption is replaced (WordNet), the picture nearest to
    both the source and the edited caption becomes the pseudo-target (CLIP, FAISS), and what was replaced and what
    replaced it are segmented (CLIPSeg).

    \b
    Photographs   iedit train pairs laion/ --out pairs/ --captions Salesforce/blip-image-captioning-large
    Renders       iedit train renders --out renders/ && iedit train pairs renders/ --out pairs/ \\
                      --clip picturebook --masks own --size 128
    Look at them  iedit train pairs pairs/ --show 12

    Pictures that cannot be used are skipped, counted, and listed with their reasons in OUT/skipped.csv. A run that was
    stopped goes on with the same command, and nothing that was finished is done again. On a cluster CORPUS, OUT and the
    models have to be at the same place on every machine.
    """
    from .pairs import MANIFEST

    finished = (Path(corpus) / MANIFEST).is_file()
    if finished and out is None:
        if show is None:
            raise UsageError(f"{corpus}: holds finished pairs; --show N writes a sheet of them")
        _show(Path(corpus), show)
        return
    if out is None:
        raise UsageError("--out is missing: name the folder that the pairs go to")
    from . import build_pairs

    try:
        with _progress("shards", "loading") as tell:
            if device is None:
                import torch

                device = "cuda" if torch.cuda.is_available() else "cpu"
            settings = build_pairs.Settings(corpus=corpus, out=out, device=device, **values)
            manifest = build_pairs.build(settings, ray, tell)
    except KeyboardInterrupt:
        click.echo("stopped; the same command goes on from the last finished shard", err=True)
        raise click.Abort from None
    click.echo(
        f"{printable(out)}: {manifest.pairs} pairs of {manifest.samples} pictures in {len(manifest.shards)} shards"
    )
    if manifest.index.get("recall") is not None:
        click.echo(f"the IVF-PQ index finds {manifest.index['recall']:.1%} of the pseudo-targets of an exact search")
    for reason, count in sorted(manifest.skipped.items(), key=lambda item: -item[1]):
        click.echo(f"skipped {count}: {printable(reason)}")
    if show is not None:
        _show(Path(out), show)


def _show(folder: Path, count: int) -> None:
    from ..runtime.images import write_png
    from .pairs import contact_sheet_of, read_pairs

    path = folder / SHEET
    write_png(path, contact_sheet_of(read_pairs(folder, verify=False), count))
    click.echo(printable(str(path)))
