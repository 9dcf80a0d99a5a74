"""A lambda that is left open is 1 for a mask as small as the checkpoint recommends it for, else 0.6; and everything that is written says which."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageDraw

from iedit.runtime.backends.eager import TorchBackend
from iedit.runtime.cli.main import main
from iedit.runtime.editor import Editor, EditRequest, EditResult, MaskOptions, Options
from iedit.runtime.images import read_receipt
from iedit.runtime.stage_cache import StageCache

Picture = Callable[..., Image.Image]
AREA = 0.3


def square(side: int, size: int = 64) -> Image.Image:
    """A given mask, white in a square of `side` pixels."""
    mask = Image.new("L", (size, size))
    ImageDraw.Draw(mask).rectangle((8, 8, 7 + side, 7 + side), fill=255)
    return mask


@pytest.fixture
def editor(tiny: Any) -> Editor:
    """Whose checkpoint recommends lambda 1 for masks of up to 30 %, and the drawn path."""
    model = dataclasses.replace(tiny, lambda_area=AREA, guidance_path="drawn")
    return Editor(model, TorchBackend(model), cache=StageCache(memory=0))


def ask(picture: Picture, mask: Image.Image | None, lam: float | None = None, **more: Any) -> EditRequest:
    options = {"mask": MaskOptions(seeds=2, threshold=0.3)} if mask is None else {}
    prompts = ("a blue house on sand", "a red car on grass")
    return EditRequest(picture(0), *prompts, mask=mask, steps=6, options=Options(lam=lam, **options), **more)  # type: ignore[arg-type]


def same(one: EditResult, other: EditResult) -> None:
    """The same pixels by the same work, and receipts that say the same but for the path of a guidance image."""
    assert torch.equal(one.latent, other.latent) and one.image.tobytes() == other.image.tobytes()
    assert one.profile.evaluations == other.profile.evaluations
    assert one.receipt["request"] == other.receipt["request"]


@pytest.mark.parametrize(("side", "lam"), [(16, 1.0), (32, 1.0), (40, 0.6)])  # 6, 25 and 39 % of the picture
def test_by_a_given_mask(editor: Editor, picture: Picture, side: int, lam: float) -> None:
    chosen = editor.edit(ask(picture, square(side)))
    same(chosen, editor.edit(ask(picture, square(side), lam)))
    assert chosen.receipt["request"]["options"]["lam"] == lam
    assert (chosen.guidance_latent is None) == (lam == 1)
    assert chosen.receipt["request"]["options"]["guidance_path"] == (None if lam == 1 else "drawn")


def test_by_an_estimated_mask(tiny: Any, picture: Picture) -> None:
    request = ask(picture, None)
    area = Editor(tiny, TorchBackend(tiny)).edit(request).receipt["mask"]["area"]
    assert 0.05 < area < 0.95
    for recommended, lam in ((area + 0.01, 1.0), (area - 0.01, 0.6), (None, 0.6)):
        model = dataclasses.replace(tiny, lambda_area=recommended)
        told = Editor(model, TorchBackend(model), cache=StageCache(memory=0))
        same(told.edit(request), told.edit(ask(picture, None, lam)))


def test_a_batch_may_hold_both_and_the_expected_cost_follows(editor: Editor, picture: Picture) -> None:
    sides, lambdas = (16, 40, 24), (1.0, 0.6, 1.0)
    seen: list[float] = []
    chosen = editor.edit_many([ask(picture, square(s)) for s in sides], lambda p: seen.append(p.fraction))
    told = editor.edit_many([ask(picture, square(s), lam) for s, lam in zip(sides, lambdas, strict=True)])
    for one, other, lam in zip(chosen, told, lambdas, strict=True):
        same(one, other)
        assert one.receipt["request"]["options"]["lam"] == lam
    for r in (chosen[0], editor.edit(ask(picture, square(16))), editor.edit(ask(picture, square(40)))):
        assert r.profile.expected == sum(r.profile.evaluations.values())
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1.0)


def test_layouts_and_what_is_asked_of_a_guidance_image_keep_it(tiny: Any) -> None:
    model = dataclasses.replace(tiny, lambda_area=AREA)
    assert Options().chosen_lambda(model, 0.1) == Options().chosen_lambda(model, AREA) == 1
    assert Options().chosen_lambda(model, 0.31) == 0.6
    assert Options().chosen_lambda(model, 0.0) == 0.6  # without a mask all of the picture is preserved
    assert Options().chosen_lambda(model, 0.1, layouts=True) == 0.6
    assert Options(refine=True).chosen_lambda(model, 0.1) == Options(round_trip=True).chosen_lambda(model, 0.1) == 0.6
    assert Options(lam=0.3).chosen_lambda(model, 0.1) == 0.3 and Options().chosen_lambda(tiny, 0.1) == 0.6


def test_other_methods_have_no_lambda(editor: Editor, picture: Picture) -> None:
    for method in ("diffedit", "sdedit"):
        mask = None if method == "sdedit" else square(16)
        request = dataclasses.replace(ask(picture, mask, method=method), options=Options())
        assert editor.edit(request).receipt["request"]["options"]["lam"] is None


@pytest.fixture
def checkpoint(tiny_checkpoint_cli: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint_cli, folder)
    (folder / "iedit.json").write_text(json.dumps({"lambda_area": AREA, "guidance_path": "drawn", "mask_seeds": 2}))
    return folder


def run(*words: str, ok: bool = True) -> Any:
    done = CliRunner().invoke(main, [*words])
    assert (done.exit_code == 0) == ok, done.output
    return done


def test_on_the_command_line_it_is_said_and_replayed(checkpoint: Path, tmp_path: Path, picture: Picture) -> None:
    picture(0, (32, 32)).save(tmp_path / "in.png")
    model = ["--model", str(checkpoint), "--backend", "torch"]
    for side, lam in ((8, 1), (20, 0.6)):
        square(side, 32).save(tmp_path / "mask.png")
        ways: list[list[str]] = [[], ["--count", "2"], ["--preset", "fast"], ["--preset", "exact"]]
        for number, more in enumerate(ways if lam == 1 else ways[:2]):
            out = tmp_path / f"{side}-{number}.png"
            words = ["edit", str(tmp_path / "in.png"), "--prompt", "a car", *model, "--steps", "4", *more]
            done = run(*words, "--mask", str(tmp_path / "mask.png"), "--output", str(out))
            want = 0.6 if "exact" in more else lam  # the papers' letter
            for made in [out] if out.exists() else [out.with_stem(f"{out.stem}-{i}") for i in range(2)]:
                receipt = read_receipt(made)
                assert receipt["request"]["options"]["lam"] == want
                assert {m["lam"] for m in receipt["batch"]["members"]} == {want}
                assert f"{made}: 32x32, mask" in done.stdout and f", lambda {want:g}\n" in done.stdout
                again = run("replay", str(made), "--model", str(checkpoint))
                assert "identical" in again.stdout
    asked = run(
        *words, "--lambda", "0.2", "--mask", str(tmp_path / "mask.png"), "--output", str(tmp_path / "x.png"), "--json"
    )
    assert [r["lambda"] for r in json.loads(asked.stdout)["results"]] == [0.2, 0.2]


def test_a_sweep_with_lambda_1_alone_still_refuses_a_guidance_path(
    checkpoint: Path, tmp_path: Path, picture: Picture
) -> None:
    picture(0, (32, 32)).save(tmp_path / "in.png")
    words = [
        "edit",
        str(tmp_path / "in.png"),
        "--prompt",
        "a car",
        "--model",
        str(checkpoint),
        "--guidance-path",
        "drawn",
    ]
    assert "lambda 1 makes no guidance image" in run(*words, "--lambda", "1", ok=False).output
    run(*words, "--steps", "2", "--output", str(tmp_path / "open.png"))


def test_a_receipt_of_before_lambda_could_be_open_is_replayed(
    checkpoint: Path, tmp_path: Path, picture: Picture
) -> None:
    """It says 0.6 of a method that has none."""
    from iedit.runtime.images import load_image, png_bytes

    picture(0, (32, 32)).save(tmp_path / "in.png")
    out, old = tmp_path / "out.png", tmp_path / "old.png"
    run("edit", str(tmp_path / "in.png"), "--prompt", "a car", "--method", "sdedit", "--steps", "3", "--model", str(checkpoint),
        "--output", str(out))  # fmt: skip
    receipt = read_receipt(out)
    receipt["request"]["options"]["lam"] = receipt["batch"]["members"][0]["lam"] = 0.6
    old.write_bytes(png_bytes(load_image(str(out)), receipt))
    assert "identical" in run("replay", str(old), "--model", str(checkpoint)).stdout
