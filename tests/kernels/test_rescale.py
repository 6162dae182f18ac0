"""Rescaled guidance against float64, and against the function of diffusers' pipelines."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from streamaug.kernels.rescale import rescale

from streamaug.errors import UsageError

SHAPES = [(1, 8, 8), (3, 5, 7), (4, 31, 37)]


def halves(shape, dtype=torch.float32, batch=3):
    return (torch.randn(2 * batch, *shape, generator=torch.Generator().manual_seed(0)) * 2 + 0.5).to(dtype)


def expected(model_out, guidance, phi):
    u, c = model_out.double().chunk(2)
    e = u + guidance.double().view(-1, 1, 1, 1) * (c - u)
    ratio = c.flatten(1).std(1) / e.flatten(1).std(1)
    return e * (1 + phi * (ratio - 1)).view(-1, 1, 1, 1)


SCALES = torch.tensor([1.0, 2.5, 7.5])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_every_image_is_combined_and_rescaled_by_itself(backend, device, shape, dtype, phi):
    model_out = halves(shape, dtype)
    found = rescale(model_out.to(device), SCALES.to(device), phi, backend=backend)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu().double(), expected(model_out, SCALES, phi), rtol=1e-5, atol=1e-5)


def test_it_is_what_the_pipelines_do(backend, device):
    model_out = halves((4, 8, 8))
    u, c = model_out.chunk(2)
    theirs = rescale_noise_cfg(u + 7.5 * (c - u), c, guidance_rescale=0.7)
    found = rescale(model_out.to(device), torch.full((3,), 7.5, device=device), 0.7, backend=backend)
    torch.testing.assert_close(found.cpu(), theirs, rtol=1e-5, atol=1e-5)


def test_channels_last_gives_the_same_numbers_in_its_own_layout(backend, device):
    model_out = halves((4, 6, 5)).to(device)
    last = model_out.to(memory_format=torch.channels_last)
    found = rescale(last, SCALES.to(device), 0.7, backend=backend)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, rescale(model_out, SCALES.to(device), 0.7, backend=backend))


def test_a_constant_image_stays_and_a_broken_one_breaks_alone(backend, device):
    model_out = halves((1, 4, 4)).to(device)
    model_out[0], model_out[3] = 0.25, 0.25
    model_out[1, 0, 0, 0] = torch.nan
    found = rescale(model_out, SCALES.to(device), 0.7, backend=backend)
    assert torch.equal(found[0], torch.full_like(found[0], 0.25))
    assert found[1].isnan().any() and found[2].isfinite().all()


@pytest.mark.parametrize(
    ("shape", "scales", "phi", "message"),
    [
        ((5, 1, 4, 4), torch.ones(2), 0.5, "model_out"),
        ((4, 1, 4, 4), torch.ones(3), 0.5, "guidance"),
        ((4, 1, 4, 4), torch.ones(2).double(), 0.5, "guidance"),
        ((4, 1, 4, 4), torch.ones(2), 1.5, "phi"),
    ],
)
def test_what_does_not_fit_is_refused(shape, scales, phi, message):
    with pytest.raises(UsageError, match=message):
        rescale(torch.zeros(shape), scales, phi)
