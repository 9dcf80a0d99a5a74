"""The networks that iEdit's pairs are made with, each of any transformers checkpoint of its class: CLIP, a captioner (BLIP), CLIPSeg.

They are frozen, run in float32, and what one returns for a picture or a text depends on the batch that it is in only by rounding. How a
checkpoint is found and loaded serves the networks of `metric_models.py` too.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..runtime.errors import UsageError, first_line
from ..runtime.model.checkpoint import PICTUREBOOK, picturebook_folder, read_json, weights_of

_HUB_FILES = ("*.json", "*.txt", "*.safetensors")
_PARTS = {
    "clip": ("a CLIPModel", ("clip",), "openai/clip-vit-large-patch14"),
    "masks": ("a CLIPSegForImageSegmentation", ("clipseg",), "CIDAS/clipseg-rd64-refined"),
    "captions": ("an image-to-text model", (), "Salesforce/blip-image-captioning-large"),
    "pickscore": ("a CLIPModel", ("clip",), "yuvalkirstain/PickScore_v1"),
    "structure": ("a ViTModel", ("vit",), "facebook/dino-vitb8"),
    "classes": ("an image classifier", (), "google/vit-base-patch16-224"),
}  # what it is for -> what it has to be, its `model_type`s (none: any that transformers knows), an example
LONGEST_CAPTION = 40  # tokens


def find_model(name: str, purpose: str) -> Path:
    """The folder of a checkpoint: of a local path, of the embedded CLIP ("picturebook"), or of a hub id (fetched, or found in its cache).

    Args:
        purpose: "clip", "masks", "captions", "pickscore", "structure" or "classes".

    Raises:
        UsageError: there is none, or it is of another class; known from its config alone.
    """
    what, types, example = _PARTS[purpose]
    folder = Path(name).expanduser()
    if types == ("clip",) and name == PICTUREBOOK:
        folder = picturebook_folder() / "clip"
    elif not folder.is_dir():
        if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
            raise UsageError(f"{purpose}: {name} is not a folder; give the folder or the hub id of {what} ({example})")
        folder = _fetch(name, purpose)
    if not (folder / "config.json").is_file() or not weights_of(folder):
        raise UsageError(
            f"{purpose}: {folder} holds no config.json with weights beside it; give the folder of {what} ({example})"
        )
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in (types or _known_types(purpose)):
        raise UsageError(f"{purpose}: {folder} is of model_type {kind!r}, expected {what}, such as {example}")
    return folder


def _known_types(purpose: str) -> Sequence[str]:
    """The `model_type`s of which transformers has a captioner or an image classifier."""
    from transformers.models.auto import modeling_auto as auto

    if purpose == "captions":
        return tuple(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return tuple(auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)


def _fetch(name: str, purpose: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except Exception as error:
        raise UsageError(
            f"{purpose}: {name} is not a folder here and could not be fetched from the hub ({first_line(error)}); "
            "check the name, or download it where there is a network and give its folder"
        ) from error


def folder_digest(folder: Path) -> str:
    """sha256 over the configs, vocabularies and weights in a folder: 64 hex digits."""
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".txt", ".safetensors", ".bin")):
        with path.open("rb") as file:
            whole.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def file_digest(path: Path, purpose: str) -> str:
    """sha256 of a file: 64 hex digits.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{purpose}: {path} cannot be read ({error.strerror or error}); name a file") from None


def load_part(loader: Any, folder: Path, purpose: str, **settings: Any) -> Any:
    """`loader.from_pretrained` of a folder.

    Raises:
        UsageError: it cannot be loaded.
    """
    try:
        return loader.from_pretrained(folder, local_files_only=True, **settings)
    except Exception as error:  # transformers raises what it likes
        raise UsageError(
            f"{purpose}: {folder} cannot be loaded as {_PARTS[purpose][0]} ({first_line(error)}); fetch it again, or name another"
        ) from error


def load_network(loader: Any, folder: Path, purpose: str, device: str, **settings: Any) -> Any:
    """A network in float32, frozen, with all of its weights from a folder.

    Raises:
        UsageError: it cannot be loaded, the folder lacks a weight, or the device cannot be used.
    """
    import torch

    net, report = load_part(loader, folder, purpose, dtype=torch.float32, output_loading_info=True, **settings)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UsageError(
            f"{purpose}: {folder} lacks {len(missing)} of the weights of {_PARTS[purpose][0]} ({missing[0]}, ...)"
        )
    try:
        return net.to(device).eval().requires_grad_(False)
    except (RuntimeError, AssertionError) as error:  # the latter is what torch without CUDA raises
        raise UsageError(
            f"device: {device} cannot be used ({first_line(error)}); leave --device out, or say cpu"
        ) from error


