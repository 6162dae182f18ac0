"""What the families' parity tests share: orders, a loaded model, closeness, and a run from image files to images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from streamaug import config, engine
from streamaug.orders import ORDER_DTYPE, OrderBatch
from streamaug.preparation import prepare
from streamaug.sampling import denoisers
from streamaug.sampling.denoisers import Denoiser, LoadSettings, ModelInfo
from streamaug.sampling.sampler import Sampler

CPU = torch.device("cpu")


def orders(batch_size: int, *, classes: int, start: int = 0, guidance: float = 1.0) -> OrderBatch:
    """Labels 0, 1, ... in turn, the first wording."""
    images = np.zeros(batch_size, ORDER_DTYPE)
    images["id"] = np.arange(batch_size)
    images["label"] = np.arange(batch_size) % classes
    images["guidance"] = guidance
    return OrderBatch(0, start, 0, 0, images)


def loaded(info: ModelInfo, **settings) -> Denoiser:
    return denoisers.load(info, LoadSettings(CPU, **settings))


def sampler(denoiser: Denoiser, scheduler: Any, steps: int) -> Sampler:
    """As the engine makes it, with the family's timing."""
    return Sampler(denoiser, scheduler, steps, timing=denoisers.timing(denoiser.info, scheduler, steps))


def noise(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same_latents(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert torch.isfinite(theirs).all()
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.std()


def assert_same_images(ours: torch.Tensor, theirs: np.ndarray) -> None:
    """ours: [B, C, H, W] in [-1, 1]; theirs: [B, H, W, C] in [0, 1], as output_type="np" gives them."""
    ours = (ours.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1 / 255


def images_from_files(
    tmp_path: Path,
    model: Path,
    *,
    image_size: int,
    guidance: tuple[float, float],
    null_class: int | None = None,
    from_noise: bool = True,
) -> np.ndarray:
    """From a folder of small PNGs to the engine's pictures: a batch from anchors and, if `from_noise`, one from noise.

    uint8 [1 or 2, B, C, H, W], made twice and asserted equal.
    """
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(10 * label + i).integers(0, 256, (image_size, image_size, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    recipes = [{"kind": "noise", "depth": [0.6, 0.7], "guidance": guidance}]
    if from_noise:
        recipes.append({"kind": "prompt", "guidance": guidance})
    text = f"""
cache: {tmp_path / "cache"}
data: {{source: folder, root: {tmp_path / "images"}, image_size: {image_size}, channels: 3, holdout: 0, validation: 0}}
model: {{path: {model}, scheduler: keep, steps: 3, device: cpu, compile: false, null_class: {json.dumps(null_class)}}}
recipes: {json.dumps(recipes)}
judge: {{enabled: false}}
stream: {{batch_size: 3}}
"""
    prepared = prepare(config.parse(text))
    made = engine.build(prepared.engine_options)
    batches = [prepared.planner.batch(k, prepared.planner.uniform()) for k in range(12)]
    chosen = [next(batch for batch in batches if batch.start > 0)]
    if from_noise:
        chosen.append(next(batch for batch in batches if batch.start == 0))
    looks = [np.stack([made.look(batch)[0] for batch in chosen]) for _ in range(2)]
    np.testing.assert_array_equal(*looks)
    assert not any(made.look(batch)[2].any() for batch in chosen), "an image was rejected"
    return looks[0]
