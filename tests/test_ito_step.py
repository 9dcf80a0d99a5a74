"""The ITO update: closed forms against autograd, clipped steps against their formula, Adam's against torch.optim.Adam, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from iedit.kernels.ito_step import EPS, UPDATES, AdamState, ito_gradient, ito_step, ito_step_reference

LAMBDAS = (0.0, 0.6, 1.0)
MASKS = ("empty", "full", "binary", "soft")
SHAPES = ((2, 4, 8, 8), (3, 4, 5, 7))


def latents(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y, x, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return y.to(dtype), x.to(dtype), g.to(dtype)


def mask_of(name: str, shape: tuple[int, ...]) -> Tensor:
    soft = torch.rand(shape[0], 1, *shape[2:], generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return {"empty": soft * 0, "full": soft * 0 + 1, "binary": (soft > 0.5).double(), "soft": soft}[name]


def loss(y: Tensor, x: Tensor, g: Tensor | None, mask: Tensor, lam: float, kept_area: bool = False) -> Tensor:
    """Written from METHOD's definitions, not from the kernel: sum over samples of (1 - lam) L_G + lam L_rec."""
    total = y.new_zeros(())
    for i in range(len(y)):
        square = ((1 - mask[i]) * (y[i] - x[i])) ** 2
        rec = square.sum() / (y.shape[1] * (1 - mask[i]).sum().clamp(min=1)) if kept_area else square.mean()
        total = total + lam * rec
        if g is not None:
            total = total + (1 - lam) * (1 - F.cosine_similarity(y[i].flatten(), g[i].flatten(), dim=0, eps=0))
    return total


def lam_of(value: float, count: int) -> Tensor:
    return torch.full((count,), value, dtype=torch.float64)


@pytest.mark.parametrize("kept_area", [False, True])
@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_that_of_autograd(shape: tuple[int, ...], kind: str, lam: float, kept_area: bool) -> None:
    y, x, g = latents(shape)
    mask = mask_of(kind, shape)
    leaf = y.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf, x, g, mask, lam, kept_area), leaf)
    got = ito_gradient(y, x, g, mask, lam_of(lam, len(y)), kept_area=kept_area)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)  # gradients are about 1e-3


def test_lambda_is_per_sample() -> None:
    y, x, g = latents((3, 4, 8, 8))
    mask = mask_of("soft", y.shape)
    mixed = ito_gradient(y, x, g, mask, torch.tensor(LAMBDAS, dtype=torch.float64))
    for i, lam in enumerate(LAMBDAS):
        one = ito_gradient(y[i : i + 1], x[i : i + 1], g[i : i + 1], mask[i : i + 1], lam_of(lam, 1))
        assert torch.equal(mixed[i : i + 1], one)


@pytest.mark.parametrize("k", [1, 3, 30])
@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("kind", MASKS)
def test_k_steps_are_k_steps_of_adam(kind: str, lam: float, k: int) -> None:
    y, x, g = latents((2, 4, 8, 8), seed=1)
    mask = mask_of(kind, y.shape)
    leaf = y.clone().requires_grad_()
    optimiser = torch.optim.Adam([leaf], lr=0.1)
    for _ in range(k):
        optimiser.zero_grad()
        loss(leaf, x, g, mask, lam).backward()
        optimiser.step()
    got = ito_step(y, x, g, mask, lam_of(lam, 2), update="adam", k=k)
    # Adam divides by |gradient|: where that is tiny its last bits weigh more, and 30 steps add them up
    torch.testing.assert_close(got, leaf.detach(), rtol=0, atol=1e-12 if k == 1 else 1e-9)


