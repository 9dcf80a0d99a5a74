"""Programs in processes of their own that need not import torch, diffusers and transformers first, which takes ten seconds of each process.

One process is started that does these imports and nothing else, and every program is forked from it. That is a process like any other: it
has its own memory and signals, it can be killed, and this repository's own modules are still imported in it.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkServerContext
from pathlib import Path

# What loading a checkpoint imports, by its real name: `diffusers` itself imports it only when it is asked for.
IMPORTED = ("diffusers.models.autoencoders.autoencoder_kl", "diffusers.models.controlnets.controlnet", "diffusers.models.unets.unet_2d_condition",
            "diffusers.schedulers", "transformers.models.clip.modeling_clip", "transformers.models.clip.tokenization_clip", "accelerate")  # fmt: skip

# What a new interpreter does. It is run by `exec`, as the process could not import this module.
_BEGIN = """
import os, signal, sys
if session:
    os.setsid()
for number, pipe in ((1, out), (2, err)):
    os.dup2(pipe.fileno(), number)
    pipe.close()
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.clear()
os.environ.update(environment)
os.chdir(folder)
sys.path[:0] = path
sys.argv[:] = words
exec(compile(code, words[0], "exec"), {"__name__": "__main__"})
"""


def context() -> ForkServerContext:
    """What starts processes that find the imports done."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(list(IMPORTED))
    return made


class Program:
    """A program that was started: `python -c CODE WORD...` in the current folder, with SIGINT at its default.

    Args:
        code: the program.
        words: its arguments.
        environment: all of its variables.
        path: folders in which it finds modules first.
        session: begin a session, so that a signal to its group reaches only it and the processes that it starts.

    Attributes:
        pid: of its process.
        stdout, stderr: what it writes, as text.
    """

    def __init__(
        self,
        code: str,
        words: Sequence[object] = (),
        environment: Mapping[str, str] = os.environ,
        path: Sequence[Path] = (),
        session: bool = False,
    ) -> None:
        starter = context()
        (out, to_out), (err, to_err) = starter.Pipe(duplex=False), starter.Pipe(duplex=False)
        given = {"code": code, "words": ["-c", *map(str, words)], "environment": dict(environment), "folder": os.getcwd(),
                 "path": [str(p) for p in path], "session": session, "out": to_out, "err": to_err}  # fmt: skip
        self._process = starter.Process(target=exec, args=(_BEGIN, given))
        self._process.start()
        for pipe in (to_out, to_err):
            pipe.close()
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        self.stdout, self.stderr = (os.fdopen(os.dup(p.fileno()), encoding="utf-8") for p in (out, err))

    @property
    def returncode(self) -> int | None:
        """The exit code, or a signal's number with a minus; None while it runs."""
        return self._process.exitcode

    def finish(self, timeout: float = 120) -> tuple[str, str]:
        """Wait for its end; what it wrote to stdout and to stderr and was not read yet. It is killed if that takes longer than `timeout`."""
        with ThreadPoolExecutor(2) as pool:
            said = [pool.submit(file.read) for file in (self.stdout, self.stderr)]
            self._process.join(timeout)
            late = self._process.exitcode is None
            if late:
                self._process.kill()
                self._process.join()
        for file in (self.stdout, self.stderr):
            file.close()
        assert not late, f"still running after {timeout} seconds"
        return said[0].result(), said[1].result()
