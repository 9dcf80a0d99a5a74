"""Triton kernels in Triton's interpreter against float64. Not collected: `test_kernels_triton.py` runs this file in a
process of its own, since `TRITON_INTERPRET` has to be set before a kernel is decorated and rules out compiling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton

from iedit.kernels import geglu as geglu_definition
from iedit.kernels import group_norm as norm_definition
from iedit.kernels import guided_step as guided_definition
from iedit.kernels import ito_step as ito_definition
from iedit.kernels import mask_map as mask_definition
from iedit.kernels.dispatch import use_triton
from iedit.kernels.ito_step import UPDATES, AdamState

# Round and ragged, several samples and one, 16 channels, the latent of 512x512, more than one block of BLOCK_MANY.
SHAPES = [(3, 4, 16, 16), (3, 4, 9, 13), (3, 16, 8, 8), (3, 4, 17, 19), (1, 4, 64, 64)]
LAMBDAS = [0.6, 0.0, 1.0]
Rounded = Callable[[torch.Tensor, torch.Tensor], None]


@pytest.fixture(autouse=True)
def _language_is_patched_once_in_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter looks through all of Triton's language at every call of one device function by another, a third of its time, though
    the launch has done so: only a module of it that the launch has not seen is new."""
    from triton.runtime import interpreter

    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    seen: set[frozenset[int]] = set()

    def launched(*given: Any, **named: Any) -> Any:
        seen.clear()
        return launch(*given, **named)

    def once(function: Any) -> Any:
        languages = frozenset(
            id(v) for v in function.__globals__.values() if v is triton.language or v is triton.language.core
        )
        scope = interpreter._LangPatchScope() if languages in seen else patch(function)
        seen.add(languages)
        return scope

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
    monkeypatch.setattr(interpreter, "_patch_lang", once)


