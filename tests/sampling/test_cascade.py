"""The cascade's second stage against IF's super-resolution pipeline, from the same images and noise."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from denoisers.prompted import CLASSES, CPU, NEGATIVE, TEMPLATES, deviation, orders, texts_of
from denoisers.recorded import our_noise
from denoisers.tiny import deepfloyd_if as tiny
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from PIL import Image
from streamaug.kernels.philox import normal

from streamaug import config, engine
from streamaug.errors import ConfigError, ModelError
from streamaug.preparation import prepare
from streamaug.sampling import cascade, latents
from streamaug.sampling import sampler as sampler_module
from streamaug.sampling.conditioning import encode_prompts
from streamaug.sampling.denoisers import LoadSettings, inspect, load, load_scheduler
from streamaug.sampling.sampler import Sampler

STEPS, NOISE_LEVEL = 5, 250
SCHEDULERS = {
    "learned variance, thresholding": DDPMScheduler(**tiny.SCHEDULE, **tiny.LEARNED),
    "fixed variance": DDPMScheduler(**tiny.SCHEDULE, variance_type="fixed_small", clip_sample=True),
}


@pytest.fixture(scope="module", params=SCHEDULERS)
def model(request, tmp_path_factory):
    return built(tmp_path_factory, SCHEDULERS[request.param])


@pytest.fixture(scope="module")
def fixed(tmp_path_factory):
    return built(tmp_path_factory, SCHEDULERS["fixed variance"])


def built(tmp_path_factory, scheduler):
    """Both pipelines and both stages, the prompts encoded."""
    folder = tmp_path_factory.mktemp("cascade")
    first = tiny.build(folder / "base", scheduler=scheduler)
    second = tiny.build_upscaler(folder / "upscaler", scheduler=scheduler)
    info = inspect(folder / "base", upscaler=folder / "upscaler")
    prompts = encode_prompts(info, CLASSES, TEMPLATES, folder, negative=NEGATIVE)
    base = load(info, LoadSettings(CPU, prompts=prompts))
    return SimpleNamespace(
        folder=folder,
        pipelines=(first, second),
        base=base,
        sampler=Sampler(base, load_scheduler(folder / "base"), STEPS),
        stage=stage(base),
    )


def stage(base, **settings):
    given = {"steps": STEPS, "noise_level": NOISE_LEVEL, "seed": 0, "kernels": "auto"}
    return cascade.load_second_stage(base, **given | settings)


def pictures(batch_size):
    return torch.rand(batch_size, 3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(3)) * 2 - 1


@torch.no_grad()
def upscaled_by_pipeline(model, images, order, guidance, noise_level=NOISE_LEVEL):
    """The super-resolution pipeline's images [B, C, H, W] in [-1, 1], told the base model's embeddings."""
    first, second = model.pipelines
    prompt, negative = first.encode_prompt(texts_of(order), negative_prompt=[NEGATIVE] * len(order), device=CPU)
    drawn = [cascade.START_STREAM, cascade.NOISING_STREAM]
    with our_noise(second, order, drawn=drawn, solver=cascade.SOLVER_STREAM):
        return second(
            image=images,
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            guidance_scale=guidance,
            num_inference_steps=STEPS,
            noise_level=noise_level,
            output_type="pt",
        ).images


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_images_equal_the_super_resolution_pipelines(model, batch_size, guidance):
    order, images = orders(batch_size, guidance=guidance), pictures(batch_size)
    theirs = upscaled_by_pipeline(model, images, order, guidance)
    assert deviation(model.stage(images, order), theirs) <= 1e-4


@pytest.mark.parametrize("noise_level", [0, 999])
def test_images_equal_the_pipelines_at_any_noise_level(fixed, noise_level):
    order, images = orders(2, guidance=4.0), pictures(2)
    theirs = upscaled_by_pipeline(fixed, images, order, 4.0, noise_level)
    assert deviation(stage(fixed.base, noise_level=noise_level)(images, order), theirs) <= 1e-4


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_both_stages_equal_the_pipelines_one_after_the_other(model, guidance):
    order = orders(2, guidance=guidance)
    start = normal(torch.arange(2), (3, tiny.SIZE, tiny.SIZE), seed=0, stream=0)
    ours = model.stage(model.base.decode(model.sampler.sample(start, order)), order)
    first = model.pipelines[0]
    with our_noise(first, order, drawn=[0], solver=1):
        small = first(
            prompt=texts_of(order),
            negative_prompt=[NEGATIVE] * 2,
            guidance_scale=guidance,
            num_inference_steps=STEPS,
            output_type="pt",
        ).images
    theirs = upscaled_by_pipeline(model, small, order, guidance)
    assert ((ours - theirs).abs().max() / 2) <= 1 / 255
    assert deviation(ours, theirs) <= 1e-3


def test_each_image_has_its_own_guidance(model):
    scales = np.array([1.5, 3.0, 6.0], np.float32)
    order, images = orders(3, guidance=scales), pictures(3)
    ours = model.stage(images, order)
    for i, scale in enumerate(scales):
        assert deviation(ours[i], upscaled_by_pipeline(model, images, order, float(scale))[i]) <= 1e-4


def test_an_order_from_partial_depth_runs_the_second_stage_whole(fixed):
    images = pictures(2)
    whole, partial = (fixed.stage(images, orders(2, start=start)) for start in (0, 3))
    assert torch.equal(whole, partial)


def test_an_image_is_the_same_again_and_nearly_the_same_elsewhere_in_a_batch(model):
    order, images = orders(5, guidance=2.0), pictures(5)
    ours = model.stage(images, order)
    assert torch.equal(ours, model.stage(images, order))
    order.images[:] = order.images[::-1].copy()
    assert deviation(model.stage(images.flip(0), order).flip(0), ours) <= 1e-3
    order.images[:] = order.images[::-1].copy()
    order.images["id"] += 100
    assert deviation(model.stage(images, order), ours) > 0.1


def test_no_two_uses_of_noise_share_a_stream():
    second = {cascade.NOISING_STREAM, cascade.START_STREAM, cascade.SOLVER_STREAM}
    assert len(second) == 3 and second <= {2, 3, 4, 5}
    first = {latents._LATENT_STREAM, sampler_module._STEP_STREAM}
    assert not second & first and max(second) < latents._CONDITIONING_STREAM


def test_one_images_nan_stays_its_own(model):
    order, images = orders(3), pictures(3)
    before = model.stage(images, order)
    images[1, 0, 0, 0] = float("nan")
    after = model.stage(images, order)
    assert torch.isnan(after[1]).any()
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]])


def test_the_network_sees_the_enlarged_image_unscaled_whatever_the_solver(fixed, monkeypatch):
    euler = EulerDiscreteScheduler(beta_schedule="scaled_linear")
    stage_ = cascade.SecondStage(
        Sampler(fixed.stage.sampler.denoiser, euler, 3, stream=cascade.SOLVER_STREAM), (0.9, 0.1)
    )
    seen = []
    network = fixed.stage.sampler.denoiser.network
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda x, *a, **k: (seen.append(x[:, 3:]), forward(x, *a, **k))[1])
    stage_(pictures(2), orders(2))
    assert len(seen) == 3
    for each in seen[1:]:
        assert torch.equal(each, seen[0])


def test_the_scales_of_a_noise_level_are_the_folders_noising_schedulers(fixed):
    signal, noise = cascade.noised_scales(fixed.folder / "upscaler", NOISE_LEVEL)
    alpha = fixed.pipelines[1].image_noising_scheduler.alphas_cumprod[NOISE_LEVEL].item()
    assert signal == pytest.approx(alpha**0.5, rel=1e-6) and noise == pytest.approx((1 - alpha) ** 0.5, rel=1e-6)


def test_a_noise_level_or_steps_that_the_schedule_does_not_have_are_refused(fixed):
    info = fixed.base.info.upscaler
    cascade.check(info, STEPS, NOISE_LEVEL)
    with pytest.raises(ModelError, match=r"upscaler_noise_level is 1000; .* takes 0 to 999"):
        cascade.check(info, STEPS, 1000)
    with pytest.raises(ModelError, match="steps 1001"):
        cascade.check(info, 1001, NOISE_LEVEL)


def configuration(tmp_path, model, *more):
    """A few images of the second stage's size, and the cascade's configuration."""
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(10 * label + i).integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    text = f"""
cache: {tmp_path / "cache"}
data: {{source: folder, root: {tmp_path / "images"}, image_size: 32, channels: 3, holdout: 0, validation: 0}}
model:
  path: {model.folder / "base"}
  upscaler: {model.folder / "upscaler"}
  steps: 3
  upscaler_steps: 2
  compile: false
  device: cpu
