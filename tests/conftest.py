"""One thread unless told otherwise: with more OpenMP threads than free cores torch runs tens of times slower."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, which no test has done yet
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import contextlib
import gc
import importlib.util
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    # Engines that whoever runs the tests has exported would be found, and used, by `--backend auto`.
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="iedit-tests-")

    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_finish() -> None:
    # Garbage is collected less often, and without looking through what the libraries hold: that took a twentieth of the tests' time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


# `bench/gpu.sh` runs tests where not everything is installed, and says so with this. Anywhere else what is missing is a failure.
_SKIP_MISSING = "IEDIT_SKIP_MISSING"


def _missing(error: BaseException | None) -> str:
    """What is not installed, of an error that comes of that; "" if it does not, or if that is not to be skipped here."""
    while error is not None and os.environ.get(_SKIP_MISSING):
        if isinstance(error, ModuleNotFoundError) and error.name:
            package = error.name.partition(".")[0]
            return f"{package} is not installed" if importlib.util.find_spec(package) is None else ""
        error = error.__cause__ or error.__context__
    return ""


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    report = yield
    call = getattr(report, "call", None)
    if report.failed and call is not None and call.excinfo is not None and (why := _missing(call.excinfo.value)):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: {why}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.failed and call.excinfo is not None and (why := _missing(call.excinfo.value)):
        report.outcome, report.longrepr = "skipped", (str(item.path), item.location[1] or 0, f"Skipped: {why}")
    return report


def _load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"iedit_tests_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # a dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def taped() -> Any:
    """The module `tests/taped.py`: CUDA graphs without CUDA."""
    return _load_file(ROOT / "tests" / "taped.py")


@pytest.fixture(scope="session")
def small_models() -> Any:
    """The module `tests/small_models.py`: random models of the classes that pairs and metrics are made with."""
    return _load_file(ROOT / "tests" / "small_models.py")


@pytest.fixture(scope="session")
def forked() -> Any:
    """The module `tests/forked.py`: programs in processes of their own, forked from one that has imported torch and diffusers."""
    return _load_file(ROOT / "tests" / "forked.py")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """`bench(name)`: a script of `bench/` as a module; like a script it finds those beside it."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    monkeypatch.delitem(sys.modules, "results", raising=False)
    return lambda name: _load_file(ROOT / "bench" / f"{name}.py")


@pytest.fixture(scope="session")
def assert_rounded_once() -> Callable[..., None]:
    """`assert_rounded_once(got, exact)`: every value within twice the error of rounding the exact answer (float64) once.

    The bound is taken for each sample of dimension 0. NaN is never within it.
    """

    def check(got: Any, exact: Any) -> None:
        error = (got.double() - exact).abs().flatten(1).amax(1)
        bound = 2 * (exact.to(got.dtype).double() - exact).abs().flatten(1).amax(1)
        assert (error <= bound).all(), f"{(error / bound).tolist()} of the bound, by sample"

    return check


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is NaN, not whatever lay there (often the right answer, of the call before)."""
    import torch

    monkeypatch.setenv("IEDIT_KERNELS", "auto")
    like, new = torch.empty_like, torch.empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: like(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: new(*a, **k).fill_(float("nan")))


# What the kernels are run on where there is a GPU: round and ragged shapes, many channels, the latent of 512x512.
GPU_SHAPES = [(3, 4, 16, 16), (3, 4, 9, 13), (3, 16, 17, 19), (3, 4, 64, 64), (2, 4, 96, 72)]


@pytest.fixture(params=GPU_SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def gpu_shape(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def gpu_dtype(request: pytest.FixtureRequest) -> Any:
    import torch

    return getattr(torch, request.param)


@pytest.fixture(scope="session")
def gpu_draw() -> Callable[..., list[Any]]:
    """`gpu_draw(shape, dtype, count, seed=0)`: random tensors on the GPU."""
    import torch

    def make(shape: tuple[int, ...], dtype: torch.dtype, count: int, seed: int = 0) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator).to("cuda", dtype) for _ in range(count)]

    return make


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's folder."""
    return ROOT


# --- small models -----------------------------------------------------------------------------------------------

# What is exported of the random checkpoint: not all of it, a fused UNet takes ten seconds.
TINY_MODULES = ("unet", "unet+pose", "unet+pose+scribble", "control-embedding-pose", "control-embedding-scribble", "vae_encoder", "vae_decoder",
                "text_encoder")  # fmt: skip


