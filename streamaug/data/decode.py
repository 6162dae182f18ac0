"""One image to a uint8 array of the wanted size, whatever its format, mode, depth and orientation."""

import io
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

Fit = Literal["crop", "letterbox", "stretch"]
_FILTER = Image.Resampling.LANCZOS  # widens with the reduction, so shrinking does not alias


class Unreadable(Exception):
    """An image that cannot be read; the message is the reason, without the name."""


def read_image(image: Path | bytes | Image.Image, size: int, channels: int, fit: Fit) -> np.ndarray:
    """Read a file, its contents, or an image in any mode into uint8 [channels, size, size].

    The first frame of an animation; turned as its EXIF orientation says; transparency laid over white; 16 bits scaled
    to 8; colour and grey converted to what is asked for; colour profiles ignored. Raises Unreadable.
    """
    mode: Literal["L", "RGB"] = "L" if channels == 1 else "RGB"
    try:
        if isinstance(image, Image.Image):
            flat = _flatten(_upright(image), mode)
        else:
            if isinstance(image, Path) and not stat.S_ISREG(os.stat(image).st_mode):
                raise Unreadable("not a regular file")
            with Image.open(image if isinstance(image, Path) else io.BytesIO(image)) as opened:
                # JPEG decoders can shrink by 2, 4 or 8 while they read: enough is kept for the resize below.
                opened.draft(None, (2 * size, 2 * size))
                opened.load()
                flat = _flatten(_upright(opened), mode)
        return to_chw(resize(flat, size, fit))
    except FileNotFoundError:
        raise Unreadable("no such file (a link that leads nowhere?)") from None
    except Image.UnidentifiedImageError:
        raise Unreadable("not an image, or of an unknown format") from None
    except Unreadable:
        raise
    except Image.DecompressionBombError as error:
        raise Unreadable(f"too large: {error}") from None
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise Unreadable(str(error) or type(error).__name__) from None


def array_image(pixels: np.ndarray, *, channels_first: bool) -> Image.Image:
    """An image of an array [H, W], or [C, H, W] or [H, W, C] with C from 1 (grey) to 4 (colour and alpha).

    channels_first: which of the two is meant where both fit; the other is taken where only it does. Values: bool,
    uint8, uint16, other integers from 0 to 255, floats in [0, 1]. Raises ValueError, whose message describes the array.
    """
    described = f"an array of {pixels.dtype} {list(pixels.shape)}"
    if pixels.ndim == 3:
        fits = [axis for axis in (0, 2) if 1 <= pixels.shape[axis] <= 4]
        axis = 0 if fits == [0] or (channels_first and 0 in fits) else 2
        pixels = np.moveaxis(pixels, axis, 2)
    if pixels.size == 0 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] <= 4)):
        raise ValueError(f"{described}; expected [H, W], or [C, H, W] or [H, W, C] with C from 1 to 4")
    values = _bytes(pixels, described)
    return Image.fromarray(np.ascontiguousarray(values[..., 0] if values.shape[2:] == (1,) else values))


def _bytes(pixels: np.ndarray, described: str) -> np.ndarray:
    """The values of an array as uint8."""
    if pixels.dtype == np.uint8:
        return pixels
    slack = 0.0
    if pixels.dtype == bool:
        top = 1.0
    elif pixels.dtype == np.uint16:
        top = 65535.0
    elif np.issubdtype(pixels.dtype, np.integer):
        top = 255.0
    elif np.issubdtype(pixels.dtype, np.floating):
        top, slack = 1.0, 1e-3  # interpolation overshoots by rounding
    else:
        raise ValueError(f"{described}; expected integers or floats")
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= -slack and high <= top + slack):
        raise ValueError(
            f"{described} with values from {low:g} to {high:g}; expected uint8, or floats in [0, 1]: leave out a "
            "transform that normalises"
        )
    return np.round(np.clip(pixels.astype(np.float64), 0, top) * (255 / top)).astype(np.uint8)


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; as it is where the EXIF block is damaged."""
    with suppress(Exception):  # the block has a parser of its own, that raises many types
        return ImageOps.exif_transpose(image)
    return image


def resize(image: Image.Image, size: int, fit: Fit) -> Image.Image:
    """A square image: `crop` keeps the centre square, `letterbox` adds black bars, `stretch` changes the aspect."""
    if fit == "crop":
        return ImageOps.fit(image, (size, size), method=_FILTER)
    if fit == "letterbox":
        return ImageOps.pad(image, (size, size), method=_FILTER, color=0 if image.mode == "L" else (0, 0, 0))
    return image.resize((size, size), _FILTER)


def to_chw(image: Image.Image) -> np.ndarray:
    """uint8 [C, H, W] of an L or RGB image."""
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _flatten(image: Image.Image, mode: Literal["L", "RGB"]) -> Image.Image:
    """The image in 8 bits, without palette or transparency, as L or RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_to_8_bits(image).convert(mode)
    if image.mode == "La":
        image = image.convert("LA")  # Pillow has no way from it to RGBA
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert(mode)
    return image.convert(mode)


def _deep_to_8_bits(image: Image.Image) -> Image.Image:
    """L from 16-bit integers (0..65535) or floats in [0, 1]."""
    pixels = np.asarray(image).astype(np.float64)
    top = 1.0 if image.mode == "F" else 65535.0
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= top):
        raise Unreadable(
            f"pixel values from {low:g} to {high:g} in mode {image.mode}; accepted: 8 or 16 bits, or floats in [0, 1]"
        )
    return Image.fromarray(np.round(pixels * (255 / top)).astype(np.uint8))
