"""The editor as a user sees it: methods, costs, errors, progress, and the stage cache."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from iedit.runtime.backends.eager import TorchBackend
from iedit.runtime.codec import Codec, token_chunks
from iedit.runtime.denoise_step import Condition
from iedit.runtime.editor import METHODS, EditRequest, EditResult, MaskOptions, Options
from iedit.runtime.editor import Editor as RealEditor
from iedit.runtime.errors import Cancelled, RunError, UsageError
from iedit.runtime.model.model import load_model
from iedit.runtime.options import IP2P, LOCALISED, UNMASKED, ItoSettings
from iedit.runtime.pipeline import Pipeline
from iedit.runtime.profile import Profile, Progress
from iedit.runtime.stage_cache import StageCache, tensor_digest

SOURCE, PROMPT = "a red car on grass at noon", "a blue house on sand at sunset"
Picture = Callable[..., Image.Image]
RUNNABLE = [m for m in METHODS if m not in IP2P]  # that has a checkpoint of its own, in test_rivals.py


def layout(size: tuple[int, int] = (64, 64), seed: int = 0) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def disc(size: tuple[int, int] = (64, 64)) -> Image.Image:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse((10, 12, 41, 45), fill=255)
    return mask


def ask(image: Image.Image, method: str = "ito", **more: Any) -> EditRequest:
    if method.startswith("controlnet"):
        size = image.size
        more = {"layouts": {"pose": layout(size)}, "source_layouts": {"pose": layout(size, 1)}} | more
    return EditRequest(image, PROMPT, SOURCE, method, **({"steps": 4} | more))


def total(profile: Profile) -> int:
    return sum(profile.evaluations.values())


# --- what comes back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", RUNNABLE)
@pytest.mark.parametrize("size", [(64, 64), (75, 33)])
def test_every_method_returns_what_it_declares(
    editor: RealEditor, picture: Picture, method: str, size: tuple[int, int]
) -> None:
    result = editor.edit(ask(picture(0, size), method))
    assert result.image.mode == "RGB" and result.image.size == size
    masked = method not in (*UNMASKED, *LOCALISED)
    assert (result.mask is not None) == masked
    if result.mask is not None:
        assert result.mask.mode == "L" and result.mask.size == size
        assert set(np.unique(np.asarray(result.mask))) <= {0, 255}
    assert (result.guidance is not None) == (method == "ito")
    if result.guidance is not None:
        assert result.guidance.mode == "RGB" and result.guidance.size == size
    latent = (4, 8, 8) if size == (64, 64) else (4, 6, 10)  # padded to multiples of 16
    for value in (result.latent, result.source_latent):
        assert value.shape == latent and value.dtype == torch.float32 and value.device.type == "cpu"
    assert not torch.equal(result.latent, result.source_latent)
    receipt = json.loads(json.dumps(result.receipt))
    assert receipt["request"]["method"] == method and receipt["request"]["seed"] == 0
    assert receipt["model"]["digest"] == editor.model.digest
    assert receipt["backend"]["name"] == "torch"
    assert (receipt["mask"] is not None) == masked
    assert set(result.profile.seconds) == set(result.profile.evaluations)


def test_one_pixel_is_a_picture(editor: RealEditor) -> None:
    result = editor.edit(ask(Image.new("RGB", (1, 1), "red"), steps=2))
    assert result.image.size == (1, 1)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "1"])
def test_any_mode_is_edited(editor: RealEditor, picture: Picture, mode: str) -> None:
    image = picture(0).convert("L").convert(mode) if mode in ("I;16", "1") else picture(0).convert(mode)
    assert editor.edit(ask(image, "sdedit", steps=2)).image.mode == "RGB"


def test_a_padded_picture_is_edited_as_if_it_had_been_grown_by_hand(editor: RealEditor, picture: Picture) -> None:
    small = picture(0, (50, 61))
    grown = Image.fromarray(np.pad(np.asarray(small), ((0, 3), (0, 14), (0, 0)), mode="edge"))
    assert grown.size == (64, 64)
    a, b = editor.edit(ask(small)), editor.edit(ask(grown))
    assert torch.equal(a.latent, b.latent)
    assert a.image.tobytes() == b.image.crop((0, 0, 50, 61)).tobytes()


def test_seed_zero_is_a_seed(editor: RealEditor, picture: Picture) -> None:
    for method in ("ito", "iedit"):
        zero, again, one = (editor.edit(ask(picture(0), method, seed=s, mask=disc())) for s in (0, 0, 1))
        assert torch.equal(zero.latent, again.latent)
        assert not torch.equal(zero.latent, one.latent)


def test_every_layout_matters(editor: RealEditor, picture: Picture) -> None:
    def run(**layouts: Image.Image) -> Tensor:
        return editor.edit(ask(picture(0), "ito", mask=disc(), layouts=layouts)).latent

    results = [
        run(),
        run(pose=layout()),
        run(pose=layout(seed=5)),
        run(scribble=layout()),
        run(pose=layout(), scribble=layout()),
    ]
    for i, a in enumerate(results):
        for b in results[:i]:
            assert not torch.equal(a, b)


def test_generate_draws_each_prompt_from_its_seed(editor: RealEditor) -> None:
    for eta in (0.0, 1.0):
        both = editor.generate([PROMPT, SOURCE], seeds=[3, 4], steps=3, eta=eta)
        assert [i.size for i in both] == [(64, 64), (64, 64)]
        alone = editor.generate([SOURCE], seeds=[4], steps=3, eta=eta)[0]
        apart = np.abs(np.asarray(both[1]).astype(int) - np.asarray(alone).astype(int))
        assert apart.max() <= 1  # the network's rounding may tip an 8-bit value
    wide = editor.generate([PROMPT], {"pose": [layout((96, 64))]}, steps=2, size=(96, 64))
    assert wide[0].size == (96, 64)


def test_several_threads_share_an_editor(editor: RealEditor, picture: Picture) -> None:
    requests = [ask(picture(i), steps=3) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(editor.edit, requests))
    for asked, result in zip(requests, together, strict=True):
        alone = RealEditor(editor.model, editor.denoiser).edit(asked)
        assert torch.equal(result.latent, alone.latent)


def test_the_receipt_says_what_was_left_to_the_checkpoint(editor: RealEditor, picture: Picture) -> None:
    """Numbers, not "as recommended": the checkpoint may recommend something else by the time of a replay."""
    model = dataclasses.replace(editor.model, guidance_scale=3.5, mask_threshold=0.2, text_update_share=0.5)
    receipt = RealEditor(model, editor.denoiser).edit(ask(picture(0))).receipt
    options = receipt["request"]["options"]
    assert options["guidance_scale"] == 3.5 and options["final"]["t_u"] == 2 and options["final"]["update"] == "clipped"
    assert options["mask"]["threshold"] == 0.2 and options["mask"]["strength"] == 0.5


def test_a_note_of_one_edit_is_not_in_the_receipts_of_its_batch(editor: RealEditor, picture: Picture) -> None:
    full, part = Image.new("L", (64, 64), 255), disc()
    results = editor.edit_many([ask(picture(0), "iedit", mask=m, steps=2) for m in (full, part)])
    assert results[0].profile is results[1].profile  # one batch
    assert any("the mask covers 100.0%" in note for note in results[0].notes)
    assert results[1].notes == results[1].receipt["notes"]
    assert not any("the mask covers" in note for note in results[1].notes)


def test_iedit_takes_its_own_50_steps_and_the_last_70_percent_of_them(editor: RealEditor, picture: Picture) -> None:
    for method, steps, run in (("iedit", 50, 35), ("sdedit", 25, 17), ("diffedit", 25, 17)):
        result = editor.edit(ask(picture(0), method, steps=None, mask=None if method == "sdedit" else disc()))
        assert result.receipt["request"]["steps"] == steps
        assert result.profile.evaluations["sample"] == 2 * run


def _scheduler(folder: Path, **values: Any) -> str:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return str(folder)


def test_zero_terminal_snr_edits_with_v_and_is_one_line_with_epsilon(copy: Path, picture: Picture) -> None:
    more = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    editor = RealEditor.load(_scheduler(copy, prediction_type="v_prediction", **more), backend="torch", device="cpu")
    assert editor.model.schedule.levels(4).abar[0] == 0
    for method in ("ito", "diffedit", "iedit"):
        result = editor.edit(ask(picture(0), method))
        assert torch.isfinite(result.latent).all() and not torch.equal(result.latent, result.source_latent)
    other = RealEditor.load(_scheduler(copy, prediction_type="epsilon", **more), backend="torch", device="cpu")
    with pytest.raises(UsageError, match="last timestep is pure noise"):
        other.edit(ask(picture(0)))


# --- composite ----------------------------------------------------------------------------------------------------


def drawn(kind: str, size: tuple[int, int]) -> Image.Image:
    """A mask whose edges are not those of latent cells."""
    mask, (width, height) = Image.new("L", size), size
    draw = ImageDraw.Draw(mask)
    if kind == "ellipse":
        draw.ellipse((width * 0.4, height * 0.4, width * 0.65, height * 0.65), fill=255)
    elif kind == "line":
        draw.line((3, 5, width - 7, height - 9), fill=255)
    elif kind == "dot":
        mask.putpixel((width // 2, height // 3), 255)
    else:
        draw.ellipse((10, 12, 41, 45), fill=255)
        draw.line((41, 30, width - 2, 30), fill=255)
    return mask


@pytest.mark.parametrize("feather", [0.0, 4.0, 30.0])
@pytest.mark.parametrize("size", [(64, 64), (61, 50)])
@pytest.mark.parametrize("kind", ["ellipse", "line", "dot", "disc with a line"])
def test_pixel_composite_changes_no_pixel_outside_a_given_mask(
    editor: RealEditor, picture: Picture, kind: str, feather: float, size: tuple[int, int]
) -> None:
    source, mask = picture(0, size), drawn(kind, size)
    options = Options(composite="pixel", feather=feather)
    result = editor.edit(ask(source, "iedit", mask=mask, options=options))
    assert result.mask is not None and result.mask.tobytes() == mask.tobytes()
    changed = (np.asarray(source) != np.asarray(result.image)).any(-1)
    inside = np.asarray(mask) > 0
    assert not changed[~inside].any()
    assert changed[inside].any()  # a soft edge is no reason for a thin mask to edit nothing
    assert result.receipt["mask"]["area"] == round(float(inside.mean()), 6)
    if kind == "disc with a line":
        assert changed[30, 48 : size[0] - 2].mean() > 0.5  # not only where the mask is thick


@pytest.mark.parametrize("feather", [0.0, 4.0])
@pytest.mark.parametrize("size", [(64, 64), (61, 50)])
@pytest.mark.parametrize("method", ["ito", "diffedit"])
def test_pixel_composite_changes_no_pixel_outside_the_estimated_mask(
    editor: RealEditor, picture: Picture, method: str, feather: float, size: tuple[int, int]
) -> None:
    source = picture(0, size)
    options = Options(composite="pixel", feather=feather, mask=MaskOptions(threshold=0.5))
    result = editor.edit(ask(source, method, options=options))
    assert result.mask is not None
    changed, inside = (np.asarray(source) != np.asarray(result.image)).any(-1), np.asarray(result.mask) > 0
    assert 0.1 < inside.mean() < 0.9
    assert not changed[~inside].any() and changed[inside].any()


def test_latent_composite_keeps_the_source_latent_outside(editor: RealEditor, picture: Picture) -> None:
    result = editor.edit(ask(picture(0), mask=disc(), options=Options(composite="latent")))
    assert result.mask is not None
    kept = torch.from_numpy(np.asarray(result.mask)[::8, ::8] == 0)
    assert torch.equal(result.latent[:, kept], result.source_latent[:, kept])
    assert not torch.equal(result.latent[:, ~kept], result.source_latent[:, ~kept])


# --- what an edit costs -------------------------------------------------------------------------------------------


def test_a_text_edit_costs_what_the_method_says(editor: RealEditor, picture: Picture) -> None:
    profile = editor.edit(ask(picture(0), steps=25)).profile
    want = {"mask": 20, "invert": 25, "guidance": 50, "invert-guidance": 25, "final": 50, "encode": 0, "decode": 0}
    assert profile.evaluations == want
    # The inversion shares the calls of the guidance image: 75 sequential steps in place of 100, and the mask.
    assert profile.calls == {
        "encode": 0,
        "mask": 1,
        "invert": 0,
        "guidance": 25,
        "invert-guidance": 25,
        "final": 25,
        "decode": 0,
    }
    alone = RealEditor(editor.model, editor.denoiser, share=False).edit(ask(picture(0), steps=25)).profile
    assert alone.evaluations == want and alone.calls == profile.calls | {"invert": 25}


def test_a_mask_alone_decodes_nothing(editor: RealEditor, picture: Picture) -> None:
    mask, profile = editor.mask(ask(picture(0)))
    calls = Counter(c.module for c in profile.modules)
    assert calls == {"text_encoder": 3, "vae_encoder": 1, "unet": 1}  # both prompts and the negative one
    whole = editor.edit(ask(picture(0)))
    assert mask is not None and whole.mask is not None and mask.tobytes() == whole.mask.tobytes()
    assert Counter(c.module for c in whole.profile.modules)["vae_decoder"] == 1


def test_changing_lambda_runs_the_final_pass_only(editor: RealEditor, picture: Picture) -> None:
    asked = ask(picture(0), steps=8)
    first = editor.edit(asked)
    for options in (
        Options(lam=0.3),
        Options(final=ItoSettings(t_u=6)),
        Options(final=ItoSettings(k=3)),
        Options(composite="pixel"),
    ):
        second = editor.edit(dataclasses.replace(asked, options=options))
        assert total(second.profile) == 16 < 0.4 * total(first.profile)
        assert {k for k, v in second.profile.evaluations.items() if v} == {"final"}
        assert {"mask", "invert", "guidance", "invert-guidance"} <= set(second.profile.cached)
    assert not torch.equal(editor.edit(dataclasses.replace(asked, options=Options(lam=0.3))).latent, first.latent)


def test_changing_the_mask_threshold_repeats_neither_mask_nor_inversion(editor: RealEditor, picture: Picture) -> None:
    asked = ask(picture(0), steps=5)
    first = editor.edit(asked)
    for mask in (MaskOptions(threshold=0.5), MaskOptions(sigma=0.4), MaskOptions(norm="clamp")):
        second = editor.edit(dataclasses.replace(asked, options=Options(mask=mask)))
        assert first.mask is not None and second.mask is not None
        assert first.mask.tobytes() != second.mask.tobytes()
        assert second.profile.evaluations["invert"] == second.profile.evaluations["mask"] == 0
        assert second.profile.evaluations["guidance"] == 10
        assert second.profile.evaluations["invert-guidance"] == 5


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"seed": 1}, {"mask", "guidance", "invert-guidance"}),
        ({"prompt": "a cat"}, {"mask", "guidance", "invert-guidance"}),
        ({"source_prompt": "a cat"}, {"mask", "invert", "guidance", "invert-guidance"}),  # through the mask
        ({"mask": disc()}, {"guidance", "invert-guidance"}),
        ({"steps": 6}, {"mask", "invert", "guidance", "invert-guidance"}),
        ({"options": Options(guidance_scale=3.0)}, {"mask", "guidance", "invert-guidance"}),
        ({"options": Options(negative_prompt="a cat")}, {"mask", "invert", "guidance", "invert-guidance"}),
        ({"options": Options(inversion_evaluate="source")}, {"invert", "invert-guidance"}),
        ({"options": Options(guidance=ItoSettings(k=2))}, {"guidance", "invert-guidance"}),
        ({"options": Options(guidance=ItoSettings(update="adam"))}, {"guidance", "invert-guidance"}),
        # Without a guidance image the clipped step is lam (1 - m)^2 (y - x) whatever L_rec is divided by: the same image.
        ({"options": Options(kept_area=True)}, {"guidance"}),
    ],
)
def test_a_change_runs_what_depends_on_it_and_gives_what_a_fresh_run_gives(
    editor: RealEditor, picture: Picture, change: dict[str, Any], again: set[str]
) -> None:
    editor.share = False  # a stage beside another rounds differently
    asked = ask(picture(0))
    editor.edit(asked)
    changed = dataclasses.replace(asked, **change)
    second = editor.edit(changed)
    ran = {k for k, v in second.profile.evaluations.items() if v}
    assert again <= ran | {"mask" if "mask" in change else ""}
    if "negative_prompt" not in str(change):  # its text is part of every stage's key, needed there or not
        assert ran <= again | {"final"}
    assert torch.equal(second.latent, RealEditor(editor.model, editor.denoiser, share=False).edit(changed).latent)


def test_a_sweep_over_lambda_is_one_final_pass(editor: RealEditor, picture: Picture) -> None:
    asked = ask(picture(0), steps=6)
    results = editor.edit_many(
        [dataclasses.replace(asked, options=Options(lam=lam)) for lam in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
    )
    profile = results[0].profile
    assert all(r.profile is profile for r in results)
    assert profile.calls["final"] == 6 and profile.evaluations["final"] == 6 * 6 * 2
    assert profile.evaluations["invert"] == 6 and profile.evaluations["guidance"] == 12  # of the one image, once
    assert [r.guidance is None for r in results] == [False] * 5 + [True]
    assert len({tensor_digest(r.latent) for r in results}) == 6


def test_results_come_in_the_order_of_the_requests(editor: RealEditor, picture: Picture) -> None:
    sizes = [(64, 64), (48, 64), (64, 64), (80, 32), (48, 64)]
    results = editor.edit_many([ask(picture(i, s), "iedit", seed=i, mask=disc(s)) for i, s in enumerate(sizes)])
    assert [r.image.size for r in results] == sizes
    assert [r.receipt["request"]["seed"] for r in results] == [0, 1, 2, 3, 4]
    assert editor.edit_many([]) == []


# --- progress, cancelling, failing --------------------------------------------------------------------------------

COSTS = [
    *[(m, Options()) for m in RUNNABLE],
    ("ito", Options(lam=1.0)),
    ("ito", Options(guidance_scale=1.0)),
    ("ito", Options(refine=True, encoding_ratio=0.5)),
    ("ito", Options(inversion_scale=2.0, mask=MaskOptions(mode="trajectory", seeds=2))),
    ("ito", Options(mask=MaskOptions(mode="trajectory", seeds=2, guided=False))),
    ("ito", Options(mask=MaskOptions(mode="none"))),
    ("diffedit", Options(inversion_scale=2.0, ratio=0.5)),
    ("controlnet-diffedit", Options(mask=MaskOptions(guided=False))),
]


@pytest.mark.parametrize(("method", "options"), COSTS)
def test_progress_rises_to_one_at_the_last_stage(
    editor: RealEditor, picture: Picture, method: str, options: Options
) -> None:
    seen: list[Progress] = []
    result = editor.edit(ask(picture(0), method, options=options), seen.append)
    fractions = [p.fraction for p in seen]
    assert fractions == sorted(fractions) and fractions[0] == 0
    assert seen[-1].stage == "decode" and seen[-1].fraction == 1
    assert result.profile.expected == total(result.profile)  # not clipped to 1 on the way
    assert all(0 <= p.step <= p.steps for p in seen)
    assert all(p.seconds_left is None or p.seconds_left >= 0 for p in seen)
    assert list(dict.fromkeys(p.stage for p in seen)) == list(result.profile.seconds)


def test_cancelling_stops_at_once_and_leaves_the_editor_usable(editor: RealEditor, picture: Picture) -> None:
    asked = ask(picture(0))
    with pytest.raises(Cancelled, match="cancelled in stage invert-guidance, step 2"):
        editor.edit(asked, lambda p: not (p.stage == "invert-guidance" and p.step == 2))
    again = editor.edit(asked)
    assert again.profile.evaluations["invert"] == again.profile.evaluations["guidance"] == 0  # finished: kept
    assert again.profile.evaluations["invert-guidance"] == 4  # not finished: not kept
    assert torch.equal(again.latent, RealEditor(editor.model, editor.denoiser).edit(asked).latent)


class Broken:
    """NaN from the `after`-th call on."""

    def __init__(self, inner: Any, after: int):
        self.inner, self.left = inner, after

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.left -= 1
        out: Tensor = self.inner.predict(x, t, condition)
        return out * float("nan") if self.left < 0 else out


@pytest.mark.parametrize(
    ("after", "where"), [(0, "stage mask, step 1"), (2, "stage invert, step 2"), (11, "stage final, step 3")]
)
def test_nan_from_the_network_names_the_place(tiny: Any, picture: Picture, after: int, where: str) -> None:
    editor = RealEditor(tiny, Broken(TorchBackend(tiny), after))
    with pytest.raises(RunError, match=f"NaN or infinity in {where}"):
        editor.edit(ask(picture(0)))


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_nan_from_the_vae_in_half_precision_is_repeated_in_float32(
    tiny_folder: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    model = load_model(str(tiny_folder), device="cpu", dtype="bfloat16", emulate=True)
    original = getattr(type(model.vae), part)

    def overflowing(vae: Any, x: Tensor) -> Any:
        out = original(vae, x)
        if x.dtype != torch.float32:
            bad = out.latent_dist.parameters if part == "encode" else out.sample
            bad[:] = float("nan")
            if part == "encode":
                out.latent_dist.mean[:] = float("nan")
        return out

    monkeypatch.setattr(type(model.vae), part, overflowing)
    result = RealEditor(model, TorchBackend(model)).edit(ask(picture(0), "sdedit", steps=2))
    assert any("VAE gave NaN" in note for note in result.profile.notes)
    assert any("VAE gave NaN" in note for note in result.receipt["notes"])
    assert next(model.vae.parameters()).dtype == torch.bfloat16


def test_nan_from_the_vae_in_float32_is_an_error(
    editor: RealEditor, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dataclasses.replace(editor.model, vae=load_model(str(editor.model.folder), [], device="cpu").vae)
    with torch.no_grad():
        model.vae.decoder.conv_out.bias += float("nan")
    with pytest.raises(RunError, match="stage decode: the VAE returned NaN"):
        RealEditor(model, TorchBackend(model)).edit(ask(picture(0), "sdedit", steps=2))


def test_a_vae_that_runs_out_of_memory_goes_on_one_by_one(
    tiny: Any, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TorchBackend(tiny)
    encode = backend.encode_image

    def small(images: Tensor) -> Tensor:
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(images)

    monkeypatch.setattr(backend, "encode_image", small)
    requests = [ask(picture(i), "sdedit", steps=1) for i in range(3)]
    results = RealEditor(tiny, backend).edit_many(requests)
    assert torch.equal(results[2].source_latent, RealEditor(tiny, TorchBackend(tiny)).edit(requests[2]).source_latent)


@pytest.mark.parametrize(("fill", "said"), [(0, "0.0% of the picture: almost nothing can change"), (255, "100.0%")])
def test_an_empty_or_full_mask_is_said(editor: RealEditor, picture: Picture, fill: int, said: str) -> None:
    result = editor.edit(ask(picture(0), "iedit", steps=2, mask=Image.new("L", (64, 64), fill)))
    assert any(said in note for note in result.notes)
    assert any(said in note for note in result.receipt["notes"])


# --- requests that cannot be run ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"method": "magic"}, "method is 'magic', expected one of ito"),
        ({"method": "controlnet"}, "needs at least one layout"),
        ({"steps": 0}, "steps is 0, expected 1 to 1000"),
        ({"steps": 1001}, "steps is 1001"),
        (
            {"layouts": {"depth": layout()}},
            "layout 'depth': .* has no ControlNet or T2I-Adapter of that name; it has pose, scribble",
        ),
        ({"layouts": {"pose": layout((32, 64))}}, "layout pose: it is 32x64 and the image 64x64"),
        ({"layouts": {"pose": layout()}}, "nothing here can find a pose"),
        ({"source_layouts": {"pose": layout()}}, r"source layout 'pose' has no layout to go with it"),
        ({"layouts": {"pose": layout()}, "source_layouts": {"pose": layout((64, 32))}}, "layout pose: it is 64x32"),
        ({"mask": Image.new("L", (32, 32))}, "the mask is 32x32 and the image 64x64"),
        ({"image": Image.new("1", (4097, 4097))}, "4097x4097 .*limit is 16777216"),
        ({"options": Options(lam=1.1)}, "lambda is 1.1, expected 0 to 1"),
        ({"options": Options(lam=float("nan"))}, "lambda is nan"),
        ({"options": Options(ratio=0.0)}, "ratio is 0.0"),
        ({"options": Options(encoding_ratio=1.5)}, "encoding_ratio is 1.5"),
        ({"options": Options(composite="both")}, "composite is 'both', expected one of none, latent, pixel"),
        ({"options": Options(inversion="none")}, "inversion is 'none'"),
        ({"options": Options(inversion_evaluate="next")}, "inversion_evaluate is 'next'"),
        ({"options": Options(feather=-1)}, "feather is -1"),
        ({"options": Options(guidance_scale=float("nan"))}, "guidance_scale is nan"),
        ({"options": Options(inversion_scale=float("inf"))}, "inversion_scale is inf"),
        ({"options": Options(control_scale=float("nan"))}, "control_scale is nan"),
        ({"options": Options(control_scales=(("poes", 0.5),))}, "control_scales: .*poes.* it has pose, scribble"),
        ({"options": Options(final=ItoSettings(k=0))}, "k >= 1"),
        ({"options": Options(guidance=ItoSettings(t_u=-1))}, "t_u >= 0"),
        ({"options": Options(refinement=ItoSettings(lr=0))}, "lr > 0"),
        ({"options": Options(final=ItoSettings(lr=float("nan")))}, "lr > 0"),
        ({"options": Options(mask=MaskOptions(mode="magic"))}, "mask mode is 'magic'"),
        ({"options": Options(mask=MaskOptions(norm="max"))}, "mask norm is 'max'"),
        ({"options": Options(mask=MaskOptions(seeds=0))}, "mask seeds is 0"),
        ({"options": Options(mask=MaskOptions(strength=0))}, "mask strength is 0"),
        ({"options": Options(mask=MaskOptions(threshold=2))}, "mask threshold is 2"),
        ({"options": Options(mask=MaskOptions(sigma=-1))}, "mask sigma is -1"),
    ],
)
def test_a_bad_request_is_refused_in_one_line_before_anything_runs(
    editor: RealEditor, picture: Picture, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(Pipeline, "run", lambda *_: pytest.fail("something was run"))
    asked = dataclasses.replace(ask(picture(0)), **change)
    with pytest.raises(UsageError, match=said) as caught:
        editor.edit(asked)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError):
        editor.edit_many([ask(picture(0)), asked])


def test_a_pose_needs_no_source_where_nothing_is_compared(editor: RealEditor, picture: Picture) -> None:
    for more in ({"mask": disc()}, {"options": Options(mask=MaskOptions(mode="none"))}, {"method": "controlnet"}):
        assert editor.edit(dataclasses.replace(ask(picture(0), layouts={"pose": layout()}, steps=2), **more)).image


# --- long prompts -------------------------------------------------------------------------------------------------


def test_a_long_prompt_is_read_to_its_end(editor: RealEditor, picture: Picture) -> None:
    model = editor.model
    long = "a red car on grass at noon and " * 8
    assert len(token_chunks(model, "a red car")) == 1 and len(token_chunks(model, long)) == 3
    assert [i for c in token_chunks(model, long) for i in c] == token_chunks(model, "a red car on grass at noon and")[
        0
    ] * 8
    assert token_chunks(model, "") == [[]]
    assert Codec(model).encode_text([long], 3).shape == (1, 3 * 32, 32)
    assert torch.equal(Codec(model).encode_text(["a red car"], 3)[:, :32], Codec(model).encode_text(["a red car"]))
    assert torch.equal(Codec(model).encode_text(["a red car"], 3)[:, 32:64], Codec(model).encode_text([""]))

    def run(prompt: str) -> EditResult:
        return editor.edit(dataclasses.replace(ask(picture(0), "sdedit"), prompt=prompt))

    assert not torch.equal(run(long + "a cat").latent, run(long + "a tree").latent)


def test_states_of_a_short_prompt_are_those_of_transformers(editor: RealEditor) -> None:
    model = editor.model
    ids = model.tokenizer([PROMPT], padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(Codec(model).encode_text([PROMPT]), model.text_encoder(ids)[0])


@pytest.mark.parametrize("size", [(64, 64), (96, 32)])
def test_latents_are_the_posteriors_mode_times_the_scaling_factor(
    editor: RealEditor, picture: Picture, size: tuple[int, int]
) -> None:
    model, image = editor.model, picture(0, size)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    result = editor.edit(ask(image, "sdedit", steps=1))
    with torch.no_grad():
        mode = model.vae.encode(pixels).latent_dist.mean
        decoded = model.vae.decode(result.latent[None] / 3.6).sample[0]
    assert model.vae.config.scaling_factor == 3.6
    assert torch.equal(result.source_latent, mode[0] * 3.6)
    want = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(result.image).astype(int) - want).max() <= 1


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint that may be damaged."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def refused(folder: Path | str, *said: str, **more: Any) -> None:
    with pytest.raises(UsageError) as caught:
        RealEditor.load(str(folder), device="cpu", **more)
    assert "\n" not in str(caught.value)
    for text in said:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    "gone",
    [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
        "controlnet-pose/config.json",
        "controlnet-pose/diffusion_pytorch_model.safetensors",
    ],
)
def test_a_missing_file_is_named(copy: Path, gone: str) -> None:
    (copy / gone).unlink()
    refused(copy, str((copy / gone).parent))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(copy: Path, part: str) -> None:
    shutil.rmtree(copy / part)
    refused(copy, part, "is not a whole diffusers checkpoint")


def test_a_tokenizer_without_vocabulary_is_refused(copy: Path) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (copy / "tokenizer" / name).unlink(missing_ok=True)
    refused(copy, "tokenizer")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "controlnet-pose"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.6])
def test_truncated_weights_are_refused(copy: Path, part: str, share: float) -> None:
    (path,) = (copy / part).glob("*.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(copy, str(copy / part), "damaged or cut off")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "controlnet-pose"])
@pytest.mark.parametrize("damage", ["missing", "reshaped"])
def test_weights_that_lack_a_tensor_are_refused(copy: Path, part: str, damage: str) -> None:
    """Left to themselves, the loaders fill a hole with random numbers."""
    from safetensors.torch import load_file, save_file

    (path,) = (copy / part).glob("*.safetensors")
    tensors = load_file(path)
    name = next(n for n in sorted(tensors) if n.endswith("weight") and tensors[n].dim() > 1)
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:1].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    refused(copy, str(copy / part))


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_a_damaged_config_is_refused(copy: Path, name: str) -> None:
    (copy / name).write_text('{"sample_size": 8,')
    refused(copy, str(copy / name.split("/")[0]))


def test_a_checkpoint_of_other_latent_channels_is_refused(copy: Path) -> None:
    config = json.loads((copy / "unet" / "config.json").read_text())
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel.from_config(config | {"in_channels": 9}).save_pretrained(copy / "unet")
    refused(copy, "takes 9 and returns 4 channels", "latent has 4", "inpainting")


def test_a_text_encoder_of_another_width_is_refused(copy: Path) -> None:
    config = json.loads((copy / "unet" / "config.json").read_text())
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel.from_config(config | {"cross_attention_dim": 16}).save_pretrained(copy / "unet")
    refused(copy, "16 wide", "32")


def test_a_controlnet_of_another_model_is_refused(copy: Path) -> None:
    config = json.loads((copy / "controlnet-pose" / "config.json").read_text())
    from diffusers import ControlNetModel

    ControlNetModel.from_config(config | {"block_out_channels": (32, 32)}).save_pretrained(copy / "controlnet-pose")
    refused(copy, "ControlNet of pose", "another model")


def test_layouts_are_chosen_by_name_or_by_folder(tiny_folder: Path) -> None:
    assert set(load_model(str(tiny_folder), ["pose"], device="cpu").controlnets) == {"pose"}
    own = load_model(str(tiny_folder), {"mine": str(tiny_folder / "controlnet-scribble")}, device="cpu")
    assert set(own.controlnets) == {"mine"}
    refused(tiny_folder, "no ControlNet or T2I-Adapter for depth", "pose, scribble", layouts=["depth"])
    refused(tiny_folder, "no ControlNet or T2I-Adapter folder", layouts={"mine": str(tiny_folder / "tokenizer")})


def test_a_hub_id_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder.\nMore.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused("stable-diffusion-v1-5/stable-diffusion-v1-5", "could not be fetched from the hub", "give its folder")


def test_a_hub_id_takes_the_path_of_a_folder(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []

    def cached(name: str, **_: Any) -> str:
        asked.append(name)
        return str(tiny_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    model = load_model("owner/name", device="cpu")
    assert asked == ["owner/name"] and model.folder == tiny_folder
    assert model.digest == load_model(str(tiny_folder), device="cpu").digest


def test_what_cannot_be_loaded_is_refused_by_name(tiny_folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "is not a folder")
    refused("nothing", "is not a folder")
    refused(tiny_folder, "dtype is 'float8'", dtype="float8")
    refused(tiny_folder, "backend 'magic' was requested but cannot run", backend="magic")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no CUDA device is here"):
            RealEditor.load(str(tiny_folder), device="cuda")


def test_half_precision_weights_under_their_hub_names_load(copy: Path) -> None:
    for path in copy.glob("*/*.safetensors"):
        path.rename(path.with_name(path.stem + ".fp16.safetensors"))
    model = load_model(str(copy), device="cpu", dtype="bfloat16", emulate=True)
    assert next(model.unet.parameters()).dtype == torch.bfloat16
    assert set(model.controlnets) == {"pose", "scribble"}


def test_the_digest_changes_with_a_weight_and_the_cache_with_it(
    build_checkpoint: Callable[..., Path], tiny: Any, tmp_path: Path, picture: Picture
) -> None:
    other = load_model(str(build_checkpoint(tmp_path, seed=2)), device="cpu")
    assert other.digest != tiny.digest
    cache = StageCache()
    RealEditor(tiny, TorchBackend(tiny), cache=cache).edit(ask(picture(0)))
    assert RealEditor(other, TorchBackend(other), cache=cache).edit(ask(picture(0))).profile.cached == []
    # The same weights under other noise levels, of which first and last are the same.
    abar = list(tiny.schedule.alphas_cumprod)
    schedule = dataclasses.replace(tiny.schedule, alphas_cumprod=(*abar[:-2], (abar[-3] + abar[-1]) / 2.1, abar[-1]))
    noisier = dataclasses.replace(tiny, schedule=schedule)
    assert RealEditor(noisier, TorchBackend(noisier), cache=cache).edit(ask(picture(0))).profile.cached == []


# --- the stage cache ----------------------------------------------------------------------------------------------


def test_a_caller_cannot_change_what_is_kept(editor: RealEditor, picture: Picture) -> None:
    first = editor.edit(ask(picture(0)))
    kept, result = first.source_latent.clone(), first.latent.clone()
    first.source_latent.zero_()
    again = editor.edit(ask(picture(0)))
    assert torch.equal(again.source_latent, kept)
    assert torch.equal(again.latent, result)