class Clip:
    """A CLIPModel: pictures and texts to embeddings of length 1.

    Args:
        folder: of the model, its image processor and its tokenizer; a tokenizer may also lie beside it, as `tokenizer`, which is how the
            embedded model has it.
        purpose: what messages call it.
    """

    def __init__(self, folder: Path, device: str, purpose: str = "clip"):
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        self.device, self.net = device, load_network(CLIPModel, folder, purpose, device)
        self.processor = load_part(AutoImageProcessor, folder, purpose)
        own = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
        self.tokenizer = load_part(AutoTokenizer, folder if own else folder.parent / "tokenizer", purpose)
        self.length = int(self.net.config.text_config.max_position_embeddings)

    @property
    def logit_scale(self) -> float:
        """What the model multiplies cosines with: e to its `logit_scale`."""
        return float(self.net.logit_scale.detach().exp())

    def images(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """RGB pictures -> (B, D) float32, each of length 1."""
        return self._unit(self.image_features(pictures))

    def image_features(self, pictures: Sequence[Image.Image]) -> Any:
        """RGB pictures -> tensor (B, D) on the device, of the length that the model gives them."""
        import torch

        with torch.inference_mode():
            pixels = self.processor(images=list(pictures), return_tensors="pt").pixel_values.to(self.device)
            return self.net.visual_projection(self.net.vision_model(pixel_values=pixels).pooler_output)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> (B, D) float32, each of length 1; what is longer than the model's context is cut off."""
        import torch

        with torch.inference_mode():
            words = self.tokenizer(
                list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
            )
            output = self.net.text_model(
                input_ids=words.input_ids.to(self.device), attention_mask=words.attention_mask.to(self.device)
            )
            return self._unit(self.net.text_projection(output.pooler_output))

    @staticmethod
    def _unit(embeds: Any) -> np.ndarray:
        values: np.ndarray = embeds.cpu().numpy().astype(np.float32)
        return values / np.linalg.norm(values, axis=1, keepdims=True)


class Captioner:
    """An image-to-text model that describes a picture without being asked anything; the likeliest word is taken at each step."""

    def __init__(self, folder: Path, device: str):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.device, self.net = device, load_network(AutoModelForImageTextToText, folder, "captions", device)
        self.processor = load_part(AutoProcessor, folder, "captions")

    def captions(self, pictures: Sequence[Image.Image]) -> list[str]:
        """A caption for each RGB picture; one may be empty."""
        import torch

        with torch.inference_mode():
            inputs = self.processor(images=list(pictures), return_tensors="pt").to(self.device)
            ids = self.net.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=LONGEST_CAPTION)
        return [" ".join(text.split()) for text in self.processor.batch_decode(ids, skip_special_tokens=True)]


class Segmenter:
    """CLIPSeg: where in a picture what a text says is seen (iEdit section 3.4)."""

    def __init__(self, folder: Path, device: str):
        from transformers import AutoProcessor, CLIPSegForImageSegmentation

        self.device, self.net = device, load_network(CLIPSegForImageSegmentation, folder, "masks", device)
        self.processor = load_part(AutoProcessor, folder, "masks")
        self.length = int(self.net.config.text_config.max_position_embeddings)

    def masks(self, pictures: Sequence[Image.Image], texts: Sequence[str], threshold: float) -> list[np.ndarray]:
        """A mask for each picture and its text: (H, W) bool at the picture's size, where the sigmoid lies above `threshold`."""
        import torch
        from torch.nn import functional as F

        with torch.inference_mode():
            pixels = self.processor.image_processor(images=list(pictures), return_tensors="pt").pixel_values
            words = self.processor.tokenizer(
                list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
            )
            logits = self.net(
                input_ids=words.input_ids.to(self.device),
                attention_mask=words.attention_mask.to(self.device),
                pixel_values=pixels.to(self.device),
            ).logits
            shares = torch.sigmoid(logits.reshape(len(pictures), 1, *logits.shape[-2:]))
            return [
                (F.interpolate(one[None], size=picture.size[::-1], mode="bilinear")[0, 0] > threshold).cpu().numpy()
                for one, picture in zip(shares, pictures, strict=True)
            ]


_KINDS: dict[str, type[Clip] | type[Captioner] | type[Segmenter]] = {
    "clip": Clip, "captions": Captioner, "masks": Segmenter,
}  # fmt: skip


@functools.lru_cache(maxsize=len(_KINDS))
def load(name: str, purpose: str, device: str) -> Any:
    """The `Clip`, `Captioner` or `Segmenter` of a checkpoint; loaded once in a process.

    Raises:
        UsageError: as `find_model`, or it cannot be loaded.
    """
    return _KINDS[purpose](find_model(name, purpose), device)
