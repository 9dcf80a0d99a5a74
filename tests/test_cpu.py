"""The processor is asked which dtypes it computes in, and what is asked for beyond that is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from iedit.runtime import cpu
from iedit.runtime.cli.main import main
from iedit.runtime.model.model import load_model


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
    monkeypatch.setattr(cpu, "features", lambda: features)
    assert {d for d in (torch.float32, torch.float16, torch.bfloat16) if cpu.has_arithmetic(d)} == able
    assert (cpu.training_dtype() is torch.bfloat16) == (torch.bfloat16 in able)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_half_without_arithmetic_becomes_float32_with_a_note_unless_emulation_is_asked_for(
    tiny_checkpoint_cli: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(cpu, "features", lambda: {"avx2": True})
    model = load_model(str(tiny_checkpoint_cli), [], device="cpu", dtype=dtype)
    assert model.dtype == next(model.unet.parameters()).dtype == torch.float32
    assert model.notes == (f"this processor has no arithmetic for {dtype}: float32 was used, which is faster",)
    emulated = load_model(str(tiny_checkpoint_cli), [], device="cpu", dtype=dtype, emulate=True)
    assert emulated.dtype == next(emulated.unet.parameters()).dtype == getattr(torch, dtype)
    assert emulated.notes == ()


def test_a_half_with_arithmetic_is_used_as_asked(tiny_checkpoint_cli: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "features", lambda: {"amx_bf16": True, "amx_fp16": True})
    for dtype in ("float16", "bfloat16"):
        model = load_model(str(tiny_checkpoint_cli), [], device="cpu", dtype=dtype)
        assert (str(model.dtype), model.notes) == (f"torch.{dtype}", ())


def test_an_edit_in_a_half_without_arithmetic_says_so_on_stderr_and_in_its_receipt(
    tiny_checkpoint_cli: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from iedit.runtime.images import read_receipt

    monkeypatch.setattr(cpu, "features", lambda: {"avx2": True})
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
    monkeypatch.setattr(cpu, "features", lambda: {"avx512_bf16": True})
    said = cpu.describe()
    assert said == "computes in float32, bfloat16; no arithmetic for float16, so float32 is used in their place"
    assert said in " ".join(CliRunner().invoke(main, ["info", "--json"]).stdout.split())
