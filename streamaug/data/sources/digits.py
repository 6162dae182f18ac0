"""scikit-learn's 1,797 handwritten digits of 8 × 8 pixels."""

import numpy as np
from PIL import Image

from streamaug.config import DataConfig
from streamaug.data.source import Source
from streamaug.errors import MissingExtra


def open_source(config: DataConfig) -> tuple[Source, None]:
    """The digits, their values 0..16 scaled to 0..255. Raises MissingExtra."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtra("scikit-learn", "demo") from None
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]
    return Source(
        where="digits",
        names=[f"digits/{i}" for i in range(len(pixels))],
        fetch=lambda i: (Image.fromarray(pixels[i]), int(digits.target[i])),
        class_names=[str(name) for name in digits.target_names],
    ), None
