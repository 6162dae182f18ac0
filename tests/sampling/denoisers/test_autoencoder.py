"""Images to latents and back, against the autoencoders themselves."""

import json

import numpy as np
import pytest
import torch
from tiny.stable_diffusion import autoencoder, build, tiny_autoencoder

from streamaug.errors import ModelError
from streamaug.sampling.denoisers import LoadSettings, inspect
from streamaug.sampling.denoisers import autoencoder as module
from streamaug.sampling.denoisers.autoencoder import encoder, load_autoencoder

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8)
PIXELS = torch.from_numpy(IMAGES).float() / 127.5 - 1


@pytest.fixture
def folder(tmp_path):
    build(tmp_path)
    return tmp_path


def rewrite(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@torch.no_grad()
def test_a_row_is_the_scaled_mode_of_its_image_however_many_are_encoded_together(folder, monkeypatch):
    expected = autoencoder().encode(PIXELS).latent_dist.mode() * 0.18215
    encode = encoder(inspect(folder), CPU)
    torch.testing.assert_close(encode(IMAGES), expected, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(module, "_PIXELS_AT_ONCE", 2 * 32 * 32)
    torch.testing.assert_close(encode(IMAGES), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "scaling",
    [
        {"scaling_factor": 0.3, "shift_factor": 0.1},
        {"scaling_factor": 0.5, "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]},
    ],
)
def test_scaling_by_shift_or_statistics_is_undone_by_decoding(folder, scaling):
    rewrite(folder, "vae/config.json", **scaling)
    ours = load_autoencoder(inspect(folder), LoadSettings(CPU))
    vae = autoencoder()
    plain = vae.encode(PIXELS).latent_dist.mode()
    latents = ours.encode(PIXELS)
    assert (latents - plain).abs().max() > 0.1
    torch.testing.assert_close(ours.decode(latents), vae.decode(plain).sample, atol=1e-4, rtol=1e-4)


def test_an_autoencoder_that_overflows_in_half_precision_runs_in_full(folder):
    def dtype_inside(force_upcast):
        rewrite(folder, "vae/config.json", force_upcast=force_upcast)
        return load_autoencoder(inspect(folder), LoadSettings(CPU, torch.float16)).vae.dtype

    assert dtype_inside(True) == torch.float32
    assert dtype_inside(False) == torch.float16


@torch.no_grad()
def test_a_model_with_a_tiny_autoencoder_of_its_own_encodes_and_decodes_with_it(folder):
    vae = tiny_autoencoder(folder / "vae")
    rewrite(folder, "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    info = inspect(folder)
    assert info.image_shape == (3, 32, 32)
    latents = encoder(info, CPU)(IMAGES)
    torch.testing.assert_close(latents, vae.encode(PIXELS).latents, atol=1e-5, rtol=1e-5)
    images = load_autoencoder(info, LoadSettings(CPU, channels_last=False)).decode(latents)
    torch.testing.assert_close(images, vae.decode(latents).sample, atol=1e-5, rtol=1e-5)


def test_an_autoencoder_of_another_class_is_refused(folder):
    rewrite(folder, "vae/config.json", _class_name="VQModel")
    with pytest.raises(ModelError, match="VQModel is not supported; supported: AutoencoderKL, AutoencoderTiny"):
        load_autoencoder(inspect(folder), LoadSettings(CPU))
