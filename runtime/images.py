"""Files <-> pictures <-> tensors: size, orientation and mode rules, masks, receipts in PNG metadata, contact sheets.

A picture is a PIL image, mode RGB, 8 bits; a mask is mode L with 0 (keep) and 255 (edit); sizes are `(width, height)`.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError

from .errors import RunError, UsageError
from .files import check_regular, parse_json, write_whole

if TYPE_CHECKING:  # torch takes seconds to import, and layouts, masks and receipts need none of it
    from torch import Tensor

MAX_PIXELS = 4096 * 4096  # a float32 UNet at that size already wants hundreds of gigabytes; larger is a mistake
# What is opened, by Pillow's names. The others are closed: EPS is a program that runs in Ghostscript, and the decoders of
# formats that nobody edits are the ones that nobody checks.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "TGA", "JPEG2000")
RECEIPT_KEY = "iedit"
_DROPPED = "iedit dropped"  # in a picture's `info`: what was lost when it was read
# What Pillow's decoders raise on damaged files, beside OSError.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)


# --- files to pictures --------------------------------------------------------------------------------------------


def load_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS, background: str = "white") -> Image.Image:
    """A file as a picture: EXIF orientation applied, transparency on `background`, the first frame of an animation.

    Returns:
        RGB; see `as_rgb` for what the modes become, `dropped` for what was lost.

    Raises:
        UsageError: missing, unreadable, truncated, not an image, or more than `max_pixels` pixels.
    """
    image = _open(path, max_pixels)
    picture = as_rgb(image, str(path), background)
    picture.info[_DROPPED] = dropped(image)
    return picture


def dropped(image: Image.Image) -> list[str]:
    """What `load_image` lost of a picture, and what `as_rgb` would lose: other frames, transparency."""
    notes = list(image.info.get(_DROPPED, ()))
    if has_transparency(image):
        notes.append("the picture's transparency was dropped: it was laid on white")
    return notes


def has_transparency(image: Image.Image) -> bool:
    """Whether a pixel of the picture lets something through."""
    if "A" not in image.mode and "a" not in image.mode and "transparency" not in image.info:
        return False
    try:
        lowest = image.convert("RGBA").getchannel("A").getextrema()[0]
    except ValueError:  # a mode that `as_rgb` refuses by name
        return False
    return isinstance(lowest, (int, float)) and lowest < 255


def as_picture(
    value: object, name: str, load: Callable[[str | os.PathLike[str]], Image.Image] = load_image
) -> Image.Image:
    """What a caller may give for a picture, as a PIL image.

    Args:
        value: a PIL image, as it is; a path, which `load` reads; or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8,
            of bool, or of floats in [0, 1].
        name: what it is called in errors.

    Raises:
        TypeError: something else; UsageError: an array of another shape or range, or a file that cannot be read.
    """
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, (str, os.PathLike)):
        return load(value)
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a PIL image, a path or an array")
    array = value[..., 0] if value.ndim == 3 and value.shape[-1] == 1 else value
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)) or 0 in array.shape:
        raise UsageError(f"{name}: the array is {value.shape}, expected (H, W), (H, W, 3) or (H, W, 4)")
    if array.dtype == bool or np.issubdtype(array.dtype, np.floating):
        floats = array.astype(np.float64)
        if not ((floats >= 0) & (floats <= 1)).all():  # NaN fails too
            raise UsageError(f"{name}: the array holds values outside 0 to 1; scale it, or give uint8")
        array = np.rint(floats * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise TypeError(f"{name}: the array is of {array.dtype}, expected uint8, bool or floats in [0, 1]")
    return Image.fromarray(np.ascontiguousarray(array))


def load_layout(path: str | os.PathLike[str]) -> Image.Image:
    """A layout map as a picture: as `load_image`, but with its transparency on black, which is "nothing here"."""
    return load_image(path, background="black")


def _open(path: str | os.PathLike[str], max_pixels: int) -> Image.Image:
    """The decoded and upright first frame, in the file's own mode."""
    check_regular(path, "an image file")
    try:
        image = Image.open(path, formats=FORMATS)
    except PermissionError:
        raise UsageError(f"{path}: it may not be read; check its permissions") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UsageError(f"{path}: too large ({error}); the limit is {max_pixels} pixels, make it smaller") from None
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise UsageError(f"{path}: not an image in a format that is read ({known}); save it as PNG or JPEG") from None
    except _DAMAGED as error:
        raise UsageError(f"{path}: cannot be read as an image ({error}); save it again as PNG or JPEG") from None
    with image:
        check_size(image, str(path), max_pixels)
        try:
            image.load()
            several = bool(getattr(image, "is_animated", False))
        except _DAMAGED as error:
            raise UsageError(f"{path}: damaged or truncated ({error}); copy it or save it again") from None
        try:
            upright = ImageOps.exif_transpose(image)
        except _DAMAGED:  # the pixels are fine: a damaged EXIF block is no reason to refuse them
            upright = image.copy()
    if several:
        upright.info[_DROPPED] = ["the file holds several pictures: only the first was used"]
    return upright


