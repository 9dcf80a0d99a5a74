"""The methods that ITO and iEdit are compared with: identities, and each written a second time or taken from diffusers."""

from __future__ import annotations

import dataclasses
import logging
import random
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageDraw
from torch import Tensor

from iedit.runtime.backends.eager import TorchBackend
from iedit.runtime.cli.main import main
from iedit.runtime.codec import Codec
from iedit.runtime.denoise_step import AttentionControl, Condition
from iedit.runtime.editor import Editor, EditRequest, MaskOptions, Options
from iedit.runtime.errors import RunError, UsageError
from iedit.runtime.images import to_tensor
from iedit.runtime.network import Network
from iedit.runtime.profile import Profile
from iedit.runtime.rivals import IndependentReference, ddpm_invert, optimise_null_text, prompt_to_prompt
from iedit.runtime.sampling import invert, masked_sampling
from iedit.runtime.schedule import PREDICTIONS, ddim_coefficients, ddim_sigma, seeded_noise

logging.getLogger("torch.__trace").setLevel(logging.WARNING)  # pytest would keep all that the tracer tells

SOURCE, PROMPT, LONGER = (
    "a red car on grass at noon",
    "a blue house on sand at noon",
    "a red car and a tree on grass at noon",
)
SHAPE = (4, 8, 8)
STEPS = 6
Picture = Callable[..., Image.Image]


class OneByOne:
    """The network, as few samples at a time as belong together: it rounds the same in every batch."""

    def __init__(self, model: Any):
        self.inner = TorchBackend(model)

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        n = condition.together
        pieces = [slice(i, i + n) for i in range(0, len(x), n)]
        return torch.cat([self.inner.predict(x[p], t[p], condition.take(p)) for p in pieces])


def ask(picture: Picture, method: str = "p2p", prompt: str = PROMPT, **more: Any) -> EditRequest:
    options = {"guidance_scale": 5.0} | more.pop("options", {})
    return EditRequest(picture(more.pop("scene", 0)), prompt, SOURCE, method, steps=more.pop("steps", STEPS),
                       options=Options(**options), **more)  # fmt: skip


def network(model: Any, denoiser: Any = None, max_batch: int = 64) -> Network:
    return Network(denoiser or TorchBackend(model), model.schedule.prediction, max_batch, Profile())


def told(model: Any, *texts: str) -> Condition:
    return Condition(Codec(model).encode_text(texts))


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference in units of the largest value."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def disc() -> Image.Image:
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).ellipse((12, 16, 45, 50), fill=255)
    return mask


# --- Prompt-to-prompt ---------------------------------------------------------------------------------------------


