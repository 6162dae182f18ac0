"""Whether synthetic images are about as bright and as contrasted as the real ones; where not, a picture of both.

The first images of both sides are compared after all transforms, as the network will see them.
"""

import logging
import os
import time
from pathlib import Path

import torch

logger = logging.getLogger("streamaug")

ENOUGH = 32  # images of each side before they are compared
_PICTURED = 8
_SHIFT = 0.6  # of the mean, in standard deviations of the real pixels
_FACTOR = 2.2  # between standard deviations, or between contrasts
_TILE = 96  # pixels a side of one image in the picture, at least
_GAP = 4


class Likeness:
    """Collects the first images of both sides and compares each channel's mean, spread and contrast, once.

    A mean may differ by 0.6 of the real standard deviation (and by what so few images leave open), the spread of all
    pixels and the contrast within images by a factor of 2.2: wide enough for augmentation and another mix of
    classes, and passed by inverted grey values, a normalisation applied twice or not at all, and images of one shade.
    """

    def __init__(self) -> None:
        self._sides = _Side(), _Side()  # real, synthetic

    def observe(self, real: torch.Tensor, synthetic: torch.Tensor) -> bool:
        """Images [n, ...] of both sides. True when they were compared: there is nothing more to observe."""
        for side, images in zip(self._sides, (real, synthetic), strict=True):
            side.add(images)
        if min(side.count for side in self._sides) < ENOUGH:
            return False
        differences = self.differences()
        if differences:
            self._warn(differences)
        return True

    def differences(self) -> list[str]:
        """What is far apart, one phrase each; empty where the two sides agree."""
        real, synthetic = (side.figures() for side in self._sides)
        found = []
        spread = real["std"].clamp(min=1e-6)
        error = (real["error"] ** 2 + synthetic["error"] ** 2).sqrt()
        if bool(((synthetic["mean"] - real["mean"]).abs() > _SHIFT * spread + 3 * error).any()):
            found.append(f"mean {_listed(synthetic['mean'])} beside {_listed(real['mean'])}")
        for name, words in (("std", "standard deviation"), ("contrast", "contrast within an image")):
            ratio = synthetic[name].clamp(min=1e-6) / real[name].clamp(min=1e-6)
            if bool(((ratio > _FACTOR) | (ratio < 1 / _FACTOR)).any()):
                found.append(f"{words} {_listed(synthetic[name])} beside {_listed(real[name])}")
        return found

    def _warn(self, differences: list[str]) -> None:
        picture = save_picture(*(side.kept() for side in self._sides))
        logger.warning(
            "synthetic images do not look like the real ones: %s (synthetic beside real, by channel, as they are "
            "delivered). %s. Where that is not meant, look at transform=, normalize= and the generator",
            "; ".join(differences),
            f"See {picture}: real images above, synthetic ones below" if picture else "No picture could be written",
        )


class _Side:
    def __init__(self) -> None:
        self.count = 0
        self._means: list[torch.Tensor] = []  # [n, C] each
        self._stds: list[torch.Tensor] = []
        self._kept: list[torch.Tensor] = []

    def add(self, images: torch.Tensor) -> None:
        pixels = _channels_first(images.detach()).float().flatten(2)  # [n, C, pixels]
        self._means.append(pixels.mean(2).cpu())
        self._stds.append(pixels.std(2, correction=0).cpu())
        if self.count < _PICTURED:
            self._kept.append(_channels_first(images.detach())[: _PICTURED - self.count].float().cpu())
        self.count += len(images)

    def figures(self) -> dict[str, torch.Tensor]:
        """Each [C]: mean and std of all pixels, mean std within an image, standard error of the mean."""
        means, stds = torch.cat(self._means), torch.cat(self._stds)
        mean = means.mean(0)
        return {
            "mean": mean,
            "std": ((stds**2 + means**2).mean(0) - mean**2).clamp(min=0).sqrt(),
            "contrast": stds.mean(0),
            "error": means.std(0) / len(means) ** 0.5,
        }

    def kept(self) -> torch.Tensor:
        """[8, C, H, W]"""
        return torch.cat(self._kept)


def save_picture(real: torch.Tensor, synthetic: torch.Tensor) -> Path | None:
    """A PNG with float images [n, C, H, W] of both sides, real ones above; None where no folder can be written to.

    It stands beside the log where that is a file, else in `first_batches` in the cache. Both rows have one scale,
    black and white being the darkest and brightest pixel of the real images.
    """
    from PIL import Image

    low, high = real.min(), real.max()
    rows = [_row(((images - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)) for images in (real, synthetic)]
    width = max(row.shape[2] for row in rows)
    page = torch.ones(3, sum(row.shape[1] for row in rows) + _GAP, width)
    top = 0
    for row in rows:
        page[:, top : top + row.shape[1], : row.shape[2]] = row
        top += row.shape[1] + _GAP
    file = picture_folder() / f"first_batch_{time.strftime('%Y%m%d-%H%M%S')}_{os.getpid()}.png"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((page * 255).byte().permute(1, 2, 0).numpy()).save(file)
    except OSError as error:
        logger.debug("%s: %s", file, error)
        return None
    return file


def picture_folder() -> Path:
    """The folder of the log file, where this package's messages go to one; else a folder of the cache."""
    at: logging.Logger | None = logger
    while at is not None:
        for handler in at.handlers:
            if isinstance(handler, logging.FileHandler) and handler.baseFilename != os.devnull:
                return Path(handler.baseFilename).parent
        at = at.parent if at.propagate else None
    return Path(os.environ.get("STREAMAUG_CACHE") or "~/.cache/streamaug").expanduser() / "first_batches"


def _row(images: torch.Tensor) -> torch.Tensor:
    """float [n, C, H, W] in [0, 1] -> [3, h, w]: the images side by side, small ones enlarged by whole factors."""
    factor = max(1, _TILE // max(images.shape[-2:]))
    images = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    padded = torch.nn.functional.pad(images, (0, _GAP), value=1.0)
    return torch.cat(list(padded), dim=2)


def _channels_first(images: torch.Tensor) -> torch.Tensor:
    """[n, C, H, W] of [n, H, W], [n, H, W, C] or [n, C, H, W]; of clips [n, C, frames, H, W] the first frame."""
    while images.ndim > 4:
        images = images[:, :, 0]
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[-1] in (1, 3, 4) and images.shape[1] not in (1, 3, 4):
        return images.permute(0, 3, 1, 2)
    return images


def _listed(values: torch.Tensor) -> str:
    return ", ".join(f"{value:.3g}" for value in values.tolist())
