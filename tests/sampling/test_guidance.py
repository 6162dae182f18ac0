"""Guidance in all its forms, and the stepped path, against loops written by hand."""

import logging

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from sampling.test_sampler import CONDITIONAL, SCHEDULERS, UNCONDITIONAL, adapter, classifier, latents, orders

from streamaug.errors import ModelError
from streamaug.sampling.sampler import Sampler
from streamaug.sampling.solvers.schedulers import configured, make_scheduler
from streamaug.sampling.solvers.stepped import SteppedSolver

NULL = 4
STEPPED = DDIMScheduler(clip_sample=False, thresholding=True)  # dynamic thresholding fits no recurrence


@torch.no_grad()
def by_hand(scheduler, x, steps, guidance, *, start=0, interval=(0.0, 1.0), rescale=0.0):
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(steps)
    labels = torch.arange(len(x)) % 4
    for i, t in enumerate(scheduler.timesteps[start:], start=start):
        cond = CONDITIONAL(x, t, class_labels=labels).sample
        if interval[0] <= i / steps < interval[1]:
            uncond = CONDITIONAL(x, t, class_labels=torch.full_like(labels, NULL)).sample
            out = uncond + guidance * (cond - uncond)
            out = rescale_noise_cfg(out, cond, rescale) if rescale else out
        else:
            out = cond
        x = scheduler.step(out, t, x).prev_sample
    return x


@pytest.mark.parametrize("scheduler", [SCHEDULERS["ddim"], STEPPED], ids=["fused", "stepped"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("start", [0, 2])
def test_guidance_acts_in_its_interval_alone(scheduler, batch_size, start):
    x = latents(batch_size)
    sampler = Sampler(adapter(CONDITIONAL, NULL), scheduler, 6, guidance_interval=(0.3, 0.7))
    ours = sampler.sample(x, orders(batch_size, start=start, guidance=3.0))
    theirs = by_hand(scheduler, x, 6, 3.0, start=start, interval=(0.3, 0.7))
    assert (ours - theirs).abs().max() <= 1e-4 * max(1.0, float(theirs.std()))


def test_outside_the_interval_the_network_sees_half_the_batch(monkeypatch):
    denoiser, sizes = adapter(CONDITIONAL, NULL), []
    original = type(denoiser).__call__
    monkeypatch.setattr(
        type(denoiser), "__call__", lambda self, x, t, c: (sizes.append(len(x)), original(self, x, t, c))[1]
    )
    sampler = Sampler(denoiser, SCHEDULERS["ddim"], 6, guidance_interval=(0.3, 0.7))
    sampler.sample(latents(2), orders(2, guidance=3.0))
    assert sizes == [2, 2, 4, 4, 4, 2]


@pytest.mark.parametrize("scheduler", [SCHEDULERS["ddim"], STEPPED], ids=["fused", "stepped"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_rescaled_guidance_is_the_pipelines(scheduler, batch_size):
    x = latents(batch_size)
    sampler = Sampler(adapter(CONDITIONAL, NULL), scheduler, 6, guidance_rescale=0.7)
    ours = sampler.sample(x, orders(batch_size, guidance=5.0))
    theirs = by_hand(scheduler, x, 6, 5.0, rescale=0.7)
    assert (ours - theirs).abs().max() <= 1e-4 * max(1.0, float(theirs.std()))


def test_a_scheduler_without_a_recurrence_runs_by_its_own_step():
    sampler = Sampler(adapter(CONDITIONAL, NULL), STEPPED, 6)
    assert isinstance(sampler.solver(0), SteppedSolver)
    x = latents(3)
    ours = sampler.sample(x, orders(3, guidance=2.0))
    assert (ours - by_hand(STEPPED, x, 6, 2.0)).abs().max() <= 1e-4
    assert torch.equal(ours, sampler.sample(x, orders(3, guidance=2.0)))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_classifier_guidance_is_the_same_on_both_paths(guidance):
    """Thresholding to at most 1 is a clamp to 1, which the fused path has."""
    clamped = DDIMScheduler(clip_sample=True)
    thresholded = DDIMScheduler(clip_sample=False, thresholding=True, sample_max_value=1.0)
    x, scales = latents(4), np.array([0.0, 4.0, 4.0, 4.0], np.float32)
    found = []
    for scheduler in (clamped, thresholded):
        sampler = Sampler(adapter(CONDITIONAL, NULL), scheduler, 6, classifier=classifier())
        found.append(sampler.sample(x, orders(4, start=2, guidance=guidance, classifier_guidance=scales)))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["lms", "deis", "unipc", "heun"])
def test_classifier_guidance_moves_the_clean_image_whatever_the_history_holds(name):
    judge = classifier()
    scheduler = make_scheduler(DDIMScheduler(clip_sample=False), name)
    sampler = Sampler(adapter(CONDITIONAL, NULL), scheduler, 6, classifier=judge)
    x, labels = latents(4), torch.arange(4)
    guided = sampler.sample(x, orders(4, start=2, classifier_guidance=2.0))
    plain = sampler.sample(x, orders(4, start=2))
    gain = (torch.log_softmax(judge(guided), 1) - torch.log_softmax(judge(plain), 1))[labels, labels]
    assert gain.mean() > 0


def test_eta_adds_ddim_noise_that_depends_on_the_image_alone():
    scheduler = DDIMScheduler(clip_sample=False)
    quiet = Sampler(adapter(UNCONDITIONAL), scheduler, 6).sample(latents(2), orders(2))
    sampler = Sampler(adapter(UNCONDITIONAL), scheduler, 6, options={"eta": 1.0})
    noisy = sampler.sample(latents(2), orders(2))
    assert (noisy - quiet).abs().max() > 0.1
    later = sampler.sample(latents(3)[1:2], orders(1, first_id=1))
    assert (later - noisy[1:2]).abs().max() <= 1e-3 * noisy.std()


def test_a_setting_that_the_scheduler_does_not_take_names_the_nearest():
    with pytest.raises(ModelError, match=r"scheduler_config\.clip_samples.*did you mean 'clip_sample'"):
        configured(DDPMScheduler(), {"clip_samples": False})
    assert configured(DDPMScheduler(), {"clip_sample": False}).config.clip_sample is False
    same = DDPMScheduler()
    assert configured(same, {}) is same


@pytest.mark.parametrize("scheduler", [SCHEDULERS["ddim-epsilon"], STEPPED], ids=["fused", "stepped"])
def test_debugging_names_the_evaluation_in_which_an_image_breaks(scheduler, monkeypatch, caplog):
    denoiser = adapter(UNCONDITIONAL)
    original, calls = type(denoiser).__call__, []

    def breaks_one(self, x, t, c):
        out = original(self, x, t, c)
        calls.append(None)
        if len(calls) == 3:
            out = out.clone()
            out[1] = torch.nan
        return out

    monkeypatch.setattr(type(denoiser), "__call__", breaks_one)
    with caplog.at_level(logging.WARNING, logger="streamaug"):
        found = Sampler(denoiser, scheduler, 6, debug_nan=True).sample(latents(3), orders(3, first_id=40))
    assert found[0].isfinite().all() and not found[1].isfinite().any() and found[2].isfinite().all()
    said = [record.getMessage() for record in caplog.records if "not finite" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith("image 41 is not finite after evaluation 3 of 6")
