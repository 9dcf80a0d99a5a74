"""The commands that describe: where the time of an edit goes (`profile`), what is here (`info`), the sample edits (`demo`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .. import VERSION, machine
from ..files import check_outputs, printable, write_outputs
from . import params
from .help import Grouped, show
from .live import live_progress, quiet_libraries, show_notes


@click.command("profile", cls=Grouped)
@click.argument("image", type=params.FilePath())
@params.request_options
@params.speed_options
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True,
              help="Edits; the first is cold, the last is shown. Nothing is kept between them.")  # fmt: skip
@click.option("--output", type=params.FilePath(), default=None, help="Write all figures of the last run as JSON.")
@click.option(
    "--trace", type=params.FilePath(), default=None, help="Write a trace for chrome://tracing or ui.perfetto.dev."
)
@click.option("--plot", type=params.FilePath(), default=None, help="Write the timeline of the last run as a PNG.")
@click.option(
    "--launches", is_flag=True, help="One more run under torch's profiler: kernel launches, or operators on a CPU."
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@params.overwrite_option
@params.model_options
def profile_command(image: str, runs: int, output: str | None, trace: str | None, plot: str | None, launches: bool,
                    as_json: bool, overwrite: bool, **values: Any) -> None:  # fmt: skip
    """Where the time of an edit goes: by stage, step and module.

    Cold and warm apart, what ran each module, and why nothing faster did.

    \b
    iedit profile in.png --source-prompt "a red car ..." --prompt "a blue car ..." --plot time.png
    iedit profile in.png --prompt "..." --backend onnx --trace time.json     open it in ui.perfetto.dev
    """
    from ..images import png_bytes

    params.check_given(values)
    named = [Path(p) for p in (output, trace) if p]
    check_outputs([Path(plot)] if plot else [], named, params.files_read(image, values), overwrite)
    inputs = params.read_inputs(image, values)
    with live_progress(values["model"]) as tell:
        request = params.make_request(inputs, values, values["seed"])
        editor = params.load_editor(values, inputs)
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
    threads = params.use_threads()
    figures = last.as_dict() | {"runs": totals, "launches": counted, "backend": editor.backend, "first_is_cold": True}
    figures |= {"threads": threads.threads, "why_threads": threads.why}
    outputs = {}
    if output:
        outputs[Path(output)] = (json.dumps(figures, indent=1) + "\n").encode()
    if trace:
        outputs[Path(trace)] = json.dumps(report.trace(last)).encode()
    if plot:
        outputs[Path(plot)] = png_bytes(report.plot(last))
    write_outputs(outputs)
    if as_json:
        click.echo(json.dumps(figures, indent=1))
        return
    for table in report.tables(last, counted):
        show(table)
    for command in dict.fromkeys(last.unverified.values()):
        names = ", ".join(name for name, how in last.unverified.items() if how == command)
        click.echo(f"not compared with eager torch: {printable(names)} (`{printable(command)}`)")
    cold, warm = totals[0], totals[1:]
    shown = f", then {', '.join(f'{t:.3f}' for t in warm)}" if warm else ""
    click.echo(f"threads: {threads}")
    click.echo(f"backend {editor.backend}; first run {cold:.3f} s (cold){shown}")
    show_notes(notes)


@click.command()
@click.option("--model", default="picturebook", show_default=True, help="The model to describe.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def info(model: str, as_json: bool) -> None:
    """Versions, devices, what can run here and why not, and what a model holds."""
    quiet_libraries()
    import torch

    from ..backends import reasons
    from ..backends.engine_spec import describe_engines
    from ..model.model import describe, read_digests
    from ..receipt import versions

    described = describe(model)
    if "problem" not in described:
        described["engines"] = describe_engines(read_digests(model).weights)
    chosen = params.use_threads()
    facts: dict[str, Any] = {
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
        click.echo(json.dumps(facts, indent=1))
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("iedit", VERSION)
    table.add_row("versions", ", ".join(f"{k} {v}" for k, v in facts["versions"].items()))
    table.add_row("devices", ", ".join(facts["devices"]))
    table.add_row("threads", str(chosen))
    table.add_row("processor", facts["processor"])
    if facts["no_gpu"]:
        table.add_row("", f"no GPU: {facts['no_gpu']}")
    for name, why in facts["backends"].items():
        table.add_row(f"backend {name}", "can run" if not why else escape(printable("cannot run: " + "; ".join(why))))
    for key, value in facts["model"].items():
        table.add_row(f"model {key}", escape(printable(str(value))))
    show(table)


def _why_no_gpu() -> str:
    """The reason, or nothing if there is one."""
    import torch

    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "torch sees no device; check the driver and CUDA_VISIBLE_DEVICES"


@click.command()
@click.option("--output", type=params.FilePath(), default=None,
              help="The contact sheet. Default: demo/edits.png, which every demo writes anew.")  # fmt: skip
@params.overwrite_option
def demo(output: str | None, overwrite: bool) -> None:
    """Run the shipped sample edits with the embedded model and write one contact sheet."""
    sheet = Path(output or "demo/edits.png")
    with live_progress("picturebook") as tell:
        quiet_libraries()
        from .demo import run_demo

        params.use_threads()
        figures = run_demo(sheet, tell, overwrite or output is None)
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