class Maps:
    """An attention processor that forms its maps, keeps them, and puts those of another run in their place."""

    def __init__(self, cross: Tensor, own: Tensor, queries: int):
        self.cross, self.own, self.queries = cross, own, queries
        self.kept: dict[int, Tensor] = {}
        self.injects = (False, False)  # cross-attention, self-attention

    def __call__(self, attn: Any, x: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        context = x if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (attn.head_to_batch_dim(v) for v in (attn.to_q(x), attn.to_k(context), attn.to_v(context)))
        maps = attn.get_attention_scores(query, key)
        cross_on, self_on = self.injects
        if encoder_hidden_states is not None and cross_on:
            maps = self.kept[id(attn)] @ self.cross + maps * self.own
        elif encoder_hidden_states is None and self_on and maps.shape[1] <= self.queries:
            maps = self.kept[id(attn)]
        else:
            self.kept[id(attn)] = maps
        out: Tensor = attn.to_out[0](attn.batch_to_head_dim(maps @ value))
        return out


@pytest.mark.parametrize(
    ("prompt", "correction", "more"),
    [
        (PROMPT, "direct", {}),
        (LONGER, "direct", {"reweight": (("noon", 2.5),)}),
        (PROMPT, "none", {"self_replace": 1.0, "cross_replace": 0.5}),
        (LONGER, "none", {"reweight": (("tree", 2.5),)}),
    ],
)
def test_p2p_is_the_paper_with_maps_that_are_formed_and_read(
    tiny_folder: Any, picture: Picture, prompt: str, correction: str, more: dict[str, Any]
) -> None:
    """Source and edit one after the other through diffusers' UNet, whose maps are read from the one and put into the other."""
    from iedit.runtime.alignment import alignment
    from iedit.runtime.model.model import load_model

    model = load_model(str(tiny_folder), [], device="cpu")
    options = {"inversion_correction": correction, "self_replace_cells": 0.25} | more
    result = Editor(model, TorchBackend(model)).edit(ask(picture, prompt=prompt, options=options))
    text = {t: Codec(model).encode_text([t]) for t in (SOURCE, prompt, "")}
    path = model.schedule.levels(STEPS).path()
    trajectory = network(model).run(invert(result.source_latent[None], path, Condition(text[SOURCE])))
    cross, own = alignment(model, SOURCE, prompt, 1, reweight=more.get("reweight", ()))
    maps = Maps(cross, own, queries=16)
    model.unet.set_attn_processor(maps)
    assert any(p.__class__ is Maps for p in model.unet.attn_processors.values())
    cross_steps, self_steps = int(STEPS * more.get("cross_replace", 0.8)), int(STEPS * more.get("self_replace", 0.4))

    @torch.no_grad()
    def guided(x: Tensor, t: int, prompt: str, injects: tuple[bool, bool]) -> Tensor:
        maps.injects = (False, False)
        kept = dict(maps.kept)
        low: Tensor = model.unet(x, torch.tensor([t]), text[""]).sample
        maps.kept, maps.injects = kept, injects  # the unconditional half's maps are nobody's
        high: Tensor = model.unet(x, torch.tensor([t]), text[prompt]).sample
        return low + 5.0 * (high - low)

    x = y = trajectory[0]
    for i, (level, cleaner) in enumerate(pairwise(path)):
        x = trajectory[i] if correction == "direct" else x
        c_x, c_out = ddim_coefficients(level.abar, cleaner.abar)
        of_source = guided(x, level.timestep, SOURCE, (False, False))
        y = c_x * y + c_out * guided(y, level.timestep, prompt, (i < cross_steps, i < self_steps))
        x = c_x * x + c_out * of_source
    assert gap(result.latent[None], y) < 2e-5
    free = Editor(model, TorchBackend(model)).edit(
        ask(picture, prompt=prompt, options=options | {"cross_replace": 0.0, "self_replace": 0.0, "reweight": ()})
    )
    assert gap(free.latent, result.latent) > 1e-3  # the maps matter


def run_p2p(model: Any, trajectory: Tensor, denoiser: Any = None, max_batch: int = 64, **more: Any) -> Tensor:
    """The sampler on a batch of two; by default with everything replaced."""
    from iedit.runtime.alignment import alignment

    pairs = [alignment(model, SOURCE, p, 1) for p in (PROMPT, LONGER)]
    cross, own = (torch.stack(v) for v in zip(*pairs))
    path = model.schedule.levels(STEPS).path()
    given: dict[str, Any] = {
        "cross_steps": STEPS,
        "self_steps": STEPS,
        "self_queries": 64,
        "direct": True,
        "prediction": model.schedule.prediction,
    }
    sampler = prompt_to_prompt(trajectory, path, told(model, SOURCE, SOURCE), told(model, PROMPT, LONGER), told(model, "", ""), 5.0,
                               cross=cross, own=own, **(given | more))  # fmt: skip
    return network(model, denoiser, max_batch).run(sampler)


@pytest.fixture(scope="module")
def trajectory(tiny: Any) -> Tensor:
    x0 = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    return network(tiny).run(invert(x0, tiny.schedule.levels(STEPS).path(), told(tiny, SOURCE, SOURCE)))


@pytest.mark.parametrize("direct", [True, False])
def test_p2p_that_replaces_nothing_is_plain_sampling_of_both_branches(
    tiny: Any, trajectory: Tensor, direct: bool
) -> None:
    got = run_p2p(tiny, trajectory, cross_steps=0, self_steps=0, direct=direct)
    path, low = tiny.schedule.levels(STEPS).path(), told(tiny, "", "")
    plain = [network(tiny).run(masked_sampling(trajectory[0], path, c, low, 5.0))
             for c in (told(tiny, SOURCE, SOURCE), told(tiny, PROMPT, LONGER))]  # fmt: skip
    assert gap(got[1], plain[1]) < 1e-5
    assert torch.equal(got[0], trajectory[-1]) if direct else gap(got[0], plain[0]) < 1e-5


class Spy(OneByOne):
    def __init__(self, model: Any):
        super().__init__(model)
        self.seen: list[tuple[Tensor, Condition]] = []

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.seen.append((x, condition))
        return super().predict(x, t, condition)


def test_the_source_of_direct_inversion_is_its_trajectory_bit_for_bit(tiny: Any, trajectory: Tensor) -> None:
    spy = Spy(tiny)
    got = run_p2p(tiny, trajectory, spy)
    assert torch.equal(got[0], trajectory[-1])
    assert len(spy.seen) == STEPS
    for i, (x, condition) in enumerate(spy.seen):
        rows = x.unflatten(0, (2, 3))  # of each picture: the unconditional half of the edit, the source, the edit
        assert torch.equal(rows[:, 1], trajectory[i]) and torch.equal(rows[:, 0], rows[:, 2])
        assert condition.together == 3 and condition.attention is not None
        assert condition.attention.edited.tolist() == [False, False, True] * 2


def test_p2p_with_the_source_prompt_and_no_guidance_reconstructs(tiny: Any, picture: Picture) -> None:
    editor, errors = Editor(tiny, TorchBackend(tiny)), []
    for steps in (12, 48):
        result = editor.edit(ask(picture, prompt=SOURCE, steps=steps, options={"guidance_scale": 1.0}))
        errors.append(gap(result.latent, result.source_latent))
    assert errors[1] < 0.5 * errors[0]  # what is left is the error of the inversion's steps


def test_p2p_with_the_source_prompt_and_direct_inversion_moves_only_by_the_guidance(
    tiny: Any, picture: Picture
) -> None:
    """With the maps of the source in every layer the error that is left is smaller than without."""
    editor = Editor(tiny, TorchBackend(tiny))
    everywhere = {"cross_replace": 1.0, "self_replace": 1.0, "self_replace_cells": 1.0, "guidance_scale": 1.0}
    held = editor.edit(ask(picture, prompt=SOURCE, options=everywhere))
    loose = editor.edit(
        ask(picture, prompt=SOURCE, options={"cross_replace": 0.0, "self_replace": 0.0, "guidance_scale": 1.0})
    )
    assert gap(held.latent, held.source_latent) < gap(loose.latent, loose.source_latent)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("max_batch", [1, 7])
def test_what_belongs_together_is_never_split(tiny: Any, trajectory: Tensor, direct: bool, max_batch: int) -> None:
    want = run_p2p(tiny, trajectory, OneByOne(tiny), direct=direct)
    spy = Spy(tiny)
    assert torch.equal(run_p2p(tiny, trajectory, spy, max_batch, direct=direct), want)
    size = 3 if direct else 4
    assert {len(x) for x, _ in spy.seen} <= {size, 2 * size}
    assert len(spy.seen) == STEPS * (2 if max_batch < 2 * size else 1)


def test_memory_that_runs_out_halves_to_one_edit_and_no_further(tiny: Any, trajectory: Tensor) -> None:
    class Small(Spy):
        fits = 3

        def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            if len(x) > self.fits:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().predict(x, t, condition)

    small = Small(tiny)
    assert torch.equal(run_p2p(tiny, trajectory, small), run_p2p(tiny, trajectory, OneByOne(tiny)))
    assert {len(x) for x, _ in small.seen} == {3}
    small.fits = 2
    with pytest.raises(RunError, match=r"one edit, which takes 3 samples together, of .* does not fit"):
        run_p2p(tiny, trajectory, small)


def test_conditions_with_other_control_share_no_call(tiny: Any) -> None:
    a = told(tiny, SOURCE, PROMPT)
    length = a.prompt_embeds.shape[1]
    control = AttentionControl(torch.tensor([False, True]), torch.zeros(2, length, length), torch.ones(2, length), 16)
    b = dataclasses.replace(a, attention=control, together=2)
    assert a.batching_key != b.batching_key != dataclasses.replace(b, together=4).batching_key
    both = Condition.cat([a, b])
    assert both.together == 2 and both.attention is not None
    assert both.attention.edited.tolist() == [False, False, False, True]
    assert both.attention.own[:2].eq(1).all() and not both.attention.cross[:2].any()
    # Samples that are not edited keep their maps: what is computed of them is what is computed without control.
    x, t = torch.randn(4, *SHAPE), torch.full((4,), 300)
    backend = TorchBackend(tiny)
    torch.testing.assert_close(
        backend.predict(x, t, both)[:3], backend.predict(x, t, Condition.cat([a, a]))[:3], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    "options", [{}, {"inversion_correction": "none", "replacement": "refine", "reweight": (("a", 2.0),)}]
)
def test_a_batch_of_p2p_is_its_single_runs(
    tiny: Any, picture: Picture, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    encode = Codec.encode
    monkeypatch.setattr(Codec, "encode", lambda self, x, note=None: torch.cat([encode(self, i) for i in x.split(1)]))
    requests = [ask(picture, steps=3, options=options), ask(picture, steps=3, prompt=LONGER, scene=1, options=options),
                ask(picture, steps=3, prompt="a green tree on snow", scene=2, options=options)]  # fmt: skip
    together = Editor(tiny, OneByOne(tiny)).edit_many(requests)
    assert len({id(r.profile) for r in together}) == 1
    for asked, result in zip(requests, together, strict=True):
        assert torch.equal(result.latent, Editor(tiny, OneByOne(tiny)).edit(asked).latent)
    for asked, result in zip(requests, Editor(tiny, TorchBackend(tiny)).edit_many(requests), strict=True):
        assert gap(result.latent, Editor(tiny, TorchBackend(tiny)).edit(asked).latent) < 1e-4


def test_a_weight_of_one_is_no_change_and_another_is_one(editor: Editor, picture: Picture) -> None:
    plain, one, three = (
        editor.edit(ask(picture, options={"reweight": words})).latent
        for words in ((), (("blue", 1.0), ("house", 1.0)), (("house", 3.0),))
    )
    assert torch.equal(plain, one) and gap(three, plain) > 1e-3


@pytest.mark.parametrize("options", [{}, {"composite": "pixel"}])
def test_p2p_blends_where_a_mask_is_given_or_asked_for(
    editor: Editor, picture: Picture, options: dict[str, Any]
) -> None:
    free = editor.edit(ask(picture))
    assert free.mask is None and "mask" not in free.profile.evaluations
    empty = editor.edit(ask(picture, mask=Image.new("L", (64, 64)), options=options))
    assert torch.equal(empty.latent, empty.source_latent)
    whole = editor.edit(ask(picture, mask=Image.new("L", (64, 64), 255)))
    assert torch.equal(whole.latent, free.latent)
    part = editor.edit(ask(picture, mask=disc(), options=options))
    assert not torch.equal(part.latent, free.latent) and not torch.equal(part.latent, part.source_latent)
    found = editor.edit(ask(picture, options={"mask": MaskOptions(mode="single", seeds=2)}))
    assert found.mask is not None and found.profile.evaluations["mask"] == 4


@pytest.mark.parametrize(
    ("options", "sample"),
    [
        ({}, 3 * STEPS),
        ({"inversion_correction": "none"}, 4 * STEPS),
        ({"guidance_scale": 1.0}, 2 * STEPS),
        ({"guidance_until": 0.5}, 3 * STEPS // 2 + 2 * STEPS // 2),
        ({"ratio": 0.5}, 3 * STEPS // 2),
    ],
)
def test_what_p2p_costs(editor: Editor, picture: Picture, options: dict[str, Any], sample: int) -> None:
    profile = editor.edit(ask(picture, options=options)).profile
    assert profile.evaluations["sample"] == sample and profile.expected == sum(profile.evaluations.values())
    assert editor.edit(ask(picture, options=options)).profile.cached == ["encode", "invert"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"source_prompt": " "}, "needs a source prompt"),
        ({"layouts": {"pose": Image.new("RGB", (64, 64))}}, "method p2p takes no layouts"),
        ({"options": Options(reweight=(("boat", 2.0),))}, "no word 'boat'; its words are a, blue, house"),
        ({"options": Options(reweight=(("blue", 200.0),))}, "reweight blue is 200.0, expected -10 to 10"),
        ({"options": Options(reweight=(("blue", 2.0),), cross_replace=0.0)}, "--reweight: .* cross_replace 0"),
        ({"prompt": LONGER, "options": Options(replacement="replace")}, "equally many words"),
        ({"options": Options(replacement="swap")}, "replacement is 'swap', expected one of"),
        ({"options": Options(inversion_correction="exact")}, "inversion_correction is 'exact'"),
        ({"options": Options(composite="pixel")}, "--composite: it would not be used, there is no mask"),
    ],
)
def test_what_p2p_cannot_do_is_a_line(editor: Editor, picture: Picture, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        editor.edit(dataclasses.replace(ask(picture), **changes))


# --- null-text optimisation ---------------------------------------------------------------------------------------


def published_null_text(model: Any, trajectory: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The published loop on one picture, through diffusers' UNet and scheduler: embeddings of each step, and where sampling ends."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_pretrained(model.folder / "scheduler")
    scheduler.set_timesteps(STEPS)
    text = {t: Codec(model).encode_text([t]) for t in (SOURCE, "")}
    z, embeds, found = trajectory[0], text[""].clone(), []
    for i, t in enumerate(scheduler.timesteps):
        embeds = embeds.clone().detach().requires_grad_()
        adam = torch.optim.Adam([embeds], lr=1e-2 * (1 - i / STEPS / 2))
        with torch.no_grad():
            cond = model.unet(z, t, text[SOURCE]).sample
        for _ in range(10):
            low = model.unet(z, t, embeds).sample
            loss = (scheduler.step(low + scale * (cond - low), t, z).prev_sample - trajectory[i + 1]).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            if loss.item() < 1e-5 + 1e-3 * i / STEPS:
                break
        embeds = embeds.detach()
        found.append(embeds)
        with torch.no_grad():
            low = model.unet(z, t, embeds).sample
            z = scheduler.step(low + scale * (cond - low), t, z).prev_sample
    return torch.stack(found), z


def fitted(model: Any, trajectory: Tensor, scale: float = 3.0, **more: Any) -> Tensor:
    source, low = (told(model, *[t] * trajectory.shape[1]) for t in (SOURCE, ""))
    path, prediction = model.schedule.levels(STEPS).path(), model.schedule.prediction
    return network(model).run(optimise_null_text(trajectory, path, source, low, scale, prediction=prediction, **more))


def test_null_text_is_the_published_loop_and_pictures_do_not_depend_on_each_other(
    tiny: Any, trajectory: Tensor
) -> None:
    got = fitted(tiny, trajectory, guided=4)  # embeddings for as many steps as are guided
    assert got.shape == (4, 2, *told(tiny, "").prompt_embeds.shape[1:])
    want, _ = published_null_text(tiny, trajectory[:, 1:], 3.0)
    # Adam divides by the root of the gradient's square: where that is as small as its rounding, the sign of a step is rounding's.
    near = (got[:, 1] - want[:4, 0]).abs() < 1e-4
    assert near.float().mean() > 0.99


def test_the_embeddings_that_null_text_begins_with_change_nothing(tiny: Any, trajectory: Tensor) -> None:
    same = told(tiny, "").prompt_embeds.expand(STEPS, 2, -1, -1)
    assert torch.equal(*(run_p2p(tiny, trajectory, direct=False, null_text=n) for n in (None, same)))


def test_null_text_leaves_a_step_between_equal_levels_alone(tiny: Any, trajectory: Tensor) -> None:
    """As the last one is where timesteps begin at 0 and the clean level has that timestep's noise."""
    model = dataclasses.replace(tiny, schedule=dataclasses.replace(tiny.schedule, steps_offset=0))
    path = model.schedule.levels(STEPS).path()
    assert path[-2].abar == path[-1].abar
    got = fitted(model, trajectory)
    assert got.isfinite().all() and torch.equal(got[-1], got[-2])


def test_null_text_brings_a_picture_back_to_its_inversion() -> None:
    """On weights that were trained, where guided sampling under the source prompt alone drifts off. The error that is left is 0.73 of that
    at 8 steps, 0.3 at 25, 0.16 at 50: each step has its 10 steps of Adam and the more of them the less there is to make up for."""
    from iedit.runtime.model.model import load_model
    from iedit.training import world

    model, scene = load_model("picturebook", [], device="cpu"), world.random_scene(random.Random(3), 2)
    x0 = Codec(model).encode(to_tensor(world.render(scene)))
    path, source, low = model.schedule.levels(5).path(), told(model, world.caption(scene)), told(model, "")
    run = network(model).run
    trajectory = run(invert(x0, path, source))
    found = run(optimise_null_text(trajectory, path, source, low, 5.0, prediction=model.schedule.prediction))
    length = source.prompt_embeds.shape[1]
    given: dict[str, Any] = {"cross": torch.eye(length)[None], "own": torch.zeros(1, length), "cross_steps": 0, "self_steps": 0, "self_queries": 0,
             "direct": False, "prediction": model.schedule.prediction}  # fmt: skip
    free, held = (
        run(prompt_to_prompt(trajectory, path, source, source, low, 5.0, **given, null_text=n)) for n in (None, found)
    )
    errors = [float((latents[0] - x0).square().mean().sqrt()) for latents in (free, held)]
    assert errors[1] < 0.8 * errors[0], errors


def test_a_gradient_is_that_of_autograd_whatever_the_batch(tiny: Any) -> None:
    condition, x, t = told(tiny, SOURCE, PROMPT), torch.randn(2, *SHAPE), torch.tensor([300, 20])
    wanted = torch.randn(2, *SHAPE)
    got = TorchBackend(tiny).gradient(x, t, condition, wanted)
    for i in range(2):
        embeds = condition.prompt_embeds[i : i + 1].clone().requires_grad_()
        loss = (tiny.unet(x[i : i + 1], t[i : i + 1], embeds).sample - wanted[i]).square().mean()
        loss.backward()
        assert embeds.grad is not None
        assert gap(got[i, :-1], embeds.grad.flatten()) < 1e-4 and got[i, -1] == pytest.approx(loss.item(), rel=1e-5)
    assert all(not p.requires_grad and p.grad is None for p in tiny.unet.parameters())


def test_an_edit_with_null_text(editor: Editor, picture: Picture) -> None:
    options = {"inversion_correction": "null-text"}
    seen: list[Any] = []
    result = editor.edit(ask(picture, steps=3, options=options), seen.append)
    spent = result.profile.evaluations
    assert 3 * 3 <= spent["null-text"] <= 3 * 12 and spent["sample"] == 4 * 3
    assert result.profile.expected == sum(spent.values()) and seen[-1].fraction == 1
    fractions = [p.fraction for p in seen]
    assert fractions == sorted(fractions) and all(0 <= p.step <= p.steps for p in seen)
    again = editor.edit(
        ask(picture, steps=3, prompt=LONGER, options=options)
    )  # another edit of the picture fits nothing again
    assert again.profile.cached == ["encode", "invert", "null-text"]
    other = editor.edit(ask(picture, steps=3, options=options | {"guidance_scale": 4.0}))
    assert "null-text" not in other.profile.cached
    with pytest.raises(UsageError, match="null-text fits the unconditional half"):
        editor.edit(ask(picture, steps=3, options=options | {"guidance_scale": 1.0}))
    together = editor.edit_many(
        [ask(picture, steps=3, options=options), ask(picture, steps=3, scene=1, prompt=LONGER, options=options)]
    )
    assert gap(together[0].latent, result.latent) < 1e-3


def test_null_text_wants_gradients_in_float32(tiny: Any, picture: Picture) -> None:
    asked = ask(picture, options={"inversion_correction": "null-text"})
    with pytest.raises(
        UsageError, match="null-text needs gradients, and backend 'compile' has none; use --backend torch"
    ):
        Editor(tiny, OneByOne(tiny), backend="compile").edit(asked)
    backend = TorchBackend(tiny)
    backend.dtype = torch.bfloat16
    with pytest.raises(UsageError, match="computed in float32, not in bfloat16"):
        backend.gradient(torch.zeros(1, *SHAPE), torch.tensor([1]), told(tiny, ""), torch.zeros(1, *SHAPE))


# --- DDPM inversion -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("final", [0.9991, 1.0])
def test_ddpm_returns_the_input_whatever_is_predicted_and_whatever_the_last_level(
    tiny: Any, picture: Picture, prediction: str, final: float
) -> None:
    """To a last level of abar 1 a step has no noise of its own."""
    model = dataclasses.replace(
        tiny, schedule=dataclasses.replace(tiny.schedule, prediction=prediction, final_abar=final)
    )
    same_scale = {"guidance_scale": 2.0, "source_guidance_scale": 2.0}
    asked = ask(picture, "ddpm", SOURCE, options=same_scale, steps=8)
    editor = Editor(model, OneByOne(model))
    result = editor.edit(asked)
    assert gap(result.latent, result.source_latent) < 1e-6
    assert gap(editor.edit(dataclasses.replace(asked, prompt=PROMPT)).latent, result.latent) > 1e-2


def test_the_noise_of_ddpm_inversion_is_that_of_ledits(tiny_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' LEDITS++ pipeline on the same weights, noises and guidance; its maps are divided by their standard deviation, and its
    `invert` takes the two results of encode_prompt in the wrong order, so the two prompts are exchanged here."""
    import sys

    from diffusers import DDIMScheduler, LEditsPPPipelineStableDiffusion

    from iedit.runtime.model.model import load_model

    model, steps, run = load_model(str(tiny_folder), [], device="cpu"), 25, 16
    path = model.schedule.levels(steps).path(steps - run)
    x0 = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(run, 1, *SHAPE, generator=torch.Generator().manual_seed(1))
    got = network(model).run(
        ddpm_invert(IndependentReference(x0, noise, path), told(model, ""), told(model, SOURCE), 3.5)
    )
    sigmas = [ddim_sigma(a.abar, b.abar, 1.0) for a, b in pairwise(path)]
    pipe = LEditsPPPipelineStableDiffusion(
        vae=model.vae, text_encoder=model.text_encoder, tokenizer=model.tokenizer, unet=model.unet, safety_checker=None,
        scheduler=DDIMScheduler.from_pretrained(model.folder / "scheduler"), feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    drawn = iter(noise.flip(0))  # the least noisy level first
    monkeypatch.setattr(sys.modules[type(pipe).__module__], "randn_tensor", lambda shape, **_: next(drawn))
    monkeypatch.setattr(pipe, "encode_image", lambda *_, **__: (x0, None))
    add = pipe.scheduler.add_noise  # of DDIM, which takes no timestep in float32
    monkeypatch.setattr(pipe.scheduler, "add_noise", lambda x, n, t: add(x, n, t.long()))
    pipe.invert(None, source_prompt=SOURCE, source_guidance_scale=3.5, num_inversion_steps=run, skip=steps / run - 1)
    assert pipe.zs.shape == (run, 1, *SHAPE)
    for ours, theirs, sigma in zip(got[1:], pipe.zs, sigmas, strict=True):
        assert gap(ours / sigma, theirs) < 1e-4
    assert gap(got[0], pipe.init_latents) < 1e-6


def test_ddpm_blends_with_the_source_at_its_own_noise(editor: Editor, picture: Picture) -> None:
    free = editor.edit(ask(picture, "ddpm"))
    assert free.mask is None
    empty = editor.edit(ask(picture, "ddpm", mask=Image.new("L", (64, 64))))
    assert torch.equal(empty.latent, empty.source_latent)
    whole = editor.edit(ask(picture, "ddpm", mask=Image.new("L", (64, 64), 255)))
    assert torch.equal(whole.latent, free.latent)
    asked = ask(picture, "ddpm", SOURCE, mask=disc(), options={"guidance_scale": 2.0, "source_guidance_scale": 2.0})
    both = editor.edit(asked)  # kept outside the mask, returned inside it
    assert gap(both.latent, both.source_latent) < 1e-5


def test_ddpm_noises_each_level_by_the_pictures_seed_and_finds_its_noise_once(editor: Editor, picture: Picture) -> None:
    first = editor.edit(ask(picture, "ddpm", seed=3))
    assert first.profile.evaluations == {"encode": 0, "invert": 6, "sample": 6, "decode": 0}  # the last 3 of 6 steps
    other = editor.edit(ask(picture, "ddpm", LONGER, seed=3))
    assert other.profile.cached == ["encode", "invert"]
    assert not torch.equal(editor.edit(ask(picture, "ddpm", seed=4)).latent, first.latent)
    weaker = editor.edit(ask(picture, "ddpm", seed=3, options={"source_guidance_scale": 1.0}))
    assert weaker.profile.evaluations["invert"] == 3 and weaker.profile.expected == 9


def test_ddpms_guidance_is_the_papers_or_what_the_checkpoint_recommends(editor: Editor, picture: Picture) -> None:
    for recommended, scale, edit, source in ((False, 7.5, 15.0, 3.5), (True, 5.0, 5.0, 7 / 3)):
        model = dataclasses.replace(editor.model, guidance_scale=scale, recommends_guidance=recommended)
        asked = dataclasses.replace(ask(picture, "ddpm"), options=Options())
        options = Editor(model, editor.denoiser).edit(asked).receipt["request"]["options"]
        assert options["guidance_scale"] == edit and options["source_guidance_scale"] == pytest.approx(source)


# --- InstructPix2Pix ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def instructing_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random checkpoint with a UNet of 8 channels and no ControlNets, as diffusers saves an InstructPix2Pix one."""
    from diffusers import UNet2DConditionModel

    folder = tmp_path_factory.mktemp("instructing") / "checkpoint"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("controlnet-*"))
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionInstructPix2PixPipeline"}')
    torch.manual_seed(5)
    unet: Any = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet") | {"in_channels": 8})
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if "attn2.to_out.0.weight" in name or "conv_out.weight" in name:
                p *= 3
    unet.save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def instructing(instructing_folder: Path) -> Any:
    from iedit.runtime.model.model import load_model

    return load_model(str(instructing_folder), device="cpu")


def instruction(picture: Picture, **more: Any) -> EditRequest:
    return dataclasses.replace(ask(picture, "ip2p", "make it a blue house", **more), source_prompt="")


@pytest.mark.parametrize("image_scale", [1.5, 1.0])
@pytest.mark.parametrize("negative", ["", "a green tree"])
def test_ip2p_is_diffusers_pipeline(
    instructing: Any, picture: Picture, monkeypatch: pytest.MonkeyPatch, image_scale: float, negative: str
) -> None:
    from diffusers import DDIMScheduler, StableDiffusionInstructPix2PixPipeline

    options = {"guidance_scale": 7.5, "image_guidance_scale": image_scale, "negative_prompt": negative}
    result = Editor(instructing, TorchBackend(instructing)).edit(
        instruction(picture, options=options, seed=5, steps=20)
    )
    pipe = StableDiffusionInstructPix2PixPipeline(
        vae=instructing.vae, text_encoder=instructing.text_encoder, tokenizer=instructing.tokenizer, unet=instructing.unet,
        scheduler=DDIMScheduler.from_pretrained(instructing.folder / "scheduler"), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(pipe.image_processor, "preprocess", lambda image: to_tensor(image))
    want = pipe(prompt="make it a blue house", negative_prompt=negative, image=picture(0), num_inference_steps=20,
                guidance_scale=7.5, image_guidance_scale=image_scale, latents=seeded_noise(5, "sample", SHAPE)[None],
                output_type="latent").images  # fmt: skip
    assert gap(result.latent[None], want) < 1e-5


@pytest.mark.parametrize(
    ("options", "sample"),
    [
        ({}, 3 * STEPS),
        ({"image_guidance_scale": 1.0}, 2 * STEPS),
        ({"image_guidance_scale": 1.0, "guidance_scale": 1.0}, STEPS),
        ({"image_guidance_scale": 5.0}, 2 * STEPS),
        ({"guidance_until": 0.5}, 2 * STEPS),
    ],
)
def test_what_ip2p_costs(instructing: Any, picture: Picture, options: dict[str, Any], sample: int) -> None:
    profile = Editor(instructing, TorchBackend(instructing)).edit(instruction(picture, options=options)).profile
    assert profile.evaluations == {"encode": 0, "sample": sample, "decode": 0} and profile.expected == sample


def test_ip2p_follows_its_picture_and_blends_with_it(instructing: Any, picture: Picture) -> None:
    editor = Editor(instructing, TorchBackend(instructing))
    free, other = editor.edit(instruction(picture)), editor.edit(instruction(picture, scene=1))
    assert gap(free.latent, other.latent) > 1e-2  # the same noise and instruction, another picture
    empty = editor.edit(instruction(picture, mask=Image.new("L", (64, 64))))
    assert torch.equal(empty.latent, empty.source_latent)
    assert torch.equal(editor.edit(instruction(picture, mask=Image.new("L", (64, 64), 255))).latent, free.latent)


def test_a_batch_of_ip2p_is_its_single_runs(
    instructing: Any, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Codec.encode
    monkeypatch.setattr(Codec, "encode", lambda self, x, note=None: torch.cat([encode(self, i) for i in x.split(1)]))
    requests = [
        instruction(picture, seed=1),
        instruction(picture, scene=1),
        dataclasses.replace(instruction(picture), prompt="a tree"),
    ]
    for asked, result in zip(requests, Editor(instructing, OneByOne(instructing)).edit_many(requests), strict=True):
        assert torch.equal(result.latent, Editor(instructing, OneByOne(instructing)).edit(asked).latent)


def test_a_checkpoint_runs_the_methods_that_it_was_trained_for(
    instructing: Any,
    instructing_folder: Path,
    editor: Editor,
    picture: Picture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(
        UsageError, match=r"ip2p needs an InstructPix2Pix checkpoint, whose UNet takes 8 channels.*takes 4"
    ):
        editor.edit(instruction(picture))
    with pytest.raises(UsageError, match=r"is an InstructPix2Pix checkpoint.*use method ip2p"):
        Editor(instructing, TorchBackend(instructing)).edit(ask(picture, "sdedit"))
    monkeypatch.chdir(tmp_path)
    picture(0).save("in.png")
    words = ["edit", "in.png", "--model", str(instructing_folder), "--prompt", "make it night", "--steps", "2"]
    done = CliRunner().invoke(main, [*words, "--method", "ip2p", "--image-guidance-scale", "2"])
    assert done.exit_code == 0 and Path("in-edited.png").is_file(), done.output
    again = CliRunner().invoke(main, ["replay", "in-edited.png", "--model", str(instructing_folder)])
    assert again.exit_code == 0 and "identical" in again.stdout, again.output
    told_of = CliRunner().invoke(main, ["info", "--model", str(instructing_folder)])
    assert "InstructPix2Pix, for method ip2p alone" in " ".join(told_of.stdout.split())
    refused = CliRunner().invoke(main, [*words, "--output", "other.png"])
    assert refused.exit_code == 2 and "use method ip2p" in refused.stderr
    assert (
        CliRunner().invoke(main, [*words, "--method", "ip2p", "--ratio", "0.5", "--output", "other.png"]).exit_code == 2
    )


def test_an_unet_of_8_channels_is_exported_and_says_what_torch_says(smallest: Any, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    from iedit.export.onnx import export_onnx
    from iedit.runtime.backends.ort import OnnxBackend

    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel.from_config(smallest.unet.config, in_channels=8)
    model = dataclasses.replace(smallest, unet=unet.eval().requires_grad_(False), controlnets={})
    export_onnx(model, tmp_path, modules=("unet",))
    told_all = dataclasses.replace(told(model, "a", "b", "c"), image=torch.randn(3, *SHAPE))
    x, t = torch.randn(3, *SHAPE), torch.tensor([1, 300, 999])
    want = TorchBackend(model).predict(x, t, told_all)
    got = OnnxBackend(model, tmp_path).predict(x, t, told_all)
    assert got.shape == x.shape and gap(got, want) < 1e-5
