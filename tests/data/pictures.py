"""Small pictures, and folders of them, that the tests of every source are made from."""

from pathlib import Path

import numpy as np
from PIL import Image

from streamaug.config import DataConfig


def noise(seed: int, size: tuple[int, int] = (12, 12), mode: str = "RGB") -> Image.Image:
    """A picture of coarse random blocks: no two seeds agree."""
    rng = np.random.default_rng(seed)
    shape = (4, 4, 3) if mode == "RGB" else (4, 4)
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).resize(size, Image.Resampling.NEAREST)


def make_folder(root: Path, counts: dict[str, int], start: int = 0) -> Path:
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise(start + 1000 * number + i).save(root / name / f"{i:03d}.png")
    return root


def folder_config(root: Path, **changes) -> DataConfig:
    values = {"holdout": 0.25, "validation": 0, "image_size": 8, "channels": 3} | changes
    return DataConfig(source="folder", root=root, **values)
