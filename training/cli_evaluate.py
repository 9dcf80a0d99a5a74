"""The commands of `iedit evaluate`: editing methods on held-out edits of the picture-book world, PIE-Bench, ImageNet and image-prompt pairs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from ..runtime import BACKENDS, METHODS
from ..runtime.cli.help import Choice, show
from ..runtime.cli.live import prompt_interrupts, time_left
from ..runtime.cli.params import FilePath, pairs, together
from ..runtime.errors import UsageError
from ..runtime.files import printable
from ..runtime.presets import PRESETS

WORK = Path("build/embed")
_EVERY = 30.0  # seconds between two lines of progress where stderr is no terminal


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """How many are done and the time left: a live line on stderr, or a line every half minute where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    began, first, last = time.monotonic(), None, 0.0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with (
        prompt_interrupts(),
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task(what, total=None, left="")
        if not console.is_terminal:
            click.echo(f"{what}: beginning", err=True)

        def tell(done: int, of: int) -> None:
            nonlocal first, last
            first = done if first is None else first
            spent = time.monotonic() - began
            left = time_left(spent * (of - done) / (done - first)) if done > first else ""
            bar.update(task, completed=done, total=of, left=left)
            if not console.is_terminal and (spent > last + _EVERY or done == of):
                last = spent
                click.echo(
                    f"{what}: {done}/{of}{', ' if left and done < of else ''}{left if done < of else ''}", err=True
                )

        yield tell


# --- options ------------------------------------------------------------------------------------------------------

_common = together([
    click.option("--method", "methods", multiple=True, type=Choice(METHODS), help="How to edit; repeat for several. Default: ito, diffedit, sdedit."),
    click.option("--preset", "presets", multiple=True, type=Choice(list(PRESETS)), help="Presets that ITO is evaluated with; repeat for several. Default: what the checkpoint recommends."),
    click.option("--pictures", multiple=True, callback=pairs, metavar="NAME=FOLDER",
                 help="Edits that were made elsewhere, under their cases' names: measured beside the methods, as NAME. Repeat for several."),
    click.option("--n", "count", type=click.IntRange(1), default=None, help="The first so many cases. Default: all."),
    click.option("--given-masks", is_flag=True, help="Give the benchmark's masks to the methods that use one; by default they find their own."),
])  # fmt: skip
_run = together([
    click.option("--model", default="picturebook", show_default=True, help="The embedded model, a diffusers folder, or a hub id (owner/name)."),
    click.option("--backend", default="auto", show_default=True, type=Choice(("auto", *BACKENDS)), help="What runs the networks."),
    click.option("--engines", type=FilePath(file_okay=False), default=None, help="Folder of exported engines. Default: the user's cache."),
    click.option("--device", default=None, help="cpu, cuda, cuda:1. Default: the GPU if there is one."),
    click.option("--steps", type=click.IntRange(1, 1000), default=None, help="Sampling steps. Default: each method's own."),
    click.option("--seed", type=int, default=0, show_default=True, help="Case i is edited with the noise of seed + i."),
    click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Edits per call; what a kill loses at most."),
    click.option("--processes", type=click.IntRange(1), default=1, show_default=True, help="Edit and measure in so many processes, each with its own model."),
])  # fmt: skip
_judges = together([
    click.option("--clip", default=None, metavar="CHECKPOINT", help="CLIPModel of CLIPScore and CLIP similarity: a folder, a hub id, or picturebook "
                 "(the embedded one, for renders). Default: picturebook with the embedded model, else openai/clip-vit-large-patch14; none leaves it out."),
    click.option("--lpips", default="", metavar="FILE", help="AlexNet, VGG-16 or SqueezeNet 1.1 with torchvision's names of weights, for LPIPS."),
    click.option("--structure", default="", metavar="CHECKPOINT", help="ViTModel of the structure distance, such as facebook/dino-vitb8."),
    click.option("--structure-range", type=Choice(["1", "255"]), default="1", show_default=True,
                 help="Brightest value that the ViT sees before normalisation: 1 as it was trained, 255 as PIE-Bench's published program does."),
    click.option("--classifier", "classes", default="", metavar="CHECKPOINT", help="Image classifier of the accuracy as new and as original class."),
    click.option("--pickscore", default="", metavar="CHECKPOINT", help="CLIPModel of PickScore, such as yuvalkirstain/PickScore_v1."),
    click.option("--features", default="", metavar="FILE|CHECKPOINT", help="For FID and CSFID: Inception's TorchScript (inception-2015-12-05.pt), or a "
                 "CLIPModel as of --clip."),
    click.option("--singular-fid", is_flag=True, help="FID although there are no more pictures than features: comparable at equal numbers only."),
])  # fmt: skip


def _size(default: int | None) -> Callable[[Any], Any]:
    more = "" if default else " Default: the pictures as they are."
    return click.option("--size", type=click.IntRange(8), default=default, show_default=default is not None,
                        help=f"Edit the middle square at so many pixels.{more}")  # fmt: skip


def _output(default: str) -> Callable[[Any], Any]:
    return click.option("--output", type=FilePath(path_type=Path, file_okay=False), default=Path(default), show_default=True,
                        help="Folder of cases.csv, results.json, the pictures and the sheets; the same command goes on there.")  # fmt: skip


def _methods(values: dict[str, Any], default: Sequence[str] = ("ito", "diffedit", "sdedit")) -> list[Any]:
    from .evaluate import Method

    named = values["methods"] or (() if values.get("pictures") else default)
    presets = values["presets"] or ("",)
    layouts = [m for m in named if m.startswith("controlnet")]
    if layouts:
        raise UsageError(
            f"method {layouts[0]}: needs layouts, which the cases do not have; `iedit evaluate truth` measures it"
        )
    if values["presets"] and "ito" not in named:
        raise UsageError("--preset: only ito has presets; add --method ito, or leave it out")
    found = [Method(m, p) for m in dict.fromkeys(named) for p in (dict.fromkeys(presets) if m == "ito" else ("",))]
    for name, folder in values.get("pictures", {}).items():
        if name in {m.name for m in found} or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise UsageError(
                f"--pictures: {printable(name)!r} is a method that is run, or holds more than letters, digits, '-', '_' and '.'"
            )
        if not Path(folder).is_dir():
            raise UsageError(f"--pictures: {folder} is not a folder")
        found.append(Method("", folder=folder, name=name))
    return found


def _judges_of(values: dict[str, Any]) -> Any:
    from .figures import Judges

    clip, device = values["clip"], values["device"]
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    if clip is None:
        clip = "picturebook" if values["model"] == "picturebook" else "openai/clip-vit-large-patch14"
    judges = Judges(
        "" if clip == "none" else clip, values["pickscore"], values["lpips"], values["structure"], values["classes"], values["features"],
        float(values["structure_range"]), device,
    )  # fmt: skip
    judges.digests()  # what is not there is said before anything runs
    return judges


def _settings_of(values: dict[str, Any]) -> Any:
    from .evaluate import Settings

    return Settings(
        values["model"], values["backend"], values["engines"], values["device"], values["seed"], values["steps"], values["batch"],
        values.get("given_masks", False), values["processes"], values["singular_fid"],
    )  # fmt: skip


def _evaluate(open_benchmark: Callable[[Callable[[int, int], None]], Any], values: dict[str, Any]) -> None:
    """What every benchmark's command does."""
    from ..runtime.cli.live import quiet_libraries
    from ..runtime.cli.params import use_threads

    methods, output = _methods(values), values["output"]
    quiet_libraries()
    from . import evaluate as machinery

    if values["processes"] == 1:
        use_threads()
    judges, settings = _judges_of(values), _settings_of(values)
    try:
        with progress("reading") as tell:
            benchmark = open_benchmark(tell)
        with progress("editing and measuring") as tell:
            rows = machinery.run(benchmark, methods, judges, settings, output, tell)
        machinery.with_preference(rows)
        summary, notes = machinery.summarise(rows), list[str]()
        if judges.features:
            with progress("features") as tell:
                notes = machinery.add_distances(
                    rows, summary, benchmark, methods, judges, output, settings.singular_fid, tell
                )
    except KeyboardInterrupt:
        click.echo("stopped; the same command goes on", err=True)
        raise click.Abort from None
    show(machinery.table(summary, benchmark.columns))
    for note in notes:
        click.echo(f"note: {printable(note)}", err=True)
    for path in machinery.write_results(output, benchmark, methods, judges, settings, rows, summary, notes):
        click.echo(printable(str(path)))


# --- commands -----------------------------------------------------------------------------------------------------


@click.group()
def evaluate() -> None:
    """Measure editing methods: accuracy, preservation and cost, with 95 % intervals.

    `truth` needs no data: it edits held-out scenes of the picture-book world, whose exact result can be drawn. `pie`, `imagenet` and `pairs` read
    folders of photographs that you point them at, with your checkpoint as --model, and measure with the networks that you name. `agreement` says
    how well such metrics agree with the truth.

    A run that was stopped goes on with the same command, and nothing is done twice. What the figures are: docs/evaluate.md.
    """


@evaluate.command()
@click.argument("folder", type=FilePath(path_type=Path, file_okay=False))
@_common
@_size(None)
@_run
@_judges
@_output("build/evaluate/pie")
def pie(folder: Path, **values: Any) -> None:
    """PIE-Bench: FOLDER holds mapping_file.json and annotation_images/.

    \b
    iedit evaluate pie PIE-Bench_v1/ --model stable-diffusion-v1-5/ --structure facebook/dino-vitb8 --lpips squeezenet1_1.pth

    Structure distance, PSNR, LPIPS, MSE and SSIM of what is to stay, CLIP similarity of the whole and of the edited part, as its published
    program computes them. A figure of each of its ten kinds of edits, too.
    """
    from . import benchmarks

    _evaluate(lambda tell: benchmarks.Pie(folder, values["count"], values["size"], tell), values)


@evaluate.command()
@click.argument("folder", type=FilePath(path_type=Path, file_okay=False))
@click.option("--queries", type=FilePath(path_type=Path, dir_okay=False), default=None,
              help="FlexIT's table of what is edited into what: a CSV with path, source, target, is_test.")  # fmt: skip
@click.option("--wordnet", type=FilePath(path_type=Path, file_okay=False), default=None,
              help="WordNet's database: each class is edited into its neighbours there, where there is no table.")  # fmt: skip
@click.option(
    "--per-class",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Pictures of each class, where there is no table.",
)
@click.option("--template", default="{}", show_default=True, help="The prompt, with the class in place of {}.")
@click.option("--real", "compared", type=FilePath(path_type=Path, file_okay=False), default=None,
              help="Real pictures in a folder for each class, for CSFID. Default: those of FOLDER.")  # fmt: skip
@_common
@_size(512)
@_run
@_judges
@_output("build/evaluate/imagenet")
def imagenet(
    folder: Path,
    queries: Path | None,
    wordnet: Path | None,
    per_class: int,
    template: str,
    compared: Path | None,
    **values: Any,
) -> None:
    """ImageNet by DiffEdit's protocol: FOLDER holds a folder of pictures for each class.

    \b
    iedit evaluate imagenet val/ --queries queries.csv --model stable-diffusion-v1-5/ --size 512 --classifier google/vit-base-patch16-224 \\
        --features inception-2015-12-05.pt --lpips alexnet.pth --pickscore yuvalkirstain/PickScore_v1

    Each picture is edited into a neighbouring class: L1 and LPIPS to the picture, CSFID to real pictures of the new class, accuracy as new and as
    original class among the benchmark's classes, and PickScore (ITO Table 1).
    """
    from . import benchmarks

    _evaluate(
        lambda tell: benchmarks.ImageNet(
            folder, values["count"], values["size"], queries, wordnet, per_class, template, compared, tell
        ),
        values,
    )


@evaluate.command("pairs")
@click.argument("folder", type=FilePath(path_type=Path, file_okay=False))
@click.option("--real", "compared", type=FilePath(path_type=Path, file_okay=False), default=None,
              help="Real pictures that FID compares with. Default: the sources.")  # fmt: skip
@_common
@_size(None)
@_run
@_judges
@_output("build/evaluate/pairs")
def pairs_command(folder: Path, compared: Path | None, **values: Any) -> None:
    """Image-prompt pairs with masks, as iEdit is evaluated on: FOLDER is of `iedit train pairs`, or holds pairs.csv (image, source_prompt, prompt,
    mask).

    \b
    iedit evaluate pairs mine/ --method iedit --method sdedit --model stable-diffusion-v1-4/ --features inception-2015-12-05.pt

    CLIPScore, FID, and SSIM where the edit is (SSIM-M) and where it is not (SSIM-notM), as in iEdit's Table 1.
    """
    from . import benchmarks

    _evaluate(lambda tell: benchmarks.Pairs(folder, values["count"], values["size"], compared, tell), values)


# --- the truth suite ----------------------------------------------------------------------------------------------


def names(known: tuple[str, ...], given: str, main: Sequence[str] = ()) -> list[str]:
    """A comma-separated list of known names; "all" is all of them, "main" those of `main`."""
    groups = {"all": known} | ({"main": tuple(main)} if main else {})
    found = list(groups[given]) if given in groups else [n.strip() for n in given.split(",")]
    for name in found:
        if name not in known:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(known)}")
    return found


