"""The reader of pictures: what stands in a 128x128 picture of the world, where, in which colour and pose.

It is trained on renders alone and used for nothing but evaluation (`truth.py`): no part of the model or of an edit ever
sees it, so its verdict is independent of them. One small convolutional net with skip connections answers everything at
once. Training pictures are blurred, made noisy, brightened and tinted a little, as a picture that comes out of an
autoencoder is.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..runtime import machine
from . import world
from .embed import Part, Task, images_to_tensor, train_loop

SLOTS = 2  # slot 0: the only or the left thing; slot 1: the right one
GRID = 32  # heatmaps of the joints; a cell is 4 pixels and the expectation over cells gives the fraction
_CELL = world.SIZE / GRID
_COLOURS, _GROUNDS, _SKIES = tuple(world.COLOURS), tuple(world.GROUNDS), tuple(world.SKIES)
_HEADS = {"count": SLOTS, "kind0": len(world.KINDS), "colour0": len(_COLOURS), "kind1": len(world.KINDS),
          "colour1": len(_COLOURS), "ground": len(_GROUNDS), "sky": len(_SKIES)}  # fmt: skip

Drawn = tuple[
    np.ndarray, np.ndarray, tuple[int, ...], np.ndarray
]  # picture, mask, labels in the order of _HEADS, joints


@dataclass(frozen=True)
class Reading:
    """What the reader sees in one picture.

    Attributes:
        kinds, colours: one name per thing, left to right; one or two.
        ground, sky: names.
        mask: (128, 128) float32 in [0, 1]: probability that a pixel belongs to a thing (its shadow does not).
        joints: per thing 14 points in pixels (`world.JOINTS`); they mean something only where the kind is "person".
    """

    kinds: tuple[str, ...]
    colours: tuple[str, ...]
    ground: str
    sky: str
    mask: Tensor
    joints: tuple[tuple[world.Point, ...], ...]

    def agrees(self, scene: world.Scene) -> bool:
        """Whether number, kinds, colours, ground and sky are all those of `scene`."""
        named = [(t.kind, t.colour) for t in scene.things]
        return (list(zip(self.kinds, self.colours, strict=True)), self.ground, self.sky) == (
            named,
            scene.ground,
            scene.sky,
        )


def _conv(inside: int, outside: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(inside, outside, size, stride, size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.ReLU(inplace=True))


class Classifier(nn.Module):
    """The net: (B, 3, 128, 128) in [-1, 1] -> logits of every head, mask logits and joint heatmaps.

    Batch normalisation, not group normalisation: its backward is several times cheaper on a CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.at64 = _conv(3, 24, 2, 5)
        self.at32 = nn.Sequential(_conv(24, 48, 2), _conv(48, 48))
        self.at16 = nn.Sequential(_conv(48, 96, 2), _conv(96, 96))
        self.at8 = nn.Sequential(_conv(96, 128, 2), _conv(128, 128), _conv(128, 128))
        self.up16 = nn.Conv2d(128, 96, 1)
        self.join16 = _conv(96, 96)
        self.up32 = nn.Conv2d(96, 48, 1)
        self.join32 = _conv(48, 48)
        self.up64 = nn.Conv2d(48, 24, 1)
        self.join64 = _conv(24, 16)
        self.mask = nn.Conv2d(16, 4, 3, padding=1)  # four sub-pixels of every 64x64 cell
        self.joints = nn.Conv2d(48, SLOTS * len(world.JOINTS), 1)
        self.summary = nn.Sequential(nn.Linear(128 * 8, 128), nn.ReLU(inplace=True))
        self.heads = nn.ModuleDict({name: nn.Linear(128, classes) for name, classes in _HEADS.items()})

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Returns: logits per head (B, classes); mask logits (B, 1, 128, 128); heatmap logits (B, 2, 14, 32, 32)."""
        a = self.at64(images.contiguous(memory_format=torch.channels_last))
        b = self.at32(a)
        c = self.at16(b)
        d = self.at8(c)
        grid = F.avg_pool2d(d, (4, 2)).flatten(1)  # 2 rows x 4 columns: left and right stay apart
        shared = self.summary(grid)
        c = self.join16(c + F.interpolate(self.up16(d), scale_factor=2.0))
        b = self.join32(b + F.interpolate(self.up32(c), scale_factor=2.0))
        a = self.join64(a + F.interpolate(self.up64(b), scale_factor=2.0))
        heat = self.joints(b).float().reshape(-1, SLOTS, len(world.JOINTS), GRID, GRID)
        logits = {name: head(shared).float() for name, head in self.heads.items()}
        return logits, F.pixel_shuffle(self.mask(a).float(), 2), heat

    @torch.no_grad()
    def read(self, images: Sequence[Any], batch: int = 64) -> list[Reading]:
        """Read PIL pictures of 128x128.

        Raises:
            ValueError: a picture of another size.
        """
        wrong = [i.size for i in images if i.size != (world.SIZE, world.SIZE)]
        if wrong:
            raise ValueError(f"read: a picture is {wrong[0][0]}x{wrong[0][1]}, expected {world.SIZE}x{world.SIZE}")
        self.eval()
        readings: list[Reading] = []
        for at in range(0, len(images), batch):
            logits, mask, heat = self(images_to_tensor(list(images[at : at + batch])))
            best = {name: values.argmax(1).tolist() for name, values in logits.items()}
            points = expected_points(heat).tolist()
            for i in range(mask.shape[0]):
                slots = range(best["count"][i] + 1)
                readings.append(
                    Reading(
                        kinds=tuple(world.KINDS[best[f"kind{s}"][i]] for s in slots),
                        colours=tuple(_COLOURS[best[f"colour{s}"][i]] for s in slots),
                        ground=_GROUNDS[best["ground"][i]],
                        sky=_SKIES[best["sky"][i]],
                        mask=mask[i, 0].sigmoid(),
                        joints=tuple(tuple((x, y) for x, y in points[i][s]) for s in slots),
                    )
                )
        return readings

    def save(self, path: Path) -> None:
        """Write the weights as float16 safetensors, whole or not at all."""
        from safetensors.torch import save

        weights = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
        temporary.write_bytes(save(weights))  # `save_file` would leave the file readable by its owner only
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> Classifier:
        """Read weights written by `save`.

        Raises:
            FileNotFoundError: nothing is there; the message names the command that makes it.
        """
        from safetensors.torch import load_file

        if not path.exists():
            raise FileNotFoundError(f"reader: {path} is not there; train it with `iedit train classifier --work DIR`")
        net = cls()
        net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
        return net.eval()


def expected_points(heat: Tensor) -> Tensor:
    """Heatmap logits (..., 32, 32) -> expected (x, y) in pixels, (..., 2)."""
    share = heat.flatten(-2).softmax(-1).reshape(heat.shape)
    centres = (torch.arange(GRID, dtype=share.dtype) + 0.5) * _CELL
    return torch.stack(((share.sum(-2) * centres).sum(-1), (share.sum(-1) * centres).sum(-1)), -1)


def _heat_of(points: Tensor) -> Tensor:
    """Points (..., 2) in pixels -> heat (..., 32, 32): a tent on 2x2 cells that sums to 1 and has them as its mean."""
    at = (points / _CELL - 0.5).clamp(0, GRID - 1)
    tent = (1 - (at.unsqueeze(-1) - torch.arange(GRID, dtype=points.dtype)).abs()).clamp_min(0)  # (..., 2, 32): x, y
    return tent[..., 1, :, None] * tent[..., 0, None, :]


# --- training ---------------------------------------------------------------------------------------------------


def reader_scene(rng: random.Random) -> world.Scene:
    """A scene as it can be before or after any edit of the world; people are drawn more often than chance."""
    scene = world.random_scene(rng)
    single = len(scene.things) == 1
    things = []
    for slot, thing in enumerate(scene.things):
        if rng.random() < 0.15:
            thing = replace(thing, kind="person")
        if rng.random() < 0.5:  # the ranges of a scribble edit
            x = rng.uniform(44, 84) if single else (33, 95)[slot] + rng.uniform(-6, 6)
            size = rng.uniform(50, 74) if single else rng.uniform(36, 48)
            thing = replace(thing, x=x, size=size, stretch=rng.uniform(0.75, 1.25))
        things.append(thing)
    return replace(scene, things=tuple(things))


def _labels(scene: world.Scene) -> tuple[int, ...]:
    """Class numbers in the order of `_HEADS`; -1 where there is no second thing."""
    named: list[int] = [len(scene.things) - 1]
    for slot in range(SLOTS):
        there = slot < len(scene.things)
        named.append(world.KINDS.index(scene.things[slot].kind) if there else -1)
        named.append(_COLOURS.index(scene.things[slot].colour) if there else -1)
    return (*named, _GROUNDS.index(scene.ground), _SKIES.index(scene.sky))


def _draw(scene: world.Scene) -> Drawn:
    """Picture (128, 128, 3) and mask (128, 128) in uint8, labels, joints (2, 14, 2) float32, NaN without a person."""
    points = np.full((SLOTS, len(world.JOINTS), 2), np.nan, np.float32)
    for slot, thing in enumerate(scene.things):
        if thing.kind == "person":
            points[slot] = world.joints(thing)
    return np.asarray(world.render(scene)), np.asarray(world.object_mask(scene)), _labels(scene), points


@cache
def _pooled(number: int) -> Drawn:
    return _draw(reader_scene(random.Random(f"reader-{number}")))


def soften(images: Tensor) -> Tensor:
    """Augmentation: half of the pictures blurred (sigma 0..1.2), noise up to 0.03, brightness ±3 %, tint ±2 %.

    images: (B, 3, H, W) in [-1, 1]; the random numbers are torch's global ones. Same shape and range back.
    """
    count = images.shape[0]
    sigma = 0.2 + float(torch.rand(())) * 1.0
    taps = torch.exp(-0.5 * (torch.arange(-3, 4) / sigma) ** 2)
    taps = (taps / taps.sum()).repeat(3, 1)
    half = F.pad(images[: count // 2], (3, 3, 3, 3), mode="replicate")
    half = F.conv2d(F.conv2d(half, taps[:, None, None, :], groups=3), taps[:, None, :, None], groups=3)
    images = torch.cat((half, images[count // 2 :]))
    gain = 1 + (torch.rand(count, 1, 1, 1) * 2 - 1) * 0.03 + (torch.rand(count, 3, 1, 1) * 2 - 1) * 0.02
    noise = torch.randn_like(images[:1]) * (torch.rand(count, 1, 1, 1) * 0.06)  # 0.03 in [0, 1] units
    return ((images + 1) * gain - 1 + noise).clamp(-1, 1)


def reader_loss(net: Classifier, drawn: Sequence[Drawn], augment: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the cross-entropies of the heads, mask BCE + Dice, joints (heat cross-entropy + L1 in cells)."""
    images = torch.from_numpy(np.stack([d[0] for d in drawn])).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    if augment:
        images = soften(images)
    mask = torch.from_numpy(np.stack([d[1] for d in drawn]))[:, None].float() / 255
    labels = dict(zip(_HEADS, torch.tensor([d[2] for d in drawn]).unbind(1), strict=True))
    points = torch.from_numpy(np.stack([d[3] for d in drawn]))
    with machine.autocast():
        logits, seen, heat = net(images)
    heads = torch.stack([F.cross_entropy(v, labels[k], ignore_index=-1) for k, v in logits.items()]).nan_to_num(0.0)
    p = seen.sigmoid()
    dice = 1 - (2 * (p * mask).sum((1, 2, 3)) + 1) / (p.sum((1, 2, 3)) + mask.sum((1, 2, 3)) + 1)
    segment = F.binary_cross_entropy_with_logits(seen, mask) + 0.5 * dice.mean()
    there = ~points[..., 0, 0].isnan()  # (B, 2)
    terms = {"heads": heads.sum(), "mask": segment}
    loss = heads.sum() + 2 * segment
    if there.any():
        want, got = points[there], heat[there]
        entropy = -(_heat_of(want) * got.flatten(-2).log_softmax(-1).unflatten(-1, (GRID, GRID))).sum((-1, -2)).mean()
        off = expected_points(got) - want.clamp(_CELL / 2, world.SIZE - _CELL / 2)
        loss = loss + 0.3 * entropy + 0.5 * off.abs().mean() / _CELL
        terms["px"] = off.detach().norm(dim=-1).mean()
    return loss, terms


