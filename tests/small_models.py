"""Random models of a few thousand weights, of the very classes that pairs and metrics are made with, saved with their processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = ("car", "boat", "bus", "dog", "wolf", "mouse", "man", "woman")
_SIDE = 32
_TOWER: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
_TEXT = _TOWER | {"num_hidden_layers": 2, "max_position_embeddings": 16}


def _tokenizer(folder: Path) -> Any:
    """A CLIPTokenizer that knows letters alone."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder)


def _ids(tokenizer: Any) -> dict[str, int]:
    return {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id}  # fmt: skip


def clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(1)
    tokenizer = _tokenizer(folder)
    vision = _TOWER | {"num_hidden_layers": 2, "image_size": _SIDE, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=_TEXT | _ids(tokenizer), vision_config=vision, projection_dim=12)).save_pretrained(
        folder
    )
    size = {"height": _SIDE, "width": _SIDE}
    CLIPImageProcessor(size={"shortest_edge": _SIDE}, crop_size=size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def clipseg(folder: Path) -> Path:
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, CLIPSegProcessor, ViTImageProcessor

    torch.manual_seed(2)
    tokenizer = _tokenizer(folder)
    vision = _TOWER | {"num_hidden_layers": 3, "image_size": _SIDE, "patch_size": 8}
    config = CLIPSegConfig(text_config=_TEXT | _ids(tokenizer), vision_config=vision, projection_dim=12, reduce_dim=8,
                           extract_layers=[0, 1, 2], decoder_num_attention_heads=2, decoder_intermediate_size=16)  # fmt: skip
    CLIPSegForImageSegmentation(config).save_pretrained(folder)
    CLIPSegProcessor(ViTImageProcessor(size={"height": _SIDE, "width": _SIDE}), tokenizer).save_pretrained(folder)
    return folder


def blip(folder: Path) -> Path:
    """Its captions are words of `WORDS`, as many as it is asked for."""
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    torch.manual_seed(3)
    folder.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *WORDS]))
    tokenizer = BertTokenizer.from_pretrained(folder)
    text = _TEXT | {"max_position_embeddings": 64, "vocab_size": len(special) + len(WORDS) + 1, "bos_token_id": len(special) + len(WORDS), "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0,
                    "encoder_hidden_size": 16, "projection_dim": 12, "initializer_range": 1.0}  # fmt: skip
    vision = _TOWER | {"num_hidden_layers": 2, "image_size": _SIDE, "patch_size": 8, "initializer_range": 1.0}
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=12, image_text_hidden_size=12)
    net = BlipForConditionalGeneration(config)
    with torch.no_grad():
        net.text_decoder.cls.predictions.bias[: len(special)] = -1000.0
        net.text_decoder.cls.predictions.bias[-1] = -1000.0
    net.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": _SIDE, "width": _SIDE}), tokenizer).save_pretrained(folder)
    return folder


def vit(folder: Path) -> Path:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(4)
    config = ViTConfig(**_TOWER, num_hidden_layers=2, image_size=_SIDE, patch_size=8, initializer_range=0.3)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": _SIDE, "width": _SIDE}).save_pretrained(folder)
    return folder


def classifier(folder: Path, labels: tuple[str, ...] = ("tench, Tinca tinca", *WORDS)) -> Path:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(5)
    names = dict(enumerate(labels))
    config = ViTConfig(**_TOWER, num_hidden_layers=1, image_size=_SIDE, patch_size=8, id2label=names, label2id={n: i for i, n in names.items()},
                       initializer_range=0.5)  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": _SIDE, "width": _SIDE}).save_pretrained(folder)
    return folder
