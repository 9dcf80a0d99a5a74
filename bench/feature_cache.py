"""What caching the UNet's deep features between steps would bring the presets (DeepCache, Ma et al. 2023, arXiv:2312.00858), as a prototype.

    python bench/feature_cache.py --reader WEIGHTS --preset faster --write docs/presets.md
    python bench/feature_cache.py --reader WEIGHTS --preset faster --depth "1 block" --n 60 --write docs/presets.md --mark feature-cache-block

A full step keeps what comes from below into one of the last layers of the UNet's way up. A shallow step computes only the layers above that:
the first ones on the way down, whose outputs they take too, and the last ones on the way up, with what was kept. Every `interval`-th
step is full. Both are measured: what a shallow step costs, of the embedded UNet and of one of Stable Diffusion 1.5's shapes (random weights),
and what edits lose, as paired differences to the same edits without it.

Every case is a row of OUTPUT/VARIANT/KIND/cases.csv, and the same command goes on from there. What a shallow step costs is kept in OUTPUT too.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch
from common import Command, place, replace
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from iedit.runtime.backends.eager import TorchBackend
from iedit.runtime.backends.torch_modules import PreparedCondition
from iedit.runtime.editor import Editor
from iedit.runtime.errors import UsageError
from iedit.runtime.model.model import Model, load_model
from iedit.runtime.options import Options
from iedit.runtime.presets import PRESETS
from iedit.runtime.profile import current
from iedit.runtime.stage_cache import StageCache
from iedit.training import metrics, truth
from iedit.training.classifier import Classifier
from iedit.training.evaluate import model_settings
from iedit.training.workers import read_json, write_json

Row = dict[str, Any]
DENOISING, INVERSION = ("guidance", "final"), ("invert",)
EXACT = 170  # evaluations of an edit by text with the full method


# --- the prototype ------------------------------------------------------------------------------------------------


class Shallow(nn.Module):
    """The last `layers` layers of a UNet's way up, and what they need of its way down; it shares the UNet's modules.

    A layer is a residual block with the attention behind it, if there is one, as in `UNet2DConditionModel`. Sizes have to be multiples of the
    UNet's own, and ControlNets are not read.
    """

    def __init__(self, unet: Any, layers: int):
        super().__init__()
        down: list[list[nn.Module]] = [[unet.conv_in]]
        for block in unet.down_blocks:
            down += [[r, *a] for r, *a in _layers(block)] + [[d] for d in block.downsamplers or ()]
        up: list[list[nn.Module]] = []
        for block in unet.up_blocks:
            up += [[r, *a] for r, *a in _layers(block)]
            up[-1] += block.upsamplers or ()
        if not 1 <= layers <= len(up):
            raise ValueError(f"Shallow: layers is {layers}, expected 1 to {len(up)}")
        self.unet, self.entry = [unet], up[-layers][0]  # in a list: no module of this one
        self.down, self.up = (
            nn.ModuleList(nn.ModuleList(one) for one in some) for some in (down[:layers], up[-layers:])
        )

    def forward(self, x: Tensor, t: Tensor, text: Tensor, kept: Tensor) -> Tensor:
        """(B, C, h, w) latents, (B,) timesteps, (B, L, D) text and `kept` -> (B, C, h, w), what the UNet answers but for the rest of it."""
        unet = self.unet[0]
        emb, skips, h = unet.time_embedding(unet.get_time_embed(sample=x, timestep=t), None), [], x
        for layer in self.down:
            h = _through(layer, h, emb, text)
            skips.append(h)
        h = kept
        for layer in self.up:
            h = _through(layer, torch.cat([h, skips.pop()], 1), emb, text)
        output: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))
        return output

    def keeping(self, full: Callable[[], Any]) -> tuple[Any, Tensor]:
        """`full()`, a call of the whole UNet, and what a shallow step after it takes."""
        seen: list[Tensor] = []
        handle = self.entry.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            answer = full()
        finally:
            handle.remove()
        skip = self.down[-1][0].out_channels
        return answer, seen[0][:, : seen[0].shape[1] - skip]


def _layers(block: Any) -> list[tuple[nn.Module, ...]]:
    attentions = getattr(block, "attentions", None)
    return list(zip(block.resnets, *([attentions] if attentions else []), strict=True))


def _through(modules: Any, h: Tensor, emb: Tensor, text: Tensor) -> Tensor:
    for module in modules:
        name = type(module).__name__
        if name == "ResnetBlock2D":
            h = module(h, emb)
        elif name == "Transformer2DModel":
            h = module(h, encoder_hidden_states=text, return_dict=False)[0]
        else:
            h = module(h)
    return h


def depths(unet: Any) -> dict[str, int]:
    """Where the features are kept -> layers above: below the last layer, the last block and the last two blocks of the way up."""
    last, before = (len(b.resnets) for b in (unet.up_blocks[-1], unet.up_blocks[-2]))
    return {"1 layer": 1, "1 block": last, "2 blocks": last + before}


@dataclass(frozen=True)
class Variant:
    """A preset with cached features.

    Attributes:
        preset: of `PRESETS`.
        interval: every so many steps of a stage one is full; 1 caches nothing.
        depth: of `depths`.
        stages: that it is used in.
    """

    preset: str
    interval: int = 1
    depth: str = "1 block"
    stages: tuple[str, ...] = DENOISING

    @property
    def name(self) -> str:
        where = "denoising and inversion" if set(INVERSION) <= set(self.stages) else "denoising"
        return (
            f"{self.preset}"
            if self.interval == 1
            else f"{self.preset}, interval {self.interval}, {self.depth}, {where}"
        )


class CachingBackend(TorchBackend):
    """Eager torch whose steps are full or shallow. `rows` counts the samples of full and of shallow calls.

    Stages must not share calls, and a call must hold all samples of its step: what was kept is the running stage's, sample by sample.
    """

    def __init__(self, model: Model, variant: Variant):
        super().__init__(model)
        self.variant, self.rows = variant, {"full": 0, "shallow": 0}
        self.shallow = Shallow(self.unet, depths(self.unet)[variant.depth])
        self.kept: tuple[str, Tensor] = ("", torch.empty(0))

    def _predict(self, x: Tensor, t: Tensor, prepared: PreparedCondition) -> Tensor:
        running = current()
        assert running is not None and not prepared.condition.controls
        cached = running.stage_name in self.variant.stages
        if not cached or (running.step_number - 1) % self.variant.interval == 0:
            self.rows["full"] += len(x)
            answer, kept = self.shallow.keeping(lambda: super(CachingBackend, self)._predict(x, t, prepared))
            self.kept = (running.stage_name, kept)
            output: Tensor = answer
            return output
        self.rows["shallow"] += len(x)
        stage, kept = self.kept
        assert stage == running.stage_name and len(kept) in (len(x), 2 * len(x)), (
            stage,
            running.where,
            len(kept),
            len(x),
        )
        # Where guidance has ended since the full step, only its second half goes on.
        return self.shallow(x, t, prepared.prompt_embeds, kept[-len(x) :]).float()


# --- what a shallow step costs ------------------------------------------------------------------------------------


def cpu_seconds(run: Callable[[], object], times: int) -> float:
    """The shortest CPU time of several runs, seconds; whatever else the machine does."""
    taken = []
    for _ in range(times):
        began = time.process_time()
        run()
        taken.append(time.process_time() - began)
    return min(taken)


def flops(run: Callable[[], object]) -> int:
    """Floating-point operations of products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@torch.no_grad()
