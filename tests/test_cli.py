"""The commands of `iedit` as a user meets them: what they write, say and return, and that a failure leaves nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from iedit import runtime
from iedit.runtime import images
from iedit.runtime.backends.eager import TorchBackend
from iedit.runtime.cli.main import main
from iedit.runtime.model.model import load_model
from iedit.runtime.profile import Profile

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"
SOURCE, TARGET = "a red car on grass at noon", "a blue car on grass at noon"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a picture, maps and masks, good and bad."""
    folder = tmp_path_factory.mktemp("pictures")
    box = (8, 8, 22, 24)
    for name, ground, thing, mode in (("in", "green", "red", "RGB"), ("pose", "black", "blue", "RGB"),
                                      ("old", "black", "white", "RGB"), ("mask", 0, 255, "L"), ("empty", 0, 0, "L"),
                                      ("full", 255, 255, "L")):  # fmt: skip
        picture = Image.new(mode, (32, 32), ground)
        ImageDraw.Draw(picture).ellipse(box, fill=thing)
        picture.save(folder / f"{name}.png")
    Image.new("RGB", (16, 16)).save(folder / "small.png")
    Image.new("1", (5000, 5000)).save(folder / "huge.png")
    (folder / "truncated.png").write_bytes((folder / "in.png").read_bytes()[:90])
    (folder / "words.png").write_text("not a picture")
    (folder / "folder.png").mkdir()
    return folder


