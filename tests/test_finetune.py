"""A fine-tuning run: the same losses however it is cut, shared out or killed, and a checkpoint that edits."""

from __future__ import annotations

import csv
import functools
import importlib
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from iedit.runtime.cli.main import main
from iedit.runtime.editor import Editor, EditRequest
from iedit.runtime.errors import RunError, UsageError
from iedit.training import embed, finetune, losses, world
from iedit.training.finetune import Finetuning, Settings
from iedit.training.pairs import FORMAT, Manifest, Row, latent_mask, pack_cells, read_pairs, write_manifest, write_shard

SIDE = 32
FAST = {"save_every": 2, "sample_every": 0, "learning_rate": 1e-2}
UNET = Path("unet") / "diffusion_pytorch_model.safetensors"


def _png(picture: Image.Image) -> bytes:
    held = io.BytesIO()
    picture.save(held, "PNG")
    return held.getvalue()


@pytest.fixture(scope="session")
def exact_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pairs of the world whose pseudo-target is the exact edit, 64x64."""
    import random

    def pair(number: int) -> tuple[Row, bytes, bytes, np.ndarray, np.ndarray]:
        rng = random.Random(f"exact-pair-{number}")
        before = world.random_scene(rng, 1)
        after = world.edit(before, world.random_change(rng, before, "colour"))
        pictures = [_png(world.render(s).resize((64, 64))) for s in (before, after)]
        mask = np.asarray(world.object_mask(before).resize((64, 64))) > 127
        cells = latent_mask(mask)
        (old,), (new,) = before.things, after.things
        row = Row(
            key=f"{number:09d}", source_key=f"s{number}", target_key=f"t{number}", source_caption=world.caption(before),
            edit_prompt=world.caption(after), word=old.colour, replacement=new.colour, relation="co-hyponym",
            source_difference=f"{old.colour} {old.kind}", target_difference=f"{new.colour} {new.kind}", similarity=1.0,
            image_similarity=1.0, text_similarity=1.0, source_share=float(mask.mean()), target_share=float(mask.mean()),
            source_latent_share=float(cells.mean()), target_latent_share=float(cells.mean()),
            source_cells=pack_cells(cells), target_cells=pack_cells(cells),
        )  # fmt: skip
        return row, *pictures, mask, mask  # type: ignore[return-value]

    folder = tmp_path_factory.mktemp("finetune") / "pairs"
    folder.mkdir()
    shard = write_shard(folder, "pairs-00000", (pair(n) for n in range(8)))
    assert shard is not None
    write_manifest(folder, Manifest(FORMAT, 64, 8, 8, 8, {}, {}, {}, {}, {}, (shard,)), [])
    return folder


@pytest.fixture(scope="session")
def judges(tiny_checkpoint_cli: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A CLIPModel and a narrow VGG of random weights, as files."""
    folder = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    clip = embed.new_clip(embed.make_tokenizer(folder / "clip"))
    clip.save_pretrained(folder / "clip")
    embed.new_image_processor().save_pretrained(folder / "clip")
    widths = (4, 4, 0, 4, 4, 0, 8, 8, 8)
    save_file(losses.VggFeatures(widths=widths).features.state_dict(prefix="features."), folder / "vgg.safetensors")
    return {"clip": str(folder / "clip"), "vgg": folder / "vgg.safetensors"}


@pytest.fixture
def begin(tiny_checkpoint_cli: Path, exact_pairs: Path, judges: dict[str, Any]) -> Callable[..., Finetuning]:
    def make(out: Path, **values: Any) -> Finetuning:
        settings = Settings(**FAST | {"steps": 6} | values)
        return Finetuning(out, str(tiny_checkpoint_cli), read_pairs(exact_pairs), settings, device="cpu", **judges)

    return make


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "losses.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def unet(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / UNET)