def costs(
    unet: Any, shape: tuple[int, ...], text: tuple[int, int], batch: int, times: int, onnx: bool = False
) -> list[Row]:
    """What a shallow step of each depth costs: shares of a whole call in FLOPs, CPU time and, with `onnx`, CPU time of exported graphs.

    Args:
        shape: (C, h, w) of the latents.
        text: (L, D) of the prompt.
        times: runs of which the shortest counts; 0 counts the FLOPs alone, also of a UNet without data.
    """

    def inputs(device: str) -> tuple[Tensor, ...]:
        x, told = (torch.randn(batch, *s, device=device) for s in (shape, text))
        return x, torch.full((batch,), 500, device=device), told

    with torch.device("meta"):
        sketch = type(unet).from_config(unet.config)  # FLOPs are counted, and shapes are known, without computing
    drawn, rows, whole = inputs("meta"), list[Row](), Row()
    asked = inputs("cpu") if times else ()
    if times:
        whole["full"] = cpu_seconds(partial(unet, *asked), times)
    if onnx:
        whole["onnx_full"] = onnx_seconds(unet, asked, times)
    for name, layers in depths(unet).items():
        shallow = Shallow(sketch, layers)
        kept = shallow.keeping(partial(sketch, *drawn))[1]
        row = {"depth": name, "flops": flops(partial(shallow, *drawn, kept)) / flops(partial(sketch, *drawn))} | whole
        if times:
            shallow, kept = Shallow(unet, layers), torch.randn(kept.shape)
            row["shallow"] = cpu_seconds(partial(shallow, *asked, kept), times)
        if onnx:
            row["onnx_shallow"] = onnx_seconds(shallow, (*asked, kept), times)
        rows.append(row)
    return rows


