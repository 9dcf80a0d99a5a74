"""What fine-tuning computes of a batch: the equations on the model's own networks, and gradients where they belong and nowhere else."""

from __future__ import annotations

import dataclasses
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from iedit.runtime.model.model import Model, load_model
from iedit.training import embed, losses, objective, world
from iedit.training.objective import Objective, make_batch, pair_number

SIDE, T = 32, 1000


@dataclass
class WorldPairs:
    """Exact pairs of the world: the pseudo-target is the source with another colour."""

    count: int = 6
    digest: str = "0" * 64

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        rng = random.Random(f"pair-{index}")
        before = world.random_scene(rng, 1)
        after = world.edit(before, world.random_change(rng, before, "colour"))
        (thing,) = after.things
        return PairOfScenes(before, after, f"{thing.colour} {thing.kind}")


@dataclass
class PairOfScenes:
    before: world.Scene
    after: world.Scene
    difference: str

    def __post_init__(self) -> None:
        self.source, self.target = world.render(self.before), world.render(self.after)
        self.source_mask, self.target_mask = (np.asarray(world.object_mask(s)) > 127 for s in (self.before, self.after))
        self.source_caption, self.edit_prompt = world.caption(self.before), world.caption(self.after)
        self.difference_prompts = ("", self.difference)


@pytest.fixture
def model(tiny_checkpoint_cli: Path) -> Model:
    return load_model(str(tiny_checkpoint_cli), [], device="cpu")


@pytest.fixture
def made(model: Model) -> Objective:
    torch.manual_seed(0)
    clip = losses.ClipEmbedder(embed.new_clip(model.tokenizer), embed.new_image_processor())
    features = losses.VggFeatures(widths=(4, 4, 0, 8))
    return Objective(model, ("mask", "global", "local", "perceptual"), clip, model.tokenizer, features)


def batch_of(numbers: list[int], pairs: Any = None, seed: int = 3) -> objective.Batch:
    return make_batch(pairs or WorldPairs(), numbers, SIDE, (4, 8), T, seed)


