"""Threads are chosen by what else the machine does, dtypes by what the processor can, and Ctrl-C does not wait for a network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from iedit.runtime import machine
from iedit.runtime.cli import params
from iedit.runtime.cli.main import main
from iedit.runtime.model.model import load_model


class Fixed(machine.BusyMeter):
    """So many processors are busy."""

    def __init__(self, others: float):
        self.fixed = others

    def others(self) -> float:
        return self.fixed


@pytest.mark.parametrize(
    ("have", "others", "most", "wanted"),
    [(2, 0.0, 2, 2), (2, 0.3, 2, 2), (2, 0.9, 2, 1), (2, 2.0, 2, 1), (8, 3.2, 8, 5), (8, 3.2, 4, 4), (1, 5.0, 1, 1), (64, 2.0, 32, 32)],
)  # fmt: skip
def test_there_are_as_many_threads_as_processors_that_nobody_else_keeps_busy(
    monkeypatch: pytest.MonkeyPatch, have: int, others: float, most: int, wanted: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "processors", lambda: list(range(have)))
    choice = machine.choose_threads(Fixed(others), most)
    assert choice.threads == wanted
    assert f"of {have} processor" in choice.why and f"{others:.1f} are busy with other work" in choice.why


def test_omp_num_threads_is_the_user_s_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert machine.choose_threads(Fixed(9.0), 7) == machine.ThreadChoice(7, "OMP_NUM_THREADS")


def test_only_the_work_of_others_on_this_process_s_processors_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stat, ticks = tmp_path / "stat", os.sysconf("SC_CLK_TCK")

    def tell(*busy: float) -> None:
        rows = [f"cpu{n} {round(b * ticks)} 0 0 99 99 0 0 0 0 0" for n, b in enumerate(busy)]
        stat.write_text("\n".join(["cpu 1 2 3 4 5 6 7 8 9 10", *rows, "intr 5"]))

    clock = {"now": 100.0, "own": 10.0}
    monkeypatch.setattr(machine, "_STAT", stat)
    monkeypatch.setattr(machine, "processors", lambda: [1, 2])
    monkeypatch.setattr(time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(machine, "_own_seconds", lambda: clock["own"])
    tell(50.0, 20.0, 30.0, 7.0)
    busy = machine.BusyMeter()
    tell(52.0, 22.0, 31.0, 9.0)  # cpu0 and cpu3 are not ours
    clock.update(now=102.0, own=11.0)
    assert busy.others() == pytest.approx((3.0 - 1.0) / 2.0)
    monkeypatch.setattr(machine, "_STAT", tmp_path / "none")
    monkeypatch.setattr(os, "getloadavg", lambda: (1.7, 0.0, 0.0))
    assert machine.BusyMeter().others() == 1.7


def test_info_and_profile_say_how_many_threads_and_why(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint_cli: Path, tmp_path: Path
) -> None:
    from PIL import Image

    monkeypatch.setattr(
        params, "use_threads", lambda: machine.ThreadChoice(1, "of 2 processors 1.0 are busy with other work")
    )
    model = ["--model", str(tiny_checkpoint_cli)]
    found = json.loads(CliRunner().invoke(main, ["info", "--json", *model]).stdout)
    assert (found["threads"], found["why_threads"]) == (1, "of 2 processors 1.0 are busy with other work")
    Image.new("RGB", (32, 32)).save(tmp_path / "in.png")
    words = ["profile", str(tmp_path / "in.png"), "--prompt", "x", "--method", "sdedit", "--steps", "1", "--runs", "1"]
    assert "threads: 1 (of 2 processors" in CliRunner().invoke(main, [*words, *model]).stdout
    assert json.loads(CliRunner().invoke(main, [*words, *model, "--json"]).stdout)["threads"] == 1


STUCK = """
import numpy, sys
from iedit.runtime.cli.live import live_progress
a = numpy.ones((9000, 9000))
with live_progress("x"):
    print("ready", flush=True)
    for _ in range(20):
        a @ a  # many seconds in one operation, which no signal interrupts
print("finished")
"""


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_a_command_that_is_inside_one_long_operation(root: Path, times: int) -> None:
    environment = os.environ | {"PYTHONPATH": str(root / ".types"), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", STUCK], env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) as running:  # fmt: skip
        assert running.stdout is not None and running.stdout.readline() == "ready\n"
        time.sleep(0.3)  # into the operation
        for _ in range(times):
            os.kill(running.pid, signal.SIGINT)
            time.sleep(0.05)
        out, err = running.communicate(timeout=30)
    assert running.returncode == 1
    assert (out, err.split()) == ("", ["loading", "x", "Aborted!"])


def test_a_block_that_is_left_in_time_is_not_ended(root: Path) -> None:
    code = """