def onnx_seconds(module: Any, inputs: Sequence[Tensor], times: int) -> float:
    """CPU seconds of a call in ONNX Runtime, exported for these shapes."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "module.onnx"
        torch.onnx.export(module.eval(), tuple(inputs), path, dynamo=True, opset_version=23, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {i.name: v.numpy() for i, v in zip(session.get_inputs(), inputs, strict=True)}
    return cpu_seconds(lambda: session.run(None, feed), times)


def all_costs(model: Model, full_size: bool, log: Callable[[str], None]) -> dict[str, list[Row]]:
    """Of the embedded UNet at a batch of 20, a step of ten guided edits, and of Stable Diffusion 1.5's shapes at 512x512."""
    from full_size import TOKENS, new_unet

    log("costs: the embedded UNet")
    text = (model.text_length, int(model.unet.config.cross_attention_dim))
    found = {"embedded": costs(model.unet, (4, 16, 16), text, 20, 10, onnx=True)}
    with torch.device("meta"):
        unet = new_unet()
    if full_size:
        log("costs: a UNet of Stable Diffusion 1.5's shapes, a minute or two")
        unet = unet.to_empty(device="cpu").eval().requires_grad_(False)
        for p in unet.parameters():
            p.fill_(0.001)  # of no other use than to be computed with
    return found | {"sd15": costs(unet, (4, 64, 64), (TOKENS, 768), 1, int(full_size))}


# --- what edits lose ----------------------------------------------------------------------------------------------


class CountingEditor(Editor):
    """An editor without a cache of stages, whose stages do not share calls; `taken` adds up edits, samples of calls and CPU seconds."""

    def __init__(self, model: Model, variant: Variant):
        super().__init__(model, CachingBackend(model, variant), cache=StageCache(memory=0), share=False)
        self.taken = {"edits": 0.0, "seconds": 0.0}

    def edit_many(self, *args: Any, **more: Any) -> Any:
        began = time.process_time()
        results = super().edit_many(*args, **more)
        self.taken["edits"] += len(results)
        self.taken["seconds"] += time.process_time() - began
        return results

    @property
    def counts(self) -> Row:
        """What all edits so far have taken."""
        return self.taken | self.denoiser.rows  # type: ignore[attr-defined]


def method_of(variant: Variant) -> truth.Method:
    """The preset; its lambda is chosen by the mask, as it is for a user who names none."""
    options = PRESETS[variant.preset].options
    names = [f.name for f in dataclasses.fields(Options) if getattr(options, f.name) != getattr(Options(), f.name)]
    return truth.Method(variant.preset, "ito", truth.TEXT_KINDS, {n: getattr(options, n) for n in names})


