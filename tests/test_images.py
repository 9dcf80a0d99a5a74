from __future__ import annotations

import io
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, PngImagePlugin

from iedit.runtime import images
from iedit.runtime.errors import IeditError, RunError, UsageError


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    assert image.mode == "RGB"
    return np.asarray(image)


def _noise(width: int = 13, height: int = 7, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- modes --------------------------------------------------------------------------------------------------------


def test_rgb_comes_back_as_it_is(tmp_path: Path) -> None:
    Image.fromarray(_noise()).save(tmp_path / "a.png")
    assert np.array_equal(_pixels(images.load_image(tmp_path / "a.png")), _noise())


def test_grey_and_one_bit_are_three_equal_channels(tmp_path: Path) -> None:
    grey = _noise(channels=1)
    Image.fromarray(grey).save(tmp_path / "l.png")
    assert np.array_equal(_pixels(images.load_image(tmp_path / "l.png")), np.repeat(grey[..., None], 3, -1))
    bits = grey > 127
    Image.fromarray(bits).save(tmp_path / "1.png")
    assert np.array_equal(_pixels(images.load_image(tmp_path / "1.png"))[..., 0], bits * 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(mode: str, tmp_path: Path) -> None:
    values = _noise(channels=4 if mode == "RGBA" else 2)
    values[0, :, -1], values[1, :, -1] = 0, 255
    Image.fromarray(values).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as written:
        assert written.mode == mode
    found = _pixels(images.load_image(tmp_path / "a.png")).astype(np.float64)
    colour, alpha = values[..., :-1].astype(np.float64), values[..., -1:] / 255
    assert np.abs(found - (colour * alpha + 255 * (1 - alpha))).max() <= 1  # one rounding
    assert (found[0] == 255).all()  # fully transparent: white, whatever colour lies under it
    assert np.array_equal(found[1], np.broadcast_to(colour[1], found[1].shape))


def _palette_image() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    image.frombytes(bytes([0, 1, 2]))
    return image


def test_a_palette_becomes_its_colours(tmp_path: Path) -> None:
    _palette_image().save(tmp_path / "p.png")
    assert _pixels(images.load_image(tmp_path / "p.png"))[0].tolist() == [[255, 0, 0], [0, 255, 0], [10, 20, 30]]


@pytest.mark.parametrize(
    ("transparency", "expected"),
    [(1, [[255, 0, 0], [255, 255, 255], [10, 20, 30]]), (b"\xff\x80\x00", [[255, 0, 0], [127, 255, 127], [255] * 3])],
)
def test_a_transparent_palette_entry_becomes_white(
    transparency: int | bytes, expected: list[list[int]], tmp_path: Path
) -> None:
    _palette_image().save(tmp_path / "p.png", transparency=transparency)
    assert _pixels(images.load_image(tmp_path / "p.png"))[0].tolist() == expected


def test_a_transparent_gif_becomes_white_and_its_first_frame_is_taken(tmp_path: Path) -> None:
    later = Image.new("P", (3, 1), 0)
    _palette_image().save(tmp_path / "p.gif", transparency=2, save_all=True, append_images=[later], duration=10)
    assert _pixels(images.load_image(tmp_path / "p.gif"))[0].tolist() == [[255, 0, 0], [0, 255, 0], [255] * 3]


@pytest.mark.parametrize(("mode", "key"), [("L", 7), ("RGB", (7, 7, 7))])
def test_a_transparent_colour_becomes_white(mode: str, key: int | tuple[int, ...], tmp_path: Path) -> None:
    image = Image.new(mode, (2, 1), key)
    image.putpixel((1, 0), 9 if mode == "L" else (9, 9, 9))
    image.save(tmp_path / "t.png", transparency=key)
    assert _pixels(images.load_image(tmp_path / "t.png"))[0].tolist() == [[255] * 3, [9] * 3]


def test_cmyk_jpeg_is_about_the_colour_that_was_meant(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=95)
    with Image.open(tmp_path / "c.jpg") as written:
        assert written.mode == "CMYK"
    red = _pixels(images.load_image(tmp_path / "c.jpg"))[8, 8]
    assert red[0] > 240
    assert red[1] < 15
    assert red[2] < 15


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    deep = np.array([[0, 128, 257, 32768, 65535, 1000]], dtype=np.uint16)
    for name in ("d.png", "d.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        assert _pixels(images.load_image(tmp_path / name))[0, :, 0].tolist() == [0, 0, 1, 128, 255, 4]
    big_endian = Image.frombytes("I;16B", (6, 1), deep.astype(">u2").tobytes())
    assert _pixels(images.as_rgb(big_endian))[0, :, 0].tolist() == [0, 0, 1, 128, 255, 4]
    wide = Image.fromarray(deep.astype(np.int32))
    assert wide.mode == "I"
    assert _pixels(images.as_rgb(wide))[0, :, 0].tolist() == [0, 0, 1, 128, 255, 4]


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_float_grey_is_scaled_by_the_range_that_holds_it(top: float, tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0.2, 1]], dtype=np.float32) * np.float32(top)).save(tmp_path / "f.tif")
    assert _pixels(images.load_image(tmp_path / "f.tif"))[0, :, 0].tolist() == [0, 51, 255]


