"""Work in several processes, and rows that are kept as they are done."""

from __future__ import annotations

import csv
import io
import json
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..runtime.errors import RunError, UsageError
from ..runtime.files import write_whole

Row = dict[str, Any]
State = TypeVar("State")
Job = TypeVar("Job")
Result = TypeVar("Result")

_HELD: list[Any] = []  # of a worker: what loads its state, and the state when it is loaded


def spread(
    load: Callable[[], State], work: Callable[[State, Job], Result], jobs: Sequence[Job], processes: int = 1
) -> Iterator[tuple[int, Result]]:
    """Do `work(state, job)` for every job, in this process or in several; (number of the job, result) as they are done.

    Args:
        load: makes the state, once in each process; nothing is loaded where there is no job.
        work, jobs: with more than one process all of these, and the results, must be picklable.
        processes: each computes on its share of the processors.

    Raises:
        RunError: a process was killed. Whatever `load` or `work` raises.
    """
    if not jobs:
        return
    if processes == 1:
        state = load()
        for number, job in enumerate(jobs):
            yield number, work(state, job)
        return
    threads = (
        torch.get_num_threads() if os.environ.get("OMP_NUM_THREADS") else max(1, (os.cpu_count() or 1) // processes)
    )
    pool = ProcessPoolExecutor(min(processes, len(jobs)), multiprocessing.get_context("spawn"), _begin, (load, threads))
    try:
        waiting = {pool.submit(_call, work, job): number for number, job in enumerate(jobs)}
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    except BrokenProcessPool:
        raise RunError(
            "a process was killed, perhaps for memory; the same command goes on, try fewer --processes"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _begin(load: Callable[[], Any], threads: int) -> None:
    """A worker: Ctrl-C ends it without a word, and so does the end of the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    torch.set_num_threads(threads)
    _HELD.append(load)


def _call(work: Callable[[Any, Any], Any], job: Any) -> Any:
    if len(_HELD) == 1:  # here, not in `_begin`: what it raises reaches the caller
        _HELD.append(_HELD[0]())
    return work(_HELD[1], job)


# --- rows ---------------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], empty: Sequence[str] = ()) -> None:
    """Rows to a CSV, whole or not at all.

    Args:
        rows: all with the names of the first, and any of them more.
        empty: the names where there is no row.
    """
    names = list(dict.fromkeys(name for row in rows for name in row)) or list(empty)
    held = io.StringIO(newline="")
    writer = csv.DictWriter(held, names, restval="nan")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, held.getvalue().encode())


def read_rows(path: Path, words: Sequence[str], whole: Sequence[str] = ()) -> list[Row]:
    """Rows of `write_rows`; none if nothing is there.

    Args:
        words, whole: the names that hold text, and whole numbers; all others hold numbers.

    Raises:
        UsageError: it holds something else.
    """
    if not path.exists():
        return []

    def value(name: str, text: str) -> Any:
        return text if name in words else int(text) if name in whole else float(text)

    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{k: value(k, v) for k, v in row.items()} for row in csv.DictReader(file)]
    except (ValueError, TypeError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(
            f"{path}: these are no rows of an evaluation ({error}); remove it, or give another --output"
        ) from None


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """Figures as JSON, NaN and infinity as null, whole or not at all."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(plain(figures), indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Figures of `write_json`, null as NaN; empty if nothing is there."""

    def full(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: full(v) for k, v in value.items()}
        return [full(v) for v in value] if isinstance(value, list) else math.nan if value is None else value

    return full(json.loads(path.read_text())) if path.exists() else {}
