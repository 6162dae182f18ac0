"""The sampler against diffusers' pipelines and hand-written loops, from the same latents."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DModel,
)

from streamaug.errors import ModelError, UsageError
from streamaug.orders import ORDER_DTYPE, OrderBatch
from streamaug.sampling import sampler as sampler_module
from streamaug.sampling.denoisers import LoadSettings
from streamaug.sampling.denoisers.unet2d import UNet2D
from streamaug.sampling.guidance import classifier_shift
from streamaug.sampling.sampler import Sampler, _Paced

SCHEDULERS = {
    "ddim": DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
    "ddim-epsilon": DDIMScheduler(clip_sample=False),
    "euler": EulerDiscreteScheduler(prediction_type="v_prediction"),
    "dpmsolver++": DPMSolverMultistepScheduler(),
}


def unet(num_class_embeds=None) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        num_class_embeds=num_class_embeds,
    )


UNCONDITIONAL, CONDITIONAL = unet(), unet(5)


def adapter(model, null_class=None) -> UNet2D:
    return UNet2D(model, None, LoadSettings(torch.device("cpu"), channels_last=False, null_class=null_class))


def orders(batch_size, *, start=0, guidance=1.0, classifier_guidance=0.0, first_id=0) -> OrderBatch:
    images = np.zeros(batch_size, ORDER_DTYPE)
    images["id"] = first_id + np.arange(batch_size)
    images["label"] = np.arange(batch_size) % 4
    images["guidance"] = guidance
    images["classifier_guidance"] = classifier_guidance
    return OrderBatch(0, start, 0, 0, images)


def latents(batch_size):
    return torch.randn(batch_size, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def reference(model, scheduler, x, steps, start=0, labels=None, guidance=None, null_class=None):
    """The loop as diffusers' documentation writes it."""
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    for t in scheduler.timesteps[start:]:
        scaled = scheduler.scale_model_input(x, t)
        if guidance is None:
            out = model(scaled, t, class_labels=labels).sample
        else:
            uncond = model(scaled, t, class_labels=torch.full_like(labels, null_class)).sample
            cond = model(scaled, t, class_labels=labels).sample
            out = uncond + guidance.view(-1, 1, 1, 1) * (cond - uncond)
        x = scheduler.step(out, t, x).prev_sample
    return x


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("start", [0, 4])
def test_unconditional_samples_equal_the_diffusers_loop(name, batch_size, start):
    scheduler, x = SCHEDULERS[name], latents(batch_size)
    if start == 0:
        x = x * float(scheduler.init_noise_sigma)
    ours = Sampler(adapter(UNCONDITIONAL), scheduler, 6).sample(x, orders(batch_size, start=start))
    theirs = reference(UNCONDITIONAL, scheduler, x, 6, start)
    assert (ours - theirs).abs().max() <= 1e-4 * max(1.0, float(theirs.std()))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_guidance_per_image_equals_the_diffusers_loop(name, batch_size):
    scheduler, x = SCHEDULERS[name], latents(batch_size) * float(SCHEDULERS[name].init_noise_sigma)
    scales = np.linspace(1.0, 4.0, batch_size).astype(np.float32) + 0.5
    order = orders(batch_size, guidance=scales)
    ours = Sampler(adapter(CONDITIONAL, null_class=4), scheduler, 6).sample(x, order)
    labels = torch.from_numpy(order.images["label"].copy())
    theirs = reference(CONDITIONAL, scheduler, x, 6, 0, labels, torch.from_numpy(scales), null_class=4)
    assert (ours - theirs).abs().max() <= 1e-4 * max(1.0, float(theirs.std()))


def test_images_equal_the_diffusers_pipeline():
    scheduler = SCHEDULERS["ddim"]
    pipeline = DDIMPipeline(UNCONDITIONAL, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    theirs = pipeline(batch_size=4, generator=generator, num_inference_steps=6, output_type="np").images
    ours = Sampler(adapter(UNCONDITIONAL), scheduler, 6).sample(x, orders(4))
    ours = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - theirs).max() <= 1e-4


def test_a_batch_in_which_every_scale_is_one_runs_without_the_unconditional_half(monkeypatch):
    denoiser = adapter(CONDITIONAL, null_class=4)
    shapes = []
    original = UNet2D.__call__
    monkeypatch.setattr(UNet2D, "__call__", lambda self, x, t, c: (shapes.append(len(x)), original(self, x, t, c))[1])
    Sampler(denoiser, SCHEDULERS["ddim"], 3).sample(latents(3), orders(3))
    assert shapes == [3, 3, 3]
    shapes.clear()
    Sampler(denoiser, SCHEDULERS["ddim"], 3).sample(latents(3), orders(3, guidance=2.0))
    assert shapes == [6, 6, 6]


