"""A diffusers-layout checkpoint as it lies on disk: where it is, whether it is whole, and whether its configs are of a model that
can be run here. Nothing heavy is imported and no weights are read, so that this is known before anything is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ..errors import UsageError, first_line
from ..files import parse_json
from .module_io import ADAPTER_PREFIX, CONTROLNET_PREFIX

PICTUREBOOK = "picturebook"
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
# What is fetched of a hub repository: configs, vocabularies and one variant of the weights, of a pipeline's parts or (at the
# top) of a ControlNet. Everything would be 17 GB for SD 1.5: pickles, float16 and non-EMA copies of the same weights.
HUB_FILES = tuple(
    f"{folder}{name}"
    for folder in ("", *(f"{p}/" for p in PARTS), f"{CONTROLNET_PREFIX}*/", f"{ADAPTER_PREFIX}*/")
    for name in (
        "*.json",
        "merges.txt",
        "model.safetensors",
        "diffusion_pytorch_model.safetensors",
        "*-of-*.safetensors",
    )
    if folder or name != "model.safetensors"
)


def picturebook_folder() -> Path:
    """Where the embedded model lies in the installed package."""
    return Path(__file__).parent.parent / "picturebook"


def find_folder(model: str) -> Path:
    """The folder of the embedded model, of a local path or of a hub id (fetched, or found in the hub's cache).

    Raises:
        UsageError: there is no such folder and the hub cannot be reached or does not know the id.
    """
    if model == PICTUREBOOK:
        if not (picturebook_folder() / "unet" / "config.json").is_file():
            raise UsageError(
                "model: this installation came without the embedded model; install a release, or make it with `iedit train embed`, "
                "or name another model with --model"
            )
        return picturebook_folder()
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise UsageError(
            f"model: {model} is not a folder; give a diffusers folder, a hub id (owner/name) or {PICTUREBOOK}"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(HUB_FILES)))
    except Exception as error:
        raise UsageError(
            f"model: {model} is not a folder here and could not be fetched from the hub ({first_line(error)}); "
            "check the name, or download it where there is a network and give its folder"
        ) from error


def weights_of(folder: Path) -> list[Path]:
    """The files of weights in a folder, `*.safetensors` or else `*.bin`; only regular files."""
    files = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
    return files or sorted(p for p in folder.glob("*.bin") if p.is_file())


def check_files(folder: Path, part: str) -> None:
    """Raises UsageError where a part of a checkpoint lacks a file."""
    where = folder / part
    wanted = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}.get(part, "config.json")
    if not (where / wanted).is_file():
        raise UsageError(f"model: {where / wanted} is missing; {folder} is not a whole diffusers checkpoint")
    if part in ("unet", "vae", "text_encoder") and not weights_of(where):
        raise UsageError(f"model: {where} holds no weights (*.safetensors); the download may have been cut off")
    if part == "tokenizer" and not (where / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (where / name).is_file():
                raise UsageError(f"model: {where / name} is missing; {folder} is not a whole diffusers checkpoint")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        UsageError: it cannot be read, or is no object.
    """
    try:
        content = parse_json(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"model: {path} cannot be read ({first_line(error)}); fetch it again") from error
    if not isinstance(content, dict):
        raise UsageError(f"model: {path} holds a {type(content).__name__}, expected an object; fetch it again")
    return content


# --- what can be run --------------------------------------------------------------------------------------------

# Pipelines of Stable Diffusion 1.x: their parts are the ones that are run here.
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionDiffEditPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionSAGPipeline",
    "StableDiffusionPAGPipeline",
    "StableDiffusionPanoramaPipeline",
    "StableDiffusionAttendAndExcitePipeline",
)
# Schedulers that share DDIM's noise levels, so that DDIM can be built from their configs.
SCHEDULERS = (
    "DDIMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler",
    "LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler",
    "DEISMultistepScheduler", "UniPCMultistepScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
)  # fmt: skip
# What makes a UNet or ControlNet want more than noise, timestep and text: class labels, SDXL's sizes, an LCM's guidance, ...
_MORE_INPUTS = ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim", "encoder_hid_dim_type",
                "time_cond_proj_dim")  # fmt: skip
