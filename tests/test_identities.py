"""What must hold whatever the weights are, on a random small model and the embedded one; diffusers is the other party.

Tolerances against diffusers: both sides are float32 and differ in the order of a few products, so the latents of a step
differ by some 2^-23 of their size, times what the network and a guidance of 7.5 make of that over the steps: 1e-5 of
the size. Measured on the random model: 4e-6 and less.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from iedit.kernels.mask_map import difference, mask_map, normalise
from iedit.runtime.backends import why_unavailable
from iedit.runtime.backends.base import Backend
from iedit.runtime.backends.compiled import CompileBackend
from iedit.runtime.backends.eager import TorchBackend
from iedit.runtime.backends.ort import OnnxBackend
from iedit.runtime.codec import Codec
from iedit.runtime.denoise_step import Condition
from iedit.runtime.editor import Editor as RealEditor
from iedit.runtime.editor import EditRequest, EditResult, MaskOptions, Options
from iedit.runtime.model.model import load_model
from iedit.runtime.network import Network
from iedit.runtime.options import ItoSettings
from iedit.runtime.profile import Profile
from iedit.runtime.sampling import (
    NoisedReference,
    TrajectoryReference,
    estimate_mask,
    invert,
    ito_pass,
    masked_sampling,
)
from iedit.runtime.schedule import PREDICTIONS, add_noise, ddim_coefficients, seeded_noise
from iedit.runtime.stage_cache import StageCache
from iedit.training import truth

SOURCE, PROMPT = "a red car on grass at noon", "a blue house on sand at sunset"
SHAPE = (4, 8, 8)
Picture = Callable[..., Image.Image]


# Models that are run by something else than eager torch, by name.
RUNS: dict[str, Backend] = {}
EAGER: dict[int, Backend] = {}  # the others, by the id of their UNet


# 20-30 s for each of its compilations on one core, of which a test with ControlNets needs several.
SLOW = pytest.param("tiny-compile", marks=[pytest.mark.slow, pytest.mark.timeout(900)])


@pytest.fixture(scope="session", params=["tiny", "tiny-onnx", "tiny-recorded", SLOW])
def model(request: pytest.FixtureRequest) -> Any:
    """Every backend that the identities must hold on. The embedded model has a case of each identity at the end of this file."""
    name = request.param
    if name == "tiny":
        return request.getfixturevalue("tiny")
    # Another object under another name, for the same weights.
    made = dataclasses.replace(request.getfixturevalue("tiny"), name=name)
    if name == "tiny-compile":
        why = why_unavailable("compile")
        assert not why, why  # a compiler is part of what the tests need
        RUNS[name] = CompileBackend(made)
    if name == "tiny-recorded":
        taped = request.getfixturevalue("taped")
        RUNS[name] = taped.Recorded(made, taped.Captures())
    if name == "tiny-onnx":
        RUNS[name] = OnnxBackend(made, request.getfixturevalue("tiny_engines"))
    return made


def backend_of(model: Any) -> Backend:
    """By name, and eager torch by the network: a test may have replaced the model's schedule, which no backend looks at."""
    if model.name in RUNS:
        return RUNS[model.name]
    made = EAGER.get(id(model.unet))
    if made is None:
        made = EAGER[id(model.unet)] = TorchBackend(model)
    return made


class OneByOne:
    """The network, a sample at a time: it rounds the same in every batch, so all the rest must be equal bit for bit."""

    def __init__(self, model: Any):
        self.inner = backend_of(model)

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        pieces = [slice(i, i + 1) for i in range(len(x))]
        return torch.cat([self.inner.predict(x[p], t[p], condition.take(p)) for p in pieces])


class Remembering:
    """The network, which remembers each sample that it was asked for and what it answered."""

    def __init__(self, model: Any):
        self.inner = backend_of(model)
        self.samples: list[tuple[Tensor, int, Tensor, Tensor]] = []  # latent, timestep, prompt embeddings, answer

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        output = self.inner.predict(x, t, condition)
        rows = zip(x, t.expand(len(x)), condition.prompt_embeds, output, strict=True)
        self.samples += [(a, int(b), c, d) for a, b, c, d in rows]
        return output

    def answer(self, x: Tensor, t: int, prompt_embeds: Tensor) -> Tensor:
        """What was answered for this sample, (1, C, h, w); it must have been asked for, to 1e-5 of its size."""
        asked = [
            (gap(latent[None], x), output)
            for latent, level, told, output in self.samples
            if level == t and torch.allclose(told[None], prompt_embeds, atol=1e-5)
        ]
        nearest, output = min(asked, key=lambda one: one[0])
        assert nearest < 1e-5, nearest
        return output[None]


def editor_of(
    model: Any, prediction: str | None = None, denoiser: Any = None, cache: StageCache | None = None, share: bool = True
) -> RealEditor:
    if prediction is not None:
        model = dataclasses.replace(model, schedule=dataclasses.replace(model.schedule, prediction=prediction))
    return RealEditor(model, denoiser or backend_of(model), cache=cache, share=share)


def network_of(model: Any, denoiser: Any = None) -> Network:
    return Network(denoiser or backend_of(model), model.schedule.prediction, 64, Profile())


def square(size: tuple[int, int] = (64, 64), box: tuple[int, int, int, int] = (16, 16, 39, 47)) -> Image.Image:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