def test_carried_state_is_one_adam_across_timesteps() -> None:
    y, x, g = latents((2, 4, 8, 8), seed=2)
    mask, lam = mask_of("soft", y.shape), lam_of(0.6, 2)
    leaf = y.clone().requires_grad_()
    optimiser = torch.optim.Adam([leaf], lr=0.1)
    state = AdamState(torch.zeros_like(y), torch.zeros_like(y))
    got = y
    for timestep in range(4):
        x, g = x.roll(1, 2), g.roll(timestep, 3)  # other targets at every timestep
        for _ in range(2):
            optimiser.zero_grad()
            loss(leaf, x, g, mask, 0.6).backward()
            optimiser.step()
        got = ito_step(got, x, g, mask, lam, update="adam", k=2, state=state)
        fresh = ito_step(got, x, g, mask, lam, update="adam", k=2)
        moved = got * 0.5 + 0.1  # as a DDIM step between two timesteps does
        with torch.no_grad():
            leaf.copy_(leaf * 0.5 + 0.1)
        got = moved
        torch.testing.assert_close(got, leaf.detach(), rtol=0, atol=1e-10)
        assert not torch.allclose(fresh, got)
    assert state.steps == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_step_is_lr_g_over_abs_g_plus_eps(dtype: torch.dtype) -> None:
    y, x, g = latents((2, 4, 8, 8), seed=3, dtype=dtype)
    mask, lam = mask_of("soft", y.shape).to(dtype), lam_of(0.6, 2).to(dtype)
    gradient = ito_gradient(y, x, g, mask, lam)
    want = y - 0.05 * gradient / (gradient.abs() + EPS)
    assert torch.equal(ito_step(y, x, g, mask, lam, update="adam", lr=0.05), want)


@pytest.mark.parametrize("k", [1, 3, 30])
@pytest.mark.parametrize("kept_area", [False, True])
@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("kind", MASKS)
def test_k_clipped_steps_are_those_of_the_formula(kind: str, lam: float, kept_area: bool, k: int) -> None:
    """METHOD section 2, row 5, by autograd: y <- y - clip(gradient * count / 2, -lr, lr)."""
    y, x, g = latents((2, 4, 8, 8), seed=7)
    mask = mask_of(kind, y.shape)
    count = torch.tensor(
        [float(4 * (1 - m).sum().clamp(min=1)) if kept_area else 4.0 * 64 for m in mask], dtype=y.dtype
    )
    want = y
    for _ in range(k):
        leaf = want.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, x, g, mask, lam, kept_area), leaf)
        want = want - (gradient * count.view(2, 1, 1, 1) / 2).clamp(-0.1, 0.1)
    got = ito_step(y, x, g, mask, lam_of(lam, 2), k=k, kept_area=kept_area)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_the_clipped_step_of_the_kept_area_ends_at_the_source_and_does_not_leave_it() -> None:
    """With lambda 1: nearer than lr it arrives, farther it comes lr nearer; Adam's step throws it off by lr."""
    y, x, _ = latents((2, 4, 8, 8), seed=8)
    mask = mask_of("empty", y.shape)
    near = x + 0.05 * (y - x).sign()
    torch.testing.assert_close(ito_step(near, x, None, mask, lam_of(1.0, 2)), x, rtol=0, atol=1e-15)
    moved = ito_step(y, x, None, mask, lam_of(1.0, 2))
    torch.testing.assert_close((moved - x).abs(), ((y - x).abs() - 0.1).clamp(min=0), rtol=0, atol=1e-12)
    almost = x + 1e-4  # a gradient of 1e-6: a hundred times Adam's eps
    assert (ito_step(almost, x, None, mask, lam_of(1.0, 2)) - x).abs().max() < 1e-12
    assert (ito_step(almost, x, None, mask, lam_of(1.0, 2), update="adam") - x).abs().min() > 0.09


def test_rounding_of_the_input_stays_rounding_with_the_clipped_update() -> None:
    y, x, g = latents((2, 4, 8, 8), seed=9)
    y = x + 1e-9 * y  # the kept area has arrived
    mask, lam = mask_of("binary", y.shape), lam_of(0.6, 2)
    off = y + 1e-6 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype)
    clipped = (ito_step(off, x, g, mask, lam) - ito_step(y, x, g, mask, lam)).abs().max()
    assert clipped < 1e-5
    adam = [ito_step(v, x, None, mask, lam_of(1.0, 2), update="adam") for v in (off, y)]
    assert (adam[0] - adam[1]).abs().max() > 0.05  # what the papers' update makes of it


def test_the_full_mask_with_lambda_one_moves_nothing() -> None:
    y, x, g = latents((2, 4, 8, 8), dtype=torch.float32)
    for guidance in (g, None):
        got = ito_step(y, x, guidance, torch.ones(2, 1, 8, 8), torch.ones(2), k=3)
        assert torch.equal(got, y)


def test_no_guidance_is_guidance_of_weight_zero() -> None:
    y, x, g = latents((2, 4, 8, 8), dtype=torch.float32)
    mask = mask_of("soft", y.shape).float()
    for k in (1, 3):
        assert torch.equal(ito_step(y, x, None, mask, torch.ones(2), k=k), ito_step(y, x, g, mask, torch.ones(2), k=k))