@pytest.mark.parametrize("name", ["ddim", "stepped"])
def test_a_scale_below_one_is_no_guidance_as_in_the_pipelines(name, monkeypatch):
    scheduler = SCHEDULERS.get(name) or DDIMScheduler(clip_sample=False, thresholding=True)
    denoiser, shapes = adapter(CONDITIONAL, null_class=4), []
    original = UNet2D.__call__
    monkeypatch.setattr(UNet2D, "__call__", lambda self, x, t, c: (shapes.append(len(x)), original(self, x, t, c))[1])
    found = [
        Sampler(denoiser, scheduler, 3).sample(latents(2), orders(2, guidance=np.array(scales, np.float32)))
        for scales in ([0.0, 0.5], [1.0, 1.0], [0.0, 3.0], [1.0, 3.0])
    ]
    assert shapes == [2] * 6 + [4] * 6
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])


def test_the_same_order_gives_the_same_bits_and_nearly_the_same_elsewhere_in_a_batch():
    sampler = Sampler(adapter(UNCONDITIONAL), SCHEDULERS["ddim"], 6)
    x = latents(5)
    one, again = sampler.sample(x, orders(5)), sampler.sample(x, orders(5))
    assert torch.equal(one, again)
    flipped = sampler.sample(x.flip(0), orders(5)).flip(0)
    assert (one - flipped).abs().max() <= 1e-3 * one.std()


def test_the_step_kernel_is_on_the_path(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("the kernel was called")

    monkeypatch.setattr(sampler_module, "step", broken)
    with pytest.raises(RuntimeError, match="the kernel was called"):
        Sampler(adapter(UNCONDITIONAL), SCHEDULERS["ddim"], 2).sample(latents(1), orders(1))


def classifier():
    torch.manual_seed(2)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))


def test_the_classifier_shift_is_the_gradient_of_the_log_probability():
    model = classifier().double()

    class AsFloat(torch.nn.Module):
        def forward(self, images):
            return model(images.double())

    images = latents(3)
    labels = torch.tensor([0, 1, 2])
    scale = torch.tensor([0.5, 1.0, 2.0])
    shift = classifier_shift(AsFloat(), images, labels, scale, 0.7)
    step = 1e-4
    for pixel in (0, 9, 63):
        nudged = images.double().flatten(1).clone()
        nudged[:, pixel] += step
        up = torch.log_softmax(model(nudged.view(3, 1, 8, 8)), 1)[torch.arange(3), labels]
        nudged[:, pixel] -= 2 * step
        down = torch.log_softmax(model(nudged.view(3, 1, 8, 8)), 1)[torch.arange(3), labels]
        expected = (up - down) / (2 * step) * scale.double() * 0.7
        torch.testing.assert_close(shift.flatten(1)[:, pixel].double(), expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_classifier_guidance_makes_the_label_likelier_and_leaves_scale_zero_alone(guidance):
    judge = classifier()
    denoiser = adapter(CONDITIONAL, null_class=4)
    sampler = Sampler(denoiser, SCHEDULERS["ddim"], 6, classifier=judge)
    x = latents(4)
    scales = np.array([0.0, 4.0, 4.0, 4.0], np.float32)
    guided = sampler.sample(x, orders(4, start=2, guidance=guidance, classifier_guidance=scales))
    plain = sampler.sample(x, orders(4, start=2, guidance=guidance))
    labels = torch.arange(4)
    gain = (torch.log_softmax(judge(guided), 1) - torch.log_softmax(judge(plain), 1))[labels, labels]
    assert (gain[1:] > 0.01).all()
    torch.testing.assert_close(guided[0], plain[0], atol=1e-5, rtol=1e-5)


def test_guidance_without_what_it_needs_is_refused():
    with pytest.raises(ModelError, match="knows a condition"):
        Sampler(adapter(UNCONDITIONAL), SCHEDULERS["ddim"], 2).sample(latents(2), orders(2, guidance=2.0))
    with pytest.raises(ModelError, match=r"model\.null_class"):
        Sampler(adapter(CONDITIONAL), SCHEDULERS["ddim"], 2).sample(latents(2), orders(2, guidance=2.0))
    with pytest.raises(UsageError, match="needs a judge"):
        Sampler(adapter(UNCONDITIONAL), SCHEDULERS["ddim"], 2).sample(latents(2), orders(2, classifier_guidance=1.0))


def test_on_a_gpu_at_most_two_evaluations_wait_when_a_beat_is_given(monkeypatch):
    """So that beats follow the device's progress, and a batch can be abandoned."""
    happened = []

    class Event:
        def __init__(self, blocking):
            self.number = sum(what == "queued" for what, _ in happened)

        def record(self):
            happened.append(("queued", self.number))

        def synchronize(self):
            happened.append(("done", self.number))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    paced = _Paced(lambda: happened.append(("beat", None)))
    for _ in range(4):
        paced()
    beat = ("beat", None)
    assert happened == [
        *(("queued", 0), beat),
        *(("queued", 1), beat),
        *(("queued", 2), ("done", 0), beat),
        *(("queued", 3), ("done", 1), beat),
    ]
