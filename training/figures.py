"""What is measured of an edit: the figures, how a table shows them, and the networks that some of them need.

The formulas are in `metrics.py` and `metric_models.py`; here is which of them is taken of which picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..runtime.errors import UsageError
from . import metrics
from .workers import Row


@dataclass(frozen=True)
class Case:
    """One edit of a benchmark.

    Attributes:
        name: unique in it, and the name of the edit's picture: letters, digits, "-", "_", "." and "/".
        kind: what figures are given for beside "all".
        source_prompt, prompt: what the picture shows, and what it is to show.
        digest: of the picture, the mask and the texts: a row of another digest is of another case.
        size: width and height of the picture.
        instruction: what to change, for the methods that are told so; "" where nobody said.
        old, new: classes before and after, for a classifier; "" where there are none.
    """

    name: str
    kind: str
    source_prompt: str
    prompt: str
    digest: str
    size: tuple[int, int]
    old: str = ""
    new: str = ""
    instruction: str = ""


@dataclass(frozen=True)
class Judges:
    """Checkpoints of the networks that measure, each a folder, a hub id or a file; "" leaves its figures out.

    Attributes:
        clip, pickscore: a CLIPModel, "picturebook" for the embedded one.
        lpips: weights of AlexNet, VGG-16 or SqueezeNet as torchvision names them.
        structure: a ViTModel (DINO ViT-B/8).
        classes: an image classifier.
        features: for FID, Inception's TorchScript or a CLIPModel.
        structure_scale: see `metric_models.Structure`.
        device: of all of them.
    """

    clip: str = ""
    pickscore: str = ""
    lpips: str = ""
    structure: str = ""
    classes: str = ""
    features: str = ""
    structure_scale: float = 1.0
    device: str = "cpu"

    def load(self, purpose: str) -> Any:
        """The network for a purpose; None where none is named."""
        from . import metric_models

        name = getattr(self, purpose)
        found = metric_models.load(name, purpose, self.device) if name else None
        if purpose == "structure" and found is not None:
            found.scale = self.structure_scale
        return found

    def digests(self) -> dict[str, str]:
        """Purpose -> digest of the checkpoint's files, 64 hex digits.

        Raises:
            UsageError: one cannot be found.
        """
        from .pair_models import file_digest, find_model, folder_digest

        found = {}
        for purpose in ("clip", "pickscore", "lpips", "structure", "classes", "features"):
            name = getattr(self, purpose)
            if name:
                where = "clip" if purpose == "features" else purpose
                file = purpose == "lpips" or (purpose == "features" and name.endswith(".pt"))
                found[purpose] = file_digest(Path(name), purpose) if file else folder_digest(find_model(name, where))
        return found


@dataclass(frozen=True)
class Figure:
    """How a figure is shown.

    Attributes:
        head: its heading.
        better: 1 where more is better, -1 where less is, 0 where neither is.
        digits: after the point.
        share: it is a share of yes.
        factor: what it is multiplied with in a table, as its paper prints it.
    """

    head: str
    better: int
    digits: int = 3
    share: bool = False
    factor: float = 1.0


FIGURES = {
    "l1": Figure("L1", -1),
    "psnr": Figure("PSNR", 1, 2),
    "mse": Figure("MSE x1e4", -1, 1, factor=1e4),
    "ssim": Figure("SSIM", 1),
    "psnr_kept": Figure("PSNR kept", 1, 2),
    "mse_kept": Figure("MSE kept x1e4", -1, 1, factor=1e4),
    "ssim_kept": Figure("SSIM kept", 1),
    "ssim_m": Figure("SSIM-M", 0),
    "ssim_not_m": Figure("SSIM-notM", 1),
    "l1_not_m": Figure("L1 outside", -1),
    "lpips": Figure("LPIPS", -1),
    "lpips_kept": Figure("LPIPS kept x1e3", -1, 1, factor=1e3),
    "structure": Figure("structure x1e3", -1, 2, factor=1e3),
    "clip_score": Figure("CLIPScore", 1),
    "clip_source": Figure("CLIP source", 0, 2),
    "clip_whole": Figure("CLIP whole", 1, 2),
    "clip_edited": Figure("CLIP edited", 1, 2),
    "pickscore": Figure("PickScore", 1, 2),
    "preference": Figure("preferred", 1, 2),
    "new": Figure("as new", 1, share=True),
    "old": Figure("as old", -1, share=True),
    "fid": Figure("FID", -1, 1),
    "csfid": Figure("CSFID", -1, 1),
    "seconds": Figure("s", -1, 1),
    "evaluations": Figure("evaluations", -1, 0),
}


def _tensor(picture: Image.Image) -> Tensor:
    """(1, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32).transpose(2, 0, 1)[None] / 255)


