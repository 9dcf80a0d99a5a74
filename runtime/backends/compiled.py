"""torch.compile: a model's networks as fused kernels; on CUDA each denoising step is one replay of a CUDA graph.

The UNet and the ControlNets of a condition are one function, with the control embeddings, their scales and the per-sample timesteps as
inputs, so another prompt, scale or level does not compile again. Compiling is not part of what a step costs: such calls are cold in the profile.
What compiles when:

- On a CPU shapes are dynamic: one function serves all sizes and numbers of samples but for what Dynamo takes for a constant, a batch of one
  among it, which makes three or four compilations of each set of layouts: six sets at four numbers of samples and three sizes, 72 shapes, are 21.
- On CUDA the first `STATIC_SHAPES` shapes of a module are compiled each for itself, because with dynamic shapes Inductor does without its
  channels-last convolutions; those are the shapes of an edit, over and over. What comes after them shares a dynamic function as on a CPU.

On CUDA a step's graph holds the network, the guidance, the DDIM step, the blend and the ITO update (`step`), recorded when
an outline of inputs comes for the second time. Where recording fails the compiled functions run without, and the profile says why.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..denoise_step import Condition, Transition, joined
from ..errors import RunError
from ..model.model import Model
from ..profile import module_call
from .base import BackendOptions, unet_module
from .cuda_graphs import CudaGraphCache, capture
from .torch_modules import PreparedCondition, PreparedControl, TorchModules, summed_residuals, unet_extras


def why_unavailable() -> list[str]:
    """Reasons why torch.compile cannot work on this machine; empty if it can."""
    if torch.cuda.is_available():
        from ...kernels.dispatch import triton_missing

        return list(triton_missing())
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        return [f"no C++ compiler: {compiler} is not on the path (install one, or name it in CXX)"]
    return []


def load(model: Model, options: BackendOptions) -> CompileBackend:
    """See `backends.load_backend`."""
    return CompileBackend(model, attention=options.attention, channels_last=options.channels_last)


class CompileBackend(TorchModules):
    """See this file's docstring. Arguments as of `TorchModules`, and:

    Args:
        graphs: CUDA graphs of the model's device; by default new ones, which record on CUDA and nowhere else.
        static_shapes: how many shapes of a module are compiled each for itself; by default `STATIC_SHAPES` on CUDA and none elsewhere.
    """

    name = "compile"
    keeps_text = False  # the function computes them: 0.4 % of the arithmetic of SD 1.5 at 512x512

    def __init__(
        self,
        model: Model,
        *,
        attention: str = "sdpa",
        channels_last: bool = False,
        graphs: CudaGraphCache | None = None,
        static_shapes: int | None = None,
    ):
        super().__init__(model, attention=attention, channels_last=channels_last)
        on_cuda = model.device.type == "cuda"
        self.graphs = graphs or CudaGraphCache(model.device, capture=capture if on_cuda else None)
        self.static_shapes = (STATIC_SHAPES if on_cuda else 0) if static_shapes is None else static_shapes
        self._compiled: dict[str, Callable[..., Tensor]] = {}

    def _function(self, module: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`function` compiled, the first that came for the module."""
        if module not in self._compiled:
            self._compiled[module] = compiled(function, self.static_shapes)
        return self._compiled[module]

    def _call(
        self, module: str, name: str, function: Callable[[Any], list[Tensor]], inputs: Any, batch: int
    ) -> list[Tensor]:
        """`function(inputs)` as a call of `module`, from a CUDA graph where there are any; `name` is the function's."""
        cold = self.graphs.cold(name, inputs)
        with module_call(module, self.name, batch, cold=cold, device=self.model.device):
            outputs = self.graphs(name, function, inputs)
        self.graphs.tell_failure(module)
        return outputs

    def _run(self, module: str, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """A call of `function` compiled, float32."""

        def run(inputs: tuple[Any, ...]) -> list[Tensor]:
            return [self._function(module, function)(*inputs).float()]

        return self._call(module, module, run, inputs, len(inputs[0]))[0]

    def _unet(self, condition: Condition) -> Callable[..., Tensor]:
        """The UNet and the ControlNets of a condition: (x, t, prompt_embeds, control embeddings, scales, features of T2I-Adapters, control of
        attention) -> what the UNet predicts."""
        names = _names(condition)

        def fused(
            x: Tensor,
            t: Tensor,
            prompt_embeds: Tensor,
            embeddings: list[Tensor],
            scales: list[Tensor],
            features: list[Tensor],
            control: tuple[Any, ...],
        ) -> Tensor:
            outputs = [
                self.controlnets[name](
                    x, t, prompt_embeds, controlnet_cond=embedding, conditioning_scale=scale, return_dict=False
                )
                for name, embedding, scale in zip(names, embeddings, scales, strict=True)
            ]
            added = summed_residuals(outputs) | unet_extras(PreparedControl(*control) if control else None, features)
            output: Tensor = self.unet(x, t, prompt_embeds, return_dict=False, **added)[0]
            return output

        return fused

    @torch.no_grad()
    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `base.Denoiser`."""
        prepared = self.prepared(condition)
        inputs = (condition.network_input(x.to(self.dtype)), t, prepared.prompt_embeds, *_controls(prepared))
        return self._run(unet_module(condition), self._unet(condition), *inputs)

    @torch.no_grad()
    def step(
        self, t: Sequence[Tensor], condition: Condition, transitions: Sequence[Transition]
    ) -> list[tuple[Tensor, Tensor]] | None:
        """See `base.Stepper`; None where there are no graphs, or a state is carried from step to step."""
        if not self.graphs.enabled or condition.image is not None or not all(s.stateless for s in transitions):
            return None
        prepared, module = self.prepared(condition), unet_module(condition)

        def run(inputs: tuple[Any, ...]) -> list[Tensor]:
            t, transitions, prompt_embeds, *controls = inputs
            x = joined([s.x for s in transitions for _ in range(1 + s.guided)]).to(self.dtype)
            unet = self._function(module, self._unet(condition))
            output = unet(x, joined(t), prompt_embeds, *controls).float()
            parts = output.split([(1 + s.guided) * len(s.x) for s in transitions])
            return [p.sum() for p in parts] + [s(p) for s, p in zip(transitions, parts, strict=True)]

        inputs = (tuple(t), tuple(transitions), prepared.prompt_embeds, *_controls(prepared))
        outputs = self._call(module, f"step of {module}", run, inputs, len(condition))
        return list(zip(outputs[: len(transitions)], outputs[len(transitions) :], strict=True))

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        # The first half of the channels is the posterior's mean, which is its mode.
        return self._run("vae_encoder", lambda x: self.model.vae._encode(x).chunk(2, dim=1)[0], images.to(self.dtype))

    @torch.no_grad()
    def decode_latent(self, latents: Tensor) -> Tensor:
        return self._run(
            "vae_decoder", lambda z: self.model.vae.decode(z, return_dict=False)[0], latents.to(self.dtype)
        )

    @torch.no_grad()
    def encode_tokens(self, ids: Tensor) -> Tensor:
        return self._run("text_encoder", lambda ids: self.model.text_encoder(ids)[0], ids)


def _names(condition: Condition) -> list[str]:
    """Names of a condition's ControlNets, in the order in which the compiled function takes them."""
    return sorted(c.name for c in condition.controls if not c.adapter)


def _controls(prepared: PreparedCondition) -> tuple[list[Tensor], list[Tensor], list[Tensor], tuple[Any, ...]]:
    """What the compiled function takes of a condition beside its text; control of attention as its fields, () for none."""
    names, c = _names(prepared.condition), prepared.control
    control = () if c is None else (c.edited, c.sources, c.whose, c.cross, c.own, c.self_queries)
    return (
        [prepared.control_embeddings[n] for n in names],
        [prepared.scales[n] for n in names],
        prepared.features,
        control,
    )


# How often Dynamo may compile one function again before it gives up. All modules share the code of `fused`, and a process may edit many
# sizes, batches and layouts; the defaults, 8 and 256, were reached by the tests of one checkpoint.
_LIMITS = {"recompile_limit": 256, "accumulated_recompile_limit": 4096}


# Shapes of a module that are compiled each for itself on CUDA: an edit without layouts calls the UNet with three or four numbers of samples at
# one size. Each has its own copy of the convolutions' weights where they are not channels-last already (`channels_last`).
STATIC_SHAPES = 4


def compiled(function: Callable[..., Tensor], static_shapes: int = 0) -> Callable[..., Tensor]:
    """`function` by Inductor: whole or an error, never half of it in eager.

    Args:
        function: of tensors, and lists or tuples of tensors and numbers.
        static_shapes: so many first shapes of the inputs are compiled each for itself, all others with dynamic shapes.
    """

    def made(dynamic: bool) -> Callable[..., Tensor]:
        # freezing: weights are constants, repacked for the kernels that read them.
        return torch.compile(function, fullgraph=True, dynamic=dynamic, options={"freezing": True})

    any_shape, one_shape = made(True), made(False)
    static: set[tuple[Any, ...]] = set()

    def call(*inputs: Any) -> Tensor:
        shape = tuple(getattr(t, "shape", t) for i in inputs for t in (i if isinstance(i, (list, tuple)) else [i]))
        if len(static) < static_shapes:
            static.add(shape)
        try:
            with torch._dynamo.config.patch(_LIMITS):  # 10 microseconds
                output: Tensor = (one_shape if shape in static else any_shape)(*inputs)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise RunError(
                f"torch.compile: this process has compiled a module {_LIMITS['recompile_limit']} times, for as many kinds of shapes, and "
                "compiles no more; start another process, or use --backend torch"
            ) from error
        return output

    return call
