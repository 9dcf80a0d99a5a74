"""Roofline of the kernels: seconds, bytes a second against a copy measured on the same device, launches saved.

    python bench/kernels.py [--device cuda|cpu] [--quick] [--table bench/results.csv | --no-table]

On a GPU each operation runs as Triton kernel and in eager torch; on a CPU (to try the script out) only in eager torch. A row
is written only where the result was compared with float64 just before: within twice the error of one rounding for a kernel.
Bytes moved are those of the module docstrings: every input and output once, nothing for what a cache answers.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results import write_rows
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from iedit.kernels.dispatch import VARIABLE, why_not_triton
from iedit.kernels.geglu import geglu, geglu_reference
from iedit.kernels.group_norm import group_norm, group_norm_reference
from iedit.kernels.guided_step import guided_step, guided_step_reference
from iedit.kernels.ito_step import ito_step, ito_step_reference
from iedit.kernels.mask_map import difference


class Launches(TorchDispatchMode):
    """Counts what eager torch would launch on a GPU, wherever it runs.

    An aten operator is one launch if it makes or changes a tensor's values: everything but views and metadata (its result
    shares an argument's memory and the schema says nothing is written) and allocations. A lower bound: a reduction may
    take two.
    """

    NOTHING = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view", "aten::alias")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        returns = any("Tensor" in str(r.type) for r in schema.returns)
        if (schema.is_mutable or (returns and not view)) and not schema.name.startswith(self.NOTHING):
            self.names.append(schema.name)
        return func(*args, **(kwargs or {}))


def autograd_update(
    y: Tensor, x: Tensor, g: Tensor, mask: Tensor, lam: Tensor, k: int = 1, update: str = "clipped"
) -> Tensor:
    """k steps of the ITO update as one would write it first: autograd, then a clipped step or torch.optim.Adam. Shapes as in
    `ito_step`."""
    leaf = y.detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([leaf], lr=0.1, foreach=False)
    for _ in range(k):
        optimiser.zero_grad()
        rec = (((1 - mask) * (leaf - x)) ** 2).mean((1, 2, 3))
        cosine = 1 - F.cosine_similarity(leaf.flatten(1), g.flatten(1), eps=0)
        ((1 - lam) * cosine + lam * rec).sum().backward()
        if update == "adam":
            optimiser.step()
        else:
            assert leaf.grad is not None
            with torch.no_grad():
                leaf -= (leaf.grad * (leaf[0].numel() / 2)).clamp(-0.1, 0.1)
    return leaf.detach()


@dataclass(frozen=True)
class Case:
    """One operation on one set of inputs.

    Attributes:
        run: what is measured.
        exact: the same in float64.
        moved: bytes.
        eager: what it replaces, where that is more than `run` without Triton.
    """

    name: str
    shape: str
    run: Callable[[], Tensor]
    exact: Callable[[], Tensor]
    moved: int
    eager: Callable[[], Tensor] | None = None
    eager_variant: str = "autograd"


def cases(device: torch.device, dtype: torch.dtype, batch: int, side: int) -> list[Case]:
    """The operations of an edit at latents (batch, 4, side, side)."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 4, side, side)
    y, x, g, u, r = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(5))
    mask = torch.rand(batch, 1, side, side, generator=generator).to(device)
    lam, half = torch.full((batch,), 0.6, device=device), torch.full((batch,), 0.5, device=device)
    label, latent, masks = "x".join(map(str, shape)), y.numel() * y.element_size(), mask.numel() * 4
    wide = [t.double() for t in (y, x, g, u, r, mask, lam, half)]
    made = []
    for update, k in (("clipped", 1), ("clipped", 30), ("adam", 1), ("adam", 30)):
        # k=1: y and g twice, x, mask, result. More: the float64 value, and Adam's moments, read and written every step (the
        # first step reads no moments), value and g again for the sums, x and the mask.
        scratch, moments = 8 * y.numel(), 4 if update == "adam" else 0
        many = latent * 3 + scratch + k * (scratch * (3 + moments) + latent * 3 + masks) - scratch * (moments // 2)
        rule: dict[str, Any] = {"update": update, "k": k}
        made.append(
            Case(
                f"ito_step {update} k={k}",
                label,
                lambda rule=rule: ito_step(y, x, g, mask, lam, **rule),  # type: ignore[misc]
                lambda rule=rule: ito_step_reference(*wide[:3], *wide[5:7], **rule),  # type: ignore[misc]
                6 * latent + masks if k == 1 else many,
                lambda rule=rule: autograd_update(y.float(), x.float(), g.float(), mask, lam, **rule),  # type: ignore[misc]
            )
        )
    made.append(
        Case(
            "guided_step",
            label,
            lambda: guided_step(y, x, g, 7.5, half, half, mask=mask, reference=r),
            lambda: guided_step_reference(*wide[:3], 7.5, wide[7], wide[7], mask=wide[5], reference=wide[4]),
            5 * latent + masks,
        )
    )
    a, b = (torch.randn(batch, 10, *shape[1:], generator=generator).to(device, dtype) for _ in range(2))
    made.append(
        Case(
            "difference of 10 seeds",
            label,
            lambda: difference(a, b),
            lambda: (a.double() - b.double()).abs().mean((1, 2))[:, None],
            2 * a.numel() * a.element_size() + masks,
        )
    )
    return made


def network_cases(device: torch.device, dtype: torch.dtype, batch: int, side: int) -> list[Case]:
    """What the UNet of SD 1.5 does at its first level for latents (batch, 4, side, side): a norm as a residual block has it, and a gate."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 320, side, side)
    x = torch.randn(shape, generator=generator).to(device, dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, 320, generator=generator).to(device, dtype)
    shift = torch.randn(shape[:2], generator=generator).to(device, dtype)
    wide = [t.double() for t in (weight, bias, shift)]
    gate = torch.randn(batch, side * side, 2560, generator=generator).to(device, dtype)
    size = x.element_size()

    def eager_norm() -> Tensor:
        return F.silu(F.group_norm(x + shift[:, :, None, None], 32, weight, bias, 1e-5))

    def eager_gate() -> Tensor:
        value, other = gate.chunk(2, dim=-1)
        return value * F.gelu(other)

    return [
        Case(
            "group_norm + shift + silu",
            "x".join(map(str, shape)),
            lambda: group_norm(x, 32, weight, bias, 1e-5, shift=shift, silu=True),
            lambda: group_norm_reference(x.double(), 32, wide[0], wide[1], 1e-5, wide[2], True),
            2 * x.numel() * size,
            eager_norm,
            "eager modules",
        ),
        Case("geglu", "x".join(map(str, gate.shape)), lambda: geglu(gate), lambda: geglu_reference(gate.double()), gate.numel() * 3 // 2 * size,
             eager_gate, "eager modules"),
    ]  # fmt: skip


def timings(run: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Seconds of `repeats` runs after two that warm up, sorted; on CUDA by events, each run with a cold L2 cache."""
    cold = torch.empty(256 << 20, dtype=torch.int8, device=device) if device.type == "cuda" else None
    seconds_of = []
    for i in range(repeats + 2):
        if cold is not None:
            cold.zero_()
            torch.cuda._sleep(
                500_000
            )  # a quarter of a millisecond, so that the launches are queued before the clock starts
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            run()
            events[1].record()
            events[1].synchronize()
            seconds = events[0].elapsed_time(events[1]) / 1e3
        else:
            began = time.perf_counter()
            run()
            seconds = time.perf_counter() - began
        if i >= 2:
            seconds_of.append(seconds)
    return sorted(seconds_of)


def copy_bandwidth(device: torch.device, repeats: int, size: int) -> float:
    """Bytes a second, read and written, of torch's copy of `size` bytes: the ceiling that the fractions are of."""
    a = torch.ones(size, dtype=torch.int8, device=device)
    b = torch.empty_like(a)
    return 2 * size / timings(lambda: b.copy_(a), device, repeats)[repeats // 2]


def measure(
    case: Case, variant: str, dtype: torch.dtype, device: torch.device, repeats: int, ceiling: float
) -> dict[str, Any]:
    """One row of the table.

    Raises:
        SystemExit: a kernel's result is not within twice the error of rounding the exact one once.
    """
    run = case.eager if variant == case.eager_variant and case.eager is not None else case.run
    exact, got = case.exact(), run()
    error = float((got.double() - exact).abs().max())
    bound = 2 * float((exact.to(got.dtype).double() - exact).abs().max())
    if variant == "Triton" and not error <= bound:
        sys.exit(f"{case.name} {case.shape} {dtype}: error {error:.3g}, allowed {bound:.3g}; no row was written")
    if variant == "Triton":
        launches = 1
    else:
        with Launches() as counted:
            run()
        launches = len(counted.names)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = timings(run, device, repeats)
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0
    p20, p50, p80 = (seconds[int(q * (len(seconds) - 1))] for q in (0.2, 0.5, 0.8))
    speed = case.moved / p50
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "name": f"kernels/{case.name}",
        "variant": variant,
        "shape": case.shape,
        "dtype": str(dtype).removeprefix("torch."),
        "p20": f"{p20 * 1e6:.1f}",
        "p50": f"{p50 * 1e6:.1f}",
        "p80": f"{p80 * 1e6:.1f}",
        "unit": "us",
        "peak_mib": round(peak),
        "evaluations": 0,
        "quality": f"{speed / 1e9:.1f} GB/s needed bytes, {speed / ceiling:.3f} of copy; {launches} launches; "
        f"max error {error:.2g}, one rounding {bound / 2:.2g}",
        "device": where,
        "versions": f"torch {torch.__version__}",
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="operations whose names begin so")
    parser.add_argument("--quick", action="store_true", help="one small shape, float32, few repeats: does it run?")
    parser.add_argument(
        "--variants", default="Triton,eager closed form,eager modules,autograd", help="some of these, by comma"
    )
    parser.add_argument("--table", type=Path, default=Path(__file__).parent / "results.csv")
    parser.add_argument("--no-table", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    on_gpu = not why_not_triton(torch.empty(1, device=device))
    repeats = 3 if options.quick else 50 if device.type == "cuda" else 10
    ceiling = copy_bandwidth(device, repeats, (1 << 30) if device.type == "cuda" else (16 << 20))
    print(f"{device}: copy {ceiling / 1e9:.1f} GB/s")
    if options.quick:
        dtypes, sizes = [torch.float32], [(1, 16)]
    else:
        dtypes, sizes = (
            [torch.float32, torch.float16, torch.bfloat16],
            [(1, 64), (8, 64), (1, 128), (8, 128), (64, 128)],
        )
    rows = 0
    for dtype in dtypes:
        for batch, side in sizes:
            networks = dtype != torch.float32 and side == 64  # those kernels are of networks in a half
            for case in cases(device, dtype, batch, side) + (
                network_cases(device, dtype, batch, side) if networks else []
            ):
                others = ("eager closed form", *((case.eager_variant,) if case.eager is not None else ()))
                for variant in (*(("Triton",) if on_gpu else ()), *others):
                    if variant not in options.variants.split(",") or not case.name.startswith(options.only):
                        continue
                    os.environ[VARIABLE] = "triton" if variant == "Triton" else "reference"
                    row = measure(case, variant, dtype, device, repeats, ceiling)
                    print(
                        *(f"{row[c]}" for c in ("name", "variant", "shape", "dtype", "p50", "unit", "quality")),
                        sep="  ",
                    )
                    rows += 1
                    if not options.no_table:
                        write_rows(options.table, [row])  # as it is measured: a run that is cut off keeps what it has
    os.environ.pop(VARIABLE, None)
    if not options.no_table:
        print(f"{options.table}: {rows} rows added")


if __name__ == "__main__":
    main()
