"""The one place that calls a network: guidance, memory bound, counting, NaN, cancelling; inversion and sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from iedit.runtime.backends.eager import TorchBackend
from iedit.runtime.codec import Codec
from iedit.runtime.denoise_step import Condition, ControlInput, DenoiseStep, Sampler
from iedit.runtime.errors import Cancelled, RunError
from iedit.runtime.network import Network
from iedit.runtime.profile import Profile, Progress
from iedit.runtime.sampling import invert, masked_sampling
from iedit.runtime.schedule import Level, Schedule, ddim_coefficients


class Fake:
    """A network of one line; remembers what it was called with."""

    def __init__(self, answer: Callable[[Tensor, Tensor, Condition], Tensor], fits: int = 1000):
        self.answer, self.fits = answer, fits
        self.calls: list[int] = []
        self.times: list[list[int]] = []

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert t.shape == (len(x),) and t.dtype == torch.int64 and len(condition) == len(x)
        self.calls.append(len(x))
        self.times.append(t.tolist())
        if len(x) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.answer(x, t, condition)


def texts(count: int, width: int = 3, seed: int = 0) -> Condition:
    return Condition(torch.randn(count, 2, width, generator=torch.Generator().manual_seed(seed)))


def noise(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def network(fake: Any, max_batch: int = 64, prediction: str = "epsilon", callback: Any = None) -> Network:
    return Network(fake, prediction, max_batch, Profile(callback=callback))


def schedule(tiny: Any, prediction: str = "epsilon", final: float | None = None) -> Schedule:
    s = tiny.schedule
    return Schedule(s.alphas_cumprod, s.final_abar if final is None else final, prediction, s.spacing, s.steps_offset)


def test_guidance_is_one_call_of_both_halves() -> None:
    fake = Fake(lambda x, t, c: x + c.prompt_embeds.mean((1, 2)).view(-1, 1, 1, 1))
    net, x, told, low = network(fake), noise(3), texts(3, seed=1), texts(3, seed=2)
    with net.profile.stage("final"):
        got = net.predict(x, 7, told, low, 5.0)
    assert fake.calls == [6] and fake.times == [[7] * 6]
    a, b = fake.answer(x, torch.tensor(0), low), fake.answer(x, torch.tensor(0), told)
    assert torch.equal(got, a + 5.0 * (b - a))
    assert net.profile.evaluations == {"final": 6} and net.profile.calls == {"final": 1}


def test_guidance_of_one_or_none_evaluates_no_unconditional_half() -> None:
    fake = Fake(lambda x, t, c: x * 2)
    net, x = network(fake), noise(3)
    assert torch.equal(net.predict(x, 7, texts(3), texts(3), 1.0), x * 2)
    assert torch.equal(net.predict(x, 7, texts(3), None, 7.5), x * 2)
    assert fake.calls == [3, 3]


def test_each_sample_has_its_own_timestep() -> None:
    fake = Fake(lambda x, t, c: x * t.view(-1, 1, 1, 1))
    net, x = network(fake, max_batch=2), noise(3)

    def ask(timestep: int, uncond: Condition | None) -> Sampler[Tensor]:
        return (yield DenoiseStep(x, Level(0, timestep, 1.0), None, texts(3), uncond, 2.0))

    for uncond in (None, texts(3)):
        fake.times.clear()
        answers = net.run_lockstep({str(t): ask(t, uncond) for t in (1, 300)})
        assert torch.equal(answers["1"], x) and torch.equal(answers["300"], x * 300)
        halves = 1 if uncond is None else 2
        assert [t for times in fake.times for t in times] == [1] * 3 * halves + [300] * 3 * halves
        assert all(len(times) == 2 for times in fake.times)


@pytest.mark.parametrize("max_batch", [1, 2, 3, 5, 64])
def test_splitting_changes_nothing_but_the_calls(tiny: Any, max_batch: int) -> None:
    x, t = noise(5), 400
    told = Condition(
        Codec(tiny).encode_text(["a red car", "a cat", "a blue house", "", "a tree on grass"]),
        (ControlInput("pose", torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(3)), 0.7),),
    )
    whole, split = network(TorchBackend(tiny)), network(TorchBackend(tiny), max_batch)
    with whole.profile.stage("s"), split.profile.stage("s"):
        want, got = whole.predict(x, t, told), split.predict(x, t, told)
    # the network's own rounding between batch sizes; outputs are of order 1 through some 30 layers
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert split.profile.evaluations["s"] == 5
    assert split.profile.calls["s"] == {1: 5, 2: 3, 3: 2, 5: 1, 64: 1}[max_batch]  # of an even number where it is split


def test_running_out_of_memory_halves_the_batch_and_says_so() -> None:
    fake = Fake(lambda x, t, c: x + 1, fits=1)
    net, x = network(fake, max_batch=16), noise(7)
    with net.profile.stage("mask"):
        assert torch.equal(net.predict(x, 5, texts(7)), x + 1)
        assert fake.calls == [7, 2, 1, 1, 1, 1, 1, 1, 1]
        fake.fits = 1000
        assert torch.equal(net.predict(x, 5, texts(7)), x + 1)
    assert net.max_batch == 1  # it stays small: the next call would run out again
    assert net.profile.evaluations["mask"] == 14  # failed calls are not evaluations
    assert net.profile.notes == [f"out of memory in stage mask, step 1: going on with batches of {b}" for b in (2, 1)]


def test_one_sample_that_does_not_fit_is_an_error_with_its_place() -> None:
    net = network(Fake(lambda x, t, c: x, fits=0), max_batch=4)
    with (
        net.profile.stage("final"),
        pytest.raises(RunError, match=r"out of memory in stage final, step 1: .*\(4, 8, 8\)"),
    ):
        net.predict(noise(4), 5, texts(4))


def test_the_allocator_of_the_cpu_is_understood() -> None:
    def full(x: Tensor, t: Tensor, c: Condition) -> Tensor:
        if len(x) > 1:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried"
            )
        return x

    net, x = network(Fake(full)), noise(2)
    assert torch.equal(net.predict(x, 5, texts(2)), x)


def test_other_errors_pass() -> None:
    def broken(x: Tensor, t: Tensor, c: Condition) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    fake = Fake(broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        network(fake).predict(noise(2), 5, texts(2))
    assert fake.calls == [2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_names_stage_and_step(tiny: Any, bad: float) -> None:
    levels = schedule(tiny).levels(10)

    def answer(x: Tensor, t: Tensor, c: Condition) -> Tensor:
        out = torch.zeros_like(x)
        if t[0] == levels.timesteps[3]:
            out[-1, 2, 1, 1] = bad
        return out

    net = network(Fake(answer))
    with (
        net.profile.stage("final"),
        pytest.raises(RunError, match=r"NaN or infinity in stage final, step 4: .*float32"),
    ):
        net.run(masked_sampling(noise(2), levels.path(), texts(2), None, 1))


def test_a_callback_cancels_at_its_step(tiny: Any) -> None:
    seen: list[Progress] = []

    def callback(progress: Progress) -> bool:
        seen.append(progress)
        return progress.step < 4

    fake = Fake(lambda x, t, c: x * 0)
    net = network(fake, callback=callback)
    with net.profile.stage("invert"), pytest.raises(Cancelled, match="cancelled in stage invert, step 4"):
        net.run(invert(noise(1), schedule(tiny).levels(10).path(), texts(1)), 10)
    assert len(fake.calls) == 3
    assert [(p.stage, p.step, p.steps) for p in seen] == [("invert", i, 10 if i else 0) for i in range(5)]


@pytest.mark.parametrize("evaluate", ["target", "source"])
def test_inversion_tells_the_timestep_that_was_asked_for(tiny: Any, evaluate: str) -> None:
    levels = schedule(tiny).levels(5)
    fake = Fake(lambda x, t, c: x * 0)
    net = network(fake)
    x0 = noise(2)
    trajectory = net.run(invert(x0, levels.path(1), texts(2), evaluate=evaluate))
    told = {"target": [601, 401, 201, 1][::-1], "source": [0, 1, 201, 401]}[evaluate]
    assert [t[0] for t in fake.times] == told
    assert trajectory.shape == (5, 2, 4, 8, 8)
    assert torch.equal(trajectory[-1], x0)


@pytest.mark.parametrize("start", [0, 10])
@pytest.mark.parametrize("evaluate", ["target", "source"])
def test_inversion_then_sampling_of_a_constant_network_is_exact(tiny: Any, start: int, evaluate: str) -> None:
    """METHOD section 4, identity 7: in float64 to its rounding."""
    levels = schedule(tiny).levels(25)
    constant = noise(1, seed=8).double()
    net = network(Fake(lambda x, t, c: constant.expand_as(x)))
    x0 = noise(2).double()
    trajectory = net.run(invert(x0, levels.path(start), texts(2), evaluate=evaluate))
    y = trajectory[0]
    for i in range(start, 25):
        torch.testing.assert_close(y, trajectory[i - start], rtol=0, atol=1e-12)
        c_x, c_out = ddim_coefficients(levels.abar[i], levels.abar[i + 1])
        y = c_x * y + c_out * constant
    assert (y - x0).abs().max() < 1e-12 * x0.abs().max()
    sampled = net.run(masked_sampling(trajectory[0], levels.path(start), texts(2), None, 1))
    assert torch.equal(sampled, y)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_a_network_that_knows_the_clean_latent_inverts_and_samples_back(tiny: Any, prediction: str) -> None:
    """A constant in the other prediction types: one noise for v at every level, the clean latent itself for sample."""
    levels = schedule(tiny, prediction).levels(25)
    x0, eps = noise(1).double(), noise(1, seed=5).double()
    abar_of = dict(zip(levels.timesteps, levels.abar))
    assert len(abar_of) == 26

    def answer(x: Tensor, t: Tensor, c: Condition) -> Tensor:
        a = abar_of[int(t[0])]
        return x0 if prediction == "sample" else a**0.5 * eps - (1 - a) ** 0.5 * x0

    net = network(Fake(answer), prediction=prediction)
    start = levels.abar[-1] ** 0.5 * x0 + (1 - levels.abar[-1]) ** 0.5 * eps  # the clean level has a little noise in it
    trajectory = net.run(invert(start, levels.path(0), texts(1), evaluate="source"))
    noisy = levels.abar[0] ** 0.5 * x0 + (1 - levels.abar[0]) ** 0.5 * eps
    assert (trajectory[0] - noisy).abs().max() < 1e-12 * noisy.abs().max()
    back = net.run(masked_sampling(trajectory[0], levels.path(0), texts(1), None, 1))
    assert (back - start).abs().max() < 1e-12 * start.abs().max()


def test_conditions_of_different_layouts_share_no_batch() -> None:
    maps = torch.zeros(1, 3, 8, 8)
    one, two = (
        Condition(texts(1).prompt_embeds, (ControlInput("pose", maps, 1.0),)),
        Condition(texts(1).prompt_embeds, (ControlInput("pose", maps, 0.5),)),
    )
    for other in (two, texts(1)):
        with pytest.raises(ValueError, match="the conditions have different controls"):
            Condition.cat([one, other])
    both = Condition.cat([one, one])
    assert len(both) == 2 and both.controls[0].image.shape == (2, 3, 8, 8)
    assert torch.equal(texts(3).repeat(2).prompt_embeds, texts(3).prompt_embeds[[0, 0, 1, 1, 2, 2]])


def test_controlnet_residuals_are_summed_with_their_scales(tiny: Any) -> None:
    denoiser, x, t = TorchBackend(tiny), noise(1), torch.tensor([500])
    text = Codec(tiny).encode_text(["a red car"])
    maps = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    def run(*layouts: tuple[str, Tensor, float]) -> Tensor:
        return denoiser.predict(x, t, Condition(text, tuple(ControlInput(*one) for one in layouts)))

    plain, pose = run(), run(("pose", maps[0], 1.0))
    assert (plain - pose).abs().max() > 0.05  # they matter in these tests
    assert torch.equal(run(("pose", maps[0], 0.0)), plain)
    both = run(("pose", maps[0], 1.0), ("scribble", maps[1], 0.5))
    assert (both - pose).abs().max() > 0.02
    other_way = run(("scribble", maps[1], 0.5), ("pose", maps[0], 1.0))
    assert (both - other_way).abs().max() < 1e-5 * both.abs().max()
    with torch.no_grad():
        down, mid = None, None
        for name, m, scale in (("pose", maps[0], 1.0), ("scribble", maps[1], 0.5)):
            d, k = tiny.controlnets[name](x, t, text, m, conditioning_scale=1.0, return_dict=False)
            d, k = [scale * v for v in d], scale * k
            down, mid = (d, k) if down is None else ([a + b for a, b in zip(down, d)], mid + k)
        want = tiny.unet(x, t, text, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
    assert (both - want).abs().max() < 1e-5 * want.abs().max()