def layout(seed: int) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((64, 64), Image.Resampling.BICUBIC)


def request(picture: Picture, method: str = "ito", **more: Any) -> EditRequest:
    options = more.pop("options", Options(guidance_scale=7.5))
    if method.startswith("controlnet"):
        more = {"layouts": {"pose": layout(1)}, "source_layouts": {"pose": layout(2)}} | more
    return EditRequest(
        picture(more.pop("scene", 0)), PROMPT, SOURCE, method, steps=more.pop("steps", 10), options=options, **more
    )


def same(a: EditResult, b: EditResult) -> None:
    """Bit for bit."""
    assert torch.equal(a.latent, b.latent) and torch.equal(a.source_latent, b.source_latent)
    assert a.image.tobytes() == b.image.tobytes()
    for x, y in ((a.mask, b.mask), (a.guidance, b.guidance)):
        assert (x is None) == (y is None)
        assert x is None or y is None or x.tobytes() == y.tobytes()


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference in units of the largest value."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


# --- 1 and 2: empty and full masks -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["iedit", "diffedit", "controlnet-diffedit"])
@pytest.mark.parametrize("size", [(64, 64), (50, 61)])
def test_1_an_empty_mask_returns_the_input_latent(
    model: Any, picture: Picture, method: str, size: tuple[int, int]
) -> None:
    more: dict[str, Any] = {"layouts": {"pose": layout(1).resize(size)}} if "controlnet" in method else {}
    if more:
        more["source_layouts"] = more["layouts"]
    asked = EditRequest(picture(0, size), PROMPT, SOURCE, method, mask=Image.new("L", size), steps=6, **more)
    result = editor_of(model).edit(asked)
    assert torch.equal(result.latent, result.source_latent)
    assert result.image.size == size


@pytest.mark.parametrize("method", ["ito", "iedit", "diffedit"])
def test_1_an_empty_mask_with_composite_returns_the_input(model: Any, picture: Picture, method: str) -> None:
    editor, empty = editor_of(model), Image.new("L", (64, 64))
    plain = editor.edit(request(picture, method, mask=empty, steps=4))
    latent = editor.edit(request(picture, method, mask=empty, steps=4, options=Options(composite="latent")))
    pixel = editor.edit(request(picture, method, mask=empty, steps=4, options=Options(composite="pixel")))
    assert torch.equal(latent.latent, latent.source_latent)
    assert pixel.image.tobytes() == picture(0).tobytes()
    assert plain.image.tobytes() != picture(0).tobytes()  # the VAE alone would not have returned it


def test_2_masked_sdedit_with_a_full_mask_is_sdedit(model: Any, picture: Picture) -> None:
    editor = editor_of(model)
    masked = editor.edit(request(picture, "iedit", mask=Image.new("L", (64, 64), 255)))
    plain = editor.edit(request(picture, "sdedit"))
    assert torch.equal(masked.latent, plain.latent)
    assert gap(masked.latent, masked.source_latent) > 0.05  # it did edit


# --- 3 and 4: lambda 1, no updates --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [ItoSettings(), ItoSettings(k=3), ItoSettings(update="adam"), ItoSettings(k=2, update="adam", carry=True)],
)
def test_3_lambda_one_is_the_guided_path_with_guidance_of_weight_zero(model: Any, settings: ItoSettings) -> None:
    path = model.schedule.levels(6).path()
    y, x, g = torch.randn(3, 7, 2, *SHAPE, generator=torch.Generator().manual_seed(0))
    told = Condition(Codec(model).encode_text([PROMPT, SOURCE]))
    results = [
        network_of(model).run(ito_pass(y[0], path, told, told.with_prompt(Codec(model).encode_text([""])), 5.0,
                 source=TrajectoryReference(x, path), guidance=guidance, mask=(x[0, :, :1] > 0).float(),
                 lam=torch.ones(2), settings=settings))
        for guidance in (None, TrajectoryReference(g, path))
    ]  # fmt: skip
    assert torch.equal(*results)


def test_3_lambda_one_never_runs_the_guidance_stage(model: Any, picture: Picture) -> None:
    editor = editor_of(model)
    result = editor.edit(request(picture, options=Options(lam=1.0)))
    assert set(result.profile.seconds) == {"encode", "mask", "invert", "final", "decode"}
    assert set(result.profile.evaluations) == {"encode", "mask", "invert", "final", "decode"}
    assert result.guidance is None
    guided = editor_of(model).edit(request(picture, options=Options(lam=0.99)))
    assert guided.guidance is not None and guided.profile.evaluations["guidance"] == 20
    assert not torch.equal(guided.latent, result.latent)


def test_4_no_updates_is_plain_ddim_from_the_inverted_latent(model: Any, picture: Picture) -> None:
    asked = request(picture, options=Options(guidance_scale=7.5, final=ItoSettings(t_u=0)))
    editor = editor_of(model, share=False)
    result = editor.edit(asked)
    network, levels = network_of(model), model.schedule.levels(10)
    states = {t: editor.codec.encode_text([t]) for t in (SOURCE, PROMPT, "")}
    trajectory = network.run(invert(result.source_latent[None], levels.path(), Condition(states[SOURCE])))
    want = network.run(
        masked_sampling(trajectory[0], levels.path(), Condition(states[PROMPT]), Condition(states[""]), 7.5)
    )
    assert torch.equal(result.latent, want[0])
    # The network rounds differently beside the samples of the guidance image; nothing else may.
    assert gap(editor_of(model).edit(asked).latent, want[0]) < 1e-4
    one_by_one = [editor_of(model, denoiser=OneByOne(model), share=s).edit(asked).latent for s in (False, True)]
    assert torch.equal(*one_by_one)