reader_option = click.option(
    "--reader", type=click.Path(path_type=Path, dir_okay=False), default=WORK / "classifier.safetensors",
    show_default=True, help="Weights of the reader, made by `iedit train classifier`.",
)  # fmt: skip


def load_suite(model: str, reader: Path, backend: str, engines: str | None = None) -> tuple[Any, Any]:
    """An editor without a cache (methods are compared by their cost), and the reader that judges."""
    from .classifier import Classifier

    try:
        judge = Classifier.load(reader)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from error
    from ..runtime.editor import Editor
    from ..runtime.stage_cache import StageCache

    return Editor.load(model=model, backend=backend, cache=StageCache(memory=0), engines=engines), judge


def write_card(output: Path, reader: Path, **found: Any) -> None:
    """Add figures to OUTPUT/figures.json and make OUTPUT/card.md of it."""
    from .truth import render_card
    from .workers import read_json, write_json

    figures = read_json(output / "figures.json") | found
    measured = read_json(reader.with_suffix(".json")).get("renders")
    if measured:
        figures["reader"] = measured
    write_json(output / "figures.json", figures)
    (output / "card.md").write_text(render_card(figures))
    click.echo(f"wrote {output / 'figures.json'} and {output / 'card.md'}")


@evaluate.command()
@click.option(
    "--model",
    default="picturebook",
    show_default=True,
    help="The embedded model, or a local folder of one of this world.",
)
@reader_option
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=WORK / "truth", show_default=True,
              help="Folder for figures.json, card.md, cases.csv and the sheets.")  # fmt: skip
