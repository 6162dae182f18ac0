"""UNet2DModel against the DDPM and DDIM pipelines, from the same latents and noise."""

import json
import shutil
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from harness import assert_same_images, assert_same_latents, images_from_files, loaded, orders
from recorded import our_noise
from streamaug.kernels.philox import normal
from tiny import unet2d as tiny

from streamaug.errors import ConfigError, MismatchError, ModelError
from streamaug.sampling import denoisers
from streamaug.sampling.sampler import Sampler
from streamaug.sampling.solvers.table import solver_for

STEPS, SHAPE = 6, (3, 8, 8)
PREDICTIONS = ["epsilon", "v_prediction", "sample"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    tiny.build(folder)
    return folder


@pytest.fixture(scope="module")
def denoiser(folder):
    return loaded(denoisers.inspect(folder))


@pytest.fixture(scope="module")
def of_classes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    tiny.build(folder, num_class_embeds=5)
    return folder


def scheduler_of(name, prediction, **settings):
    cls = {"DDPMPipeline": DDPMScheduler, "DDIMPipeline": DDIMScheduler}[name]
    return cls(prediction_type=prediction, beta_schedule="squaredcos_cap_v2", **settings)


def drawn(order, stream=0):
    return normal(torch.from_numpy(order.images["id"].copy()), SHAPE, seed=0, stream=stream)


@pytest.mark.parametrize(
    ("pipeline", "made"), [("DDIMPipeline", "DDIMScheduler"), ("DDPMPipeline", "EulerDiscreteScheduler")]
)
def test_a_pipeline_that_makes_its_scheduler_of_one_class_does_here(folder, tmp_path, pipeline, made):
    copy = shutil.copytree(folder, tmp_path / "copy")
    index = {"_class_name": pipeline, "scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    file = copy / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | index))
    theirs = getattr(diffusers, pipeline).from_pretrained(copy)
    assert type(denoisers.load_scheduler(copy)).__name__ == type(theirs.scheduler).__name__ == made


@pytest.mark.parametrize("name", ["DDPMPipeline", "DDIMPipeline"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_images_equal_the_pipelines(denoiser, tmp_path, name, prediction, batch_size):
    pipeline = tiny.build(tmp_path, pipeline=name, scheduler=scheduler_of(name, prediction))
    order = orders(batch_size, classes=1)
    with our_noise(pipeline, order, drawn=[0], solver=1):
        theirs = pipeline(batch_size=batch_size, num_inference_steps=STEPS, output_type="np").images
    ours = Sampler(denoiser, pipeline.scheduler, STEPS).sample(drawn(order), order)
    assert_same_images(ours, theirs)


@pytest.mark.parametrize("name", ["DDPMPipeline", "DDIMPipeline"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("start", "batch_size"), [(0, 2), (3, 1), (3, 2), (3, 5)])
@torch.no_grad()
def test_latents_without_clamp_equal_the_loop_at_full_and_partial_depth(
    denoiser, tmp_path, name, prediction, start, batch_size
):
    scheduler = scheduler_of(name, prediction, clip_sample=False)
    pipeline = tiny.build(tmp_path, pipeline=name, scheduler=scheduler)
    order = orders(batch_size, classes=1, start=start)
    ours = Sampler(denoiser, scheduler, STEPS).sample(drawn(order), order)
    scheduler.set_timesteps(STEPS)
    x = drawn(order)
    with our_noise(pipeline, order, drawn=[], solver=1):
        for t in scheduler.timesteps[start:]:
            x = scheduler.step(pipeline.unet(x, t).sample, t, x).prev_sample
    assert_same_latents(ours, x)


@torch.no_grad()
def test_a_learned_variance_equals_the_pipelines(tmp_path):
    scheduler = scheduler_of("DDPMPipeline", "epsilon", variance_type="learned_range")
    pipeline = tiny.build(tmp_path, pipeline="DDPMPipeline", scheduler=scheduler, out_channels=6)
    denoiser, order = loaded(denoisers.inspect(tmp_path)), orders(2, classes=1)
    assert denoiser.learned_variance
    with our_noise(pipeline, order, drawn=[0], solver=1):
        theirs = pipeline(batch_size=2, num_inference_steps=STEPS, output_type="np").images
    solver = solver_for(scheduler, STEPS)
    run = solver.begin(drawn(order), torch.from_numpy(order.images["id"].copy()), seed=0)
    for evaluation, t in enumerate(torch.from_numpy(solver.timesteps).float()):
        run.advance(evaluation, denoiser(run.network_input(evaluation), t, {}))
    assert_same_images(run.x, theirs)


def test_a_learned_variance_is_dropped_where_the_scheduler_has_its_own(tmp_path):
    pipeline = tiny.build(tmp_path, out_channels=6, scheduler=DDIMScheduler(clip_sample=False))
    denoiser, order = loaded(denoisers.inspect(tmp_path)), orders(2, classes=1)
    scheduler, x = pipeline.scheduler, drawn(order)
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipeline.unet(x, t).sample[:, :3], t, x).prev_sample
    assert_same_latents(Sampler(denoiser, scheduler, STEPS).sample(drawn(order), order), x)


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
@torch.no_grad()
def test_guidance_leads_from_the_null_class_to_the_label(of_classes, batch_size, start):
    denoiser = loaded(denoisers.inspect(of_classes), null_class=4)
    scheduler = DDIMScheduler(clip_sample=False)
    order = orders(batch_size, classes=3, guidance=3.0, start=start)
    labels, x = torch.tensor(order.images["label"]), drawn(order)
    ours = Sampler(denoiser, scheduler, STEPS).sample(x, order)
    network = tiny.unet(num_class_embeds=5)
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps[start:]:
        cond, uncond = (network(x, t, class_labels=each).sample for each in (labels, torch.full_like(labels, 4)))
        x = scheduler.step(uncond + 3.0 * (cond - uncond), t, x).prev_sample
    assert_same_latents(ours, x)


def by_rows(order):
    """The same orders, conditioned on bank rows."""
    images = order.images.copy()
    images["template"] = -1
    return replace(order, images=images)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_row_that_is_the_labels_own_embedding_samples_what_the_label_does(of_classes, guidance):
    denoiser = loaded(denoisers.inspect(of_classes), null_class=4)
    order = orders(3, classes=3, guidance=guidance)
    own, null = (denoiser.class_rows(labels)["class_embedding"] for labels in (order.images["label"], np.full(3, 4)))
    rows = {"class_embedding": own, "null.class_embedding": null}
    sampler = Sampler(denoiser, DDIMScheduler(), 3)
    by_label = sampler.sample(drawn(order), order)
    assert torch.equal(sampler.sample(drawn(order), by_rows(order), rows), by_label)
    shuffled = {name: value.roll(1, 0) for name, value in rows.items()}
    assert not torch.equal(sampler.sample(drawn(order), by_rows(order), shuffled), by_label)


def test_rows_bring_the_unconditional_vector_where_the_model_has_no_null_class(of_classes):
    denoiser = loaded(denoisers.inspect(of_classes))
    order = orders(2, classes=2, guidance=3.0)
    with pytest.raises(ModelError, match=r"model\.null_class"):
        denoiser.condition(order, {}, True)
    rows = {"class_embedding": torch.randn(2, 32), "null.class_embedding": torch.randn(2, 32)}
    guided = denoiser.condition(by_rows(order), rows, True)["class_embedding"]
    torch.testing.assert_close(guided, torch.cat([rows["null.class_embedding"], rows["class_embedding"]]))
    assert torch.isfinite(Sampler(denoiser, DDIMScheduler(), 3).sample(drawn(order), by_rows(order), rows)).all()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({}, "the bank has none"),
        ({"tokens": torch.zeros(2, 5, 8), "null.tokens": torch.zeros(5, 8)}, "have only tokens.*invert again"),
        ({"class_embedding": torch.zeros(2, 7)}, r"are \[7\], the unet takes \[32\]"),
    ],
)
def test_rows_that_another_model_was_inverted_with_are_refused(of_classes, rows, said):
    denoiser = loaded(denoisers.inspect(of_classes))
    with pytest.raises(ModelError, match=said):
        denoiser.condition(by_rows(orders(2, classes=2)), rows, False)


def test_the_folder_may_say_which_class_is_none(of_classes, tmp_path):
    assert denoisers.inspect(of_classes).null_class is None
    copy = shutil.copytree(of_classes, tmp_path / "copy")
    (copy / "streamaug.json").write_text('{"null_class": 4}')
    assert denoisers.inspect(copy).null_class == 4
    assert denoisers.inspect(copy).digest != denoisers.inspect(of_classes).digest
    (copy / "streamaug.json").write_text('{"null_class": 5}')
    with pytest.raises(ModelError, match=r"null_class is 5.*from 0 to 4"):
        denoisers.inspect(copy)


def test_what_the_folder_says_is_known_without_its_weights(folder, of_classes):
    info = denoisers.inspect(folder)
    assert info.image_shape == info.latent_shape == SHAPE and info.pixels
    assert info.conditioning == "none" and info.guidance == "none" and info.num_classes == 0
    info = denoisers.inspect(of_classes)
    assert info.conditioning == "class" and info.guidance == "cfg" and info.num_classes == 5


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda folder: shutil.rmtree(folder / "unet"), "no unet/config.json"),
        (lambda folder: (folder / "unet/diffusion_pytorch_model.safetensors").unlink(), "safetensors"),
        (lambda folder: edit(folder, sample_size=None), "sample_size None"),
        (lambda folder: edit(folder, out_channels=4), "predicts 4.*twice as many"),
        (lambda folder: edit(folder, class_embed_type="timestep"), "class_embed_type 'timestep'.*num_class_embeds"),
    ],
)
def test_a_broken_folder_is_refused_with_what_is_wrong(folder, tmp_path, broken, said):
    copy = shutil.copytree(folder, tmp_path / "copy")
    broken(copy)
    with pytest.raises(ModelError, match=said):
        denoisers.inspect(copy)