def test_4_the_same_prompt_without_guidance_reconstructs(model: Any, picture: Picture, record_property: Any) -> None:
    editor, errors = editor_of(model), {}
    for steps in (5, 15, 60):
        options = Options(guidance_scale=1.0, final=ItoSettings(t_u=0), lam=1.0, mask=MaskOptions(mode="none"))
        result = editor.edit(EditRequest(picture(0), SOURCE, SOURCE, steps=steps, options=options))
        errors[steps] = float(
            (result.latent - result.source_latent).square().mean().sqrt() / result.source_latent.std()
        )
        record_property(f"reconstruction error at {steps} steps", errors[steps])
    assert errors[5] > errors[15] > errors[60]  # the error is that of the steps
    assert errors[60] < 0.5 * errors[15]


# --- 5: batches ---------------------------------------------------------------------------------------------------


def batch_of(picture: Picture, method: str, options: Options) -> list[EditRequest]:
    more: dict[str, Any] = {"steps": 4, "options": options}
    first = request(picture, method, **more)
    # The other methods have no lambda, and an edit alone with lambda 1 has no guidance image to refine.
    lambdas = () if method != "ito" else (0.9, 0.2) if options.refine else (1.0, 0.2)
    return [
        first,
        dataclasses.replace(first, image=picture(1), seed=1),
        dataclasses.replace(first, prompt="a green tree on snow at night", seed=2),
        *(dataclasses.replace(first, options=dataclasses.replace(options, lam=lam)) for lam in lambdas),
    ]


BATCHED = [
    ("ito", Options(mask=MaskOptions(seeds=3))),
    (
        "ito",
        Options(
            mask=MaskOptions(mode="trajectory", seeds=2), refine=True, final=ItoSettings(k=3, update="adam", carry=True)
        ),
    ),
    ("ito", Options(mask=MaskOptions(norm="clamp", seeds=3), kept_area=True, composite="latent", inversion_scale=2.0)),
    ("iedit", Options(mask=MaskOptions(norm="clamp", sigma=0.5, seeds=3))),
    ("sdedit", Options()),
    ("ddpm", Options()),
    ("diffedit", Options(composite="pixel", mask=MaskOptions(seeds=3))),
    ("controlnet", Options(control_scale=0.8)),
    ("controlnet-diffedit", Options(mask=MaskOptions(seeds=2))),
]


@pytest.mark.parametrize(("method", "options"), BATCHED)
def test_5_a_batch_is_its_single_runs_bit_for_bit_but_for_the_network(
    model: Any, picture: Picture, monkeypatch: pytest.MonkeyPatch, method: str, options: Options
) -> None:
    encode, decode = Codec.encode, Codec.decode  # networks too
    monkeypatch.setattr(Codec, "encode", lambda self, x, note=None: torch.cat([encode(self, i) for i in x.split(1)]))
    monkeypatch.setattr(Codec, "decode", lambda self, x, note=None: torch.cat([decode(self, i) for i in x.split(1)]))
    requests = batch_of(picture, method, options)
    together = editor_of(model, denoiser=OneByOne(model)).edit_many(requests)
    for asked, result in zip(requests, together, strict=True):
        same(result, editor_of(model, denoiser=OneByOne(model)).edit(asked))


@pytest.mark.parametrize(("method", "options"), BATCHED[3:7])
def test_5_a_batch_is_its_single_runs_to_the_networks_rounding(
    model: Any, picture: Picture, method: str, options: Options
) -> None:
    requests = batch_of(picture, method, options)
    together = editor_of(model).edit_many(requests)
    for asked, result in zip(requests, together, strict=True):
        alone = editor_of(model).edit(asked)
        assert gap(result.latent, alone.latent) < 1e-4
        if alone.mask is not None:
            assert result.mask is not None and result.mask.tobytes() == alone.mask.tobytes()


def test_5_a_batch_of_ito_is_its_single_runs_to_the_networks_rounding(model: Any, picture: Picture) -> None:
    """Adam divides by |gradient|: where that is as small as its rounding, the update's sign is the rounding's. So an
    edit can only be compared where the gradient is not: without updates everywhere, with them in nearly all cells."""
    for options, share in ((Options(final=ItoSettings(t_u=0), guidance=ItoSettings(t_u=0)), 1.0), (Options(), 0.9)):
        requests = batch_of(picture, "ito", options)
        together = editor_of(model).edit_many(requests)
        for asked, result in zip(requests, together, strict=True):
            alone = editor_of(model).edit(asked)
            assert result.mask is not None and alone.mask is not None
            assert result.mask.tobytes() == alone.mask.tobytes()
            near = (result.latent - alone.latent).abs() < 1e-4 * alone.latent.abs().max()
            assert near.float().mean() >= share


# --- 7 and 8: exact inversion, the same bits again ----------------------------------------------------------------


