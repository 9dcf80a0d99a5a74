"""Command `iedit export tensorrt`; the group attaches it."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("tensorrt")
@click.argument("model", default="picturebook")
@click.option("--layouts", default=None, help="ControlNets, comma-separated. Default: each that the model has, alone.")
@click.option("--sizes", default="512x512", show_default=True,
              help="WIDTHxHEIGHT in pixels, comma-separated, one profile each; a side may be MIN-OPT-MAX.")  # fmt: skip
@click.option("--batch", default="1-2-8", show_default=True, help="Samples in a call, a number or MIN-OPT-MAX; guidance doubles them.")  # fmt: skip
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp16", show_default=True,
              help="What the ONNX graph computes in.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=None,
              help="Folder of the engines. Default: the user's cache, where `iedit edit` looks.")  # fmt: skip
@click.option("--refit", is_flag=True, help="Weights can be exchanged later; costs some speed.")
@click.option("--timing-cache", type=click.Path(path_type=Path, dir_okay=False), default=None,
              help="File of tactic timings, read and written: makes a second build fast.")  # fmt: skip
@click.option("--force", is_flag=True, help="Build anew even what is there.")
def tensorrt(
    model: str,
    layouts: str | None,
    sizes: str,
    batch: str,
    precision: str,
    out: Path | None,
    refit: bool,
    timing_cache: Path | None,
    force: bool,
) -> None:
    """Build TensorRT engines of MODEL for this machine's GPU, from ONNX graphs that are exported where they are missing."""
    from ..runtime.backends import check_backend
    from .shapes import parse_shapes

    parse_shapes(sizes, batch, 1)  # what is mistyped is said before anything heavy
    check_backend("tensorrt")

    from ..runtime.backends.engine_spec import engines_folder
    from ..runtime.model.model import load_model

    loaded = load_model(model)
    shapes = parse_shapes(sizes, batch, loaded.multiple)
    folder = engines_folder(loaded.weights_digest) if out is None else out
    names = [n.strip() for n in layouts.split(",") if n.strip()] if layouts else None
    from .tensorrt import build_all

    for spec in build_all(loaded, folder, shapes, names, precision, refit=refit, timing_cache=timing_cache, force=force,
                          tell=click.echo):  # fmt: skip
        click.echo(f"{spec.module}: {spec}")