def test_every_epoch_is_another_order_of_all_pairs_and_the_seed_alone_decides_it() -> None:
    epochs = [[pair_number(e * 7 + i, 7, seed=2) for i in range(7)] for e in range(3)]
    assert all(sorted(e) == list(range(7)) for e in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert epochs != [[pair_number(e * 7 + i, 7, seed=3) for i in range(7)] for e in range(3)]


def test_a_sample_is_the_same_in_any_batch_and_beside_any_others() -> None:
    whole, part = batch_of([4, 9, 5]), batch_of([9])
    for field in dataclasses.fields(whole):
        a, b = getattr(whole, field.name)[1:2], getattr(part, field.name)
        assert torch.equal(a, b) if isinstance(a, Tensor) else list(a) == list(b), field.name
    other = batch_of([9], seed=4)
    assert not torch.equal(other.noise, part.noise)
    assert not torch.equal(batch_of([10]).noise, batch_of([9]).noise)


def test_picture_and_mask_are_cut_alike_and_cells_cover_half_of_the_mask_at_least() -> None:
    @dataclass
    class Wide(WorldPairs):
        def __getitem__(self, index: int) -> Any:
            pair = super().__getitem__(index)
            picture = Image.new("RGB", (96, 64))
            picture.paste((255, 255, 255), (40, 16, 72, 48))
            pair.source = picture
            pair.source_mask = np.asarray(picture.convert("L")) > 127
            tiny = np.zeros((64, 96), bool)
            tiny[31, 50] = True  # less than half of any cell
            pair.target_mask = tiny
            return pair

    got = batch_of([0], Wide())
    assert got.source.shape == (1, 3, SIDE, SIDE) and got.source_mask.shape == (1, 1, SIDE, SIDE)
    # 96x64 is halved and 8 columns are cut off on either side: the square stands at 12 to 28, 8 to 24.
    want = torch.zeros(1, 1, SIDE, SIDE)
    want[..., 8:24, 12:28] = 1
    assert torch.equal(got.source_mask, want)
    # But for Lanczos' ringing the picture is white where the mask is.
    assert (((got.source.mean(1, keepdim=True) > 0).float() - want).abs().mean()) < 0.02
    assert torch.equal(got.source_cells, want[..., ::4, ::4])
    assert got.target_cells.sum() == 1  # a mask is never empty


def test_the_terms_are_the_paper_s_equations_on_the_model_s_own_networks(model: Model, made: Objective) -> None:
    """Written out again in float64 with nothing shared but the networks."""
    batch = batch_of([0, 1, 2])
    got = made.terms(batch)

    for part in (model.unet, model.vae, model.text_encoder, made.clip, made.features):
        part.double()  # type: ignore[union-attr]
    scale, abar = model.vae.config.scaling_factor, np.array(model.schedule.alphas_cumprod)[batch.timesteps.numpy()]
    tokens = model.tokenizer(batch.prompts, padding="max_length", max_length=32, return_tensors="pt").input_ids
    with torch.no_grad():
        z1, z2 = (scale * model.vae.encode(v.double()).latent_dist.mode().numpy() for v in (batch.source, batch.target))
        a = abar[:, None, None, None]
        e1 = batch.noise.double().numpy()
        z_t = np.sqrt(a) * z1 + np.sqrt(1 - a) * e1  # Eq. 2
        e2 = (z_t - np.sqrt(a) * z2) / np.sqrt(1 - a)  # Eq. 3
        states = model.text_encoder(tokens)[0]
        e = model.unet(torch.from_numpy(z_t), batch.timesteps, states).sample.numpy()
        m1, m2 = batch.source_cells.numpy(), batch.target_cells.numpy()
        mask = ((e2 * m2 - e * m2) ** 2 + (e1 * (1 - m1) - e * (1 - m1)) ** 2).mean(axis=(1, 2, 3))  # Eqs. 8, 9
        x1 = model.vae.decode(torch.from_numpy((z_t - np.sqrt(1 - a) * e) / np.sqrt(a) / scale)).sample  # Eqs. 6, 7

        def distance(images: Tensor, texts: Any) -> np.ndarray:
            assert made.clip is not None
            seen = made.clip.images(images).numpy()
            said = made.clip.texts(
                model.tokenizer(list(texts), padding="max_length", max_length=32, return_tensors="pt").input_ids
            ).numpy()
            return 1 - (seen * said).sum(1) / np.linalg.norm(seen, axis=1) / np.linalg.norm(said, axis=1)

        black_outside = (x1 + 1) * batch.source_mask - 1
        target = (batch.target.double() + 1) * batch.target_mask - 1
        assert made.features is not None
        seen = [made.features(v).numpy() for v in (black_outside, target)]
        perceptual = ((seen[0] - seen[1]) ** 2).mean(axis=(1, 2, 3))  # Eq. 10
        local = distance(black_outside, batch.differences)  # Eq. 11
        everywhere = distance(x1, batch.prompts)  # Eq. 5

    named = {k: v.detach().numpy() for k, v in got.named().items()}
    assert named.keys() == {"noise", "global_clip", "local_clip", "perceptual"}
    for name, want in (("noise", mask), ("global_clip", everywhere), ("local_clip", local), ("perceptual", perceptual)):
        np.testing.assert_allclose(named[name], want, rtol=2e-3, atol=2e-5, err_msg=name)
    # Eq. 4 in place of Eqs. 8 and 9.
    paired = Objective(model, ("paired",))
    for part in (model.unet, model.vae, model.text_encoder):
        part.float()
    terms = paired.terms(batch)
    np.testing.assert_allclose(terms.noise.detach().numpy(), ((e2 - e) ** 2).mean(axis=(1, 2, 3)), rtol=2e-3)
    assert terms.named().keys() == {"noise"}


def test_every_term_reaches_both_groups_and_nothing_else(model: Model, made: Objective) -> None:
    groups = objective.trained_groups(model.unet)
    trained = {id(p) for members in groups.values() for p in members}
    names = {n.split(".")[0] for n, p in model.unet.named_parameters() if id(p) in trained}
    assert names == {"conv_in", "down_blocks", "mid_block"}
    everything = [*model.unet.parameters(), *model.vae.parameters(), *model.text_encoder.parameters(),
                  *made.clip.parameters(), *made.features.parameters()]  # type: ignore[union-attr]  # fmt: skip
    for name in ("noise", "global_clip", "local_clip", "perceptual"):
        for group, members in groups.items():
            for p in everything:
                p.requires_grad_(False)
                p.grad = None
            for p in members:
                p.requires_grad_(True)
            made.terms(batch_of([1])).named()[name].sum().backward()
            with_gradient = {id(p) for p in everything if p.grad is not None}
            assert with_gradient == {id(p) for p in members}, (name, group)
            assert sum(float(p.grad.abs().sum()) for p in members if p.grad is not None) > 0, (name, group)


def test_the_noise_of_the_first_timesteps_does_not_blow_up_a_step(model: Model) -> None:
    """eps_2 has a standard deviation of 34 at t = 1; weighted by t / T it pulls no harder than the middle of the schedule."""
    model.vae.register_to_config(
        scaling_factor=9.0
    )  # a random encoder sees little: its latents are as far apart as SD's with this
    made, batch = Objective(model, ("paired",)), batch_of([0, 1])
    for p in objective.trained_groups(model.unet)["input"]:
        p.requires_grad_(True)

    def pull(timestep: int) -> float:
        model.unet.zero_grad()
        at = dataclasses.replace(batch, timesteps=torch.full((2,), timestep))
        losses.total_loss(made.terms(at), at.timesteps, T).backward()
        return math.sqrt(
            sum(float((p.grad**2).sum()) for p in objective.trained_groups(model.unet)["input"] if p.grad is not None)
        )

    middle = pull(500)
    assert all(pull(t) < 2 * middle for t in (0, 1, 5, 20))
    with torch.no_grad():
        unweighted = made.terms(dataclasses.replace(batch, timesteps=torch.tensor([1, 1]))).noise
    assert float(unweighted.mean()) > 100