@pytest.mark.parametrize("value", [-1.0, 70000.0, float("nan"), float("inf")])
def test_float_grey_outside_every_range_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match=r"mode F holds .* expected 0 to 65535"):
        images.as_rgb(Image.fromarray(np.array([[0, value]], dtype=np.float32)))


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB", "RGBX", "RGBa", "La", "PA"])
def test_a_rare_mode_is_read_or_refused_with_its_name(mode: str) -> None:
    image = Image.new(mode, (4, 3))
    try:
        assert images.as_rgb(image).size == (4, 3)
    except UsageError as error:
        assert f"mode {mode} cannot be read" in str(error)


def test_the_result_is_a_copy_that_may_be_changed() -> None:
    image = Image.new("RGB", (2, 2))
    images.as_rgb(image).putpixel((0, 0), (1, 2, 3))
    assert image.getpixel((0, 0)) == (0, 0, 0)


# --- orientation --------------------------------------------------------------------------------------------------

# What each EXIF orientation asks for, written with numpy rather than with Pillow's own table.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied_to_the_pixel(orientation: int, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain, turned = tmp_path / f"plain.{suffix}", tmp_path / f"turned.{suffix}"
    Image.fromarray(_noise()).save(plain)
    Image.fromarray(_noise()).save(turned, exif=exif)
    stored = _pixels(images.load_image(plain))
    assert np.array_equal(_pixels(images.load_image(turned)), UPRIGHT[orientation](stored))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_is_no_reason_to_refuse_the_pixels(tmp_path: Path) -> None:
    Image.fromarray(_noise()).save(tmp_path / "x.png", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f nonsense")
    assert np.array_equal(_pixels(images.load_image(tmp_path / "x.png")), _noise())


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_missing_file_a_folder_and_a_text_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.png: there is no such file"):
        images.load_image(tmp_path / "nowhere.png")
    with pytest.raises(UsageError, match=r"this is a folder"):
        images.load_image(tmp_path)
    (tmp_path / "t.png").write_text("not a picture")
    with pytest.raises(UsageError, match=r"t\.png: not an image"):
        images.load_image(tmp_path / "t.png")
    (tmp_path / "e.png").touch()
    with pytest.raises(UsageError, match=r"e\.png: not an image"):
        images.load_image(tmp_path / "e.png")


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes with names")
def test_a_pipe_and_a_device_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path, kind in ((tmp_path / "pipe.png", "a pipe"), (Path("/dev/zero"), "a device")):
        with pytest.raises(UsageError, match=f"{path}: this is {kind}, expected an image file"):
            images.load_image(path)
    with pytest.raises(UsageError, match="cannot be opened"):
        images.load_image(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    "text", ["%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "#define im_width 1\n#define im_height 1\n"]
)
def test_formats_that_are_not_on_the_list_never_reach_a_decoder(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text(text)
    with pytest.raises(UsageError, match=r"not an image in a format that is read \(PNG, JPEG"):
        images.load_image(tmp_path / "x.png")


def test_every_format_on_the_list_is_read(tmp_path: Path) -> None:
    for kind in images.FORMATS:
        Image.fromarray(_noise()).save(tmp_path / "x", kind)
        assert images.load_image(tmp_path / "x").size == Image.fromarray(_noise()).size


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "gif", "bmp"])
def test_a_truncated_file_is_refused_at_every_length(suffix: str, tmp_path: Path) -> None:
    whole = io.BytesIO()
    Image.fromarray(_noise(64, 48)).save(whole, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
    data = whole.getvalue()
    path = tmp_path / f"cut.{suffix}"
    for share in (0.02, 0.2, 0.5, 0.8):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(UsageError, match=rf"cut\.{suffix}: "):
            images.load_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_damage_ends_in_a_picture_or_a_usage_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    refused = 0
    for kind in ("PNG", "JPEG", "TIFF", "GIF", "WEBP"):
        whole = io.BytesIO()
        Image.fromarray(_noise(40, 30)).save(whole, kind)
        for _ in range(25):
            data = bytearray(whole.getvalue())
            for place in rng.integers(0, min(len(data), 300), 6):
                data[place] = int(rng.integers(0, 256))
            (tmp_path / "d").write_bytes(bytes(data))
            try:
                assert images.load_image(tmp_path / "d").mode == "RGB"
            except UsageError:
                refused += 1
    assert 0 < refused < 125


def test_too_many_pixels_are_refused_before_decoding_and_the_limit_is_named(tmp_path: Path) -> None:
    Image.new("L", (100, 50)).save(tmp_path / "big.png")
    with pytest.raises(UsageError, match=r"big\.png: 100x50 is 5000 pixels, the limit is 4999"):
        images.load_image(tmp_path / "big.png", max_pixels=4999)
    assert images.load_image(tmp_path / "big.png", max_pixels=5000).size == (100, 50)
    header = (tmp_path / "big.png").read_bytes()
    bomb = bytearray(header)
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    chunk = bytes(bomb[12:29])
    bomb[29:33] = zlib.crc32(chunk).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(bytes(bomb))
    with pytest.raises(UsageError, match=rf"bomb\.png: .*limit is {images.MAX_PIXELS}"):
        images.load_image(tmp_path / "bomb.png")


def test_the_errors_say_by_their_exit_code_who_can_do_something() -> None:
    assert (UsageError.exit_code, RunError.exit_code) == (2, 1)
    assert issubclass(UsageError, IeditError)
    assert issubclass(RunError, IeditError)


# --- tensors ------------------------------------------------------------------------------------------------------


def test_every_value_survives_the_way_to_a_tensor_and_back() -> None:
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    tensor = images.to_tensor(Image.fromarray(values))
    assert (tensor.shape, tensor.dtype) == ((1, 3, 16, 16), torch.float32)
    assert (float(tensor.min()), float(tensor.max())) == (-1.0, 1.0)
    assert np.array_equal(_pixels(images.to_image(tensor)), values)
    assert np.array_equal(_pixels(images.to_image(tensor[0])), values)


def test_channels_rows_and_columns_keep_their_places() -> None:
    image = Image.new("RGB", (5, 3))
    image.putpixel((4, 1), (255, 0, 128))
    tensor = images.to_tensor(image)
    assert tensor[0, 0, 1, 4] == 1
    assert tensor[0, 1, 1, 4] == -1
    assert (tensor[0, 0] > -1).sum() == 1


def test_values_are_clamped_and_rounded_to_the_nearest() -> None:
    wanted = torch.tensor([-9.0, 9.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 254.6 / 127.5 - 1, 0.0])
    found = _pixels(images.to_image(wanted.expand(3, 1, 6)))[0, :, 0].tolist()
    assert found == [0, 255, 0, 1, 255, 128]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_is_a_failed_run_that_says_how_much(bad: float, dtype: torch.dtype) -> None:
    tensor = torch.zeros(1, 3, 4, 4, dtype=dtype)
    tensor[0, 1, 2, 3] = bad
    with pytest.raises(RunError, match=r"1 of 48 values are NaN or infinite"):
        images.to_image(tensor)


def test_a_tensor_of_another_shape_is_refused() -> None:
    with pytest.raises(UsageError, match=r"tensor is \(2, 3, 4, 4\), expected \(1, 3, H, W\)"):
        images.to_image(torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(13, 7), (16, 8), (1, 1), (17, 24)])
def test_padding_repeats_the_edge_and_cropping_undoes_it(size: tuple[int, int], mode: str) -> None:
    image = Image.fromarray(_noise(*size)).convert(mode)
    padded, original = images.pad_to_multiple(image, 8)
    assert original == size
    assert padded.width % 8 == padded.height % 8 == 0
    assert padded.width - size[0] < 8
    assert padded.height - size[1] < 8
    values, before = np.asarray(padded), np.asarray(image)
    assert (values[:, size[0] :] == values[:, size[0] - 1 : size[0]]).all()
    assert (values[size[1] :] == values[size[1] - 1 : size[1]]).all()
    assert np.array_equal(np.asarray(images.crop_back(padded, original)), before)


# --- masks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P", "LA", "I", "F", "CMYK"])
def test_a_white_square_is_the_same_mask_in_every_mode(mode: str, tmp_path: Path) -> None:
    drawn = np.zeros((6, 8), dtype=np.uint8)
    drawn[1:3, 2:5] = 255
    source = Image.fromarray(drawn)
    if mode == "I":
        made = Image.fromarray(drawn.astype(np.int32) * 257)
    elif mode == "F":
        made = Image.fromarray(drawn.astype(np.float32))
    elif mode == "CMYK":
        made = source.convert("RGB").convert("CMYK")
    else:
        made = source.convert(mode)
    mask = images.load_mask(made, (8, 6))
    assert mask.mode == "L"
    assert np.array_equal(np.asarray(mask), drawn)
    if mode not in ("F", "CMYK", "I"):  # PNG has none of these
        made.save(tmp_path / "m.png")
        assert np.array_equal(np.asarray(images.load_mask(tmp_path / "m.png", (8, 6))), drawn)


def test_transparency_does_not_mark_and_any_strong_colour_does() -> None:
    layer = Image.new("RGBA", (4, 1), (255, 255, 255, 0))
    layer.putpixel((1, 0), (0, 0, 255, 255))
    layer.putpixel((2, 0), (3, 3, 3, 255))
    assert np.asarray(images.load_mask(layer, (4, 1)))[0].tolist() == [0, 255, 0, 0]


def test_the_noise_of_jpeg_around_black_is_no_mask(tmp_path: Path) -> None:
    drawn = np.zeros((64, 64), dtype=np.uint8)
    drawn[20:40, 24:48] = 255
    Image.fromarray(drawn).save(tmp_path / "m.jpg", quality=60)
    with Image.open(tmp_path / "m.jpg") as noisy:
        assert ((np.asarray(noisy) > 0) & (drawn == 0)).any()
    assert np.array_equal(np.asarray(images.load_mask(tmp_path / "m.jpg", (64, 64))), drawn)


def test_a_mask_of_another_size_is_refused_with_both_sizes() -> None:
    with pytest.raises(UsageError, match=r"the mask is 8x6 and the image 6x8"):
        images.load_mask(Image.new("L", (8, 6)), (6, 8))


def test_coverage_is_the_share_of_edited_pixels() -> None:
    mask = Image.new("L", (10, 10))
    assert images.mask_coverage(mask) == 0
    mask.paste(255, (0, 0, 10, 3))
    assert images.mask_coverage(mask) == pytest.approx(0.3)
    assert images.mask_coverage(Image.new("L", (10, 10), 255)) == 1


def test_a_latent_cell_is_edited_when_one_of_its_pixels_is() -> None:
    mask = Image.new("L", (32, 24))
    mask.putpixel((8, 15), 255)  # the first column of the second cell, the last row of the second
    latent = images.mask_to_latent(mask, (3, 4), (32, 24))
    assert (latent.shape, latent.dtype) == ((1, 1, 3, 4), torch.float32)
    assert latent[0, 0].nonzero().tolist() == [[1, 1]]
    assert latent.max() == 1


def test_an_empty_mask_stays_empty_and_a_full_one_full_through_padding() -> None:
    for value in (0, 255):
        latent = images.mask_to_latent(Image.new("L", (13, 9), value), (3, 4), (32, 24))
        assert (latent == value / 255).all()


def test_sizes_that_do_not_fit_a_latent_are_refused() -> None:
    with pytest.raises(UsageError, match=r"a mask of 13x9 in a padded image of 13x9 does not fit a latent of 2x2"):
        images.mask_to_latent(Image.new("L", (13, 9)), (2, 2), (13, 9))
    with pytest.raises(UsageError, match=r"a mask of 32x8"):
        images.mask_to_latent(Image.new("L", (32, 8)), (2, 2), (16, 16))


# --- writing ------------------------------------------------------------------------------------------------------


def test_a_png_carries_its_receipt_and_its_pixels(tmp_path: Path) -> None:
    receipt = {"prompt": "ein grünes Auto — 緑の車 🚗", "seed": 0, "lambda": 0.1 + 0.2, "mask": {"area": [0.25, None]}}
    images.write_png(tmp_path / "out.png", Image.fromarray(_noise()), receipt)
    assert images.read_receipt(tmp_path / "out.png") == receipt
    assert np.array_equal(_pixels(images.load_image(tmp_path / "out.png")), _noise())
    assert b"iTXtiedit\x00" in (tmp_path / "out.png").read_bytes()
    assert os.listdir(tmp_path) == ["out.png"]


def test_a_picture_without_a_receipt_or_with_a_damaged_one_says_so(tmp_path: Path) -> None:
    images.write_png(tmp_path / "plain.png", Image.new("RGB", (2, 2)))
    with pytest.raises(UsageError, match=r"plain\.png: no iedit receipt"):
        images.read_receipt(tmp_path / "plain.png")
    deep = '{"a":' * 100_000
    for text, said in (("{half", "damaged"), ("[1]", "is a list, expected an object"), (deep, "nested more than"),
                       ('{"a": "' + "x" * (1 << 20) + '"}', "too large")):  # fmt: skip
        info = PngImagePlugin.PngInfo()
        info.add_itxt("iedit", text, zip=True)
        Image.new("RGB", (2, 2)).save(tmp_path / "bad.png", pnginfo=info)
        with pytest.raises(UsageError, match=said):
            images.read_receipt(tmp_path / "bad.png")


def test_half_characters_of_a_command_line_survive_in_a_receipt(tmp_path: Path) -> None:
    images.write_png(tmp_path / "out.png", Image.new("RGB", (2, 2)), {"prompt": "caf\udce9"})
    assert images.read_receipt(tmp_path / "out.png") == {"prompt": "caf\udce9"}


def test_only_a_png_can_carry_a_receipt(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.png"):
        images.write_png(tmp_path / "out.jpg", Image.new("RGB", (2, 2)))
    assert not list(tmp_path.iterdir())


# --- contact sheets -----------------------------------------------------------------------------------------------


def test_a_sheet_shows_every_picture_once_with_its_label_below() -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    pictures = [Image.new("RGB", (64, 64), colour) for colour in colours]
    rows = [[("input", pictures[0]), ("a result with a rather long label", pictures[1])], [("third", pictures[2])]]
    sheet = images.contact_sheet(rows, cell=96, titles=["first row", "second row"])
    values = _pixels(sheet)
    for colour in colours:
        assert (values == colour).all(-1).sum() == 96 * 96
    ys, xs = np.nonzero((values == colours[0]).all(-1))
    below = values[ys.max() + 1 : ys.max() + 22, xs.min() : xs.max()]
    assert (below < 100).all(-1).sum() > 20, "there is no label under the first picture"
    assert (values[: ys.min()] < 100).all(-1).sum() > 20, "there is no title above the first row"


def test_a_sheet_keeps_proportions_and_takes_any_mode() -> None:
    sheet = _pixels(images.contact_sheet([[("wide", Image.new("L", (200, 50), 77))]], cell=100))
    ys, xs = np.nonzero((sheet == 77).all(-1))
    assert (np.ptp(xs) + 1, np.ptp(ys) + 1) == (100, 25)


def test_a_sheet_of_nothing_or_with_too_few_titles_is_refused() -> None:
    with pytest.raises(UsageError, match="no picture"):
        images.contact_sheet([[]])
    with pytest.raises(UsageError, match="1 titles for 2 rows"):
        images.contact_sheet([[("a", Image.new("RGB", (2, 2)))]] * 2, titles=["one"])


# --- an edit put back into its picture ----------------------------------------------------------------------------


def test_a_soft_edge_rises_to_the_edited_picture_within_its_width() -> None:
    mask = Image.new("L", (40, 40))
    ImageDraw.Draw(mask).rectangle((10, 10, 29, 29), fill=255)
    black, white = Image.new("RGB", (40, 40)), Image.new("RGB", (40, 40), "white")
    for feather, want in (
        (0, [255] * 10),
        (4, [64, 128, 191] + [255] * 7),
        (30, [26, 51, 76, 102, 128, 153, 178, 204, 230, 255]),
    ):
        row = np.asarray(images.paste(black, white, mask, feather))[20, :, 0]
        assert row[10:20].tolist() == want and row[20:30].tolist() == want[::-1]
        assert not row[:10].any() and not row[30:].any()