recipes: [{{kind: noise, depth: [0.6, 0.7], guidance: [2.0, 4.0]}}]
judge: {{enabled: false}}
stream: {{batch_size: 3}}
"""
    return config.parse(text, overrides=more)


def test_the_engine_makes_images_of_the_second_stages_size_from_rows_of_the_firsts(tmp_path, model):
    prepared = prepare(configuration(tmp_path, model))
    assert prepared.image_shape == (3, 32, 32)
    row, image = prepared.bank.gather("latent", np.arange(1))[0], prepared.labelled.images[0]
    means = image.astype(np.float64).reshape(3, 16, 2, 16, 2).mean((2, 4)) / 127.5 - 1
    torch.testing.assert_close(row.double(), torch.from_numpy(means), atol=1e-3, rtol=0)  # stored in half precision
    made = engine.build(prepared.engine_options)
    order = prepared.planner.batch(0, prepared.planner.uniform())
    pixels, _, reasons = made.look(order)
    assert pixels.shape == (3, 3, 32, 32) and (reasons == 0).all() and made.stage_seconds["decode"] > 0
    np.testing.assert_array_equal(pixels, made.look(order)[0])


def test_the_second_stage_is_on_the_path_and_keeps_the_producers_heart_beating(tmp_path, fixed, monkeypatch):
    prepared = prepare(configuration(tmp_path, fixed))
    made = engine.build(prepared.engine_options)
    order, beats = prepared.planner.batch(0, prepared.planner.uniform()), []
    made.look(order, lambda: beats.append(1))
    assert len(beats) == (3 - order.start) + 2
    made.second_stage = lambda *args, **kwargs: torch.full((3, 3, 32, 32), 0.5)
    assert (made.look(order)[0] == 191).all()


def test_classifier_guidance_acts_in_the_first_stage_on_enlarged_images(tmp_path, fixed):
    more = ["judge={enabled: true, steps: 2}", "recipes=[{kind: noise, depth: [1, 1], classifier_guidance: [5, 5]}]"]
    prepared = prepare(configuration(tmp_path, fixed, *more))
    made = engine.build(prepared.engine_options)
    made.load_judge(0, prepared.judge_state)
    order = prepared.planner.batch(0, prepared.planner.uniform())
    guided = made.look(order)[0]
    order.images["classifier_guidance"] = 0.0
    plain = made.look(order)[0]
    assert guided.shape == (3, 3, 32, 32) and not np.array_equal(guided, plain)


def test_a_model_without_a_second_stage_takes_no_upscaler(tmp_path, fixed):
    from denoisers.tiny import stable_diffusion

    stable_diffusion.build(tmp_path / "sd")
    with pytest.raises(ModelError, match=r"model\.upscaler: StableDiffusionPipeline takes none.*IFPipeline"):
        inspect(tmp_path / "sd", upscaler=fixed.folder / "upscaler")
    with pytest.raises(ConfigError, match="upscaler needs path"):
        config.parse(f"prior: {{}}\nmodel: {{upscaler: {fixed.folder}}}\n")


def test_the_noise_level_and_steps_are_checked_before_anything_is_inverted(tmp_path, fixed):
    short = tmp_path / "short"
    tiny.build_upscaler(short, scheduler=DDIMScheduler(num_train_timesteps=500))
    configured = configuration(tmp_path, fixed, f"model.upscaler={short}", "model.upscaler_steps=1000")
    with pytest.raises(ModelError, match="steps 1000"):
        prepare(configured)
    assert not (tmp_path / "cache").exists()
