"""Builds iEdit's training pairs from a corpus (iEdit section 3.1), shard by shard, on one machine or on Ray.

Three stages. Each leaves its results in OUT/work, written whole, and what is there is not done again:

1. **read**, for each shard of the corpus: pictures are cut to a square, captioned, and embedded by CLIP.
2. **index**, once: the words of all captions, and an index of all embeddings.
3. **pair**, for each shard: an edit prompt for each caption, the pseudo-target by the mean of source's and prompt's embeddings, difference
   prompts, masks; one shard of `pairs.write_shard`.

Then the manifest is written and OUT/work removed. The stages are in `pair_stages.py`; what a shard's bytes are does not depend on who runs it or in
which order.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ..runtime.errors import RunError, UsageError, first_line
from ..runtime.files import parse_json, write_whole
from . import pair_models, pairs
from .corpus import fingerprint, open_corpus
from .pair_stages import OWN, WORK, forget, kind_of, make_index, most_common, pair_shard, read_shard, result
from .pair_stages import Settings as Settings  # callers of `build` need it
from .pairs import FACTOR, FORMAT, MANIFEST, Manifest, ShardFiles
from .wordnet import WordNet

LOCAL = "local"  # Ray on this machine

Tell = Callable[[str, float, int], object]
"""Called with a stage's name, how many of its shards are done (a fraction of one included), and of how many."""


# --- everything ---------------------------------------------------------------------------------------------------


def build(settings: Settings, ray: str | None = None, tell: Tell = lambda stage, done, of: None) -> Manifest:
    """Build the pairs of a corpus into `settings.out`, or go on with what is there.

    Args:
        ray: None runs here; "local" starts Ray on all cores of this machine; else the address of a cluster.

    Raises:
        UsageError: something that was named is missing or is not what it has to be, or the folder holds something else.
        RunError: no pair could be made, or something could not be written. What was done stays, and the same call goes on from there.
    """
    if settings.size % FACTOR or settings.size < 8 * FACTOR:
        raise UsageError(f"size: {settings.size} is no multiple of {FACTOR} from {8 * FACTOR} on")
    inside = Path(settings.out).resolve()
    if inside.is_relative_to(Path(settings.corpus).resolve()):
        raise UsageError(
            f"out: {settings.out} lies in the corpus, which it would become a part of; choose a folder elsewhere"
        )
    shards = open_corpus(Path(settings.corpus), settings.shard)
    digests = _digests(settings)
    with _locked(Path(settings.out)):
        if (Path(settings.out) / MANIFEST).is_file():
            manifest = pairs.read_manifest(Path(settings.out))
            _check_same(settings, manifest.settings, manifest.digests, digests)
            shutil.rmtree(settings.work, ignore_errors=True)  # what a kill left of it after the manifest was written
            return manifest
        _claim(settings, digests)
        with _runner(settings, ray) as run:
            run(read_shard, "read", len(shards), _done(settings, "read"), tell)
            run(make_index, "index", 1, _done(settings, "index"), tell)
            run(pair_shard, "pair", len(shards), _done(settings, "pair"), tell)
        return _finish(settings, digests, len(shards))


