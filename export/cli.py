"""Commands `iedit export` and `iedit engines`. Heavy packages are imported inside the commands."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from ..runtime.cli.help import show
from ..runtime.errors import RunError, UsageError
from ..runtime.files import printable

_OUT_HELP = "Folder of the engines. Default: the user's cache, where `iedit edit` looks."
_out = click.option("--out", "--engines", "out", type=click.Path(path_type=Path, file_okay=False), default=None,
                    help=_OUT_HELP)  # fmt: skip
_device = click.option("--device", default=None, help="cpu, cuda, cuda:1. Default: the GPU if there is one.")


def _sizes(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[tuple[int, int]]:
    sizes = []
    for value in values:
        width, sign, height = value.lower().partition("x")
        if not (sign and width.isdigit() and height.isdigit()):
            raise click.BadParameter(f"{value!r}: expected WIDTHxHEIGHT in pixels, for example 512x512")
        sizes.append((int(width), int(height)))
    return sizes


def _names(given: str | None) -> list[str] | None:
    """pose,scribble; "none" is no layouts, None is not given."""
    if given is None:
        return None
    return [] if given == "none" else [n.strip() for n in given.split(",") if n.strip()]


@contextlib.contextmanager
def _line(what: str) -> Iterator[Callable[[str], None]]:
    """One live line on stderr; plain lines where stderr is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: click.echo(text, err=True)
        return
    with console.status(what) as status:
        yield lambda text: status.update(text)


@click.group()
def export() -> None:
    """Write a model's networks as engines that run faster than eager torch, and check that they say the same.

    \b
    iedit export onnx picturebook       graphs for ONNX Runtime, 1-2 minutes for the embedded model
    iedit export verify picturebook     the parity gate
    iedit edit photo.png ...            --backend auto finds them; `iedit engines list` shows them
    """


@export.command()
@click.argument("model", default="picturebook")
@click.option("--layouts", default=None, metavar="NAMES",
              help="ControlNets to fuse with the UNet, by comma: pose,scribble makes an engine of each and one of both. "
                   "Default: one of each that the model has; none for the plain UNet only.")  # fmt: skip
@click.option("--module", "modules", multiple=True, metavar="NAME",
              help="Only this module, in place of all that an edit needs: unet, unet+pose, vae_encoder, vae_decoder, "
                   "text_encoder, control-embedding-NAME or controlnet-NAME. Repeat for more.")  # fmt: skip
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True,
              help="fp16 and bf16 keep norms and softmax in float32; for GPUs.")  # fmt: skip
@click.option("--opset", type=click.Choice(["22", "23"]), default="23", show_default=True,
              help="23 has an Attention operator; 22 is for TensorRT before 10.14.")  # fmt: skip
@click.option("--sizes", multiple=True, callback=_sizes, metavar="WxH",
              help="Best size, recorded for building TensorRT engines; an ONNX graph takes any. Repeat for more.")  # fmt: skip
@click.option("--batch", type=click.IntRange(1), default=2, show_default=True, help="Best batch, recorded likewise.")
@click.option("--force", is_flag=True, help="Export anew even what is there and valid.")
@_out
@_device
def onnx(model: str, layouts: str | None, modules: tuple[str, ...], precision: str, opset: str,
         sizes: list[tuple[int, int]], batch: int, force: bool, out: Path | None, device: str | None) -> None:  # fmt: skip
    """Export MODEL's networks to ONNX: the embedded model, a diffusers folder or a hub id.

    \b
    Text edits only        iedit export onnx picturebook --layouts none
    Pose and scribble,
    alone and together     iedit export onnx picturebook --layouts pose,scribble
    For another machine    iedit export onnx MODEL --out FOLDER, copy it, then name it there with --engines

    One graph takes every batch, size and text length. What was exported before and is whole is kept. A build that is
    stopped leaves nothing that counts as an engine.
    """
    from .onnx import ExportProgress, check_export, default_shapes, export_onnx

    check_export(precision, int(opset))
    from ..runtime.backends.engine_spec import engines_folder
    from ..runtime.model.model import load_model

    with _line(f"loading {model}") as tell:
        loaded = load_model(model, device=device, dtype="float32")
        target = engines_folder(loaded.weights_digest) if out is None else out

        def report(step: ExportProgress) -> None:
            if step.done or step.text.startswith("warning"):
                click.echo(f"{step.module}: {step.text}, {step.seconds:.1f} s", err=True)
            else:
                tell(f"{step.module}: {step.text}")

        shapes = [default_shapes(loaded, size, batch) for size in sizes] or [default_shapes(loaded, None, batch)]
        specs = export_onnx(loaded, target, _names(layouts), precision, int(opset), report,
                            modules=modules or None, shapes=shapes, force=force)  # fmt: skip
    click.echo(f"{target}: {len(specs)} engines; check them with `iedit export verify {model}`")