@click.option("--n", "count", type=click.IntRange(1), default=100, show_default=True, help="Held-out edits per kind.")
@click.option("--kinds", default="all", show_default=True, metavar="LIST",
              help="Comma-separated: thing, colour, background (sky or ground), pose, scribble.")  # fmt: skip
@click.option("--methods", default="main", show_default=True, metavar="LIST",
              help="Comma-separated: ito, ito exact (the full method, whatever the model recommends), ito adam (the paper's update), ito lambda=0.6, ito lambda=1, guidance image (of ito), "
                   "diffedit, sdedit, iedit, p2p, p2p without correction, ddpm, ip2p (text kinds), controlnet, controlnet-diffedit, t2i-adapter, "
                   "t2i-adapter-diffedit (layout kinds, by what reads the layout), round trip of the target; all; or main, each method once as it is by "
                   "default. All and main are those that the model runs: ip2p alone with an InstructPix2Pix checkpoint (iedit train instruct), all else "
                   "with others, and t2i-adapter for layouts that a T2I-Adapter reads (iedit train adapter).")  # fmt: skip
@click.option("--sheet", type=click.IntRange(0), default=0, show_default=True,
              help="Show the first so many cases of each kind and method in OUTPUT/METHOD-KIND.png.")  # fmt: skip
