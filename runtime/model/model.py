"""A diffusers-layout checkpoint -> its parts. The embedded picture-book model, a local folder and a hub id take one path."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import machine
from ..errors import UsageError, first_line
from ..schedule import Schedule
from .checkpoint import PICTUREBOOK, Checkpoint, find_checkpoint, layout_folders, read_json, weights_of
from .module_io import ADAPTER_PREFIX, CONTROL_EMBEDDING_PREFIX, CONTROLNET_PREFIX
from .module_io import layouts as layouts_of


@dataclass
class Model:
    """The parts of a checkpoint, in eval mode on one device.

    Attributes:
        name, folder: as asked for, and where it was found.
        controlnets, adapters: layout name -> ControlNetModel or T2IAdapter, of the layouts that it was loaded for (`used_layouts` of `load_model`).
        left_out: the layouts whose networks were not loaded.
        digest: sha256 over everything of the checkpoint that a result depends on beside the noise schedule: weights and configs
            of every part, loaded or not, the tokenizer, and which ControlNet goes by which name; 16 hex digits.
        weights_digest: over the weights alone; names the folder that engines are kept in.
        words, reconstruction_error: what its `iedit.json` says of its world (see `checkpoint.Recommended`).
        notes: what was settled otherwise than asked while it was loaded; every result of an edit repeats them.
        part_digests: over weights and config of each part: unet, vae, text_encoder, controlnet-NAME, adapter-NAME.
        guidance_scale, recommends_guidance: what the checkpoint's `iedit.json` recommends, else 7.5; and whether it does.
        mask_strength, mask_threshold: of `MaskOptions`, where the checkpoint's `iedit.json` recommends them.
        text_update_share: share of the steps that ITO updates (`ItoSettings.t_u`) in an edit without layouts, likewise.
        guidance_until, guidance_path, mask_seeds: of `Options` for ITO, likewise; the first also of text to image (`Editor.generate`).
        lambda_area: share of the picture up to which ITO's lambda is 1 where it is left open (`Options.chosen_lambda`); None is never.
        generate_eta: of `Editor.generate`, likewise.
    """

    name: str
    folder: Path
    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    schedule: Schedule
    controlnets: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    digest: str
    weights_digest: str
    guidance_scale: float = 7.5
    mask_strength: float | None = None
    mask_threshold: float | None = None
    text_update_share: float | None = None
    guidance_until: float | None = None
    guidance_path: str | None = None
    mask_seeds: int | None = None
    lambda_area: float | None = None
    generate_eta: float | None = None
    part_digests: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    words: frozenset[str] = frozenset()
    reconstruction_error: float | None = None
    adapters: dict[str, Any] = field(default_factory=dict)
    recommends_guidance: bool = False
    left_out: tuple[str, ...] = ()

    @property
    def layouts(self) -> list[str]:
        """Names of the layouts that it can read."""
        return [*self.controlnets, *self.adapters]

    def module_digest(self, module: str) -> str:
        """Digest of the parts that an engine for `module` is made of (see `engine_spec.EngineSpec`), 16 hex digits."""
        return module_digest(self.part_digests, module)

    @property
    def channels(self) -> int:
        """Latent channels."""
        return int(self.vae.config.latent_channels)

    @property
    def instructs(self) -> bool:
        """Whether the UNet takes the picture's latent beside the noisy one (InstructPix2Pix)."""
        return int(self.unet.config.in_channels) == 2 * self.channels

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent cell."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def side(self) -> int | None:
        """Pixels of the square pictures that it was trained on; None where its config does not say."""
        cells = self.unet.config.sample_size
        return cells * self.vae_scale_factor if isinstance(cells, int) else None

    @property
    def multiple(self) -> int:
        """What width and height must be multiples of: the VAE's factor times the UNet's own."""
        return self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def text_length(self) -> int:
        """Tokens that the text encoder takes at a time, with the first and the last one."""
        return int(min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings))


