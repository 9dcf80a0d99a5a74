"""Metrics by networks against other implementations, on small random models of the right classes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from iedit.runtime.errors import UsageError
from iedit.training import metric_models
from iedit.training.metric_models import ImageClassifier, Lpips, Structure, blackened, load

TEXTS = ["red car", "boat", "a dog and a man", "blue"]
MEAN = STD = 0.5  # of `ViTImageProcessor`


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, small_models: Any) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("clip", "clipseg", "vit", "classifier"):
        getattr(small_models, name)(folder / name)
    return folder


def pictures(seed: int, count: int = 4, side: int = 64) -> list[Image.Image]:
    values = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return [Image.fromarray(v).resize((side, side), Image.Resampling.BILINEAR) for v in values]


# --- CLIP ---------------------------------------------------------------------------------------------------------


def test_clip_scores_are_transformers_own_logits_by_the_published_formulas(models: Path) -> None:
    from transformers import AutoProcessor, CLIPModel

    clip = load(str(models / "clip"), "clip", "cpu")
    net, processor = CLIPModel.from_pretrained(models / "clip"), AutoProcessor.from_pretrained(models / "clip")
    shown = pictures(0)
    inputs = processor(
        text=TEXTS, images=shown, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = net(**inputs).logits_per_image.diagonal().double().numpy()
        scale = net.logit_scale.exp().item()
    assert np.allclose(metric_models.pick_score(clip, shown, TEXTS), logits, rtol=1e-4)
    assert np.allclose(metric_models.clip_score(clip, shown, TEXTS), 2.5 * np.maximum(logits / scale, 0), rtol=1e-4)
    assert np.allclose(
        metric_models.clip_similarity(clip, shown, TEXTS), 100 * np.maximum(logits / scale, 0), rtol=1e-4
    )
    assert 0 < (logits < 0).sum() < 4  # one that is cut off at 0, one that is not


# --- classifier ---------------------------------------------------------------------------------------------------


def test_the_classifier_s_verdict_is_the_largest_logit_among_those_that_compete(models: Path) -> None:
    from transformers import AutoImageProcessor, ViTForImageClassification

    judge: ImageClassifier = load(str(models / "classifier"), "classes", "cpu")
    net = ViTForImageClassification.from_pretrained(models / "classifier")
    shown = pictures(1, 8)
    with torch.no_grad():
        logits = net(**AutoImageProcessor.from_pretrained(models / "classifier")(shown, return_tensors="pt")).logits
    assert judge.classes(shown) == logits.argmax(1).tolist()
    some = sorted(set(range(9)) - set(logits.argmax(1).tolist()))  # none of those that won
    assert judge.classes(shown, some) == [max(some, key=lambda c: row[c].item()) for row in logits]
    assert [judge.number(n) for n in ("tench", "Tinca tinca", "tench, tinca tinca", "0", "Boat")] == [0, 0, 0, 0, 2]
    with pytest.raises(UsageError, match="has no class 'cat'; its first are tench, Tinca tinca, car, boat, bus"):
        judge.number("cat")


# --- structure ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_the_structure_distance_is_the_formula_of_a_transformer_written_out_in_numpy(
    models: Path, scale: float
) -> None:
    from safetensors.numpy import load_file

    weights = {k: v.astype(np.float64) for k, v in load_file(models / "vit" / "model.safetensors").items()}

    def named(*endings: str) -> np.ndarray:
        (found,) = [v for k, v in weights.items() if k.endswith(endings)]
        return found

    def norm(x: np.ndarray, layer: int, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * named(f"layer.{layer}.{name}.weight", f"layers.{layer}.{name}.weight") + named(
            f"layer.{layer}.{name}.bias", f"layers.{layer}.{name}.bias"
        )

    def linear(x: np.ndarray, layer: int, *names: str) -> np.ndarray:
        endings = [tuple(f"{n}.{part}" for n in (f"{layer}.{m}" for m in names)) for part in ("weight", "bias")]
        return x @ named(*endings[0]).T + named(*endings[1])

    def similarities(picture: Image.Image) -> np.ndarray:
        x = np.asarray(picture, np.float64) * scale / 255
        x = (x - MEAN) / STD
        patches = x.reshape(4, 8, 4, 8, 3).transpose(0, 2, 4, 1, 3).reshape(16, -1)
        kernel = named("patch_embeddings.projection.weight")
        tokens = patches @ kernel.reshape(len(kernel), -1).T + named("patch_embeddings.projection.bias")
        x = np.concatenate([named("cls_token")[0], tokens]) + named("position_embeddings")[0]
        for layer in range(2):
            y = norm(x, layer, "layernorm_before")
            keys = linear(y, layer, "attention.attention.key", "attention.k_proj")
            if layer == 1:
                break
            heads = [
                linear(y, layer, *n).reshape(17, 2, 8)
                for n in (
                    ("attention.attention.query", "attention.q_proj"),
                    ("attention.attention.key", "attention.k_proj"),
                    ("attention.attention.value", "attention.v_proj"),
                )
            ]
            scores = np.einsum("qhd,khd->hqk", heads[0], heads[1]) / np.sqrt(8)
            share = np.exp(scores - scores.max(-1, keepdims=True))
            y = np.einsum("hqk,khd->qhd", share / share.sum(-1, keepdims=True), heads[2]).reshape(17, 16)
            x = x + linear(y, layer, "attention.output.dense", "attention.o_proj")
            y = linear(norm(x, layer, "layernorm_after"), layer, "intermediate.dense", "mlp.fc1")
            from scipy.special import erf

            x = x + linear(y * (1 + erf(y / np.sqrt(2))) / 2, layer, "output.dense", "mlp.fc2")
        keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
        product: np.ndarray = keys @ keys.T
        return product

    one, other = pictures(4, 2, 32), pictures(5, 2, 32)
    structure = Structure(models / "vit", "cpu", scale)
    got = structure.distances(one, other)
    want = [((similarities(a) - similarities(b)) ** 2).mean() for a, b in zip(one, other, strict=True)]
    assert got == pytest.approx(want, rel=1e-4)
    assert structure.distances(one, one) == [0, 0] and min(got) > 1e-4
    assert structure.similarities(one).shape == (2, 17, 17)


# --- LPIPS --------------------------------------------------------------------------------------------------------


class Fire(nn.Module):
    """SqueezeNet's module as torchvision writes it."""

    def __init__(self, channels: int, squeezed: int, one: int, three: int):
        super().__init__()
        self.squeeze, self.squeeze_activation = nn.Conv2d(channels, squeezed, kernel_size=1), nn.ReLU(inplace=True)
        self.expand1x1, self.expand1x1_activation = nn.Conv2d(squeezed, one, kernel_size=1), nn.ReLU(inplace=True)
        self.expand3x3, self.expand3x3_activation = (
            nn.Conv2d(squeezed, three, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        return torch.cat(
            [self.expand1x1_activation(self.expand1x1(x)), self.expand3x3_activation(self.expand3x3(x))], 1
        )


def torchvision_features(net: str) -> nn.Sequential:
    """`torchvision.models.NET().features`, which is not installed here, from its documented layers; random weights."""
    torch.manual_seed(6)
    if net == "alexnet":
        return nn.Sequential(
            nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(64, 192, kernel_size=5, padding=2), nn.ReLU(), nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(192, 384, kernel_size=3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, kernel_size=3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(kernel_size=3, stride=2),
        )  # fmt: skip
    if net == "squeezenet1_1":
        return nn.Sequential(
            nn.Conv2d(3, 64, kernel_size=3, stride=2), nn.ReLU(), nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
            Fire(64, 16, 64, 64), Fire(128, 16, 64, 64), nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
            Fire(128, 32, 128, 128), Fire(256, 32, 128, 128), nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
            Fire(256, 48, 192, 192), Fire(384, 48, 192, 192), Fire(384, 64, 256, 256), Fire(512, 64, 256, 256),
        )  # fmt: skip
    layers: list[nn.Module] = []
    channels = 3
    for v in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
        if isinstance(v, str):
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
        else:
            layers += [nn.Conv2d(channels, v, kernel_size=3, padding=1), nn.ReLU(inplace=True)]
            channels = v
    return nn.Sequential(*layers)


@pytest.mark.parametrize(("net", "name"), [("alex", "alexnet"), ("vgg", "vgg16"), ("squeeze", "squeezenet1_1")])
def test_lpips_is_torchmetrics_lpips_of_the_same_weights(
    net: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchmetrics.functional.image import lpips as reference

    features = torchvision_features(name)
    torch.save(
        {f"features.{k}": v for k, v in features.state_dict().items()} | {"classifier.0.bias": torch.ones(2)},
        tmp_path / "net.pth",
    )
    monkeypatch.setattr(
        reference, "_get_tv_model_features", lambda wanted, pretrained=False: features if wanted == name else None
    )
    a, b = torch.rand(2, 2, 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    want = reference._LPIPS(net=net)(a, b).flatten()
    ours = Lpips(tmp_path / "net.pth")
    assert ours.kind == net
    assert ours(a, b).tolist() == pytest.approx(want.tolist(), rel=1e-4)
    assert ours(a, a).tolist() == [0, 0]
    with pytest.raises(UsageError, match=r"expected one size"):
        ours(a, b[..., :32])
    with pytest.raises(UsageError, match=r"64x16, expected sides of at least 32 pixels"):
        ours(a[..., :16, :], b[..., :16, :])


# --- features -----------------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """What Inception's TorchScript takes and returns, in small."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return torch.cat((x.double().mean((2, 3)), x.double().var((2, 3))), 1)


def test_inception_s_torchscript_is_given_every_picture_in_its_own_size_and_0_to_255(tmp_path: Path) -> None:
    path = tmp_path / "inception.pt"
    with pytest.warns(DeprecationWarning):
        torch.jit.script(Pooled()).save(str(path))
    shown = [*pictures(7, 2, 48), *pictures(8, 1, 32)]
    got = load(str(path), "features", "cpu")(shown)
    values = [np.asarray(p, np.float64).reshape(-1, 3) for p in shown]
    assert got == pytest.approx(np.stack([[*v.mean(0), *v.var(0, ddof=1)] for v in values]), rel=1e-4)


def test_clip_features_have_the_length_that_the_model_gives_them(models: Path) -> None:
    from transformers import CLIPModel

    shown = pictures(9)
    got = load(str(models / "clip"), "features", "cpu")(shown)
    clip = load(str(models / "clip"), "clip", "cpu")
    pixels = clip.processor(images=shown, return_tensors="pt").pixel_values
    with torch.no_grad():
        want = CLIPModel.from_pretrained(models / "clip").get_image_features(pixels)
    want = getattr(want, "pooler_output", want)  # a tensor before transformers 5
    assert np.allclose(got, want, rtol=1e-4, atol=1e-6)
    assert np.allclose(got / np.linalg.norm(got, axis=1, keepdims=True), clip.images(shown), atol=1e-6)


# --- what is wrong ------------------------------------------------------------------------------------------------


def test_a_mask_blackens_what_it_does_not_keep_and_one_that_leaves_nothing_is_refused() -> None:
    picture = pictures(2, 1, 16)[0]
    keep = np.zeros((16, 16), bool)
    keep[:, :4] = True
    shown = np.asarray(blackened(picture, keep))
    assert (shown[:, :4] == np.asarray(picture)[:, :4]).all() and not shown[:, 4:].any()
    with pytest.raises(UsageError, match="leaves nothing of the picture"):
        blackened(picture, np.zeros((16, 16), bool))
    with pytest.raises(UsageError, match="it is 8x16 and the picture 16x16"):
        blackened(picture, keep[:, :8])


def test_what_is_no_such_network_is_one_line(models: Path, tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.pt").write_text("no program")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    weights = {f"features.{k}": v for k, v in torchvision_features("alexnet").state_dict().items()}
    del weights["features.3.bias"]
    torch.save(weights, tmp_path / "part.pth")
    broken = shutil.copytree(models / "vit", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"")
    for name, purpose, says in (
        (tmp_path / "missing.pth", "lpips", "missing.pth is not there"),
        (tmp_path / "text.pth", "lpips", "text.pth cannot be read"),
        (tmp_path / "list.pth", "lpips", "list.pth holds a list, expected weights by name"),
        (tmp_path / "other.pth", "lpips", "other.pth holds no AlexNet, VGG-16 or SqueezeNet 1.1"),
        (tmp_path / "part.pth", "lpips", "features.3.bias is missing, expected (192,)"),
        (tmp_path / "text.pt", "features", "text.pt is no TorchScript"),
        (tmp_path / "missing.pt", "features", "missing.pt is not there; give Inception's TorchScript"),
        (models / "clip", "structure", "is of model_type 'clip', expected a ViTModel, such as facebook/dino-vitb8"),
        (models / "clipseg", "classes", "is of model_type 'clipseg', expected an image classifier, such as google/"),
        (
            models / "vit",
            "pickscore",
            "is of model_type 'vit', expected a CLIPModel, such as yuvalkirstain/PickScore_v1",
        ),
        (models / "vit", "classes", "lacks 2 of the weights of an image classifier"),
        (broken, "structure", "cannot be loaded as a ViTModel"),
    ):
        with pytest.raises(UsageError) as error:
            load(str(name), purpose, "cpu")
        assert says in str(error.value) and "\n" not in str(error.value), error.value
    clip = load(str(models / "clip"), "clip", "cpu")
    with pytest.raises(UsageError, match="2 pictures and 1 texts, expected one for each"):
        metric_models.clip_score(clip, pictures(0, 2), ["one"])
