"""The judge's opinion of what a row gives back: a part of its own, so that another judge redoes no inversion."""

import hashlib
from typing import Literal

import numpy as np
import torch

from streamaug.bank import Checkpoint, Part
from streamaug.filtering.judge import Judge, pack_state
from streamaug.inversion.encode import GROUP_ROWS, Codec
from streamaug.sampling.denoisers import ModelInfo


class Score:
    """The row array "encode.score" [n]: the probability the judge gives the label, of the image as it decodes.

    The image is encoded and decoded again, in the dtype the bank stores, which costs little. A low score marks an
    image that the autoencoder spoils, or whose label the judge doubts. judge: weights included, it is part of what
    the scores depend on.
    """

    def __init__(self, info: ModelInfo, dtype: Literal["float32", "float16", "bfloat16"], codec: Codec, judge: Judge):
        judged_by = hashlib.sha256(pack_state(judge).tobytes()).hexdigest()[:16]
        meta = {"model": info.digest, "latent_shape": list(info.latent_shape), "judge": judged_by}
        self.part = Part("score", meta, GROUP_ROWS, dtype)
        self._codec, self._judge = codec, judge

    @torch.no_grad()
    def compute(
        self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray, checkpoint: Checkpoint
    ) -> dict[str, torch.Tensor]:
        latent = self._codec.encode(images).to(self.part.torch_dtype).float()
        device = next(self._judge.parameters()).device
        back = self._codec.decode(latent).to(device)
        return {"encode.score": self._judge.score(back, torch.from_numpy(labels).to(device))[0]}