def test_the_groups_take_turns_and_the_result_is_a_checkpoint_that_edits(
    tmp_path: Path, begin: Callable[..., Finetuning], tiny_checkpoint_cli: Path, picture: Any
) -> None:
    run, seen = begin(tmp_path / "run", sample_every=4, samples=2), [unet(tiny_checkpoint_cli)]
    for step in run.run():
        seen.append({k: v.detach().clone() for k, v in run.model.unet.state_dict().items()})
        assert step.group == ("input", "middle")[(step.number - 1) % 2] and step.memory > 0 and step.seconds_left >= 0
        parts = {k.split(".")[0] for k in seen[-1] if not torch.equal(seen[-1][k], seen[-2][k])}
        assert parts == ({"conv_in", "down_blocks"} if step.group == "input" else {"mid_block"})
    base, out = tiny_checkpoint_cli, tmp_path / "run" / "model"
    assert all(torch.equal(v, seen[-1][k]) for k, v in unet(out).items())
    weights, config = (out / "unet" / n for n in ("diffusion_pytorch_model.safetensors", "config.json"))
    assert weights.stat().st_mode == config.stat().st_mode
    for name in ("vae", "text_encoder", "tokenizer", "scheduler", "controlnet-pose"):
        files = sorted(p.relative_to(base) for p in (base / name).rglob("*") if p.is_file())
        assert files and all((base / f).read_bytes() == (out / f).read_bytes() for f in files)
    request = EditRequest(picture(size=(SIDE, SIDE)), "a blue car", "a red car", "sdedit", steps=4)
    before, after = (Editor.load(str(m), [], backend="torch", device="cpu").edit(request) for m in (base, out))
    assert before.image.tobytes() != after.image.tobytes()
    # A sheet before the first step, at the fourth and at the last.
    assert sorted(p.name for p in (tmp_path / "run" / "samples").iterdir()) == [f"step-{n:06d}.png" for n in (0, 4, 6)]
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    card = (out / "README.md").read_text()
    assert all(word in card for word in ("Eqs. 8-9", "Eq. 11", "6 steps of 1 pairs", "SDPA (", "| global_clip |"))
    assert [int(r["step"]) for r in rows(tmp_path / "run")] == list(range(1, 7))


@pytest.mark.parametrize("extra", [{}, {"ema": 0.5}])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    tmp_path: Path, begin: Callable[..., Finetuning], extra: dict[str, Any]
) -> None:
    list(begin(tmp_path / "whole", **extra).run())
    for step in (run := begin(tmp_path / "cut", **extra)).run():
        run.stop = step.number >= 3  # as Ctrl-C does
    assert len(rows(tmp_path / "cut")) == 4  # the step that it was in is finished
    (again,) = [s for s in begin(tmp_path / "cut", **extra).run() if s.number == 5]
    assert again.terms and rows(tmp_path / "cut") == rows(tmp_path / "whole")
    one, other = unet(tmp_path / "cut" / "model"), unet(tmp_path / "whole" / "model")
    assert all(torch.equal(v, other[k]) for k, v in one.items())
    if extra:  # what is saved is the average, not the weights
        state = torch.load(tmp_path / "cut" / "state.pt", weights_only=True)
        assert not torch.equal(state["trained"][0], one["conv_in.weight"])
        assert torch.equal(state["average"][0], one["conv_in.weight"])


def test_a_killed_run_goes_on_with_the_same_losses(
    tmp_path: Path, begin: Callable[..., Finetuning], tiny_checkpoint_cli: Path, exact_pairs: Path, judges: dict[str, Any], forked: Any
) -> None:  # fmt: skip
    list(begin(tmp_path / "whole").run())
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from iedit.training import finetune as f\n"
        "def tell(step):\n"
        "    if step.number == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "out, model, pairs, clip, vgg, settings = sys.argv[1:]\n"
        "f.finetune(Path(out), model, Path(pairs), f.Settings(**eval(settings)), clip=clip, vgg=Path(vgg), device='cpu', tell=tell)\n"
    )
    words = (tmp_path / "cut", tiny_checkpoint_cli, exact_pairs, judges["clip"], judges["vgg"], FAST | {"steps": 6})
    ended = forked.Program(program, words)
    ended.finish()
    assert ended.returncode == -signal.SIGKILL and len(rows(tmp_path / "cut")) == 5
    assert [s.number for s in begin(tmp_path / "cut").run()] == [5, 6]  # the last checkpoint was after step 4
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    one, other = unet(tmp_path / "cut" / "model"), unet(tmp_path / "whole" / "model")
    assert all(torch.equal(v, other[k]) for k, v in one.items())


def test_two_processes_give_the_losses_of_one_with_twice_the_accumulation(
    tmp_path: Path, begin: Callable[..., Finetuning], tiny_checkpoint_cli: Path, exact_pairs: Path, judges: dict[str, Any],
    forked: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    forked.context()  # started as ever, but from a process that has the imports done
    spawn = importlib.import_module("torch.multiprocessing.spawn")
    monkeypatch.setattr(spawn, "spawn", functools.partial(spawn.start_processes, start_method="forkserver"))
    chosen = FAST | {"steps": 4, "learning_rate": 1e-3}
    list(begin(tmp_path / "one", **chosen, accumulate=2).run())
    settings = Settings(**chosen)  # type: ignore[arg-type]
    out = finetune.finetune(
        tmp_path / "two", str(tiny_checkpoint_cli), exact_pairs, settings, processes=2, device="cpu", **judges
    )
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        for name in a:
            if name != "group":
                assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-4, abs=1e-6), (a["step"], name)
    assert len({r["loss"] for r in one}) == 4
    for name, value in unet(out).items():
        torch.testing.assert_close(value, unet(tmp_path / "one" / "model")[name], rtol=1e-3, atol=1e-5)
    # It goes on with either, as the samples of a step are the same.
    assert [s.number for s in begin(tmp_path / "two", **chosen | {"steps": 5}, accumulate=2).run()] == [5]


