"""One image: every format, mode, depth and orientation comes out as it is shown, in the wanted size."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from streamaug.data.decode import Unreadable, array_image, read_image

from .pictures import noise

RED, BLUE = (220, 30, 20), (20, 40, 230)


def read(image: Image.Image, path: Path, channels: int = 3, size: int = 8, fit="stretch", **save) -> np.ndarray:
    image.save(path, **save)
    return read_image(path, size, channels, fit)


def solid(mode: str, colour, size=(16, 16)) -> Image.Image:
    return Image.new(mode, size, colour)


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff"])
def test_every_accepted_format_gives_the_colour_that_was_saved(tmp_path, suffix):
    pixels = read(solid("RGB", RED), tmp_path / f"x.{suffix}")
    assert pixels.shape == (3, 8, 8) and pixels.dtype == np.uint8
    assert np.abs(pixels[:, 4, 4].astype(int) - RED).max() <= 4


def test_an_image_turned_by_exif_is_turned_back(tmp_path):
    upright = Image.new("RGB", (8, 16), RED)
    upright.paste(BLUE, (0, 8, 8, 16))  # blue below
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90° clockwise
    pixels = read(upright.rotate(90, expand=True), tmp_path / "x.png", fit="stretch", exif=exif)
    assert pixels[0, 1, 4] > 200 and pixels[2, 6, 4] > 200


@pytest.mark.parametrize(
    ("image", "save"),
    [
        (solid("RGBA", (*RED, 0)), {}),
        (solid("LA", (0, 0)), {}),
        (solid("P", 0), {"transparency": 0}),
        (solid("RGB", RED), {"transparency": RED}),
        (solid("L", 7), {"transparency": 7}),
    ],
)
def test_transparency_is_laid_over_white(tmp_path, image, save):
    assert (read(image, tmp_path / "x.png", **save) == 255).all()


def test_half_transparent_black_becomes_grey(tmp_path):
    assert np.abs(read(solid("RGBA", (0, 0, 0, 128)), tmp_path / "x.png").astype(int) - 127).max() <= 1


def test_palette_bilevel_and_cmyk_images_keep_their_colours(tmp_path):
    palette = solid("RGB", BLUE).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.abs(read(palette, tmp_path / "p.png")[:, 0, 0].astype(int) - BLUE).max() <= 2
    assert (read(solid("1", 1), tmp_path / "1.png") == 255).all()
    cmyk = read(solid("CMYK", (0, 255, 255, 0)), tmp_path / "c.jpg")
    assert cmyk[0].min() > 200 and cmyk[1:].max() < 60


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_to_8(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    pixels = read(Image.fromarray(ramp), tmp_path / f"x.{suffix}", channels=1)
    assert np.array_equal(pixels[0], np.round(ramp / 257).astype(np.uint8))


def test_float_images_in_0_to_1_are_read_and_others_refused_with_their_range(tmp_path):
    unit = Image.fromarray(np.full((8, 8), 0.5, np.float32))
    assert (read(unit, tmp_path / "unit.tif", channels=1) == 128).all()
    Image.fromarray(np.full((8, 8), 700.0, np.float32)).save(tmp_path / "wide.tif")
    with pytest.raises(Unreadable, match=r"from 700 to 700 in mode F; accepted"):
        read_image(tmp_path / "wide.tif", 8, 1, "crop")


def test_colour_becomes_luminance_and_grey_three_equal_channels(tmp_path):
    grey = read(solid("RGB", (255, 0, 0)), tmp_path / "red.png", channels=1)
    assert grey.shape == (1, 8, 8) and (grey == 76).all()
    assert (read(solid("L", 90), tmp_path / "grey.png", channels=3) == 90).all()


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [solid("RGB", RED), solid("RGB", BLUE)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "x.gif", 8, 3, "crop")[0].min() > 200


def test_crop_keeps_the_centre_letterbox_adds_bars_stretch_changes_the_aspect(tmp_path):
    wide = Image.new("RGB", (32, 8), BLUE)
    wide.paste(RED, (12, 0, 20, 8))
    wide.save(tmp_path / "wide.png")
    crop = read_image(tmp_path / "wide.png", 8, 3, "crop")
    assert (crop[0] == RED[0]).all() and (crop[2] == RED[2]).all()
    letterbox = read_image(tmp_path / "wide.png", 32, 3, "letterbox")
    assert (letterbox[:, :12] == 0).all() and (letterbox[:, 20:] == 0).all()
    assert letterbox[2, 16, 2] == BLUE[2] and letterbox[0, 16, 16] == RED[0]
    stretch = read_image(tmp_path / "wide.png", 8, 3, "stretch")
    assert stretch[2, 4, 0] > 200 and stretch[0, 4, 4] > 180


@pytest.mark.parametrize("fit", ["crop", "letterbox", "stretch"])
@pytest.mark.parametrize("size", [(1, 1), (900, 1), (1, 900), (8, 8)])
def test_any_aspect_gives_the_wanted_shape(tmp_path, fit, size):
    assert read(noise(3, size), tmp_path / "x.png", size=8, fit=fit).shape == (3, 8, 8)


def test_an_image_of_the_wanted_size_is_left_as_it_is(tmp_path):
    image = noise(5, (8, 8))
    assert np.array_equal(read(image, tmp_path / "x.png", fit="crop"), np.asarray(image).transpose(2, 0, 1))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_shrinking_does_not_alias(tmp_path, suffix):
    board = np.indices((512, 512)).sum(0) % 2 * 255  # a one-pixel chessboard: an aliased reduction is not grey
    image = Image.fromarray(board.astype(np.uint8))
    pixels = read(image, tmp_path / f"x.{suffix}", channels=1, size=16, fit="crop")
    assert np.abs(pixels.astype(int) - 127).max() <= 3


# ---- images that are not files


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK", "I;16", "I", "F", "La", "RGBa", "HSV"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_in_any_mode_is_read_without_being_changed(mode, channels):
    image = Image.new(mode, (16, 12))
    before = image.tobytes()
    pixels = read_image(image, 8, channels, "crop")
    assert pixels.shape == (channels, 8, 8) and pixels.dtype == np.uint8
    assert image.mode == mode and image.size == (16, 12) and image.tobytes() == before


def test_a_file_its_contents_and_its_opened_image_give_the_same_pixels(tmp_path):
    noise(4, (40, 30)).save(tmp_path / "x.png")
    from_file = read_image(tmp_path / "x.png", 8, 3, "crop")
    assert np.array_equal(from_file, read_image((tmp_path / "x.png").read_bytes(), 8, 3, "crop"))
    with Image.open(tmp_path / "x.png") as opened:
        assert np.array_equal(from_file, read_image(opened, 8, 3, "crop"))


def test_a_damaged_exif_block_leaves_the_image_as_it_is_stored():
    file = io.BytesIO()
    noise(4, (8, 8)).save(file, "PNG", exif=b"Exif\x00\x00no tiff header")
    assert np.array_equal(read_image(file.getvalue(), 8, 3, "crop"), read_image(noise(4, (8, 8)), 8, 3, "crop"))


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_bytes_that_are_no_image_are_unreadable(data):
    with pytest.raises(Unreadable):
        read_image(data, 8, 3, "crop")


@pytest.mark.parametrize("scale", ["uint8", "float32", "float64", "float16", "uint16", "int64"])
def test_arrays_of_every_type_give_the_same_image(scale):
    pixels = np.asarray(noise(6, (8, 8)))  # [8, 8, 3] uint8
    if scale.startswith("float"):
        array = (pixels / 255).astype(scale)
    else:
        array = pixels.astype(scale) * (257 if scale == "uint16" else 1)
    assert np.array_equal(np.asarray(array_image(array, channels_first=False)), pixels)


@pytest.mark.parametrize(
    ("shape", "channels_first", "mode"),
    [
        ((8, 9), True, "L"),
        ((1, 8, 9), True, "L"),
        ((8, 9, 1), False, "L"),
        ((8, 9, 2), False, "LA"),
        ((3, 8, 9), True, "RGB"),
        ((8, 9, 3), False, "RGB"),
        ((4, 8, 9), True, "RGBA"),
        ((8, 9, 3), True, "RGB"),  # only the other layout fits
        ((3, 8, 9), False, "RGB"),
    ],
)
def test_the_layout_of_an_array_is_found(shape, channels_first, mode):
    image = array_image(np.zeros(shape, np.uint8), channels_first=channels_first)
    assert image.mode == mode and image.size == (9, 8)


@pytest.mark.parametrize("shape", [(3, 8, 4), (4, 8, 3)])
def test_where_both_layouts_fit_the_one_that_is_meant_is_taken(shape):
    assert array_image(np.zeros(shape, np.uint8), channels_first=True).size == shape[:0:-1]
    assert array_image(np.zeros(shape, np.uint8), channels_first=False).size == shape[1::-1]


def test_rounding_above_1_is_forgiven():
    array = np.full((8, 8), 1 + 2e-7, np.float32)
    assert np.asarray(array_image(array, channels_first=True)).min() == 255


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((8,), np.uint8), r"uint8 \[8\]; expected \[H, W\]"),
        (np.zeros((5, 8, 8), np.uint8), r"\[5, 8, 8\]; expected"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"\[2, 3, 8, 8\]; expected"),
        (np.zeros((0, 8), np.uint8), r"\[0, 8\]; expected"),
        (np.full((8, 8), -2.1, np.float32), r"values from -2.1 to -2.1.*\[0, 1\]: leave out a transform that normalis"),
        (np.full((8, 8), np.nan, np.float32), r"values from nan to nan"),
        (np.full((8, 8), 256), r"values from 256 to 256"),
        (np.full((8, 8), "a"), r"<U1 \[8, 8\]; expected integers or floats"),
        (np.full((8, 8), 1j), r"complex128 \[8, 8\]; expected integers or floats"),
    ],
)
def test_arrays_that_are_no_image_are_described(array, message):
    with pytest.raises(ValueError, match=message):
        array_image(array, channels_first=True)
