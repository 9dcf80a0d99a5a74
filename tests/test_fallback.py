"""An edit under `auto` comes to its end whatever becomes of the engines, says what eager torch says, and tells why in its receipt."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from iedit.export.verify import LIMITS
from iedit.runtime.backends import load_backend, why_unavailable
from iedit.runtime.backends import ort as backend_onnx
from iedit.runtime.backends.eager import TorchBackend
from iedit.runtime.backends.engine_spec import SPEC_FILE
from iedit.runtime.backends.fallback import FallbackBackend
from iedit.runtime.backends.ort import OnnxBackend
from iedit.runtime.cli.main import main
from iedit.runtime.editor import Editor, EditRequest, EditResult, MaskOptions, Options
from iedit.runtime.errors import RunError, UsageError

BROKEN = {
    "ImportError": "libcublas.so.13: cannot open shared object file: No such file or directory",
    "RuntimeError": "this build wants another glibc",
    "AttributeError": "module has no attribute '_pybind_state'",
}


@pytest.fixture
def request_(picture: Callable[..., Image.Image]) -> EditRequest:
    options = Options(mask=MaskOptions(seeds=2, threshold=0.3))
    return EditRequest(
        picture(1), "a blue car on grass at noon", "a red car on grass at noon", steps=2, options=options
    )


@pytest.fixture
def exact(tiny: Any, request_: EditRequest) -> EditResult:
    return Editor(tiny, TorchBackend(tiny)).edit(request_)


def says_the_same(got: EditResult, wanted: EditResult) -> None:
    """Within the parity limits of float32 engines."""
    limits = LIMITS["fp32"]
    a, b = (np.asarray(r.image).astype(int) for r in (got, wanted))
    assert limits.levels is not None and np.abs(a - b).max() <= limits.levels
    ours, theirs = (np.asarray(r.mask) > 127 for r in (got, wanted))
    assert (ours & theirs).sum() >= limits.iou * (ours | theirs).sum()


def reasons(result: EditResult, backend: str) -> str:
    """All that the receipt says of why a backend did not run something."""
    told = [r for f in result.receipt["backend"]["fallbacks"] if f["backend"] == backend for r in f["reasons"]]
    return "; ".join(told)


@pytest.fixture
def break_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """`break_package(name, error)`: an installation whose import raises."""

    def make(name: str, error: str) -> None:
        folder = tmp_path / "broken" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(f"raise {error}({BROKEN[error]!r})\n")
        for module in [m for m in sys.modules if m.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.syspath_prepend(folder.parent)

    return make


# --- broken installations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", list(BROKEN))
def test_a_broken_onnxruntime_is_a_reason(
    tiny: Any, tiny_engines: Path, break_package: Any, request_: EditRequest, exact: EditResult, error: str
) -> None:
    break_package("onnxruntime", error)
    result = Editor(tiny, load_backend("auto", tiny, tiny_engines)).edit(request_)
    assert torch.equal(result.latent, exact.latent)
    assert f"onnxruntime is installed but cannot be imported ({error}: " in reasons(result, "onnx")
    with pytest.raises(
        UsageError, match=f"'onnx' was requested but cannot run: onnxruntime is installed but .*{error}"
    ):
        load_backend("onnx", tiny, tiny_engines)


def test_a_broken_tensorrt_is_a_reason(
    tiny: Any, break_package: Any, request_: EditRequest, exact: EditResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    from iedit.runtime.backends import trt

    monkeypatch.setattr(trt, "cuda_missing", lambda: [])
    break_package("tensorrt", "ImportError")
    result = Editor(tiny, load_backend("auto", tiny)).edit(request_)
    assert torch.equal(result.latent, exact.latent)
    assert "tensorrt is installed but cannot be imported (ImportError: libcublas" in reasons(result, "tensorrt")


def test_a_package_without_its_bindings_is_a_reason(
    break_package: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is left of TensorRT where its own index was out of reach: a folder without code, which can be imported."""
    from iedit.runtime.backends import trt

    monkeypatch.setattr(trt, "cuda_missing", lambda: [])
    break_package("tensorrt", "ImportError")
    (tmp_path / "broken" / "tensorrt" / "__init__.py").unlink()
    (why,) = why_unavailable("tensorrt")
    assert "tensorrt is installed but cannot be imported (AttributeError: " in why


