"""The eager backend: what is computed once, and that nothing else differs from calling diffusers' modules."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from iedit.runtime.backends.eager import TorchBackend
from iedit.runtime.backends.torch_modules import Attention, sharing, why_not_xformers
from iedit.runtime.codec import Codec
from iedit.runtime.denoise_step import Condition, ControlInput
from iedit.runtime.editor import Editor, EditRequest, Options
from iedit.runtime.errors import UsageError


def told(model: Any, texts: list[str], *names: str, scale: float = 1.0) -> Condition:
    rng = torch.Generator().manual_seed(1)
    maps = tuple(ControlInput(n, torch.rand(len(texts), 3, 64, 64, generator=rng), scale) for n in names)
    return Condition(Codec(model).encode_text(texts), maps)


def plain(model: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """diffusers' own modules, one after the other."""
    extra: dict[str, Any] = {}
    for c in condition.controls:
        down, mid = model.controlnets[c.name](
            x, t, condition.prompt_embeds, c.image, conditioning_scale=c.scale, return_dict=False
        )
        if extra:
            down = [a + b for a, b in zip(extra["down_block_additional_residuals"], down, strict=True)]
            mid = extra["mid_block_additional_residual"] + mid
        extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    with torch.no_grad():
        output: Tensor = model.unet(x, t, condition.prompt_embeds, return_dict=False, **extra)[0]
    return output


def test_what_runs_is_a_copy_of_a_network_with_the_same_weights_and_nothing_else_of_it(tiny: Any) -> None:
    for net in (tiny.unet, tiny.vae, tiny.controlnets["pose"]):
        made, plain_copy = sharing(net), copy.deepcopy(net)
        assert [(k, type(m)) for k, m in made.named_modules()] == [(k, type(m)) for k, m in plain_copy.named_modules()]
        assert not {id(m) for m in net.modules()} & {id(m) for m in made.modules()}
        for tensors in ("named_parameters", "named_buffers"):
            assert [(k, id(t)) for k, t in getattr(net, tensors)()] == [(k, id(t)) for k, t in getattr(made, tensors)()]
        for before, after in zip(net.modules(), made.modules(), strict=True):
            assert before.__dict__.keys() == after.__dict__.keys()
            held = [k for k, v in before.__dict__.items() if isinstance(v, dict | list | set)]
            assert held and all(after.__dict__[k] is not before.__dict__[k] for k in held)
    hooked: Any = torch.nn.Sequential(torch.nn.Linear(2, 2))
    hooked[0].register_forward_hook(lambda *_: None)
    hooked.again, hooked.call = hooked[0], hooked[0].forward  # the same module by another name, and a method of it
    made = sharing(hooked)
    assert made.again is made[0] and made.call.__self__ is made[0]
    made[0]._forward_hooks.clear()
    assert len(hooked[0]._forward_hooks) == 1


def inputs(count: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, 8, 8, generator=rng), torch.randint(0, 1000, (count,), generator=rng)


@pytest.mark.parametrize("names", [(), ("pose",), ("pose", "scribble")])
@pytest.mark.parametrize("options", [{}, {"channels_last": True}])
def test_it_predicts_what_diffusers_modules_predict(
    tiny_folder: Any, names: tuple[str, ...], options: dict[str, Any]
) -> None:
    from iedit.runtime.model.model import load_model

    model = load_model(str(tiny_folder), device="cpu")
    condition = told(model, ["a red car", "a blue house on sand", ""], *names, scale=0.5)
    x, t = inputs(3)
    want = plain(model, x, t, condition)
    backend = TorchBackend(model, **options)
    for _ in range(2):  # the second time from what was kept
        torch.testing.assert_close(backend.predict(x, t, condition), want, rtol=0, atol=2e-5 * float(want.abs().max()))