def rows_of(
    model: Model, judge: Any, variant: Variant, kind: str, count: int, seed: int, output: Path, counts: dict[str, Row]
) -> list[Row]:
    """Rows of the truth suite of the first `count` held-out edits of a kind; what they have taken goes into `counts`, by `settings_of` and kind."""
    method, editor, steps = method_of(variant), CountingEditor(model, variant), PRESETS[variant.preset].steps or 25
    settings = settings_of(model, variant)
    rows = truth.run(
        editor, judge, [method], [kind], count, settings=settings, seed=seed, steps=steps,
        output=output / variant.name.replace(", ", "-").replace(" ", "_") / kind,
    )  # fmt: skip
    key = f"{settings} {kind} {seed}"
    if (
        key not in counts and not editor.taken["edits"]
    ):  # the rows are of a run that was killed before it wrote down its counts
        editor.edit_many(
            [truth.edit_request(c, method, seed + c.number, steps) for c in truth.edit_cases(kind, min(4, count), seed)]
        )
    before = counts.get(key, {})
    counts[key] = {k: v + before.get(k, 0) for k, v in editor.counts.items()}
    return rows


def settings_of(model: Model, variant: Variant) -> str:
    """What the rows of a variant depend on beside the case."""
    return f"{model_settings(SimpleNamespace(model=model))} {variant.name} {sorted(method_of(variant).options.items())}"


def paired(rows: Sequence[Row], base: Sequence[Row], field: str) -> tuple[float, float, float]:
    """Mean of the differences of the same cases, and its 95 % interval (percentile bootstrap over the cases)."""
    before = {(r["kind"], r["number"]): r[field] for r in base}
    gaps = [r[field] - before[r["kind"], r["number"]] for r in rows]
    return (sum(gaps) / len(gaps), *metrics.bootstrap(gaps))


def variants(intervals: Sequence[int], names: Sequence[str], presets: Sequence[str]) -> list[Variant]:
    """Each preset without it, then with every interval, depth and place."""
    found = []
    for preset in presets:
        found.append(Variant(preset))
        for stages, depth, interval in itertools.product((DENOISING, DENOISING + INVERSION), names, intervals):
            found.append(Variant(preset, interval, depth, stages))
    return found


# --- tables -------------------------------------------------------------------------------------------------------


def cost_table(found: Mapping[str, Sequence[Row]]) -> str:
    """Markdown: what a shallow step costs, as shares of a full one."""

    def cell(row: Row, of: str, whole: str) -> str:
        return f"{row[of] / row[whole]:.2f} ({row[of] * 1e3:.0f} of {row[whole] * 1e3:.0f} ms)" if of in row else "-"

    heads = (
        "kept below the last",
        "embedded UNet: FLOPs",
        "CPU time, eager",
        "CPU time, ONNX Runtime",
        "Stable Diffusion 1.5's shapes: FLOPs",
        "CPU time, eager",
    )
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---|" * (len(heads) - 1)]
    for small, large in zip(found["embedded"], found["sd15"], strict=True):
        cells = (small["depth"], f"{small['flops']:.2f}", cell(small, "shallow", "full"), cell(small, "onnx_shallow", "onnx_full"),
                 f"{large['flops']:.2f}", cell(large, "shallow", "full"))  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def share(rows: Sequence[Row], depth: str) -> float:
    """Of a full step: CPU time of eager torch where it was measured, else FLOPs."""
    row = next(r for r in rows if r["depth"] == depth)
    return float(row["shallow"] / row["full"] if "full" in row else row["flops"])


def equivalents(count: Row, share_of_step: float) -> float:
    """Evaluations of an edit, a shallow one by its share."""
    return float(count["full"] + share_of_step * count["shallow"]) / float(count["edits"])