@pytest.fixture(autouse=True)
def _forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes whatever is not float64, which is what the exact answers are computed in."""
    monkeypatch.setenv("IEDIT_KERNELS", "auto")
    assert use_triton("test", torch.zeros(1)) and not use_triton("test", torch.zeros(1, dtype=torch.float64))


def once(exact: torch.Tensor, dtype: torch.dtype = torch.float32) -> float:
    """Twice the error of rounding the exact answer once."""
    return 2 * float((exact.to(dtype).double() - exact).abs().max())


def sensitivity(*args: torch.Tensor | None, **kwargs: object) -> float:
    """How far the exact answer moves when its inputs are off by one float32 rounding: the update divides by |gradient| +
    1e-8, so where a gradient cancels to about 1e-8 no float32 computation can be nearer to it than this. Times 4, for the
    draws (8 of them) see less than the worst."""
    exact = ito_definition.ito_step_reference(*args, **kwargs)  # type: ignore[arg-type]
    moved = 0.0
    for _ in range(8):
        off = [None if a is None else a * (1 + 2**-23 * torch.randn_like(a).sign()) for a in args]
        moved = max(moved, float((ito_definition.ito_step_reference(*off, **kwargs) - exact).abs().max()))  # type: ignore[arg-type]
    return 4 * moved


KS, MASKS = (1, 3, 8), ("empty", "full", "binary", "soft")
RAGGED = SHAPES[1]
# A ragged shape has every mask; the others, whose steps take seconds, have a binary and a soft one or only that. What 30 steps add up to is
# seen on one shape and mask: a step is a pass of the same loop, whatever the shape.
ITO_CASES = [("adam", RAGGED, k, mask) for k in KS for mask in MASKS]
ITO_CASES += [("adam", RAGGED, 30, "soft")]
ITO_CASES += [("adam", s, k, "binary") for s in SHAPES[:4] if s != RAGGED for k in (1, 3)]
ITO_CASES += [("adam", s, k, "soft") for s in SHAPES if s != RAGGED for k in KS]
# The clipped update shares its sums and passes with Adam's: two ragged shapes, and 30 steps on a soft mask, tell of its own lines.
ITO_CASES += [("clipped", s, k, mask) for s in (RAGGED, SHAPES[3]) for k in (1, 3) for mask in MASKS]
ITO_CASES += [("clipped", RAGGED, 30, "soft")]


@pytest.mark.parametrize(("update", "shape", "k", "kind"), ITO_CASES)
def test_ito_step_matches_float64_on_every_lambda(
    update: str, shape: tuple[int, ...], k: int, kind: str, assert_rounded_once: Rounded
) -> None:
    """No value is exempt, also not those whose gradient cancels to less than 1e-8."""
    if k > 3 and shape[-1] == 64:
        shape = (1, 4, 24, 28)  # 8 passes of the interpreter over 16 384 values take 5 s
    torch.manual_seed(0)
    y, x, g = (torch.randn(shape) for _ in range(3))
    soft = torch.rand(shape[0], 1, *shape[2:])
    mask = {"empty": soft * 0, "full": soft * 0 + 1, "binary": (soft > 0.5).float(), "soft": soft}[kind]
    large = shape[0] == 1  # one sample has one lambda at a time, and takes seconds
    for kept in (False,) if large or (k > 3 and kind != "soft") else (False, True):
        for i in range(1 if k > 3 else 3 // shape[0]):
            lam = torch.tensor((LAMBDAS[i:] + LAMBDAS[:i])[: shape[0]])
            guide = g if not kept or lam[0] < 1 else None
            weight = lam if guide is not None else torch.ones(shape[0])
            parts = [t.double() if t is not None else None for t in (y, x, guide, mask, weight)]
            exact = ito_definition.ito_step_reference(*parts, update=update, k=k, kept_area=kept)  # type: ignore[arg-type]
            got = ito_definition.ito_step(y, x, guide, mask, weight, update=update, k=k, kept_area=kept)
            assert_rounded_once(got, exact)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("k", [1, 3, 30])
def test_ito_step_without_guidance_matches_float64(k: int, update: str, assert_rounded_once: Rounded) -> None:
    torch.manual_seed(7)
    y, x = torch.randn(2, 4, 9, 13), torch.randn(2, 4, 9, 13)
    mask, lam = torch.rand(2, 1, 9, 13), torch.tensor([1.0, 0.7])
    for kept in (False, True):
        more: dict[str, Any] = {"update": update, "k": k, "kept_area": kept}
        exact = ito_definition.ito_step_reference(y.double(), x.double(), None, mask.double(), lam.double(), **more)
        assert_rounded_once(ito_definition.ito_step(y, x, None, mask, lam, **more), exact)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("k", [1, 3, 8])
def test_ito_step_matches_float64_where_latents_are_zero(k: int, update: str, assert_rounded_once: Rounded) -> None:
    torch.manual_seed(8)
    y, x, g = (torch.randn(3, 4, 9, 13) for _ in range(3))
    y[0], g[1], y[2], g[2], x[2] = 0, 0, 0, 0, 0
    mask, lam = torch.rand(3, 1, 9, 13), torch.full((3,), 0.6)
    exact = ito_definition.ito_step_reference(*(t.double() for t in (y, x, g, mask, lam)), update=update, k=k)
    got = ito_definition.ito_step(y, x, g, mask, lam, update=update, k=k)
    assert_rounded_once(got, exact)
    assert torch.equal(got[2], y[2])


def test_cancelled_gradients_are_what_the_float64_sums_are_for(assert_rounded_once: Rounded) -> None:
    """At 4x64x64 some gradients cancel to less than 1e-8 of Adam's eps: float32 gets those steps wrong, the kernel does not."""
    torch.manual_seed(0)
    y, x, g = (torch.randn(1, 4, 64, 64) for _ in range(3))
    mask, lam = torch.rand(1, 1, 64, 64), torch.tensor([0.6])
    parts = [t.double() for t in (y, x, g, mask, lam)]
    exact, gradient = ito_definition.ito_step_reference(*parts, update="adam"), ito_definition.ito_gradient(*parts)
    plain = ito_definition.ito_gradient(y, x, g, mask, lam)
    plain = y - 0.1 * plain / (plain.abs() + ito_definition.EPS)
    wrong = (plain.double() - exact).abs() > once(exact)
    assert 0 < wrong.double().mean() < 1e-2 and (gradient[wrong].abs() < 1e-6).all()
    assert_rounded_once(ito_definition.ito_step(y, x, g, mask, lam, update="adam"), exact)


