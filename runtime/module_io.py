"""Names of the inputs and outputs of every module as a graph or an engine: what the exporter writes and the backends bind."""

from __future__ import annotations


def inputs(module: str) -> tuple[str, ...]:
    """In order. unet and unet+NAMES: sample (B, C, h, w), timestep (B,) int64, encoder_hidden_states (B, L, D), and for each
    layout NAME_image (B, 3, H, W) and NAME_scale (B,). vae_encoder: images. vae_decoder: latents. text_encoder: ids (B, L) int64.
    What is not int64 is float32."""
    if module.startswith("unet"):
        layouts = [f"{name}_{part}" for name in module.split("+")[1:] for part in ("image", "scale")]
        return ("sample", "timestep", "encoder_hidden_states", *layouts)
    return {"vae_encoder": ("images",), "vae_decoder": ("latents",), "text_encoder": ("ids",)}[module]


def output(module: str) -> str:
    """The only one, float32."""
    if module.startswith("unet"):
        return "output"
    return {"vae_encoder": "latents", "vae_decoder": "images", "text_encoder": "states"}[module]