def train_classifier(
    work: Path, log: Callable[[str], None], part: Part = Part(2400, 32, 4e-3, ema=0.99), pool: int = 16000
) -> Classifier:
    """Train the reader and write `work/classifier.safetensors` (float16, under 2 MB); resumable, see `train_loop`.

    `pool` scenes are drawn once and kept (68 KB each): drawing costs as much as half a training step. Afterwards the
    statistics of the batch normalisation are measured again, under the averaged weights.
    """
    torch.manual_seed(part.seed)
    net: Classifier = Classifier().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def draw(step: int, count: int, rng: random.Random) -> list[Drawn]:
        return [_pooled(rng.randrange(pool)) for _ in range(count)]

    task = Task(draw, lambda drawn: reader_loss(net.train(), drawn))
    train_loop("classifier", part, nn.ModuleDict({"net": net}), task, work, log, every=200)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches that follow
    torch.manual_seed(part.seed)
    rng = random.Random("reader-statistics")
    with torch.no_grad():
        for _ in range(min(40, part.steps)):
            reader_loss(net.train(), [_pooled(rng.randrange(pool)) for _ in range(part.batch)])
    _pooled.cache_clear()
    net.eval().save(work / "classifier.safetensors")
    return net


def examine(net: Classifier, count: int = 1000, seed: int = 0, soft: bool = False) -> dict[str, float]:
    """Figures on `count` held-out renders (softened as in training if `soft`): share right per head and of all at once,
    mean IoU of the mask, mean error of the joints in pixels, share of people within 2 px, seconds.

    The slot-1 heads are judged on pictures with two things, the joints wherever a person stands.
    """
    rng = random.Random(f"held-out-reader-{seed}")
    scenes = [reader_scene(rng) for _ in range(count)]
    pictures = [world.render(s) for s in scenes]
    if soft:
        from PIL import Image

        torch.manual_seed(seed)
        blurred = [soften(images_to_tensor(pictures[i : i + 32])) for i in range(0, count, 32)]
        arrays = ((torch.cat(blurred) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        pictures = [Image.fromarray(a) for a in arrays]
    began = time.perf_counter()
    readings = net.read(pictures)
    seconds = time.perf_counter() - began
    right: dict[str, list[bool]] = {name: [] for name in _HEADS}
    overlap, error = [], []
    for scene, reading in zip(scenes, readings, strict=True):
        right["count"].append(len(reading.kinds) == len(scene.things))
        right["ground"].append(reading.ground == scene.ground)
        right["sky"].append(reading.sky == scene.sky)
        for slot, thing in enumerate(scene.things[: len(reading.kinds)]):
            right[f"kind{slot}"].append(reading.kinds[slot] == thing.kind)
            right[f"colour{slot}"].append(reading.colours[slot] == thing.colour)
            if thing.kind == "person":
                pairs = zip(reading.joints[slot], world.joints(thing), strict=True)
                error.append(sum(math.dist(a, b) for a, b in pairs) / len(world.JOINTS))
        exact = torch.from_numpy(np.asarray(world.object_mask(scene)) > 127)
        seen = reading.mask > 0.5
        overlap.append(float((seen & exact).sum() / (seen | exact).sum()))
    figures = {name: sum(v) / max(1, len(v)) for name, v in right.items()}
    figures["all"] = sum(r.agrees(s) for r, s in zip(readings, scenes, strict=True)) / count
    figures |= {"mask_iou": sum(overlap) / count, "mask_iou_worst": min(overlap)}
    figures |= {
        "joints_px": sum(error) / max(1, len(error)),
        "joints_within_2px": sum(e <= 2 for e in error) / max(1, len(error)),
    }
    return figures | {"pictures": float(count), "seconds": seconds}
