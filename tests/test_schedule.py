"""Levels and coefficients against diffusers' schedulers and against closed forms in float64."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from iedit.runtime.errors import UsageError
from iedit.runtime.schedule import (
    PREDICTIONS,
    Schedule,
    add_noise,
    ddim_coefficients,
    ddim_sigma,
    seeded_noise,
    to_epsilon,
)

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def ddim(spacing: str = "leading", prediction: str = "epsilon", **more: Any) -> Any:
    config = {"set_alpha_to_one": False, "steps_offset": 1 if spacing == "leading" else 0} | more
    return DDIMScheduler(**SD, timestep_spacing=spacing, prediction_type=prediction, **config)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_timesteps_are_those_of_ddim_for_every_step_count(spacing: str) -> None:
    scheduler = ddim(spacing)
    schedule = Schedule.from_config(scheduler.config)
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        # diffusers' slips: leading with offset 1 reaches 1000 at 1000 steps, trailing gives 62 for 61, the last -1
        want = scheduler.timesteps.clamp(max=999).tolist()[:steps]
        levels = schedule.levels(steps)
        assert list(levels.timesteps) == [*want, 0], steps
        assert levels.steps == steps
        assert list(levels.abar[:-1]) == scheduler.alphas_cumprod.double()[want].tolist()


@pytest.mark.parametrize("one", [False, True])
def test_the_clean_level_follows_set_alpha_to_one(one: bool) -> None:
    scheduler = ddim(set_alpha_to_one=one)
    levels = Schedule.from_config(scheduler.config).levels(10)
    assert levels.abar[-1] == (1.0 if one else float(scheduler.alphas_cumprod[0]))
    assert all(a < b for a, b in zip(levels.abar, levels.abar[1:]))


def test_alphas_are_the_float64_closed_form_to_float32() -> None:
    levels = Schedule.from_config(ddim().config).levels(25)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    exact = np.cumprod(1 - betas)[list(levels.timesteps[:-1])]
    # diffusers multiplies up to 1000 factors in float32: 1000 roundings of 2^-24 each at worst
    np.testing.assert_allclose(levels.abar[:-1], exact, rtol=1000 * 2**-24)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 25), ("leading", 30), ("trailing", 25), ("trailing", 10)])
def test_a_step_is_that_of_ddim(spacing: str, steps: int, prediction: str) -> None:
    scheduler = ddim(spacing, prediction)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()  # so that only the formulas are compared
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(steps)
    schedule = Schedule.from_config(scheduler.config)
    levels = schedule.levels(steps)
    generator = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, 2, 4, 8, 8, generator=generator, dtype=torch.float64)
    for i in range(steps):
        c_x, c_out = ddim_coefficients(levels.abar[i], levels.abar[i + 1], prediction)
        want = scheduler.step(output, int(scheduler.timesteps[i]), x).prev_sample
        # c_out is a difference that cancels: 1 - abar has lost up to 10 bits at the cleanest level
        torch.testing.assert_close(c_x * x + c_out * output, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_a_step_from_pure_noise_is_that_of_ddim(prediction: str) -> None:
    """Zero terminal SNR with trailing spacing: the first level has abar 0, where dividing by its root is NaN."""
    scheduler = ddim("trailing", prediction, rescale_betas_zero_snr=True)
    schedule = Schedule.from_config(scheduler.config)
    levels = schedule.levels(10)
    assert levels.abar[0] == 0
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(10)
    x, output = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i in range(9):
        c_x, c_out = ddim_coefficients(levels.abar[i], levels.abar[i + 1], prediction)
        want = scheduler.step(output, levels.timesteps[i], x).prev_sample
        torch.testing.assert_close(c_x * x + c_out * output, want, rtol=1e-12, atol=1e-12)


def test_noise_prediction_from_pure_noise_is_refused_in_one_line() -> None:
    schedule = Schedule.from_config(ddim("trailing", rescale_betas_zero_snr=True).config)
    with pytest.raises(UsageError, match=r"last timestep is pure noise .* set prediction_type to v_prediction"):
        schedule.levels(25)
    leading = Schedule.from_config(ddim("leading", rescale_betas_zero_snr=True).config)
    assert leading.levels(25).abar[0] > 0  # it never goes there


def test_coefficients_of_every_prediction_move_the_same_latent() -> None:
    """In float64, whatever is predicted: x0 and eps are the same, and so is where they lead."""
    x0, eps = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for abar, to in ((0.005, 0.02), (0.4, 0.3), (0.99, 0.9995), (0.9, 0.0)):
        x, want = add_noise(x0, eps, abar), add_noise(x0, eps, to)
        v = math.sqrt(abar) * eps - math.sqrt(1 - abar) * x0
        for prediction, said in (("epsilon", eps), ("v_prediction", v), ("sample", x0)):
            c_x, c_out = ddim_coefficients(abar, to, prediction)
            torch.testing.assert_close(c_x * x + c_out * said, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 25), ("trailing", 48)])
def test_steps_go_to_the_next_timestep_not_past_it(spacing: str, steps: int) -> None:
    """diffusers' DDIM steps back by T // N whatever the spacing is, and so misses the level that it is next told of."""
    scheduler = ddim(spacing)
    levels = Schedule.from_config(scheduler.config).levels(steps)
    for i in range(steps - 1):
        assert levels.abar[i + 1] == float(scheduler.alphas_cumprod[levels.timesteps[i + 1]])
    assert any(a - b != 1000 // steps for a, b in zip(levels.timesteps[: steps - 1], levels.timesteps[1:]))


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_inversion_coefficients_are_those_of_the_inverse_scheduler(prediction: str, one: bool) -> None:
    forward = ddim(prediction=prediction, set_alpha_to_one=one)
    inverse = DDIMInverseScheduler.from_config(forward.config)
    inverse.alphas_cumprod = inverse.alphas_cumprod.double()
    inverse.initial_alpha_cumprod = inverse.initial_alpha_cumprod.double()
    inverse.set_timesteps(25)
    levels = Schedule.from_config(forward.config).levels(25)
    generator = torch.Generator().manual_seed(1)
    x, output = torch.randn(2, 1, 4, 8, 8, generator=generator, dtype=torch.float64)
    for i, t in zip(range(25, 0, -1), inverse.timesteps.tolist(), strict=True):
        assert levels.timesteps[i - 1] == t  # told the target timestep
        c_x, c_out = ddim_coefficients(levels.abar[i], levels.abar[i - 1], prediction)
        torch.testing.assert_close(
            c_x * x + c_out * output, inverse.step(output, t, x).prev_sample, rtol=1e-12, atol=1e-12
        )


def test_a_step_and_the_step_back_cancel() -> None:
    levels = Schedule.from_config(ddim().config).levels(50)
    for a, b in zip(levels.abar, levels.abar[1:]):
        c_x, c_eps = ddim_coefficients(a, b)
        back_x, back_eps = ddim_coefficients(b, a)
        assert math.isclose(c_x * back_x, 1, rel_tol=1e-15)
        assert abs(back_x * c_eps + back_eps) < 1e-14
    assert ddim_coefficients(0.3, 0.3) == (1.0, 0.0)


def test_add_noise_is_that_of_ddim() -> None:
    scheduler = ddim()
    levels = Schedule.from_config(scheduler.config).levels(25)
    x0, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    for t, abar in zip(levels.timesteps[:-1], levels.abar):
        want = scheduler.add_noise(x0, noise, torch.tensor([t]))
        torch.testing.assert_close(add_noise(x0, noise, abar), want, rtol=0, atol=4 * 2**-23)  # values up to 4
    assert torch.equal(add_noise(x0, noise, 1.0), x0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_type_names_the_same_noise(prediction: str) -> None:
    x0, eps = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for abar in (0.005, 0.4, 0.99915):
        x = add_noise(x0, eps, abar)
        said = {"epsilon": eps, "v_prediction": math.sqrt(abar) * eps - math.sqrt(1 - abar) * x0, "sample": x0}[
            prediction
        ]
        torch.testing.assert_close(to_epsilon(said, x, abar, prediction), eps, rtol=1e-12, atol=1e-12)


def test_start_counts_whole_steps_from_the_end() -> None:
    levels = Schedule.from_config(ddim().config).levels(50)
    assert [levels.start(r) for r in (1.0, 0.7, 0.5, 0.58, 0.019)] == [0, 15, 25, 21, 49]
    for ratio in (0, -0.1, 1.01, float("nan")):
        with pytest.raises(UsageError, match="ratio is"):
            levels.start(ratio)


def test_what_cannot_be_scheduled_is_refused() -> None:
    schedule = Schedule.from_config(ddim().config)
    for steps in (0, -1, 1001):
        with pytest.raises(UsageError, match=f"steps is {steps}, expected 1 to 1000"):
            schedule.levels(steps)
    with pytest.raises(UsageError, match="timestep_spacing is 'other'"):
        dataclasses.replace(schedule, spacing="other").levels(10)
    with pytest.raises(UsageError, match="prediction_type is 'score'"):
        Schedule.from_config(dict(ddim().config) | {"prediction_type": "score"})
    with pytest.raises(ValueError, match="prediction is 'score'"):
        to_epsilon(torch.zeros(1), torch.zeros(1), 0.5, "score")
    with pytest.raises(ValueError, match="prediction is 'score'"):
        ddim_coefficients(0.5, 0.6, "score")


def test_seeded_noise_depends_on_seed_and_purpose_alone() -> None:
    shape = (4, 8, 8)
    state = torch.get_rng_state()
    first = seeded_noise(0, "sample", shape)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's generator was touched
    torch.randn(100)
    assert torch.equal(seeded_noise(0, "sample", shape), first)
    others = [
        (1, "sample"),
        (0, "guidance"),
        (0, "mask-0"),
        (0, "mask-1"),
        (10, "sample"),
        (-1, "sample"),
        (2**63, "sample"),
    ]
    drawn = [first, *(seeded_noise(s, p, shape) for s, p in others)]
    for i, a in enumerate(drawn):
        assert a.dtype == torch.float32 and a.shape == shape
        for b in drawn[:i]:
            assert not torch.equal(a, b)
    large = seeded_noise(7, "sample", (4, 64, 64))
    assert abs(float(large.mean())) < 5 / math.sqrt(large.numel())  # five standard errors
    assert abs(float(large.std()) - 1) < 5 / math.sqrt(2 * large.numel())


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_a_step_with_fresh_noise_is_that_of_ddim_with_eta(prediction: str, one: bool, eta: float) -> None:
    scheduler = ddim(prediction=prediction, set_alpha_to_one=one)
    schedule = Schedule.from_config({**scheduler.config, "prediction_type": "epsilon"})
    levels = schedule.levels(20)
    scheduler.set_timesteps(20)
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = (
        a.double() for a in (scheduler.alphas_cumprod, torch.as_tensor(scheduler.final_alpha_cumprod))
    )
    x, output, noise = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for level, cleaner in pairwise(levels.path()):
        c_x, c_out = ddim_coefficients(level.abar, cleaner.abar, prediction, eta)
        got = c_x * x + c_out * output + ddim_sigma(level.abar, cleaner.abar, eta) * noise
        want = scheduler.step(output, level.timestep, x, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