MAX_GUIDANCE = 100.0  # papers and front ends end at 30; what lies far beyond is a slip of the keyboard and gives noise
MAX_CONTROL = 10.0  # a ControlNet is trained at 1
MIN_SIDE, MAX_SIDE = 8, 4096  # of a picture that is worked on, pixels
# Of the side that a model was trained on: far above it a model repeats things, and 16 times the area takes 16 to 256 times as long.
MAX_TIMES = 4
MAX_REWEIGHT = 10.0  # of a word's attention: Prompt-to-prompt shows -2 to 2
MAX_INNER_STEPS = 1000  # of ITO at one timestep; the paper's largest is 30


@dataclass(frozen=True)
class Recommended:
    """What a checkpoint's `iedit.json` recommends; None is the papers' value.

    Attributes:
        guidance_scale: 0 to `MAX_GUIDANCE`.
        mask_strength: above 0 to 1.
        mask_threshold, text_update_share, guidance_until, lambda_area, generate_eta: 0 to 1.
        guidance_path: "inverted" or "drawn".
        mask_seeds: 1 to 1000.
        words: all that it was trained on, lower case; none where it does not say.
        reconstruction_error: of its autoencoder on a picture at the size that it was trained on, the largest mean absolute error
            (0 to 1 of the range) at which the picture is taken to be of its world.
    """

    guidance_scale: float | None = None
    mask_strength: float | None = None
    mask_threshold: float | None = None
    text_update_share: float | None = None
    guidance_until: float | None = None
    guidance_path: str | None = None
    mask_seeds: int | None = None
    lambda_area: float | None = None
    generate_eta: float | None = None
    words: tuple[str, ...] = ()
    reconstruction_error: float | None = None


@dataclass(frozen=True)
class Checkpoint:
    """Where a model's parts lie, and what is known of it without its weights.

    Attributes:
        folder: of the parts.
        controlnets, adapters: layout name -> folder of the ControlNet or of the T2I-Adapter that reads it.
        recommended: by its `iedit.json`.
        side: pixels of the square pictures that it was trained on; None where its configs do not say.
    """

    folder: Path
    controlnets: Mapping[str, Path]
    adapters: Mapping[str, Path]
    recommended: Recommended
    side: int | None


def find_checkpoint(model: str, layouts: Mapping[str, str] | Sequence[str] | None = None) -> Checkpoint:
    """Find a model and check everything that can be checked without its weights; see `model.load_model`.

    Raises:
        UsageError: a part is missing or unreadable, or it is a model that cannot be run here.
    """
    folder = find_folder(model)
    for part in PARTS:
        check_files(folder, part)
    inside = layout_folders(folder)
    readers: Mapping[str, Path]
    if layouts is None:
        readers = inside
    elif isinstance(layouts, Mapping):
        readers = {name: find_folder(str(path)) for name, path in layouts.items()}
    else:
        unknown = [n for n in layouts if n not in inside]
        if unknown:
            raise UsageError(
                f"layouts: {model} has no ControlNet or T2I-Adapter for {', '.join(unknown)}; it has {', '.join(inside) or 'none'}"
            )
        readers = {name: inside[name] for name in layouts}
    _check_pipeline(folder)
    _check_scheduler(folder / "scheduler" / "scheduler_config.json")
    _check_unet(folder / "unet" / "config.json")
    _check_vae(folder / "vae" / "config.json")
    text = folder / "text_encoder" / "config.json"
    _whole_numbers(text, read_json(text), "hidden_size", "max_position_embeddings", "vocab_size")
    adapters = {}
    for name, path in readers.items():
        config = path / "config.json"
        if not config.is_file() or not weights_of(path):
            raise UsageError(f"layouts: {path} is no ControlNet or T2I-Adapter folder (config.json and *.safetensors)")
        if read_json(config).get("_class_name") == "T2IAdapter":
            _check_adapter(config, folder / "unet" / "config.json", folder / "vae" / "config.json")
            adapters[name] = path
        else:
            _check_controlnet(config, folder / "vae" / "config.json")
    controlnets = {name: path for name, path in readers.items() if name not in adapters}
    return Checkpoint(folder, controlnets, adapters, _recommended(folder / "iedit.json"), _side(folder))


def layout_folders(folder: Path) -> dict[str, Path]:
    """What reads layouts inside a checkpoint: layout name -> `controlnet-NAME` or `adapter-NAME`.

    Raises:
        UsageError: one name has both.
    """
    found: dict[str, Path] = {}
    for prefix in (CONTROLNET_PREFIX, ADAPTER_PREFIX):
        for path in sorted(p for p in folder.glob(prefix + "*") if p.is_dir()):
            name = path.name.removeprefix(prefix)
            if name in found:
                raise UsageError(
                    f"layouts: {folder} has both {found[name].name} and {path.name}; rename one, as a layout of that name has one reader"
                )
            found[name] = path
    return found