def _digests(settings: Settings) -> dict[str, str]:
    """What is digested before anything is run, which is where a bad name is found."""
    try:
        wordnet = WordNet(Path(settings.wordnet))
        wordnet.singular("cars")
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from None
    found = {"corpus": fingerprint(Path(settings.corpus)), "wordnet": wordnet.digest()}
    for purpose in ("clip", "captions", "masks"):
        name = getattr(settings, purpose)
        if name != OWN or purpose == "clip":
            found[purpose] = pair_models.folder_digest(pair_models.find_model(name, purpose))
    return found


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """The folder, made if it is not there, for this process alone; the lock goes when the process does."""
    import fcntl

    if out.exists() and not out.is_dir():
        raise UsageError(f"out: {out} is a file, expected a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"out: {out} cannot be made ({error.strerror}); choose another folder") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"out: another command is building pairs in {out}; wait for it") from None
        yield
    finally:
        os.close(handle)


def _claim(settings: Settings, digests: Mapping[str, str]) -> None:
    """Begin in an empty folder, or make sure that what was begun there is the same."""
    out, work = Path(settings.out), settings.work
    mine = {"settings": settings.decisive(), "digests": dict(digests)}
    if (work / "settings.json").is_file():
        try:
            begun = parse_json((work / "settings.json").read_text())
            old, old_digests = begun["settings"], begun["digests"]
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(f"out: {work / 'settings.json'} is damaged ({first_line(error)}); remove {out}") from None
        _check_same(settings, old, old_digests, digests)
        for left in (*out.glob(".*.tmp"), *work.glob(".*.tmp")):  # of a process that was killed while it wrote
            left.unlink()
        return
    others = sorted(p.name for p in out.iterdir() if p.name != WORK)
    if others:
        raise UsageError(f"out: {out} holds {others[0]}, which is not of pairs; choose an empty folder")
    work.mkdir(exist_ok=True)
    write_whole(work / "settings.json", (json.dumps(mine, indent=1) + "\n").encode())


def _check_same(
    settings: Settings, old: Mapping[str, Any], old_digests: Mapping[str, str], digests: Mapping[str, str]
) -> None:
    """Raises UsageError where a folder's pairs are of another corpus, other models or other settings."""
    differ = [f"{k} ({old.get(k)}, now {v})" for k, v in settings.decisive().items() if old.get(k) != v]
    named = {"corpus": "another corpus, or the corpus has changed", "wordnet": "another WordNet"}
    differ += [named.get(k, f"other weights of {k}") for k, v in digests.items() if old_digests.get(k) != v]
    if differ:
        raise UsageError(f"out: {settings.out} holds pairs of {'; '.join(differ)}; choose another folder, or remove it")


def _done(settings: Settings, stage: str) -> set[int]:
    return {int(p.stem.rpartition("-")[2]) for p in settings.work.glob(f"{stage}-*.json")}


def _finish(settings: Settings, digests: Mapping[str, str], count: int) -> Manifest:
    read = [result(settings, "read", i) for i in range(count)]
    paired = [result(settings, "pair", i) for i in range(count)]
    (index,) = (result(settings, "index", 0),)
    skipped = [row for one in (*read, *paired) for row in one["skipped"]]
    shards = tuple(ShardFiles(**one["files"]) for one in paired if one["files"])
    if not shards:
        raise RunError(
            f"pairs: not one pair was found; {most_common(skipped)}. Nothing but {settings.work} was written"
        )
    manifest = Manifest(
        format=FORMAT,
        size=settings.size,
        latent=settings.size // FACTOR,
        samples=index["vectors"],
        pairs=sum(s.rows for s in shards),
        skipped=dict(sorted(Counter(kind_of(row[2]) for row in skipped).items())),
        settings=settings.decisive(),
        digests={**digests, "samples": index.pop("samples")},
        index=index,
        versions={n: metadata.version(n) for n in ("torch", "transformers", "faiss-cpu", "pillow", "pyarrow", "numpy")},
        shards=shards,
    )
    pairs.write_manifest(Path(settings.out), manifest, [(row[0], row[1], row[2]) for row in skipped])
    shutil.rmtree(settings.work)
    return manifest


# --- who runs the stages ------------------------------------------------------------------------------------------

Stage = Callable[..., None]
Run = Callable[[Stage, str, int, set[int], Tell], None]


def _runner(settings: Settings, ray: str | None) -> contextlib.AbstractContextManager[Run]:
    return _here(settings) if ray is None else _on_ray(settings, ray)


@contextlib.contextmanager
def _here(settings: Settings) -> Iterator[Run]:
    import torch

    threads = torch.get_num_threads()

    def run(stage: Stage, name: str, count: int, done: set[int], tell: Tell) -> None:
        tell(name, len(done), count)
        for i in sorted(set(range(count)) - done):
            before = len(done)
            stage(settings, i, lambda share, before=before: tell(name, before + min(share, 1.0), count))
            done.add(i)
            tell(name, len(done), count)

    try:
        yield run
    finally:  # this process may have other work to do
        torch.set_num_threads(threads)
        forget()


@contextlib.contextmanager
def _on_ray(settings: Settings, address: str) -> Iterator[Run]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is sent anywhere
    try:
        import ray
    except ImportError:
        raise UsageError('ray: is not installed; pip install "iedit[train]", or leave --ray out') from None
    where: dict[str, Any] = {"address": address} | ({"include_dashboard": False} if address == LOCAL else {})
    try:
        ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        raise UsageError(
            f"ray: {address} cannot be reached ({first_line(error)}); is the cluster running? "
            "One with token authentication wants RAY_AUTH_MODE=token"
        ) from error
    gpus = 1 if settings.device.startswith("cuda") else 0
    has = ray.cluster_resources()
    if address == LOCAL and (has.get("CPU", 0) < settings.threads or has.get("GPU", 0) < gpus):
        ray.shutdown()
        needs = f"{settings.threads} cores" + (" and a GPU" if gpus else "")
        raise UsageError(
            f"ray: a shard wants {needs}, this machine has {has.get('CPU', 0):g} and {has.get('GPU', 0):g}"
        )

    def run(stage: Stage, name: str, count: int, done: set[int], tell: Tell) -> None:
        task: Any = ray.remote(num_cpus=settings.threads, num_gpus=gpus)(stage)
        waiting = {task.remote(settings, i): i for i in range(count) if i not in done}
        tell(name, len(done), count)
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            try:
                ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise (error.cause or error) from None
            done.add(waiting.pop(ready))
            tell(name, len(done), count)

    try:
        yield run
    finally:
        ray.shutdown()