def edit(folder, **changes):
    file = folder / "unet/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_image_files_become_images(of_classes, tmp_path):
    looks = images_from_files(tmp_path, of_classes, image_size=8, guidance=(1.0, 3.0), null_class=4)
    assert looks.shape == (2, 3, 3, 8, 8) and looks.std() > 1
    with pytest.raises(ConfigError, match=r"null class: set model\.null_class"):
        images_from_files(tmp_path / "unset", of_classes, image_size=8, guidance=(1.0, 3.0))
    with pytest.raises(MismatchError, match=r"class 1 of .* means 'no class' and is one of the data's 2 classes"):
        images_from_files(tmp_path / "taken", of_classes, image_size=8, guidance=(1.0, 3.0), null_class=1)


@pytest.mark.parametrize("guided", [False, True])
def test_mixed_labels_are_told_as_both_classes_mixed(guided, of_classes):
    denoiser = loaded(denoisers.inspect(of_classes), null_class=4)
    order = orders(3, classes=1)
    images = order.images
    images["label"], images["label_b"], images["label_mix"] = [0, 1, 2], [1, 1, 0], [0.25, 0.0, 1.0]
    told = denoiser.condition(order, {}, guided)["class_embedding"]
    of = denoiser.class_rows(np.arange(5))["class_embedding"]
    expected = torch.stack([0.75 * of[0] + 0.25 * of[1], of[1], of[0]])
    torch.testing.assert_close(told, torch.cat([of[[4, 4, 4]], expected]) if guided else expected)