class Constant:
    """Returns one noise, whatever it is asked."""

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return seeded_noise(3, "constant", tuple(x.shape[1:])).expand_as(x)


@pytest.mark.parametrize("steps", [1, 10, 50])
def test_7_inversion_then_sampling_of_a_constant_network_is_exact(model: Any, picture: Picture, steps: int) -> None:
    """In float64, to 1e-12, in test_denoiser.py; here the whole edit in float32. Sampling multiplies a rounding of the
    noisiest latent by 1 / sqrt(abar) of its level, 15; of the steps next to it a little less: some 8 such roundings."""
    options = Options(final=ItoSettings(t_u=0), guidance_scale=7.5)
    result = editor_of(model, denoiser=Constant()).edit(request(picture, steps=steps, options=options))
    noisiest = seeded_noise(3, "constant", SHAPE).abs().max() + result.source_latent.abs().max()
    bound = 8 * 2**-24 * noisiest / model.schedule.levels(steps).abar[0] ** 0.5
    assert (result.latent - result.source_latent).abs().max() < bound


@pytest.mark.parametrize("method", ["ito", "iedit", "controlnet-diffedit"])
def test_8_the_same_seed_gives_the_same_bits_with_and_without_the_cache(
    model: Any, picture: Picture, tmp_path: Path, method: str
) -> None:
    options = Options(refine=True, round_trip=True) if method == "ito" else Options()
    asked = request(picture, method, steps=5, options=options)
    editor = editor_of(model)
    first = editor.edit(asked)
    again = editor.edit(asked)
    assert "invert" not in first.profile.cached
    assert {"encode", "mask"} <= set(again.profile.cached)
    same(again, first)
    same(editor_of(model, cache=StageCache(memory=0)).edit(asked), first)
    for _ in range(2):  # written, then read by another editor
        from_disk = editor_of(model, cache=StageCache(memory=0, folder=tmp_path)).edit(asked)
        same(from_disk, first)
    assert {"encode", "mask"} <= set(from_disk.profile.cached)
    other = editor.edit(dataclasses.replace(asked, seed=1))
    if method == "controlnet-diffedit":  # the mask is all that its noise is for
        assert first.mask is not None and other.mask is not None
        assert torch.equal(other.latent, first.latent) == (other.mask.tobytes() == first.mask.tobytes())
    else:
        assert not torch.equal(other.latent, first.latent)


WORLD_STEPS = 2  # every step tells of the same; 25 are in the slow test below


class OnlyFirstStages(StageCache):
    """Answers for the stages before those whose calls are shared or not: these are grouped the same both times."""

    def __init__(self, held: StageCache):
        super().__init__(memory=0)
        self.held = held

    def get(self, key: str, stage: str = "", shape: Sequence[int] | None = None) -> Tensor | None:
        return self.held.get(key, stage, shape) if stage in ("encode", "mask") else None


def grouped_otherwise(editor: RealEditor, kind: str, count: int, steps: int, alone: int) -> dict[str, list[int]]:
    """Largest difference, of 255, of the embedded model's edits of `count` held-out scenes from those of one batch: without shared
    calls, from what the batch left in the cache (so the final pass runs one by one), and the first `alone` one by one from
    the beginning."""
    asked = [truth.edit_request(c, truth.METHODS["ito"], 7, steps) for c in truth.edit_cases(kind, count, seed=31337)]
    if steps == WORLD_STEPS:  # the full method, but for the mask: ten seeds of it are most of a short edit
        full = Options(guidance_until=1.0, guidance_path="inverted", mask=MaskOptions(seeds=2))
        asked = [dataclasses.replace(a, options=full) for a in asked]
    cache = StageCache()

    def runs(share: bool = True, held: StageCache | None = None) -> RealEditor:
        # Calls of 16 samples: larger ones cost a CPU more a sample, and these are split at more places.
        return RealEditor(
            editor.model, editor.denoiser, share=share, cache=held or StageCache(memory=0), memory=64 << 20
        )

    batch = runs(held=cache).edit_many(asked)
    others = {
        "not shared": runs(share=False, held=OnlyFirstStages(cache)).edit_many(asked),
        "cached": [runs(held=cache).edit(a) for a in asked],
        "alone": [runs().edit(a) for a in asked[:alone]],
    }
    assert all("invert" in r.profile.cached for r in others["cached"])
    assert others["not shared"][0].profile.cached == ["encode", "mask"]
    pictures = [np.asarray(r.image).astype(int) for r in batch]
    return {
        how: [int(np.abs(a - np.asarray(r.image)).max()) for a, r in zip(pictures, found)]
        for how, found in others.items()
    }


@pytest.fixture(scope="module")
def embedded() -> RealEditor:
    model = load_model("picturebook", device="cpu")
    return RealEditor(model, TorchBackend(model))


@pytest.mark.parametrize("kind", truth.KINDS)
def test_8_calls_grouped_otherwise_give_the_same_picture_within_1_of_255(embedded: RealEditor, kind: str) -> None:
    """The network rounds differently in another batch, and the clipped update leaves that rounding."""
    for how, worst in grouped_otherwise(embedded, kind, 8, WORLD_STEPS, alone=2).items():
        assert max(worst) <= 1, (how, worst)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", truth.KINDS)