def module_digest(part_digests: Mapping[str, str], module: str) -> str:
    """See `Model.module_digest`.

    Raises:
        KeyError: the model has no such part.
    """
    if module.startswith("unet"):
        parts = ["unet", *(CONTROLNET_PREFIX + name for name in layouts_of(module))]
    elif module.startswith(CONTROL_EMBEDDING_PREFIX):
        parts = [CONTROLNET_PREFIX + module.removeprefix(CONTROL_EMBEDDING_PREFIX)]
    else:
        parts = ["vae" if module.startswith("vae_") else module]
    return hashlib.sha256("".join(part_digests[p] for p in parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Digests:
    """`Model.digest`, `Model.weights_digest` and `Model.part_digests` of a checkpoint."""

    whole: str
    weights: str
    parts: Mapping[str, str]


def read_digests(model: str) -> Digests:
    """The digests of a checkpoint with the ControlNets inside it; its weights are not loaded."""
    checkpoint = find_checkpoint(model)
    return _digests(checkpoint)


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers draws one for each part, diffusers one for each part in shards."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [library for library in (of_diffusers, of_transformers) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _read(loader: Any, folder: Path, dtype: torch.dtype) -> Any:
    """One part with its weights, whichever of the usual names they have."""
    variant = None
    names = [p.name for p in weights_of(folder)]
    if names and all(".fp16." in n for n in names):
        variant = "fp16"
    keyword = "dtype" if loader.__module__.startswith("transformers") else "torch_dtype"
    try:
        with no_progress_bars():
            part, report = loader.from_pretrained(
                folder, local_files_only=True, variant=variant, output_loading_info=True, **{keyword: dtype}
            )
    except Exception as error:
        raise UsageError(
            f"model: {folder} cannot be read ({first_line(error)}); the files may be damaged or cut off"
        ) from error
    missing = sorted(k for k in report["missing_keys"] if not k.endswith("position_ids"))  # a buffer, made anew
    if missing:  # both libraries go on with random weights
        raise UsageError(
            f"model: {folder} lacks {len(missing)} of its weights, {missing[0]} first; it is incomplete or for another config"
        )
    return part.eval().requires_grad_(False)


# What a config carries of where it came from; nothing is computed from it.
_ORIGIN = ("_name_or_path", "_diffusers_version", "transformers_version", "torch_dtype", "dtype", "architectures")


def _config_bytes(path: Path) -> bytes:
    """A part's config in one spelling, so that the same settings saved by another version of a library are the same."""
    return json.dumps({k: v for k, v in read_json(path).items() if k not in _ORIGIN}, sort_keys=True).encode()


def _digests(checkpoint: Checkpoint) -> Digests:
    """The digests, 16 hex digits each."""
    folder = checkpoint.folder
    readers = {CONTROLNET_PREFIX + name: path for name, path in checkpoint.controlnets.items()}
    readers |= {ADAPTER_PREFIX + name: path for name, path in checkpoint.adapters.items()}
    whole, weights, parts = hashlib.sha256(), hashlib.sha256(), {}
    for name, where in ({p: folder / p for p in ("unet", "vae", "text_encoder")} | readers).items():
        part = hashlib.sha256(_config_bytes(where / "config.json"))
        for path in weights_of(where):
            with path.open("rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").digest()
            weights.update(f"{where.name}/{path.name}".encode() + digest)
            part.update(digest)
        parts[name] = part.hexdigest()[:16]
        whole.update(f"{name}={part.hexdigest()};".encode())
    for path in sorted(p for p in (folder / "tokenizer").iterdir() if p.is_file()):
        content = _config_bytes(path) if path.name == "tokenizer_config.json" else path.read_bytes()
        whole.update(f"tokenizer/{path.name}={hashlib.sha256(content).hexdigest()};".encode())
    return Digests(whole.hexdigest()[:16], weights.hexdigest()[:16], parts)


def find_device(asked: str | torch.device | None) -> torch.device:
    """The device to use: the one asked for, or the GPU if there is one."""
    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(asked)
    except RuntimeError:
        raise UsageError(f"device is {asked!r}, expected cpu, cuda or cuda:NUMBER") from None
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        have = torch.cuda.device_count()
        raise UsageError(f"device: {where} was asked for, but {f'only {have} CUDA devices are' if have else 'no CUDA device is'} "
                         "here; use another number, or cpu")  # fmt: skip
    if where.type not in ("cpu", "cuda"):
        raise UsageError(f"device is {asked!r}, expected cpu, cuda or cuda:NUMBER")
    return where


def load_model(
    model: str = PICTUREBOOK,
    layouts: Mapping[str, str] | Sequence[str] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    emulate: bool = False,
    used_layouts: Collection[str] | None = None,
) -> Model:
    """Load a checkpoint.

    Args:
        model: "picturebook" (embedded), a diffusers folder, or a hub id.
        layouts: ControlNets and T2I-Adapters: a mapping of layout name to folder or hub id, or names of those that lie in the checkpoint
            as `controlnet-NAME` or `adapter-NAME`. None takes all that lie there.
        device: default the GPU if there is one.
        dtype: default float16 on a GPU and float32 on a CPU. A half that the CPU has no arithmetic for becomes float32, with
            a note in the model.
        emulate: keep such a half all the same; it is tens of times slower than float32.
        used_layouts: names of the layouts that requests will have: the networks of the others are not loaded. None loads them all. It is the
            same model by its digests, which are of every file.

    Raises:
        UsageError: a part is missing, unreadable or does not fit the others.
    """
    from diffusers import AutoencoderKL, ControlNetModel, T2IAdapter, UNet2DConditionModel
    from transformers import CLIPTextModel

    checkpoint = find_checkpoint(model, layouts)
    folder, recommended = checkpoint.folder, checkpoint.recommended
    used_device = find_device(device)
    used_dtype, notes = _dtype(dtype, used_device, emulate)
    unet = _read(UNet2DConditionModel, folder / "unet", used_dtype)
    vae = _read(AutoencoderKL, folder / "vae", used_dtype)
    text_encoder = _read(CLIPTextModel, folder / "text_encoder", used_dtype)
    tokenizer = _tokenizer(folder / "tokenizer", text_encoder)
    schedule = _schedule(folder / "scheduler" / "scheduler_config.json")
    readers = {*checkpoint.controlnets, *checkpoint.adapters}
    wanted = readers if used_layouts is None else readers & {*used_layouts}
    controlnets = {
        n: _read(ControlNetModel, path, used_dtype) for n, path in checkpoint.controlnets.items() if n in wanted
    }
    adapters = {n: _read(T2IAdapter, path, used_dtype) for n, path in checkpoint.adapters.items() if n in wanted}
    _check_fit(unet, vae, text_encoder, controlnets)
    for part in (unet, vae, text_encoder, *controlnets.values(), *adapters.values()):
        part.to(used_device)
    digests = _digests(checkpoint)
    return Model(
        name=model,
        folder=folder,
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        schedule=schedule,
        controlnets=controlnets,
        device=used_device,
        dtype=used_dtype,
        digest=digests.whole,
        weights_digest=digests.weights,
        part_digests=digests.parts,
        notes=notes,
        words=frozenset(recommended.words),
        reconstruction_error=recommended.reconstruction_error,
        guidance_scale=7.5 if recommended.guidance_scale is None else float(recommended.guidance_scale),
        mask_strength=recommended.mask_strength,
        mask_threshold=recommended.mask_threshold,
        text_update_share=recommended.text_update_share,
        guidance_until=recommended.guidance_until,
        guidance_path=recommended.guidance_path,
        mask_seeds=recommended.mask_seeds,
        lambda_area=recommended.lambda_area,
        generate_eta=recommended.generate_eta,
        adapters=adapters,
        recommends_guidance=recommended.guidance_scale is not None,
        left_out=tuple(sorted(readers - wanted)),
    )


def _dtype(asked: str | torch.dtype | None, device: torch.device, emulate: bool) -> tuple[torch.dtype, tuple[str, ...]]:
    """The dtype to use, and a note where it is not the one that was asked for."""
    if isinstance(asked, str):
        names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
        if asked not in names:
            raise UsageError(f"dtype is {asked!r}, expected one of {', '.join(names)}")
        asked = names[asked]
    dtype = asked or (torch.float16 if device.type == "cuda" else torch.float32)
    if device.type != "cpu" or emulate or machine.has_arithmetic(dtype):
        return dtype, ()
    name = str(dtype).removeprefix("torch.")
    return torch.float32, (f"this processor has no arithmetic for {name}: float32 was used, which is faster",)


def _tokenizer(folder: Path, text_encoder: Any) -> Any:
    """A tokenizer that has what every prompt needs and that the text encoder has embeddings for."""
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise UsageError(f"model: {folder} cannot be read ({first_line(error)}); fetch it again") from error
    if len(tokenizer) > text_encoder.config.vocab_size:
        raise UsageError(
            f"model: the tokenizer knows {len(tokenizer)} tokens and the text encoder {text_encoder.config.vocab_size}; "
            "they are of different checkpoints"
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(tokenizer, name) is None:
            raise UsageError(f"model: {folder} has no {name}, which every prompt needs; fetch it again")
    longest = tokenizer.model_max_length
    # A prompt has at least a token for its beginning, one for its end and one for a word.
    if not isinstance(longest, int) or isinstance(longest, bool) or longest < 3:
        raise UsageError(
            f"model: {folder} has a model_max_length of {longest!r}, expected a number of 3 or more; fetch it again"
        )
    return tokenizer


def _schedule(config: Path) -> Schedule:
    try:
        return Schedule.from_config(read_json(config))
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        raise UsageError(f"model: {config} is not a schedule that DDIM can follow ({first_line(error)})") from error


def _check_fit(unet: Any, vae: Any, text_encoder: Any, controlnets: Mapping[str, Any]) -> None:
    """Raises UsageError where the parts are of models that do not go together."""
    latent, ins, outs = vae.config.latent_channels, unet.config.in_channels, unet.config.out_channels
    if ins not in (latent, 2 * latent) or outs != latent:
        raise UsageError(
            f"model: the UNet takes {ins} and returns {outs} channels but the VAE's latent "
            f"has {latent}; inpainting, depth and upscaling checkpoints cannot be used here"
        )
    read, written = unet.config.cross_attention_dim, text_encoder.config.hidden_size
    if read != written:
        raise UsageError(f"model: the UNet reads text {read} wide, the text encoder's is {written}")
    for name, net in controlnets.items():
        for key in ("block_out_channels", "cross_attention_dim", "in_channels"):
            mine, theirs = getattr(net.config, key), getattr(unet.config, key)
            if json.dumps(mine) != json.dumps(theirs):  # a list is a tuple: one was read, the other was made here
                raise UsageError(
                    f"layouts: the ControlNet of {name} has {key} {mine}, the UNet {theirs}; it is for another model"
                )


def describe(model: str) -> dict[str, str]:
    """A model's folder, parts and sizes without loading its weights; what is wrong with it in place of a part."""
    try:
        checkpoint = find_checkpoint(model)
        folder = checkpoint.folder
        config = read_json(folder / "unet" / "config.json")
        side = config.get("sample_size", "?")
        unet = f"{config['block_out_channels']} channels, {config['out_channels']}x{side}x{side} latents"
        if config["in_channels"] == 2 * config["out_channels"]:
            unet += " and the picture's: InstructPix2Pix, for method ip2p alone"
    except UsageError as error:
        return {"problem": str(error)}
    except KeyError as error:
        return {"problem": f"model: {folder / 'unet' / 'config.json'} has no {error}; fetch it again"}
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return {
        "name": model,
        "folder": str(folder),
        "size": f"{size / 1e6:.1f} MB",
        "unet": unet,
        "layouts": ", ".join(layout_folders(folder)) or "none",
    } | ({"words": ", ".join(checkpoint.recommended.words)} if checkpoint.recommended.words else {})
