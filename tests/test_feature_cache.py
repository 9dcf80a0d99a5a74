"""The prototype of feature caching in `bench/feature_cache.py`: what a shallow step is, when it is taken, and what is counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from iedit.runtime.backends.eager import TorchBackend
from iedit.runtime.editor import Editor, EditRequest, MaskOptions, Options
from iedit.runtime.stage_cache import StageCache
from iedit.training import classifier, truth

Picture = Callable[..., Image.Image]
STEPS, GUIDED = 6, 3


@pytest.fixture
def caching(bench: Callable[[str], ModuleType]) -> Any:
    return bench("feature_cache")


@pytest.fixture(scope="module")
def four_levels() -> Any:
    """A UNet with the blocks of Stable Diffusion 1.5: two layers a block on the way down, attention but at the deepest level."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 8, 16, 16), layers_per_block=2, cross_attention_dim=12, attention_head_dim=2, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )  # fmt: skip
    return unet.eval()


@torch.no_grad()
@pytest.mark.parametrize("which", ["tiny", "four_levels"])
def test_a_shallow_step_on_the_same_input_answers_as_the_whole_network_bit_for_bit(
    caching: Any, which: str, request: pytest.FixtureRequest
) -> None:
    unet = request.getfixturevalue(which)
    unet = getattr(unet, "unet", unet)
    width, side = unet.config.cross_attention_dim, unet.config.sample_size
    x, t, text = torch.randn(2, 4, side, side), torch.tensor([7, 700]), torch.randn(2, 5, width)
    layers = sum(len(block.resnets) for block in unet.up_blocks)
    assert set(caching.depths(unet).values()) < set(range(1, layers + 1))
    for number in range(1, layers + 1):
        shallow = caching.Shallow(unet, number)
        whole, kept = shallow.keeping(lambda: unet(x, t, text).sample)
        assert torch.equal(shallow(x, t, text, kept), whole), number
        moved = shallow(x, t, text, kept + 1)  # what is kept matters, and so does what is computed
        assert not torch.allclose(moved, whole) and not torch.allclose(shallow(x + 1, t, text, kept), whole)
    with pytest.raises(ValueError, match="expected 1 to"):
        caching.Shallow(unet, layers + 1)


def asked(picture: Picture) -> EditRequest:
    options = Options(
        guidance_scale=5.0, lam=0.6, guidance_until=GUIDED / STEPS, guidance_path="drawn", mask=MaskOptions(seeds=2)
    )
    return EditRequest(picture(0), "a blue house on sand", "a red car on grass", steps=STEPS, options=options)


def test_interval_1_is_the_plain_edit_bit_for_bit_and_a_longer_one_is_not(
    caching: Any, tiny: Any, picture: Picture
) -> None:
    plain = Editor(tiny, TorchBackend(tiny), cache=StageCache(memory=0), share=False).edit(asked(picture))
    every = caching.DENOISING + caching.INVERSION
    latents = {
        i: caching.CountingEditor(tiny, caching.Variant("fast", i, "1 block", every)).edit(asked(picture)).latent
        for i in (1, 2, 3)
    }
    assert torch.equal(latents[1], plain.latent)
    assert not torch.equal(latents[2], plain.latent) and not torch.equal(latents[2], latents[3])


@pytest.mark.parametrize(
    ("interval", "inverts", "full", "shallow"),
    [
        (1, True, 4 + 6 + 2 * 9, 0),
        (
            2,
            False,
            4 + 6 + 2 * (2 + 2 + 1),
            2 * (2 + 1 + 1),
        ),  # of steps 1-6 the first three count twice; 1, 3, 5 are full
        (3, False, 4 + 6 + 2 * (2 + 1), 2 * (2 + 2 + 1 + 1)),
        (3, True, 4 + 2 + 2 * (2 + 1), 4 + 2 * (2 + 2 + 1 + 1)),
        (9, True, 4 + 1 + 2 * 2, 5 + 2 * (2 + 2 + 1 + 1 + 1)),
    ],
)
def test_every_so_many_steps_of_a_stage_one_is_full(
    caching: Any, tiny: Any, picture: Picture, interval: int, inverts: bool, full: int, shallow: int
) -> None:
    stages = caching.DENOISING + (caching.INVERSION if inverts else ())
    editor = caching.CountingEditor(tiny, caching.Variant("fast", interval, "1 layer", stages))
    result = editor.edit(asked(picture))
    assert editor.denoiser.rows == {"full": full, "shallow": shallow}
    assert sum(result.profile.evaluations.values()) == full + shallow


