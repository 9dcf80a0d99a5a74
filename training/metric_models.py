"""Metrics that a network computes: CLIPScore, PickScore, LPIPS, DINO's structure distance, a classifier's verdict, features for FID.

Every network is a checkpoint that the user names (a folder, a hub id, a file); none is fetched that was not asked for. Pictures are RGB, any
size that the checkpoint's own image processor takes. What is returned for a picture depends on the batch that it is in only by rounding.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..runtime.errors import UsageError, first_line
from .metrics import torchmetrics_folder
from .pair_models import Clip, find_model, load_network, load_part

SMALLEST = 32  # pixels of a side: below it LPIPS' networks have no cell left in their last layers


def _same_count(name: str, pictures: Sequence[Any], others: Sequence[Any], what: str) -> None:
    if len(pictures) != len(others) or not pictures:
        raise UsageError(f"{name}: {len(pictures)} pictures and {len(others)} {what}, expected one for each")


def blackened(picture: Image.Image, keep: np.ndarray) -> Image.Image:
    """A picture, black where `keep` (H, W) is false, as PIE-Bench shows a network a part of one.

    Raises:
        UsageError: `keep` is not of the picture's size, or keeps nothing.
    """
    if keep.shape != (picture.height, picture.width):
        raise UsageError(
            f"mask: it is {keep.shape[1]}x{keep.shape[0]} and the picture {picture.width}x{picture.height}; give one of its size"
        )
    if not keep.any():
        raise UsageError("mask: it leaves nothing of the picture, so there is nothing to measure; give another mask")
    return Image.fromarray(np.asarray(picture) * keep[..., None].astype(np.uint8))


# --- pictures and texts -------------------------------------------------------------------------------------------


def cosines(clip: Clip, pictures: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
    """Cosine of each picture's embedding with its text's: (B,) float32 in [-1, 1]."""
    _same_count("clip", pictures, texts, "texts")
    products: np.ndarray = (clip.images(pictures) * clip.texts(texts)).sum(1)
    return products


def clip_score(clip: Clip, pictures: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
    """CLIPScore, 2.5 max(cos, 0), of each picture with its text: (B,) in [0, 2.5] (Hessel et al. 2021, Eq. 1; METHOD section 3, row 8)."""
    return 2.5 * cosines(clip, pictures, texts).clip(0)


def clip_similarity(clip: Clip, pictures: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
    """CLIP similarity as PIE-Bench has it, 100 max(cos, 0): (B,) in [0, 100]."""
    return 100 * cosines(clip, pictures, texts).clip(0)


def pick_score(clip: Clip, pictures: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
    """PickScore, the cosine times the model's logit scale: (B,) (Kirstain et al. 2023). Of several pictures of one text, `metrics.preference`
    makes shares."""
    return clip.logit_scale * cosines(clip, pictures, texts)


# --- a classifier -------------------------------------------------------------------------------------------------


class ImageClassifier:
    """Any image classifier of transformers."""

    def __init__(self, folder: Path, device: str):
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self.device, self.net = device, load_network(AutoModelForImageClassification, folder, "classes", device)
        self.processor = load_part(AutoImageProcessor, folder, "classes")
        self.labels: dict[int, str] = {int(i): str(name) for i, name in self.net.config.id2label.items()}
        self._numbers: dict[str, int] = {}
        for (
            number,
            label,
        ) in self.labels.items():  # "tench, Tinca tinca" is known by either name; the first label has it
            for name in (label, *label.split(",")):
                self._numbers.setdefault(name.strip().casefold(), number)

    def number(self, name: str) -> int:
        """The class of a name, or of a number.

        Raises:
            UsageError: the classifier has no such class.
        """
        wanted = name.strip().replace("_", " ").casefold()
        found = self._numbers.get(wanted, int(wanted) if wanted.isdecimal() and int(wanted) in self.labels else None)
        if found is None:
            raise UsageError(
                f"classes: the classifier has no class {name!r}; its first are {', '.join(list(self.labels.values())[:4])}"
            )
        return found

    def classes(self, pictures: Sequence[Image.Image], among: Sequence[int] | None = None) -> list[int]:
        """The likeliest class of each picture.

        Args:
            among: the classes that compete; all by default. FlexIT lets those of the benchmark compete.
        """
        with torch.inference_mode():
            pixels = self.processor(images=list(pictures), return_tensors="pt").pixel_values.to(self.device)
            logits = self.net(pixel_values=pixels).logits
        numbers = list(self.labels) if among is None else list(among)
        return [numbers[int(i)] for i in logits[:, numbers].argmax(1)]


# --- DINO's structure ---------------------------------------------------------------------------------------------


class Structure:
    """Structure distance: how differently two pictures' patches resemble each other to a vision transformer (DINO ViT-B/8).

    The mean squared difference of the two cosine self-similarities of the last layer's keys, all heads together, the class token included
    (Tumanyan et al. 2022, Splice, Eq. 5; PIE-Bench's "structure distance").

    Args:
        scale: what a picture's brightest value is before normalisation: 1, as DINO was trained. PIE-Bench's published program leaves out the
            division by 255; 255 gives its figures.
    """

    def __init__(self, folder: Path, device: str, scale: float = 1.0):
        from transformers import AutoImageProcessor, ViTModel

        self.device, self.net = device, load_network(ViTModel, folder, "structure", device, add_pooling_layer=False)
        self.processor = load_part(AutoImageProcessor, folder, "structure")
        self.scale = scale
        layers = self.net.layers if hasattr(self.net, "layers") else self.net.encoder.layer
        attention = layers[-1].attention
        self._keys: nn.Module = attention.k_proj if hasattr(attention, "k_proj") else attention.attention.key

    def similarities(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Cosine of the keys of every two tokens: (B, N, N), N one more than there are patches."""
        kept: list[Tensor] = []
        handle = self._keys.register_forward_hook(lambda module, args, output: kept.append(output))
        try:
            with torch.inference_mode():
                inputs = self.processor(images=list(pictures), return_tensors="pt", rescale_factor=self.scale / 255)
                self.net(pixel_values=inputs.pixel_values.to(self.device))
        finally:
            handle.remove()
        keys = F.normalize(kept[0], dim=-1)
        return keys @ keys.transpose(1, 2)

    def distances(self, pictures: Sequence[Image.Image], others: Sequence[Image.Image]) -> list[float]:
        """The distance of each picture from its other: (B,), 0 for equal ones."""
        _same_count("structure", pictures, others, "others")
        difference = self.similarities(pictures) - self.similarities(others)
        return [float(v) for v in (difference**2).mean((1, 2))]


# --- LPIPS --------------------------------------------------------------------------------------------------------


class _Fire(nn.Module):
    """SqueezeNet's module, with torchvision's names of weights."""

    def __init__(self, channels: int, squeezed: int, expanded: int):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        return torch.cat((self.expand1x1(x).relu(), self.expand3x3(x).relu()), 1)


def _alex() -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    layers += [
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
    ]
    return [*layers, nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()]


def _vgg() -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2, 2)]
        channels = width or channels
    return layers