def _build_checkpoint(
    folder: Path,
    latent_channels: int = 4,
    seed: int = 1,
    unet_channels: tuple[int, int] = (16, 32),
    vae_channels: tuple[int, ...] = (4, 4, 8, 8),
) -> Path:
    """A checkpoint of random weights in the diffusers layout, for latents of 8x8, with ControlNets for pose and scribble.

    Its latents have about unit variance. It is small because most of the tests' time goes into it: two levels, and attention in the
    first of them and in the middle only. The seed is of a network that does not blow roundings up over the steps of an edit.

    Args:
        vae_channels: of its levels; each but the first halves the size, so four make it a checkpoint for 64x64 pictures.
    """
    import torch
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from iedit.training import embed

    torch.manual_seed(seed)
    tokenizer = embed.make_tokenizer(folder / "tokenizer")
    width, levels = 2 * unet_channels[0], len(vae_channels)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=vae_channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
        sample_size=8 * 2 ** (levels - 1),
        scaling_factor=3.6,
    )
    unet: Any = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=unet_channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=2,
        norm_num_groups=unet_channels[0] // 2,
    )
    with torch.no_grad():
        # A fresh network hardly listens to its text and returns little; these make both matter as much as in one that was trained.
        for name, p in unet.named_parameters():
            if "attn2.to_out.0.weight" in name:
                p *= 16
            if "conv_out.weight" in name:
                p *= 1.2
        unet.save_pretrained(folder / "unet")
        vae.save_pretrained(folder / "vae")
        text_encoder.save_pretrained(folder / "text_encoder")
        embed.new_scheduler().save_pretrained(folder / "scheduler")
        for name in ("pose", "scribble"):
            net: Any = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=vae_channels)
            for zero in (*net.controlnet_down_blocks, net.controlnet_mid_block):
                for p in zero.parameters():
                    p.copy_(0.3 * torch.randn_like(p))
            for p in net.controlnet_cond_embedding.conv_out.parameters():
                p.copy_(torch.randn_like(p))
            net.save_pretrained(folder / f"controlnet-{name}")
    return folder


@pytest.fixture(scope="session")
def build_checkpoint() -> Callable[..., Path]:
    """`build_checkpoint(folder, ...)` writes a checkpoint of random weights, see `_build_checkpoint`."""
    return _build_checkpoint


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint; not to be changed, copy it."""
    return _build_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_checkpoint_cli(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller one, for 32x32 pictures, whose edits take milliseconds; not to be changed, copy it."""
    return _build_checkpoint(
        tmp_path_factory.mktemp("tiny") / "checkpoint", unet_channels=(8, 16), vae_channels=(8, 8, 8)
    )


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Any:
    """The random checkpoint, loaded."""
    from iedit.runtime.model.model import load_model

    return load_model(str(tiny_folder), device="cpu")


@pytest.fixture(scope="session")
def smallest(tiny: Any) -> Any:
    """The random checkpoint with a UNet and a ControlNet of one block each way: tracing and compiling one takes a third of the time."""
    import dataclasses

    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",), mid_block_type="UNetMidBlock2D", cross_attention_dim=32, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    net: Any = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    for zero in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        for p in zero.parameters():
            torch.nn.init.normal_(p, std=0.3)
    parts = {"unet": unet.eval().requires_grad_(False), "controlnets": {"pose": net.eval().requires_grad_(False)}}
    return dataclasses.replace(tiny, **parts)


@pytest.fixture(scope="session")
def tiny_torch(tiny: Any) -> Any:
    """The random checkpoint on eager torch."""
    from iedit.runtime.backends.eager import TorchBackend

    return TorchBackend(tiny)


@pytest.fixture
def editor(tiny: Any, tiny_torch: Any) -> Any:
    """An editor of the random checkpoint on eager torch, with an empty cache."""
    from iedit.runtime.editor import Editor

    return Editor(tiny, tiny_torch)


@pytest.fixture(scope="session")
def traced_once() -> Callable[[], Any]:
    """`with traced_once():` an export that is traced anew to be decomposed, which takes twice as long, fails."""
    import torch

    @contextlib.contextmanager
    def check() -> Iterator[None]:
        def refuse(*_: Any, **__: Any) -> None:
            raise AssertionError("an operator of this graph has to be decomposed")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.export.ExportedProgram, "run_decompositions", refuse)
            yield

    return check


@pytest.fixture(scope="session")
def tiny_engines(tiny: Any, tmp_path_factory: pytest.TempPathFactory, traced_once: Any) -> Path:
    """ONNX engines of the random checkpoint, exported once, also by several workers; not to be changed, copy them."""
    from iedit.export.onnx import export_onnx

    folder, modules = tmp_path_factory.getbasetemp(), TINY_MODULES
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    if (
        os.environ.get("PYTEST_XDIST_WORKER") == "gw1"
    ):  # two workers begin at two ends; what one has finished, the other finds there
        modules = (*TINY_MODULES[3:], *TINY_MODULES[:3])
    with traced_once():
        export_onnx(tiny, folder / "tiny_engines", modules=modules)
    return folder / "tiny_engines"


@pytest.fixture
def picture() -> Callable[..., Any]:
    """`picture(seed, size=(64, 64))`: a scene of the world, shrunk; PIL RGB."""
    from iedit.training import world

    def make(seed: int = 0, size: tuple[int, int] = (64, 64)) -> Any:
        return world.render(world.random_scene(random.Random(seed), 1)).resize(size)

    return make


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)
