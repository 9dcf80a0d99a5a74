"""Networks whose activations lie channels last: the same answers, and no copy into another memory format on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from iedit.runtime.backends.channels_last import ResidualBlock, keep_channels_last
from iedit.runtime.backends.eager import TorchBackend
from iedit.runtime.backends.graphs import GraphsBackend
from iedit.runtime.backends.torch_modules import sharing
from iedit.runtime.codec import Codec
from iedit.runtime.denoise_step import Condition, ControlInput
from iedit.runtime.model.model import load_model

Models = tuple[Any, Any]


@pytest.fixture(scope="module")
def pair(tiny_folder: Any) -> Models:
    """The same checkpoint as eager runs it, and with activations channels last."""
    eager, other = (load_model(str(tiny_folder), device="cpu") for _ in range(2))
    return TorchBackend(eager), GraphsBackend(other, channels_last=True)


def asked(model: Any, *names: str) -> tuple[Tensor, Tensor, Condition]:
    rng = torch.Generator().manual_seed(0)
    maps = tuple(ControlInput(n, torch.rand(3, 3, 64, 64, generator=rng), 0.5) for n in names)
    condition = Condition(Codec(model).encode_text(["a red car", "a blue house on sand", ""]), maps)
    return torch.randn(3, 4, 8, 8, generator=rng), torch.tensor([1, 500, 999]), condition


@pytest.mark.parametrize("names", [(), ("pose",), ("pose", "scribble")])
def test_it_predicts_what_diffusers_modules_predict(pair: Models, names: tuple[str, ...]) -> None:
    eager, other = pair
    x, t, condition = asked(eager.model, *names)
    want = eager.predict(x, t, condition)
    torch.testing.assert_close(other.predict(x, t, condition), want, rtol=0, atol=2e-5 * float(want.abs().max()))


def test_its_vae_is_the_model_s(pair: Models) -> None:
    eager, other = pair
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = eager.encode_image(images)
    torch.testing.assert_close(other.encode_image(images), latents, rtol=0, atol=2e-5)
    torch.testing.assert_close(other.decode_latent(latents), eager.decode_latent(latents), rtol=0, atol=2e-5)


class Layouts(TorchDispatchMode):
    """Sees what convolutions read, and copies of pictures into another memory format."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions: list[bool] = []
        self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name == "aten::convolution":
            self.convolutions.append(args[0].is_contiguous(memory_format=torch.channels_last))
        if name in ("aten::clone", "aten::copy_") and isinstance(made, Tensor) and made.dim() == 4:
            self.copies += 1
        return made


def test_no_convolution_begins_with_a_copy(pair: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    _, other = pair
    # The definition of a norm in plain torch copies, the kernel does not.
    norm = lambda x, *_, **__: x + 0.5  # noqa: E731
    monkeypatch.setattr("iedit.runtime.backends.channels_last.group_norm", norm)
    x, t, condition = asked(other.model)
    x = x.contiguous(memory_format=torch.channels_last)
    with Layouts() as seen:
        other.predict(x, t, condition)
    assert len(seen.convolutions) > 20 and all(seen.convolutions) and seen.copies == 0


def test_the_model_stays_as_diffusers_made_it(pair: Models) -> None:
    _, other = pair
    for network in (other.model.unet, other.model.vae, *other.model.controlnets.values()):
        assert not [m for m in network.modules() if type(m).__module__.startswith("iedit")]
    assert {id(p) for p in other.vae.parameters()} == {id(p) for p in other.model.vae.parameters()}


def test_a_block_that_is_not_known_stays(tiny: Any) -> None:
    plain: dict[str, Any] = {"in_channels": 32, "temb_channels": 16, "groups": 4}
    known, scaled = ResnetBlock2D(**plain), ResnetBlock2D(**plain, output_scale_factor=2.0)
    others = [scaled, ResnetBlock2D(**plain, time_embedding_norm="scale_shift"), ResnetBlock2D(**plain, up=True),
              ResnetBlock2D(**plain, non_linearity="gelu"), ResnetBlock2D(**plain, skip_time_act=True)]  # fmt: skip
    assert ResidualBlock.takes(known) and not any(map(ResidualBlock.takes, others))
    net = torch.nn.ModuleList([known, *others])
    x, temb = torch.randn(2, 32, 8, 8), torch.randn(2, 16)
    want = [block(x, temb) for block in net[:2]]
    made = sharing(net)
    keep_channels_last(made)
    assert [type(m) is ResnetBlock2D for m in made] == [False] + [True] * 5
    for block, before in zip(made[:2], want, strict=True):
        torch.testing.assert_close(block(x, temb), before, rtol=0, atol=1e-5)
