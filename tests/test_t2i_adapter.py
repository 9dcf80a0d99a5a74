"""Training of a T2I-Adapter on the world: its scenes, its timesteps, what it and the network are shown, and the command."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from iedit.runtime.cli.main import main
from iedit.runtime.editor import Editor, EditRequest
from iedit.runtime.errors import UsageError
from iedit.runtime.model.checkpoint import picturebook_folder
from iedit.runtime.model.model import load_model
from iedit.training import embed, t2i_adapter, world


def test_for_poses_every_scene_has_a_person_and_else_it_is_the_embedded_models() -> None:
    posed, drawn = t2i_adapter.scene_for("pose"), t2i_adapter.scene_for("scribble")
    changed = 0
    for i in range(200):
        scene, before = posed(1, i), embed.shard_scene(1, i)
        assert drawn(1, i) == before and scene == posed(1, i)
        assert any(t.kind == "person" for t in scene.things)
        kinds = [(a.kind, b.kind) for a, b in zip(before.things, scene.things, strict=True) if a != b]
        if any(t.kind == "person" for t in before.things):
            assert scene == before
        else:
            assert len(kinds) == 1 and kinds[0][1] == "person"
            changed += 1
    assert 50 < changed < 200


def test_timesteps_are_the_papers_cube() -> None:
    count = 1000
    share = torch.arange(100_000, dtype=torch.float64) / 100_000
    t = t2i_adapter.cubic_timesteps(share, count)
    assert t.min() == 0 and t.max() == count - 1
    for level in (1, 100, 500, 900):  # t >= level where (t/T)^3 <= 1 - level/T
        assert (t >= level).double().mean().item() == pytest.approx((1 - level / count) ** (1 / 3), abs=1e-4)
    assert t2i_adapter.cubic_timesteps(torch.tensor([0.0, 1.0]), 10).tolist() == [9, 0]


class Seen(torch.nn.Module):
    """Answers with zeros and keeps what it was shown."""

    def forward(self, x: Tensor, t: Tensor, told: Tensor, down_intrablock_additional_residuals: list[Tensor]) -> Any:
        self.x, self.t, self.told, self.added = x, t, told, down_intrablock_additional_residuals
        return SimpleNamespace(sample=torch.zeros_like(x))


def test_the_network_is_shown_the_noised_picture_the_maps_features_and_half_of_the_captions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = load_model(device="cpu", layouts=())
    torch.manual_seed(0)
    torch.save(torch.randn(8, 4, 16, 16).half(), tmp_path / "000.pt")
    monkeypatch.setattr(embed, "SHARD", 8)
    scene_of, count = t2i_adapter.scene_for("pose"), 60
    latents, net = embed.Latents(tmp_path, scene_of=scene_of), Seen()
    model.unet = net
    task = t2i_adapter.task_of(model, lambda maps: [maps], "pose", latents)
    loss, _ = task.loss(task.draw(0, count, random.Random(9)))
    z, scenes = latents.draw(random.Random(9), count)
    told = embed.tokens_of(model.tokenizer, ["", *map(world.caption, scenes)])
    with torch.no_grad():
        empty, *captions = model.text_encoder(told).last_hidden_state
    noise = []
    dropped = 0
    for i, scene in enumerate(scenes):
        want = torch.from_numpy(np.array(world.layout(scene, "pose"))).permute(2, 0, 1) / 255
        assert torch.allclose(net.added[0][i], want, atol=1e-6)
        no_text = torch.allclose(net.told[i], empty, atol=1e-4)
        assert no_text or torch.allclose(net.told[i], captions[i], atol=1e-4)
        dropped += no_text
        a = model.schedule.alphas_cumprod[int(net.t[i])]
        noise.append((net.x[i] - a**0.5 * z[i] * model.vae.config.scaling_factor) / (1 - a) ** 0.5)
    assert 18 <= dropped <= 42  # of 60: 3 sigma
    assert (net.t > 500).sum() > 36  # 79 % of the cube; half of even ones
    drawn = torch.stack(noise)
    assert abs(drawn.mean()) < 0.05 and drawn.std() == pytest.approx(1, abs=0.05)
    assert loss.item() == pytest.approx((drawn**2).mean().item(), rel=1e-3)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "SHARD", 50)
    monkeypatch.setattr(t2i_adapter, "SHARDS", 1)
    monkeypatch.setattr(t2i_adapter, "PART", embed.Part(3, 4, 1e-3))


def run(*words: object, layout: str = "pose") -> Any:
    return CliRunner().invoke(main, ["train", "adapter", "--layout", layout, *map(str, words)])


@pytest.mark.usefixtures("small")
def test_the_command_goes_on_after_ctrl_c_and_writes_a_model_whose_adapter_reads_the_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts, base = tmp_path / "whole", tmp_path / "parts", picturebook_folder()
    done = run("--work", whole)
    assert done.exit_code == 0 and f"wrote {whole / 'model'}" in done.stdout, done.output
    with monkeypatch.context() as patch:
        calls, noisy = iter(range(9)), embed.noisy

        def interrupted(*arguments: Any) -> Any:
            if next(calls) == 2:
                raise KeyboardInterrupt
            return noisy(*arguments)

        patch.setattr(embed, "noisy", interrupted)
        shutil.copytree(whole / "latents-pose", parts / "latents-pose")  # what was encoded is not encoded again
        stopped = run("--work", parts, "--out", tmp_path / "mine")
    assert stopped.exit_code != 0 and "goes on from here" in stopped.stdout and not (tmp_path / "mine").exists()
    resumed = run("--work", parts, "--out", tmp_path / "mine")
    assert resumed.exit_code == 0 and "resumed at step 2 of 3" in resumed.stdout, resumed.output
    weights = [load_file(f / "adapter-pose" / embed.UNET_FILE) for f in (whole / "model", tmp_path / "mine")]
    assert all(torch.equal(weights[1][k], v) for k, v in weights[0].items())
    torch.manual_seed(0)
    fresh = t2i_adapter.new_adapter(embed.load_base(base)).half().state_dict()
    assert all(not torch.equal(fresh[k], v) for k, v in weights[0].items())  # every weight was trained

    model = tmp_path / "mine"
    kept = {p.relative_to(base) for p in base.rglob("*") if p.is_file() and p.parent.name != "controlnet-pose"}
    for path in kept - {Path("README.md"), Path("training.json")}:
        assert (model / path).read_bytes() == (base / path).read_bytes()
    assert {p.name for p in model.iterdir()} == {p.name for p in base.iterdir()} - {"controlnet-pose", "README.md"} | {
        "adapter-pose"
    }
    assert json.loads((model / "training.json").read_text())[-1]["part"] == "adapter-pose"
    assert not list(tmp_path.rglob("*.tmp"))

    editor, scene = Editor.load(str(model), device="cpu"), t2i_adapter.scene_for("pose")(0, 0)
    assert set(editor.model.adapters) == {"pose"} and set(editor.model.controlnets) == {"scribble"}
    picture, other = world.render(scene), t2i_adapter.scene_for("pose")(0, 1)

    def edited(shown: world.Scene) -> bytes:
        asked = EditRequest(
            picture, world.caption(scene), method="controlnet", layouts={"pose": world.layout(shown, "pose")}, steps=4
        )
        return editor.edit(asked).image.tobytes()

    assert edited(scene) != edited(other)
    (tmp_path / "in.png").parent.mkdir(exist_ok=True)
    picture.save(tmp_path / "in.png")
    world.layout(other, "pose").save(tmp_path / "map.png")
    words = ["edit", tmp_path / "in.png", "--prompt", "a red person on grass at noon", "--method", "controlnet", "--steps", 2,
             "--layout", f"pose={tmp_path / 'map.png'}", "--model", model, "--output", tmp_path / "out.png"]  # fmt: skip
    shown = CliRunner().invoke(main, list(map(str, words)))
    assert shown.exit_code == 0 and Image.open(tmp_path / "out.png").size == (128, 128), shown.output

    refused = run("--work", parts, "--out", model)
    assert refused.exit_code == 2 and "is there already" in refused.stderr and "--overwrite" in refused.stderr
    for folder in (parts, base):  # is a folder that holds more than a model of this command
        told = run("--work", parts, "--out", folder, "--overwrite")
        assert told.exit_code == 2 and "no checkpoint of this command" in told.stderr and folder.is_dir()
    again = run("--work", parts, "--out", model, "--overwrite")
    assert again.exit_code == 0 and load_model(str(model), device="cpu").digest == editor.model.digest

    # On top of it the other layout: the same work folder holds both, but not two bases.
    both = run("--work", tmp_path / "second", "--base", model, "--out", tmp_path / "both", layout="scribble")
    assert both.exit_code == 0, both.output
    assert set(load_model(str(tmp_path / "both"), device="cpu").adapters) == {"pose", "scribble"}
    told = run("--work", parts, "--out", tmp_path / "both", "--overwrite")
    assert told.exit_code == 2 and "no checkpoint of this command" in told.stderr  # it is of the other layout


@pytest.mark.usefixtures("small")
def test_what_cannot_be_trained_on_is_one_line_and_exit_code_2(
    tmp_path: Path, tiny_folder: Path, build_checkpoint: Callable[..., Path]
) -> None:
    plain = build_checkpoint(tmp_path / "plain", unet_channels=(8, 16), vae_channels=(8, 8, 8, 8))
    path = plain / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": 16}))
    for words, says in (
        (("--base", tmp_path / "none"), "is not a folder"),
        (("--base", tiny_folder), "expected one of the world's pictures, 128 pixels"),
    ):
        result = run("--work", tmp_path / "work", *words)
        assert result.exit_code == 2 and says in result.stderr and not (tmp_path / "work").exists(), result.output
    assert "full_adapter'" in str(t2i_adapter.new_adapter(embed.load_base(plain)).config)  # as of Stable Diffusion 1.x
    unet = load_model(str(plain), (), device="cpu")
    unet.unet.register_to_config(down_block_types=("DownBlock2D", "AttnDownBlock2D"))
    with pytest.raises(
        UsageError, match=r"no T2I-Adapter makes what can be added to a UNet of down_block_types .*AttnDownBlock2D"
    ):
        t2i_adapter.new_adapter(unet)
    unet.unet.register_to_config(block_out_channels=(8, 8, 8), down_block_types=("DownBlock2D",) * 3)
    with pytest.raises(
        UsageError, match=r"adds features of 8 channels at 1/16, 8 channels at 1/32, 8 channels at 1/32"
    ):
        t2i_adapter.new_adapter(unet)
    unknown = run("--work", tmp_path / "work", layout="pos")
    assert unknown.exit_code == 2 and "Did you mean 'pose'?" in unknown.stderr
    for text, says in (("[", "training.json cannot be read"), ("{}", "training.json has no list of parts")):
        (plain / embed.HISTORY_FILE).write_text(text)
        result = run("--work", tmp_path / "work", "--base", plain)
        assert result.exit_code == 2 and says in result.stderr and not (tmp_path / "work").exists(), result.output
    missing = CliRunner().invoke(main, ["train", "adapter"])
    assert missing.exit_code == 2 and "Missing option '--layout'" in missing.stderr
    (tmp_path / "work" / "base" / "unet").mkdir(parents=True)
    (tmp_path / "work" / "base" / "unet" / embed.UNET_FILE).write_bytes(b"another")
    other = run("--work", tmp_path / "work")
    assert other.exit_code == 2 and "goes on from another model" in other.stderr and "another --work" in other.stderr


def test_a_folder_of_another_training_or_with_a_broken_history_is_not_replaced(tmp_path: Path) -> None:
    history = tmp_path / embed.HISTORY_FILE
    assert not t2i_adapter.is_checkpoint(tmp_path, "pose")
    rows = Counter[str]()
    for text in (
        "",
        "{}",
        "[]",
        "[1]",
        '[{"part": "unet"}]',
        '[{"part": "adapter-scribble"}]',
        '[{"part": "adapter-pose"}]',
    ):
        history.write_text(text)
        rows[text] += t2i_adapter.is_checkpoint(tmp_path, "pose")
    assert +rows == Counter(['[{"part": "adapter-pose"}]'])