@pytest.fixture
def here(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with them."""
    shutil.copytree(pictures, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="iedit")


def fine(*arguments: str) -> Result:
    result = call(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def refused(code: int, *arguments: str) -> str:
    """The one line of a failure that leaves the folder as it was."""
    before = contents(Path())
    result = call(*arguments)
    assert result.exit_code == code, result.output + repr(result.exception)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.stdout == ""
    beside = ("Usage: ", "Try '", "loading ")  # click's own, and what comes before an edit
    said = [line for line in result.stderr.splitlines() if not line.startswith(beside)]
    assert len([line for line in said if line]) == 1, result.stderr
    assert said[-1].startswith("Error: "), result.stderr
    assert contents(Path()) == before
    return said[-1]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def pixels(path: str | Path) -> Any:
    return np.asarray(Image.open(path))


@pytest.fixture
def edit(here: Path, tiny_checkpoint_cli: Path) -> list[str]:
    """The words of a quick edit of in.png."""
    return ["edit", "in.png", "--prompt", TARGET, "--source-prompt", SOURCE, "--model", str(tiny_checkpoint_cli),
            "--steps", "2"]  # fmt: skip


# --- edit -------------------------------------------------------------------------------------------------------


def test_an_edit_writes_the_default_name_with_a_receipt_and_says_so(edit: list[str]) -> None:
    result = fine(*edit)
    assert result.stdout.startswith("in-edited.png: 32x32, mask ")
    assert result.stderr.splitlines()[-1].endswith(" network evaluations")
    receipt = images.read_receipt("in-edited.png")
    assert receipt["request"]["prompt"] == TARGET
    assert receipt["request"]["seed"] == 0
    assert receipt["files"]["image"] == "in.png"
    assert pixels("in-edited.png").shape == (32, 32, 3)


def test_stderr_that_is_no_terminal_gets_no_progress_bar(edit: list[str]) -> None:
    result = fine(*edit, "--mask", "mask.png")
    first, *rest = result.stderr.splitlines()
    assert first.startswith("loading ") and len(rest) == 1 and "network evaluations" in rest[0]


@pytest.mark.parametrize(
    "method", [m for m in runtime.METHODS if m != "ip2p"]
)  # needs a checkpoint of its own: test_rivals.py
def test_every_method_of_the_library_can_be_asked_for(edit: list[str], method: str) -> None:
    maps = ["--layout", "pose=pose.png"] if "controlnet" in method else []
    maps += ["--source-layout", "pose=old.png"] if method == "controlnet-diffedit" else []
    fine(*edit, "--method", method, *maps, "--output", "out.png")
    assert images.read_receipt("out.png")["request"]["method"] == method


def test_the_methods_and_backends_on_offer_are_the_library_s() -> None:
    from iedit.runtime import BACKENDS

    for name in ("edit", "mask"):
        options = {p.name: p for p in main.commands[name].params}
        method, backend = options["method"].type, options["backend"].type
        assert isinstance(method, click.Choice) and tuple(method.choices) == runtime.METHODS
        assert isinstance(backend, click.Choice) and tuple(backend.choices) == ("auto", *BACKENDS)


def test_defaults_of_the_options_are_the_library_s() -> None:
    from iedit.runtime.editor import EditRequest, MaskOptions, Options

    default = {p.name: p.default for p in main.commands["edit"].params}
    request = EditRequest(Image.new("RGB", (8, 8)), "x")
    assert (default["steps"], default["seed"], default["method"]) == (request.steps, request.seed, request.method)
    options = Options()
    assert default["lambdas"] == () and options.lam is None
    assert (default["control_scale"], default["composite"]) == (options.control_scale, options.composite)
    assert (default["mask_mode"], default["mask_seeds"]) == (MaskOptions().mode, MaskOptions().seeds)
    assert default["k"] == options.final.k


def test_a_count_and_a_sweep_write_one_picture_for_each_seed_and_lambda(edit: list[str]) -> None:
    fine(*edit, "--count", "2", "--lambda", "0.2", "--lambda", "1", "--seed", "5", "--output", "out.png")
    found = [images.read_receipt(f"out-{i}.png")["request"] for i in range(4)]
    assert [(r["seed"], r["options"]["lam"]) for r in found] == [(5, 0.2), (5, 1), (6, 0.2), (6, 1)]
    assert not Path("out.png").exists()


def test_a_layout_changes_the_picture_and_transparency_in_it_is_black(edit: list[str]) -> None:
    fine(*edit, "--output", "plain.png", "--mask", "mask.png")
    maps = [*edit, "--mask", "mask.png", "--layout"]
    fine(*maps, "pose=pose.png", "--output", "posed.png")
    assert (pixels("plain.png") != pixels("posed.png")).any()
    drawn = pixels("pose.png")
    Image.fromarray(np.dstack([drawn, 255 * drawn.any(axis=-1).astype(np.uint8)])).save("clear.png")
    fine(*maps, "pose=clear.png", "--output", "same.png")
    assert (pixels("same.png") == pixels("posed.png")).all()


def test_a_scribble_without_a_source_layout_is_annotated(edit: list[str]) -> None:
    fine(*edit, "--layout", "scribble=pose.png", "--output", "out.png")


def test_a_given_mask_decides_what_may_change(edit: list[str]) -> None:
    result = fine(*edit, "--mask", "mask.png", "--composite", "pixel", "--output", "out.png")
    assert "mask " in result.stdout
    kept = pixels("mask.png") == 0
    assert (pixels("out.png")[kept] == pixels("in.png")[kept]).all()
    assert images.read_receipt("out.png")["mask"]["estimated"] is False


def test_the_stages_sheet_and_the_profile_are_written(edit: list[str]) -> None:
    fine(*edit, "--stages", "sheet.png", "--profile", "profile.json")
    assert Image.open("sheet.png").width > 4 * 192  # input, mask, guidance image, result
    profile = json.loads(Path("profile.json").read_text())
    assert set(profile["evaluations"]) == {"encode", "mask", "invert", "guidance", "invert-guidance", "final", "decode"}
    assert profile["evaluations"]["final"] == 4  # 2 steps, guided


def test_an_output_that_names_no_file_is_refused_alone_and_numbered(edit: list[str]) -> None:
    for words in (["--output", "."], ["--output", "..", "--count", "2"], ["--output", "/", "--count", "2"]):
        assert "the output is a PNG" in refused(2, *edit, *words)


def test_json_output_parses_and_names_every_picture(edit: list[str]) -> None:
    found = json.loads(fine(*edit, "--json", "--count", "2", "--output", "out.png").stdout)
    assert [r["output"] for r in found["results"]] == ["out-0.png", "out-1.png"]
    assert [r["seed"] for r in found["results"]] == [0, 1]
    assert found["profile"]["evaluations"]["invert"] > 0


def test_with_a_cache_a_second_command_repeats_only_the_final_pass(edit: list[str]) -> None:
    words = [*edit, "--cache", "kept", "--json", "--output"]
    first = json.loads(fine(*words, "a.png").stdout)["profile"]
    second = json.loads(fine(*words, "b.png").stdout)["profile"]
    assert second["cached"] == ["encode", "mask", "invert", "guidance", "invert-guidance"]
    assert sum(second["evaluations"].values()) == first["evaluations"]["final"]
    assert (pixels("a.png") == pixels("b.png")).all()


def test_every_other_option_reaches_the_request(edit: list[str]) -> None:
    fine(*edit, "--guidance-scale", "3", "--negative-prompt", "night", "--control-scale", "0.5", "--mask-mode", "trajectory",
         "--mask-threshold", "0.3", "--mask-strength", "0.6", "--mask-seeds", "3", "--t-u", "1", "--k", "2", "--refine",
         "--composite", "latent", "--layout", "pose=pose.png", "--source-layout", "pose=old.png",
         "--device", "cpu", "--dtype", "float32", "--backend", "torch", "--output", "out.png")  # fmt: skip
    receipt = images.read_receipt("out.png")
    options = receipt["request"]["options"]
    want = {
        "guidance_scale": 3,
        "negative_prompt": "night",
        "control_scale": 0.5,
        "refine": True,
        "composite": "latent",
    }
    assert {k: options[k] for k in want} == want
    mask = options["mask"]
    assert (mask["mode"], mask["threshold"], mask["strength"], mask["seeds"]) == ("trajectory", 0.3, 0.6, 3)
    assert (options["final"]["t_u"], options["final"]["k"], options["guidance"]["k"]) == (1, 2, 2)
    assert receipt["model"]["dtype"] == "float32"
    fine(*edit, "--method", "diffedit", "--ratio", "0.5", "--output", "diffedit.png")
    assert images.read_receipt("diffedit.png")["request"]["options"]["ratio"] == 0.5


def test_a_controlnet_of_another_folder_can_be_named(edit: list[str], tiny_checkpoint_cli: Path) -> None:
    lent = tiny_checkpoint_cli / "controlnet-scribble"
    fine(*edit, "--controlnet", f"depth={lent}", "--layout", "depth=pose.png", "--source-layout", "depth=old.png",
         "--output", "out.png")  # fmt: skip
    words = ["replay", "out.png", "--model", str(tiny_checkpoint_cli)]
    said = refused(2, *words)
    assert "made with the ControlNet controlnet-scribble" in said and "--controlnet depth=FOLDER" in said
    assert fine(*words, "--controlnet", f"depth={lent}").stdout == "out.png: identical\n"


def test_a_prompt_longer_than_the_tokenizer_takes_is_split_and_read_to_its_end(edit: list[str]) -> None:
    long = "a blue car on grass at noon " * 12
    picture = []
    for end in ("a star", "a tree"):
        words = list(edit)
        words[words.index(TARGET)] = long + end
        fine(*words, "--mask", "mask.png", "--output", "out.png", "--overwrite")
        picture.append(pixels("out.png"))
    assert (picture[0] != picture[1]).any()


def test_a_size_that_the_network_cannot_take_is_padded_and_cropped_back(edit: list[str]) -> None:
    Image.open("in.png").resize((37, 29)).save("in.png")
    fine(*edit, "--output", "out.png")
    assert Image.open("out.png").size == (37, 29)


# --- what goes wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--mask", "empty.png"], "the mask is empty"),
        (["--mask", "full.png"], "the mask covers everything"),
        (["--mask", "small.png"], "the mask is 16x16 and the image 32x32"),
        (["--mask", "nope.png"], "nope.png: there is no such file"),
        (["--layout", "pose=words.png"], "words.png: not an image in a format"),
        (["--layout", "pose"], "expected NAME=FILE"),
        (["--layout", "pose=pose.png", "--layout", "pose=old.png"], "pose is given twice"),
        (["--output", "out.jpg"], "give a name that ends in .png"),
        (["--output", "no/out.png"], "the folder no does not exist"),
        (["--output", "folder.png"], "this is a folder"),
        (["--output", "in.png"], "would overwrite in.png"),
        (["--output", "pose.png", "--layout", "pose=pose.png"], "would overwrite pose.png"),
        (["--output", "out.png", "--stages", "out.png"], "would overwrite another output"),
        (["--profile", "no/profile.json"], "the folder no does not exist"),
        (["--lambda", "1.5"], "--lambda"),
        (["--steps", "0"], "--steps"),
        (["--method", "magic"], "--method"),
        (["--model", "no/such/folder"], "no/such/folder is not a folder"),
        (["--device", "toaster"], "device is 'toaster'"),
        (["--device", "cuda:99"], "cuda:99 was asked for"),
        (["--prompt", " "], "the prompt is empty"),
        (["--layout", "pose=small.png", "--source-layout", "pose=old.png"], "layout pose: it is 16x16 and the image 32x32"),
        (["--layout", "pose=pose.png"], "--source-layout pose=FILE"),
        (["--layout", "depth=pose.png"], "layout 'depth'"),
        (["--source-layout", "pose=old.png"], "has no layout to go with it"),
        (["--method", "controlnet"], "needs at least one layout"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_as_asked_is_one_line_and_exit_code_2(edit: list[str], more: list[str], says: str) -> None:
    assert says in refused(2, *edit, *more)


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("nope.png", "there is no such file"),
        ("folder.png", "this is a folder"),
        ("words.png", "not an image in a format"),
        ("truncated.png", "truncated"),
        ("huge.png", "the limit is"),
    ],
)
@pytest.mark.parametrize("command", ["edit", "mask", "layouts"])
def test_a_bad_picture_is_refused_by_name(edit: list[str], command: str, file: str, says: str) -> None:
    words = edit[2:] if command != "layouts" else []
    said = refused(2, command, file, *words)
    assert file in said and says in said


@pytest.fixture
def broken(tiny_checkpoint_cli: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkpoint to damage."""
    return shutil.copytree(tiny_checkpoint_cli, tmp_path_factory.mktemp("broken") / "checkpoint")


def _drop_weight(path: Path) -> None:
    weights = load_file(path)
    del weights[sorted(weights)[3]]
    save_file(weights, path)


def _poison(path: Path, name: str) -> None:
    weights = load_file(path)
    weights[name].fill_(float("nan"))
    save_file(weights, path)


def _set(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "vae" / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / UNET).unlink(), "holds no weights"),
        (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:3000]), "cannot be read"),
        (lambda f: _drop_weight(f / UNET), "lacks 1 of its weights"),
        (lambda f: _drop_weight(f / "text_encoder" / "model.safetensors"), "lacks 1 of its weights"),
        (lambda f: [(f / "tokenizer" / n).unlink() for n in ("tokenizer.json", "merges.txt")], "merges.txt is missing"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").write_text("{"), "scheduler_config.json cannot be read"),
        (lambda f: _set(f / "scheduler" / "scheduler_config.json", beta_schedule="x"), "not a schedule"),
        (lambda f: _set(f / "scheduler" / "scheduler_config.json", prediction_type="x"), "prediction_type is 'x'"),
        (lambda f: (f / "iedit.json").write_text("[]"), "expected an object"),
        (lambda f: _set(f / "text_encoder" / "config.json", vocab_size=300), "text_encoder cannot be read"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_and_described(
    edit: list[str], broken: Path, damage: Any, says: str
) -> None:
    damage(broken)
    assert says in refused(2, *edit, "--model", str(broken))
    assert fine("info", "--model", str(broken)).exit_code == 0


def test_a_checkpoint_with_another_latent_size_is_refused(edit: list[str], broken: Path) -> None:
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(broken / "unet")
    UNet2DConditionModel.from_config({**config, "in_channels": 9}).save_pretrained(broken / "unet")
    said = refused(2, *edit, "--model", str(broken))
    assert "takes 9 and returns 4 channels but the VAE's latent has 4" in said


def test_a_controlnet_of_another_model_is_refused(edit: list[str], broken: Path) -> None:
    from diffusers import ControlNetModel

    config = ControlNetModel.load_config(broken / "controlnet-pose")
    ControlNetModel.from_config({**config, "cross_attention_dim": 8}).save_pretrained(broken / "controlnet-pose")
    said = refused(2, *edit, "--model", str(broken), "--layout", "pose=pose.png", "--mask", "mask.png")
    assert "ControlNet of pose has cross_attention_dim 8, the UNet 16" in said


def test_an_edit_loads_the_networks_of_its_own_layouts_only(
    edit: list[str], broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The edit, its replay and `iedit mask` are those of the whole model, whose digest counts what was not loaded too."""
    from diffusers import ControlNetModel

    load, loaded = ControlNetModel.from_pretrained, []

    def noted(folder: Path, **options: Any) -> Any:
        loaded.append(folder.name)
        return load(folder, **options)

    monkeypatch.setattr(ControlNetModel, "from_pretrained", noted)
    weights = broken / "controlnet-scribble" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])  # cut off: loading it fails
    layout = ["--layout", "pose=pose.png", "--source-layout", "pose=old.png"]
    for words, networks in (([], []), (layout, ["controlnet-pose"])):
        fine(*edit, *words, "--model", str(broken), "--output", "out.png", "--overwrite")
        assert "identical" in fine("replay", "out.png", "--model", str(broken)).output
        assert loaded == 2 * networks
        loaded.clear()
    fine("mask", *edit[1:], "--model", str(broken), "--output", "found.png")
    assert loaded == []
    scribble = ["--layout", "scribble=pose.png", "--mask", "mask.png"]
    assert "controlnet-scribble cannot be read" in refused(2, *edit, *scribble, "--model", str(broken))
    weights.write_bytes(whole)
    said = refused(2, "replay", "out.png", "--model", str(broken))
    assert "other weights, another config or tokenizer" in said
    assert load_model(str(broken), device="cpu").digest == load_model(str(broken), device="cpu", used_layouts=()).digest


def test_a_hub_that_cannot_be_reached_is_one_line(edit: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    said = refused(2, *edit, "--model", "some/model")
    assert "some/model is not a folder here and could not be fetched from the hub (no route to host)" in said


@pytest.mark.parametrize(
    ("file", "weight", "says"),
    [
        (UNET, "conv_out.bias", "NaN or infinity in stage mask, step 1"),
        (Path("vae") / "diffusion_pytorch_model.safetensors", "encoder.conv_in.bias", "stage encode: the VAE"),
        (Path("vae") / "diffusion_pytorch_model.safetensors", "decoder.conv_out.bias", "stage decode: the VAE"),
    ],
)
def test_nan_is_exit_code_1_and_names_the_stage(
    edit: list[str], broken: Path, file: Path, weight: str, says: str
) -> None:
    _poison(broken / file, weight)
    assert says in refused(1, *edit, "--model", str(broken), "--stages", "s.png", "--profile", "p.json")


def _limited_to(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TorchBackend.predict

    def predict(self: TorchBackend, x: torch.Tensor, t: torch.Tensor, condition: Any) -> torch.Tensor:
        if len(x) > samples:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
            )
        return whole(self, x, t, condition)

    monkeypatch.setattr(TorchBackend, "predict", predict)


def test_out_of_memory_goes_on_with_smaller_batches_and_says_so(
    edit: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fine(*edit, "--output", "roomy.png")
    _limited_to(1, monkeypatch)
    result = fine(*edit, "--output", "out.png")
    assert "note: out of memory in stage mask, step 1: going on with batches of 1" in result.stderr
    difference = np.abs(pixels("out.png").astype(int) - pixels("roomy.png").astype(int))
    assert difference.max() <= 1  # another batch size rounds differently, by less than a grey level


def test_out_of_memory_with_one_sample_is_exit_code_1(edit: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _limited_to(0, monkeypatch)
    said = refused(1, *edit)
    assert "out of memory in stage mask, step 1" in said and "use a smaller image" in said


def test_an_interrupt_in_the_last_stage_leaves_nothing(edit: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tell = Profile._report

    def interrupt(self: Profile, step: int, steps: int) -> None:
        if self.stage_name == "final" and step == 2:
            raise KeyboardInterrupt
        tell(self, step, steps)

    monkeypatch.setattr(Profile, "_report", interrupt)
    before = contents(Path())
    result = call(*edit, "--stages", "s.png", "--profile", "p.json")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[1:] == ["", "Aborted!"]
    assert contents(Path()) == before


def test_sigint_stops_the_command_in_the_middle_of_a_run(edit: list[str], here: Path, forked: Any) -> None:
    code = "from iedit.runtime.cli.main import main; main(prog_name='iedit')"
    words = [*edit, "--steps", "1000", "--cache", "kept", "--output", "out.png"]  # half a minute and more
    running = forked.Program(code, words)
    end = time.monotonic() + 120
    while not list(here.glob("kept/*/*.safetensors")) and time.monotonic() < end and running.returncode is None:
        time.sleep(0.1)
    time.sleep(0.5)  # into the next stage
    os.kill(running.pid, signal.SIGINT)
    out, err = running.finish(60)
    assert running.returncode == 1, err
    assert (out, err.split()[2:]) == ("", ["Aborted!"])  # after "loading MODEL"
    assert not Path("out.png").exists()
    assert [p for p in here.rglob("*") if p.name.endswith(".tmp")] == []


def test_a_disk_that_refuses_is_exit_code_1(edit: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in refused(1, *edit)


def test_a_cache_that_cannot_be_made_is_one_line(edit: list[str]) -> None:
    assert "in.png is not a folder" in refused(2, *edit, "--cache", "in.png/kept")


# --- mask and layouts -------------------------------------------------------------------------------------------


def test_mask_writes_what_edit_would_use_and_edit_takes_it_back(edit: list[str]) -> None:
    result = fine("mask", *edit[1:], "--mask-threshold", "0.6")
    assert result.stdout.startswith("in-mask.png: ")
    fine(*edit, "--mask-threshold", "0.6", "--stages", "s.png", "--output", "a.png")
    fine(*edit, "--mask", "in-mask.png", "--output", "b.png")
    assert (pixels("a.png") == pixels("b.png")).all()
    assert set(np.unique(pixels("in-mask.png"))) == {0, 255}


def test_mask_refuses_methods_that_have_none(edit: list[str]) -> None:
    assert "sdedit uses no mask" in refused(2, "mask", *edit[1:], "--method", "sdedit")
    assert "estimates no mask" in refused(2, "mask", *edit[1:], "--mask-mode", "none")


def test_layouts_writes_every_map_that_can_be_made(here: Path) -> None:
    result = fine("layouts", "in.png")
    assert result.stdout.split() == ["in-scribble.png", "in-edge.png", "in-line.png"]
    assert all(Image.open(name).size == (32, 32) for name in result.stdout.split())
    assert fine("layouts", "in.png", "--kind", "edge", "--output", "e.png").stdout == "e.png\n"
    assert (pixels("e.png") == pixels("in-edge.png")).all()


def test_layouts_says_what_it_cannot_annotate(here: Path) -> None:
    assert "nothing here can find a pose" in refused(2, "layouts", "in.png", "--kind", "edge", "--kind", "pose")
    assert "one file but 3 maps" in refused(2, "layouts", "in.png", "--output", "e.png")


# --- replay -----------------------------------------------------------------------------------------------------


@pytest.fixture
def replay(tiny_checkpoint_cli: Path) -> list[str]:
    """The words of a replay of out.png."""
    return ["replay", "out.png", "--model", str(tiny_checkpoint_cli)]


def test_replay_makes_the_picture_again_bit_for_bit(edit: list[str], replay: list[str]) -> None:
    maps = ["--layout", "pose=pose.png", "--source-layout", "pose=old.png"]
    fine(*edit, *maps, "--mask", "mask.png", "--negative-prompt", "night", "--output", "out.png")
    assert fine(*replay, "--write", "again.png").stdout == "out.png: identical\n"
    assert (pixels("again.png") == pixels("out.png")).all()
    assert images.read_receipt("again.png") == images.read_receipt("out.png")


def test_replay_runs_a_member_of_a_batch_in_its_batch(edit: list[str], replay: list[str]) -> None:
    fine(*edit, "--count", "2", "--lambda", "0.3", "--lambda", "0.9", "--output", "out.png")
    os.rename("out-2.png", "out.png")
    assert fine(*replay).stdout == "out.png: identical\n"


def test_replay_of_a_picture_whose_stages_came_from_a_cache_is_within_the_bound(
    edit: list[str], replay: list[str]
) -> None:
    """The first command fills the cache in a batch, where the network rounds otherwise."""
    fine(*edit, "--cache", "kept", "--count", "3", "--lambda", "0.5", "--output", "first.png")
    fine(*edit, "--cache", "kept", "--output", "out.png")
    assert images.read_receipt("out.png")["backend"]["modules"].keys() == {"text_encoder", "unet", "vae_decoder"}
    said = fine(*replay).stdout
    assert re.fullmatch(r"out\.png: (identical|within 1 of 255, \d+ pixels? differs?)\n", said)


def test_a_difference_of_one_is_within_the_bound_and_counted_and_two_is_a_failure(
    edit: list[str], replay: list[str]
) -> None:
    fine(*edit, "--output", "out.png")
    picture, receipt = np.asarray(Image.open("out.png")).copy(), images.read_receipt("out.png")
    for x, y in ((3, 4), (5, 6), (7, 8)):
        picture[y, x, 1] += 1 if picture[y, x, 1] < 200 else -1
    images.write_png("out.png", Image.fromarray(picture), receipt)
    assert fine(*replay).stdout == "out.png: within 1 of 255, 3 pixels differ\n"
    picture[4, 3, 0] ^= 64
    images.write_png("out.png", Image.fromarray(picture), receipt)
    result = call(*replay, "--write", "again.png")
    assert result.exit_code == 1
    assert (
        result.stdout == "out.png: differs, by at most 64 of 255 in 3 pixels (another machine or an edited picture)\n"
    )
    assert Path("again.png").is_file()


def test_replay_names_the_versions_that_differ_and_nothing_that_drives_a_terminal(
    edit: list[str], replay: list[str]
) -> None:
    fine(*edit, "--output", "out.png")
    receipt = images.read_receipt("out.png")
    receipt["versions"] = receipt["versions"] | {"torch": "1.0\u009b31m\u202e", "sparkle": "3"}
    receipt["backend"]["threads"] = 4096
    images.write_png("out.png", Image.new("RGB", (32, 32), "red"), receipt)
    result = call(*replay)
    assert result.exit_code == 1
    assert (
        rf"torch was 1.0\x9b31m\u202e, is {torch.__version__}" in result.stdout and "threads was 4096" in result.stdout
    )
    assert result.stdout.rstrip("\n").isprintable() and "sparkle" not in result.stdout
    assert torch.get_num_threads() <= (os.cpu_count() or 1)


def test_replay_needs_the_inputs_beside_the_picture_or_named(
    edit: list[str], here: Path, replay: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = ["--layout", "pose=pose.png", "--source-layout", "pose=old.png", "--mask", "mask.png"]
    fine(*edit, *maps, "--output", "out.png")
    away = here / "away"
    away.mkdir()
    os.rename("out.png", away / "out.png")
    monkeypatch.chdir("/")
    words = [*replay[:1], str(away / "out.png"), *replay[2:]]
    named = [("--image", str(here / "in.png")), ("--layout", f"pose={here / 'pose.png'}"),
             ("--source-layout", f"pose={here / 'old.png'}"), ("--mask", str(here / "mask.png"))]  # fmt: skip
    for option, value in named:
        result = call(*words)
        assert result.exit_code == 2
        assert "there is no such file, and the picture was made from it" in result.stderr and option in result.stderr
        words += [option, value]
    assert fine(*words).stdout.endswith("out.png: identical\n")


@pytest.mark.parametrize("changed", ["in.png", "pose.png", "old.png", "mask.png"])
def test_replay_names_an_input_that_has_changed(edit: list[str], replay: list[str], changed: str) -> None:
    maps = ["--layout", "pose=pose.png", "--source-layout", "pose=old.png"]
    fine(*edit, *maps, "--mask", "mask.png", "--output", "out.png")
    picture = Image.open(changed)
    picture.putpixel((10, 12), 0 if picture.mode == "L" else (1, 2, 3))
    picture.save(changed)
    said = refused(2, *replay)
    assert changed in said and "is not the one that was used" in said


def test_replay_refuses_other_weights_by_their_digest(edit: list[str], broken: Path) -> None:
    fine(*edit, "--model", str(broken), "--output", "out.png")
    weights = load_file(broken / UNET)
    weights["conv_out.bias"] += 1
    save_file(weights, broken / UNET)
    said = refused(2, "replay", "out.png", "--model", str(broken))
    assert images.read_receipt("out.png")["model"]["digest"] in said and "other weights" in said


def test_replay_refuses_another_noise_schedule(edit: list[str], broken: Path) -> None:
    fine(*edit, "--model", str(broken), "--output", "out.png")
    config = broken / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"beta_end": 0.013}))
    assert "scheduler config" in refused(2, "replay", "out.png", "--model", str(broken))


def test_replay_refuses_a_picture_without_a_receipt_or_of_another_version(edit: list[str]) -> None:
    assert "no iedit receipt" in refused(2, "replay", "in.png")
    fine(*edit, "--output", "out.png")
    receipt = images.read_receipt("out.png")
    picture = Image.open("out.png")
    images.write_png("library.png", picture, {k: v for k, v in receipt.items() if k != "files"})
    assert "its receipt has no files" in refused(2, "replay", "library.png")
    receipt["request"]["options"]["sparkle"] = 1
    images.write_png("future.png", picture, receipt)
    assert "request.options.'sparkle' is unknown" in refused(2, "replay", "future.png")


def test_a_receipt_opens_no_model_and_fetches_none(edit: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    from iedit.runtime.model import checkpoint

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a receipt made something be opened")

    fine(*edit, "--output", "out.png")
    receipt, picture = images.read_receipt("out.png"), Image.open("out.png")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    monkeypatch.setattr(checkpoint, "find_folder", never)
    for name in ("evil/model", "checkpoint", "../checkpoint", "/etc"):
        receipt["run"]["model"] = name
        images.write_png("out.png", picture, receipt)
        assert "a receipt opens and fetches none; say where it is with --model" in refused(2, "replay", "out.png")


@pytest.mark.parametrize("name", ["/etc/passwd", "../in.png", "sub/in.png", "..", "", "a\\b", "x" * 400])
def test_a_receipt_opens_no_file_elsewhere(edit: list[str], name: str) -> None:
    fine(*edit, "--output", "out.png")
    receipt = images.read_receipt("out.png")
    receipt["files"]["image"] = name
    images.write_png("out.png", Image.open("out.png"), receipt)
    assert "expected the name of a file, without a folder" in refused(2, "replay", "out.png")


def test_replay_never_writes_over_what_it_reads(edit: list[str], replay: list[str]) -> None:
    fine(*edit, "--layout", "pose=pose.png", "--source-layout", "pose=old.png", "--output", "out.png")
    for name in ("in.png", "pose.png", "old.png", "out.png"):
        assert "which this command reads" in refused(2, *replay, "--write", name, "--overwrite")
    assert "which this command reads" in refused(
        2, *replay, "--image", "small.png", "--write", "small.png", "--overwrite"
    )
    assert "replace it with --overwrite" in refused(2, *replay, "--write", "mask.png")
    fine(*replay, "--write", "mask.png", "--overwrite")


# --- what a picture tells of its maker --------------------------------------------------------------------------


def test_a_receipt_holds_no_path_of_the_machine(
    edit: list[str], here: Path, broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = here / "home" / "Jane Doe"
    (home / "pictures").mkdir(parents=True)
    shutil.copytree(broken, home / "my models" / "ckpt")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    for name in ("in", "pose", "old"):
        shutil.copy(f"{name}.png", home / "pictures")
    monkeypatch.chdir(home / "pictures")
    words = [*edit, "--layout", f"pose={home / 'pictures/pose.png'}", "--source-layout", "pose=../pictures/old.png"]
    words[words.index("in.png")] = "../pictures/in.png"
    words[words.index("--model") + 1] = str(home / "my models" / "ckpt")
    (here / "Jane's engines").mkdir()
    fine(*words, "--controlnet", "pose=../my models/ckpt/controlnet-pose", "--engines", str(here / "Jane's engines"),
         "--output", str(here / "a.png"))  # fmt: skip
    assert "Jane's engines: there are no" in json.dumps(images.read_receipt(here / "a.png"))
    assert str(here) not in json.dumps(images.read_receipt(here / "a.png"))
    fine(*words, "--controlnet", "pose=../my models/ckpt/controlnet-pose", "--output", str(here / "out.png"))
    receipt = images.read_receipt(here / "out.png")
    assert any("no engine" in why for row in receipt["backend"]["fallbacks"] for why in row["reasons"])
    assert (receipt["files"]["image"], receipt["files"]["layouts"]) == ("in.png", {"pose": "pose.png"})
    assert (receipt["model"]["name"], receipt["run"]["model"]) == ("ckpt", "ckpt")
    told = json.dumps(receipt)
    for secret in ("Jane", "Doe", "my models", "../", str(here), "/home", "pictures"):
        assert secret not in told, secret


def test_no_receipt_leaves_none(edit: list[str]) -> None:
    fine(*edit, "--no-receipt", "--output", "out.png")
    assert "no iedit receipt" in refused(2, "replay", "out.png")
    assert b"blue car" not in Path("out.png").read_bytes()


# --- what is written over ---------------------------------------------------------------------------------------


def test_no_command_replaces_a_file_without_being_told_to(edit: list[str]) -> None:
    others = ("in-edited.png", "in-mask.png", "in-edge.png", "x-1.png", "p.json", "s.png")
    for name in others:
        Path(name).write_text("somebody's")
    more = ["--output", "out.png"]
    for words in ([*edit], [*edit, "--output", "x.png", "--count", "2"], [*edit, *more, "--profile", "p.json"],
                  [*edit, *more, "--stages", "s.png"], ["mask", *edit[1:]], ["layouts", "in.png", "--kind", "edge"],
                  ["profile", *edit[1:], "--plot", "s.png"], ["profile", *edit[1:], "--output", "p.json"],
                  ["profile", *edit[1:], "--trace", "p.json"], ["demo", "--output", "s.png"]):  # fmt: skip
        assert "there is such a file already" in refused(2, *words), words
    fine(*edit, "--overwrite")
    fine("layouts", "in.png", "--kind", "edge", "--overwrite")
    assert Image.open("in-edited.png").size == Image.open("in-edge.png").size == (32, 32)
    assert Path("x-1.png").read_text() == "somebody's"


def test_no_command_replaces_its_own_input_even_when_told_to_replace(edit: list[str]) -> None:
    model = edit[edit.index("--model") + 1]
    config = os.path.join(model, "unet", "config.json")
    for words in ([*edit, "--output", "in.png"], [*edit, "--mask", "mask.png", "--stages", "mask.png"],
                  [*edit, "--profile", config], ["mask", *edit[1:], "--output", "in.png"],
                  ["layouts", "in.png", "--kind", "edge", "--output", "in.png"],
                  ["profile", *edit[1:], "--plot", "in.png"], ["profile", *edit[1:], "--trace", config]):  # fmt: skip
        assert "which this command reads" in refused(2, *words, "--overwrite"), words


def test_a_profile_can_go_to_a_device(edit: list[str]) -> None:
    fine(*edit, "--output", "out.png", "--profile", "/dev/null")
    assert Path("/dev/null").is_char_device()


def test_a_disk_that_fills_up_says_what_was_written(edit: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sync, calls = os.fsync, []

    def full_at_the_second(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full_at_the_second)
    result = call(*edit, "--count", "2", "--output", "o.png", "--profile", "p.json")
    assert result.exit_code == 1
    wanted = "Error: o-1.png: could not be written (No space left on device); written: o-0.png, p.json"
    assert result.stderr.splitlines()[1:] == [wanted]
    assert Path("o-0.png").is_file() and Path("p.json").is_file() and not Path("o-1.png").exists()


# --- info and the group -----------------------------------------------------------------------------------------


def test_info_tells_versions_devices_backends_and_the_model(tiny_checkpoint_cli: Path) -> None:
    found = json.loads(fine("info", "--json", "--model", str(tiny_checkpoint_cli)).stdout)
    assert found["iedit"] == runtime.VERSION
    assert found["versions"]["torch"] == torch.__version__
    assert found["backends"]["torch"] == []
    assert found["devices"][0] == "cpu"
    assert (found["no_gpu"] == "") == torch.cuda.is_available() == (len(found["devices"]) > 1)
    assert found["model"]["layouts"] == "pose, scribble"
    shown = fine("info", "--model", str(tiny_checkpoint_cli)).stdout
    assert "can run" in shown and "pose, scribble" in shown


def test_info_describes_a_folder_that_is_no_model(here: Path) -> None:
    found = json.loads(fine("info", "--json", "--model", str(here)).stdout)
    assert "config.json is missing" in found["model"]["problem"]


@pytest.mark.parametrize(
    "command",
    ["edit", "mask", "layouts", "replay", "profile", "info", "demo", "export", "engines", "train", "evaluate"],
)
def test_every_command_has_help_in_which_every_option_is_explained(command: str) -> None:
    assert "Usage: iedit " + command in fine(command, "--help").stdout
    with click.Context(main) as context:
        found = main.get_command(context, command)
    assert found is not None
    for parameter in found.params:
        assert isinstance(parameter, click.Argument) or getattr(parameter, "help", None), parameter.name


def test_an_unknown_command_is_a_usage_error() -> None:
    assert call("edlt").exit_code == 2


def test_the_group_lists_its_commands_in_the_order_of_a_first_reading() -> None:
    shown = fine("--help").stdout.split("Commands:")[1]
    found = [line.split()[0] for line in shown.splitlines() if line[:2] == "  " and line[2:3].strip()]
    assert found == [
        "edit",
        "mask",
        "layouts",
        "replay",
        "profile",
        "info",
        "demo",
        "export",
        "engines",
        "train",
        "evaluate",
    ]
    assert "..." not in shown


def test_time_left_is_told_in_minutes_when_it_is_long() -> None:
    from iedit.runtime.cli.live import time_left

    assert [time_left(s) for s in (3.4, 119, 121, 3600)] == ["3 s left", "119 s left", "2 min left", "60 min left"]
