"""The VAE's way out of half precision, prompts in chunks, and where a model is looked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from iedit.runtime.backends.eager import TorchBackend
from iedit.runtime.codec import Codec, token_chunks
from iedit.runtime.editor import Editor, EditRequest, Options
from iedit.runtime.errors import RunError, UsageError
from iedit.runtime.model.checkpoint import find_folder, picturebook_folder
from iedit.runtime.model.model import Model, describe, load_model, read_digests
from iedit.runtime.stage_cache import StageCache


class FakeVae(nn.Module):
    """Halves on the way in and doubles on the way out; what its weights' dtype is in `broken` comes out as NaN."""

    def __init__(self, broken: tuple[torch.dtype, ...], dtype: torch.dtype):
        super().__init__()
        self.half_of = nn.Parameter(torch.tensor(0.5, dtype=dtype), requires_grad=False)
        self.broken = broken
        self.config = SimpleNamespace(scaling_factor=0.25)

    def _through(self, x: Tensor) -> Tensor:
        assert x.dtype == self.half_of.dtype
        return torch.full_like(x, float("nan")) if x.dtype in self.broken else x

    def encode(self, x: Tensor) -> Any:
        latent = self._through(x) * self.half_of
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latent))

    def decode(self, z: Tensor) -> Any:
        return SimpleNamespace(sample=self._through(z) / self.half_of)


