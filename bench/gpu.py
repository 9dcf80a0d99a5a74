"""What only a GPU can show, step by step, on a machine where nothing is installed for it.

    bench/gpu.sh                     every step that can run, in order
    bench/gpu.sh kernels edit        these steps
    bench/gpu.sh --rehearse          the same on a CPU with small sizes: does everything start?

A step that needs what is not there is not run, and one that fails or takes longer than its budget does not keep the others from running.
Rows go to bench/results.csv as they are measured. A step that was finished at this commit is not run again (--again does). The last
lines say what ran, what was not run and why, and what fell short of its aim. Exit code 1: a step failed.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import importlib.util
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "rich",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "xformers",
)
NETWORKS = ("diffusers", "transformers", "accelerate", "rich")

Row = Mapping[str, str]


def _number(pattern: str, text: str) -> float | None:
    found = re.search(pattern, text)
    return None if found is None else float(found[1])


def kernel_aim(row: Row) -> str:
    """A kernel moves its bytes at 0.8 of the speed of a copy; small ones are bound by their launch."""
    share = _number(r"([\d.]+) of copy", row["quality"])
    large = row["shape"].startswith("64x")  # 17 MB a latent in float32
    return (
        f"{share} of a copy, aim 0.8"
        if row["variant"] == "Triton" and large and share is not None and share < 0.8
        else ""
    )


def edit_aim(row: Row) -> str:
    """An edit of 512x512 takes 0.8 s at most, a fourth of the plain composition, and spends 3 % outside the networks."""
    if row["shape"] != "512x512" or row["variant"].split(",")[0] not in ("torch", "graphs", "compile"):
        return ""
    ratio, outside = _number(r"naive / this ([\d.]+)", row["quality"]), _number(r"([\d.]+)% outside", row["quality"])
    short = [f"{float(row['p50']):.2f} s, aim 0.8"] if float(row["p50"]) > 0.8 else []
    short += [f"{ratio} times naive, aim 4"] if ratio is not None and ratio < 4 else []
    short += [f"{outside} % outside the networks, aim 3"] if outside is not None and outside > 3 else []
    return "; ".join(short)


def memory_aim(row: Row) -> str:
    """A fine-tuning step of the paper's setting fits 16 GB."""
    both = row["variant"].startswith("checkpointing, ")
    return f"{row['peak_mib']} MiB, aim 15258 (16 GB)" if both and float(row["peak_mib"]) > 16e9 / 2**20 else ""


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Attributes:
        name: of the step; its log is build/gpu/NAME.log.
        needs: modules without which it is not run.
        commands: what runs, one after the other, each by this interpreter. `{table}` is the file of rows.
        rehearsal: what runs in their place on a CPU.
        minutes: its budget.
        aim: what of a row falls short; "" if nothing does.
    """

    name: str
    needs: tuple[str, ...]
    commands: tuple[str, ...]
    rehearsal: tuple[str, ...]
    minutes: float
    aim: Callable[[Row], str] = lambda row: ""


_EDIT = "bench/edit.py --model sd15-random --keep build/gpu/sd15 --device cuda --dtype {dtype} --size 512 --edits 1 --rounds 10 --skip-missing --output {{table}} --backends "
_SMALL = "bench/edit.py --model picturebook --device cpu --size 128 --edits 1 --rounds 1 --steps 4 --skip-missing --output {table} --backends "
_KERNEL_TESTS = "tests/test_kernels_gpu.py tests/test_ito_step.py tests/test_guided_step.py tests/test_mask_map.py tests/test_group_norm.py tests/test_geglu.py"
# Only the files that have one: importing the others takes ten seconds.
_GPU_TESTS = " ".join(
    sorted(f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text())
)
STEPS = (
    Step("kernel-tests", ("triton", "pytest"), (f"-m pytest -q -m gpu {_KERNEL_TESTS}",),
         ("-m pytest -q -x tests/test_guided_step.py -k reference",), 5),
    Step("tests", ("pytest",), (f"-m pytest -q -m gpu {_GPU_TESTS}",), (f"-m pytest -q --collect-only -m gpu {_GPU_TESTS}",), 8),
    Step("kernels", ("triton",), ("bench/kernels.py --device cuda --table {table}",), ("bench/kernels.py --device cpu --quick --table {table}",), 8, kernel_aim),
    Step("edit", NETWORKS, (_EDIT.format(dtype="bfloat16") + "torch,graphs,graphs+channels-last --presets fast,faster",),
         (_SMALL + "torch,torch+channels-last --presets faster --together 2",), 10, edit_aim),
    Step("edit-compile", NETWORKS, (_EDIT.format(dtype="bfloat16") + "compile --no-diffusers",), (_SMALL + "torch --no-diffusers",), 10, edit_aim),
    Step("edit-float16", NETWORKS, (_EDIT.format(dtype="float16") + "torch,graphs+channels-last --no-diffusers",), (_SMALL + "torch --no-diffusers",), 10, edit_aim),
    Step("edit-xformers", (*NETWORKS, "xformers"), (_EDIT.format(dtype="float16") + "xformers --no-diffusers",), (_SMALL + "torch --no-diffusers",), 6, edit_aim),
    Step("onnx", (*NETWORKS, "onnx", "onnxscript", "onnxruntime"),
         ("-m iedit.runtime.cli.main export onnx picturebook", "bench/edit.py --model picturebook --device cuda --size 128 --backends torch,onnx --rounds 3 --edits 2 "
          "--skip-missing --no-diffusers --output {table}"),
         ("-m iedit.runtime.cli.main export onnx --help",), 8),
    Step("tensorrt", (*NETWORKS, "onnx", "onnxscript", "tensorrt"),
         ("-m iedit.runtime.cli.main export tensorrt picturebook", "bench/edit.py --model picturebook --device cuda --size 128 --backends torch,tensorrt --rounds 3 "
          "--edits 2 --skip-missing --no-diffusers --output {table}"),
         ("-m iedit.runtime.cli.main export tensorrt --help",), 10),
    Step("training-memory", NETWORKS, ("bench/training_memory.py step {table}",), ("bench/training_memory.py count {table}",), 8, memory_aim),
)  # fmt: skip


def absent(modules: Sequence[str]) -> list[str]:
    """Those that are not installed."""
    return [m for m in modules if importlib.util.find_spec(m) is None]


def rows_of(table: Path) -> list[dict[str, str]]:
    if not table.is_file():
        return []
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def run(step: Step, commands: Sequence[str], table: Path, log: Path) -> str:
    """Run a step, its output to the terminal and to `log`; "" or what went wrong."""
    end = time.monotonic() + 60 * step.minutes
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT / ".types"), os.environ.get("PYTHONPATH")))),
        "TOKENIZERS_PARALLELISM": "false",
        "IEDIT_SKIP_MISSING": "1",
    }
    environment.setdefault("OMP_NUM_THREADS", "1")
    with log.open("w") as file:
        for command in commands:
            words = [sys.executable, *(w.format(table=table) for w in command.split())]
            print("$", *words[1:], flush=True)
            with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                  errors="replace", start_new_session=True) as process:  # fmt: skip
                assert process.stdout is not None
                killer = threading.Timer(max(0.0, end - time.monotonic()), os.killpg, (process.pid, signal.SIGKILL))
                killer.start()
                try:
                    for line in process.stdout:
                        print(line, end="", flush=True)
                        file.write(line)
                except KeyboardInterrupt:
                    os.killpg(process.pid, signal.SIGKILL)
                    raise
                finally:
                    killer.cancel()
            if process.returncode == 5 and "pytest" in command:
                continue  # every test was left out: that is said, and no failure
            if process.returncode:
                late = time.monotonic() >= end
                return (
                    f"took longer than its {step.minutes:g} minutes"
                    if late
                    else f"failed with exit code {process.returncode} ({log})"
                )
    return ""


def describe() -> str:
    """The machine in lines: interpreter, packages, device."""
    lines = [f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} is not installed")
    return "\n".join(lines)


def cuda() -> str:
    """The GPU's name; "" without one."""
    if absent(["torch"]):
        return ""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def commit() -> str:
    """What a finished step is remembered for; "" outside of a checkout, where nothing is."""
    words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def main(arguments: list[str] | None = None) -> int:
    known = [s.name for s in STEPS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(known)}; default all")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, small, rows thrown away")
    parser.add_argument("--again", action="store_true", help="also steps that were finished at this commit")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "gpu", help="logs, and what was finished (default build/gpu)"
    )
    options = parser.parse_args(arguments)
    wrong = [s for s in options.steps if s not in known]
    if wrong:
        parser.error(f"{wrong[0]} is not a step; give some of {', '.join(known)}")
    print(describe())
    device = cuda()
    print(f"CUDA device: {device or 'none'}")
    options.work.mkdir(parents=True, exist_ok=True)
    table = options.work / "rehearsal.csv" if options.rehearse else ROOT / "bench" / "results.csv"
    done, left_out, failed, short = list[str](), list[str](), list[str](), list[str]()
    for step in STEPS:
        if options.steps and step.name not in options.steps:
            continue
        stamp = options.work / f"{step.name}-{commit()}{'-rehearsal' if options.rehearse else ''}.done"
        gone = absent(step.needs)
        if not device and not options.rehearse:
            left_out.append(f"{step.name} (no CUDA device)")
        elif gone:
            left_out.append(f"{step.name} ({', '.join(gone)} not installed)")
        elif stamp.exists() and commit() and not options.again:
            done.append(f"{step.name} (before)")
        else:
            print(f"--- {step.name}, at most {step.minutes:g} minutes", flush=True)
            before, began = len(rows_of(table)), time.monotonic()
            problem = run(
                step, step.rehearsal if options.rehearse else step.commands, table, options.work / f"{step.name}.log"
            )
            if problem:
                failed.append(f"{step.name} {problem}")
            else:
                done.append(f"{step.name} ({time.monotonic() - began:.0f} s)")
                stamp.touch()
            for row in rows_of(table)[before:]:
                if words := step.aim(row):
                    short.append(f"{row['name']} {row['variant']} {row['shape']} {row['dtype']}: {words}")
    for title, some in (("ran", done), ("not run", left_out), ("failed", failed), ("fell short", short)):
        print(f"{title}: {'; '.join(some) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
