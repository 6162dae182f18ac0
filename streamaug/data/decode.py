"""One image file to a uint8 array of the wanted size, whatever its mode, depth and orientation."""

import os
import stat
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

Fit = Literal["crop", "letterbox", "stretch"]
_FILTER = Image.Resampling.LANCZOS  # widens with the reduction, so shrinking does not alias


class Unreadable(Exception):
    """A file that gives no image; the message is the reason, without the path."""


def read_image(path: Path, size: int, channels: int, fit: Fit) -> np.ndarray:
    """Read a file into uint8 [channels, size, size].

    The first frame of an animation; turned as its EXIF orientation says; transparency laid over white; 16
    bits scaled to 8; colour and grey converted to what is asked for; colour profiles ignored. Raises
    Unreadable.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Unreadable("not a regular file")
        with Image.open(path) as image:
            # JPEG decoders can shrink by 2, 4 or 8 while they read: enough is kept for the resize below.
            image.draft(None, (2 * size, 2 * size))
            image.load()
            flat = _flatten(ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB")
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


def resize(image: Image.Image, size: int, fit: Fit) -> Image.Image:
    """A square image: `crop` keeps the centre square, `letterbox` adds black bars, `stretch` changes the
    aspect.
    """
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
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
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