def check_layouts(model: str, readers: Collection[str], names: Iterable[str], left_out: Collection[str] = ()) -> None:
    """Raises UsageError for a layout that a model has neither ControlNet nor T2I-Adapter for, or one that was not loaded (`left_out`)."""
    for name in names:
        if name in left_out:
            raise UsageError(f"layout {name!r}: {model} was loaded without its network; name it in used_layouts")
        if name not in readers:
            known = ", ".join(readers) or "none"
            raise UsageError(f"layout {name!r}: {model} has no ControlNet or T2I-Adapter of that name; it has {known}")


def check_engines(folder: str | os.PathLike[str] | None) -> None:
    """Raises UsageError for a folder of engines that was named and is not there."""
    if folder is not None and not Path(folder).is_dir():
        raise UsageError(
            f"engines: {folder} is not a folder; run `iedit export onnx` first, name another, or leave it out"
        )


def check_side(size: tuple[int, int], side: int | None, model: str) -> None:
    """Raises UsageError for a picture of `size` (width, height) that is far larger than what the model was trained on."""
    if side is not None and size[0] * size[1] > (MAX_TIMES * side) ** 2:
        raise UsageError(
            f"image: {size[0]}x{size[1]} is more than {MAX_TIMES}x{MAX_TIMES} times the {side}x{side} that {model} was trained on; "
            f"work on it smaller and have the edit pasted back with --resize {side} (to --resize {MAX_TIMES * side}), or cut out a part"
        )