@pytest.mark.parametrize("update", UPDATES)
def test_ito_step_rounds_a_float16_result_once(update: str, assert_rounded_once: Rounded) -> None:
    torch.manual_seed(1)
    y, x, g = (torch.randn(2, 4, 16, 16).half() for _ in range(3))
    mask, lam = torch.rand(2, 1, 16, 16), torch.tensor([0.6, 0.3])
    for k in (1, 3, 30):
        exact = ito_definition.ito_step_reference(*(t.double() for t in (y, x, g, mask, lam)), update=update, k=k)
        got = ito_definition.ito_step(y, x, g, mask, lam, update=update, k=k)
        assert got.dtype == torch.float16
        assert_rounded_once(got, exact)


@pytest.mark.parametrize("update", UPDATES)
def test_ito_step_of_zero_latents_stays_finite_and_still(update: str) -> None:
    zero, mask, lam = torch.zeros(1, 4, 16, 16), torch.zeros(1, 1, 16, 16), torch.tensor([0.6])
    assert torch.equal(ito_definition.ito_step(zero, zero, zero, mask, lam, update=update), zero)


def transposed(values: torch.Tensor) -> torch.Tensor:
    """The same values in another order of memory, as a latent in channels-last has them."""
    return values.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("memory", [torch.Tensor.contiguous, transposed])
def test_ito_step_carries_the_state_from_call_to_call(memory: Any) -> None:
    torch.manual_seed(2)
    y, x, g = (torch.randn(1, 4, 16, 16) for _ in range(3))
    mask, lam = torch.rand(1, 1, 16, 16), torch.tensor([0.6])
    state = AdamState(memory(torch.zeros_like(y)), memory(torch.zeros_like(y)))
    twice = memory(y)
    for _ in range(2):
        twice = ito_definition.ito_step(twice, x, g, mask, lam, update="adam", k=2, state=state)
    assert state.steps == 4
    parts = [t.double() for t in (y, x, g, mask, lam)]
    exact = ito_definition.ito_step_reference(*parts, update="adam", k=4)
    assert (twice.double() - exact).abs().max() <= sensitivity(*parts, update="adam", k=4) + once(exact)


@pytest.mark.parametrize("blend", ["none", "trajectory", "noise"])
@pytest.mark.parametrize("shape", [(2, 4, 9, 13), (2, 4, 16, 16)])
def test_guided_step_matches_float64(blend: str, shape: tuple[int, ...], assert_rounded_once: Rounded) -> None:
    torch.manual_seed(3)
    x, cond, uncond, reference, noise = (torch.randn(shape) for _ in range(5))
    mask = torch.rand(2, 1, *shape[2:])
    c_x, c_out, target = torch.tensor([0.9, 1.1]), torch.tensor([-0.1, 0.2]), torch.tensor([0.7, 0.2])
    more: dict[str, torch.Tensor] = {}
    if blend != "none":
        more = {"mask": mask, "reference": reference}
    if blend == "noise":
        more |= {"noise": noise, "reference_abar": target}

    def run(kind: torch.dtype) -> torch.Tensor:
        return guided_definition.guided_step(
            x.to(kind), cond.to(kind), uncond.to(kind), 7.5, c_x.to(kind), c_out.to(kind),
            **{k: v.to(kind) for k, v in more.items()},
        )  # fmt: skip

    assert_rounded_once(run(torch.float32), run(torch.float64))
    halves = [t.half() for t in (x, cond, uncond, reference, noise)]
    x, cond, uncond, reference, noise = (t.float() for t in halves)
    more |= {name: value for name, value in (("reference", reference), ("noise", noise)) if name in more}
    exact = run(torch.float64)
    more |= {name: value for name, value in (("reference", halves[3]), ("noise", halves[4])) if name in more}
    got = guided_definition.guided_step(halves[0], halves[1], halves[2], 7.5, c_x, c_out, **more)
    assert got.dtype == torch.float16
    assert_rounded_once(got, exact)