def _squeeze() -> list[nn.Module]:
    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool(), _Fire(64, 16, 64), _Fire(128, 16, 64), pool()]
    layers += [_Fire(128, 32, 128), _Fire(256, 32, 128), pool(), _Fire(256, 48, 192), _Fire(384, 48, 192)]
    return [*layers, _Fire(384, 64, 256), _Fire(512, 64, 256)]


# Name of a network in LPIPS -> its layers as torchvision numbers them, those whose outputs are compared, and a weight that only it has.
_LPIPS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...], str]] = {
    "squeeze": (_squeeze, (1, 4, 7, 9, 10, 11, 12), "features.3.squeeze.weight"),
    "vgg": (_vgg, (3, 8, 15, 22, 29), "features.28.weight"),
    "alex": (_alex, (1, 4, 7, 9, 11), "features.10.weight"),
}  # fmt: skip


class Lpips(nn.Module):
    """Learned perceptual image patch similarity, version 0.1 (Zhang et al. 2018, Eq. 1): 0 for equal pictures.

    Which network it is (AlexNet, VGG-16 or SqueezeNet 1.1) is read off the weights. The learned weights of its layers, a few kilobytes, come
    with torchmetrics.

    Args:
        path: the network's weights as torchvision names them, `.pth` or `.safetensors`.

    Raises:
        UsageError: there are none, or they are of none of the three.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, path: Path, device: str = "cpu"):
        super().__init__()
        weights = _weights_by_name("lpips", path)
        found = [name for name, (_, _, mark) in _LPIPS.items() if mark in weights]
        if not found:
            raise UsageError(
                f"lpips: {path} holds no AlexNet, VGG-16 or SqueezeNet 1.1 with torchvision's names of weights; give such a file"
            )
        self.kind = found[0]
        make, self.compared, _ = _LPIPS[self.kind]
        self.features = nn.Sequential(*make())
        own = self.features.state_dict(prefix="features.")
        for name, value in own.items():
            if name not in weights or weights[name].shape != value.shape:
                got = f"is {tuple(weights[name].shape)}" if name in weights else "is missing"
                raise UsageError(
                    f"lpips: {path}: {name} {got}, expected {tuple(value.shape)}; fetch torchvision's weights again"
                )
        self.features.load_state_dict({k.removeprefix("features."): weights[k] for k in own})
        heads = torchmetrics_folder() / "functional" / "image" / "lpips_models" / f"{self.kind}.pth"
        learned = _weights_by_name("lpips", heads)
        self.heads = [learned[f"lin{i}.model.1.weight"].to(device) for i in range(len(self.compared))]
        self.register_buffer("shift", torch.tensor((-0.030, -0.088, -0.188)).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor((0.458, 0.448, 0.450)).view(1, 3, 1, 1))
        self.to(device).eval().requires_grad_(False)

    def _compared(self, images: Tensor) -> list[Tensor]:
        x, found = (images - self.shift) / self.scale, []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.compared:
                found.append(
                    x / (1e-8 + (x**2).sum(1, keepdim=True)).sqrt()
                )  # as torchmetrics: the bound inside the root
        return found

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] each -> (B,).

        Raises:
            UsageError: the sizes differ, or a side has fewer than 32 pixels.
        """
        if a.shape != b.shape:
            raise UsageError(f"lpips: pictures are {tuple(a.shape)} and {tuple(b.shape)}, expected one size")
        if min(a.shape[-2:]) < SMALLEST:
            raise UsageError(
                f"lpips: pictures are {a.shape[-1]}x{a.shape[-2]}, expected sides of at least {SMALLEST} pixels"
            )
        with torch.inference_mode():
            device = self.shift.device
            pairs = zip(self.heads, self._compared(a.to(device)), self._compared(b.to(device)), strict=True)
            layers = [F.conv2d((x - y) ** 2, head).mean((1, 2, 3)) for head, x, y in pairs]
        return torch.stack(layers).sum(0)