@export.command()
@click.argument("model", default="picturebook")
@click.option("--layouts", default=None, help="ControlNets, comma-separated. Default: each that the model has, alone.")
@click.option("--sizes", default=None,
              help="WIDTHxHEIGHT in pixels, comma-separated, one profile each; a side may be MIN-OPT-MAX. Default: what MODEL was trained "
                   "on, 512x512 for Stable Diffusion 1.5.")  # fmt: skip
@click.option("--batch", default=None, help="Samples in a call, a number or MIN-OPT-MAX; a larger batch is run in several calls. Default: what an edit at "
              "these sizes puts into one call, 1-2-4 at 512x512 of Stable Diffusion 1.5, 1-2-20 for the embedded model.")  # fmt: skip
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp16", show_default=True,
              help="What the ONNX graph computes in.")  # fmt: skip
@click.option("--opset", type=click.Choice(["22", "23"]), default=None,
              help="Of the ONNX graph. Default: 23, which has an Attention operator, from TensorRT 10.14 on; 22 before.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=None, help=_OUT_HELP)
@click.option("--workspace", type=click.FloatRange(0, 1024, min_open=True), default=None, metavar="GIB",
              help="Most scratch memory of a layer while building. Default: all that the GPU has.")  # fmt: skip
@click.option("--timing-cache", type=click.Path(path_type=Path, dir_okay=False), default=None,
              help="File of tactic timings, read and written: makes a second build fast.")  # fmt: skip
@click.option("--force", is_flag=True, help="Build anew even what is there.")
def tensorrt(
    model: str,
    layouts: str | None,
    sizes: str | None,
    batch: str | None,
    precision: str,
    opset: str | None,
    out: Path | None,
    workspace: float | None,
    timing_cache: Path | None,
    force: bool,
) -> None:
    """Build TensorRT engines of MODEL for this machine's GPU, from ONNX graphs that are exported where they are missing.

    \b
    For MODEL's own size        iedit export tensorrt MODEL
    For two more                iedit export tensorrt MODEL --sizes 512x512,768x512,512-512-1024x512
    What they cost and gain     iedit profile photo.png --prompt "..." --model MODEL --backend tensorrt

    Ctrl-C stops a build at TensorRT's next step, and leaves what was there before.
    """
    from ..runtime.backends import check_backend
    from .shapes import parse_shapes

    parse_shapes(sizes or "8x8", batch or "1", 1)  # what is mistyped is said before anything heavy
    check_backend("tensorrt")

    from ..runtime.backends.engine_spec import engines_folder
    from ..runtime.model.model import load_model

    loaded = load_model(model)
    if sizes is None and loaded.side is None:
        raise UsageError(
            "sizes: the model's config does not say what it was trained on; give --sizes, for example 512x512"
        )
    from .tensorrt import build_all, default_batch

    sizes = sizes or f"{loaded.side}x{loaded.side}"
    smallest = min(parse_shapes(sizes, "1", loaded.multiple), key=lambda s: s.height[1] * s.width[1])
    shapes = parse_shapes(sizes, batch or default_batch(loaded, smallest.height[1], smallest.width[1]), loaded.multiple)
    folder = engines_folder(loaded.weights_digest) if out is None else out
    for spec in build_all(loaded, folder, shapes, _names(layouts), precision, opset=None if opset is None else int(opset), timing_cache=timing_cache,
                          workspace=None if workspace is None else int(workspace * 2**30), force=force, tell=click.echo):  # fmt: skip
        click.echo(f"{spec.module}: {spec}")


@export.command()
@click.argument("model", default="picturebook")
@click.option(
    "--backend", type=click.Choice(["onnx", "tensorrt"]), default="onnx", show_default=True, help="Whose engines."
)
@click.option("--edits", type=click.IntRange(0), default=4, show_default=True, help="Sample edits to run in full.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@_out
@_device
def verify(model: str, backend: str, edits: int, as_json: bool, out: Path | None, device: str | None) -> None:
    """Compare MODEL's engines with float32 eager torch: every module, then whole edits.

    Exits with 1 if a limit is missed, and marks nothing then. Those that pass are marked as checked; report.json beside
    each engine has the figures and the limits.
    """
    from ..runtime.backends import check_backend

    check_backend(backend)
    from ..runtime.backends.engine_spec import engines_folder
    from ..runtime.model.model import load_model
    from .verify import verify_engines

    with _line(f"loading {model}") as tell:
        loaded = load_model(model, device=device, dtype="float32")
        folder = engines_folder(loaded.weights_digest) if out is None else out
        reports = verify_engines(loaded, folder, backend, edits, tell)
    if as_json:
        click.echo(json.dumps(reports, indent=1))
    else:
        _show(reports)
    failures = [f"{precision} {f}" for precision, report in reports.items() for f in report["failures"]]
    if failures:
        raise RunError(f"verify: {'; '.join(failures)}")


def _show(reports: dict[str, dict[str, Any]]) -> None:
    from rich.table import Table

    for precision, report in reports.items():
        table = Table(
            "module", "batch", "size", "largest error", "mean error", title=f"{precision} against float32 eager"
        )
        for r in report["modules"]:
            figures = (r["skipped"], "") if "skipped" in r else (f"{r['largest']:.1e}", f"{r['mean']:.1e}")
            table.add_row(r["module"], str(r["batch"]), r["size"], *figures)
        show(table)
        if report["edits"]:
            table = Table(
                "edit", "mask IoU", "latent error", "L1 inside", "L1 outside", "largest, of 255", "seconds (torch)"
            )
            for r in report["edits"]:
                table.add_row(r["edit"], f"{r['iou']:.3f}", f"{r['latent']:.1e}", f"{r['l1_inside']:.5f}",
                              f"{r['l1_outside']:.5f}", str(r["levels"]), f"{r['seconds']:.1f} ({r['seconds_torch']:.1f})")  # fmt: skip
            show(table)


# --- engines ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EngineFolder:
    """A folder that is, or was to be, an engine.

    Attributes:
        problems: why it cannot be used; empty if nothing is known against it.
    """

    folder: Path
    spec: Any
    problems: tuple[str, ...]

    def __str__(self) -> str:
        """What it is and where."""
        what = "what a stopped build left" if self.folder.name.startswith(".") else "an engine of another version"
        return f"{printable(str(self.spec or what))}, {self.size / 1e6:.1f} MB, in {printable(str(self.folder))}"

    @property
    def size(self) -> int:
        total = 0
        for path in self.folder.glob("*"):
            with contextlib.suppress(OSError):  # it may go away meanwhile
                total += path.stat().st_size if path.is_file() else 0
        return total


def find_all(folder: Path, model: str | None = None, digests: bool = True) -> list[EngineFolder]:
    """Every engine under a folder, and what builds that were stopped left there: folders with a spec or a build marker of
    this project. Nothing else is looked at, whatever it holds.

    Args:
        model: engines of other weights are problems too.
        digests: compare files with their digests, which reads all of them.
    """
    from ..runtime.backends.engine_spec import damaged, find_builds, find_engines, own_files
    from ..runtime.model.model import module_digest, read_digests

    parts = read_digests(model).parts if model else {}
    folders = []
    for where, spec in find_engines(folder):
        if isinstance(spec, UsageError):
            if own_files(where) is not None:  # else it is somebody else's engine.json
                folders.append(EngineFolder(where, None, (str(spec),)))
            continue
        why = damaged(where, spec) if digests else []
        if model:
            try:
                why += spec.differs(weights=module_digest(parts, spec.module))
            except KeyError as error:
                why.append(f"module: {spec.module} needs {error.args[0]}, which {model} does not have")
        folders.append(EngineFolder(where, spec, tuple(why)))
    return folders + [EngineFolder(where, None, ("a build that was stopped",)) for where in find_builds(folder)]


def _cache() -> Path:
    from ..runtime.backends.engine_spec import engines_folder

    return engines_folder("any").parent


@click.group()
def engines() -> None:
    """List, check and clean up engines. They lie in the user's cache unless --engines names another folder."""


_folder = click.option("--engines", "folder", type=click.Path(path_type=Path, file_okay=False), default=None,
                       help="Folder to look in. Default: the cache with the engines of every model.")  # fmt: skip


@engines.command("list")
@_folder
@click.option("--json", "as_json", is_flag=True, help="Print the specs as JSON.")
def list_command(folder: Path | None, as_json: bool) -> None:
    """What engines there are, what they were built for, and whether they were checked. Files are not read."""
    where = folder or _cache()
    folders = find_all(where, digests=False)
    if as_json:
        rows = [{"folder": str(f.folder), "bytes": f.size, "problems": f.problems,
                 "spec": None if f.spec is None else dataclasses.asdict(f.spec)} for f in folders]  # fmt: skip
        click.echo(json.dumps(rows, indent=1))
        return
    if not folders:
        click.echo(f"{where}: no engines; make some with `iedit export onnx MODEL`")
        return
    _table(folders, "checked")


def _table(folders: list[EngineFolder], last: str) -> None:
    from rich.markup import escape
    from rich.table import Table

    def shown(text: str) -> str:
        return escape(printable(text))

    table = Table("model", "engine", "opset", "MB", last)
    for f in folders:
        if f.spec is None:
            table.add_row("", shown(str(f.folder)), "", f"{f.size / 1e6:.1f}", shown("; ".join(f.problems)))
            continue
        largest = f.spec.checked.get("largest")
        checked = f"error {largest:.0e}" if isinstance(largest, float) else "no"
        state = "; ".join(f.problems) or (checked if last == "checked" else "whole")
        table.add_row(
            shown(Path(f.spec.model).name), shown(str(f.spec)), str(f.spec.opset), f"{f.size / 1e6:.1f}", shown(state)
        )
    show(table)


@engines.command("verify")
@click.option("--model", default=None, help="Also check that they are of this model's weights.")
@_folder
def verify_command(model: str | None, folder: Path | None) -> None:
    """Compare every file with the digest in its spec. Exits with 1 if one is damaged. (Parity: `iedit export verify`.)"""
    where = folder or _cache()
    folders = find_all(where, model)
    if not folders:
        click.echo(f"{where}: no engines")
        return
    _table(folders, "state")
    bad = [f for f in folders if f.problems]
    if bad:
        click.echo(f"{len(bad)} of {len(folders)} cannot be used; `iedit engines prune` removes them", err=True)
        sys.exit(1)


@engines.command()
@click.option(
    "--model", default=None, help="Keep only engines of this model's weights; those of others are removed too."
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_folder
def prune(model: str | None, dry_run: bool, yes: bool, folder: Path | None) -> None:
    """Remove engines that are damaged, of another version, or of builds that were stopped.

    Only folders with a spec (engine.json) or a build marker that iedit wrote are looked at, and of an engine only the
    files that its spec names are removed.
    """
    from ..runtime.backends.engine_spec import build_lock

    where = folder or _cache()
    bad = [f for f in find_all(where, model) if f.problems]
    if not bad:
        click.echo(f"{where}: nothing to remove")
        return
    for f in bad:
        click.echo(f"{f}: {printable('; '.join(f.problems))}")
    if dry_run:
        return
    if not yes:
        click.confirm(f"remove these {len(bad)}?", abort=True)
    removed = 0
    for f in bad:
        if f.folder.resolve() != where.resolve() / f.folder.relative_to(where):
            click.echo(f"{printable(str(f.folder))}: is behind a link, left there", err=True)
            continue
        # `.MODULE.xxxx.building` is locked as MODULE, as the build itself would be.
        name = f.folder.name[1:].rsplit(".", 2)[0] if f.folder.name.startswith(".") else f.folder.name
        try:
            with build_lock(f.folder.with_name(name), timeout=0.0):
                left = _remove(f)
        except RunError:
            click.echo(f"{printable(str(f.folder))}: is being built now, left alone", err=True)
            continue
        removed += not left
        if left:
            click.echo(f"{printable(str(f.folder))}: {left}, left there", err=True)
        else:
            click.echo(f"removed {f}")
    click.echo(f"removed {removed} of {len(bad)}")


def _remove(engine: EngineFolder) -> str:
    """Remove what an engine consists of, and its folder; what else is in it stays. Returns what is left, in words."""
    from ..runtime.backends.engine_spec import is_build, own_files

    if is_build(engine.folder):  # made for the build, and nobody else's
        shutil.rmtree(engine.folder, ignore_errors=True)
    else:
        for path in own_files(engine.folder) or ():
            if path.is_file() or path.is_symlink():
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            engine.folder.rmdir()
    left = sorted(p.name for p in engine.folder.iterdir()) if engine.folder.is_dir() else []
    return "" if not left else f"{printable(', '.join(left[:3]))} is not of an engine"