def counted(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[int]:
    """Batch sizes that `module.forward` is called with."""
    seen: list[int] = []
    forward = module.forward

    def count(x: Tensor, *rest: Any) -> Any:
        seen.append(len(x))
        return forward(x, *rest)

    monkeypatch.setattr(module, "forward", count)
    return seen


def test_a_loop_takes_keys_values_and_layouts_of_a_condition_once(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TorchBackend(tiny)
    cross = next(m for n, m in backend.unet.named_modules() if n.endswith("attn2"))
    keys, embeddings = counted(monkeypatch, cross.to_k), counted(monkeypatch, backend.embeddings["pose"])
    picture = Image.new("RGB", (64, 64), "red")
    request = EditRequest(picture, "a blue house", "a red car", "controlnet", {"pose": picture}, {"pose": picture}, steps=10,
                          options=Options(guidance_scale=5.0))  # fmt: skip
    profile = Editor(tiny, backend).edit(request).profile
    assert profile.calls["sample"] == 7 and profile.evaluations["sample"] == 14
    assert keys == [2] and embeddings == [2]
    other = Editor(tiny, backend).edit(request).profile
    assert other.calls["sample"] == 7
    assert keys == [2, 2] and embeddings == [2, 2]  # another run is another condition


def test_another_condition_is_not_taken_for_the_one_before(tiny: Any) -> None:
    backend = TorchBackend(tiny)
    x, t = inputs(1)
    outputs = []
    for text in ("a red car", "a blue house", "a tree", "a cat", "a ball", "a red car"):  # more than are kept
        condition = told(tiny, [text])
        outputs.append(backend.predict(x, t, condition))
        torch.testing.assert_close(outputs[-1], plain(tiny, x, t, condition), rtol=0, atol=1e-4)
        del condition  # its memory, and with it its id, may be the next one's
    assert torch.equal(outputs[0], outputs[-1]) and not torch.equal(outputs[0], outputs[1])


def test_threads_do_not_take_each_other_s_condition(tiny: Any) -> None:
    backend = TorchBackend(tiny)
    x, t = inputs(1)
    conditions = [told(tiny, [text]) for text in ("a red car", "a blue house", "a cat")]
    want = [TorchBackend(tiny).predict(x, t, c) for c in conditions]
    wrong: list[int] = []

    def run(i: int) -> None:
        wrong.extend(i for _ in range(20) if not torch.equal(backend.predict(x, t, conditions[i]), want[i]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_model_stays_as_diffusers_made_it_and_its_weights_are_not_copied(tiny: Any) -> None:
    backend = TorchBackend(tiny)
    assert {id(p) for p in backend.unet.parameters()} <= {id(p) for p in tiny.unet.parameters()}
    assert not any(isinstance(p, Attention) for p in tiny.unet.attn_processors.values())
    assert all(isinstance(p, Attention) for p in backend.unet.attn_processors.values())
    assert type(tiny.unet.time_proj).__name__ == "Timesteps"


def test_time_embeddings_of_all_timesteps_are_those_of_the_network(tiny: Any) -> None:
    table = TorchBackend(tiny).unet.time_proj
    t = torch.tensor([0, 1, 500, 999])
    with torch.no_grad():
        want = tiny.unet.time_embedding(tiny.unet.time_proj(t))
    torch.testing.assert_close(table(t), want, rtol=0, atol=1e-6)
    assert table.rows.shape[0] == 1000


def test_an_attention_that_cannot_run_is_refused_with_the_reason(tiny: Any) -> None:
    with pytest.raises(UsageError, match="attention is 'flash', expected one of sdpa, xformers"):
        TorchBackend(tiny, attention="flash")
    if torch.cuda.is_available():
        pytest.skip("xformers may run here")
    assert why_not_xformers(torch.device("cpu"))
    with pytest.raises(UsageError, match=r"attention 'xformers' was requested but cannot run: .*xformers"):
        TorchBackend(tiny, attention="xformers")


@pytest.mark.gpu
def test_xformers_attention_is_sdpa_s(tiny_folder: Any) -> None:
    from iedit.runtime.model.model import load_model

    model = load_model(str(tiny_folder), device="cuda", dtype="float16")
    why = why_not_xformers(model.device)
    if why:
        pytest.skip("; ".join(why))
    condition = told(model, ["a red car", ""])
    x, t = (v.cuda() for v in inputs(2))
    a, b = (TorchBackend(model, attention=n).predict(x, t, condition) for n in ("sdpa", "xformers"))
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
