"""Cheaper ways of an edit: each leaves out exactly what it says, and a preset sets what the caller has left alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from iedit.runtime import sampling
from iedit.runtime.backends.eager import TorchBackend
from iedit.runtime.cli.main import main
from iedit.runtime.codec import Codec
from iedit.runtime.denoise_step import Condition
from iedit.runtime.editor import Editor, EditRequest, MaskOptions, Options
from iedit.runtime.errors import UsageError
from iedit.runtime.images import read_receipt
from iedit.runtime.network import Network
from iedit.runtime.options import ItoSettings
from iedit.runtime.presets import FIELDS, PRESETS, with_preset
from iedit.runtime.profile import Profile
from iedit.runtime.sampling import masked_sampling
from iedit.runtime.stage_cache import StageCache

Picture = Callable[..., Image.Image]
FEW = MaskOptions(seeds=2)


@pytest.fixture(params=["torch", "recorded"])
def editor(request: pytest.FixtureRequest, tiny: Any, taped: Any) -> Editor:
    backend = TorchBackend(tiny) if request.param == "torch" else taped.Recorded(tiny, taped.Captures())
    return Editor(tiny, backend, cache=StageCache(memory=0))


def edit(picture: Picture, method: str = "ito", **options: Any) -> EditRequest:
    chosen: dict[str, Any] = {"guidance_scale": 5.0} | ({"mask": FEW} if method != "sdedit" else {}) | options
    return EditRequest(
        picture(0), "a blue house on sand", "a red car on grass", method, steps=8, options=Options(**chosen)
    )


@pytest.mark.parametrize("method", ["ito", "iedit", "sdedit", "diffedit"])
def test_no_guided_step_is_the_edit_without_guidance(editor: Editor, picture: Picture, method: str) -> None:
    never, off = edit(picture, method, guidance_until=0.0), edit(picture, method, guidance_scale=1.0)
    one, other = (editor.edit(r) for r in (never, off))
    # The mask of the first is of guided predictions, which it is normalised by: up to rounding it is the same.
    torch.testing.assert_close(one.latent, other.latent, rtol=1e-4, atol=1e-5)
    always = editor.edit(edit(picture, method, guidance_until=1.0))
    assert not torch.allclose(always.latent, one.latent, atol=1e-2)


def test_guidance_ends_after_its_share_of_the_steps(tiny: Any) -> None:
    """In two samplings, the first with and the second without guidance, from where the first has ended."""
    path = tiny.schedule.levels(8).path()
    y = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    told = Condition(Codec(tiny).encode_text(["a blue house", "a red car"]))
    nothing = told.with_prompt(Codec(tiny).encode_text([""]))

    def run(start: torch.Tensor, levels: Any, **more: Any) -> torch.Tensor:
        network = Network(TorchBackend(tiny), tiny.schedule.prediction, 64, Profile())
        return network.run(masked_sampling(start, levels, told, nothing, 5.0, **more))

    whole = run(y, path, guided=3)
    halfway = run(y, path[:4])
    assert torch.equal(whole, run(halfway, path[3:], guided=0))
    assert torch.equal(run(y, path), run(y, path, guided=8)) and not torch.equal(run(y, path), whole)


def test_a_drawn_path_is_what_the_final_pass_is_guided_by(
    editor: Editor, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    guided_by: list[Any] = []
    exact = sampling.ito_pass

    def watched(y: Any, path: Any, *rest: Any, **named: Any) -> Any:
        latents = yield from exact(y, path, *rest, **named)
        (drawn if named["guidance"] is None else guided_by).append(
            latents if named["guidance"] is None else torch.stack([named["guidance"].at(level) for level in path])
        )
        return latents

    monkeypatch.setattr("iedit.runtime.pipeline.ito_pass", watched)
    result = editor.edit(edit(picture, guidance_path="drawn"))
    assert len(drawn) == len(guided_by) == 1 and torch.equal(drawn[0], guided_by[0])
    assert result.guidance_latent is not None and torch.equal(result.guidance_latent, drawn[0][-1, 0])
    assert "invert-guidance" not in result.profile.evaluations
    inverted = editor.edit(edit(picture))
    assert inverted.guidance_latent is not None and torch.equal(inverted.guidance_latent, result.guidance_latent)
    assert not torch.equal(inverted.latent, result.latent)


@pytest.mark.parametrize("options", [{}, {"guidance_until": 0.4}, {"guidance_path": "drawn"},
                                     {"guidance_until": 0.5, "guidance_path": "drawn", "lam": 1.0}])  # fmt: skip
@pytest.mark.parametrize("method", ["ito", "sdedit", "diffedit"])
def test_what_an_edit_is_expected_to_cost_is_what_it_costs(
    editor: Editor, picture: Picture, method: str, options: dict[str, Any]
) -> None:
    if method != "ito":
        options = {k: v for k, v in options.items() if k == "guidance_until"}
    if options.get("lam") == 1.0:
        options = {k: v for k, v in options.items() if k != "guidance_path"}
    seen: list[Any] = []
    result = editor.edit(edit(picture, method, **options), lambda p: seen.append(p.fraction))
    spent = sum(result.profile.evaluations.values())
    assert result.profile.expected == spent and seen[-1] == pytest.approx(1.0)


def test_a_sweep_and_a_cache_take_the_drawn_guidance_from_one_drawing(tiny: Any, picture: Picture) -> None:
    editor = Editor(tiny, TorchBackend(tiny))
    request = edit(picture, guidance_path="drawn", guidance_until=0.5)
    first = editor.edit(request)
    again = editor.edit(dataclasses.replace(request, options=dataclasses.replace(request.options, lam=0.2)))
    assert first.profile.evaluations["guidance"] > 0 and "guidance" not in {
        k for k, v in again.profile.evaluations.items() if v
    }
    # Neither is in the way of the other: the whole path under one key, the clean latent alone under another.
    other = editor.edit(edit(picture, guidance_until=0.5))
    # The inversion of the input is in the cache this time, so that the drawing shares no call with it: equal up to rounding.
    torch.testing.assert_close(other.guidance_latent, first.guidance_latent, rtol=1e-3, atol=1e-3)
    assert other.guidance_latent is not None and other.guidance_latent.shape == (4, 8, 8)
    assert editor.edit(request).latent.equal(first.latent)


def test_a_preset_sets_what_is_left_alone_and_matters() -> None:
    request = EditRequest("in.png", "a cat")
    fast = with_preset(request, "fast")
    assert (fast.options.guidance_until, fast.options.guidance_path, fast.options.mask.seeds, fast.steps) == (
        0.32,
        "drawn",
        4,
        None,
    )
    exact = with_preset(request, "exact")  # in so many words, whatever a checkpoint recommends
    assert exact.steps is None and exact.options == Options(
        lam=0.6, guidance_until=1.0, guidance_path="inverted", mask=MaskOptions(seeds=10)
    )
    paper = with_preset(request, "paper").options  # ITO section 4
    adam = ItoSettings(t_u=15, update="adam")
    assert (paper.lam, paper.guidance_scale, paper.guidance, paper.final) == (0.6, 7.5, adam, adam)
    assert paper.mask == MaskOptions(seeds=10, strength=0.5, threshold=0.1)
    assert (paper.guidance_until, paper.guidance_path) == (1.0, "inverted")
    faster = with_preset(request, "faster")
    assert (faster.steps, faster.options.timestep_spacing, faster.options.final.k, faster.options.guidance.k) == (
        12,
        "trailing",
        3,
        3,
    )
    own = dataclasses.replace(request, steps=30, options=Options(guidance_until=0.9, mask=MaskOptions(seeds=7)))
    kept = with_preset(own, "faster")
    assert (kept.steps, kept.options.guidance_until, kept.options.mask.seeds) == (
        30,
        0.9,
        7,
    ) and kept.options.guidance_path == "drawn"
    own_k = with_preset(request, "faster", keep={"final.k"}).options
    assert (own_k.final.k, own_k.guidance.k) == (1, 3)
    # What the edit would not use is not set, as it would be refused.
    assert with_preset(dataclasses.replace(request, mask="mask.png"), "fast").options.mask == MaskOptions()
    assert with_preset(dataclasses.replace(request, options=Options(lam=1.0)), "fast").options.guidance_path is None
    assert (
        with_preset(dataclasses.replace(request, options=Options(guidance_scale=1.0)), "fast").options.guidance_until
        is None
    )
    with pytest.raises(UsageError, match="expected one of paper, exact, fast, faster"):
        with_preset(request, "fastest")
    with pytest.raises(UsageError, match="method sdedit has none"):
        with_preset(dataclasses.replace(request, method="sdedit"), "fast")


def test_a_checkpoint_may_recommend_a_preset_and_exact_is_the_full_method_all_the_same(
    tiny: Any, picture: Picture
) -> None:
    recommended = {"guidance_until": 0.32, "guidance_path": "drawn", "mask_seeds": 4}
    plain, told = (
        Editor(m, TorchBackend(m), cache=StageCache(memory=0)) for m in (tiny, dataclasses.replace(tiny, **recommended))
    )

    def same(a: EditRequest, b: EditRequest, cost: int) -> None:
        """What the one makes that was told and the other that was not; the receipt has what ran, in numbers."""
        ours, theirs = told.edit(a), plain.edit(b)
        assert torch.equal(ours.latent, theirs.latent)
        assert ours.receipt["request"]["options"] == theirs.receipt["request"]["options"]
        assert sum(ours.profile.evaluations.values()) == cost

    request = EditRequest(picture(0), "a blue house on sand", "a red car on grass", steps=8)
    full = 20 + 8 + 16 + 8 + 16
    same(request, with_preset(request, "fast"), 8 + 8 + 2 * (8 + round(0.32 * 8)))
    same(with_preset(request, "exact"), request, full)
    # What changes the guidance image after it was drawn has it inverted.
    refined = dataclasses.replace(request, options=Options(guidance_until=1.0, refine=True, mask=MaskOptions(seeds=10)))
    same(refined, refined, full + 16 + 8)
    # Other methods were not measured with it.
    diffedit = dataclasses.replace(request, method="diffedit")
    same(diffedit, diffedit, 20 + 5 + 10)


def test_the_papers_letter_is_the_same_of_every_checkpoint(tiny: Any, picture: Picture) -> None:
    all_of_it = {"guidance_scale": 3.0, "guidance_until": 0.32, "guidance_path": "drawn", "mask_seeds": 4, "mask_strength": 1.0,
                 "mask_threshold": 0.4, "text_update_share": 1.0, "lambda_area": 1.0}  # fmt: skip
    told = dataclasses.replace(tiny, **all_of_it)
    one, other = (Editor(m, TorchBackend(m), cache=StageCache(memory=0)) for m in (tiny, told))
    adam = ItoSettings(t_u=15, update="adam")
    request = EditRequest(picture(0), "a blue house on sand", "a red car on grass", steps=6)
    by_hand = Options(lam=0.6, guidance_scale=7.5, guidance=adam, final=adam)
    want = one.edit(dataclasses.replace(request, options=by_hand))
    for editor in (one, other):
        got = editor.edit(with_preset(request, "paper"))
        assert torch.equal(got.latent, want.latent)
        assert got.receipt["request"]["options"] == want.receipt["request"]["options"]
    assert not torch.equal(other.edit(with_preset(request, "exact")).latent, want.latent)
    with_layout = dataclasses.replace(request, layouts={"pose": "pose.png"})
    assert with_preset(with_layout, "paper").options == with_preset(request, "paper").options


def test_text_to_image_is_guided_for_what_the_checkpoint_recommends(tiny: Any) -> None:
    plain, told = (Editor(m, TorchBackend(m)) for m in (tiny, dataclasses.replace(tiny, guidance_until=0.25)))
    want = plain.generate(["a red car"], steps=4, guidance_until=0.25)[0].tobytes()
    assert told.generate(["a red car"], steps=4)[0].tobytes() == want
    assert plain.generate(["a red car"], steps=4)[0].tobytes() != want
    assert (
        told.generate(["a red car"], steps=4, guidance_until=1.0)[0].tobytes()
        == plain.generate(["a red car"], steps=4)[0].tobytes()
    )


def test_text_to_image_draws_as_much_fresh_noise_as_the_checkpoint_recommends(tiny: Any) -> None:
    plain, told = (Editor(m, TorchBackend(m)) for m in (tiny, dataclasses.replace(tiny, generate_eta=0.5)))
    want = plain.generate(["a red car"], steps=4, eta=0.5)[0].tobytes()
    assert told.generate(["a red car"], steps=4)[0].tobytes() == want
    assert plain.generate(["a red car"], steps=4)[0].tobytes() != want
    assert (
        told.generate(["a red car"], steps=4, eta=0)[0].tobytes() == plain.generate(["a red car"], steps=4)[0].tobytes()
    )
    assert told.generate(["a red car"], steps=1)[0].size == (64, 64)  # the last step adds no noise
    for eta in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match=r"eta is .*, expected 0 \(DDIM\) to 1 \(DDPM\)"):
            plain.generate(["a red car"], eta=eta)


def test_every_preset_differs_from_the_default_in_its_fields_alone() -> None:
    for preset in PRESETS.values():
        changed = {
            f.name for f in dataclasses.fields(Options) if getattr(preset.options, f.name) != getattr(Options(), f.name)
        }
        assert changed <= {name.partition(".")[0] for name in FIELDS}
        preset.options.check()


def test_timesteps_are_laid_out_as_asked_and_a_cache_keeps_them_apart(tiny: Any, picture: Picture) -> None:
    editor, told = Editor(tiny, TorchBackend(tiny)), list[int]()
    exact = editor.denoiser.predict

    def predict(x: Any, t: Any, condition: Any) -> Any:
        told.extend(t.tolist())
        return exact(x, t, condition)

    editor.denoiser.predict = predict  # type: ignore[method-assign]
    results = {}
    for spacing, first in (("leading", 7 * 125 + 1), ("trailing", 999), ("linspace", 999), (None, 7 * 125 + 1)):
        told.clear()
        results[spacing] = editor.edit(edit(picture, "sdedit", timestep_spacing=spacing, ratio=1.0))
        assert max(told) == first and results[spacing].receipt["request"]["options"]["timestep_spacing"] == spacing
    assert torch.equal(results["leading"].latent, results[None].latent)
    assert len({r.latent.sum().item() for r in results.values()}) == 3
    inverted = {s: editor.edit(edit(picture, "diffedit", timestep_spacing=s)).latent for s in ("leading", "trailing")}
    assert not torch.equal(inverted["leading"], inverted["trailing"])  # the inversion is cached by its timesteps
    with pytest.raises(UsageError, match="timestep_spacing is 'log', expected one of leading, linspace, trailing"):
        Options(timestep_spacing="log").check()


@pytest.mark.parametrize("options", [{"refine": True}, {"round_trip": True}])
def test_what_changes_the_guidance_image_afterwards_is_refused_with_its_drawn_path(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="guidance_path drawn goes with neither"):
        Options(guidance_path="drawn", **options).check()


def test_on_the_command_line_what_is_given_beside_a_preset_stays_and_the_receipt_says_what_ran(
    tmp_path: Path, tiny_checkpoint_cli: Path, picture: Picture
) -> None:
    picture(0, (32, 32)).save(tmp_path / "in.png")

    def run(*words: str) -> dict[str, Any]:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
        base = [
            "edit",
            str(tmp_path / "in.png"),
            "--prompt",
            "a red car",
            "--model",
            str(tiny_checkpoint_cli),
            "--backend",
            "torch",
        ]
        done = CliRunner().invoke(main, [*base, "--output", str(out), *words])
        assert done.exit_code == 0, done.output
        assert f"note: preset {words[1]}: {PRESETS[words[1]].says}" in done.stderr
        receipt = read_receipt(out)["request"]
        return receipt["options"] | {"steps": receipt["steps"]}

    fast = run("--preset", "fast")
    assert (fast["guidance_until"], fast["guidance_path"], fast["mask"]["seeds"], fast["steps"]) == (
        0.32,
        "drawn",
        4,
        25,
    )
    given = run("--preset", "faster", "--mask-seeds", "10", "--guidance-until", "1", "--steps", "5")
    assert (given["guidance_until"], given["guidance_path"], given["mask"]["seeds"], given["steps"]) == (
        1.0,
        "drawn",
        10,
        5,
    )
    paper = run("--preset", "paper", "--steps", "3")
    assert (paper["final"]["update"], paper["guidance"]["t_u"], paper["guidance_scale"], paper["lam"]) == (
        "adam",
        15,
        7.5,
        0.6,
    )
    clipped = run("--preset", "paper", "--steps", "3", "--update", "clipped", "--t-u", "2")
    assert (clipped["final"]["update"], clipped["guidance"]["update"], clipped["guidance"]["t_u"]) == (
        "clipped",
        "clipped",
        2,
    )
    refused = CliRunner().invoke(
        main, ["edit", str(tmp_path / "in.png"), "--prompt", "a car", "--method", "sdedit", "--preset", "fast"]
    )
    assert refused.exit_code == 2 and "--preset: method sdedit has none" in refused.output