def test_guided_step_keeps_the_reference_bit_for_bit_where_the_mask_is_empty() -> None:
    torch.manual_seed(4)
    x, cond, reference = (torch.randn(1, 4, 16, 16) for _ in range(3))
    one = torch.tensor([0.5])
    got = guided_definition.guided_step(
        x, cond, None, 1.0, one, one, mask=torch.zeros(1, 1, 16, 16), reference=reference
    )
    assert torch.equal(got, reference)


@pytest.mark.parametrize("shape", [(2, 3, 4, 17, 11), (1, 10, 4, 32, 64)])
def test_difference_and_mask_match_their_definitions(shape: tuple[int, ...], assert_rounded_once: Rounded) -> None:
    torch.manual_seed(5)
    a, b = torch.randn(shape), torch.randn(shape)
    heat = mask_definition.difference(a, b)
    exact = (a.double() - b.double()).abs().mean((1, 2), keepdim=True)[:, 0]
    assert_rounded_once(heat, exact)
    for norm, threshold in (("minmax", 0.5), ("clamp", 1 / 3)):  # clamp: 1 is 3x the mean
        for sigma in (0.0, 1.0):
            got = mask_definition.mask_map(heat, sigma=sigma, norm=norm, threshold=threshold)
            share = mask_definition.normalise(mask_definition.gaussian_blur(heat, sigma), norm)
            clear = (share - threshold).abs() > 1e-5  # a cell on the threshold may fall either way
            assert torch.equal(got[clear], (share > threshold).float()[clear])
            assert 0 < got.mean() < 1


def test_a_flat_difference_gives_an_empty_mask() -> None:
    heat = torch.full((1, 1, 16, 16), 0.25)
    assert mask_definition.mask_map(heat, sigma=1.0, norm="minmax", threshold=0.1).sum() == 0