@click.option("--by-things", is_flag=True, help="Scenes of one and two things in rows of their own.")
@click.option("--batch", type=click.IntRange(1), default=10, show_default=True, help="Edits per call.")
@click.option("--backend", type=Choice(("auto", *BACKENDS)), default="auto", show_default=True,
              help="What runs the networks; engines take half the time on a CPU (run `iedit export onnx` first).")  # fmt: skip
@click.option(
    "--engines",
    type=FilePath(file_okay=False),
    default=None,
    help="Folder of exported engines. Default: the user's cache.",
)
@click.option(
    "--processes", type=click.IntRange(1), default=1, show_default=True, help="Edit and score in so many processes."
)
@click.option("--steps", type=click.IntRange(1), default=25, show_default=True, help="Sampling steps.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which held-out scenes, and their noise.")
def truth(
    model: str, reader: Path, output: Path, count: int, kinds: str, methods: str, sheet: int, by_things: bool,
    batch: int, backend: str, engines: str | None, processes: int, steps: int, seed: int,
) -> None:  # fmt: skip
    """Run editing methods on held-out edits whose exact result can be drawn, and score them.

    Half of the scenes have two things, of which one must stay as it is. Every case is a row of OUTPUT/cases.csv; a case
    that is there already, of the same model, steps and seed, is not run again, so a stopped run goes on and a larger
    --n adds to a smaller one.

    \b
    A quick look:  iedit evaluate truth --n 4 --sheet 4
    One method:    iedit evaluate truth --methods ito --kinds pose,scribble
    Two cores:     iedit evaluate truth --n 50 --processes 2
    """
    from ..runtime.cli.params import use_threads
    from . import evaluate as machinery
    from . import truth as suite

    asked_kinds, asked_methods = names(suite.KINDS, kinds), names(tuple(suite.METHODS), methods, suite.MAIN)
    if processes == 1:
        use_threads()
    load = functools.partial(load_suite, model, reader, backend, engines)
    editor, judge = load()
    fitting = {m: suite.METHODS[m].kinds_on(editor.model) for m in asked_methods}
    if methods not in ("all", "main"):
        for name, possible in fitting.items():
            wanted = [k for k in asked_kinds if k in suite.METHODS[name].kinds]
            if not possible or (wanted and not set(wanted) & set(possible)):
                why = suite.why_not(name, editor.model, wanted)
                raise UsageError(f"--methods: {name!r} cannot be run, {model} {why}")
    chosen = [dataclasses.replace(suite.METHODS[m], kinds=possible) for m, possible in fitting.items() if possible]
    with progress("truth") as tell:
        rows = suite.run(
            editor, judge, chosen, asked_kinds, count, settings=machinery.model_settings(editor),
            seed=seed, steps=steps, batch=batch, output=output, sheet=sheet, tell=tell, processes=processes, load=load,
        )  # fmt: skip
    summary = suite.summarise(rows)
    show(suite.table(suite.summarise(rows, by_things) if by_things else summary))
    for one in suite.verdicts(summary):
        click.echo(
            f"{one['name']}: {one['value']:.3f}, wanted {one['wanted']}: {'met' if suite.met(one) else 'NOT MET'}"
        )
    write_card(output, reader, edits=summary)