def model_with(vae: FakeVae, dtype: torch.dtype) -> Model:
    nothing: Any = None
    return Model(
        "fake", Path(), nothing, vae, nothing, nothing, nothing, {}, torch.device("cpu"), dtype, "0" * 16, "0" * 16
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_vae_that_overflows_in_half_precision_is_repeated_in_float32(dtype: torch.dtype) -> None:
    model = model_with(FakeVae((dtype,), dtype), dtype)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    notes: list[str] = []
    latent = Codec(model).encode(images, notes.append)
    assert latent.dtype == torch.float32
    assert torch.equal(latent, images * 0.5 * 0.25)  # of the float32 pictures, not of their rounding to a half
    assert torch.equal(Codec(model).decode(latent, notes.append), images)
    name = str(dtype).removeprefix("torch.")
    assert notes == [f"the VAE gave NaN in {name}; {what} was repeated in float32" for what in ("encoding", "decoding")]
    assert model.vae.half_of.dtype == dtype  # other threads may be using it


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_vae_that_gives_nan_in_float32_is_an_error_that_names_the_stage(dtype: torch.dtype) -> None:
    model = model_with(FakeVae((torch.float16, torch.float32), dtype), dtype)
    with pytest.raises(RunError, match="stage encode"):
        Codec(model).encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(RunError, match="stage decode"):
        Codec(model).decode(torch.zeros(1, 4, 8, 8))


def test_a_vae_that_is_fine_in_half_precision_is_left_alone() -> None:
    model = model_with(FakeVae((), torch.float16), torch.float16)
    images = torch.rand(1, 3, 8, 8)
    notes: list[str] = []
    assert torch.equal(Codec(model).encode(images, notes.append), (images.half() * 0.5).float() * 0.25)
    assert notes == []


def test_a_long_prompt_becomes_chunks_that_each_begin_and_end_as_the_encoder_expects(tiny_checkpoint_cli: Path) -> None:
    model = load_model(str(tiny_checkpoint_cli))
    length = model.tokenizer.model_max_length
    words = ["red", "car", "grass", "noon"] * length
    chunks = token_chunks(model, " ".join(words))
    assert [len(c) for c in chunks[:-1]] == [length - 2] * (len(chunks) - 1)
    assert [i for c in chunks for i in c] == model.tokenizer(" ".join(words), add_special_tokens=False).input_ids

    states = Codec(model).encode_text([" ".join(words), "red"], len(chunks))
    assert states.shape == (2, len(chunks) * length, 16)
    first = Codec(model).encode_text([" ".join(words[: length - 2])])
    torch.testing.assert_close(states[:1, :length], first)
    torch.testing.assert_close(states[1:, :length], Codec(model).encode_text(["red"]))
    torch.testing.assert_close(states[1:, length : 2 * length], Codec(model).encode_text([""]))


def test_the_layouts_to_load_can_be_named(tiny_checkpoint_cli: Path) -> None:
    assert set(load_model(str(tiny_checkpoint_cli)).controlnets) == {"pose", "scribble"}
    assert set(load_model(str(tiny_checkpoint_cli), ["pose"]).controlnets) == {"pose"}
    assert load_model(str(tiny_checkpoint_cli), []).controlnets == {}
    with pytest.raises(UsageError, match="no ControlNet or T2I-Adapter for depth; it has pose, scribble"):
        load_model(str(tiny_checkpoint_cli), ["depth"])


def test_the_digest_is_of_the_weights_in_use(tiny_checkpoint_cli: Path) -> None:
    whole, pose = load_model(str(tiny_checkpoint_cli)), load_model(str(tiny_checkpoint_cli), ["pose"])
    assert whole.digest == load_model(str(tiny_checkpoint_cli), dtype="bfloat16", emulate=True).digest
    assert whole.digest != pose.digest


def test_an_unknown_dtype_is_refused(tiny_checkpoint_cli: Path) -> None:
    with pytest.raises(UsageError, match="dtype is 'int8', expected one of float32, float16, bfloat16"):
        load_model(str(tiny_checkpoint_cli), dtype="int8")


def test_an_installation_without_the_embedded_model_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iedit.runtime.model.checkpoint.picturebook_folder", lambda: tmp_path / "picturebook")
    with pytest.raises(UsageError, match="iedit train embed"):
        find_folder("picturebook")
    assert "iedit train embed" in describe("picturebook")["problem"]
    assert picturebook_folder().name == "picturebook"


def test_of_a_hub_repository_only_one_variant_of_the_weights_is_fetched() -> None:
    from fnmatch import fnmatch

    from iedit.runtime.model.checkpoint import HUB_FILES

    def fetched(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in HUB_FILES)

    wanted = (
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "scheduler/scheduler_config.json",
        "config.json",  # of a ControlNet's own repository
        "diffusion_pytorch_model.safetensors",
        "controlnet-pose/diffusion_pytorch_model.safetensors",
    )
    spared = (
        "v1-5-pruned.ckpt",
        "v1-5-pruned.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "safety_checker/model.safetensors",
    )
    assert [n for n in wanted if not fetched(n)] == []
    assert [n for n in spared if fetched(n)] == []


def test_a_checkpoint_may_recommend_its_mask_and_a_request_may_say_otherwise(tiny_folder: Path, tmp_path: Path) -> None:
    from iedit.runtime.editor import MaskOptions

    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "iedit.json").write_text(json.dumps({"mask_strength": 0.8, "mask_threshold": 0.25}))
    told, plain = load_model(str(folder), device="cpu"), load_model(str(tiny_folder), device="cpu")

    def settled(model: Model, **options: Any) -> tuple[float | None, float | None]:
        mask = MaskOptions(**options).settled(model, "ito")
        return mask.strength, mask.threshold

    assert settled(plain) == (0.5, 0.1) and settled(told) == (0.8, 0.25)
    assert settled(told, strength=0.3, threshold=0.0) == (0.3, 0.0)
    assert settled(told, norm="clamp") == (0.8, 0.5)  # another normaliser's threshold means something else


def test_a_checkpoint_may_recommend_how_many_steps_are_updated(tiny: Model) -> None:
    import dataclasses

    from iedit.runtime.editor import Options
    from iedit.runtime.options import ItoSettings

    told = dataclasses.replace(tiny, text_update_share=1.0)
    for model, wanted in ((tiny, 12), (told, 20)):
        settled = Options(final=ItoSettings(t_u=3)).settled(model, 20)
        assert (settled.guidance.t_u, settled.final.t_u, settled.refinement.t_u) == (wanted, 3, 6)
        assert Options().settled(model, 20, layouts=True).final.t_u == 12  # measured on text edits, said of them only


# --- what a checkpoint's digest covers ------------------------------------------------------------------------------