def test_8_at_25_steps(embedded: RealEditor, kind: str) -> None:
    for how, worst in grouped_otherwise(embedded, kind, 20, 25, alone=20).items():
        assert max(worst) <= 1, (how, worst)


def test_4_ddpm_inversion_under_the_source_prompt_returns_the_input(model: Any, picture: Picture) -> None:
    """Sampling adds what is missing to the mean that it computes itself; only the network's rounding is left, once per step."""
    options = Options(guidance_scale=3.0, source_guidance_scale=3.0)
    asked = EditRequest(picture(0), SOURCE, SOURCE, "ddpm", steps=10, options=options)
    result = editor_of(model).edit(asked)
    assert gap(result.latent, result.source_latent) < 1e-5
    other = editor_of(model).edit(dataclasses.replace(asked, prompt=PROMPT))
    assert gap(other.latent, result.latent) > 1e-2


# --- 9: diffusers -------------------------------------------------------------------------------------------------


def parts_of(model: Any, prediction: str) -> dict[str, Any]:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_pretrained(model.folder / "scheduler", prediction_type=prediction)
    return {
        "vae": model.vae, "text_encoder": model.text_encoder, "tokenizer": model.tokenizer, "unet": model.unet,
        "scheduler": scheduler, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip


def pipeline(kind: Any, monkeypatch: pytest.MonkeyPatch, noise: Tensor, **parts: Any) -> Any:
    """A diffusers pipeline whose noise is ours."""
    import sys

    def given(shape: Any, **_: Any) -> Tensor:
        assert tuple(shape) == tuple(noise.shape)
        return noise

    monkeypatch.setattr(sys.modules[kind.__module__], "randn_tensor", given)
    made = kind(**parts)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("steps", "ratio"), [(20, 0.7), (7, 1.0)])
def test_9_sdedit_is_img2img_with_ddim(
    model: Any, picture: Picture, monkeypatch: pytest.MonkeyPatch, prediction: str, steps: int, ratio: float
) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    options = Options(guidance_scale=7.5, ratio=ratio, negative_prompt="a green tree")
    result = editor_of(model, prediction).edit(request(picture, "sdedit", steps=steps, options=options, seed=5))
    noise = seeded_noise(5, "sample", SHAPE)[None]
    pipe = pipeline(StableDiffusionImg2ImgPipeline, monkeypatch, noise, **parts_of(model, prediction))
    want = pipe(prompt=PROMPT, negative_prompt="a green tree", image=result.source_latent[None], strength=ratio,
                num_inference_steps=steps, guidance_scale=7.5, output_type="latent").images  # fmt: skip
    assert gap(result.latent[None], want) < 1e-5