def test_moves_toward_source_outside_and_toward_guidance_inside() -> None:
    y, x, g = latents((1, 4, 8, 8), seed=4)
    mask = mask_of("binary", y.shape)
    kept = ito_step(y, x, g, mask, lam_of(1.0, 1))
    outside = (1 - mask).expand_as(y).bool()
    assert ((kept - x).abs() < (y - x).abs())[outside & ((y - x).abs() > 0.1)].all()
    assert torch.equal(kept[~outside], y[~outside])
    assert ((kept - x).abs() <= (y - x).abs())[outside].all()  # nothing that was near is thrown off
    led = ito_step(y, x, g, mask, lam_of(0.0, 1), k=5)
    assert F.cosine_similarity(led.flatten(), g.flatten(), dim=0) > F.cosine_similarity(y.flatten(), g.flatten(), dim=0)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("k", [1, 3])
def test_zero_latents_have_no_direction_and_no_nan(k: int, update: str) -> None:
    y, x, g = latents((3, 4, 8, 8), dtype=torch.float32)
    y[0], g[1], y[2], g[2] = 0, 0, 0, 0
    mask = mask_of("soft", y.shape).float()
    gradient = ito_gradient(y, x, g, mask, torch.zeros(3))
    assert torch.count_nonzero(gradient) == 0  # lambda 0 leaves the cosine alone, and it has no gradient there
    got = ito_step(y, x, g, mask, torch.full((3,), 0.6), update=update, k=k)
    assert torch.isfinite(got).all()
    plain = ito_step(y, x, None, mask, torch.full((3,), 0.6), update=update, k=k)
    assert torch.equal(got[1:], plain[1:])
    if k == 1:  # after its first step the zero latent has a direction
        assert torch.equal(got[0], plain[0])


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 3])
def test_halves_are_computed_in_float32(dtype: torch.dtype, k: int, update: str) -> None:
    y, x, g = latents((2, 4, 8, 8), seed=5, dtype=dtype)
    mask, lam = mask_of("soft", y.shape).to(dtype), torch.full((2,), 0.6)
    got = ito_step(y, x, g, mask, lam, update=update, k=k)
    assert got.dtype == dtype
    assert ito_gradient(y, x, g, mask, lam).dtype == torch.float32
    exact = ito_step(y.float(), x.float(), g.float(), mask.float(), lam, update=update, k=k)
    assert torch.equal(got, exact.to(dtype))  # one rounding, of the result


def test_tiny_gradients_survive_in_half_precision() -> None:
    """In float16 g^2 is zero for a gradient of 1e-4 and eps is zero: the step would be 0/0."""
    y = torch.full((1, 4, 8, 8), 0.5, dtype=torch.float16)
    x = y + 0.01
    for update in UPDATES:
        got = ito_step(y, x, None, torch.zeros(1, 1, 8, 8), torch.ones(1), update=update, k=2)
        assert torch.isfinite(got).all() and (got > y).all()


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("k", [1, 3])
def test_a_batch_is_its_samples_bit_for_bit(k: int, update: str) -> None:
    y, x, g = latents((5, 4, 16, 16), seed=6, dtype=torch.float32)
    mask, lam = mask_of("soft", y.shape).float(), torch.tensor([0.0, 0.3, 0.6, 0.9, 1.0])
    for kept_area in (False, True):
        together = ito_step(y, x, g, mask, lam, update=update, k=k, kept_area=kept_area)
        for i in range(5):
            s = slice(i, i + 1)
            one = ito_step(y[s], x[s], g[s], mask[s], lam[s], update=update, k=k, kept_area=kept_area)
            assert torch.equal(together[s], one)


def test_inputs_are_left_alone() -> None:
    y, x, g = latents((2, 4, 8, 8), dtype=torch.float32)
    mask, lam = mask_of("soft", y.shape).float(), torch.full((2,), 0.6)
    before = [t.clone() for t in (y, x, g, mask, lam)]
    ito_step(y, x, g, mask, lam, k=3)
    assert all(torch.equal(a, b) for a, b in zip(before, (y, x, g, mask, lam)))