@evaluate.command()
@click.option(
    "--n",
    "count",
    type=click.IntRange(2),
    default=44,
    show_default=True,
    help="Held-out edits of each kind: thing, colour, background.",
)
@click.option("--method", "methods", multiple=True, metavar="NAME", help="Of the seven: ito, ito-lambda-1, diffedit, sdedit, sdedit-0.4, iedit, p2p; "
              "repeat for several. Default: all.")  # fmt: skip
@reader_option
@_run
@_judges
@_output("build/evaluate/agreement")
@click.option("--write", type=FilePath(path_type=Path, dir_okay=False), default=None, help="A document whose tables between <!-- agreement --> and "
              "<!-- /agreement --> are replaced.")  # fmt: skip
def agreement(count: int, reader: Path, write: Path | None, **values: Any) -> None:
    """How well metrics agree with the truth: edits of held-out scenes, whose exact result can be drawn.

    The rank correlation (Spearman, Kendall) of each metric that can be had with the exact figures: L1 to the exact target where the edit is, whether
    the edit is there, and L1 outside. Each is turned so that 1 means that the metric orders edits as the truth does, for single edits and for
    methods, with 95 % intervals over the cases. FID is by features of the embedded CLIP and of the reader; other networks as you name them.
    """
    from ..runtime.cli.live import quiet_libraries
    from ..runtime.cli.params import use_threads
    from ..runtime.files import write_whole

    document = _marked(write) if write is not None else None
    quiet_libraries()
    from . import agreement as measure
    from . import evaluate as machinery
    from .benchmarks import World
    from .classifier import Classifier
    from .metric_models import ClipFeatures
    from .workers import write_json

    known = {m.name: m for m in measure.METHODS}
    unknown = [m for m in values["methods"] if m not in known]
    if unknown:
        raise UsageError(f"--method: {printable(unknown[0])!r} is not one of {', '.join(known)}")
    methods, output = [known[m] for m in dict.fromkeys(values["methods"])] or list(known.values()), values["output"]
    if len(methods) < 2:
        raise UsageError("--method: give at least two methods; of one there is nothing to order")
    try:
        judge = Classifier.load(reader)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from error
    if values["processes"] == 1:
        use_threads()
    judges, settings, benchmark = _judges_of(values), _settings_of(values), World(count, values["seed"])
    try:
        with progress("editing and measuring") as tell:
            rows = machinery.run(benchmark, methods, judges, settings, output, tell)
        measure.add_exact(rows, benchmark, methods, judge, output)
        networks: dict[str, Any] = {"FID (reader)": measure.ReaderFeatures(judge)}
        if judges.clip:
            networks["FID (CLIP)"] = ClipFeatures(judges.load("clip"))
        if judges.features:
            networks["FID"] = judges.load("features")
        distances = {}
        with progress("features") as tell:
            for number, (head, features) in enumerate(networks.items()):
                tell(number, len(networks))
                edits = measure.features_of(rows, benchmark, methods, features, output)
                distances[head] = edits, measure.real_features(count, values["seed"], features)
        with progress("correlations") as tell:
            found = measure.correlations(rows, distances, tell=tell)
    except KeyboardInterrupt:
        click.echo("stopped; the same command goes on", err=True)
        raise click.Abort from None
    for level in ("edits", "methods"):
        show(measure.table(found, level))
    write_json(
        output / "agreement.json",
        {
            "cases": len(benchmark.cases),
            "methods": [m.name for m in methods],
            "digests": judges.digests(),
            "rows": found,
        },
    )
    click.echo(printable(str(output / "agreement.json")))
    if write is not None and document is not None:
        tables = "\n\n".join(
            f"{title}:\n\n{measure.markdown(found, level)}"
            for level, title in (("edits", "Single edits"), ("methods", "Methods"))
        )
        write_whole(write, f"{document[0]}{_BEGIN}\n{tables}\n{_END}{document[1]}".encode())


_BEGIN, _END = "<!-- agreement -->", "<!-- /agreement -->"


def _marked(path: Path) -> tuple[str, str]:
    """What of a document stands before and after the marks.

    Raises:
        UsageError: it is not there, or has no such marks.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, begun, rest = text.partition(_BEGIN)
    _, ended, after = rest.partition(_END)
    if not (begun and ended):
        raise UsageError(f"--write: {path} has no place for the tables; put {_BEGIN} and {_END} where they go")
    return before, after