@pytest.mark.parametrize("names", [("pose",), ("pose", "scribble")])
def test_9_controlnet_is_controlnet_img2img(
    model: Any, picture: Picture, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    from diffusers import StableDiffusionControlNetImg2ImgPipeline

    maps = {name: layout(10 + i) for i, name in enumerate(names)}
    scales = [1.0, 0.6][: len(names)]
    options = Options(guidance_scale=7.5, control_scales=tuple(zip(names, scales)))
    result = editor_of(model).edit(
        request(picture, "controlnet", steps=20, options=options, layouts=maps, source_layouts={})
    )
    parts = parts_of(model, model.schedule.prediction)
    parts["controlnet"] = [model.controlnets[n] for n in names]
    pipe = pipeline(
        StableDiffusionControlNetImg2ImgPipeline, monkeypatch, seeded_noise(0, "sample", SHAPE)[None], **parts
    )
    want = pipe(prompt=PROMPT, image=result.source_latent[None], control_image=list(maps.values()), height=64, width=64,
                strength=0.7, num_inference_steps=20, guidance_scale=7.5, controlnet_conditioning_scale=scales,
                output_type="latent").images  # fmt: skip
    assert gap(result.latent[None], want) < 1e-5
    plain = editor_of(model).edit(request(picture, "sdedit", steps=20))
    assert gap(plain.latent, result.latent) > 1e-3  # the ControlNet matters


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("seeds", [1, 10])
def test_9_the_single_mask_is_generate_mask(
    model: Any, picture: Picture, monkeypatch: pytest.MonkeyPatch, guided: bool, seeds: int
) -> None:
    """With diffusers' normaliser. generate_mask takes the two results of encode_prompt in the wrong order: its "text"
    is the negative prompt, so its guided difference is (1 - s) (edit - source) where ours is s (edit - source), which
    the normaliser makes the same; and guidance_scale 1 fails there, so both of ours are compared with 7.5.
    """
    from diffusers import DDIMInverseScheduler, StableDiffusionDiffEditPipeline

    wanted = MaskOptions(mode="single", seeds=seeds, strength=0.5, sigma=0, norm="clamp", guided=guided)
    options = Options(guidance_scale=7.5, mask=wanted)
    result = editor_of(model).edit(request(picture, "iedit", steps=25, options=options, seed=3))
    noise = torch.stack([seeded_noise(3, f"mask-{i}", SHAPE) for i in range(seeds)])
    parts = parts_of(model, model.schedule.prediction)
    parts["inverse_scheduler"] = DDIMInverseScheduler.from_config(parts["scheduler"].config)
    pipe = pipeline(StableDiffusionDiffEditPipeline, monkeypatch, noise, **parts)
    want = pipe.generate_mask(image=result.source_latent[None], target_prompt=PROMPT, source_prompt=SOURCE,
                              num_maps_per_mask=seeds, mask_encode_strength=0.5, mask_thresholding_ratio=3.0,
                              num_inference_steps=25, guidance_scale=7.5, output_type="np")  # fmt: skip
    assert result.mask is not None
    got = np.asarray(result.mask)[::8, ::8] // 255
    np.testing.assert_array_equal(got, want[0])
    assert 0 < got.mean() < 1


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_9_inversion_is_diffedits_invert(
    model: Any, picture: Picture, monkeypatch: pytest.MonkeyPatch, prediction: str
) -> None:
    from diffusers import DDIMInverseScheduler, StableDiffusionDiffEditPipeline

    from iedit.runtime.images import to_tensor

    x0 = Codec(model).encode(torch.cat([to_tensor(picture(0)), to_tensor(picture(1))]))
    parts = parts_of(model, prediction)
    parts["inverse_scheduler"] = DDIMInverseScheduler.from_config(parts["scheduler"].config)
    pipe = pipeline(StableDiffusionDiffEditPipeline, monkeypatch, x0, **parts)
    for ratio, scale in ((1.0, 1.0), (0.8, 1.0), (1.0, 3.0)):
        want = pipe.invert(prompt=[SOURCE, PROMPT], image=x0, inpaint_strength=ratio, num_inference_steps=20,
                           guidance_scale=scale).latents.transpose(0, 1)  # fmt: skip
        other = editor_of(model, prediction).model
        levels = other.schedule.levels(20)
        told = Condition(Codec(model).encode_text([SOURCE, PROMPT]))
        got = network_of(other).run(
            invert(x0, levels.path(levels.start(ratio)), told, told.with_prompt(Codec(model).encode_text([""])), scale)
        )
        assert torch.equal(got[-1], x0)
        gaps = [gap(a, b) for a, b in zip(got[:-1], want, strict=True)]
        assert max(gaps) < 1e-5


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_9_fresh_noise_is_ddims_eta(model: Any, prediction: str) -> None:
    other, scheduler = editor_of(model, prediction).model, parts_of(model, prediction)["scheduler"]
    scheduler.set_timesteps(10)
    told = Condition(Codec(model).encode_text([SOURCE, PROMPT]))
    uncond = told.with_prompt(Codec(model).encode_text(["", ""]))
    x = torch.stack([seeded_noise(i, "x", SHAPE) for i in range(2)])
    fresh = torch.stack([torch.stack([seeded_noise(i, f"{n}", SHAPE) for i in range(2)]) for n in range(9)])
    path = other.schedule.levels(10).path()
    for eta in (0.4, 1.0):
        got = network_of(other).run(masked_sampling(x, path, told, uncond, 3.0, guided=6, eta=eta, noise=fresh))
        want = x
        for number, t in enumerate(scheduler.timesteps):
            cond, low = (model.unet(want, t, c.prompt_embeds).sample for c in (told, uncond))
            output = low + 3.0 * (cond - low) if number < 6 else cond
            noise = fresh[number] if number < 9 else torch.zeros_like(want)
            want = scheduler.step(output, t, want, eta=eta, variance_noise=noise).prev_sample
        assert gap(got, want) < 1e-5


def test_9_the_blend_is_inpaints(model: Any, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import StableDiffusionInpaintPipeline

    mask = square()
    asked = request(picture, "iedit", steps=20, mask=mask, options=Options(guidance_scale=7.5, ratio=0.7))
    result = editor_of(model).edit(asked)
    noise = seeded_noise(0, "sample", SHAPE)[None]
    parts = parts_of(model, model.schedule.prediction)
    pipe = pipeline(StableDiffusionInpaintPipeline, monkeypatch, noise, **parts)
    x0 = result.source_latent[None]
    want = pipe(prompt=PROMPT, image=x0, mask_image=mask, masked_image_latents=x0, height=64, width=64, strength=0.7,
                num_inference_steps=20, guidance_scale=7.5, output_type="latent").images  # fmt: skip
    assert gap(result.latent[None], want) < 1e-5
    cells = torch.from_numpy(np.array(mask.resize((8, 8), Image.Resampling.NEAREST))) > 0
    assert torch.equal(result.latent[:, ~cells], result.source_latent[:, ~cells])
    assert torch.equal(want[0][:, ~cells], result.source_latent[:, ~cells])


@pytest.mark.parametrize("update", ["clipped", "adam"])
@pytest.mark.parametrize(("k", "refine"), [(1, False), (3, False), (1, True)])
def test_9_an_ito_edit_is_the_equations_with_diffusers_and_autograd(
    model: Any, picture: Picture, k: int, refine: bool, update: str
) -> None:
    """The whole of ITO written a second time from the paper's equations. Measured 3e-6 with either
    update. Adam's could be missed without a fault: it makes a step of full size also out of a gradient that is rounding.

    A trained network makes more of a rounding in its input than a random one, and its two runs drift apart. There the equations take the answers that the
    edit's network gave, each for the latent that the equations have come to."""
    from diffusers import DDIMInverseScheduler

    steps, lam, phase, mask = 8, 0.6, ItoSettings(t_u=5, k=k, update=update), square()
    options = Options(lam=lam, guidance_scale=7.5, guidance=phase, final=phase)
    if refine:
        options = dataclasses.replace(options, refine=True, refinement=ItoSettings(t_u=6, update=update))
    remembered = Remembering(model) if model.name == "picturebook" else None
    result = editor_of(model, denoiser=remembered).edit(request(picture, steps=steps, mask=mask, options=options))
    scheduler = parts_of(model, model.schedule.prediction)["scheduler"]
    inverse = DDIMInverseScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(steps)
    inverse.set_timesteps(steps)
    m = torch.from_numpy(np.array(mask.resize((8, 8), Image.Resampling.NEAREST)) / 255).float()[None, None]
    text = {t: Codec(model).encode_text([t]) for t in (PROMPT, SOURCE, "")}
    x0 = result.source_latent[None]

    @torch.no_grad()
    def eps(x: Tensor, t: Any, prompt: str, scale: float) -> Tensor:
        def network(prompt: str) -> Tensor:
            if remembered is not None:
                return remembered.answer(x, int(t), text[prompt])
            output: Tensor = model.unet(x, t, text[prompt]).sample
            return output

        out = network(prompt)
        if scale == 1:
            return out
        low = network("")
        return low + scale * (out - low)

    def inverted(x: Tensor, prompt: str) -> list[Tensor]:
        found = [x]
        for t in inverse.timesteps:
            found.append(inverse.step(eps(found[-1], t, prompt, 1), t, found[-1]).prev_sample)
        return found[::-1]

    def optimised(
        y: Tensor, source: list[Tensor], guide: list[Tensor] | None, weight: float, t_u: int = 5, k: int = k
    ) -> Tensor:
        for i, t in enumerate(scheduler.timesteps):
            y = scheduler.step(eps(y, t, PROMPT, 7.5), t, y).prev_sample
            if i < t_u:
                leaf = y.clone().requires_grad_()
                adam = torch.optim.Adam([leaf], lr=0.1)
                for _ in range(k):
                    adam.zero_grad()
                    loss = weight * (((1 - m) * (leaf - source[i + 1])) ** 2).mean()
                    if guide is not None:
                        near = torch.nn.functional.cosine_similarity(leaf.flatten(), guide[i + 1].flatten(), dim=0)
                        loss = loss + (1 - weight) * (1 - near)
                    loss.backward()
                    if update == "adam":
                        adam.step()
                    else:
                        assert leaf.grad is not None
                        with torch.no_grad():
                            leaf -= (leaf.grad * (leaf.numel() / 2)).clamp(-0.1, 0.1)
                y = leaf.detach()
        return y

    noise = seeded_noise(0, "guidance", SHAPE)[None]
    noised = [scheduler.add_noise(x0, noise, t[None]) for t in scheduler.timesteps] + [x0]
    guidance = optimised(noised[0], noised, None, 1.0)
    x, g = inverted(x0, SOURCE), inverted(guidance, PROMPT)
    if refine:
        g = inverted(optimised(g[0], g, x, 0.0, t_u=6, k=1), PROMPT)
    want = optimised(x[0], x, g, lam)
    differences = (result.latent[None] - want).abs() / want.abs().max()
    assert differences.max() < (1e-5 if update == "clipped" else 1e-4)


# --- the mask's shortcut ------------------------------------------------------------------------------------------


def test_unconditional_halves_that_cancel_need_not_be_evaluated(model: Any) -> None:
    levels, x0 = model.schedule.levels(10), torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(1))
    edit, source = (Condition(Codec(model).encode_text([t]).expand(2, -1, -1)) for t in (PROMPT, SOURCE))
    low = Codec(model).encode_text([""])
    network = network_of(model)
    with network.profile.stage("mask"):
        heat = network.run(
            estimate_mask(
                x0, noise, levels.path(5), edit, source, uncond=low, scale=7.5, mode="single", prediction="epsilon"
            )
        )
    assert network.profile.evaluations["mask"] == 2 * 2 * 3 and network.profile.calls["mask"] == 1
    x = add_noise(x0[:, None], noise, levels.abar[5]).flatten(0, 1)
    full = [
        network.predict(x, levels.timesteps[5], c.repeat(3), c.repeat(3).with_prompt(low), 7.5).unflatten(0, (2, 3))
        for c in (edit, source)
    ]
    want = difference(*full)
    torch.testing.assert_close(normalise(heat, "minmax"), normalise(want, "minmax"), rtol=0, atol=1e-4)
    for norm in ("minmax", "clamp"):
        assert torch.equal(*(mask_map(h, sigma=1, norm=norm, threshold=0.31) for h in (heat, want)))


def test_the_trajectory_mask_compares_the_last_sampling_step(model: Any) -> None:
    levels, x0 = model.schedule.levels(10), torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1, 2, *SHAPE, generator=torch.Generator().manual_seed(1))
    edit, source, low = (Condition(Codec(model).encode_text([t])) for t in (PROMPT, SOURCE, ""))
    network = network_of(model)
    with network.profile.stage("mask"):
        heat = network.run(
            estimate_mask(
                x0,
                noise,
                levels.path(),
                edit,
                source,
                uncond=low.prompt_embeds,
                scale=7.5,
                mode="trajectory",
                prediction="epsilon",
            )
        )
    assert network.profile.evaluations["mask"] == 10 * 2 * 2 * 2 and network.profile.calls["mask"] == 10
    total = torch.zeros(1, 1, 8, 8)
    for seed in range(2):
        last = []
        for told in (edit, source):
            y = add_noise(x0, noise[:, seed], levels.abar[0])
            for i in range(9):
                c_x, c_out = ddim_coefficients(levels.abar[i], levels.abar[i + 1])
                y = c_x * y + c_out * network.predict(y, levels.timesteps[i], told, low, 7.5)
            last.append(network.predict(y, levels.timesteps[9], told, low, 7.5))
        total += (last[0] - last[1]).abs().mean(1, keepdim=True) / 2
    assert gap(heat, total) < 1e-4