def test_shape_errors_name_the_tensor_what_came_and_what_was_wanted() -> None:
    y, x, g = latents((2, 4, 8, 8), dtype=torch.float32)
    mask, lam = torch.zeros(2, 1, 8, 8), torch.ones(2)
    with pytest.raises(ValueError, match=r"ito_step: x is \(1, 4, 8, 8\), expected \(2, 4, 8, 8\)"):
        ito_step(y, x[:1], g, mask, lam)
    with pytest.raises(ValueError, match=r"ito_step: g is \(2, 4, 8, 7\)"):
        ito_step(y, x, g[..., :7], mask, lam)
    with pytest.raises(ValueError, match=r"ito_step: mask is \(2, 8, 8\), expected \(2, 1, 8, 8\)"):
        ito_step(y, x, g, mask[:, 0], lam)
    with pytest.raises(ValueError, match=r"ito_step: mask is \(2, 4, 8, 8\)"):
        ito_step(y, x, g, mask.expand(-1, 4, -1, -1), lam)
    with pytest.raises(ValueError, match=r"ito_step: lam is \(\), expected \(2,\)"):
        ito_step(y, x, g, mask, torch.tensor(0.6))
    with pytest.raises(ValueError, match=r"ito_step: update is 'sgd', expected clipped or adam"):
        ito_step(y, x, g, mask, lam, update="sgd")
    state = AdamState(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"the state's mean is \(1, 4, 8, 8\) on cpu, expected \(2, 4, 8, 8\)"):
        ito_step(y, x, g, mask, lam, update="adam", state=state)
    with pytest.raises(ValueError, match="update clipped has no state to carry"):
        ito_step(y, x, g, mask, lam, state=AdamState(torch.zeros_like(y), torch.zeros_like(y)))


@pytest.mark.parametrize("update", UPDATES)
def test_on_a_cpu_the_operation_is_its_reference(update: str) -> None:
    y, x, g = latents((2, 4, 8, 8), dtype=torch.float32)
    mask, lam = mask_of("soft", y.shape).float(), torch.full((2,), 0.6)
    assert torch.equal(
        ito_step(y, x, g, mask, lam, update=update, k=2), ito_step_reference(y, x, g, mask, lam, update=update, k=2)
    )


# --- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("k", [1, 3, 30])
@pytest.mark.parametrize("mask_kind", ["empty", "full", "soft"])
def test_the_kernel_rounds_float64_once_on_a_gpu(
    gpu_shape: tuple[int, ...], gpu_dtype: torch.dtype, mask_kind: str, k: int, update: str, poisoned: None,
    gpu_draw: Callable[..., list[Tensor]], assert_rounded_once: Callable[..., None],
) -> None:  # fmt: skip
    shape = gpu_shape
    y, x, g = gpu_draw(shape, gpu_dtype, 3)
    y[-1], g[-1] = 0, 0  # no direction
    soft = torch.rand(shape[0], 1, *shape[2:], device="cuda")
    mask = {"empty": soft * 0, "full": soft * 0 + 1, "soft": soft}[mask_kind]
    lam = torch.tensor([0.0, 1.0, 0.6], device="cuda")[-shape[0] :]
    for guide, kept in ((g, False), (g, True), (None, False)):
        wide = [None if t is None else t.double() for t in (y, x, guide, mask, lam)]
        exact = ito_step_reference(*wide, update=update, k=k, kept_area=kept)  # type: ignore[arg-type]
        assert_rounded_once(ito_step(y, x, guide, mask, lam, update=update, k=k, kept_area=kept), exact)


@pytest.mark.gpu
def test_the_kernel_carries_a_state_on_a_gpu(gpu_draw: Callable[..., list[Tensor]], poisoned: None) -> None:
    y, x, g = gpu_draw((2, 4, 16, 16), torch.float32, 3)
    mask, lam = torch.rand(2, 1, 16, 16, device="cuda"), torch.full((2,), 0.6, device="cuda")
    state = AdamState(torch.zeros_like(y), torch.zeros_like(y))
    twice = y
    for _ in range(2):
        twice = ito_step(twice, x, g, mask, lam, update="adam", k=2, state=state)
    exact = ito_step_reference(*(t.double() for t in (y, x, g, mask, lam)), update="adam", k=4)
    assert state.steps == 4
    # The state and the latent were rounded to float32 in between: most values do not notice, a cancelled gradient does.
    assert ((twice.double() - exact).abs() < 1e-5).double().mean() > 0.99
