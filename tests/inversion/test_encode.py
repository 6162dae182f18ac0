"""The encode method: pixels survive the bank, and an interrupted or repeated inversion does no work twice."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from streamaug.bank import LatentBank
from streamaug.config import BankConfig
from streamaug.data import ImageSet
from streamaug.errors import BankError
from streamaug.inversion.encode import GROUP_ROWS, invert, latent_to_pixels, pixels_to_latent

DTYPES = ["float32", "float16", "bfloat16"]


def images(count: int = 150, seed: int = 0) -> ImageSet:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 1, 4, 4), dtype=np.uint8)
    return ImageSet.from_arrays(pixels, np.arange(count) % 2, ["cat", "dog"])


def digest_of(path: Path) -> str:
    data = b"".join(f.name.encode() + f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file())
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_256_pixel_values_survive_every_dtype(dtype):
    values = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    latent = pixels_to_latent(values).to(getattr(torch, dtype))
    assert latent.min() == -1 and latent.max() == 1
    assert np.array_equal(latent_to_pixels(latent).numpy(), values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bank_of_pixels_gives_the_images_back(tmp_path, dtype):
    real = images()
    bank = invert(real, tmp_path / "bank", config=BankConfig(dtype=dtype), model_digest="m")
    assert np.array_equal(latent_to_pixels(bank.tensor("latent")).numpy(), real.images)
    assert bank.tensor("latent").dtype == getattr(torch, dtype)
    assert bank.labels.tolist() == real.labels.tolist() and bank.class_names == ["cat", "dog"]
    assert bank.source_hashes == real.hashes and bank.source_names == real.sources
    assert bank.meta == {
        "method": "encode",
        "model": "m",
        "image_shape": [1, 4, 4],
        "value_range": [-1.0, 1.0],
    }


def test_an_encoder_always_gets_full_groups_and_its_latents_are_stored(tmp_path):
    shapes = []

    def encode(pixels: np.ndarray) -> torch.Tensor:
        shapes.append(pixels.shape)
        return torch.from_numpy(pixels).float().mean((2, 3), keepdim=True).expand(-1, 4, 2, 2)

    real = images()
    bank = invert(real, tmp_path / "bank", config=BankConfig(), model_digest="m", encode=encode)
    assert shapes == [(GROUP_ROWS, 1, 4, 4)] * 3
    assert bank.tensor("latent").shape == (150, 4, 2, 2) and bank.meta["value_range"] is None
    means = torch.from_numpy(real.images).float().mean((2, 3)).half()
    assert torch.equal(bank.tensor("latent")[:, :, 0, 0], means.expand(-1, 4))


def test_a_finished_bank_is_opened_without_computing_or_writing(tmp_path):
    def never(pixels: np.ndarray) -> torch.Tensor:
        raise AssertionError("computed again")

    real = images()
    arguments = {"path": tmp_path / "bank", "config": BankConfig(), "model_digest": "m"}
    first = invert(real, encode=pixels_to_latent, **arguments)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "bank").iterdir()}
    calls: list[tuple[int, int]] = []
    again = invert(real, encode=never, progress=lambda *counts: calls.append(counts), **arguments)
    assert again.digest == first.digest and calls == [(150, 150)]
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "bank").iterdir()} == before


def test_progress_counts_rows_and_an_interrupted_inversion_goes_on(tmp_path):
    real = images()
    calls: list[tuple[int, int]] = []

    def stop_after_two_groups(done: int, total: int) -> None:
        calls.append((done, total))
        if done == 128:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        invert(real, tmp_path / "bank", config=BankConfig(), model_digest="m", progress=stop_after_two_groups)
    assert calls == [(0, 150), (64, 150), (128, 150)]

    rest: list[int] = []
    invert(
        real,
        tmp_path / "bank",
        config=BankConfig(),
        model_digest="m",
        progress=lambda done, total: rest.append(done),
    )
    assert rest == [128, 150]
    invert(real, tmp_path / "whole", config=BankConfig(), model_digest="m")
    assert digest_of(tmp_path / "bank") == digest_of(tmp_path / "whole")


def test_a_changed_image_redoes_one_group_and_a_changed_model_all(tmp_path):
    real = images()
    sizes: list[int] = []

    def encode(pixels: np.ndarray) -> torch.Tensor:
        sizes.append(len(pixels))
        return pixels_to_latent(pixels)

    def run(source: ImageSet, model: str) -> LatentBank:
        sizes.clear()
        return invert(source, tmp_path / "bank", config=BankConfig(), model_digest=model, encode=encode)

    run(real, "m")
    pixels = real.images.copy()
    pixels[70] = 255 - pixels[70]
    changed = ImageSet.from_arrays(pixels, real.labels, real.class_names)
    bank = run(changed, "m")
    assert len(sizes) == 1
    assert np.array_equal(latent_to_pixels(bank.tensor("latent")).numpy(), pixels)
    run(changed, "m2")
    assert len(sizes) == 3


def test_no_images_make_no_bank(tmp_path):
    with pytest.raises(BankError, match="no images"):
        invert(images().subset([]), tmp_path / "bank", config=BankConfig(), model_digest="m")
    assert not (tmp_path / "bank").exists()
