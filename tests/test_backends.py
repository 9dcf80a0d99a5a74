"""The fallback of `auto`, per module and shape, with reasons; a backend asked for by name never steps down."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from iedit.runtime import BACKENDS, backends
from iedit.runtime.backends import load_backend
from iedit.runtime.backends.base import unet_module
from iedit.runtime.backends.eager import TorchBackend
from iedit.runtime.backends.fallback import FallbackBackend
from iedit.runtime.denoise_step import Condition, ControlInput
from iedit.runtime.editor import Editor, EditRequest
from iedit.runtime.errors import UsageError
from iedit.runtime.profile import Profile, current, module_call


class Picky(TorchBackend):
    """A fast backend with an engine for some modules, at batches up to 2 only."""

    name = "picky"

    def __init__(self, model: Any, modules: tuple[str, ...]):
        super().__init__(model)
        self.modules = modules

    def why_not(self, module: str, batch: int, height: int, width: int) -> list[str]:
        if module not in self.modules:
            return [f"no engine for {module}"]
        return [] if batch <= 2 else [f"batch 1-2, asked for {batch}"]


def test_the_first_that_can_runs_each_module_at_each_shape_and_the_reasons_are_kept(tiny: Any) -> None:
    fallback = FallbackBackend(
        [Picky(tiny, ("unet", "vae_decoder")), TorchBackend(tiny)], tiny.vae_scale_factor, {"gone": ["not installed"]}
    )
    editor = Editor(tiny, fallback)
    request = EditRequest(Image.new("RGB", (64, 64), "red"), "a blue house", "a red car", steps=4)
    result = editor.edit(request)
    ran = {(c.module, c.backend) for c in result.profile.modules}
    assert ran == {("text_encoder", "torch"), ("vae_encoder", "torch"), ("unet", "picky"), ("unet", "torch"), ("vae_decoder", "picky")}  # fmt: skip
    batches: dict[str, set[int]] = {}
    for call in result.profile.modules:
        if call.module == "unet":
            batches.setdefault(call.backend, set()).add(call.batch)
    assert batches == {"picky": {1, 2}, "torch": {3, 20}}
    down = result.profile.fallbacks
    assert down[("unet", "picky")] == ["batch 1-2, asked for 20", "batch 1-2, asked for 3"]
    assert down[("vae_encoder", "picky")] == ["no engine for vae_encoder"]
    assert down[("all", "gone")] == ["not installed"]
    assert {"module": "all", "backend": "gone", "reasons": ["not installed"]} in result.receipt["backend"]["fallbacks"]
    assert result.receipt["backend"]["modules"]["unet"] == ["picky", "torch"]
    # The same edit by eager alone.
    want = Editor(tiny, TorchBackend(tiny)).edit(request)
    assert torch.equal(result.latent, want.latent)


def test_a_backend_asked_for_by_name_is_refused_with_its_reasons() -> None:
    with pytest.raises(UsageError, match="backend 'magic' was requested but cannot run: there is no such backend"):
        Editor.load(backend="magic")
    for name in BACKENDS:
        why = backends.why_unavailable(name)
        assert all(isinstance(w, str) and w for w in why)
        if why:
            with pytest.raises(UsageError, match=f"backend '{name}' was requested but cannot run"):
                Editor.load(backend=name)
    assert backends.why_unavailable("torch") == []
    assert list(backends.reasons()) == list(BACKENDS)


def test_auto_always_answers(tiny: Any) -> None:
    auto = load_backend("auto", tiny)
    assert auto.name == "auto" and auto.why_not("unet", 1, 64, 64) == []
    result = Editor(tiny, auto).edit(EditRequest(Image.new("RGB", (64, 64)), "a cat", method="sdedit", steps=2))
    assert result.profile.modules and result.profile.fallbacks


def test_the_module_of_a_condition_names_its_layouts_in_order() -> None:
    text, maps = torch.zeros(1, 2, 3), torch.zeros(1, 3, 8, 8)
    assert unet_module(Condition(text)) == "unet"
    assert (
        unet_module(Condition(text, (ControlInput("scribble", maps, 1.0), ControlInput("pose", maps, 1.0))))
        == "unet+pose+scribble"
    )


def test_module_calls_go_to_the_running_profile_of_the_thread() -> None:
    assert current() is None
    with module_call("unet", "torch", 3):
        pass  # nobody is listening
    profile = Profile()
    with profile.stage("final"):
        assert current() is profile
        profile.step(1, 2)
        with module_call("unet", "torch", 3, cold=True):
            pass
        with module_call("unet", "torch", 2):
            pass
    assert current() is None
    assert [(c.stage, c.step, c.module, c.batch, c.cold) for c in profile.modules] == [
        ("final", 1, "unet", 3, True), ("final", 1, "unet", 2, False),
    ]  # fmt: skip
    (row,) = profile.by_module()
    assert row["calls"] == 2 and row["samples"] == 5 and row["cold_calls"] == 1
    assert 0 <= row["cold_seconds"] <= row["seconds"]


def test_stages_that_share_calls_split_their_seconds_by_samples() -> None:
    import time

    profile = Profile()
    with profile.stage("invert", "guidance"):
        time.sleep(0.02)
        profile.count({"invert": 1, "guidance": 3})
    assert profile.seconds["guidance"] == pytest.approx(3 * profile.seconds["invert"])
    assert sum(profile.seconds.values()) >= 0.02
    assert profile.calls == {"invert": 0, "guidance": 1}