def test_a_loss_that_is_not_finite_names_term_and_step_and_leaves_the_checkpoint_before(
    tmp_path: Path, begin: Callable[..., Finetuning], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = begin(tmp_path / "run"), []
    exact = losses.clip_distance

    def poisoned(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return exact(image, text) * (float("nan") if len(calls) == 8 else 1.0)  # the local term of the fourth step

    monkeypatch.setattr(losses, "clip_distance", poisoned)
    with pytest.raises(RunError, match=r"step 4: the term local_clip is nan"):
        list(run.run())
    monkeypatch.undo()
    assert len(rows(tmp_path / "run")) == 3
    assert all(bool(v.isfinite().all()) for v in unet(tmp_path / "run" / "model").values())
    assert [s.number for s in begin(tmp_path / "run").run()] == [3, 4, 5, 6]


def test_a_folder_of_another_run_is_refused_and_a_longer_one_goes_on(
    tmp_path: Path, begin: Callable[..., Finetuning]
) -> None:
    list(begin(tmp_path / "run", steps=2).run())
    for change, name in (({"seed": 1}, "seed"), ({"losses": ("paired",)}, "losses"), ({"batch": 2}, "samples a step"),
                         ({"ema": 0.9}, "ema"), ({"size": 64}, "size")):  # fmt: skip
        with pytest.raises(UsageError, match=f"holds a run with {name} "):
            begin(tmp_path / "run", **change)
    assert [s.number for s in begin(tmp_path / "run", steps=3).run()] == [3]
    assert list(begin(tmp_path / "run", steps=3).run()) == []
    (tmp_path / "killed").mkdir()
    for leftover in (
        ".losses.csv.0123abcd.tmp",
        "model.17.tmp",
    ):  # of a run that was killed before its first checkpoint
        (tmp_path / "killed" / leftover).write_text("half")
    assert [s.number for s in begin(tmp_path / "killed", steps=1).run()] == [1]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds thesis\.txt"):
        begin(tmp_path / "other")
    (tmp_path / "run" / "state.pt").write_bytes(b"cut off")
    with pytest.raises(UsageError, match=r"state\.pt cannot be read"):
        begin(tmp_path / "run")


def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, begin: Callable[..., Finetuning], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(tmp_path / "run")

    def full(folder: Path) -> None:
        if run.step == 4:
            (folder / "half").parent.mkdir(parents=True)
            raise OSError(28, "No space left on device")
        exact(folder)

    exact = run._write_unet
    monkeypatch.setattr(run, "_write_unet", full)
    with pytest.raises(RunError, match="No space left on device"):
        list(run.run())
    assert not [p for p in (tmp_path / "run").iterdir() if p.suffix in (".tmp", ".old")]
    assert unet(tmp_path / "run" / "model")
    assert [s.number for s in begin(tmp_path / "run").run()] == [5, 6]


def test_gradient_checkpointing_changes_memory_and_not_a_loss(tmp_path: Path, begin: Callable[..., Finetuning]) -> None:
    from torch.utils import checkpoint

    counted = []
    exact = checkpoint.checkpoint

    def count(*arguments: Any, **named: Any) -> Any:
        counted.append(1)
        return exact(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "checkpoint", count)
        list(begin(tmp_path / "with", steps=2).run())
        assert counted
        counted.clear()
        list(begin(tmp_path / "without", steps=2, gradient_checkpointing=False).run())
        assert not counted
    for a, b in zip(rows(tmp_path / "with"), rows(tmp_path / "without"), strict=True):
        assert {k: float(v) for k, v in a.items() if k != "group"} == pytest.approx(
            {k: float(v) for k, v in b.items() if k != "group"}, rel=1e-4, abs=1e-6
        )


def test_bfloat16_trains_float32_weights_with_about_the_same_losses(
    tmp_path: Path, begin: Callable[..., Finetuning]
) -> None:
    run = begin(tmp_path / "half", steps=3, precision="bf16")
    list(run.run())
    assert {p.dtype for p in run.trained} == {torch.float32}
    assert {p.dtype for p in run.model.vae.parameters()} == {torch.bfloat16}
    list(begin(tmp_path / "full", steps=3).run())
    for half, full in zip(rows(tmp_path / "half"), rows(tmp_path / "full"), strict=True):
        for name in ("loss", "noise", "global_clip", "local_clip", "perceptual"):
            assert float(half[name]) == pytest.approx(float(full[name]), rel=0.05, abs=0.005), name


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_ends_a_run_after_its_step_with_a_checkpoint(
    tmp_path: Path, tiny_checkpoint_cli: Path, exact_pairs: Path, forked: Any, processes: int
) -> None:
    program = "import sys\nfrom iedit.runtime.cli.main import main\nmain(['train', 'finetune', *sys.argv[1:]])\n"
    words = ["--model", tiny_checkpoint_cli, "--pairs", exact_pairs, "--out", tmp_path / "run", "--steps", 100_000, "--device", "cpu",
             "--losses", "mask", "--sample-every", 0, "--save-every", 50_000, "--processes", processes]  # fmt: skip
    process = forked.Program(program, words, session=True)
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said, wrong = process.finish()
    assert process.returncode == 1 and "Aborted" in wrong, (said, wrong)
    (stopped,) = [line for line in said.splitlines() if line.startswith("stopped after step ")]
    step = int(stopped.split()[3].rstrip(";"))
    assert len(rows(tmp_path / "run")) == step == torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"]
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_the_command_trains_and_says_in_one_line_what_is_wrong(
    tmp_path: Path, tiny_checkpoint_cli: Path, exact_pairs: Path, judges: dict[str, Any]
) -> None:
    def command(*words: Any) -> Any:
        return CliRunner().invoke(main, ["train", "finetune", *map(str, words)])

    good = (
        "--model",
        tiny_checkpoint_cli,
        "--pairs",
        exact_pairs,
        "--device",
        "cpu",
        "--steps",
        2,
        "--sample-every",
        0,
    )
    both = ("--clip", judges["clip"], "--vgg", judges["vgg"])
    done = command(*good, *both, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert (
        "attention: SDPA (" in done.output and "step 2/2 loss" in done.output and "finished after step 2" in done.output
    )
    assert (tmp_path / "run" / "model" / UNET).is_file()

    (tmp_path / "no-vgg").mkdir()
    (tmp_path / "no-vgg" / "vgg.safetensors").write_bytes(b"nothing")
    empty = tmp_path / "empty"
    empty.mkdir()
    write_manifest(empty, Manifest(FORMAT, 64, 8, 3, 0, {"no neighbour": 3}, {}, {}, {}, {}, ()), [])
    (tmp_path / "nothing").mkdir()
    for words, message in (
        ((*good,), "vgg: the perceptual loss needs VGG-16's weights"),
        ((*good, "--vgg", tmp_path / "no-vgg" / "vgg.safetensors"), "vgg.safetensors cannot be read"),
        ((*good, "--losses", "mask,paired"), "name either paired"),
        ((*good, "--losses", "mask,style"), "'style' is none of"),
        ((*good, "--losses", "mask,global", "--clip", tiny_checkpoint_cli), "cannot be read as a CLIPModel"),
        ((*good, *both, "--size", 20), "size is 20, expected a multiple of 8"),
        ((*good, *both, "--attention", "xformers"), "attention: "),
        ((*good, *both, "--adam8bit"), "adam8bit: "),
        ((*good, *both, "--pairs", empty), "there is none to train on"),
        ((*good, *both, "--pairs", tmp_path / "nothing"), "manifest.json"),
    ):
        failed = command(*words, "--out", tmp_path / "refused")
        assert failed.exit_code == 2 and message in failed.output, (words, failed.output)
        assert len(failed.output.strip().splitlines()) == 1 and not (tmp_path / "refused").exists()


def test_the_embedded_model_s_own_clip_is_the_default(tmp_path: Path, exact_pairs: Path) -> None:
    settings = Settings(**FAST | {"steps": 1, "losses": ("mask", "global")})  # type: ignore[arg-type]
    run = Finetuning(tmp_path / "run", "picturebook", read_pairs(exact_pairs), settings, device="cpu")
    (step,) = run.run()
    assert 0 < step.terms["global_clip"] < 1.2
    stored = unet(tmp_path / "run" / "model")
    assert {v.dtype for v in stored.values()} == {torch.float16}  # as the base's
    assert json.loads((tmp_path / "run" / "model" / "iedit.json").read_text())["words"]
