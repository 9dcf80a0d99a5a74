"""An ITO text edit against the plain composition of diffusers' parts, in one process on the same weights: A B A B.

    python bench/edit.py --backends torch,onnx --threads 2 --output bench/results.csv
    python bench/edit.py --model sd15-random --device cuda --dtype bfloat16 --size 512 --backends torch,compile

Every variant runs the same edits in turn, `--rounds` times after a first round that is thrown away. `naive` is
`bench/naive.py`; the ratio of each row is the median over the rounds of naive's seconds by its own. Beside them diffusers'
own DiffEdit and Img2Img, which are other methods. Quality: mask IoU and L1 of the picture against `naive`, which computes
the same edit by other means; with `--reader` (weights of `iedit train classifier`) also how many edits show what was asked.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from naive import Naive
from PIL import Image
from results import append_rows

from iedit.runtime import images as pictures
from iedit.runtime.backends import load_backend
from iedit.runtime.editor import Editor, EditRequest
from iedit.runtime.errors import UsageError
from iedit.runtime.model.model import load_model
from iedit.runtime.presets import with_preset
from iedit.runtime.profile import module_call, peak_memory
from iedit.runtime.stage_cache import StageCache
from iedit.training import truth

CHANNELS_LAST = "+channels-last"
RANDOM = "sd15-random"  # --model: the shapes of SD 1.5 with random weights, made on the spot


def world_edits(count: int) -> list[Any]:
    """Held-out text edits of the world, each kind in turn."""
    each = [truth.edit_cases(kind, count, seed=1) for kind in truth.TEXT_KINDS]
    return [each[i % len(each)][i // len(each)] for i in range(count)]


def requests_of(model: str, size: int, count: int, steps: int) -> tuple[list[EditRequest], list[Any]]:
    """The edits, of no preset yet, and the world's cases where they are of the world."""
    if model == "picturebook":
        cases = world_edits(count)
        requests = [EditRequest(c.source, c.prompts[1], c.prompts[0], steps=steps) for c in cases]
        return requests, cases
    rng = np.random.default_rng(0)
    smooth = [
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((size, size), 3) for _ in range(count)
    ]
    return [EditRequest(s, "a blue house on sand", "a red car on grass", steps=steps) for s in smooth], []


class Run:
    """One edit's outcome: seconds, picture (H, W, 3) in [0, 1], mask (h, w) or None, share outside the networks or None."""

    def __init__(self, seconds: float, picture: Any, mask: Any = None, outside: float | None = None, calls: int = 0):
        self.seconds, self.mask, self.outside, self.calls = seconds, mask, outside, calls
        self.image = picture
        self.picture = np.asarray(picture, dtype=np.float32) / 255


