"""The estimated mask: the two conditions of a seed share a call, rounding is no difference, and Eq. 7 compares noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from iedit.kernels.mask_map import difference
from iedit.runtime.backends.eager import TorchBackend
from iedit.runtime.codec import Codec
from iedit.runtime.denoise_step import Condition
from iedit.runtime.editor import Editor, EditRequest, MaskOptions, Options
from iedit.runtime.network import Network
from iedit.runtime.profile import Profile
from iedit.runtime.sampling import estimate_mask, rounding_level
from iedit.runtime.schedule import PREDICTIONS, add_noise, ddim_coefficients, to_epsilon

SOURCE, PROMPT = "a red car on grass at noon", "a blue house on sand at sunset"
SHAPE = (4, 8, 8)
Picture = Callable[..., Image.Image]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Rounding:
    """A network that rounds otherwise in another batch and at another place in it, as real ones do, by `size` of its output."""

    def __init__(self, inner: Any, size: float):
        self.inner, self.size = inner, size
        self.calls: list[Tensor] = []

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.calls.append(condition.prompt_embeds)
        place = torch.arange(len(x)).view(-1, 1, 1, 1) + len(x)
        return self.inner.predict(x, t, condition) * (1 + self.size * torch.sin(place + draw(*SHAPE)))


@pytest.mark.parametrize("mode", ["single", "trajectory"])
@pytest.mark.parametrize("max_batch", [1, 3, 6, 7, 64])
@pytest.mark.parametrize("texts", [(PROMPT, PROMPT), ("A Red car", "a red  car")])
def test_the_same_prompt_twice_is_an_empty_mask_however_calls_are_split(
    tiny: Any, picture: Picture, mode: str, max_batch: int, texts: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = Editor(tiny, Rounding(TorchBackend(tiny), 1e-6))
    monkeypatch.setattr(editor, "max_batch", lambda shape: max_batch)
    options = Options(mask=MaskOptions(mode=mode, seeds=5))
    result = editor.edit(EditRequest(picture(0), texts[0], texts[1], steps=4, options=options))
    assert result.mask is not None and result.mask.getbbox() is None
    assert result.receipt["mask"]["area"] == 0
    assert [n for n in result.notes if n.startswith("the mask is empty: to the network both prompts say the same")]


@pytest.mark.parametrize("max_batch", [2, 3, 5, 8, 64])
def test_both_conditions_of_a_seed_are_in_one_call(tiny: Any, max_batch: int) -> None:
    fake = Rounding(TorchBackend(tiny), 0)
    network = Network(fake, "epsilon", max_batch, Profile())
    edit, source, low = (Condition(Codec(tiny).encode_text([t]).expand(2, -1, -1)) for t in (PROMPT, SOURCE, ""))
    levels = tiny.schedule.levels(4)
    for mode in ("single", "trajectory"):
        with network.profile.stage("mask"):
            network.run(estimate_mask(draw(2, *SHAPE), draw(2, 3, *SHAPE), levels.path(2), edit, source, uncond=low.prompt_embeds,
                                      scale=5.0, mode=mode, prediction="epsilon"))  # fmt: skip
    sizes = set()
    for text in fake.calls:
        sizes.add(len(text))
        told = [
            next(n for n, c in (("edit", edit), ("source", source), ("", low)) if torch.equal(row, c.prompt_embeds[0]))
            for row in text
        ]
        pairs = list(zip(told[::2], told[1::2], strict=True))
        assert set(pairs) <= {("edit", "source"), ("", "")}
    assert max(sizes) <= max(2, max_batch)


def test_a_difference_of_rounding_is_no_difference_and_a_small_real_one_is(tiny: Any) -> None:
    """Two texts that the network answers alike but for 20 eps, and one that moves its output by a thousandth."""
    levels, x0, noise = tiny.schedule.levels(10), draw(2, *SHAPE), draw(2, 4, *SHAPE, seed=1)

    class Answers:
        def __init__(self, size: float):
            self.size = size

        def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            where = torch.zeros(8, 8)
            where[2:5, 3:6] = self.size
            return x + where * condition.prompt_embeds.mean((1, 2)).view(-1, 1, 1, 1)

    edit, source, low = (Condition(torch.full((2, 3, 2), v)) for v in (1.0, -1.0, 0.0))

    def heat(size: float) -> Tensor:
        network = Network(Answers(size), "epsilon", 64, Profile())
        with network.profile.stage("mask"):
            found: Tensor = network.run(
                estimate_mask(x0, noise, levels.path(5), edit, source, uncond=low.prompt_embeds, scale=5.0, mode="single",
                              prediction="epsilon", rounding=rounding_level(torch.float32))
            )  # fmt: skip
        return found

    assert torch.count_nonzero(heat(10 * 2**-23)) == 0
    real = heat(1e-3)
    assert real[:, 0, 3, 4].min() > 1e-3 and float(real[:, 0, 0, 0].max()) < 1e-5


def by_hand(
    network: Network, levels: Any, prediction: str, x0: Tensor, noise: Tensor, conditions: list[Condition], low: Condition,
    scale: float, guided: bool,
) -> Tensor:  # fmt: skip
    """Eq. 7, a seed and a condition at a time: the noise that each predicts at the last step of its own trajectory."""
    maps = []
    for seed in range(noise.shape[1]):
        last = []
        for told in conditions:
            y = add_noise(x0, noise[:, seed], levels.abar[0])
            for i in range(levels.steps):
                halves = [network.predict(y, levels.timesteps[i], c) for c in (low, told)]
                output = halves[0] + scale * (halves[1] - halves[0])
                if i + 1 == levels.steps:
                    last.append(to_epsilon(output if guided else halves[1], y, levels.abar[i], prediction))
                else:
                    c_x, c_out = ddim_coefficients(levels.abar[i], levels.abar[i + 1], prediction)
                    y = c_x * y + c_out * output
        maps.append(torch.stack(last))
    edited, source = torch.stack(maps, 2)
    return difference(edited, source)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_trajectory_compares_the_noise_of_its_last_step_and_is_denoised_with_guidance(
    tiny: Any, prediction: str, guided: bool
) -> None:
    schedule = dataclasses.replace(tiny.schedule, prediction=prediction)
    levels, x0, noise = schedule.levels(6), draw(1, *SHAPE), draw(1, 2, *SHAPE, seed=1)
    edit, source, low = (Condition(Codec(tiny).encode_text([t])) for t in (PROMPT, SOURCE, ""))
    network = Network(TorchBackend(tiny), prediction, 64, Profile())
    with network.profile.stage("mask"):
        heat = network.run(estimate_mask(x0, noise, levels.path(), edit, source, uncond=low.prompt_embeds, scale=3.0,
                                         mode="trajectory", prediction=prediction, guided=guided))  # fmt: skip
        assert network.profile.evaluations["mask"] == 2 * 2 * (6 * 2 - (0 if guided else 1))
        want = by_hand(network, levels, prediction, x0, noise, [edit, source], low, 3.0, guided)
    assert float((heat - want).abs().max() / want.max()) < 1e-4


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("mode", ["single", "trajectory"])
def test_the_progress_bar_knows_what_a_mask_costs(tiny: Any, picture: Picture, mode: str, guided: bool) -> None:
    options = Options(mask=MaskOptions(mode=mode, seeds=3, guided=guided), guidance_scale=5.0)
    result = Editor(tiny, TorchBackend(tiny)).edit(EditRequest(picture(0), PROMPT, SOURCE, steps=4, options=options))
    assert sum(result.profile.evaluations.values()) == result.profile.expected
