"""Fine-tuning of an InstructPix2Pix checkpoint on the world: the pairs, what the network is shown, and the command."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor

from iedit.runtime.cli.main import main
from iedit.runtime.editor import Editor, EditRequest
from iedit.runtime.model.checkpoint import picturebook_folder
from iedit.runtime.model.model import load_model
from iedit.training import embed, instruct, truth, world


def test_a_group_is_a_scene_and_that_scene_after_one_edit_of_each_kind() -> None:
    kinds = Counter[str]()
    for first in range(0, 40, instruct.GROUP):
        before, *after = (instruct.edited_scene(3, first + i) for i in range(instruct.GROUP))
        facts = truth.facts_of_scene(before)
        for kind, scene in zip(instruct.KINDS, after, strict=True):
            changed = {k for k, v in truth.facts_of_scene(scene).items() if v != facts[k]}
            name = changed.pop()
            assert not changed and (name if isinstance(name, str) else name[0]) in kind.split(" or ")
            kinds[name if isinstance(name, str) else name[0]] += 1
            places = [[(t.x, t.base, t.size, t.stretch, t.pose) for t in s.things] for s in (before, scene)]
            assert places[0] == places[1] and scene.horizon == before.horizon
    assert set(kinds) == {"thing", "colour", "ground", "sky"}
    assert instruct.edited_scene(3, 5) == instruct.edited_scene(3, 5) != instruct.edited_scene(4, 5)


def test_pairs_are_a_scene_and_an_edit_of_it_in_either_direction() -> None:
    names = [(s, i) for s in range(2) for i in range(8)]
    before, after = instruct.draw_pairs(random.Random(0), names, 500)
    assert len(before) == len(after) == 500 and set(before) == set(names) == set(after)
    for (s, i), (t, j) in zip(before, after, strict=True):
        assert s == t and i // instruct.GROUP == j // instruct.GROUP and i != j
        assert 0 in (i % instruct.GROUP, j % instruct.GROUP)  # two edits of a scene are two changes


def test_a_twentieth_loses_the_picture_a_twentieth_the_text_and_a_twentieth_both() -> None:
    lost = Counter(instruct.dropped((i + 0.5) / 1000) for i in range(1000))
    assert lost == {(False, False): 850, (True, False): 50, (False, True): 50, (True, True): 50}


@torch.no_grad()
def test_a_widened_unet_begins_as_the_one_it_was_made_of_whatever_the_picture(tiny: Any) -> None:
    wide = instruct.widened(tiny.unet).eval()
    assert wide.config.in_channels == 2 * tiny.unet.config.in_channels
    torch.manual_seed(0)
    x, picture, text = torch.randn(2, 4, 8, 8), 5 * torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)
    t = torch.tensor([3, 900])
    want, got = tiny.unet(x, t, text).sample, wide(torch.cat([x, picture], 1), t, text).sample
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    wide.conv_in.weight[:, 4:] += 0.1
    assert (wide(torch.cat([x, picture], 1), t, text).sample - want).abs().max() > 1e-2 * want.abs().max()


class Seen(torch.nn.Module):
    """Answers with zeros and keeps what it was shown."""

    def forward(self, x: Tensor, t: Tensor, told: Tensor) -> Any:
        self.x, self.t, self.told = x, t, told
        return SimpleNamespace(sample=torch.zeros_like(x[:, :4]))


def test_the_network_is_shown_the_noised_target_the_source_and_the_targets_caption(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = load_model(device="cpu", layouts=())
    torch.manual_seed(0)
    torch.save(torch.randn(8, 4, 16, 16).half(), tmp_path / "000.pt")
    monkeypatch.setattr(embed, "SHARD", 8)
    latents, net, count = embed.Latents(tmp_path, scene_of=instruct.edited_scene), Seen(), 200
    torch.manual_seed(4)
    task = instruct.task_of(model, net, latents)
    loss, _ = task.loss(task.draw(0, count, random.Random(9)))
    rng = random.Random(9)
    before, after = instruct.draw_pairs(rng, latents.names, count)
    lost = [instruct.dropped(rng.random()) for _ in range(count)]
    assert set(Counter(lost)) == {(False, False), (True, False), (False, True), (True, True)}
    torch.manual_seed(4)
    target, scenes = latents.take(after)
    x, t, noise, weight = embed.noisy(target * model.vae.config.scaling_factor, embed.new_scheduler().alphas_cumprod)
    assert torch.allclose(net.x[:, :4], x, atol=1e-5) and torch.equal(net.t, t)
    for i, ((no_picture, no_text), name) in enumerate(zip(lost, before, strict=True)):
        assert torch.equal(net.x[i, 4:], torch.zeros(4, 16, 16) if no_picture else latents.take([name])[0][0])
        caption = "" if no_text else world.caption(scenes[i])
        want = model.text_encoder(embed.tokens_of(model.tokenizer, [caption])).last_hidden_state[0]
        assert torch.allclose(net.told[i], want, atol=1e-4)
    assert loss.item() == pytest.approx((weight * noise**2).mean().item(), rel=1e-4)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "SHARD", 100)
    monkeypatch.setattr(instruct, "SHARDS", 1)
    monkeypatch.setattr(instruct, "PART", embed.Part(3, 4, 1e-3))


def run(*words: object) -> Any:
    return CliRunner().invoke(main, ["train", "instruct", *map(str, words)])


@pytest.mark.usefixtures("small")
def test_the_command_goes_on_after_ctrl_c_and_writes_a_checkpoint_that_edits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = run("--work", whole)
    assert done.exit_code == 0 and f"wrote {whole / 'model'}" in done.stdout, done.output
    with monkeypatch.context() as patch:
        calls, noisy = iter(range(9)), embed.noisy

        def interrupted(*arguments: Any) -> Any:
            if next(calls) == 2:
                raise KeyboardInterrupt
            return noisy(*arguments)

        patch.setattr(embed, "noisy", interrupted)
        shutil.copytree(whole / "edits", parts / "edits")  # what was encoded is not encoded again
        stopped = run("--work", parts, "--out", tmp_path / "mine")
    assert stopped.exit_code != 0 and "goes on from here" in stopped.stdout and not (tmp_path / "mine").exists()
    resumed = run("--work", parts, "--out", tmp_path / "mine")
    assert resumed.exit_code == 0 and "resumed at step 2 of 3" in resumed.stdout, resumed.output
    weights = [load_file(f / "unet" / embed.UNET_FILE) for f in (whole / "model", tmp_path / "mine")]
    assert all(torch.equal(weights[1][k], v) for k, v in weights[0].items())
    assert weights[0]["conv_in.weight"].shape[1] == 8 and weights[0]["conv_in.weight"][:, 4:].abs().max() > 0

    model, base = tmp_path / "mine", picturebook_folder()
    assert not [
        p.name
        for p in model.iterdir()
        if p.name.startswith("controlnet-") or p.name in ("clip", "samples", "README.md")
    ]
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "tokenizer/vocab.json"):
        assert (model / part).read_bytes() == (base / part).read_bytes()
    assert json.loads((model / "training.json").read_text())[-1]["part"] == "instruct"
    assert not list(tmp_path.rglob("*.tmp"))
    editor, picture = Editor.load(str(model), device="cpu"), world.render(world.scene_of_seed(0, 1))
    result = editor.edit(EditRequest(picture, "a red car on grass at noon", method="ip2p", steps=2))
    assert result.image.size == (128, 128) and editor.model.guidance_scale == embed.GUIDANCE_SCALE
    assert editor.model.guidance_until is None  # ITO's, measured on another network

    refused = run("--work", parts, "--out", model)
    assert refused.exit_code == 2 and "is there already" in refused.stderr and "--overwrite" in refused.stderr
    for folder in (parts, base):  # is a folder that holds more than a model of this command
        kept = run("--work", parts, "--out", folder, "--overwrite")
        assert kept.exit_code == 2 and "no checkpoint of this command" in kept.stderr and folder.is_dir()
    again = run("--work", parts, "--out", model, "--overwrite")
    assert again.exit_code == 0 and Editor.load(str(model), device="cpu").model.digest == editor.model.digest
    instructs = run("--work", tmp_path / "other", "--base", model)
    assert instructs.exit_code == 2 and "takes the picture already" in instructs.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("small")
def test_what_cannot_be_fine_tuned_is_one_line_and_exit_code_2(tmp_path: Path, tiny_folder: Path) -> None:
    for words, says in (
        (("--base", tmp_path / "none"), "is not a folder"),
        (("--base", tiny_folder), "expected one of the world's pictures, 128 pixels"),
    ):
        result = run("--work", tmp_path / "work", *words)
        assert result.exit_code == 2 and says in result.stderr and not (tmp_path / "work").exists(), result.output
    (tmp_path / "work" / "base").mkdir(parents=True)
    (tmp_path / "work" / "base" / "unet").mkdir()
    (tmp_path / "work" / "base" / "unet" / embed.UNET_FILE).write_bytes(b"another")
    other = run("--work", tmp_path / "work")
    assert (
        other.exit_code == 2 and "goes on from another model" in other.stderr and "give another --work" in other.stderr
    )
