"""Names of the inputs and outputs of every module as a graph or an engine: what the exporter writes and the backends bind.

A layout's image enters through the module `control-embedding-NAME`, once for each edit: its embedding does not change from step to step.
The fused UNets take that embedding and the conditioning scales as inputs, so another scale needs no other engine.
"""

from __future__ import annotations

CONTROL_EMBEDDING_PREFIX = "control-embedding-"
CONTROLNET_PREFIX = "controlnet-"
ADAPTER_PREFIX = "adapter-"
# The UNet where a condition has control of its attention: of torch modules alone, no engine is of it.
CONTROLLED_UNET = "unet with attention control"
NOISY = ("sample", "timestep", "encoder_hidden_states")
INTEGERS = ("timestep", "ids")  # int64; every other input and every output is float32


def layouts(module: str) -> tuple[str, ...]:
    """The layouts that a UNet is fused with: ("pose", "scribble") for "unet+pose+scribble"."""
    return tuple(module.split("+")[1:]) if module.startswith("unet") else ()


def control_embedding_modules(module: str) -> tuple[str, ...]:
    """The modules whose outputs a fused UNet takes, in the order of its inputs."""
    return tuple(CONTROL_EMBEDDING_PREFIX + name for name in layouts(module))


def inputs(module: str) -> tuple[str, ...]:
    """Names of a module's inputs, in the order in which it takes them.

    - unet and unet+NAMES: sample (B, C, h, w), timestep (B,), encoder_hidden_states (B, L, D), and for each layout
      NAME_control_embedding (B, C0, h, w) and NAME_scale (B,).
    - control-embedding-NAME: image (B, 3, H, W) in [0, 1].
    - controlnet-NAME, for other runtimes: the first three, image (B, 3, H, W) in [0, 1] and scale (B,).
    - vae_encoder: images (B, 3, H, W). vae_decoder: latents (B, C, h, w). text_encoder: ids (B, L).

    Raises:
        KeyError: there is no such module.
    """
    if module.startswith("unet"):
        return (*NOISY, *(f"{name}_{part}" for name in layouts(module) for part in ("control_embedding", "scale")))
    if module.startswith(CONTROLNET_PREFIX):
        return (*NOISY, "image", "scale")
    if module.startswith(CONTROL_EMBEDDING_PREFIX):
        return ("image",)
    return {"vae_encoder": ("images",), "vae_decoder": ("latents",), "text_encoder": ("ids",)}[module]


def output(module: str) -> str:
    """Name of a module's one output; "controlnet-NAME" has several (`controlnet_outputs`).

    Raises:
        KeyError: there is no such module.
    """
    if module.startswith("unet"):
        return "output"
    if module.startswith(CONTROL_EMBEDDING_PREFIX):
        return "control_embedding"
    return {"vae_encoder": "latents", "vae_decoder": "images", "text_encoder": "prompt_embeds"}[module]


def controlnet_outputs(blocks: int) -> tuple[str, ...]:
    """Names of the outputs of controlnet-NAME: the residuals of its `blocks` from the top down, and the middle's."""
    return (*(f"down_{i}" for i in range(blocks)), "mid")
