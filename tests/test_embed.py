"""Training of the embedded model: every part in small, resumed as if it had not been stopped, and a model that loads."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iedit.runtime import machine
from iedit.runtime.editor import Editor, EditRequest
from iedit.runtime.model.checkpoint import picturebook_folder
from iedit.training import embed, world


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in embed.PARTS:
        monkeypatch.setitem(embed.PARTS, name, embed.Part(2, 4, 1e-3))
    monkeypatch.setattr(embed, "SHARD", 25)
    monkeypatch.setattr(embed, "SHARDS", 1)
    monkeypatch.setattr(embed, "SCALING_SCENES", 16)
    # A pose part draws from scenes with a person alone; 25 scenes hold some.
    assert any(t.kind == "person" for i in range(25) for t in embed.shard_scene(0, i).things)


@pytest.mark.usefixtures("small")
def test_the_command_trains_every_part_and_writes_a_model_that_edits(tmp_path: Path) -> None:
    said: list[str] = []
    out = embed.train_all(tmp_path / "work", said.append, out=tmp_path / "model")
    for part in (
        "unet",
        "vae",
        "text_encoder",
        "tokenizer",
        "scheduler",
        "clip",
        "controlnet-pose",
        "controlnet-scribble",
        "samples",
    ):
        assert (out / part).is_dir(), part
    editor = Editor.load(str(out), device="cpu")
    assert editor.model.guidance_scale == embed.GUIDANCE_SCALE
    scene = world.scene_of_seed(0, 1)
    map_ = {"scribble": world.layout(scene, "scribble")}
    request = EditRequest(world.render(scene), "a red car", layouts=map_, source_layouts=map_, steps=2)
    assert editor.edit(request).image.size == (128, 128)
    plain = (out / "vae" / "config.json").stat().st_mode
    assert {p.stat().st_mode for p in out.rglob("*.safetensors")} == {plain}
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").glob("*.pt")}
    assert {p.stem for p in before} == set(embed.PARTS)
    embed.train_all(tmp_path / "work", said.append, out=tmp_path / "model")  # finished parts are not trained again
    assert {p: p.stat().st_mtime_ns for p in before} == before
    text = embed.card(out, "FIGURES")
    assert (
        f"Made on two CPU cores, {'bfloat16 autocast' if machine.has_arithmetic(torch.bfloat16) else 'float32'}, AdamW"
        in text
    )
    assert all(f"| {name} | 2 | 4 | 0.001 |" in text for name in embed.PARTS)


@pytest.mark.usefixtures("small")
def test_a_finished_model_is_trained_on_and_what_is_not_trained_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = picturebook_folder()
    monkeypatch.setattr(embed, "CONTINUED", {n: embed.Part(1, 2, 1e-2) for n in embed.CONTINUED})
    out = embed.train_all(tmp_path / "work", lambda _: None, out=tmp_path / "better", base=base)
    weights = {p.relative_to(out): p.read_bytes() for p in out.rglob("*.safetensors")}
    assert set(weights) == {p.relative_to(base) for p in base.rglob("*.safetensors")}
    changed = {str(p.parent) for p, data in weights.items() if (base / p).read_bytes() != data}
    assert changed == {"unet", "text_encoder", "controlnet-pose", "controlnet-scribble"}
    history = json.loads((out / embed.HISTORY_FILE).read_text())
    assert history[:-3] == json.loads((base / embed.HISTORY_FILE).read_text())
    assert [r["part"] for r in history[-3:]] == list(embed.CONTINUED)
    assert history[-1]["seed"] == sum(r["part"] == history[-1]["part"] for r in history[:-1]) > 0
    again = embed.train_all(
        tmp_path / "work", lambda _: None, out=tmp_path / "again"
    )  # the base is known, the parts are finished
    assert (again / "unet" / embed.UNET_FILE).read_bytes() == weights[Path("unet") / embed.UNET_FILE]
    with pytest.raises(ValueError, match="goes on from another model"):
        embed.train_all(tmp_path / "work", lambda _: None, base=out)
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "vae.pt").write_bytes(b"begun")
    with pytest.raises(ValueError, match=r"holds a run from scratch \(vae\)"):
        embed.train_all(tmp_path / "scratch", lambda _: None, base=base)


def test_training_computes_in_bfloat16_only_where_the_processor_has_arithmetic_for_it_and_the_card_says_in_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "PARTS", {"fit": embed.Part(2, 2, 1e-3)})
    seen = []

    def card() -> str:
        history = embed.training_history(embed.plan_of(tmp_path))
        (tmp_path / embed.HISTORY_FILE).write_text(json.dumps(history))
        return embed.card(tmp_path, "FIGURES")

    def train(steps: int, **features: bool) -> str:
        monkeypatch.setattr(machine, "features", lambda: features)
        net = nn.Linear(3, 1)

        def loss_of(batch: int) -> tuple[Tensor, dict[str, Tensor]]:
            with machine.autocast():
                got = net(torch.randn(batch, 3))
            seen.append(got.dtype)
            return got.float().square().mean(), {}

        task = embed.Task(lambda step, count, rng: count, loss_of)
        embed.train_loop("fit", embed.Part(steps, 2, 1e-3), nn.ModuleDict({"net": net}), task, tmp_path, lambda _: None)
        return card()

    assert "two CPU cores, float32, AdamW" in train(1, avx2=True)
    assert "two CPU cores, float32 and bfloat16 autocast, AdamW" in train(2, avx2=True, avx512_bf16=True)
    assert "two CPU cores, float32 and bfloat16 autocast, AdamW" in train(2, avx2=True)  # finished: nothing is computed
    assert seen == [torch.float32, torch.bfloat16]
    path = tmp_path / "fit.pt"
    state = torch.load(path, weights_only=True)
    del state["arithmetic"]
    torch.save(state, path)  # as checkpoints were before they said it, when it was always bfloat16
    assert "two CPU cores, bfloat16 autocast, AdamW" in card()


def loop(work: Path, part: embed.Part, stop_at: int | None = None) -> Tensor:
    """A linear fit through `train_loop`; its averaged weights."""
    torch.manual_seed(0)
    net = nn.Linear(3, 1)

    def draw(step: int, count: int, rng: random.Random) -> tuple[int, float]:
        if step == stop_at:
            raise KeyboardInterrupt
        return count, rng.random()

    def loss_of(batch: tuple[int, float]) -> tuple[Tensor, dict[str, Tensor]]:
        x = torch.randn(batch[0], 3) + batch[1]
        return ((net(x) - x.sum(1, keepdim=True)) ** 2).mean(), {}

    task = embed.Task(draw, loss_of)
    embed.train_loop("fit", part, nn.ModuleDict({"net": net}), task, work, lambda _: None, every=7)
    return net.weight.detach().clone()


def test_a_run_that_was_interrupted_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    part = embed.Part(30, 8, 1e-2)
    whole = loop(tmp_path / "whole", part)
    with pytest.raises(KeyboardInterrupt):
        loop(tmp_path / "parts", part, stop_at=17)
    assert torch.load(tmp_path / "parts" / "fit.pt", weights_only=True)["step"] == 17
    assert torch.equal(loop(tmp_path / "parts", part), whole)
    assert list((tmp_path / "parts").glob("*.tmp")) == []


def test_a_loss_that_is_not_finite_stops_and_names_the_step(tmp_path: Path) -> None:
    net = nn.Linear(1, 1)

    task = embed.Task(lambda step, *_: step, lambda step: (net.weight.sum() * (float("nan") if step == 3 else 1.0), {}))
    with pytest.raises(FloatingPointError, match="fit: the loss is nan at step 3"):
        embed.train_loop("fit", embed.Part(5, 1, 1e-3), nn.ModuleDict({"net": net}), task, tmp_path, lambda _: None)


def test_the_learning_rate_warms_up_and_decays() -> None:
    part = embed.Part(1000, 1, 1.0)
    rates = [embed.learning_rate(part, s) for s in range(1000)]
    assert rates[0] == 1 / 20 and max(rates) == 1.0 and rates.index(1.0) in (19, 20)
    assert rates[-1] == pytest.approx(0.02, abs=1e-4)
    assert all(a >= b for a, b in itertools.pairwise(rates[20:]))


def test_every_word_of_the_world_is_one_token_and_anything_else_still_splits(tmp_path: Path) -> None:
    tokenizer = embed.make_tokenizer(tmp_path)
    assert [w for w in embed.WORDS if len(tokenizer.tokenize(w)) != 1] == []
    ids: Any = tokenizer("a zebra, 12 ü").input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    longest = max((world.caption(world.scene_of_seed(i, 2)) for i in range(200)), key=len)
    assert len(tokenizer(longest).input_ids) <= embed.MAX_TOKENS
    assert not list(tmp_path.glob("tmp*"))


def test_the_loss_weight_is_min_snr() -> None:
    alphas = embed.new_scheduler().alphas_cumprod
    torch.manual_seed(0)
    z = torch.randn(64, 4, 16, 16)
    x, t, noise, weight = embed.noisy(z, alphas)
    a = alphas[t].view(-1, 1, 1, 1)
    assert torch.allclose(x, a.sqrt() * z + (1 - a).sqrt() * noise)
    snr = a / (1 - a)
    assert torch.allclose(weight, torch.minimum(snr, torch.tensor(5.0)) / snr)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_whoever_draws_them(workers: int) -> None:
    made = [int(t) for t in embed.ahead(lambda i: torch.tensor(i * i), range(3, 11), workers)]
    assert made == [i * i for i in range(3, 11)]


def test_a_network_trained_from_batches_drawn_ahead_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(work: Path) -> Tensor:
        torch.manual_seed(0)
        net = nn.Linear(3, 1)

        def loss_of(batch: tuple[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            x = batch[0] + torch.randn(3)
            return ((net(x) - x.sum(1, keepdim=True)) ** 2).mean(), {}

        task = embed.Task(lambda step, count, rng: (torch.tensor([[rng.random()] * 3] * count),), loss_of)
        embed.train_loop("fit", embed.Part(12, 4, 1e-2), nn.ModuleDict({"net": net}), task, work, lambda _: None)
        return net.weight.detach().clone()

    want = trained(tmp_path / "here")
    monkeypatch.setattr(embed, "drawers", lambda device: 2)
    assert torch.equal(trained(tmp_path / "ahead"), want)