def picture_figures(source: Image.Image, edited: Image.Image, mask: np.ndarray | None) -> Row:
    """What is measured without a network: `l1`, `psnr`, `mse`, `ssim` of the whole picture, and with a mask

    - `psnr_kept`, `mse_kept`, `ssim_kept`: as PIE-Bench's published program has them, both pictures black where the edit is, and the mean over
      the whole picture;
    - `ssim_m`, `ssim_not_m`: the mean of the SSIM map where the edit is, and where it is not (iEdit section 4.1);
    - `l1_not_m`: the mean difference where the edit is not.

    Where a mask is empty or covers everything, what would be measured on nothing is NaN.

    Args:
        source, edited: RGB of one size. mask: (H, W) bool, true where the edit is.

    Raises:
        UsageError: the sizes differ.
    """
    if source.size != edited.size:
        raise UsageError(
            f"the edit is {edited.width}x{edited.height} and its source {source.width}x{source.height}; give one of its size"
        )
    a, b = _tensor(source), _tensor(edited)
    found = {name: getattr(metrics, name)(a, b).item() for name in ("l1", "psnr", "mse", "ssim")}
    names = ("psnr_kept", "mse_kept", "ssim_kept", "ssim_m", "ssim_not_m", "l1_not_m")
    found |= dict.fromkeys(names, math.nan)
    if mask is not None:
        if mask.shape != (source.height, source.width):
            raise UsageError(
                f"the mask is {mask.shape[1]}x{mask.shape[0]} and its picture {source.width}x{source.height}; give one of its size"
            )
        edit = torch.from_numpy(mask.copy())[None, None]
        keep = ~edit
        if keep.any():
            x, y = a * keep, b * keep
            found |= {f"{name}_kept": getattr(metrics, name)(x, y).item() for name in ("psnr", "mse", "ssim")}
            found |= {"ssim_not_m": metrics.ssim(a, b, keep).item(), "l1_not_m": metrics.l1(a, b, keep).item()}
        if edit.any():
            found["ssim_m"] = metrics.ssim(a, b, edit).item()
    return found


def network_figures(
    cases: Sequence[Case], sources: Sequence[Image.Image], edited: Sequence[Image.Image], masks: Sequence[np.ndarray | None],
    judges: Judges, among: Sequence[str] = (),
) -> list[Row]:  # fmt: skip
    """What networks measure, of those that are named (`metric_models.py` has the formulas); NaN where a mask leaves nothing.

    Args:
        among: classes that compete in the classifier's verdict; all by default.
    """
    from . import metric_models as models

    found: list[Row] = [{} for _ in cases]

    def put(name: str, values: Any, where: Sequence[int] | None = None) -> None:
        if where is not None:
            for row in found:
                row[name] = math.nan
        for number, value in zip(range(len(cases)) if where is None else where, values, strict=True):
            found[number][name] = float(value)

    clip, pick, lpips, structure, classes = (
        judges.load(p) for p in ("clip", "pickscore", "lpips", "structure", "classes")
    )
    inside = [i for i, m in enumerate(masks) if m is not None and m.any()]
    kept = [i for i, m in enumerate(masks) if m is not None and not m.all()]
    prompts = [c.prompt for c in cases]
    if clip is not None:
        put("clip_score", models.clip_score(clip, edited, prompts))
        put("clip_whole", models.clip_similarity(clip, edited, prompts))
        told = [i for i, c in enumerate(cases) if c.source_prompt]
        captions = [cases[i].source_prompt for i in told]
        put("clip_source", models.clip_similarity(clip, [sources[i] for i in told], captions) if told else [], told)
        parts = [models.blackened(edited[i], _mask(masks[i])) for i in inside]
        put("clip_edited", models.clip_similarity(clip, parts, [prompts[i] for i in inside]) if parts else [], inside)
    if pick is not None:
        put("pickscore", models.pick_score(pick, edited, prompts))
    if structure is not None:
        put("structure", structure.distances(sources, edited))
    if lpips is not None:
        put(
            "lpips",
            [lpips(_tensor(a) * 2 - 1, _tensor(b) * 2 - 1).item() for a, b in zip(sources, edited, strict=True)],
        )
        values = []
        for i in kept:
            both = (_tensor(models.blackened(p, ~_mask(masks[i]))) * 2 - 1 for p in (sources[i], edited[i]))
            values.append(lpips(*both).item())
        put("lpips_kept", values, kept)
    if classes is not None and cases[0].new:
        competing = sorted({classes.number(name) for name in among}) or None
        verdicts = classes.classes(edited, competing)
        put("new", [v == classes.number(c.new) for v, c in zip(verdicts, cases, strict=True)])
        put("old", [v == classes.number(c.old) for v, c in zip(verdicts, cases, strict=True)])
    return found


def _mask(mask: np.ndarray | None) -> np.ndarray:
    assert mask is not None
    return mask