def check_size(image: Image.Image, name: str = "image", max_pixels: int = MAX_PIXELS) -> None:
    """Refuse more than `max_pixels` pixels with a UsageError that names the limit."""
    if image.width * image.height > max_pixels:
        raise UsageError(
            f"{name}: {image.width}x{image.height} is {image.width * image.height} pixels, "
            f"the limit is {max_pixels}; make it smaller or raise max_pixels"
        )


def as_rgb(image: Image.Image, name: str = "image", background: str = "white") -> Image.Image:
    """Any PIL image as 8-bit RGB, with its transparency composited on `background`.

    16-bit grey (and mode I, in which older Pillows keep it) is scaled by 1/257. Float grey is taken as [0, 1], [0, 255]
    or [0, 65535], whichever is the smallest that holds its largest value. CMYK is converted without colour management.

    Raises:
        UsageError: a mode that has no RGB reading, or values outside those ranges.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return _grey8(image, name).convert("RGB")
    if "A" in image.mode or "a" in image.mode or image.mode == "P" or "transparency" in image.info:
        try:
            rgba = image.convert("RGBA")
        except ValueError as error:
            raise UsageError(f"{name}: mode {image.mode} cannot be read ({error}); save it as RGB PNG") from None
        below = Image.new("RGBA", image.size, background)
        return Image.alpha_composite(below, rgba).convert("RGB")
    try:
        return image.convert("RGB")  # also for RGB: a copy, which the caller may change
    except ValueError as error:
        raise UsageError(f"{name}: mode {image.mode} cannot be read ({error}); save it as RGB PNG") from None


def _grey8(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    lowest, highest = float(values.min()), float(values.max())
    if not (lowest >= 0 and highest <= 65535):  # NaN fails too
        raise UsageError(
            f"{name}: mode {image.mode} holds {lowest:g} to {highest:g}, expected 0 to 65535; save it with 8 bits"
        )
    top = 65535.0
    if image.mode == "F":
        top = next(t for t in (1.0, 255.0, 65535.0) if highest <= t)
    return Image.fromarray(np.rint(values * (255.0 / top)).astype(np.uint8))


# --- pictures and tensors -----------------------------------------------------------------------------------------


def to_tensor(image: Image.Image) -> Tensor:
    """A picture as `(1, 3, H, W)` float32 in [-1, 1]."""
    import torch

    values = np.asarray(as_rgb(image), dtype=np.float32).transpose(2, 0, 1)[None]
    return torch.from_numpy(np.ascontiguousarray(values) / np.float32(127.5) - np.float32(1))


def to_image(tensor: Tensor) -> Image.Image:
    """`(1, 3, H, W)` or `(3, H, W)` in [-1, 1] as a picture: clamped, rounded half to even, computed in float32.

    Raises:
        RunError: NaN or infinite values; UsageError: another shape.
    """
    import torch

    if tensor.dim() == 4 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.dim() != 3 or tensor.shape[0] != 3:
        raise UsageError(f"to_image: tensor is {tuple(tensor.shape)}, expected (1, 3, H, W) or (3, H, W)")
    values = tensor.detach().to("cpu", torch.float32).numpy()
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise RunError(
            f"to_image: {bad} of {values.size} values are NaN or infinite; decode in float32, half can overflow"
        )
    pixels = np.rint(np.clip((values + np.float32(1)) * np.float32(127.5), 0, 255)).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def fit(image: Image.Image, side: int) -> Image.Image:
    """A picture with its longer side at `side` pixels, its proportions kept."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def shrink_mask(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A mask at a smaller size; a pixel that touches the mask is edited, so that thin parts stay."""
    return mask.resize(size, Image.Resampling.BOX).point(lambda value: 255 if value else 0)


def pad_to_multiple(image: Image.Image, multiple: int = 8) -> tuple[Image.Image, tuple[int, int]]:
    """Grow a picture or mask to the right and downward to multiples, by repeating its last column and row.

    Returns:
        The padded image (mode kept) and the original size, for `crop_back`.
    """
    right, below = -image.width % multiple, -image.height % multiple
    if not right and not below:
        return image.copy(), image.size
    values = np.asarray(image)
    widths = ((0, below), (0, right)) + ((0, 0),) * (values.ndim - 2)
    return Image.fromarray(np.pad(values, widths, mode="edge")), image.size