def test_a_broken_triton_leaves_the_kernels_to_their_definitions(
    break_package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: on a CPU nobody asks for Triton unless its interpreter is to run."""
    from iedit.kernels import dispatch
    from iedit.kernels.mask_map import difference, difference_reference

    break_package("triton", "RuntimeError")
    dispatch.triton_missing.cache_clear()
    try:
        (why,) = dispatch.triton_missing()
        assert (
            why
            == f"triton is installed but cannot be imported (RuntimeError: {BROKEN['RuntimeError']}); install it again"
        )
        monkeypatch.setattr(dispatch, "interpreted", lambda: True)
        a, b = torch.randn(2, 1, 3, 4, 8, 8)
        assert torch.equal(difference(a, b), difference_reference(a, b))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert why_unavailable("compile") == [why]
    finally:
        dispatch.triton_missing.cache_clear()


@pytest.mark.parametrize("error", list(BROKEN))
def test_a_broken_xformers_is_a_reason(break_package: Any, error: str) -> None:
    from iedit.runtime.backends.torch_modules import why_not_xformers

    break_package("xformers", error)
    (why,) = why_not_xformers(torch.device("cuda"))
    assert why.startswith(f"xformers cannot run here ({error}: ")


def test_info_tells_of_a_broken_installation(break_package: Any) -> None:
    assert json.loads(CliRunner().invoke(main, ["info", "--json"]).stdout)["backends"]["onnx"] == []
    break_package("onnxruntime", "RuntimeError")
    (why,) = json.loads(CliRunner().invoke(main, ["info", "--json"]).stdout)["backends"]["onnx"]
    assert "cannot be imported (RuntimeError: this build wants another glibc)" in why


# --- engines that fail --------------------------------------------------------------------------------------------


class Failing:
    """A session of ONNX Runtime that fails at one of its calls and after it.

    Args:
        at: number of the first call that fails.
    """

    def __init__(self, session: Any, error: Exception, at: int):
        self.session, self.error, self.at, self.calls = session, error, at, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run_with_iobinding(self, binding: Any) -> None:
        self.calls += 1
        if self.calls >= self.at:
            raise self.error
        self.session.run_with_iobinding(binding)


def failing(monkeypatch: pytest.MonkeyPatch, where: str, error: Exception, at: int) -> list[Failing]:
    """From now on the session of an engine whose path has `where` in it fails."""
    new = backend_onnx.new_session
    made: list[Failing] = []

    def make(graph: Path, *more: Any, **options: Any) -> Any:
        session = new(graph, *more, **options)
        if where == graph.parent.name:
            made.append(Failing(session, error, at))
            return made[-1]
        return session

    monkeypatch.setattr(backend_onnx, "new_session", make)
    return made


def test_an_engine_that_fails_at_its_third_call_is_left_for_torch_once(
    tiny: Any, tiny_engines: Path, request_: EditRequest, exact: EditResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = failing(monkeypatch, "unet", RuntimeError("CUDA error: an illegal access\nhelp"), 3)
    editor = Editor(tiny, load_backend("auto", tiny, tiny_engines))
    result = editor.edit(request_)
    says_the_same(result, exact)
    assert [f.calls for f in made] == [3]  # it is not asked again
    ran = [c.backend for c in result.profile.modules if c.module == "unet"]
    assert ran[:2] == ["onnx", "onnx"] and set(ran[2:]) == {"torch"}
    assert "it failed: onnxruntime could not run unet on " in reasons(result, "onnx")
    assert "CUDA error: an illegal access" in reasons(result, "onnx") and "help" not in reasons(result, "onnx")
    assert {c.backend for c in result.profile.modules if c.module.startswith("vae")} == {"onnx"}
    # Another edit says it too, and does not try again.
    other = editor.edit(EditRequest(request_.image, "a green tree", method="sdedit", steps=2))
    assert made[0].calls == 3 and "CUDA error: an illegal access" in reasons(other, "onnx")


@pytest.mark.parametrize("module", ["unet", "vae_decoder", "text_encoder"])
def test_an_engine_that_overflows_is_left_for_torch(
    tiny: Any,
    tiny_engines: Path,
    request_: EditRequest,
    exact: EditResult,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
) -> None:
    """As one in half precision may at any call."""
    call = OnnxBackend._run
    calls = []

    def overflowing(self: Any, name: str, *more: Any, **options: Any) -> Any:
        outputs = call(self, name, *more, **options)
        calls.append(name)
        if name == module and calls.count(name) > (module == "unet"):
            outputs[0, ..., -1] = float("inf")
        return outputs

    monkeypatch.setattr(OnnxBackend, "_run", overflowing)
    result = Editor(tiny, load_backend("auto", tiny, tiny_engines)).edit(request_)
    says_the_same(result, exact)
    assert "it failed: its answer holds NaN or infinity" in reasons(result, "onnx")
    assert calls.count(module) == 1 + (module == "unet")


def test_an_engine_by_name_never_steps_down(
    tiny: Any, tiny_engines: Path, request_: EditRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "unet", RuntimeError("CUDA error"), 3)
    with pytest.raises(RunError, match=r"onnxruntime could not run unet on .*CUDA error"):
        Editor(tiny, OnnxBackend(tiny, tiny_engines)).edit(request_)


def test_an_engine_whose_files_are_gone_between_two_calls(
    tiny: Any, tiny_engines: Path, request_: EditRequest, exact: EditResult, tmp_path: Path
) -> None:
    engines = Path(shutil.copytree(tiny_engines, tmp_path / "engines"))
    backend = load_backend("auto", tiny, engines)
    backend.encode_tokens(torch.ones(1, 8, dtype=torch.int64))
    assert backend.why_not("unet", 1, 64, 64) == []
    assert isinstance(backend, FallbackBackend) and backend.usable[0].why_not("unet", 1, 64, 64) == []  # it has looked
    shutil.rmtree(engines / "onnx-fp32")
    result = Editor(tiny, backend).edit(request_)
    says_the_same(result, exact)
    assert result.receipt["backend"]["modules"] == {
        "text_encoder": ["onnx"], "unet": ["torch"], "vae_decoder": ["torch"], "vae_encoder": ["torch"],
    }  # fmt: skip
    assert "model.onnx: onnxruntime cannot load it" in reasons(result, "onnx")


def test_weights_behind_a_link_are_a_reason(
    tiny: Any, tiny_engines: Path, request_: EditRequest, exact: EditResult, tmp_path: Path
) -> None:
    """ONNX Runtime refuses weights that lie elsewhere."""
    engines = Path(shutil.copytree(tiny_engines, tmp_path / "engines"))
    weights = engines / "onnx-fp32" / "unet" / "model.onnx.data"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    result = Editor(tiny, load_backend("auto", tiny, engines)).edit(request_)
    says_the_same(result, exact)
    if {c.backend for c in result.profile.modules if c.module == "unet"} == {"torch"}:
        assert "onnxruntime cannot load it" in reasons(result, "onnx")


def test_out_of_memory_halves_the_batch_and_only_one_sample_that_does_not_fit_steps_down(
    tiny: Any, tiny_engines: Path, request_: EditRequest, exact: EditResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = failing(monkeypatch, "unet", RuntimeError("Failed to allocate memory for requested buffer"), 1)
    result = Editor(tiny, load_backend("auto", tiny, tiny_engines)).edit(request_)
    says_the_same(result, exact)
    assert any("going on with batches of 1" in n for n in result.profile.notes)
    assert "can't allocate memory" in reasons(result, "onnx") and made[0].calls > 1
    assert {c.backend for c in result.profile.modules if c.module == "unet"} == {"torch"}


def test_a_cancelled_edit_is_cancelled_and_no_engine_is_blamed(
    tiny: Any, tiny_engines: Path, request_: EditRequest
) -> None:
    from iedit.runtime.errors import Cancelled

    backend = load_backend("auto", tiny, tiny_engines)
    with pytest.raises(Cancelled):
        Editor(tiny, backend).edit(request_, callback=lambda progress: progress.stage != "final")
    assert isinstance(backend, FallbackBackend) and backend.failed == {}


# --- faults drawn from a seed ---------------------------------------------------------------------------------------

MODULES = ("unet", "vae_encoder", "vae_decoder", "text_encoder")
ERRORS: tuple[Callable[[], Exception], ...] = (
    lambda: RuntimeError("[ONNXRuntimeError] : 1 : FAIL : Non-zero status code\nwhile running Conv"),
    lambda: RuntimeError("CUDA error 700: an illegal memory access was encountered"),
    lambda: MemoryError("Failed to allocate memory for requested buffer of size 1"),
    lambda: OSError(5, "Input/output error"),
    lambda: ValueError(""),
    lambda: KeyError("sample"),
    lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
)


def break_engine(draw: random.Random, engines: Path, module: str, patch: pytest.MonkeyPatch) -> str:
    """One fault of an engine; what it is."""
    folder, kind = engines / "onnx-fp32" / module, draw.randrange(9)
    spec = folder / SPEC_FILE
    told = json.loads(spec.read_text())
    if kind < 4:
        error, at = draw.choice(ERRORS)(), draw.randint(1, 6)
        failing(patch, module, error, at)
        return f"{module} raises {error!r} at call {at}"
    if kind == 4:  # after it was looked at, before it is loaded
        new = backend_onnx.new_session

        def gone(graph: Path, *more: Any, **options: Any) -> Any:
            if graph.parent == folder:
                shutil.rmtree(folder, ignore_errors=True)
            return new(graph, *more, **options)

        patch.setattr(backend_onnx, "new_session", gone)
        return f"{module} is removed while it is loaded"
    if kind == 5:
        shutil.rmtree(folder)
        return f"{module} is removed"
    if kind == 6:
        side = draw.choice([32, 48, 128])
        one = {"batch": [1, 1, draw.randint(1, 4)], "height": [side] * 3, "width": [side] * 3}
        spec.write_text(json.dumps(told | {"shapes": [one]}))
        return f"{module} was built for {side}"
    if kind == 7:
        path = draw.choice([p for p in sorted(folder.iterdir()) if p.is_file()])
        data = bytearray(path.read_bytes())
        at = draw.randrange(len(data))
        data[at] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        return f"{module}: a bit of {path.name} is flipped at {at}"
    path = draw.choice([p for p in sorted(folder.iterdir()) if p.is_file()])
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])
    return f"{module}: {path.name} is cut short"


@pytest.mark.parametrize(
    "seeds",
    [range(12), pytest.param(range(12, 212), marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
    ids=["12", "200"],
)
def test_an_edit_survives_any_fault(
    tiny: Any, tiny_engines: Path, request_: EditRequest, exact: EditResult, tmp_path: Path, seeds: range,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for seed in seeds:
        draw, engines = random.Random(seed), tmp_path / str(seed)
        for module in MODULES:
            shutil.copytree(tiny_engines / "onnx-fp32" / module, engines / "onnx-fp32" / module)
        with monkeypatch.context() as patch:
            faults = [break_engine(draw, engines, m, patch) for m in draw.sample(MODULES, draw.randint(1, 2))]
            result = Editor(tiny, load_backend("auto", tiny, engines)).edit(request_)
        try:
            says_the_same(result, exact)
            if any(b != ["onnx"] for b in result.receipt["backend"]["modules"].values()):
                assert reasons(result, "onnx")
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {faults}") from error
        shutil.rmtree(engines)
