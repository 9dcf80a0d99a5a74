"""The reader: what it returns, that its targets are exact, and that training it works and resumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from iedit.training import classifier, world
from iedit.training.embed import Part


@pytest.fixture(scope="module")
def net() -> classifier.Classifier:
    torch.manual_seed(0)
    return classifier.Classifier().eval()


def test_a_reading_names_one_or_two_things_and_fits_the_picture(net: classifier.Classifier) -> None:
    readings = net.read([world.render(world.scene_of_seed(i)) for i in range(5)], batch=2)
    assert len(readings) == 5
    for one in readings:
        assert len(one.kinds) == len(one.colours) == len(one.joints) in (1, 2)
        assert set(one.kinds) <= set(world.KINDS)
        assert set(one.colours) <= set(world.COLOURS)
        assert one.ground in world.GROUNDS
        assert one.sky in world.SKIES
        assert one.mask.shape == (128, 128)
        assert 0 <= one.mask.min() <= one.mask.max() <= 1
        assert all(len(points) == 14 for points in one.joints)


def test_a_picture_of_another_size_is_refused(net: classifier.Classifier) -> None:
    with pytest.raises(ValueError, match="64x128, expected 128x128"):
        net.read([Image.new("RGB", (64, 128))])


def test_a_reading_does_not_depend_on_its_batch(net: classifier.Classifier) -> None:
    pictures = [world.render(world.scene_of_seed(i)) for i in range(4)]
    together, alone = net.read(pictures), net.read(pictures, batch=1)
    for a, b in zip(together, alone, strict=True):
        assert (a.kinds, a.colours, a.ground, a.sky) == (b.kinds, b.colours, b.ground, b.sky)
        torch.testing.assert_close(a.mask, b.mask, atol=1e-5, rtol=0)


def test_weights_are_stored_in_less_than_two_megabytes_and_read_back(
    net: classifier.Classifier, tmp_path: Path
) -> None:
    path = tmp_path / "reader.safetensors"
    net.save(path)
    assert path.stat().st_size <= 2_000_000
    assert [p.name for p in tmp_path.iterdir()] == ["reader.safetensors"]
    back = classifier.Classifier.load(path)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(
            back.state_dict()[name], value.half().float() if value.is_floating_point() else value
        )
    with pytest.raises(FileNotFoundError, match="iedit train classifier"):
        classifier.Classifier.load(tmp_path / "missing.safetensors")


def test_the_heat_of_a_point_has_the_point_as_its_mean() -> None:
    points = torch.tensor([[2.0, 126.0], [63.7, 10.01], [100.0, 64.0]])
    heat = classifier._heat_of(points)
    torch.testing.assert_close(heat.sum((-1, -2)), torch.ones(3))
    torch.testing.assert_close(classifier.expected_points(heat.clamp_min(1e-30).log()), points, atol=1e-3, rtol=0)


def test_softening_keeps_range_and_shape_and_stays_close() -> None:
    torch.manual_seed(0)
    picture = np.asarray(world.render(world.scene_of_seed(1)))
    images = (torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1).repeat(6, 1, 1, 1)
    soft = classifier.soften(images)
    assert soft.shape == images.shape
    assert -1 <= soft.min() <= soft.max() <= 1
    assert 0.001 < (soft - images).abs().mean() / 2 < 0.04
    assert not torch.equal(soft[0], soft[1])


def test_labels_of_a_missing_second_thing_are_ignored(net: classifier.Classifier) -> None:
    scene = world.scene_of_seed(3, 1)
    loss, terms = classifier.reader_loss(net, [classifier._draw(scene)] * 2, augment=False)
    assert torch.isfinite(loss)
    assert terms["heads"] > 0


def test_a_short_training_lowers_the_loss_and_a_finished_one_returns_its_weights(tmp_path: Path) -> None:
    part = Part(16, 8, 3e-3, ema=0.9)
    trained = classifier.train_classifier(tmp_path, lambda _: None, part, pool=16)
    torch.manual_seed(part.seed)
    untrained = classifier.Classifier()
    batch = [classifier._pooled(i) for i in range(16)]  # what it was trained on

    def loss_of(net: classifier.Classifier) -> float:
        with torch.no_grad():
            return classifier.reader_loss(net.train(), batch, augment=False)[0].item()

    stored = classifier.Classifier.load(tmp_path / "classifier.safetensors")
    torch.testing.assert_close(stored.at64[0].weight, trained.at64[0].weight.half().float())
    assert loss_of(trained) < 0.8 * loss_of(untrained)
    again = classifier.train_classifier(tmp_path, lambda _: None, part, pool=16)
    for a, b in zip(trained.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_examination_of_an_untrained_reader_fails(net: classifier.Classifier) -> None:
    figures = classifier.examine(net, 32, soft=True)
    assert figures["pictures"] == 32
    assert figures["all"] < 0.1
    assert figures["mask_iou"] < 0.5
    assert figures["joints_px"] > 6
