"""`iedit export` and `iedit engines` as a user meets them."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from iedit.export import cli as commands
from iedit.export.onnx import export_onnx
from iedit.runtime.backends.engine_spec import SPEC_FILE, engines_folder, new_build, read_spec, write_spec
from iedit.runtime.cli.main import main
from iedit.runtime.model.model import load_model, read_digests

logging.getLogger("torch.__trace").setLevel(logging.WARNING)


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], prog_name="iedit")


@pytest.fixture(scope="module")
def built(tiny_engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines of the tiny model: plain UNet, VAE and text. Not to be changed, copy it."""
    out = tmp_path_factory.mktemp("built") / "engines"
    for module in ("unet", "vae_encoder", "vae_decoder", "text_encoder"):
        shutil.copytree(tiny_engines / "onnx-fp32" / module, out / "onnx-fp32" / module)
    return out


@pytest.fixture
def engines(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "engines"))


def test_help_imports_neither_torch_nor_onnx(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom iedit.runtime.cli.main import main\n"
        "for words in (['--help'], ['export', '--help'], ['export', 'onnx', '--help'], ['engines', 'prune', '--help']):\n"
        "    try:\n        main(words)\n    except SystemExit as end:\n        assert not end.code\n"
        "assert not {'torch', 'onnx', 'onnxruntime', 'diffusers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("export", "engines", "--precision", "--dry-run"):
        assert word in done.stdout


def test_what_is_exported_is_recorded(tiny_folder: Path, tmp_path: Path) -> None:
    result = call("export", "onnx", tiny_folder, "--module", "text_encoder", "--out", tmp_path, "--sizes", "96x64", "--batch", 3)  # fmt: skip
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert "1 engines" in result.output
    spec = read_spec(tmp_path / "onnx-fp32" / "text_encoder")
    assert (spec.format, spec.module, spec.precision, spec.opset) == ("onnx", "text_encoder", "fp32", 23)
    (shapes,) = spec.shapes
    assert (shapes.batch, shapes.height[1:], shapes.width[1:]) == ((1, 3, 0), (64, 0), (96, 0))
    assert set(spec.files) == {"model.onnx", "model.onnx.data"}
    assert {"torch", "onnx", "diffusers"} <= set(spec.versions)


def test_what_is_there_is_listed_and_kept(built: Path, tiny_folder: Path) -> None:
    rows = json.loads(call("engines", "list", "--engines", built, "--json").output)
    assert sorted(r["spec"]["module"] for r in rows) == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    assert all(r["problems"] == [] and r["bytes"] > 1000 for r in rows)
    again = call("export", "onnx", tiny_folder, "--layouts", "none", "--out", built)
    assert again.output.count(": kept") == 4


def test_verify_measures_marks_and_writes_a_report(engines: Path, tiny_folder: Path) -> None:
    result = call("export", "verify", tiny_folder, "--engines", engines, "--edits", 0, "--json")
    assert result.exit_code == 0, result.output
    folder = engines / "onnx-fp32" / "unet"
    assert 0 < read_spec(folder).checked["largest"] < 1e-4
    report = json.loads((folder / "report.json").read_text())
    assert [(c["batch"], c["length"] > 5) for c in report["calls"]] == [(1, True), (3, False)]
    assert report["failures"] == []
    assert "error" in call("engines", "list", "--engines", engines).output


def test_verify_fails_where_an_engine_says_something_else_and_marks_nothing(engines: Path, tiny_folder: Path) -> None:
    """The weights of another module of the same shape: files and digests are in order, the output is not."""
    import onnx

    folder = engines / "onnx-fp32" / "vae_decoder"
    proto = onnx.load(str(folder / "model.onnx"))
    last = max((i for i in proto.graph.initializer if "conv_out.bias" in i.name), key=lambda i: i.name)
    changed = onnx.numpy_helper.to_array(last) + 0.05
    last.CopyFrom(onnx.numpy_helper.from_array(changed, last.name))
    (folder / "model.onnx.data").unlink()
    onnx.save(proto, str(folder / "model.onnx"))
    write_spec(folder, read_spec(folder), ["model.onnx"])
    result = call("export", "verify", tiny_folder, "--engines", engines, "--edits", 0)
    assert result.exit_code == 1
    assert "fp32 vae_decoder at batch 1" in result.output
    assert all(read_spec(p.parent).checked == {} for p in engines.rglob(SPEC_FILE))


def test_damage_is_found_and_pruned_and_nothing_else(engines: Path, tiny_folder: Path) -> None:
    precision = engines / "onnx-fp32"
    assert call("engines", "verify", "--engines", engines, "--model", tiny_folder).exit_code == 0
    with (precision / "vae_decoder" / "model.onnx.data").open("ab") as file:
        file.write(b"!")
    with (precision / "vae_encoder" / "model.onnx").open("ab") as file:
        file.write(b"!")
    (precision / "vae_encoder" / "thesis.txt").write_text("somebody's")
    new_build(precision / "unet")
    found = call("engines", "verify", "--engines", engines)
    assert found.exit_code == 1
    assert "3 of 5 cannot be used" in found.output
    dry = call("engines", "prune", "--engines", engines, "--dry-run")
    assert "onnx vae_decoder fp32" in dry.output and "model.onnx.data is not what was built" in dry.output
    assert "what a stopped build left" in dry.output
    assert (precision / "vae_decoder" / "model.onnx").is_file()
    assert call("engines", "prune", "--engines", engines).exit_code == 1  # nobody to ask
    done = call("engines", "prune", "--engines", engines, "--yes").output
    assert (
        "removed 2 of 3" in done
        and "removed onnx vae_decoder fp32" in done
        and "thesis.txt is not of an engine" in done
    )
    assert sorted(p.name for p in precision.iterdir() if p.is_dir()) == ["text_encoder", "unet", "vae_encoder"]
    assert [p.name for p in (precision / "vae_encoder").iterdir()] == ["thesis.txt"]
    assert "nothing to remove" in call("engines", "prune", "--engines", engines, "--yes").output


def test_prune_removes_nothing_behind_a_link(engines: Path, tmp_path: Path) -> None:
    folder = engines / "onnx-fp32" / "unet"
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"!")
    done = call("engines", "prune", "--engines", engines, "--yes")
    assert "is behind a link, left there" in done.output and "removed 0 of 1" in done.output
    assert (tmp_path / "elsewhere" / "model.onnx").is_file()


