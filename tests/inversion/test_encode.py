"""The encode method: pixels survive the bank, latents are the autoencoder's, the error says what is lost."""

import numpy as np
import pytest
import torch
from sampling.denoisers.tiny import stable_diffusion, unet2d

from streamaug.bank import Checkpoint, LatentBank
from streamaug.config import BankConfig
from streamaug.data import ImageSet
from streamaug.inversion.encode import GROUP_ROWS, Codec, Encode, latent_to_pixels, pixels_to_latent, relative_error
from streamaug.inversion.run import invert
from streamaug.sampling.denoisers import ModelInfo, inspect

DTYPES = ["float32", "float16", "bfloat16"]
ROUNDING = {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}  # half the spacing of numbers near 1
CPU = torch.device("cpu")


def encode(info: ModelInfo, dtype: str = "float16") -> Encode:
    return Encode(info, BankConfig(dtype=dtype), Codec(info, CPU))


def images(count: int = 70, size: int = 8) -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return ImageSet.from_arrays(pixels, np.arange(count) % 2, ["cat", "dog"])


@pytest.fixture(scope="module")
def pixel_model(tmp_path_factory) -> ModelInfo:
    folder = tmp_path_factory.mktemp("unet")
    unet2d.build(folder)
    return inspect(folder)


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory) -> ModelInfo:
    folder = tmp_path_factory.mktemp("sd")
    stable_diffusion.build(folder)
    return inspect(folder, 32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_256_pixel_values_survive_every_dtype(dtype):
    values = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    latent = pixels_to_latent(values).to(getattr(torch, dtype))
    assert latent.min() == -1 and latent.max() == 1
    assert np.array_equal(latent_to_pixels(latent).numpy(), values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bank_of_pixels_gives_the_images_back(tmp_path, pixel_model, dtype):
    real = images()
    invert(real, tmp_path, [encode(pixel_model, dtype)], model_digest="m", shard_rows=4096)
    bank = LatentBank.open(tmp_path)
    assert np.array_equal(latent_to_pixels(bank.tensor("latent")).numpy(), real.images)
    assert bank.tensor("latent").dtype == getattr(torch, dtype)
    errors = bank.row_array("encode.error")
    assert errors.shape == (70,) and (errors <= ROUNDING[dtype]).all()
    assert (errors == 0).all() == (dtype == "float32")


def test_a_row_is_the_autoencoders_latent_to_the_rounding_of_its_dtype(latent_model):
    real = images(GROUP_ROWS, 32)
    made = encode(latent_model).compute(real.images, real.labels, np.arange(GROUP_ROWS), Checkpoint(None))
    exact = encode(latent_model, "float32").compute(real.images, real.labels, np.arange(GROUP_ROWS), Checkpoint(None))
    assert made["latent"].shape == (GROUP_ROWS, 4, 16, 16)
    assert relative_error(made["latent"], exact["latent"]).max() <= ROUNDING["float16"]
    vae = stable_diffusion.autoencoder().eval()
    with torch.no_grad():
        latent = vae.encode(pixels_to_latent(real.images)).latent_dist.mode()
        back = vae.decode(latent).sample
    torch.testing.assert_close(exact["latent"], latent * vae.config.scaling_factor, rtol=1e-4, atol=1e-5)
    expected = relative_error(back, pixels_to_latent(real.images))
    torch.testing.assert_close(exact["encode.error"], expected, rtol=1e-3, atol=1e-5)


def test_the_error_is_the_norm_of_the_difference_over_that_of_what_is_wanted():
    wanted = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    found = torch.tensor([[3.0, 4.5], [0.0, 2.0]])
    assert relative_error(found, wanted).tolist() == pytest.approx([0.1, 0.0])


def test_another_model_or_dtype_is_another_part(pixel_model, latent_model):
    parts = [encode(pixel_model).part, encode(pixel_model, "float32").part, encode(latent_model).part]
    assert len({(str(part.meta), part.dtype) for part in parts}) == 3
