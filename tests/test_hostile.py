"""Hundreds of hostile inputs out of a seed: pictures, paths, options, checkpoints, receipts, cache entries and engines.

Whatever comes in, a command ends within seconds, with a picture or with one line that is safe to print. Nothing in the
sandbox but the outputs that were named is made, changed or removed; a watcher over all of it says so after every case. Where
the input allows one right picture only, it is that one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image, ImageDraw, PngImagePlugin
from safetensors.torch import load_file, save_file

from iedit.runtime import images
from iedit.runtime import stage_cache as stages
from iedit.runtime.cli.main import main
from iedit.runtime.layouts import annotate
from iedit.runtime.model import model as models

SEED = int(os.environ.get("IEDIT_HOSTILE_SEED", "20261125"))  # another one is another corpus
LONGEST = 10.0  # seconds of the processor for a case
HANG = 60  # seconds on the clock, which other processes may be using too
COUNTS = {"pictures": 200, "paths": 75, "options": 65, "receipts": 150, "checkpoints": 30, "cache": 30, "engines": 30}

WORDS = ["--prompt", "a blue car on grass at noon", "--source-prompt", "a red car on grass at noon", "--steps", "2",
         "--mask-seeds", "1"]  # fmt: skip
# What no field of a JSON and no option should be.
VALUES: list[Any] = [None, True, -1, 0, 1e308, -1e308, float("nan"), float("inf"), 10**30, -(10**30), 0.5, "", "x", "\x1b[31mred\x07",
                     "../../etc/passwd", "/etc/passwd", "~root", "\u202egnp.exe", "a\nb", "\ud800", "x" * 20_000, [], {}, [[[[[]]]]], {"a": {"b": {}}},
                     [None] * 50]  # fmt: skip


def test_there_are_at_least_500_of_them() -> None:
    assert sum(COUNTS.values()) >= 500


# --- the sandbox ------------------------------------------------------------------------------------------------


class Sandbox:
    """A world of its own, with a watcher: home, temporary files, a working folder, a checkpoint, pictures."""

    def __init__(self, root: Path, checkpoint: Path):
        self.root = root
        self.work, self.home, self.model = root / "work", root / "home", root / "models" / "ckpt"
        for folder in (self.work, self.home / ".cache", root / "tmp", root / "elsewhere", self.model.parent):
            folder.mkdir(parents=True)
        shutil.copytree(checkpoint, self.model)
        (root / "elsewhere" / "thesis.txt").write_text("years of work")
        (self.home / "secret.txt").write_text("a secret")
        self._digests: dict[tuple[int, ...], str] = {}
        box = (8, 8, 22, 24)
        for name, ground, thing, mode in (("in", "green", "red", "RGB"), ("pose", "black", "blue", "RGB"),
                                          ("old", "black", "white", "RGB"), ("mask", 0, 255, "L")):  # fmt: skip
            picture = Image.new(mode, (32, 32), ground)
            ImageDraw.Draw(picture).ellipse(box, fill=thing)
            picture.save(self.work / f"{name}.png")

    def look(self) -> dict[str, tuple[Any, ...]]:
        """Everything in the sandbox: kind, size, time of change and digest. A digest is of a file's state (its inode and
        times, of which no program sets the last), so a file that nobody touched is not read again."""
        found: dict[str, tuple[Any, ...]] = {}
        for folder, folders, names in os.walk(self.root):
            for name in [*folders, *names]:
                path = os.path.join(folder, name)
                state = os.lstat(path)
                if stat.S_ISLNK(state.st_mode):
                    found[path] = ("link", os.readlink(path))
                elif stat.S_ISREG(state.st_mode):
                    key = (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
                    if key not in self._digests:
                        self._digests[key] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
                    found[path] = (state.st_mode, state.st_size, state.st_mtime_ns, self._digests[key])
                else:
                    found[path] = (state.st_mode,)
        return found

    def changed(self, before: dict[str, tuple[Any, ...]]) -> set[str]:
        """Paths that are new, gone or different, from the sandbox's root."""
        now = self.look()
        return {os.path.relpath(p, self.root) for p in before.keys() | now.keys() if before.get(p) != now.get(p)}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint_cli: Path) -> Iterator[Sandbox]:
    box = Sandbox(tmp_path_factory.mktemp("sandbox"), tiny_checkpoint_cli)
    here = os.getcwd()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HOME", str(box.home))
        patched.setenv("XDG_CACHE_HOME", str(box.home / ".cache"))
        patched.setenv("TMPDIR", str(box.root / "tmp"))
        patched.setattr(tempfile, "tempdir", str(box.root / "tmp"))
        patched.setenv("HF_HUB_OFFLINE", "1")
        os.chdir(box.work)
        _share_models(patched, box)
        try:
            yield box
        finally:
            os.chdir(here)


