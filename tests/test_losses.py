"""iEdit's losses against each equation written out in NumPy's float64, and where their gradients go."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from iedit.training import losses

B, C, H, W = 3, 4, 6, 5
ABAR = torch.tensor([0.9991, 0.5, 0.0047], dtype=torch.float64)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masks(height: int = H, width: int = W) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(5)
    return tuple((torch.rand((B, 1, height, width), generator=rng) > 0.5).double() for _ in range(2))  # type: ignore[return-value]


def by_sample(make: Any) -> np.ndarray:
    return np.array([make(i) for i in range(B)])


def close(got: Tensor, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-12, atol=1e-12)


def test_equations_2_3_and_7() -> None:
    z1, z2, e = draw(3, B, C, H, W)
    z_t = losses.noised_latent(z1, e, ABAR)
    a = ABAR.numpy()
    n1, n2, ne = z1.numpy(), z2.numpy(), e.numpy()
    want = by_sample(lambda i: math.sqrt(a[i]) * n1[i] + math.sqrt(1 - a[i]) * ne[i])
    close(z_t, want)
    close(
        losses.target_noise(z_t, z2, ABAR),
        by_sample(lambda i: (want[i] - math.sqrt(a[i]) * n2[i]) / math.sqrt(1 - a[i])),
    )
    close(losses.predicted_latent(z_t, e, ABAR), n1)
    # The two are each other's inverse: the pseudo-target is what its own noise leads to.
    close(losses.predicted_latent(z_t, losses.target_noise(z_t, z2, ABAR), ABAR), n2)


def test_equation_4() -> None:
    p, e2 = draw(2, B, C, H, W)
    close(losses.paired_loss(p, e2), by_sample(lambda i: np.mean((e2.numpy()[i] - p.numpy()[i]) ** 2)))


def test_equations_8_and_9_with_overlap_and_gap() -> None:
    (p, e1, e2), (m1, m2) = draw(3, B, C, H, W), masks()
    fg, bg = losses.mask_loss(p, e1, e2, m1, m2)
    n1, n2 = m1.numpy(), m2.numpy()
    close(fg, by_sample(lambda i: np.mean((e2.numpy()[i] * n2[i] - p.numpy()[i] * n2[i]) ** 2)))
    close(bg, by_sample(lambda i: np.mean((e1.numpy()[i] * (1 - n1[i]) - p.numpy()[i] * (1 - n1[i])) ** 2)))
    both, neither = losses.mask_overlap(m1, m2)
    close(both, by_sample(lambda i: np.mean((n2[i] == 1) & (n1[i] == 0))))
    close(neither, by_sample(lambda i: np.mean((n2[i] == 0) & (n1[i] == 1))))


def test_equations_5_and_11() -> None:
    a, b = draw(2, B, 16)
    x, y = a.numpy(), b.numpy()
    close(
        losses.clip_distance(a, b), by_sample(lambda i: 1 - x[i] @ y[i] / np.linalg.norm(x[i]) / np.linalg.norm(y[i]))
    )
    close(losses.clip_distance(a, 3 * a), np.zeros(B))


def test_equation_10_compares_what_is_inside_the_masks_and_nothing_else() -> None:
    (x1, x2), (m1, m2) = draw(2, B, 3, 8, 8).tanh(), masks(8, 8)
    features = lambda x: x**3 + x.mean(dim=(2, 3), keepdim=True)  # noqa: E731
    f = lambda v: v**3 + v.mean(axis=(1, 2), keepdims=True)  # noqa: E731
    n = [v.numpy() for v in (x1, x2, m1, m2)]
    want = by_sample(lambda i: np.mean((f((n[0][i] + 1) * n[2][i] - 1) - f((n[1][i] + 1) * n[3][i] - 1)) ** 2))
    close(losses.perceptual_loss(features, x1, x2, m1, m2), want)
    outside = x1 + 5 * (1 - m1)
    close(losses.perceptual_loss(features, outside, x2, m1, m2), want)


def test_equation_12_weights_each_sample_by_its_own_timestep() -> None:
    noise, one, two, three = draw(4, B).abs()
    t = torch.tensor([1, 500, 999])
    s = t.numpy() / 1000
    n = [v.numpy() for v in (noise, one, two, three)]
    want = np.mean((1 - s) * (n[2] + n[1]) + s * n[0] + 0.1 * n[3])
    got = losses.total_loss(losses.Terms(noise, one, two, three), t, 1000)
    assert got.item() == pytest.approx(want, rel=1e-12)
    assert losses.total_loss(losses.Terms(noise), t, 1000).item() == pytest.approx(np.mean(s * n[0]), rel=1e-12)


def test_the_noise_of_the_first_timestep_does_not_blow_up_a_step() -> None:
    from iedit.training.embed import new_scheduler

    alphas = new_scheduler().alphas_cumprod.double()
    z1, z2, e = draw(3, 64, C, H, W)
    t = torch.arange(1, 1000, 16)[:64]
    t[0] = 1
    abar = alphas[t]
    e2 = losses.target_noise(losses.noised_latent(z1[: len(t)], e[: len(t)], abar), z2[: len(t)], abar)
    assert e2[0].std() > 25  # 34 with z2 - z1 of that size
    per_sample = losses.paired_loss(torch.zeros_like(e2), e2)
    weighted = losses.total_loss(losses.Terms(per_sample[:1]), t[:1], 1000)
    assert per_sample[0] > 600 and weighted < 2  # a batch of one


# --- where gradients go -------------------------------------------------------------------------------------------


def tiny_clip() -> tuple[Any, Any]:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=shared | {"vocab_size": 100, "max_position_embeddings": 16, "bos_token_id": 98, "eos_token_id": 99},
        vision_config=shared | {"image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return CLIPModel(config), processor


def test_gradients_reach_the_picture_through_clip_and_vgg_and_neither_learns() -> None:
    clip, processor = tiny_clip()
    embedder, vgg = losses.ClipEmbedder(clip, processor), losses.VggFeatures(widths=(8, 8, 0, 8))
    image = draw(B, 3, 48, 40).float().tanh().requires_grad_()
    ids = torch.tensor([[98, 5, 6, 99]] * B)
    m1, m2 = (m.float() for m in masks(48, 40))
    target = draw(B, 3, 48, 40, seed=3).float().tanh().requires_grad_()
    local = losses.clip_distance(embedder.images(losses.masked_picture(image, m1)), embedder.texts(ids))
    (gradient,) = torch.autograd.grad(local.sum(), image, retain_graph=True)
    assert gradient.abs().sum() > 0
    assert torch.count_nonzero(gradient * (1 - m1)) == 0  # nothing outside the mask
    losses.perceptual_loss(vgg, image, target, m1, m2).sum().backward()
    assert image.grad is not None and image.grad.abs().sum() > 0 and torch.count_nonzero(image.grad * (1 - m1)) == 0
    assert target.grad is None
    assert all(p.grad is None and not p.requires_grad for p in (*clip.parameters(), *vgg.parameters()))


@pytest.mark.parametrize("size", [(48, 40), (32, 32), (30, 70)])
def test_pictures_are_prepared_as_clip_s_own_processor_does(size: tuple[int, int]) -> None:
    clip, processor = tiny_clip()
    rng = np.random.default_rng(0)
    cells = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    want = processor(images=[cells], return_tensors="pt").pixel_values
    tensor = torch.from_numpy(np.asarray(cells).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    got = losses.ClipEmbedder(clip, processor).prepare(tensor)
    assert got.shape == want.shape
    # The processor resizes in two passes and rounds to whole levels after each; the second multiplies the first's half level by the sum
    # of the absolute weights of a bicubic, 1.3 or so. Two levels, in units of the smallest standard deviation.
    assert (got - want).abs().max() < 2 / 255 / 0.26


def test_embeddings_are_those_of_the_model(tmp_path: Path) -> None:
    clip, processor = tiny_clip()
    embedder = losses.ClipEmbedder(clip, processor)
    pixels, ids = draw(2, 3, 32, 32).float(), torch.tensor([[98, 5, 6, 99], [98, 7, 99, 99]])
    with torch.no_grad():
        whole = clip(input_ids=ids, pixel_values=embedder.prepare(pixels))
        image, text = embedder.images(pixels), embedder.texts(ids)
    torch.testing.assert_close(torch.nn.functional.normalize(image), whole.image_embeds, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.nn.functional.normalize(text), whole.text_embeds, rtol=1e-5, atol=1e-6)


def test_vgg_is_read_by_torchvision_s_names_and_is_relu3_3(tmp_path: Path) -> None:
    made = losses.VggFeatures()
    weights = dict(made.state_dict()) | {"features.17.weight": torch.zeros(1), "classifier.0.weight": torch.zeros(1)}
    save_file(weights, tmp_path / "vgg.safetensors")
    torch.save(weights, tmp_path / "vgg16.pth")
    image = draw(1, 3, 16, 16).float().tanh()
    want = made(image)
    assert want.shape == (1, 256, 4, 4) and want.min() == 0  # after the activation
    for name in ("vgg.safetensors", "vgg16.pth"):
        assert torch.equal(losses.VggFeatures.load(tmp_path / name)(image), want)
    # By hand, with the normalisation that torchvision's weights were trained with.
    x = ((image + 1) / 2 - torch.tensor(losses.VGG_MEAN).view(1, 3, 1, 1)) / torch.tensor(losses.VGG_STD).view(
        1, 3, 1, 1
    )
    for index in (0, 2, 5, 7, 10, 12, 14):
        if index in (5, 10):
            x = torch.nn.functional.max_pool2d(x, 2)
        x = torch.nn.functional.conv2d(
            x, weights[f"features.{index}.weight"], weights[f"features.{index}.bias"], padding=1
        ).relu()
    assert torch.equal(x, want)


def test_what_is_no_vgg_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"vgg: .*none.pth is not there"):
        losses.VggFeatures.load(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"vgg: .*text.pth cannot be read"):
        losses.VggFeatures.load(tmp_path / "text.pth")
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"vgg: features.0.bias is not there, expected \(64,\)"):
        losses.VggFeatures.load(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"vgg: features.0.weight is \(8, 3, 3, 3\), expected \(64, 3, 3, 3\)"):
        losses.VggFeatures(losses.VggFeatures(widths=(8,)).state_dict())