import time
from iedit.runtime.cli.live import prompt_interrupts
try:
    with prompt_interrupts(0.2):
        print("ready", flush=True)
        time.sleep(30)
except KeyboardInterrupt:
    time.sleep(0.6)
    print("cleaned up")
"""
    environment: Any = os.environ | {"PYTHONPATH": str(root / ".types")}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, stdout=subprocess.PIPE,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) as running:  # fmt: skip
        assert running.stdout is not None and running.stdout.readline() == "ready\n"
        os.kill(running.pid, signal.SIGINT)
        out, _ = running.communicate(timeout=30)
    assert (running.returncode, out) == (0, "cleaned up\n")


@pytest.mark.parametrize("command", ["edit", "mask", "profile", "replay", "demo"])
def test_what_is_loaded_is_said_before_the_libraries_are(root: Path, tmp_path: Path, command: str) -> None:
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "in.png")
    words = {"replay": ["in.png"], "demo": []}.get(command, ["in.png", "--prompt", "x"])
    code = f"""
import click, sys
def echo(text, err=False):
    print(text, err, sorted({{"torch", "diffusers", "transformers"}} & set(sys.modules)))
    sys.exit()
click.echo = echo
from iedit.runtime.cli.main import main
main(prog_name="iedit", args={[command, *words]!r})
"""
    environment = os.environ | {"PYTHONPATH": str(root / ".types")}
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    wanted = "the model" if command == "replay" else "picturebook"
    assert out.stdout == f"loading {wanted} True []\n", out.stderr


@pytest.mark.parametrize(
    ("features", "able"),
    [
        ({}, {torch.float32}),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, {torch.float32}),
        ({"avx512_bf16": True}, {torch.float32, torch.bfloat16}),
        ({"amx_bf16": True, "amx_fp16": True}, {torch.float32, torch.bfloat16, torch.float16}),
        ({"avx512_fp16": True}, {torch.float32, torch.float16}),
        ({"neon": True, "bf16": True}, {torch.float32, torch.bfloat16}),
    ],
)
def test_a_dtype_has_arithmetic_where_the_processor_has_the_instructions(
    features: dict[str, bool], able: set[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "features", lambda: features)
    assert {d for d in (torch.float32, torch.float16, torch.bfloat16) if machine.has_arithmetic(d)} == able
    assert (machine.training_dtype() is torch.bfloat16) == (torch.bfloat16 in able)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_half_without_arithmetic_becomes_float32_with_a_note_unless_emulation_is_asked_for(
    tiny_checkpoint_cli: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(machine, "features", lambda: {"avx2": True})
    model = load_model(str(tiny_checkpoint_cli), [], device="cpu", dtype=dtype)
    assert model.dtype == next(model.unet.parameters()).dtype == torch.float32
    assert model.notes == (f"this processor has no arithmetic for {dtype}: float32 was used, which is faster",)
    emulated = load_model(str(tiny_checkpoint_cli), [], device="cpu", dtype=dtype, emulate=True)
    assert emulated.dtype == next(emulated.unet.parameters()).dtype == getattr(torch, dtype)
    assert emulated.notes == ()


def test_a_half_with_arithmetic_is_used_as_asked(tiny_checkpoint_cli: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "features", lambda: {"amx_bf16": True, "amx_fp16": True})
    for dtype in ("float16", "bfloat16"):
        model = load_model(str(tiny_checkpoint_cli), [], device="cpu", dtype=dtype)
        assert (str(model.dtype), model.notes) == (f"torch.{dtype}", ())


def test_an_edit_in_a_half_without_arithmetic_says_so_on_stderr_and_in_its_receipt(
    tiny_checkpoint_cli: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from iedit.runtime.images import read_receipt

    monkeypatch.setattr(machine, "features", lambda: {"avx2": True})
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32), "green").save("in.png")
    words = ["edit", "in.png", "--prompt", "a red car", "--model", str(tiny_checkpoint_cli), "--steps", "1"]
    result = CliRunner().invoke(main, [*words, "--method", "sdedit", "--device", "cpu", "--dtype", "float16"])
    assert result.exit_code == 0, result.output
    assert "note: this processor has no arithmetic for float16" in result.stderr
    receipt = read_receipt("in-edited.png")
    assert receipt["model"]["dtype"] == "float32"
    assert any("no arithmetic for float16" in note for note in receipt["notes"])


def test_info_says_what_the_processor_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "features", lambda: {"avx512_bf16": True})
    said = machine.describe_processor()
    assert said == "computes in float32, bfloat16; no arithmetic for float16, so float32 is used in their place"
    assert said in " ".join(CliRunner().invoke(main, ["info", "--json"]).stdout.split())
