"""Triton kernels without a GPU: in the interpreter (a process of its own), and compiled ahead of time for four chips."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from iedit.kernels.dispatch import on_device_of

triton = pytest.importorskip("triton", reason="Triton has wheels for Linux only")

HERE = Path(__file__).parent
# Shared memory of one block, bytes: the compiler does not check it.
BETAS = [struct.unpack("<Q", struct.pack("<d", beta))[0] for beta in (0.9, 0.999)]
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}


def test_the_kernels_match_float64_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted.py")]
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)


def _kernels() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    from iedit.kernels import geglu_triton as geglu
    from iedit.kernels import group_norm_triton as norm
    from iedit.kernels import guided_step_triton as guided
    from iedit.kernels import ito_step_triton as ito
    from iedit.kernels import mask_map_triton as mask

    found = []
    for kind in ("fp32", "fp16", "bf16"):
        p = f"*{kind}"
        shared = {"y_ptr": p, "x_ptr": p, "g_ptr": p, "m_ptr": "*fp32", "lam_ptr": "*fp32", "out_ptr": p, "lr": "fp32", "lr_rest": "fp32",
                  "n": "i32", "hw": "i32", "channels": "i32"}  # fmt: skip
        scratch = {"value_ptr": "*fp64", "first": "i32", "k": "i32"}
        for on in (True, False):
            for clipped in (True, False):
                constants = {"GUIDED": on, "KEPT": on, "CLIPPED": clipped, "BLOCK": ito.BLOCK}
                found.append((f"once-{kind}-{on}-{clipped}", ito.ito_step_once, shared, constants, ito.WARPS))
            for rule, clipped, carried, state in (("carried", False, True, "*fp32"), ("adam", False, False, "*fp64"),
                                                  ("clipped", True, False, "*fp64")):  # fmt: skip
                names = shared | scratch | {"mean_ptr": state, "square_ptr": state}
                constants = {"GUIDED": on, "KEPT": on, "CLIPPED": clipped, "CARRIED": carried, "BLOCK": ito.BLOCK_MANY}
                found.append((f"many-{kind}-{on}-{rule}", ito.ito_step_many, names, constants, ito.WARPS))
        names = dict.fromkeys(("x_ptr", "cond_ptr", "uncond_ptr", "ref_ptr", "noise_ptr", "out_ptr"), p)
        names |= dict.fromkeys(("cx_ptr", "cout_ptr", "m_ptr", "target_ptr"), "*fp32")
        names |= {"scale": "fp32", "n": "i32", "hw": "i32"}
        constants = {"GUIDED": True, "MASKED": True, "NOISED": True, "BLOCK": guided.BLOCK}
        found.append((f"guided-{kind}", guided.guided_step_kernel, names, constants, 4))
        names = dict.fromkeys(("x_ptr", "shift_ptr", "weight_ptr", "bias_ptr", "out_ptr"), p)
        names |= {"moments_ptr": "*fp32", "eps": "fp32", **dict.fromkeys(("channels", "hw", "parts"), "i32")}
        for width, rows, parts in (
            (10, 512, 8),
            (20, 256, 4),
            (40, 256, 1),
            (80, 64, 1),
            (4, 2048, 128),
        ):  # of SD 1.5 and its VAE
            lanes = 1 << (width - 1).bit_length()
            tile = {"SHIFTED": True, "WIDTH": width, "LANES": lanes, "ROWS": rows}
            label, warps = f"{kind}-{width}-{rows}", norm.warps(rows * lanes)
            if parts > 1:
                found.append((f"moments-{label}", norm.moments_kernel, names, tile, warps))
            found.append(
                (f"normalise-{label}", norm.normalise_kernel, names, tile | {"SILU": True, "PARTS": parts}, warps)
            )
        found.append(
            (f"geglu-{kind}", geglu.geglu_kernel, {"x_ptr": p, "out_ptr": p, "n": "i32"}, {"BLOCK": geglu.BLOCK}, 4)
        )
    names = {"a_ptr": "*fp32", "b_ptr": "*fp32", "out_ptr": "*fp32", "planes": "i32", "hw": "i32"}
    found.append(("difference", mask.difference_kernel, names, {"BLOCK": mask.BLOCK}, 4))
    names = {"heat_ptr": "*fp32", "weight_ptr": "*fp32", "scratch_ptr": "*fp32", "out_ptr": "*fp32", "threshold": "fp32",
             "h": "i32", "w": "i32"}  # fmt: skip
    for clamp in (True, False):
        found.append(
            (f"threshold-{clamp}", mask.threshold_kernel, names, {"RADIUS": 3, "CLAMP": clamp, "BLOCK": mask.BLOCK}, 4)
        )
    return found


@pytest.mark.parametrize("chip", [80, 89, 90, 100])
def test_every_kernel_compiles_for_the_chip_without_a_spill(chip: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    spills = {}
    for label, kernel, signature, constants, warps in _kernels():
        names = kernel.arg_names
        # Without divisibility the compiler makes unvectorised code, which is not what runs.
        wide = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr") or n in ("n", "hw")}
        source = ASTSource(
            kernel,
            {n: signature.get(n, "constexpr") for n in names},
            constants,
            wide,
        )
        made = triton.compile(source, target=GPUTarget("cuda", chip, 32), options={"num_warps": warps})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            report = subprocess.run([str(reader), "-res-usage", file.name], capture_output=True, text=True, check=True)
        found = re.search(r"REG:(\d+) STACK:(\d+)", report.stdout + report.stderr)
        assert found, report.stdout + report.stderr
        if int(found[2]):
            spills[label] = int(found[2])
        assert made.metadata.shared <= SHARED[chip], label
        if label.startswith("many") and not label.endswith("clipped"):
            # Adam's betas as doubles: a constant of Triton's is float32 unless it stands beside a float64
            assert all(f"0x{value:016X}" in made.asm["ptx"].upper().replace("0D", "0x") for value in BETAS), label
    assert not spills


def _launches(node: ast.AST, guarded: bool = False) -> Iterator[tuple[int, bool]]:
    """Line of every `kernel[grid](...)` and whether it stands inside `with on_device_of(...)`."""
    if isinstance(node, ast.With):
        calls = [item.context_expr for item in node.items]
        guarded |= any(isinstance(c, ast.Call) and getattr(c.func, "id", "") == "on_device_of" for c in calls)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
        yield node.lineno, guarded
    for child in ast.iter_child_nodes(node):
        yield from _launches(child, guarded)


def test_every_launch_is_made_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device: tensors of a second GPU would be read through the first one's context."""
    found: dict[str, bool] = {}
    for path in sorted((HERE.parent / "kernels").glob("*_triton.py")):
        launches = list(_launches(ast.parse(path.read_text())))
        assert launches, path
        found |= {f"{path.name}:{line}": guarded for line, guarded in launches}
    assert all(found.values()), found
    entered: list[Any] = []

    def enter(device: torch.device) -> contextlib.AbstractContextManager[None]:
        entered.append(device)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "device", enter)
    second: Any = SimpleNamespace(device=torch.device("cuda:1"))
    with on_device_of(second), on_device_of(torch.zeros(1)):
        assert entered == [torch.device("cuda:1")]