def test_only_what_this_project_made_is_ever_pruned(tmp_path: Path) -> None:
    """Folders as they lie on disks: a text encoder, somebody's ONNX model, another project's engine.json, a build folder."""
    foreign = {
        "text_encoder/model.safetensors": "weights",
        "thesis/model.tex": "words",
        "theirs/model.onnx": "graph",
        "theirs/model.onnx.data": "weights",
        "game/engine.json": json.dumps({"format": "ogg", "files": {"model.onnx": "x"}}),
        "game/model.onnx": "graph",
        "list/engine.json": "[1, 2]",
        "half/engine.json": '{"format": "onnx", "mod',
        ".cmake.01234567.building/x.o": "object",
        ".unet.01234567.building/engine.json": '{"name": "not ours"}',
    }
    for name, text in foreign.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / ".unet.89abcdef.building").symlink_to(tmp_path / "thesis")
    result = call("engines", "prune", "--engines", tmp_path, "--yes")
    assert "nothing to remove" in result.output, result.output
    assert {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*") if p.is_file()} == foreign


def test_a_spec_that_names_files_elsewhere_is_refused_and_prune_leaves_them(engines: Path) -> None:
    spec = engines / "onnx-fp32" / "unet" / SPEC_FILE
    told = json.loads(spec.read_text())
    (engines / "thesis.txt").write_text("somebody's")
    spec.write_text(
        json.dumps(told | {"files": {"../../thesis.txt": "0", "model.onnx": "0"}, "module": "unet\x1b[31m[red]"})
    )
    (bad,) = [r for r in json.loads(call("engines", "list", "--engines", engines, "--json").output) if r["problems"]]
    assert "a name in it is not one of a file in this folder" in bad["problems"][0]
    shown = call("engines", "verify", "--engines", engines).output
    assert "1 of 4 cannot be used" in shown and "\x1b" not in shown
    call("engines", "prune", "--engines", engines, "--yes")
    assert (engines / "thesis.txt").read_text() == "somebody's"


def test_engines_of_another_model_go_only_when_a_model_is_named(engines: Path) -> None:
    assert "nothing to remove" in call("engines", "prune", "--engines", engines).output
    dry = call("engines", "prune", "--engines", engines, "--model", "picturebook", "--dry-run")
    assert dry.output.count("weights: the engine has") == 4


def test_a_build_that_is_under_way_is_left_alone(engines: Path) -> None:
    from iedit.runtime.backends.engine_spec import build_lock

    building = new_build(engines / "onnx-fp32" / "unet")
    with build_lock(building.with_name("unet")):
        result = call("engines", "prune", "--engines", engines, "--yes")
    assert "is being built now, left alone" in result.output
    assert building.is_dir()


def test_an_edit_uses_the_engines_that_it_is_pointed_at(
    engines: Path, tiny_folder: Path, tmp_path: Path, picture: Any
) -> None:
    picture(1).save(tmp_path / "in.png")
    words = ("edit", tmp_path / "in.png", "--prompt", "a blue car on grass at noon", "--source-prompt",
             "a red car on grass at noon", "--steps", 3, "--mask-seeds", 1, "--model", tiny_folder, "--backend", "onnx",
             "--output", tmp_path / "out.png", "--profile", tmp_path / "p.json")  # fmt: skip
    done = call(*words, "--engines", engines)
    assert done.exit_code == 0, done.output
    profile = json.loads((tmp_path / "p.json").read_text())
    assert {row["backend"] for row in profile["modules"]} == {"onnx"}
    replay = ("replay", tmp_path / "out.png", "--model", tiny_folder)
    assert "identical" in call(*replay, "--engines", engines).output
    (tmp_path / "none").mkdir()
    refused = call(*words, "--overwrite", "--engines", tmp_path / "none")
    assert refused.exit_code == 2
    assert "run `iedit export onnx" in refused.output


@pytest.fixture
def quick(tiny_folder: Path, tmp_path: Path, picture: Any) -> tuple[Any, ...]:
    """The words of an edit that writes out.png."""
    picture(1).save(tmp_path / "in.png")
    return ("edit", tmp_path / "in.png", "--prompt", "a blue car on grass at noon", "--source-prompt",
            "a red car on grass at noon", "--steps", 3, "--mask-seeds", 1, "--model", tiny_folder,
            "--output", tmp_path / "out.png", "--overwrite")  # fmt: skip


def modules(result: Result) -> set[str]:
    return {row["backend"] for row in json.loads(result.stdout)["profile"]["modules"]}


def test_a_picture_of_torch_is_replayed_on_torch_after_an_export(
    quick: tuple[Any, ...], engines: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """With `auto`, before and after there are engines; then the other way round, with engines that are gone."""
    where, replay = tmp_path / "later", ("replay", tmp_path / "out.png", "--model", tiny_folder, "--engines")
    where.mkdir()
    assert modules(call(*quick, "--engines", where, "--json")) == {"torch"}
    shutil.copytree(engines, where, dirs_exist_ok=True)
    assert call(*replay, where).stdout.endswith("out.png: identical\n")
    other = call(*replay, where, "--backend", "onnx")
    assert other.exit_code == 0, other.output
    assert re.search(
        r"out\.png: (identical|within 1 of 255, \d+ pixels? differs? \(backend was torch, is onnx\))\n", other.stdout
    )

    assert modules(call(*quick, "--engines", where, "--json")) == {"onnx"}
    assert call(*replay, where).stdout.endswith("out.png: identical\n")
    os.rename(where / "onnx-fp32" / "vae_decoder", tmp_path / "away")
    gone = call(*replay, where)
    assert gone.exit_code == 2
    assert "made with the onnx engine" in gone.stderr and "of vae_decoder, which is gone in" in gone.stderr
    assert "--backend torch" in gone.stderr
    os.rename(tmp_path / "away", where / "onnx-fp32" / "vae_decoder")
    spec = read_spec(where / "onnx-fp32" / "unet")
    (where / "onnx-fp32" / "unet" / "notes.txt").write_text("another build")
    write_spec(where / "onnx-fp32" / "unet", spec, [*spec.files, "notes.txt"])
    assert "of unet, which is another one now" in call(*replay, where).stderr
    shutil.rmtree(where)
    assert (
        "made with backend onnx for text_encoder, unet, vae_decoder, vae_encoder, which cannot run now"
        in call(*replay, where).stderr
    )
    assert call(*replay, where, "--backend", "torch").exit_code == 0


def test_engines_that_everybody_may_change_are_used_only_when_trusted(
    quick: tuple[Any, ...], engines: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    replay = ("replay", tmp_path / "out.png", "--model", tiny_folder, "--engines", engines)
    for place in (engines, engines / "onnx-fp32" / "unet", engines / "onnx-fp32" / "unet" / "model.onnx.data"):
        before = place.stat().st_mode
        place.chmod(before | 0o002)
        assert modules(call(*quick, "--engines", engines, "--json")) >= {"torch"}, place
        refused = call(*quick, "--engines", engines, "--backend", "onnx")
        assert refused.exit_code == 2 and "every user of this machine may write to" in refused.stderr
        assert modules(call(*quick, "--engines", engines, "--backend", "onnx", "--trust-engines", "--json")) == {"onnx"}
        assert "may write to" in call(*replay).stderr
        assert call(*replay, "--trust-engines").stdout.endswith("identical\n")
        place.chmod(before)


def test_an_edit_leaves_nothing_in_the_users_home(
    quick: tuple[Any, ...], engines: Path, tmp_path: Path, root: Path
) -> None:
    """ONNX Runtime writes a device id and a queue of events when it is imported, unless it is told not to before.

    One process edits without engines and then with them: what it imports takes most of its time.
    """
    home = tmp_path / "home"
    home.mkdir()
    code = (
        "import sys\nfrom pathlib import Path\nfrom iedit.runtime.cli.main import main\n"
        "engines, *words = sys.argv[1:]\n"
        "for more in ([], ['--engines', engines]):\n"
        "    main([*words, *more], standalone_mode=False)\n"
        "    print('imported:', 'onnxruntime' in sys.modules, [str(p) for p in Path.home().rglob('*') if p.is_file()])\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "HF_", "ORT_"))}
    environment |= {"HOME": str(home), "PYTHONPATH": str(root / ".types")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(engines), *map(str, quick)], env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("imported: ")]
    assert told == ["imported: False []", "imported: True []"]
    assert [str(p) for p in home.rglob("*") if p.is_file()] == []


def test_bad_options_are_one_line_and_write_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for words, told in (
        (("--layouts", "depth"), "has no ControlNet for depth"),
        (("--sizes", "512"), "expected WIDTHxHEIGHT"),
        (("--module", "vae"), "module 'vae' is not one of"),
    ):
        result = call("export", "onnx", tiny_folder, "--out", out, *words)
        assert result.exit_code == 2
        assert told in result.output
    result = call("export", "verify", tiny_folder, "--engines", out)
    assert result.exit_code == 2
    assert "there are no ONNX engines in it" in result.output
    assert not out.exists()


def test_digests_are_read_without_loading_the_weights(tiny_folder: Path, tiny: Any) -> None:
    found = read_digests(str(tiny_folder))
    assert (found.whole, found.weights) == (tiny.digest, tiny.weights_digest)
    assert dict(found.parts) == dict(tiny.part_digests)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_embedded_model_exports_within_two_minutes_and_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    began = time.perf_counter()
    result = call("export", "onnx", "picturebook")
    assert result.exit_code == 0, result.output
    assert time.perf_counter() - began < 120
    checked = call("export", "verify", "picturebook")
    assert checked.exit_code == 0, checked.output
    folder = engines_folder(load_model("picturebook", device="cpu").weights_digest)
    assert len([f for f in commands.find_all(folder, "picturebook") if not f.problems]) == 8


def test_a_controlnet_alone_is_exported_when_asked_for(smallest: Any, tmp_path: Path) -> None:
    import numpy as np
    import torch

    from iedit.runtime.backends.ort import new_session

    (spec,) = export_onnx(smallest, tmp_path, modules=["controlnet-pose"])
    assert spec.weights == smallest.module_digest("controlnet-pose")
    net, x, t = smallest.controlnets["pose"], torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 900])
    text, image = torch.randn(3, 7, 32), torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        down, mid = net(x, t, text, controlnet_cond=image, conditioning_scale=0.5, return_dict=False)
    feed = {"sample": x, "timestep": t, "encoder_hidden_states": text, "image": image, "scale": torch.full((3,), 0.5)}
    got = new_session(tmp_path / "onnx-fp32" / "controlnet-pose" / "model.onnx").run(
        None, {k: v.numpy() for k, v in feed.items()}
    )
    for a, b in zip(got, (*down, mid), strict=True):
        assert np.abs(a - b.numpy()).max() < 1e-4
