"""What is measured of an edit against torchmetrics and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from iedit.runtime.errors import UsageError
from iedit.training import figures


def picture(seed: int, side: int = 40) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((side, side))


def test_pie_bench_s_figures_are_torchmetrics_of_blackened_pictures_and_iedit_s_the_map_s_means() -> None:
    a = picture(1)
    b = Image.blend(a, picture(2), 0.3)
    mask = np.zeros((40, 40), bool)
    mask[5:30, 10:25] = True
    found = figures.picture_figures(a, b, mask)
    x, y = (torch.from_numpy(np.asarray(p, np.float32) / 255 * ~mask[..., None]).permute(2, 0, 1)[None] for p in (a, b))
    similar = structural_similarity_index_measure(x, y, data_range=1.0)
    assert isinstance(similar, torch.Tensor)
    assert found["ssim_kept"] == pytest.approx(similar.item(), rel=1e-4)
    assert found["psnr_kept"] == pytest.approx(peak_signal_noise_ratio(x, y, data_range=1.0).item(), rel=1e-4)
    assert found["mse_kept"] == pytest.approx(((x - y) ** 2).mean().item(), rel=1e-4)
    one, other = (torch.from_numpy(np.asarray(p, np.float32) / 255).permute(2, 0, 1)[None] for p in (a, b))
    _, shown = structural_similarity_index_measure(one, other, data_range=1.0, return_full_image=True)
    full = shown.mean(1)[0].numpy()
    assert found["ssim_m"] == pytest.approx(full[mask].mean(), rel=1e-4)
    assert found["ssim_not_m"] == pytest.approx(full[~mask].mean(), rel=1e-4)
    assert found["l1_not_m"] == pytest.approx(
        np.abs(np.asarray(a, float) - np.asarray(b, float))[~mask].mean() / 255, rel=1e-4
    )
    nothing = figures.picture_figures(a, b, np.ones((40, 40), bool))
    assert math.isnan(nothing["psnr_kept"]) and math.isnan(nothing["ssim_not_m"]) and math.isfinite(nothing["ssim_m"])
    with pytest.raises(UsageError, match="the mask is 8x40 and its picture 40x40"):
        figures.picture_figures(a, b, mask[:, :8])


def test_networks_measure_what_is_named_and_nothing_where_a_mask_leaves_nothing() -> None:
    cases = [
        figures.Case(f"{i}", "all", told, "a red car", "d", (40, 40))
        for i, told in enumerate(("a blue car", "", "a tree"))
    ]
    sources, edited = [picture(i) for i in range(3)], [picture(i + 5) for i in range(3)]
    half = np.zeros((40, 40), bool)
    half[:20] = True
    masks = [half, np.zeros((40, 40), bool), None]
    assert figures.network_figures(cases, sources, edited, masks, figures.Judges()) == [{}, {}, {}]
    judges = figures.Judges(clip="picturebook", pickscore="picturebook")
    found = figures.network_figures(cases, sources, edited, masks, judges)
    assert [math.isnan(row["clip_source"]) for row in found] == [False, True, False]  # no source prompt
    assert [math.isnan(row["clip_edited"]) for row in found] == [False, True, True]
    clip = judges.load("clip")
    cosines = [float((clip.images([p]) @ clip.texts(["a red car"]).T).item()) for p in edited]
    assert [row["clip_score"] for row in found] == pytest.approx([2.5 * max(c, 0) for c in cosines], rel=1e-4)
    assert [row["pickscore"] for row in found] == pytest.approx([c * clip.logit_scale for c in cosines], rel=1e-4)
    black = Image.fromarray(np.asarray(edited[0]) * half[..., None].astype(np.uint8))
    cosine = float((clip.images([black]) @ clip.texts(["a red car"]).T).item())
    assert found[0]["clip_edited"] == pytest.approx(100 * max(cosine, 0), rel=1e-4, abs=1e-6)
    assert set(judges.digests()) == {"clip", "pickscore"}
    with pytest.raises(UsageError, match=r"lpips: none\.pth cannot be read"):
        figures.Judges(lpips="none.pth").digests()