def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of every Triton kernel launched from here on; `kernel[grid](...)` ends in `run`, which does nothing any more."""
    from iedit.kernels import guided_step_triton, ito_step_triton, mask_map_triton

    seen: list[str] = []
    for module in (guided_step_triton, ito_step_triton, mask_map_triton):
        for name, value in vars(module).items():
            if type(value).__name__ == "InterpretedFunction":

                def run(*args: object, name: str = name, **kwargs: object) -> None:
                    seen.append(name)

                monkeypatch.setattr(value, "run", run)
    return seen


def test_views_and_allocations_are_no_launches(bench: Callable[[str], Any]) -> None:
    """The counting rule, on operators whose launches are known."""
    x, y, counting = torch.randn(4, 6), torch.randn(6, 4), bench("kernels").Launches
    for run, count in (
        (lambda: x.view(2, 12).transpose(0, 1)[1:].unsqueeze(0).expand(3, -1, -1), 0),
        (lambda: torch.empty_like(x).detach(), 0),
        (lambda: x + 1, 1),
        (lambda: x.clone().add_(1), 2),
        (lambda: (x @ y).sum(), 2),
        (lambda: x.contiguous(), 0),
        (lambda: torch.zeros_like(x), 1),
    ):
        with counting() as counted:
            run()
        assert len(counted.names) == count, counted.names


def test_an_update_is_one_launch_where_eager_takes_dozens(
    monkeypatch: pytest.MonkeyPatch, bench: Callable[[str], Any]
) -> None:
    torch.manual_seed(9)
    y, x, g = (torch.randn(2, 4, 16, 16) for _ in range(3))
    mask, lam = torch.rand(2, 1, 16, 16), torch.full((2,), 0.6)

    script = bench("kernels")
    with script.Launches() as autograd:
        eager = script.autograd_update(y, x, g, mask, lam, update="adam")
    with script.Launches() as closed:
        monkeypatch.setenv("IEDIT_KERNELS", "reference")
        reference = ito_definition.ito_step(y[:1], x[:1], g[:1], mask[:1], lam[:1], update="adam")
    monkeypatch.setenv("IEDIT_KERNELS", "auto")
    ours = ito_definition.ito_step(y, x, g, mask, lam, update="adam")
    seen = launches(monkeypatch)
    for update in UPDATES:
        with script.Launches() as around:
            ito_definition.ito_step(y, x, g, mask, lam, update=update)
        assert (seen, around.names) == (["ito_step_once"], [])  # torch is asked for nothing around the kernel
        seen.clear()
    torch.testing.assert_close(eager, ours, rtol=0, atol=1e-4)
    torch.testing.assert_close(reference, ours[:1], rtol=0, atol=1e-4)
    print(
        f"launches of one update: eager autograd + Adam {len(autograd.names)}, closed form {len(closed.names)}, Triton 1"
    )
    assert len(autograd.names) >= 20
    assert len(closed.names) >= 20
    for update in UPDATES:
        with script.Launches() as around:
            ito_definition.ito_step(y, x, g, mask, lam, update=update, k=30)
        assert (seen, around.names) == (["ito_step_many"], [])
        seen.clear()


def test_a_guided_step_is_one_launch_and_a_mask_two(
    monkeypatch: pytest.MonkeyPatch, bench: Callable[[str], Any]
) -> None:
    x, cond, uncond, reference, noise = (torch.randn(2, 4, 16, 16) for _ in range(5))
    half = torch.full((2,), 0.5)
    script, seen = bench("kernels"), launches(monkeypatch)
    mask = torch.rand(2, 1, 16, 16)
    with script.Launches() as around:
        guided_definition.guided_step(
            x, cond, uncond, 7.5, half, half, mask=mask, reference=reference, noise=noise, reference_abar=half
        )
    assert seen == ["guided_step_kernel"] and around.names == []
    seen.clear()
    heat = mask_definition.difference(torch.rand(1, 10, 4, 16, 16), torch.rand(1, 10, 4, 16, 16))
    mask_definition.mask_map(heat, sigma=1.0, norm="minmax", threshold=0.5)
    assert seen == ["difference_kernel", "threshold_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 20, 5, 7), 2), ((2, 80, 8, 8), 8), ((1, 48, 40, 37), 4), ((3, 8, 16, 16), 8), ((2, 32, 33, 31), 1)],
)
def test_group_norm(shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> None:
    """Groups that are one tile and of several parts, ragged in cells and in channels; far from zero, where squares would cancel."""
    rng = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=rng) * 3 + 20).to(dtype)
    weight, bias = torch.randn(2, shape[1], generator=rng).to(dtype)
    shift = torch.randn(shape[:2], generator=rng).to(dtype)
    for silu, added in ((False, None), (True, shift)):
        got = norm_definition.group_norm(x, groups, weight, bias, 1e-5, shift=added, silu=silu)
        wide = None if added is None else added.double()
        exact = norm_definition.group_norm_reference(
            x.double(), groups, weight.double(), bias.double(), 1e-5, wide, silu
        )
        # x - mean is off by a rounding of the mean, some 20, and is scaled by 1 / 3 and a weight of up to 4; twice that.
        bound = once(exact, dtype) + 2 * 20 * 2**-24 * 4 / 3
        assert float((got.double() - exact).abs().max()) <= bound
        assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_geglu(dtype: torch.dtype) -> None:
    x = (torch.randn(3, 7, 2 * 1300, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    exact = geglu_definition.geglu_reference(x.double())
    # 1 + erf is rounded at 1 where the gate is far below zero: 2^-24 of value times gate.
    bound = once(exact, dtype) + float(x.abs().max()) ** 2 * 2**-24
    assert float((geglu_definition.geglu(x).double() - exact).abs().max()) <= bound