def is_number(value: object) -> bool:
    """A finite number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _recommended(path: Path) -> Recommended:
    if not path.is_file():
        return Recommended()
    content, values = read_json(path), dict[str, Any]()
    names = (
        "mask_strength",
        "mask_threshold",
        "text_update_share",
        "guidance_until",
        "lambda_area",
        "generate_eta",
        "reconstruction_error",
    )
    shares = dict.fromkeys(names, 1)
    for name, largest in {"guidance_scale": MAX_GUIDANCE, **shares}.items():
        value = values[name] = content.get(name)
        smallest = "above 0" if name == "mask_strength" else "0"
        if value is not None and not (is_number(value) and 0 <= value <= largest and (value > 0 or smallest == "0")):
            raise UsageError(
                f"model: {path} recommends {name} {value!r}, expected a number from {smallest} to {largest:g}"
            )
    choices: dict[str, Sequence[Any]] = {"guidance_path": ("inverted", "drawn"), "mask_seeds": range(1, 1001)}
    for name, allowed in choices.items():
        value = values[name] = content.get(name)
        if value is not None and (isinstance(value, bool) or value not in allowed):
            expected = f"{allowed[0]} to {allowed[-1]}" if isinstance(allowed, range) else " or ".join(allowed)
            raise UsageError(f"model: {path} recommends {name} {value!r}, expected {expected}")
    words = content.get("words", [])
    if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
        raise UsageError(f"model: {path} has words that are no list of words; leave them out")
    return Recommended(**values, words=tuple(words))


def _check_pipeline(folder: Path) -> None:
    path = folder / "model_index.json"
    if path.is_file():
        name = read_json(path).get("_class_name")
        if name not in PIPELINES:
            raise UsageError(
                f"model: {path} is of a {name}, which cannot be run here; expected Stable Diffusion 1.x ({', '.join(PIPELINES[:3])}, ...)"
            )


def _check_scheduler(path: Path) -> None:
    config = read_json(path)
    name = config.get("_class_name", SCHEDULERS[0])
    if name not in SCHEDULERS:
        raise UsageError(
            f"model: {path} is of a {name}, which DDIM cannot be built from; put the scheduler of a Stable Diffusion 1.x checkpoint there"
        )
    if config.get("use_flow_sigmas"):
        raise UsageError(f"model: {path} has use_flow_sigmas, noise levels that DDIM does not have; set it to false")
    timesteps = config.get("num_train_timesteps", 1000)
    if not _is_count(timesteps) or timesteps > 100_000:
        raise UsageError(
            f"model: {path} has num_train_timesteps {timesteps!r}, expected a whole number from 1 to 100000"
        )


def _side(folder: Path) -> int | None:
    cells = read_json(folder / "unet" / "config.json").get("sample_size")
    blocks = read_json(folder / "vae" / "config.json").get("block_out_channels")
    return cells * 2 ** (len(blocks) - 1) if _is_count(cells) and isinstance(blocks, list) and blocks else None


def _check_unet(path: Path) -> None:
    config = read_json(path)
    _no_more_inputs("model", path, config)
    if config.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise UsageError(f"model: {path} is of a {config['_class_name']}, expected a UNet2DConditionModel")
    _whole_numbers(path, config, "in_channels", "out_channels", "cross_attention_dim")


def _check_vae(path: Path) -> None:
    config = read_json(path)
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise UsageError(f"model: {path} is of a {config['_class_name']}, expected an AutoencoderKL")
    _whole_numbers(path, config, "latent_channels")
    scale, shift = config.get("scaling_factor", 0.18215), config.get("shift_factor")
    if not is_number(scale) or scale <= 0:
        raise UsageError(
            f"model: {path} has scaling_factor {scale!r}, expected a number above 0 (Stable Diffusion's is 0.18215)"
        )
    if shift is not None and not is_number(shift):
        raise UsageError(f"model: {path} has shift_factor {shift!r}, expected a number or null")
    for name in ("latents_mean", "latents_std"):
        if config.get(name) is not None:
            raise UsageError(
                f"model: {path} has {name}, which is not used here; expected null, as in Stable Diffusion 1.x"
            )


def _check_controlnet(path: Path, vae: Path) -> None:
    config = read_json(path)
    _no_more_inputs("layouts", path, config)
    if config.get("_class_name", "ControlNetModel") != "ControlNetModel":
        raise UsageError(f"layouts: {path} is of a {config['_class_name']}, expected a ControlNetModel")
    channels = config.get("conditioning_channels", 3)
    if channels != 3:
        raise UsageError(
            f"layouts: {path} has conditioning_channels {channels!r}, expected 3: a layout is a colour picture"
        )
    halvings, blocks = (
        config.get("conditioning_embedding_out_channels", (16, 32, 96, 256)),
        read_json(vae).get("block_out_channels"),
    )
    if isinstance(halvings, list) and isinstance(blocks, list) and len(halvings) != len(blocks):
        raise UsageError(
            f"layouts: {path} reads a layout at 1/{2 ** (len(halvings) - 1)} of its size, the VAE's latent is 1/{2 ** (len(blocks) - 1)} "
            "of the picture; it is for another model"
        )


# diffusers' defaults, which a config may leave out.
_SD_CHANNELS = (320, 640, 1280, 1280)
_MAX_BLOCKS = 16  # of a network; each halves the picture
_CROSS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
ADAPTER_TYPES = ("full_adapter", "light_adapter", "full_adapter_xl")


@dataclass(frozen=True)
class Features:
    """Pictures of features, one for each block on a UNet's way down: what a T2I-Adapter makes, or what a UNet can add.

    Attributes:
        channels: of each.
        cells: pixels of the layout's side for each cell of a feature's side.
    """

    channels: tuple[int, ...]
    cells: tuple[int, ...]

    def __str__(self) -> str:
        return (
            ", ".join(f"{c} channels at 1/{n}" for c, n in zip(self.channels, self.cells, strict=True))
            + " of the picture's size"
        )


def adapter_features(kind: str, channels: Sequence[int], factor: int) -> Features:
    """What diffusers' T2IAdapter makes, of an `adapter_type`, `channels` and `downscale_factor`."""
    if kind == "full_adapter_xl":  # halves its pictures once, before the third
        return Features(tuple(channels), tuple(factor * (1 if i < 2 else 2) for i in range(len(channels))))
    made = (*channels, channels[-1]) if kind == "light_adapter" else tuple(channels)  # which has one more block
    return Features(made, tuple(factor * 2**i for i in range(len(made))))


def unet_features(channels: Sequence[int], down: Sequence[str], pixels: int) -> Features:
    """What diffusers' UNet2DConditionModel adds to its blocks on the way down.

    A block with cross-attention adds the feature before it halves its picture, one without after that; the last block halves nothing.

    Args:
        channels, down: `block_out_channels` and `down_block_types`.
        pixels: per latent cell.
    """
    last = len(channels) - 1
    halved = [i + (name != _CROSS and i < last) for i, name in enumerate(down)]
    return Features(tuple(channels), tuple(pixels * 2**n for n in halved))