def edit_table(
    results: Mapping[Variant, Sequence[Row]],
    counts: Mapping[tuple[Variant, str], Row],
    found: Mapping[str, Sequence[Row]],
) -> str:
    """Markdown: a row for each variant and kind; differences to the preset without it, with their 95 % intervals."""
    heads = (
        "preset",
        "evaluations (Stable Diffusion 1.5's shapes)",
        "of `exact`",
        "CPU s",
        "edits",
        "edit is there",
        "difference, points",
        "L1 inside",
        "L1 outside",
    )
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---|" * (len(heads) - 1)]
    for variant, rows in results.items():
        base = results[Variant(variant.preset)]
        for kind in truth.TEXT_KINDS:
            some, plain = ([r for r in all_ if r["kind"] == kind] for all_ in (rows, base))
            count = counts[variant, kind]
            small, large = (equivalents(count, share(found[k], variant.depth)) for k in ("embedded", "sd15"))
            cells = [
                variant.name,
                f"{small:.0f} ({large:.0f})",
                f"1 / {EXACT / small:.1f}",
                f"{count['seconds'] / count['edits']:.2f}",
            ]
            cells += [f"{kind} ({len(some)})", f"{sum(r['new'] for r in some) / len(some):.0%}"]
            if variant.interval == 1:
                cells += ["", *(f"{sum(r[f] for r in some) / len(some):.4f}" for f in ("l1_in", "l1_out"))]
            else:
                gap, low, high = (100 * v for v in paired(some, plain, "new"))
                cells.append(f"{gap:+.0f} ({low:+.0f} to {high:+.0f})")
                cells += ["{:+.4f} ({:+.4f} to {:+.4f})".format(*paired(some, plain, f)) for f in ("l1_in", "l1_out")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@click.command(cls=Command)
@click.option("--reader", required=True, type=click.Path(path_type=Path), help="Weights of `iedit train classifier`.")
@click.option("--n", "count", type=click.IntRange(1), default=20, show_default=True, help="Edits of each text kind.")
@click.option("--seed", default=7, show_default=True, help="Of the held-out edits.")
@click.option(
    "--interval",
    "intervals",
    multiple=True,
    type=click.IntRange(2),
    default=(2, 3),
    show_default=True,
    help="Steps from one full step to the next.",
)
@click.option("--depth", "names", multiple=True, type=click.Choice(["1 layer", "1 block", "2 blocks"]), default=("1 layer", "1 block", "2 blocks"), show_default=True,
              help="Below which of the last layers of the way up the features are kept.")  # fmt: skip
@click.option(
    "--preset",
    "presets",
    multiple=True,
    type=click.Choice(["fast", "faster"]),
    default=("fast", "faster"),
    show_default=True,
)
@click.option(
    "--full-size/--no-full-size",
    default=True,
    help="Time a UNet of Stable Diffusion 1.5's shapes too: 4 GB of memory; else its FLOPs are counted.",
)
@click.option("--output", type=click.Path(path_type=Path), default=Path("build/feature_cache"), show_default=True)
@click.option("--write", type=click.Path(path_type=Path), default=None, help="A document that the tables go into.")
@click.option(
    "--mark",
    default="feature-cache",
    show_default=True,
    help="Between which marks of it: <!-- MARK --> and <!-- /MARK -->.",
)
def main(
    reader: Path, count: int, seed: int, intervals: Sequence[int], names: Sequence[str], presets: Sequence[str], full_size: bool,
    output: Path, write: Path | None, mark: str,
) -> None:  # fmt: skip
    """Measure what caching deep features would bring, and what edits lose by it."""
    if write is not None:
        place(write, mark)  # said before anything runs
    torch.set_num_threads(1)
    try:
        judge = Classifier.load(reader)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from error
    model = load_model(device="cpu", layouts=())
    output.mkdir(parents=True, exist_ok=True)
    kept = output / f"costs-{model.digest}.json"
    measured = read_json(kept)
    if not measured:
        measured = {"costs": all_costs(model, full_size, click.echo), "edits": {}}
        write_json(kept, measured)
    found, chosen = measured["costs"], variants(intervals, names, presets)
    results, counts = dict[Variant, list[Row]](), dict[tuple[Variant, str], Row]()
    began = time.monotonic()
    for number, (variant, kind) in enumerate(itertools.product(chosen, truth.TEXT_KINDS)):
        of = len(chosen) * len(truth.TEXT_KINDS)
        left = f", {(time.monotonic() - began) / number * (of - number) / 60:.0f} min left" if number else ""
        click.echo(f"{variant.name}: {kind}, {number + 1} of {of}{left}")
        some = rows_of(model, judge, variant, kind, count, seed, output, measured["edits"])
        results.setdefault(variant, []).extend(some)
        counts[variant, kind] = measured["edits"][f"{settings_of(model, variant)} {kind} {seed}"]
        write_json(kept, measured)
    text = (f"{cost_table(found)}\n" if len(names) > 1 else "") + edit_table(results, counts, found)
    click.echo(text)
    if write is not None:
        replace(write, mark, text)


if __name__ == "__main__":
    main()
