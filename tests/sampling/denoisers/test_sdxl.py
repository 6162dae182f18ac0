"""SDXL against its own diffusers pipelines, from the same latents."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from harness import images_from_files
from prompted import (
    CLASSES,
    CPU,
    NEGATIVE,
    TEMPLATES,
    adapter,
    deviation,
    encoded,
    give_our_noise,
    noise,
    orders,
    sampler,
    texts_of,
)
from safetensors.torch import load_file, save_file
from tiny.sdxl import POOLED, build
from tiny.stable_diffusion import SCHEDULE, tiny_autoencoder

from streamaug.errors import ModelError
from streamaug.sampling.conditioning import encode_prompts
from streamaug.sampling.denoisers import LoadSettings, inspect, load, load_scheduler
from streamaug.sampling.sampler import Sampler

STEPS = 5


def opened(cls, folder, **components):
    pipeline = cls.from_pretrained(folder, add_watermarker=False, **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder and pipeline of a base model, a refiner and a base model that is told the guidance scale."""
    made = {}
    for name, settings in {"base": {}, "refiner": {"refiner": True}, "lcm": {"time_cond_proj_dim": 32}}.items():
        folder = tmp_path_factory.mktemp(name)
        build(folder, **settings)
        cls = StableDiffusionXLImg2ImgPipeline if name == "refiner" else StableDiffusionXLPipeline
        made[name] = SimpleNamespace(folder=folder, pipeline=opened(cls, folder))
    return made