def test_where_guidance_has_ended_the_features_of_its_second_half_go_on(
    caching: Any, tiny: Any, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Tensor] = []
    forward = caching.Shallow.forward

    def watched(self: Any, x: Tensor, t: Tensor, text: Tensor, kept: Tensor) -> Tensor:
        taken.append(kept)
        return forward(self, x, t, text, kept)

    monkeypatch.setattr(caching.Shallow, "forward", watched)
    editor = caching.CountingEditor(tiny, caching.Variant("fast", 9, "1 block", ("final",)))
    other = dataclasses.replace(asked(picture), prompt="a red tree")
    editor.edit_many([asked(picture), other])
    assert [len(k) for k in taken] == [4, 4, 2, 2, 2]  # two edits
    assert all(torch.equal(k, taken[0][-len(k) :]) for k in taken)
    assert not torch.equal(taken[0][:2], taken[0][2:])


def test_differences_are_of_the_same_cases(caching: Any) -> None:
    def rows(*values: float) -> list[dict[str, Any]]:
        return [{"kind": "thing", "number": i, "new": v} for i, v in enumerate(values)]

    mean, low, high = caching.paired(rows(1, 0, 1, 0)[::-1], rows(1, 1, 1, 0), "new")
    assert mean == -0.25 and low == -0.75 and high == 0.0
    with pytest.raises(KeyError):
        caching.paired(rows(1, 0, 1), rows(1, 0), "new")


def test_the_command_writes_its_tables_into_a_document_and_repeats_nothing(
    caching: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {
        name: [{"depth": d, "flops": 0.3, "full": 2.0, "shallow": 0.5} for d in caching.depths(tiny.unet)]
        for name in ("embedded", "sd15")
    }
    monkeypatch.setattr(caching, "all_costs", lambda *_: found)
    monkeypatch.setattr(caching, "load_model", lambda **_: tiny)
    monkeypatch.setattr(truth, "crispness", lambda *_: 20.0)
    monkeypatch.setattr(truth, "TEXT_KINDS", ("thing",))
    classifier.Classifier().save(tmp_path / "reader.safetensors")
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- feature-cache -->\nold\n<!-- /feature-cache -->\nafter\n")
    words = ["--reader", tmp_path / "reader.safetensors", "--n", 1, "--preset", "faster", "--interval", 3, "--depth", "1 block",
             "--output", tmp_path / "out", "--write", document]  # fmt: skip
    done = CliRunner().invoke(caching.main, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0 and "3 of 3" in done.output, done.output
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    # 12 steps, 5 of them guided, full at 1, 4, 7, 10: 8 for the mask, then 12 + 2 * 17, of which 12 + 2 * 6 and 4 + 2 * 6 are full.
    assert "| faster | 54 (54) | 1 / 3.1 |" in text
    assert f"| faster, interval 3, 1 block, denoising | {32 + 22 / 4:.0f} (38) | 1 / 4.5 |" in text
    assert f"| faster, interval 3, 1 block, denoising and inversion | {24 + 30 / 4:.0f} (32) | 1 / 5.4 |" in text
    assert (
        text.count("| thing (1) |") == 3 and "of 2000 ms" not in text
    )  # what the depths cost is told where there are several
    assert "| 1 block | 0.30 | 0.25 (500 of 2000 ms) | - | 0.30 | 0.25 (500 of 2000 ms) |" in caching.cost_table(found)
    monkeypatch.setattr(Editor, "edit_many", lambda *_, **__: pytest.fail("it was edited again"))
    again = CliRunner().invoke(caching.main, list(map(str, words)), catch_exceptions=False)
    assert again.exit_code == 0
    missing = CliRunner().invoke(caching.main, ["--reader", str(tmp_path / "none.safetensors")])
    assert missing.exit_code == 2 and "iedit train classifier" in missing.output
    document.write_text("no marks\n")
    refused = CliRunner().invoke(caching.main, list(map(str, words)))
    assert refused.exit_code == 2 and "has no place for the tables" in refused.output and "3 of 3" not in refused.output