def _weights_by_name(what: str, path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise UsageError(f"{what}: {path} is not there; give a file of weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights: Any = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file torch raises what it likes
        raise UsageError(f"{what}: {path} cannot be read ({first_line(error)}); fetch it again") from error
    if not isinstance(weights, Mapping) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise UsageError(f"{what}: {path} holds a {type(weights).__name__}, expected weights by name")
    return weights


# --- features for FID ---------------------------------------------------------------------------------------------


class Features(Protocol):
    """Pictures to the vectors whose distribution FID compares."""

    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """RGB pictures -> (B, D) float."""


class Inception:
    """The Inception network of FID, as the TorchScript file `inception-2015-12-05.pt` that StyleGAN3 and clean-fid use: it takes pictures of any
    size in 0..255, resizes them as the original TensorFlow program did, and returns 2048 features.

    Args:
        path: the file. TorchScript is a program: take it from where you trust it.

    Raises:
        UsageError: it is not there or is no TorchScript.
    """

    def __init__(self, path: Path, device: str):
        if not path.is_file():
            raise UsageError(
                f"features: {path} is not there; give Inception's TorchScript file (inception-2015-12-05.pt)"
            )
        self.device = device
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch would like to be asked for another format
                self.net = torch.jit.load(str(path), map_location=device).eval()
        except Exception as error:
            raise UsageError(
                f"features: {path} is no TorchScript ({first_line(error)}); fetch inception-2015-12-05.pt again"
            ) from error

    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """RGB pictures -> (B, 2048) float32."""
        rows = []
        with torch.inference_mode():
            for picture in pictures:
                pixels = torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1)[None]
                rows.append(self.net(pixels.to(self.device), return_features=True).float().cpu().numpy())
        return np.concatenate(rows)


class ClipFeatures:
    """A CLIPModel's image embeddings as features, of the length that it gives them (Kynkäänniemi et al. 2023)."""

    def __init__(self, clip: Clip):
        self.clip = clip

    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """RGB pictures -> (B, D) float32."""
        features: np.ndarray = self.clip.image_features(pictures).float().cpu().numpy()
        return features


@functools.lru_cache(maxsize=8)
def load(name: str, purpose: str, device: str) -> Any:
    """A network by what it is for; loaded once in a process.

    Args:
        name: a folder, a hub id, "picturebook" for the embedded CLIP; of "lpips" and of "features" also a file.
        purpose: "clip" and "pickscore" give a `Clip`, "classes" an `ImageClassifier`, "structure" a `Structure`, "lpips" an `Lpips`,
            "features" an `Inception` (of a .pt file) or `ClipFeatures` (of anything else).

    Raises:
        UsageError: as `pair_models.find_model`, or it cannot be loaded.
    """
    if purpose == "lpips":
        return Lpips(Path(name), device)
    if purpose == "features":
        return Inception(Path(name), device) if name.endswith(".pt") else ClipFeatures(load(name, "clip", device))
    folder = find_model(name, purpose)
    if purpose == "classes":
        return ImageClassifier(folder, device)
    return Structure(folder, device) if purpose == "structure" else Clip(folder, device, purpose)