def test_the_reference_of_masked_sampling_is_at_the_level_of_the_latent(model: Any) -> None:
    """One level late, as diffusers' DiffEdit blends, an empty mask would not return its input."""
    levels, x0 = model.schedule.levels(10), torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    path = levels.path()
    reference = NoisedReference(x0, noise, path)
    assert reference.at(path[10]) is x0
    assert torch.equal(reference.at(path[3]), add_noise(x0, noise, levels.abar[3]))
    trajectory = torch.randn(8, 1, *SHAPE)  # from level 3 on
    held = TrajectoryReference(trajectory, levels.path(3))
    assert torch.equal(held.at(path[3]), trajectory[0]) and torch.equal(held.at(path[10]), trajectory[7])


# --- the embedded model ---------------------------------------------------------------------------------------------

# Every identity once, on weights that were trained. (Its every case is run on the small model, which takes a tenth of the time.)
ON_TRAINED_WEIGHTS: list[tuple[Callable[..., None], dict[str, Any]]] = [
    (test_1_an_empty_mask_returns_the_input_latent, {"method": "controlnet-diffedit", "size": (50, 61)}),
    (test_1_an_empty_mask_with_composite_returns_the_input, {"method": "ito"}),
    (test_2_masked_sdedit_with_a_full_mask_is_sdedit, {}),
    (test_3_lambda_one_is_the_guided_path_with_guidance_of_weight_zero, {"settings": ItoSettings()}),
    (test_3_lambda_one_never_runs_the_guidance_stage, {}),
    (test_4_no_updates_is_plain_ddim_from_the_inverted_latent, {}),
    (test_4_the_same_prompt_without_guidance_reconstructs, {}),
    (test_4_ddpm_inversion_under_the_source_prompt_returns_the_input, {}),
    (test_5_a_batch_is_its_single_runs_bit_for_bit_but_for_the_network, dict(zip(("method", "options"), BATCHED[0]))),
    (test_5_a_batch_is_its_single_runs_to_the_networks_rounding, dict(zip(("method", "options"), BATCHED[3]))),
    (test_5_a_batch_of_ito_is_its_single_runs_to_the_networks_rounding, {}),
    (test_7_inversion_then_sampling_of_a_constant_network_is_exact, {"steps": 10}),
    (test_8_the_same_seed_gives_the_same_bits_with_and_without_the_cache, {"method": "ito"}),
    (test_9_sdedit_is_img2img_with_ddim, {"steps": 20, "ratio": 0.7, "prediction": "epsilon"}),
    (test_9_controlnet_is_controlnet_img2img, {"names": ("pose", "scribble")}),
    (test_9_the_single_mask_is_generate_mask, {"seeds": 10, "guided": True}),
    (test_9_inversion_is_diffedits_invert, {"prediction": "epsilon"}),
    (test_9_fresh_noise_is_ddims_eta, {"prediction": "epsilon"}),
    (test_9_the_blend_is_inpaints, {}),
    (test_9_an_ito_edit_is_the_equations_with_diffusers_and_autograd, {"k": 1, "refine": False, "update": "clipped"}),
    (test_unconditional_halves_that_cancel_need_not_be_evaluated, {}),
    (test_the_trajectory_mask_compares_the_last_sampling_step, {}),
]


def test_every_identity_is_among_them() -> None:
    here = {
        name
        for name, value in globals().items()
        if name.startswith("test_") and "model" in inspect.signature(value).parameters
    }
    assert {f.__name__ for f, _ in ON_TRAINED_WEIGHTS} == here - {
        "test_the_reference_of_masked_sampling_is_at_the_level_of_the_latent"
    }


@pytest.mark.parametrize(("identity", "case"), ON_TRAINED_WEIGHTS, ids=lambda v: getattr(v, "__name__", ""))
def test_the_embedded_model(
    identity: Callable[..., None], case: dict[str, Any], embedded: RealEditor, picture: Picture,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, record_property: Any,
) -> None:  # fmt: skip
    # The identities are of the full method, which is not what this checkpoint recommends.
    model = dataclasses.replace(
        embedded.model, guidance_until=None, guidance_path=None, mask_seeds=None, lambda_area=None
    )
    given = case | {
        "model": model, "picture": picture, "monkeypatch": monkeypatch, "tmp_path": tmp_path,
        "record_property": record_property,
    }  # fmt: skip
    identity(**{name: given[name] for name in inspect.signature(identity).parameters})