@pytest.fixture
def broken(models, tmp_path):
    """A copy of the base model to break."""
    shutil.copytree(models["base"].folder, tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def theirs(pipeline, order, latents, **call):
    guidance = float(order.images["guidance"][0])
    call = {"output_type": "latent", "negative_prompt": [NEGATIVE] * len(order), "num_inference_steps": STEPS} | call
    return pipeline(texts_of(order), guidance_scale=guidance, latents=latents, **call).images


@pytest.mark.parametrize("model", ["base", "lcm"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_latents_equal_the_pipelines(models, model, batch_size, guidance):
    folder, pipeline = models[model].folder, models[model].pipeline
    order, x = orders(batch_size, guidance=guidance), noise((batch_size, 4, 16, 16))
    engine = sampler(folder, STEPS)
    assert engine.denoiser.guidance == ("cfg" if model == "base" else "embedded")
    ours = engine.sample(x * engine.schedule.initial_noise, order)
    assert deviation(ours, theirs(pipeline, order, x)) <= 1e-4


@pytest.mark.parametrize("model", ["base", "refiner"])
@pytest.mark.parametrize(("batch_size", "guidance"), [(1, 1.0), (2, 5.0), (5, 5.0)])
def test_partial_depth_equals_the_image_to_image_pipeline(models, model, batch_size, guidance):
    folder = models[model].folder
    pipeline = opened(StableDiffusionXLImg2ImgPipeline, folder)
    order = orders(batch_size, start=2, guidance=guidance)
    clean = noise((batch_size, 4, 16, 16), seed=7)
    engine = sampler(folder, STEPS)
    noised = engine.schedule.signal[2] * clean + engine.schedule.noise[2] * noise(clean.shape)
    generator = torch.Generator().manual_seed(5)
    expected = theirs(pipeline, order, None, image=clean, strength=0.6, generator=generator)
    assert deviation(engine.sample(noised.float(), order), expected) <= 1e-4


def test_pooled_embedding_and_size_move_the_image_far_beyond_the_tolerance(models):
    engine, x = sampler(models["base"].folder, STEPS), noise((2, 4, 16, 16)) * 14
    order = orders(2, guidance=5.0)
    plain = engine.sample(x, order)
    denoiser = engine.denoiser
    denoiser.prompts.embeddings["pooled"] *= 0
    pooled = engine.sample(x, order)
    denoiser._ids = denoiser._ids + 500
    denoiser._repeated.clear()
    assert deviation(pooled, plain) > 0.01
    assert deviation(engine.sample(x, order), pooled) > 0.01


@pytest.mark.parametrize(
    ("settings", "original", "target"),
    [({}, 32, 32), ({"original_size": 24}, 24, 32), ({"original_size": 8, "target_size": 16}, 8, 16)],
)
def test_smaller_images_than_the_models_are_asked_for_as_its_own_size_or_as_set(models, settings, original, target):
    folder, size = models["base"].folder, 16
    info = inspect(folder, size)
    prompts = encode_prompts(info, CLASSES, TEMPLATES, folder / "cache", negative=NEGATIVE)
    denoiser = load(info, LoadSettings(CPU, prompts=prompts, **settings))
    order, x = orders(2, guidance=5.0), noise((2, 4, size // 2, size // 2))
    ours = Sampler(denoiser, load_scheduler(folder), STEPS)
    sizes = {"original_size": (original, original), "target_size": (target, target), "height": size, "width": size}
    expected = theirs(models["base"].pipeline, order, x, **sizes)
    assert deviation(ours.sample(x * ours.schedule.initial_noise, order), expected) <= 1e-4


def test_larger_images_than_the_models_are_asked_for_as_their_own_size(models):
    folder = models["base"].folder
    denoiser = load(inspect(folder, 48), LoadSettings(CPU))
    assert denoiser._ids.tolist() == [[48, 48, 0, 0, 48, 48]]


def test_images_equal_the_pipelines_also_with_a_tiny_autoencoder(models, tmp_path):
    order, x = orders(2, guidance=5.0), noise((2, 4, 16, 16))
    tiny = tiny_autoencoder(tmp_path / "tiny")
    for vae, settings in (({}, {}), ({"vae": tiny}, {"tiny_vae": tmp_path / "tiny"})):
        engine = sampler(models["base"].folder, STEPS, **settings)
        images = engine.denoiser.decode(engine.sample(x * engine.schedule.initial_noise, order))
        expected = theirs(opened(StableDiffusionXLPipeline, models["base"].folder, **vae), order, x, output_type="pt")
        assert ((images / 2 + 0.5).clamp(0, 1) - expected).abs().max() <= 1 / 255


def test_an_autoencoder_with_statistics_of_its_latents_equals_the_pipeline(broken):
    rewrite(broken, "vae/config.json", latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 1.0, 2.0])
    order, x = orders(2, guidance=5.0), noise((2, 4, 16, 16))
    engine = sampler(broken, STEPS)
    images = engine.denoiser.decode(engine.sample(x * engine.schedule.initial_noise, order))
    expected = theirs(opened(StableDiffusionXLPipeline, broken), order, x, output_type="pt")
    assert ((images / 2 + 0.5).clamp(0, 1) - expected).abs().max() <= 1 / 255


@pytest.mark.parametrize("model", ["base", "refiner"])
def test_prompts_are_encoded_as_the_pipeline_does(models, model):
    texts = ["a photo of a cat", "two dogs"]
    pipeline, folder = models[model].pipeline, models[model].folder
    ours, negative = encoded(folder, texts), encoded(folder, [NEGATIVE])
    expected = pipeline.encode_prompt(texts, device=CPU, negative_prompt=[NEGATIVE] * 2)
    for found, wanted in zip(
        (ours["tokens"], negative["tokens"], ours["pooled"], negative["pooled"]), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted[: len(found)], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("zeros", [True, False])
def test_an_empty_negative_prompt_is_zero_where_the_model_says_so(tmp_path, zeros):
    pipeline = build(tmp_path, force_zeros_for_empty_prompt=zeros)
    found = load_file(encode_prompts(inspect(tmp_path), ["cat"], {"cat": [""]}, tmp_path / "cache"))
    tokens, null_tokens, pooled, null_pooled = pipeline.encode_prompt([""], device=CPU)
    torch.testing.assert_close(found["null.tokens"], null_tokens[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["null.pooled"], null_pooled[0], atol=1e-5, rtol=1e-5)
    assert (found["null.tokens"] == 0).all() == zeros
    torch.testing.assert_close(found["tokens"][0], tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["pooled"][0], pooled, atol=1e-5, rtol=1e-5)


def test_inverted_embeddings_take_the_prompts_place(models):
    order, x = orders(2, guidance=3.0, template=-1), noise((2, 4, 16, 16))
    rows = {
        "tokens": noise((2, 5, 80), seed=1),
        "null.tokens": noise((5, 80), seed=2),
        "pooled": noise((2, POOLED), seed=3),
        "null.pooled": noise((POOLED,), seed=4),
    }
    engine = sampler(models["base"].folder, STEPS)
    expected = (
        models["base"]
        .pipeline(
            prompt_embeds=rows["tokens"],
            negative_prompt_embeds=rows["null.tokens"].expand(2, -1, -1),
            pooled_prompt_embeds=rows["pooled"],
            negative_pooled_prompt_embeds=rows["null.pooled"].expand(2, -1),
            guidance_scale=3.0,
            latents=x,
            num_inference_steps=STEPS,
            output_type="latent",
        )
        .images
    )
    assert deviation(engine.sample(x * engine.schedule.initial_noise, order, rows), expected) <= 1e-4
    with pytest.raises(ModelError, match="tokens and pooled, the bank's inverted embeddings have only tokens"):
        engine.sample(x, order, {"tokens": rows["tokens"]})


def test_class_tokens_for_both_encoders_are_read_as_the_pipeline_does(models, tmp_path):
    vectors = {"clip_l": noise((2, 32), seed=3), "clip_g": noise((2, 48), seed=4)}
    save_file(vectors, tmp_path / "sks.safetensors")
    pipeline = opened(StableDiffusionXLPipeline, models["base"].folder)
    for name, encoder, tokenizer in (
        ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
        ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
    ):
        pipeline.load_textual_inversion(vectors[name], token="sks", text_encoder=encoder, tokenizer=tokenizer)
    expected = pipeline.encode_prompt(["a sks"], device=CPU, do_classifier_free_guidance=False)
    found = encoded(models["base"].folder, ["a sks"], class_tokens=[tmp_path / "sks.safetensors"])
    torch.testing.assert_close(found["tokens"], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["pooled"], expected[2], atol=1e-5, rtol=1e-5)


def test_a_class_token_of_one_width_goes_to_the_encoder_of_that_width(models, tmp_path):
    for name, width in (("one", 32), ("two", 48), ("none", 40)):
        save_file({"sks": noise((1, width), seed=3)}, tmp_path / f"{name}.safetensors")
    folder = models["base"].folder
    plain = encoded(folder, ["a sks"])["tokens"]
    for name, touched in (("one", slice(0, 32)), ("two", slice(32, 80))):
        found = encoded(folder, ["a sks"], class_tokens=[tmp_path / f"{name}.safetensors"])["tokens"]
        changed = (found != plain).any(dim=1)[0]
        assert changed[touched].all() and changed.sum() == len(range(*touched.indices(80)))
    with pytest.raises(ModelError, match=r"takes \[vectors, 32 or 48\]"):
        encoded(folder, ["a sks"], class_tokens=[tmp_path / "none.safetensors"])


@pytest.mark.parametrize("steps", [1, 2])
def test_a_turbo_model_equals_its_pipeline_in_few_steps_given_our_noise(models, monkeypatch, steps):
    scheduler = EulerAncestralDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing")
    pipeline = opened(StableDiffusionXLPipeline, models["base"].folder, scheduler=scheduler)
    order, x = orders(2), noise((2, 4, 16, 16))
    engine = Sampler(adapter(models["base"].folder), scheduler, steps)
    ours = engine.sample(x * engine.schedule.initial_noise, order)
    give_our_noise(monkeypatch, scheduler, order)
    expected = pipeline(
        texts_of(order), guidance_scale=0.0, latents=x, num_inference_steps=steps, output_type="latent"
    ).images
    assert deviation(ours, expected) <= 1e-4


@pytest.mark.parametrize("model", ["base", "lcm"])
def test_bfloat16_stays_near_full_precision(models, model):
    order, x = orders(2, guidance=3.0), noise((2, 4, 16, 16))
    full, half = (sampler(models[model].folder, STEPS, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    x *= full.schedule.initial_noise
    images = [engine.denoiser.decode(engine.sample(x, order)).float() for engine in (full, half)]
    assert half.denoiser.dtype == torch.bfloat16
    assert (images[0] - images[1]).abs().mean() <= 2 / 127.5


@pytest.mark.parametrize("model", ["base", "refiner", "lcm"])
def test_image_files_become_images(models, model, tmp_path):
    made = images_from_files(tmp_path, models[model].folder, image_size=40, guidance=(1.0, 6.0))
    assert made.shape == (2, 3, 3, 40, 40)


@pytest.mark.parametrize(
    ("name", "values", "part"),
    [
        ("unet/config.json", {"in_channels": 9}, "9 input channels: an inpainting UNet"),
        ("unet/config.json", {"addition_embed_type": None}, "it belongs to another pipeline"),
        ("unet/config.json", {"projection_class_embeddings_input_dim": 64}, "requires_aesthetics_score"),
        ("model_index.json", {"_class_name": "StableDiffusionXLInpaintPipeline"}, "an inpainting UNet"),
        ("model_index.json", {"text_encoder_2": [None, None]}, "names no text_encoder_2"),
    ],
)
def test_a_model_of_another_kind_is_refused_with_the_reason(broken, name, values, part):
    rewrite(broken, name, **values)
    with pytest.raises(ModelError) as caught:
        inspect(broken)
    assert part in str(caught.value)


@pytest.mark.parametrize("missing", ["text_encoder_2/model.safetensors", "tokenizer_2", "unet"])
def test_a_missing_part_is_named(broken, missing):
    if (broken / missing).is_dir():
        shutil.rmtree(broken / missing)
    else:
        (broken / missing).unlink()
    with pytest.raises(ModelError, match=missing.split("/")[0]):
        inspect(broken)
