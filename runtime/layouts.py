"""Photograph -> layout map. All maps are RGB pictures of the photograph's size, white (or coloured) on black."""

from __future__ import annotations

import numpy as np
from PIL import Image


def edge_map(image: Image.Image, low: float = 0.06) -> Image.Image:
    """Edges of a photograph: gradient magnitude over the colour channels, thinned to its ridges.

    Args:
        image: any mode; read as RGB.
        low: gradients below this (in [0, 1] units per pixel) are not edges.

    Returns:
        RGB, the same size, 0 or 255.
    """
    rgb = np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
    padded = np.pad(rgb, ((1, 1), (1, 1), (0, 0)), mode="edge")
    dx = (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2
    dy = (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2
    strength = np.sqrt((dx**2 + dy**2).sum(-1))
    ring = np.pad(strength, 1)
    across = np.abs(dx).sum(-1) >= np.abs(dy).sum(-1)
    ridge = np.where(
        across,
        (strength >= ring[1:-1, :-2]) & (strength > ring[1:-1, 2:]),
        (strength >= ring[:-2, 1:-1]) & (strength > ring[2:, 1:-1]),
    )
    edges = (ridge & (strength > low)).astype(np.uint8) * 255
    return Image.fromarray(edges).convert("RGB")