def _share_models(patched: pytest.MonkeyPatch, box: Sandbox) -> None:
    """The sound checkpoint is loaded once for all cases; every other one as ever."""
    from iedit.runtime import editor, replay

    load, held = models.load_model, {}

    def shared(model: str = "picturebook", layouts: Any = None, **how: Any) -> Any:
        if os.path.realpath(model) != str(box.model) or layouts:
            return load(model, layouts, **how)
        key = repr(sorted(how.items()))
        if key not in held:
            held[key] = load(model, layouts, **how)
        return held[key]

    patched.setattr(models, "load_model", shared)
    patched.setattr(editor, "load_model", shared)
    patched.setattr(replay, "load_model", shared)


@pytest.fixture(scope="module")
def reference(sandbox: Sandbox) -> Any:
    """The pixels of the edit that all others are measured by."""
    run(
        sandbox,
        ["edit", "in.png", *WORDS, "--model", str(sandbox.model), "--output", "reference.png"],
        {"work/reference.png"},
    )
    return np.asarray(Image.open(sandbox.work / "reference.png"))


# --- one case ---------------------------------------------------------------------------------------------------


def _hung(*_: Any) -> None:
    raise TimeoutError(f"no end after {HANG} s")


def run(box: Sandbox, words: Sequence[str], outputs: set[str] = frozenset(), fine: bool | None = None) -> Result:  # type: ignore[assignment]
    """One command: its end, what it said and what it touched.

    Args:
        outputs: paths from the root of the sandbox that may be new or different; what is below a folder of them too.
        fine: whether it must succeed; None if either is right.
    """
    before, began = box.look(), time.process_time()
    old = signal.signal(signal.SIGALRM, _hung)
    signal.alarm(HANG)
    try:
        result = CliRunner().invoke(main, list(words), prog_name="iedit")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    told = f"{[w[:80] for w in words]}: {result.output[-600:]!r} {result.exception!r}"
    assert time.process_time() - began < LONGEST, told
    assert result.exception is None or isinstance(result.exception, SystemExit), told
    assert result.exit_code in (0, 1, 2), told
    assert fine is None or fine == (result.exit_code == 0), told
    said = [line for line in result.stderr.splitlines() if line and not line.startswith(("Usage: ", "Try '"))]
    if result.exit_code and "replay" not in words[:1] and "engines" not in words[:1]:
        errors = [line for line in said if line.startswith("Error: ")]
        assert len(errors) == 1, told
    assert all(c.isprintable() or c == "\n" for c in result.stderr), told
    assert "Traceback" not in result.output, told
    touched = {p for p in box.changed(before) if not any(p == o or p.startswith(o + "/") for o in outputs)}
    if result.exit_code == 2:  # nothing was run, so nothing was made
        touched = box.changed(before)
    assert not touched, f"{told} touched {touched}"
    return result


def _clean(box: Sandbox, *names: str) -> None:
    for name in names:
        path = box.work / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


# --- pictures ---------------------------------------------------------------------------------------------------