def fitting_adapter(taken: Features) -> tuple[str, int] | None:
    """The `adapter_type` and `downscale_factor` of the adapter that makes what a UNet takes; None where no type does."""
    for kind in ("full_adapter", "full_adapter_xl"):
        if adapter_features(kind, taken.channels, taken.cells[0]) == taken:
            return kind, taken.cells[0]
    return None


def features_taken(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> Features:
    """`unet_features` of the configs of a UNet and a VAE.

    Raises:
        ValueError: the configs do not say, or a block is of a kind that adds no features or adds them elsewhere.
    """
    channels = unet.get("block_out_channels", _SD_CHANNELS)
    if not _are_counts(channels):
        raise ValueError(f"block_out_channels {channels!r}")
    down = unet.get("down_block_types", [_CROSS] * (len(channels) - 1) + [_PLAIN])
    if not isinstance(down, (list, tuple)) or len(down) != len(channels) or not set(map(str, down)) <= {_CROSS, _PLAIN}:
        raise ValueError(f"down_block_types {down!r}")
    levels = vae.get("block_out_channels", [64])
    if not _are_counts(levels):
        raise ValueError(f"a VAE of block_out_channels {levels!r}")
    return unet_features(channels, down, 2 ** (len(levels) - 1))


def _check_adapter(path: Path, unet: Path, vae: Path) -> None:
    """An adapter adds a picture of features to each block on the way down, of that block's channels and size, and may add one more, of the last
    one's, after the middle block (SDXL's do)."""
    config, network = read_json(path), read_json(unet)
    _whole_numbers(path, config, "in_channels", "downscale_factor")
    kind, channels, inputs, factor = (
        config.get("adapter_type", "full_adapter"),
        config.get("channels", _SD_CHANNELS),
        config.get("in_channels", 3),
        config.get("downscale_factor", 8),
    )
    if kind not in ADAPTER_TYPES:
        raise UsageError(f"layouts: {path} has adapter_type {kind!r}, expected {', '.join(ADAPTER_TYPES)}")
    if inputs not in (1, 3):
        raise UsageError(f"layouts: {path} has in_channels {inputs!r}, expected 3, or 1 for maps without colour")
    if not _are_counts(channels):
        raise UsageError(f"layouts: {path} has channels {channels!r}, expected a list of whole numbers above 0")
    try:
        taken = features_taken(network, read_json(vae))
    except ValueError as error:
        raise UsageError(
            f"layouts: {path} cannot be added to a UNet of {error}: a T2I-Adapter needs down blocks of {_CROSS} and {_PLAIN}"
        ) from error
    made, fits = adapter_features(kind, channels, factor), [taken]
    if network.get("mid_block_type", "") is not None:  # it is ignored where there is no middle block
        fits.append(Features((*taken.channels, taken.channels[-1]), (*taken.cells, taken.cells[-1])))
    if made in fits:
        return
    known = fitting_adapter(taken)
    if known is None:
        wanted = "no type of adapter makes those"
    else:
        have, want = (list(channels), kind, factor), (list(taken.channels), *known)
        names = ("channels", "adapter_type", "downscale_factor")
        wanted = "one for this UNet has " + " and ".join(
            f"{name} {b} in place of {a}" for name, a, b in zip(names, have, want, strict=True) if a != b
        )
    raise UsageError(
        f"layouts: {path} is of an adapter for another model: it makes features of {made}; the UNet adds features of {taken}; {wanted}"
    )


def _no_more_inputs(who: str, path: Path, config: Mapping[str, Any]) -> None:
    for name in _MORE_INPUTS:
        if config.get(name) is not None:
            raise UsageError(
                f"{who}: {path} has {name} {config[name]!r}, an input that Stable Diffusion 1.x has not; "
                "SDXL, LCM and class-conditional models cannot be run here"
            )


def _whole_numbers(path: Path, config: Mapping[str, Any], *names: str) -> None:
    """The named fields, where they are there, are whole numbers above 0."""
    for name in names:
        if name in config and not _is_count(config[name]):
            raise UsageError(f"model: {path} has {name} {config[name]!r}, expected a whole number above 0")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are_counts(value: object) -> TypeGuard[Sequence[int]]:
    return isinstance(value, (list, tuple)) and 0 < len(value) <= _MAX_BLOCKS and all(map(_is_count, value))