def _config(folder: Path, part: str, **values: Any) -> None:
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _other_words(folder: Path) -> None:
    """Two words change places in the tokenizer's vocabulary."""
    path = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    words["red</w>"], words["blue</w>"] = words["blue</w>"], words["red</w>"]
    path.write_text(json.dumps(content))


CHANGES: dict[str, Callable[[Path], None]] = {
    "vae scaling_factor": lambda f: _config(f, "vae", scaling_factor=0.5),
    "unet act_fn": lambda f: _config(f, "unet", act_fn="gelu"),
    "unet attention_head_dim": lambda f: _config(f, "unet", attention_head_dim=4),
    "text_encoder hidden_act": lambda f: _config(f, "text_encoder", hidden_act="gelu"),
    "tokenizer": _other_words,
}


@pytest.fixture(scope="module")
def edited(tiny: Any) -> tuple[StageCache, EditRequest]:
    """What an edit with the random checkpoint leaves in a cache."""
    cache, asked = StageCache(), EditRequest(Image.new("RGB", (64, 64), "red"), "a blue car", "a red car", steps=3)
    Editor(tiny, TorchBackend(tiny), cache=cache).edit(asked)
    return cache, asked


@pytest.mark.parametrize("change", CHANGES)
def test_the_same_weights_with_another_behaviour_are_another_model(
    change: str, tiny: Any, tiny_folder: Path, tmp_path: Path, edited: tuple[StageCache, EditRequest]
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "other")
    CHANGES[change](folder)
    other = load_model(str(folder), device="cpu")
    assert other.digest != tiny.digest and other.weights_digest == tiny.weights_digest
    assert read_digests(str(folder)).whole == other.digest
    cache, asked = edited
    result = Editor(other, TorchBackend(other), cache=cache).edit(asked)
    assert result.profile.cached == []  # nothing of the other model is taken for its own
    assert torch.equal(result.latent, Editor(other, TorchBackend(other), cache=StageCache(memory=0)).edit(asked).latent)


def test_a_layout_whose_network_was_not_loaded_is_refused_with_what_to_do(tiny_folder: Path, picture: Any) -> None:
    editor = Editor.load(str(tiny_folder), device="cpu", backend="torch", used_layouts=["pose"])
    assert editor.model.layouts == ["pose"] and editor.model.left_out == ("scribble",)
    maps = {"scribble": picture(1)}
    with pytest.raises(
        UsageError, match=r"layout 'scribble': .* was loaded without its network; name it in used_layouts"
    ):
        editor.edit(EditRequest(picture(0), "a red car", layouts=maps, source_layouts=maps, steps=2))
    maps, options = (
        {"pose": picture(1)},
        Options(control_scales=(("scribble", 0.5),)),
    )  # as if it were loaded, and not asked for
    request = EditRequest(picture(0), "a red car", layouts=maps, source_layouts=maps, steps=2, options=options)
    assert editor.edit(request).image.size == (64, 64)
    with pytest.raises(UsageError, match=r"layout 'depth': .* of that name; it has pose"):
        editor.edit(EditRequest(picture(0), "a red car", layouts={"depth": picture(1)}, steps=2))


def test_layouts_by_each_others_names_are_another_model(tiny: Any, tiny_folder: Path) -> None:
    names = ("pose", "scribble")
    swapped = load_model(
        str(tiny_folder),
        {a: str(tiny_folder / f"controlnet-{b}") for a, b in zip(names, reversed(names))},
        device="cpu",
    )
    plain = load_model(str(tiny_folder), {n: str(tiny_folder / f"controlnet-{n}") for n in names}, device="cpu")
    assert plain.digest == tiny.digest != swapped.digest


def test_the_same_model_saved_by_another_version_is_the_same(tiny: Any, tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "other")
    _config(folder, "unet", _diffusers_version="9.9", _name_or_path="elsewhere")
    _config(folder, "text_encoder", transformers_version="9.9", dtype="float16")
    other = load_model(str(folder), device="cpu")
    assert (other.digest, other.part_digests) == (tiny.digest, tiny.part_digests)