def _damaged_picture(draw: random.Random) -> bytes:
    """Bytes that were a picture, or look like one."""
    side = draw.choice([1, 2, 31, 64])
    mode = draw.choice(["RGB", "L", "1", "P", "RGBA", "LA", "I;16", "CMYK", "F"])
    pixels = np.random.default_rng(draw.randrange(2**32)).integers(0, 255, (side, side, 3), dtype=np.uint8)
    picture = (
        Image.fromarray(pixels).convert("L").convert("I;16")
        if mode == "I;16"
        else Image.fromarray(pixels).convert(mode)
    )
    buffer = io.BytesIO()
    for kind in draw.sample(
        ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "TGA", "ICO", "PCX", "EPS", "SGI"], 12
    ):
        with contextlib.suppress(OSError, ValueError, KeyError):
            buffer = io.BytesIO()
            picture.save(buffer, kind)
            break
    data = bytearray(buffer.getvalue() or b"\x89PNG\r\n\x1a\n")
    damage = draw.choice(["none", "cut", "flip", "flip", "flip", "insert", "head", "grow", "zero", "words"])
    if damage == "cut":
        del data[draw.randrange(len(data)) :]
    elif damage == "flip":
        for _ in range(draw.choice([1, 3, 40])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif damage == "insert":
        at = draw.randrange(len(data))
        data[at:at] = draw.randbytes(draw.choice([1, 100]))
    elif damage == "head":
        data[: draw.randrange(1, 16)] = draw.randbytes(4)
    elif damage == "grow":
        data += draw.randbytes(1000)
    elif damage == "zero":
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    elif damage == "words":
        data = bytearray(draw.choice([b"", b"%!PS\n(x) show", b"<svg/>", b"P6 99999 99999 255\n", b"P5 -1 -1 255\n", b"BM" + b"\xff" * 60,
                                      b"GIF89a" + b"\xff" * 20, b"II*\x00" + b"\xff" * 40, b"#!/bin/sh\nrm -rf /\n"]))  # fmt: skip
    return bytes(data)


def test_pictures(sandbox: Sandbox) -> None:
    draw = random.Random(SEED)
    done = 0
    for i in range(COUNTS["pictures"]):
        name = f"case.{draw.choice(['png', 'jpg', 'tif', 'eps'])}"
        (sandbox.work / name).write_bytes(_damaged_picture(draw))
        if i % 10:
            result = run(sandbox, ["layouts", name, "--kind", "edge", "--output", "edge.png"], {"work/edge.png"})
            if result.exit_code == 0:  # and then it is the map of what the file shows
                expected = annotate(images.load_image(sandbox.work / name), "edge")
                assert Image.open(sandbox.work / "edge.png").tobytes() == expected.tobytes()
                done += 1
        else:
            words = ["edit", "in.png", *WORDS, "--model", str(sandbox.model), "--output", "edge.png"]
            run(sandbox, [*words, *draw.choice([["--mask", name], ["--layout", f"pose={name}", "--source-layout", "pose=old.png"]])],
                {"work/edge.png"})  # fmt: skip
        _clean(sandbox, name, "edge.png")
    assert 20 < done < COUNTS["pictures"] - 20  # the damage is neither harmless nor always deadly


# --- paths ------------------------------------------------------------------------------------------------------


def _odd_paths(box: Sandbox) -> list[str]:
    """Names that exist and should not be read or written, and names that cannot exist. Made once."""
    odd = box.root / "odd"
    odd.mkdir()
    os.mkfifo(odd / "pipe.png")
    listening = socket.socket(socket.AF_UNIX)
    with contextlib.suppress(OSError):
        os.chdir(odd)
        listening.bind("socket.png")
    os.chdir(box.work)
    listening.close()
    (odd / "loop.png").symlink_to("loop.png")
    (odd / "dangling.png").symlink_to("nowhere/at/all.png")
    (odd / "folder.png").mkdir()
    (odd / "empty.png").touch()
    (odd / "to-thesis.png").symlink_to(box.root / "elsewhere" / "thesis.txt")
    (odd / "to-null.png").symlink_to("/dev/null")
    (odd / "to-zero.png").symlink_to("/dev/zero")
    (odd / "bad\x1b[31m\nname\u202e.png").write_text("no picture")
    names = [str(p) for p in odd.iterdir()]
    return [*names, "", ".", "..", "/", "-", "--", "~", "/dev/full", "/dev/zero", "/dev/null", "/dev/stdin", "/proc/self/mem", "/proc/self/environ",
            "x" * 300 + ".png", "a/" * 2500 + "b.png", "caf\udce9.png", "in.png/x.png", "gone/out.png", "http://example.com/a.png",
            "$(reboot).png", "*.png", "in.png ", " in.png", "\\\\server\\a.png", str(box.home / "secret.txt"), "/etc/passwd"]  # fmt: skip


def _may_be_made(box: Sandbox, words: Sequence[str], path: str, cache: bool) -> set[str]:
    """What a command may make or change that was given `path` as an output: the file that it names, if there is none or if
    --overwrite was said; of a cache's folder its own folder and those above it that are new."""
    if not path:
        return set()
    place = os.path.abspath(os.path.expanduser(path)) + "/" + stages.FOLDER if cache else os.path.realpath(path)
    while cache and not os.path.lexists(os.path.dirname(place)):
        place = os.path.dirname(place)
    fresh = cache or not os.path.exists(path) or "--overwrite" in words
    return {os.path.relpath(place, box.root)} if fresh else set()


def test_paths(sandbox: Sandbox, reference: Any) -> None:
    draw, odd = random.Random(SEED + 1), _odd_paths(sandbox)
    model = ["--model", str(sandbox.model)]
    asked = [*WORDS, *model]
    edit = ["edit", "in.png", *asked, "--output", "out.png"]
    for _ in range(COUNTS["paths"]):
        path, other = draw.choice(odd), draw.choice(odd)
        reads = [
            ["layouts", path, "--output", "out.png", "--kind", "line"],
            ["edit", path, *asked, "--output", "out.png"],
            [*edit, "--mask", path],
            [*edit, "--layout", f"pose={path}", "--source-layout", f"pose={other}"],
            ["edit", "in.png", *WORDS, "--output", "out.png", "--model", path],
            [*edit, "--engines", path],
            ["replay", path, *model],
            ["replay", "reference.png", "--image", path, *model],
            ["engines", draw.choice(["list", "verify"]), "--engines", path],
            ["info", "--model", path],
        ]
        writes = [
            ["layouts", "in.png", "--kind", "line", "--output", path],
            ["edit", "in.png", *asked, "--overwrite", "--output", path],
            [*edit, "--stages", path],
            [*edit, "--profile", path],
            [*edit, "--cache", path],
            ["mask", other, *asked, "--output", path],
            ["replay", "reference.png", *model, "--write", path],
        ]
        words = draw.choice(reads + writes)
        made = _may_be_made(sandbox, words, path, "--cache" in words) if words in writes else set()
        if words[0] in ("engines", "info", "edit") and path in ("/", "~", ".", "..") and not made:
            words = [
                str(sandbox.root / "odd") if w == path else w for w in words
            ]  # to search a whole disk is no hostile wish
        before = set(os.listdir("."))
        run(sandbox, words, {"work/out.png", *made} - {"work/in.png", "work/reference.png"})
        _clean(sandbox, *(set(os.listdir(".")) - before))
    assert (sandbox.root / "elsewhere" / "thesis.txt").read_text() == "years of work"
    shutil.rmtree(sandbox.root / "odd")


# --- options ----------------------------------------------------------------------------------------------------


def test_options(sandbox: Sandbox) -> None:
    draw = random.Random(SEED + 2)
    texts = [
        "nan",
        "inf",
        "-inf",
        "-1",
        "0",
        "1e9",
        "1e400",
        str(10**30),
        "-0",
        "0x10",
        "",
        " ",
        "x",
        "\x1b[31m",
        "None",
        "1,2",
        "½",
        "\ud800",
        "'",
        "a\nb",
    ]
    options = ["--steps", "--seed", "--guidance-scale", "--negative-prompt", "--control-scale", "--mask-mode", "--mask-threshold", "--mask-strength",
               "--mask-seeds", "--lambda", "--t-u", "--k", "--update", "--ratio", "--composite", "--count", "--method", "--backend", "--device", "--dtype",
               "--attention", "--layout", "--source-layout", "--controlnet", "--prompt", "--source-prompt", "--sparkle"]  # fmt: skip
    for i in range(COUNTS["options"]):
        option, value = options[i % len(options)], draw.choice(texts)
        if option in ("--layout", "--source-layout", "--controlnet"):
            value = draw.choice(
                [value, f"={value}", f"{value}=", f"pose={value}", f"{value}=pose.png", "pose=pose.png=pose.png"]
            )
        words = ["edit", "in.png", *WORDS, "--model", str(sandbox.model), "--output", "out.png", option, value]
        result = run(sandbox, words, {"work/out.png"})
        if result.exit_code == 0:
            assert Image.open(sandbox.work / "out.png").size == (32, 32)
        _clean(sandbox, "out.png")


# --- receipts ---------------------------------------------------------------------------------------------------


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON, by keys."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for k, v in inside for p in _places(v, (*path, k)))]


def _hostile_json(draw: random.Random, sound: Any) -> str:
    """A JSON with something wrong in a random place, or no JSON at all."""
    told = json.loads(json.dumps(sound))
    kind = draw.choice(["value"] * 6 + ["gone", "more", "deep", "cut", "bytes", "whole"])
    place = draw.choice(_places(told)[1:])
    holder = told
    for key in place[:-1]:
        holder = holder[key]
    if kind == "value":
        holder[place[-1]] = draw.choice(VALUES)
    elif kind == "gone":
        del holder[place[-1]]
    elif kind == "more" and isinstance(holder, dict):
        holder[draw.choice(["sparkle", "__class__", "\x1b[2J", "x" * 5000])] = draw.choice(VALUES)
    elif kind == "whole":
        return json.dumps(draw.choice(VALUES))
    text = json.dumps(told)
    if kind == "deep":
        return text[:-1] + ', "deep": ' + '{"a":' * 30_000 + "1" + "}" * 30_001
    if kind == "cut":
        return text[: draw.randrange(len(text))]
    if kind == "bytes":
        return text[:20] + "\x00\x1b\u202e" + text[20:]
    return text


def test_receipts(sandbox: Sandbox, reference: Any) -> None:
    draw = random.Random(SEED + 3)
    picture, sound = Image.open(sandbox.work / "reference.png"), images.read_receipt(sandbox.work / "reference.png")
    words = ["replay", "case.png", "--model", str(sandbox.model)]
    ends = []
    for _ in range(COUNTS["receipts"]):
        text = _hostile_json(draw, sound)
        info = PngImagePlugin.PngInfo()
        info.add_itxt("iedit", text.encode("utf-8", "backslashreplace").decode(), zip=True)
        picture.save(sandbox.work / "case.png", pnginfo=info)
        result = run(sandbox, [*words, "--write", "again.png"], {"work/again.png"})
        assert result.stdout.replace("\n", "").isprintable(), text
        ends.append(result.exit_code)
        same = result.exit_code == 0 and "identical" in result.stdout
        if same:  # then what was changed is none of what a picture depends on
            assert (np.asarray(Image.open(sandbox.work / "again.png")) == reference).all()
        _clean(sandbox, "case.png", "again.png")
    assert ends.count(2) > COUNTS["receipts"] // 2 and ends.count(0) > 2


# --- checkpoints ------------------------------------------------------------------------------------------------


def test_checkpoints(sandbox: Sandbox) -> None:
    draw, folder = random.Random(SEED + 4), sandbox.root / "models" / "case"
    files = sorted(p.relative_to(sandbox.model) for p in sandbox.model.rglob("*.json"))
    weights = sorted(p.relative_to(sandbox.model) for p in sandbox.model.rglob("*.safetensors"))
    for i in range(COUNTS["checkpoints"]):
        shutil.copytree(
            sandbox.model, folder, copy_function=os.link
        )  # weights are not copied; what is changed is written anew
        path = folder / draw.choice(files if i % 5 else weights)
        data = path.read_bytes()
        path.unlink()
        if i % 5 == 0:
            cut = bytearray(data[: draw.choice([0, 7, 100, len(data) - 3])])
            path.write_bytes(cut if draw.random() < 0.5 else data[:8] + b"\xff" * 20 + data[28:])
        else:
            path.write_text(_hostile_json(draw, json.loads(data)).encode("utf-8", "backslashreplace").decode())
        assert "\x1b" not in run(sandbox, ["info", "--model", str(folder)]).stdout
        run(sandbox, ["edit", "in.png", *WORDS, "--model", str(folder), "--output", "out.png"], {"work/out.png"})
        _clean(sandbox, "out.png")
        shutil.rmtree(folder)


# --- cache entries ----------------------------------------------------------------------------------------------


def _damage_entry(draw: random.Random, path: Path, others: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    kind = draw.choice(["flip", "flip", "cut", "empty", "swap", "NaN", "foreign", "folder", "link", "shape"])
    held = load_file(path)
    path.unlink()
    if kind == "flip":
        data[draw.randrange(8, len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
    elif kind == "cut":
        path.write_bytes(data[: draw.randrange(len(data))])
    elif kind == "empty":
        path.touch()
    elif kind == "swap":
        shutil.copyfile(draw.choice(others), path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(draw.choice(others))
    else:
        value = {"NaN": held["value"] * float("nan"), "foreign": held["value"], "shape": held["value"].flatten()}[kind]
        made = {"weight" if kind == "foreign" else "value": value}
        save_file(made, path, {"iedit": path.stem, "digest": stages._content(path.stem, value)})


def test_cache_entries(sandbox: Sandbox, reference: Any) -> None:
    """Every picture is the one that there is without a cache, and every damage is said."""
    draw = random.Random(SEED + 5)
    words = ["edit", "in.png", *WORDS, "--model", str(sandbox.model), "--output", "out.png", "--json", "--cache"]
    run(sandbox, [*words, "sound"], {"work/out.png", "work/sound"}, fine=True)
    expected = np.asarray(Image.open("out.png"))
    assert np.abs(expected.astype(int) - reference.astype(int)).max() <= 1
    for _ in range(COUNTS["cache"]):
        _clean(sandbox, "out.png", "kept")
        shutil.copytree("sound", "kept")
        entries = sorted((sandbox.work / "kept" / stages.FOLDER).glob("*.safetensors"))
        hit = draw.sample(entries, draw.choice([1, 1, 2, 5]))
        for path in hit:
            _damage_entry(
                draw,
                path,
                [e for e in entries if e != path and e.is_file() and e not in hit] or [sandbox.work / "in.png"],
            )
        result = run(sandbox, [*words, "kept"], {"work/out.png", "work/kept"}, fine=True)
        assert (np.asarray(Image.open("out.png")) == expected).all()
        notes = json.loads(result.stdout)["profile"]["notes"]
        assert sum("the cache held a damaged result" in n for n in notes) == len(hit), notes
    _clean(sandbox, "out.png", "kept", "sound")


# --- engines ----------------------------------------------------------------------------------------------------


def _engine(folder: Path, model: Path, module: str) -> dict[str, Any]:
    """A whole engine by its spec and digests, whose graph is noise. Returns what is in its spec."""
    from iedit.runtime.backends.engine_spec import EngineSpec, Shapes, write_spec

    digest = models.module_digest(models.read_digests(str(model)).parts, module)
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"\x08\x09noise")
    spec = EngineSpec(format="onnx", module=module, model="ckpt", weights=digest, graph="0", precision="fp32",
                      shapes=(Shapes((1, 1, 0), (8, 32, 0), (8, 32, 0)),), opset=23, versions={"torch": "2"})  # fmt: skip
    write_spec(folder, spec, ["model.onnx"])
    found: dict[str, Any] = json.loads((folder / "engine.json").read_text())
    return found


def test_engines(sandbox: Sandbox, reference: Any) -> None:
    draw, out = random.Random(SEED + 6), {"work/out.png"}
    words = ["edit", "in.png", *WORDS, "--model", str(sandbox.model), "--output", "out.png", "--engines", "engines"]
    for _ in range(COUNTS["engines"]):
        folder = sandbox.work / "engines" / "onnx-fp32" / "unet"
        told = _engine(folder, sandbox.model, "unet")
        (sandbox.work / "engines" / "thesis").mkdir()
        (sandbox.work / "engines" / "thesis" / "model.tex").write_text("years of work")
        if draw.random() < 0.9:
            (folder / "engine.json").write_text(_hostile_json(draw, told).encode("utf-8", "backslashreplace").decode())
        if draw.random() < 0.2:
            folder.chmod(0o777)
        if draw.random() < 0.2:
            (folder / "model.onnx").write_bytes(b"another")
        for more in (
            ["engines", "list"],
            ["engines", "list", "--json"],
            ["engines", "verify"],
            ["engines", "prune", "--dry-run"],
        ):
            result = run(sandbox, [*more, "--engines", "engines"])
            assert "\x1b" not in result.stdout
        result = run(sandbox, words, out)
        if result.exit_code == 0:
            assert (np.asarray(Image.open("out.png")) == reference).all()
        else:
            assert "model.onnx: onnxruntime cannot load it" in result.stderr
        _clean(sandbox, "out.png")
        run(
            sandbox,
            ["engines", "prune", "--yes", "--engines", "engines"],
            {"work/engines/onnx-fp32", "work/engines/onnx-fp32/.unet.lock"},
            fine=True,
        )
        assert (sandbox.work / "engines" / "thesis" / "model.tex").read_text() == "years of work"
        _clean(sandbox, "engines")


# --- whole processes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what",
    [
        "a pipe as the picture",
        *(pytest.param(w, marks=pytest.mark.slow) for w in ("a full device as the profile", "a reader that goes away")),
    ],
)
def test_processes(sandbox: Sandbox, root: Path, what: str) -> None:
    """What a process of its own does, seen from outside."""
    code = "from iedit.runtime.cli.main import main; main(prog_name='iedit')"
    words = ["edit", "in.png", *WORDS, "--model", str(sandbox.model), "--output", "out.png"]
    if what == "a pipe as the picture":
        os.mkfifo("pipe.png")
        words[1] = "pipe.png"
    elif what == "a full device as the profile":
        words += ["--profile", "/dev/full"]
    before = sandbox.look()
    environment = os.environ | {"PYTHONPATH": str(root / ".types"), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", code, *words], env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as running:  # fmt: skip
        assert running.stdout is not None and running.stderr is not None
        if what == "a reader that goes away":
            running.stdout.close()
        said = running.stderr.read()
        assert running.wait(timeout=120) == {"a pipe as the picture": 2, "a full device as the profile": 1}.get(
            what, running.returncode
        )
    assert "Traceback" not in said and all(c.isprintable() or c == "\n" for c in said), said
    if what == "a pipe as the picture":
        assert "pipe.png: this is a pipe, expected an image file" in said
    elif what == "a full device as the profile":
        assert "/dev/full: could not be written (No space left on device); written: out.png" in said
    assert sandbox.changed(before) <= {"work/out.png"}
    _clean(sandbox, "out.png", "pipe.png")


def test_the_watcher_sees_a_change_of_any_kind(sandbox: Sandbox) -> None:
    """The corpus could not fail without it."""
    path = sandbox.work / "seen.txt"
    before = sandbox.look()
    path.write_text("a")
    assert sandbox.changed(before) == {"work/seen.txt"}
    before, state = sandbox.look(), path.stat()
    path.write_text("b")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # the same size and time
    assert sandbox.changed(before) == {"work/seen.txt"}
    before = sandbox.look()
    path.unlink()
    assert sandbox.changed(before) == {"work/seen.txt"}