def ours(editor: Editor, preset: str, together: int = 1) -> Callable[[EditRequest], Run]:
    """The edit by this runtime; with `together`, seconds and evaluations are an edit's share of so many in one batch, each of its own seed."""

    def run(request: EditRequest) -> Run:
        editor.cache = StageCache(memory=0)
        made = with_preset(request if preset == "exact" else dataclasses.replace(request, steps=None), preset)
        batch = [dataclasses.replace(made, seed=made.seed + i) for i in range(together)]
        synchronise(editor.model.device)
        began = time.perf_counter()
        result = editor.edit_many(batch)[0]
        synchronise(editor.model.device)
        seconds = (time.perf_counter() - began) / together
        factor = editor.model.vae_scale_factor
        assert result.mask is not None
        mask = result.mask.resize((result.mask.width // factor, result.mask.height // factor), Image.Resampling.NEAREST)
        share = result.profile.outside_modules() / sum(result.profile.seconds.values())
        evaluations = sum(result.profile.evaluations.values()) // together
        return Run(seconds, result.image, np.asarray(mask) > 127, share, evaluations)

    return run


def naive(model: Any, steps: int) -> Callable[[EditRequest], Run]:
    plain = Naive(model, steps, model.guidance_scale)

    def run(request: EditRequest) -> Run:
        request = with_preset(request, "exact")  # the plain composition is of the full method
        synchronise(model.device)
        began, plain.evaluations = time.perf_counter(), 0
        made = plain.edit(
            pictures.to_tensor(request.image), request.prompt, request.source_prompt, request.options, request.seed
        )
        picture = pictures.to_image(made["image"][0])
        synchronise(model.device)
        seconds = time.perf_counter() - began
        return Run(seconds, picture, (made["mask"][0, 0] > 0.5).cpu().numpy(), None, plain.evaluations)

    return run


def diffusers_pipeline(model: Any, name: str, steps: int) -> Callable[[EditRequest], Run]:
    from diffusers import (
        DDIMInverseScheduler,
        DDIMScheduler,
        StableDiffusionDiffEditPipeline,
        StableDiffusionImg2ImgPipeline,
    )

    scheduler = DDIMScheduler.from_pretrained(model.folder / "scheduler")
    parts = {"vae": model.vae, "text_encoder": model.text_encoder, "tokenizer": model.tokenizer, "unet": model.unet,
             "scheduler": scheduler, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}  # fmt: skip
    if name == "diffusers Img2Img":
        pipe = StableDiffusionImg2ImgPipeline(**parts)
    else:
        pipe = StableDiffusionDiffEditPipeline(
            **parts, inverse_scheduler=DDIMInverseScheduler.from_config(scheduler.config)
        )
    pipe.set_progress_bar_config(disable=True)
    scale = model.guidance_scale

    def run(request: EditRequest) -> Run:
        synchronise(model.device)
        began = time.perf_counter()
        noise = torch.Generator().manual_seed(request.seed)
        if name == "diffusers Img2Img":
            made = pipe(prompt=request.prompt, image=request.image, strength=0.7, num_inference_steps=steps,
                        guidance_scale=scale, generator=noise)  # fmt: skip
        else:
            mask = pipe.generate_mask(image=request.image, source_prompt=request.source_prompt, target_prompt=request.prompt,
                                      guidance_scale=scale, num_inference_steps=steps, generator=noise)  # fmt: skip
            latents = pipe.invert(prompt=request.source_prompt, image=request.image, inpaint_strength=0.8,
                                  num_inference_steps=steps, guidance_scale=1.0, generator=noise).latents  # fmt: skip
            made = pipe(prompt=request.prompt, mask_image=mask, image_latents=latents, inpaint_strength=0.8,
                        num_inference_steps=steps, guidance_scale=scale, generator=noise)  # fmt: skip
        synchronise(model.device)
        return Run(time.perf_counter() - began, made.images[0])

    return run


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def iou(a: Any, b: Any) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


def accuracy(reader: Path | None, cases: list[Any], runs: list[Run]) -> str:
    if reader is None or not cases:
        return ""
    from iedit.training.classifier import Classifier

    read = Classifier.load(reader).read([r.image for r in runs])
    return f", {sum(bool(truth.judge(c, r)['new']) for c, r in zip(cases, read, strict=True))} of {len(cases)} as asked"


def event_cost(calls: int = 20000) -> float:
    """Seconds that recording one call of a module takes, beside the call itself."""
    from iedit.runtime.profile import Profile

    profile = Profile()
    with profile.stage("final"):
        began = time.perf_counter()
        for _ in range(calls):
            with module_call("unet", "torch", 2):
                pass
        return (time.perf_counter() - began) / calls


@click.command()
@click.option("--model", default="picturebook", show_default=True, help=f"As of `iedit edit`, or {RANDOM}.")
@click.option(
    "--backends",
    default="torch",
    show_default=True,
    help=f"Comma-separated: torch, graphs, compile, onnx, tensorrt, xformers; with {CHANNELS_LAST} behind one, on weights of that memory format.",
)
@click.option(
    "--presets", default="", help="Comma-separated: also these presets, by every backend; they say their own steps."
)
@click.option(
    "--together",
    default=1,
    show_default=True,
    help="Also so many edits in one batch, by every backend; seconds are an edit's share.",
)
@click.option("--engines", type=click.Path(path_type=Path), default=None, help="Folder of exported engines.")
@click.option("--diffusers/--no-diffusers", "pipelines", default=True, help="Also diffusers' DiffEdit and Img2Img.")
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    default=None,
    help=f"Folder of {RANDOM}, made if it is not there; default a temporary one.",
)
@click.option("--device", default=None, help="cpu or cuda.")
@click.option("--dtype", default=None, help="float32, float16 or bfloat16.")
@click.option("--size", default=512, show_default=True, help="Of the picture; the world's are 128.")
@click.option("--wait-for", type=click.Path(path_type=Path), default=None,
              help="After the round that is thrown away, wait until this file is there: the machine is busy until then.")  # fmt: skip
@click.option("--edits", default=6, show_default=True, help="Edits in a round.")
@click.option("--rounds", default=5, show_default=True, help="Rounds that count.")
@click.option("--steps", default=25, show_default=True)
@click.option("--threads", default=0, help="torch threads; 0 leaves them.")
@click.option("--reader", type=click.Path(path_type=Path), default=None, help="Weights of `iedit train classifier`.")
@click.option("--skip-missing", is_flag=True, help="Leave out, with its reason, a backend that cannot run here.")
@click.option("--output", type=click.Path(path_type=Path), default=None, help="Append rows to this CSV.")
def main(model: str, backends: str, presets: str, together: int, engines: Path | None, pipelines: bool, keep: Path | None, device: str | None, dtype: str | None, size: int,
         wait_for: Path | None, edits: int, rounds: int, steps: int, threads: int, reader: Path | None, skip_missing: bool, output: Path | None) -> None:  # fmt: skip
    """Time an ITO text edit by every backend against the plain composition of diffusers' parts."""
    if threads:
        torch.set_num_threads(threads)
    folder = model
    if model == RANDOM:
        import full_size

        # Until the process ends: the scheduler's config is read from there later.
        made = tempfile.TemporaryDirectory()
        folder = made.name if keep is None else str(keep)
        full_size.write(Path(folder))
    loaded = load_model(folder, device=device, dtype=dtype)
    loaded.name = model
    for note in loaded.notes:
        click.echo(f"note: {note}", err=True)
    asked, cases = requests_of(model, size, edits, steps)
    variants: dict[str, Callable[[EditRequest], Run]] = {"naive": naive(loaded, steps)}
    editors: dict[str, Editor] = {}
    own: dict[bool, Any] = {False: loaded}  # the memory format is of the model
    for name in backends.split(","):
        last_channels = name.endswith(CHANNELS_LAST) or name == "xformers"
        if last_channels and True not in own:
            own[True] = load_model(folder, device=device, dtype=dtype)
            own[True].name = model
        options = {"channels_last": last_channels} | ({"attention": "xformers"} if name == "xformers" else {})
        of, shown = own[last_channels], name.replace("+", ", ")
        shown = "torch, xformers attention, channels-last" if name == "xformers" else shown
        try:
            plain = name.removesuffix(CHANNELS_LAST)
            backend = load_backend("torch" if name == "xformers" else plain, of, engines, **options)
        except UsageError as error:
            if not skip_missing:
                raise click.ClickException(str(error)) from error
            click.echo(f"{name} is left out: {error}", err=True)
            continue
        editors[shown] = editor = Editor(of, backend)
        variants[shown] = ours(editor, "exact")
        for preset in filter(None, presets.split(",")):
            variants[f"{shown}, preset {preset}"] = ours(editor, preset)
        if together > 1:
            variants[f"{shown}, {together} edits in a batch"] = ours(editor, "exact", together)
    if pipelines:
        variants |= {n: diffusers_pipeline(loaded, n, steps) for n in ("diffusers DiffEdit", "diffusers Img2Img")}
    seconds: dict[str, list[float]] = {n: [] for n in variants}
    last: dict[str, list[Run]] = {}
    with click.progressbar(length=(rounds + 1) * len(variants), label="rounds", file=sys.stderr) as bar:
        for round_ in range(rounds + 1):
            while round_ == 1 and wait_for is not None and not wait_for.exists():
                time.sleep(0.2)
            for name, run in variants.items():
                last[name] = [run(r) for r in asked]
                if round_:
                    seconds[name].append(sum(r.seconds for r in last[name]) / len(asked))
                else:
                    click.echo(f" first round of {name}: {sum(r.seconds for r in last[name]):.1f} s", err=True)
                bar.update(1)
    rows = []
    where = torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else loaded.device.type
    for name, runs in last.items():
        ratio = float(np.median([a / b for a, b in zip(seconds["naive"], seconds[name], strict=True)]))
        quality = f"naive / this {ratio:.2f}"
        if runs[0].mask is not None:
            overlap = np.mean([iou(a.mask, b.mask) for a, b in zip(runs, last["naive"], strict=True)])
            apart = np.mean([np.abs(a.picture - b.picture).mean() for a, b in zip(runs, last["naive"], strict=True)])
            quality += f", mask IoU {overlap:.3f} and L1 {apart:.4f} to naive{accuracy(reader, cases, runs)}"
        if runs[0].outside is not None:
            quality += f", {np.mean([r.outside for r in runs]):.1%} outside the networks"
        p20, p50, p80 = np.percentile(seconds[name], [20, 50, 80])
        width, height = asked[0].image.size
        rows.append({"name": f"edit/{model}", "variant": f"{name}, {torch.get_num_threads()} threads", "shape": f"{width}x{height}",
                     "p20": round(p20, 4), "p50": round(p50, 4), "p80": round(p80, 4), "peak_mib": round(peak_memory() / 2**20), "device": where,
                     "evaluations": runs[0].calls or "", "quality": quality})  # fmt: skip
        click.echo(f"{name:20} p50 {p50:.3f} s ({p20:.3f}-{p80:.3f}); {quality}")
    events = 76 * event_cost()
    click.echo(
        f"profiling: {events * 1e3:.2f} ms of an edit ({events / np.median(seconds['torch']):.3%})"
        if "torch" in seconds
        else ""
    )
    if output is not None:
        append_rows(output, rows, next(iter(editors.values())))


if __name__ == "__main__":
    main()
