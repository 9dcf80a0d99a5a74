"""What the backends that run exported engines share: finding engines, refusing them with reasons, and calling them.

An engine is used if every field of its spec is what the model and this machine want, and if its files are those that were built. Reasons
why others are refused are kept, and `why_not` gives them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..denoise_step import Condition, IdentityCache
from ..errors import UsageError
from ..model import module_io
from ..model.model import Model
from ..profile import current
from .base import even, refuse, unet_module
from .engine_spec import EngineSpec, damaged, engines_folder, find_engines, writable_by_all

Engine = tuple[Path, EngineSpec]  # the folder and what is in its spec
_PRECISION = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class EngineBackend:
    """Base of a backend that runs the engines of one format. A subclass adds `_run`, and what it wants of a spec.

    Args:
        engines: folder of engines; None is the user's cache, by the weights' digest.
        trust_engines: also use engines that every user of this machine may change.

    Raises:
        UsageError: no engine of a UNet can be used.
    """

    name: str
    format_name: str  # as it is spelt in messages
    file: str  # that every engine of the format must have

    def __init__(self, model: Model, engines: Path | None, trust_engines: bool):
        self.model, self.device, self.trust = model, model.device, trust_engines
        own = _PRECISION[model.dtype]
        self.precisions = [own] if own == "fp32" else [own, "fp32"]  # that are used, best first
        self.folder = engines_folder(model.weights_digest) if engines is None else engines
        self.refused: dict[str, list[str]] = {}  # module, or the name of a folder whose spec cannot be read -> reasons
        self._found: dict[str, list[Engine]] = {}  # module -> engines that fit by their specs, best first
        self._whole: dict[Path, bool] = {}  # whether the files of an engine are those that were built
        self._lock = threading.RLock()
        self._embeddings: IdentityCache[dict[str, Tensor]] = IdentityCache(4)
        self._find()
        if not any(self.engines(m) for m in list(self._found) if m.startswith("unet")):
            reasons = [f"{module}: {'; '.join(why)}" for module, why in self.refused.items()]
            why = "; ".join(reasons or [f"there are no {self.format_name} engines in it"])
            raise UsageError(f"no engine of {model.name} can be used: {self.folder}: {why}; {self.fix}")

    @property
    def fix(self) -> str:
        """What to do where an engine is missing."""
        return f"run `iedit export {self.name} {self.model.name}`"

    def _find(self) -> None:
        for folder, spec in find_engines(self.folder):
            if isinstance(spec, UsageError):
                self.refused.setdefault(folder.name, []).append(str(spec))
            elif spec.format == self.name:
                why = self._differs(spec)
                self._refuse(spec.module, folder, why)
                if not why:
                    self._found.setdefault(spec.module, []).append((folder, spec))
        for engines in self._found.values():
            engines.sort(key=lambda engine: (self.precisions.index(engine[1].precision), -engine[1].opset))

    def _refuse(self, module: str, folder: Path, why: Sequence[str]) -> None:
        if why:
            self.refused.setdefault(module, []).extend(f"{folder}: {w}" for w in why)

    def _differs(self, spec: EngineSpec) -> list[str]:
        """Every field of a spec that is not as wanted."""
        try:
            wanted = {"weights": self.model.module_digest(spec.module), "inputs": module_io.inputs(spec.module)}
        except KeyError as error:
            return [f"module: {spec.module} needs {error.args[0]}, which the model does not have"]
        why = spec.differs(**wanted) + ([] if self.file in spec.files else [f"files: {self.file} is not among them"])
        if not why and spec.precision not in self.precisions:
            why = [f"precision: the engine has {spec.precision}, wanted {' or '.join(self.precisions)}"]
        return why

    def _sound(self, module: str) -> Iterator[Engine]:
        """The engines of a module whose files are those that were built, best first; each is looked at when it is come to."""
        for folder, spec in self._found.get(module, []):
            with self._lock:
                if folder not in self._whole:
                    why = damaged(folder, spec) or ([] if self.trust else writable_by_all(folder, spec, self.folder))
                    self._refuse(module, folder, why)
                    self._whole[folder] = not why
            if self._whole[folder]:
                yield folder, spec

    def engines(self, module: str) -> list[Engine]:
        """The engines that may run a module."""
        return list(self._sound(module))

    def engine_digests(self, module: str) -> list[str]:
        """`EngineSpec.digest` of every engine that may run `module`; empty if none does."""
        return [spec.digest for _, spec in self.engines(module)]

    def modules(self) -> list[str]:
        """Names of the modules that an engine fits by its spec; its files may turn out damaged (`engines`)."""
        return sorted(self._found)

    def why_not(self, module: str, batch: int, height: int, width: int) -> list[str]:
        """See `base.Backend`. A fused UNet needs the engines of its control embeddings too. A batch that is too large for the engines is run
        in several calls (`pieces`)."""
        if module.startswith(module_io.CONTROLLED_UNET):
            return ["the attention of an engine is fixed, and this method changes it; use --backend torch, or auto"]
        if any(name.startswith(module_io.ADAPTER_PREFIX) for name in module_io.layouts(module)):
            return ["no engine takes the features of a T2I-Adapter; use --backend torch, or auto"]
        parts = (module, *module_io.control_embedding_modules(module))
        return [why for part in parts for why in self._why_not(part, batch, height, width)]

    def _why_not(self, module: str, batch: int, height: int, width: int) -> list[str]:
        engines = self.engines(module)
        if not engines:
            return [f"there is no engine for {module} in {self.folder} ({self.fix})", *self.refused.get(module, [])]
        why: list[str] = []
        for size in sorted(set(self.pieces(module, batch, height, width))):
            misses = [spec.out_of_range(size, *pixels(spec, height, width)) for _, spec in engines]
            why += [reason for reasons in misses for reason in reasons if reason not in why] if all(misses) else []
        # The VAE's halves take multiples of its own factor; a UNet's levels halve the latent further.
        multiple = self.model.multiple if module.startswith("unet") else self.model.vae_scale_factor
        if module != "text_encoder" and (height % multiple or width % multiple):
            why.append(f"{module} takes width and height in multiples of {multiple}, asked for {width}x{height}")
        return why

    def pieces(self, module: str, batch: int, height: int, width: int) -> list[int]:
        """The numbers of samples of the calls that a batch is run in: one call where an engine takes it whole, else as many as
        the largest batch of an engine asks for. Pieces are even, so that two samples that are compared (see
        `sampling.estimate_mask`) are in one call and rounded alike."""
        every = [(spec, s) for _, spec in self.engines(module) for s in spec.shapes]
        fitting = [s for spec, s in every if not s.out_of_range(s.batch[0], *pixels(spec, height, width))]
        ranges = [s.batch for s in fitting or [s for _, s in every]]
        if any(not most or most >= batch for _, _, most in ranges) or not ranges:
            return [batch]
        least, _, most = max(ranges, key=lambda r: r[2])
        step = even(most) if even(most) >= least else most
        return [step] * (batch // step) + ([batch % step] if batch % step else [])

    # --- modules ------------------------------------------------------------------------------------------------

    def _batch(self, module: str, inputs: Sequence[Tensor], height: int, width: int) -> Tensor:
        """A module on a batch of any size, in calls that its engines take. Arguments as of `_run`.

        Raises:
            UsageError: no engine takes it, with the reasons.
        """
        batch = len(inputs[0])
        refuse(self, module, batch, height, width)
        running = current()
        if running is not None and not all(spec.checked for _, spec in self.engines(module)):
            running.unverified.setdefault(
                f"{self.name} {module}", f"iedit export verify {self.model.name} --backend {self.name}"
            )
        sizes = self.pieces(module, batch, height, width)
        if len(sizes) == 1:
            return self._run(module, inputs, height, width)
        pieces = zip(*(i.split(sizes) for i in inputs), strict=True)
        return torch.cat([self._run(module, piece, height, width) for piece in pieces])

    def _run(self, module: str, inputs: Sequence[Tensor], height: int, width: int) -> Tensor:
        """One call of a module at a shape that one of its engines takes, float32 and the caller's own.

        Args:
            inputs: in the order of `module_io.inputs`.
            height, width: pixels; 0 for the text encoder.
        """
        raise NotImplementedError

    @torch.no_grad()
    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `base.Denoiser`."""
        module, factor = unet_module(condition), self.model.vae_scale_factor
        height, width = x.shape[-2] * factor, x.shape[-1] * factor
        inputs = [condition.network_input(x), t.expand(len(x)), condition.prompt_embeds]
        if condition.controls:
            refuse(self, module, len(x), height, width)  # before the embeddings, so that it is the UNet that is named
            embeddings = self._control_embeddings(condition)
            for control in sorted(condition.controls, key=lambda c: c.name):
                inputs += [embeddings[control.name], torch.full((len(x),), control.scale, device=x.device)]
        return self._batch(module, inputs, height, width)

    def _control_embeddings(self, condition: Condition) -> dict[str, Tensor]:
        """By layout; made once for each condition."""
        return self._embeddings.get(
            [condition], lambda: {c.name: self.control_embedding(c.name, c.image) for c in condition.controls}
        )

    @torch.no_grad()
    def control_embedding(self, name: str, images: Tensor) -> Tensor:
        """(B, 3, H, W) layout maps in [0, 1] -> (B, C0, h, w) float32 embedding."""
        return self._batch(module_io.CONTROL_EMBEDDING_PREFIX + name, [images], *images.shape[-2:])

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        return self._batch("vae_encoder", [images], *images.shape[-2:])

    @torch.no_grad()
    def decode_latent(self, latents: Tensor) -> Tensor:
        factor = self.model.vae_scale_factor
        return self._batch("vae_decoder", [latents], latents.shape[-2] * factor, latents.shape[-1] * factor)

    @torch.no_grad()
    def encode_tokens(self, ids: Tensor) -> Tensor:
        return self._batch("text_encoder", [ids], 0, 0)


def pixels(spec: EngineSpec, height: int, width: int) -> tuple[int, int]:
    """What to ask a spec's ranges for: a text has no height and width, so any that the engine takes will do."""
    if spec.module == "text_encoder":
        return spec.shapes[0].height[1], spec.shapes[0].width[1]
    return height, width
