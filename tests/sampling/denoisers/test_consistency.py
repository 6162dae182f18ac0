"""Consistency models against their own pipeline: one step and several, with class labels and without."""

import numpy as np
import pytest
import torch
from harness import assert_same_images, images_from_files, loaded, orders
from recorded import our_noise
from streamaug.kernels.philox import normal
from tiny import consistency as tiny

from streamaug.sampling import denoisers
from streamaug.sampling.sampler import Sampler

SHAPE = (3, 8, 8)


@pytest.fixture(scope="module", params=[None, 5], ids=["unconditional", "classes"])
def classes(request):
    return request.param


@pytest.fixture(scope="module")
def folder(classes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("consistency")
    tiny.build(folder, classes=classes)
    return folder


@pytest.fixture(scope="module")
def pipeline(classes, tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("pipeline"), classes=classes)


@pytest.fixture(scope="module")
def denoiser(folder):
    return loaded(denoisers.inspect(folder))


def entering(pipeline, order):
    x = normal(torch.from_numpy(order.images["id"].copy()), SHAPE, seed=0, stream=0)
    return x * float(pipeline.scheduler.init_noise_sigma)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_images_equal_the_pipelines(pipeline, denoiser, classes, steps, batch_size):
    order = orders(batch_size, classes=5)
    labels = order.images["label"].tolist() if classes else None
    with our_noise(pipeline, order, drawn=[0], solver=1):
        theirs = pipeline(batch_size, labels, num_inference_steps=steps, output_type="np").images
    ours = Sampler(denoiser, pipeline.scheduler, steps).sample(entering(pipeline, order), order)
    assert_same_images(ours, theirs)
    inside = np.abs(theirs - 0.5) < 0.49
    assert inside.mean() > 0.2, "the comparison is of clamped images"


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@torch.no_grad()
def test_images_that_enter_part_way_equal_the_loop_over_the_rest(pipeline, denoiser, classes, batch_size):
    order = orders(batch_size, classes=5, start=2)
    labels = torch.tensor(order.images["label"]) if classes else None
    clean = torch.tanh(torch.randn(batch_size, *SHAPE, generator=torch.Generator().manual_seed(6)))
    sampler = Sampler(denoiser, pipeline.scheduler, 4)
    x = float(sampler.schedule.signal[2]) * clean + float(sampler.schedule.noise[2]) * entering(pipeline, order) / 80
    ours = sampler.sample(x, order)
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    with our_noise(pipeline, order, drawn=[], solver=1):
        for t in scheduler.timesteps[2:]:
            scaled = scheduler.scale_model_input(x, t)
            x = scheduler.step(pipeline.unet(scaled, t, class_labels=labels).sample, t, x).prev_sample
    assert (ours - x).abs().max() <= 1e-4 * x.std()


def test_image_files_become_images(folder, tmp_path, classes):
    looks = images_from_files(tmp_path, folder, image_size=8, guidance=(1.0, 1.0), from_noise=classes is not None)
    assert looks.shape[1:] == (3, 3, 8, 8) and looks.std() > 1
