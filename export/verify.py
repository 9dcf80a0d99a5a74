"""Whether engines compute what the model computes: every module against float32 eager, then whole edits, with limits and a report.

An error is relative to the deviation of the exact output: 0.001 is a thousandth of what the network says. Edits are judged
by the mask (intersection over union) and by the picture: mean absolute difference of channels in [0, 1] (L1) inside and outside the
mask, and for float32 the largest difference of any value, in 8-bit steps.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..runtime.backends import load_backend
from ..runtime.backends.base import Backend
from ..runtime.backends.eager import TorchBackend
from ..runtime.backends.engine import EngineBackend
from ..runtime.backends.engine_spec import REPORT_FILE, SPEC_FILE, EngineSpec, find_engines
from ..runtime.cli.demo import sample_requests
from ..runtime.denoise_step import Condition, ControlInput
from ..runtime.editor import Editor, EditRequest
from ..runtime.errors import UsageError
from ..runtime.files import write_whole
from ..runtime.model import module_io
from ..runtime.model.model import Model
from ..runtime.model.module_io import CONTROL_EMBEDDING_PREFIX
from ..runtime.stage_cache import StageCache
from .onnx import DTYPES

Row = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """What a precision is allowed.

    Attributes:
        largest, mean: error of a module, relative to the deviation of the exact output.
        iou: of masks, mean over the edits, at least.
        l1: of pictures in [0, 1], inside and outside the mask, mean over the edits, at most.
        levels: largest difference of a value of any edit's picture, of 255; None where a half's rounding sets no bound.
    """

    largest: float
    mean: float
    iou: float
    l1: float
    levels: int | None = None


# Measured on the embedded model: fp32 1e-5 and 1e-6, fp16 5e-3 and 1e-3. A half has 11 bits, bfloat16 8: eight times the error.
LIMITS = {
    "fp32": Limits(1e-3, 1e-4, 0.98, 0.005, 2),
    "fp16": Limits(5e-2, 1e-2, 0.95, 0.02),
    "bf16": Limits(4e-1, 8e-2, 0.85, 0.05),
}


def _inputs(
    model: Model, module: str, batch: int, size: tuple[int, int], length: int
) -> Callable[[TorchBackend | EngineBackend], torch.Tensor]:
    """A call of one module with seeded inputs; size is (height, width) in pixels."""
    draw = torch.Generator().manual_seed(batch)
    height, width = size

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(model.device)

    latents = normal(batch, model.channels, height // model.vae_scale_factor, width // model.vae_scale_factor)
    images = torch.rand((batch, 3, height, width), generator=draw).to(model.device)
    if module == "vae_encoder":
        return lambda b: b.encode_image(2 * images - 1)
    if module == "vae_decoder":
        return lambda b: b.decode_latent(latents)
    if module == "text_encoder":
        words = int(model.text_encoder.config.vocab_size)
        ids = torch.randint(0, words, (batch, length), generator=draw).to(model.device)
        return lambda b: b.encode_tokens(ids)
    if module.startswith(CONTROL_EMBEDDING_PREFIX):
        return lambda b: b.control_embedding(module.removeprefix(CONTROL_EMBEDDING_PREFIX), images).float()
    times = torch.randint(0, 1000, (batch,), generator=draw).to(model.device)  # every sample at a level of its own
    text = normal(batch, length, int(model.unet.config.cross_attention_dim))
    controls = tuple(
        ControlInput(name, images.roll(i, 0), 0.5 + 0.25 * i) for i, name in enumerate(module_io.layouts(module))
    )
    image = latents.roll(1, 0) if model.instructs else None
    return lambda b: b.predict(latents, times, Condition(text, controls, image))


Case = tuple[int, tuple[int, int], int]  # batch, (height, width) in pixels, tokens


def cases(model: Model, specs: Sequence[EngineSpec]) -> list[Case]:
    """What a module's engines are called with: one that takes every shape with one sample, square, whole text, and with three, wide, short
    text; of one with limits every range at its best size, with its smallest and its largest batch."""
    whole = min(int(model.tokenizer.model_max_length), int(model.text_encoder.config.max_position_embeddings))
    step, found = model.multiple, []
    for one in (one for spec in specs for one in spec.shapes):
        if not one.batch[2]:
            found += [(1, (2 * step, 2 * step), whole), (3, (2 * step, 3 * step), 5)]
        else:
            size = (one.height[1] or 2 * step, one.width[1] or 2 * step)  # a text has none
            found += [(batch, size, whole) for batch in (one.batch[0], one.batch[2])]
    return list(dict.fromkeys(found))


def check_module(
    model: Model, backend: EngineBackend, module: str, limits: Limits, called: Sequence[Case] | None = None
) -> list[Row]:
    """One row for each call of a module; by default those of `cases`.

    Args:
        model: in float32.
    """
    exact, rows = TorchBackend(model), []
    for batch, size, length in called or cases(model, [spec for _, spec in backend.engines(module)]):
        why = backend.why_not(module, batch, *size)
        row: Row = {"module": module, "batch": batch, "size": f"{size[1]}x{size[0]}", "length": length}
        if why:
            rows.append(row | {"skipped": "; ".join(why), "passed": True})
            continue
        call = _inputs(model, module, batch, size, length)
        wanted, got = call(exact), call(backend)
        scale = float(wanted.std()) or 1.0
        error = (got - wanted).abs() / scale
        row |= {"largest": float(error.max()), "mean": float(error.mean())}
        rows.append(row | {"passed": bool(row["largest"] <= limits.largest and row["mean"] <= limits.mean)})
    return rows


def compare_edits(
    model: Model, backend: Backend, requests: Sequence[tuple[str, EditRequest]], tell: Callable[[str], None] = lambda _: None
) -> list[Row]:  # fmt: skip
    """A row for each edit, by float32 eager and by `backend`: IoU of the masks, relative error of the latent, L1 inside and outside the
    mask, the largest difference of a value (of 255), and the seconds of both."""
    exact, quick = (Editor(model, b, cache=StageCache(memory=0)) for b in (TorchBackend(model), backend))
    rows = []
    for name, request in requests:
        tell(f"edit: {name}")
        wanted, got = exact.edit(request), quick.edit(request)
        a, b = (np.asarray(r.mask if r.mask is not None else request.image.convert("1").point(lambda _: 255)) > 127 for r in (wanted, got))  # fmt: skip
        apart = np.abs(np.asarray(wanted.image, np.float64) - np.asarray(got.image, np.float64))
        off = apart.mean(-1) / 255
        union = float((a | b).sum())
        rows.append(
            {
                "edit": name,
                "iou": float((a & b).sum()) / union if union else 1.0,
                "latent": float((got.latent - wanted.latent).abs().mean() / wanted.latent.std()),
                "l1_inside": float(off[a].mean()) if a.any() else 0.0,
                "l1_outside": float(off[~a].mean()) if (~a).any() else 0.0,
                "levels": int(apart.max()),
                "seconds_torch": round(sum(wanted.profile.seconds.values()), 3),
                "seconds": round(sum(got.profile.seconds.values()), 3),
            }
        )
    return rows


def edits_pass(rows: Sequence[Row], limits: Limits) -> list[str]:
    """What the edits miss, with the limit; empty if they pass."""
    if not rows:
        return []
    mean = {k: float(np.mean([r[k] for r in rows])) for k in ("iou", "l1_inside", "l1_outside")}
    failures = []
    if not mean["iou"] >= limits.iou:
        failures.append(f"edits: mean mask IoU {mean['iou']:.3f}, at least {limits.iou} wanted")
    for key in ("l1_inside", "l1_outside"):
        if mean[key] > limits.l1:
            failures.append(f"edits: mean {key} {mean[key]:.4f}, at most {limits.l1} wanted")
    worst = max(rows, key=lambda r: r["levels"])
    if limits.levels is not None and worst["levels"] > limits.levels:
        failures.append(f"edit {worst['edit']}: differs by {worst['levels']} of 255, at most {limits.levels} wanted")
    return failures


def load_engines(name: str, model: Model, folder: Path) -> EngineBackend:
    """The backend of a name, "onnx" or "tensorrt", with the engines of a folder."""
    loaded = load_backend(name, model, folder)
    assert isinstance(loaded, EngineBackend)
    return loaded


def verify_engines(
    model: Model, folder: Path, name: str = "onnx", edits: int = 4, tell: Callable[[str], None] = lambda _: None
) -> dict[str, dict[str, Any]]:
    """Check every engine of a model and a backend, write `report.json` beside each, and mark those that pass as checked.

    Args:
        model: in float32; what the engines are compared with.
        name: of the backend, "onnx" or "tensorrt".
        edits: shipped sample edits to run in full, as many as the model and its engines can; 0 for none.

    Returns:
        precision -> `modules` and `edits` (rows), `failures` (texts, empty if it passed).

    Raises:
        UsageError: the model is not in float32, or no engine can be used; the reasons.
    """
    if model.dtype != torch.float32:
        raise UsageError(f"verify: the model is in {model.dtype}, parity is measured against float32; load it in that")
    there = {spec.precision for _, spec in find_engines(folder) if isinstance(spec, EngineSpec) and spec.format == name}
    if not there:
        spelt = {"onnx": "ONNX", "tensorrt": "TensorRT"}[name]
        raise UsageError(f"{folder}: there are no {spelt} engines in it; run `iedit export {name} {model.name}`")
    reports = {}
    for precision in sorted(there):
        limits = LIMITS[precision]
        backend = load_engines(name, dataclasses.replace(model, dtype=DTYPES[precision]), folder)
        every = {m: [e for e in backend.engines(m) if e[1].precision == precision] for m in backend.modules()}
        used = {m: engines for m, engines in every.items() if engines}
        rows: list[Row] = []
        # A ControlNet alone is an engine for other runtimes; no backend here calls it.
        for module in [m for m in used if not m.startswith(module_io.CONTROLNET_PREFIX)]:
            tell(f"{precision} {module}")
            rows += check_module(model, backend, module, limits, cases(model, [spec for _, spec in used[module]]))
        failures = [
            f"refused: {why}" for reasons in backend.refused.values() for why in reasons if "precision:" not in why
        ]
        failures += [
            f"{r['module']} at batch {r['batch']}, {r['size']}: largest error {r['largest']:.1e}, at most {limits.largest:.0e} "
            f"wanted; mean {r['mean']:.1e}, at most {limits.mean:.0e}"
            for r in rows
            if not r["passed"]
        ]
        done: list[Row] = []
        if not failures:
            done = compare_edits(model, backend, _samples(model, backend, set(used), edits), tell)
            failures += edits_pass(done, limits)
        reports[precision] = {"modules": rows, "edits": done, "failures": failures}
        for module, (where, spec) in ((m, engine) for m, engines in used.items() for engine in engines):
            own = [r for r in rows if r["module"] == module]
            report = {
                "module": module,
                "limits": dataclasses.asdict(limits),
                "calls": own,
                "edits": done,
                "failures": failures,
            }
            write_whole(where / REPORT_FILE, (json.dumps(report, indent=1) + "\n").encode())
            if not failures and own:
                mark(where, spec, own, done)
    return reports


def mark(folder: Path, spec: EngineSpec, calls: Sequence[Row], edits: Sequence[Row]) -> None:
    """Write what was measured into the spec of an engine that passed."""
    ran = [r for r in calls if "skipped" not in r]
    checked: dict[str, Any] = {k: max((r[k] for r in ran), default=0.0) for k in ("largest", "mean")}
    if edits:
        checked["iou"] = round(float(np.mean([r["iou"] for r in edits])), 6)
        checked |= {k: round(float(np.mean([r[k] for r in edits])), 6) for k in ("l1_inside", "l1_outside")}
        checked["levels"] = max(r["levels"] for r in edits)
    whole = dataclasses.replace(spec, checked=checked)
    write_whole(folder / SPEC_FILE, (json.dumps(dataclasses.asdict(whole), indent=1) + "\n").encode())


def _samples(model: Model, backend: EngineBackend, modules: set[str], count: int) -> list[tuple[str, EditRequest]]:
    """The first of the shipped edits that the model and the engines can run."""
    samples = []
    for name, request in sample_requests() if count else []:
        unet = "+".join(["unet", *sorted(request.layouts)])
        wanted = {"unet", unet, *module_io.control_embedding_modules(unet)}
        fits = not backend.why_not(unet, 1, request.image.height, request.image.width)
        if fits and set(request.layouts) <= set(model.controlnets) and wanted <= modules:
            samples.append((name, request))
    return samples[:count]