def crop_back(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Undo `pad_to_multiple`."""
    return image.crop((0, 0, *size))


# --- masks --------------------------------------------------------------------------------------------------------


def load_mask(source: str | os.PathLike[str] | Image.Image, size: tuple[int, int]) -> Image.Image:
    """A mask of any mode as L with 0 (keep) and 255 (edit).

    A pixel is edited when its brightest channel is above 127: any strong colour marks, transparency does not, and the
    noise that JPEG leaves around black is not taken for a mask. An empty or full mask is no error; see `mask_coverage`.

    Raises:
        UsageError: unreadable (as `load_image`), or its size is not `size`.
    """
    if isinstance(source, Image.Image):
        name, image = "mask", source
    else:
        name, image = str(source), _open(source, MAX_PIXELS)
    if image.size != tuple(size):
        raise UsageError(
            f"{name}: the mask is {image.width}x{image.height} and the image {size[0]}x{size[1]}; resize the mask"
        )
    brightest = np.asarray(as_rgb(image, name, background="black")).max(axis=-1)
    return Image.fromarray((brightest > 127).astype(np.uint8) * 255)


def mask_coverage(mask: Image.Image) -> float:
    """Share of the pixels that are edited, in [0, 1]: 0 is an empty mask, 1 covers everything."""
    return float((np.asarray(mask.convert("L")) > 127).mean())


def mask_to_latent(mask: Image.Image, latent_hw: tuple[int, int], padded_size: tuple[int, int]) -> Tensor:
    """A mask as `(1, 1, h, w)` float32 of 0 and 1: a latent cell that touches the mask is edited.

    Area-averaged, then `> 0`. Any higher threshold would drop thin parts of a mask (a 3 px line covers 3/8 of a cell),
    and what the user marked has to be editable; the pixels of a cell outside the mask can be restored afterwards (pixel
    composite), a cell that was kept cannot be edited afterwards.

    Args:
        mask: L, the image's size; grown to `padded_size` like the image, by repeating its last column and row.
        latent_hw: height and width of the latent; divides `padded_size`.
        padded_size: width and height of the padded image.

    Raises:
        UsageError: the sizes do not fit together.
    """
    import torch

    (h, w), (width, height) = latent_hw, padded_size
    if height % h or width % w or mask.width > width or mask.height > height:
        raise UsageError(
            f"mask_to_latent: a mask of {mask.width}x{mask.height} in a padded image of {width}x{height} "
            f"does not fit a latent of {w}x{h}"
        )
    values = (np.asarray(mask.convert("L")) > 127).astype(np.float32)
    values = np.pad(values, ((0, height - mask.height), (0, width - mask.width)), mode="edge")
    share = values.reshape(h, height // h, w, width // w).mean(axis=(1, 3))
    return torch.from_numpy((share > 0).astype(np.float32)).view(1, 1, h, w)


def cells_to_mask(cells: Tensor, padded_size: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    """A latent mask as a picture: every pixel of a cell that is edited is.

    Args:
        cells: (1, 1, h, w) in [0, 1].
        padded_size, size: width and height of the padded picture and of the picture itself, as in `pad_to_multiple`.

    Returns:
        "L" of `size`.
    """
    values = (cells[0, 0].cpu() * 255).round().byte().numpy()
    return crop_back(Image.fromarray(values).resize(padded_size, Image.Resampling.NEAREST), size)


# --- an edit put back into its picture ----------------------------------------------------------------------------


def paste(source: Image.Image, edited: Image.Image, mask: Image.Image, feather: float) -> Image.Image:
    """The edited picture inside the mask, the source outside it, with a soft edge that lies inside the mask.

    Pixels outside the mask are the source's, bit for bit. The edge is a ramp over `feather` pixels, or over as many as the
    mask is deep where that is less; parts of a mask that are thinner than its edge get a hard one, for they would fade away.

    Args:
        source, edited: RGB of one size.
        mask: "L" of that size, 0 or 255.
        feather: width of the edge in pixels; up to 1 it is hard.
    """
    weight, inner, depth = np.asarray(mask, np.uint32), mask, 1
    while depth < round(feather):
        smaller = inner.filter(ImageFilter.MinFilter(3))
        if smaller.getbbox() is None:
            break
        inner, depth = smaller, depth + 1
        weight = weight + np.asarray(inner)
    ramp = Image.fromarray((weight / depth).round().astype(np.uint8))
    # Grown back by a pixel more than it was shrunk by: the corners of a thick part are not thin.
    thick = inner.filter(ImageFilter.MaxFilter(2 * depth + 1)) if depth > 1 else mask
    return Image.composite(edited, source, ImageChops.lighter(ramp, ImageChops.subtract(mask, thick)))


def paste_enlarged(
    source: Image.Image, edited: Image.Image, mask: Image.Image | None, feather: float
) -> tuple[Image.Image, Image.Image | None]:
    """An edit that was made on a smaller picture (`Options.resize`), at the size of the picture that was given, with its mask.

    With a mask all outside it is the given picture, bit for bit; without one everything is the edit, enlarged.

    Args:
        source: RGB, the picture that was given.
        edited: RGB, smaller.
        mask: "L" of either size, 0 or 255.
        feather: as in `paste`.
    """
    large = edited.resize(source.size, Image.Resampling.LANCZOS)
    if mask is None:
        return large, None
    mask = mask.resize(source.size, Image.Resampling.NEAREST)
    return paste(source, large, mask, feather), mask


# --- pictures to files --------------------------------------------------------------------------------------------


def png_bytes(image: Image.Image, receipt: Mapping[str, Any] | None = None) -> bytes:
    """A PNG file, with `receipt` as JSON in an iTXt chunk keyed `iedit`."""
    text = PngImagePlugin.PngInfo()
    if receipt is not None:
        value = json.dumps(receipt, ensure_ascii=False, sort_keys=True)
        # A prompt out of a command line that is not UTF-8 has half characters: JSON's own escapes are what is left for them.
        text.add_itxt(RECEIPT_KEY, value.encode("utf-8", "backslashreplace").decode())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def write_png(path: str | os.PathLike[str], image: Image.Image, receipt: Mapping[str, Any] | None = None) -> None:
    """Write a PNG whole or not at all; see `png_bytes`.

    Raises:
        UsageError: the name does not end in .png, or the folder does not exist; RunError: see `write_whole`.
    """
    if Path(path).suffix.lower() != ".png":
        raise UsageError(f"{path}: the output is a PNG (it carries the receipt); give a name that ends in .png")
    write_whole(path, png_bytes(image, receipt))


def read_receipt(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The receipt that `write_png` put into a PNG: any object of JSON within `files.parse_json`'s bounds.

    Raises:
        UsageError: unreadable, or there is no receipt in it.
    """
    text = _open(path, MAX_PIXELS).info.get(RECEIPT_KEY)
    if text is None:
        raise UsageError(f"{path}: no iedit receipt in it; only a PNG that iedit wrote, not saved again since, has one")
    try:
        receipt = parse_json(text)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: its iedit receipt is damaged ({error}); edit the source image again") from None
    if not isinstance(receipt, dict):
        raise UsageError(f"{path}: its iedit receipt is a {type(receipt).__name__}, expected an object")
    return receipt


# --- contact sheets -----------------------------------------------------------------------------------------------


def contact_sheet(
    rows: Sequence[Sequence[tuple[str, Image.Image]]],
    cell: int = 192,
    titles: Sequence[str] | None = None,
) -> Image.Image:
    """Labelled pictures in rows, for `--stages` and the demo.

    Args:
        rows: for each row its `(label, picture)` pairs; rows may differ in length.
        cell: pixels of the square that each picture is fitted into, its proportions kept.
        titles: one line above each row.

    Returns:
        RGB, on white.

    Raises:
        UsageError: no picture at all, or not one title for each row.
    """
    if not any(rows):
        raise UsageError("contact_sheet: there is no picture to show")
    if titles is not None and len(titles) != len(rows):
        raise UsageError(f"contact_sheet: {len(titles)} titles for {len(rows)} rows, expected one for each")
    gap, small, large = 10, ImageFont.load_default(size=13), ImageFont.load_default(size=16)
    columns = max(len(row) for row in rows)
    width = gap + columns * (cell + gap)
    above = [_wrap(t, large, width - 2 * gap) for t in titles] if titles is not None else [[] for _ in rows]
    below = [[_wrap(label, small, cell) for label, _ in row] for row in rows]
    heights = [
        20 * len(lines) + cell + 4 + 16 * max((len(label) for label in labels), default=1) + gap
        for lines, labels in zip(above, below, strict=True)
    ]
    sheet = Image.new("RGB", (width, gap + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    top = gap
    for row, lines, labels, height in zip(rows, above, below, heights, strict=True):
        for i, line in enumerate(lines):
            draw.text((gap, top + 20 * i), line, fill="black", font=large)
        y = top + 20 * len(lines)
        for column, ((_, picture), label) in enumerate(zip(row, labels, strict=True)):
            x = gap + column * (cell + gap)
            shown = fit(as_rgb(picture), cell)
            sheet.paste(shown, (x + (cell - shown.width) // 2, y + (cell - shown.height) // 2))
            for i, line in enumerate(label):
                draw.text((x, y + cell + 4 + 16 * i), line, fill="black", font=small)
        top += height
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces; a longer word stays whole."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
