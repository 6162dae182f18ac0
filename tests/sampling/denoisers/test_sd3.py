"""Stable Diffusion 3 against its own pipelines, from the same latents and prompts."""

import json
import shutil

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline
from harness import assert_same_images, assert_same_latents, images_from_files, loaded, noise, orders, sampler
from safetensors.torch import load_file
from tiny import sd3 as tiny

from streamaug.errors import ModelError
from streamaug.sampling import denoisers
from streamaug.sampling.conditioning import encode_prompts
from streamaug.sampling.denoisers import sd3

STEPS, SIZE, SIDE = 6, 16, 8
CLASSES, TEMPLATES, NEGATIVE = ["cat", "red fox", "dog"], ["a photo of a {}", "{}, drawn"], "blurry"
PROMPTS = [TEMPLATES[0].replace("{}", name) for name in CLASSES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    tiny.build(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    return quiet(StableDiffusion3Pipeline.from_pretrained(folder))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompted(folder, cache, **settings):
    info = denoisers.inspect(folder, SIZE)
    return loaded(info, prompts=encode_prompts(info, CLASSES, TEMPLATES, cache, negative=NEGATIVE), **settings)


@pytest.fixture(scope="module")
def denoiser(folder, tmp_path_factory):
    return prompted(folder, tmp_path_factory.mktemp("cache"))


def asked(order, guidance, output_type="latent"):
    """The pipeline's arguments for the same images."""
    prompts = [PROMPTS[label] for label in order.images["label"]]
    return {
        "prompt": prompts,
        "negative_prompt": [NEGATIVE] * len(prompts),
        "guidance_scale": guidance,
        "num_inference_steps": STEPS,
        "height": SIZE,
        "width": SIZE,
        "output_type": output_type,
    }


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_latents_and_images_equal_the_pipelines(pipeline, denoiser, batch_size, guidance):
    order, x = orders(batch_size, classes=3, guidance=guidance), noise(batch_size, 4, SIDE, SIDE)
    ours = sampler(denoiser, pipeline.scheduler, STEPS).sample(x, order)
    assert_same_latents(ours, pipeline(latents=x, **asked(order, guidance)).images)
    if batch_size == 2:
        assert_same_images(denoiser.decode(ours), pipeline(latents=x, **asked(order, guidance, "np")).images)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_images_that_enter_part_way_equal_the_image_to_image_pipelines(pipeline, denoiser, batch_size, guidance):
    order, clean = orders(batch_size, classes=3, start=3, guidance=guidance), noise(batch_size, 4, SIDE, SIDE, seed=6)
    ours = sampler(denoiser, pipeline.scheduler, STEPS)
    signal, dark = ours.schedule.signal[3], ours.schedule.noise[3]
    x = float(signal) * clean + float(dark) * noise(batch_size, 4, SIDE, SIDE)
    from_image = quiet(StableDiffusion3Img2ImgPipeline(**pipeline.components))
    generator = torch.Generator().manual_seed(5)
    theirs = from_image(image=clean, strength=0.5, generator=generator, **asked(order, guidance)).images
    assert_same_latents(ours.sample(x, order), theirs)


def test_a_schedule_that_shifts_with_the_images_size_is_the_pipelines(pipeline, denoiser):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_image_seq_len=4)
    shifted = quiet(StableDiffusion3Pipeline(**pipeline.components | {"scheduler": scheduler}))
    order, x = orders(2, classes=3, guidance=5.0), noise(2, 4, SIDE, SIDE)
    theirs = shifted(latents=x, **asked(order, 5.0)).images
    assert_same_latents(sampler(denoiser, scheduler, STEPS).sample(x, order), theirs)
    assert sd3.timing(denoiser.info, pipeline.scheduler, STEPS) is None


def encoded_by(pipeline):
    """tokens and pooled of the prompts, and of the negative prompt."""
    with torch.no_grad():
        tokens, null, pooled, null_pooled = pipeline.encode_prompt(PROMPTS, None, None, negative_prompt=NEGATIVE)
    return {"tokens": tokens, "pooled": pooled, "null.tokens": null[0], "null.pooled": null_pooled[0]}


def test_encoded_prompts_equal_the_pipelines(pipeline, folder, tmp_path):
    info = denoisers.inspect(folder, SIZE)
    ours = load_file(encode_prompts(info, CLASSES, TEMPLATES, tmp_path, negative=NEGATIVE))
    theirs = encoded_by(pipeline)
    for name in ("tokens", "pooled"):
        assert ours[name].dtype == torch.float32 and ours[name].shape[:2] == (3, 2)
        torch.testing.assert_close(ours[name][:, 0], theirs[name], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours[f"null.{name}"], theirs[f"null.{name}"], atol=1e-5, rtol=1e-5)


def test_without_the_t5_zeros_stand_for_it_and_are_not_stored(tmp_path):
    pipeline = tiny.build(tmp_path / "model", with_t5=False)
    denoiser = prompted(tmp_path / "model", tmp_path / "cache")
    conditioning = denoiser.condition(orders(3, classes=3), {}, False)
    torch.testing.assert_close(conditioning["tokens"], encoded_by(pipeline)["tokens"], atol=1e-5, rtol=1e-5)
    assert denoiser.prompts.embeddings["tokens"].shape == (3, 2, 77, 20)
    order, x = orders(2, classes=3, guidance=5.0), noise(2, 4, SIDE, SIDE)
    theirs = pipeline(latents=x, **asked(order, 5.0)).images
    assert_same_latents(sampler(denoiser, pipeline.scheduler, STEPS).sample(x, order), theirs)


def test_another_text_encoder_is_another_text_digest(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = sd3.text_digest(denoisers.inspect(copy, SIZE), None)
    edit(copy / "text_encoder_3/config.json", layer_norm_epsilon=1e-3)
    assert sd3.text_digest(denoisers.inspect(copy, SIZE), None) != before


def test_a_prompt_that_the_clips_cannot_take_is_refused_by_its_class(folder, tmp_path):
    info = denoisers.inspect(folder, SIZE)
    with pytest.raises(ModelError, match=r"class 'a very long dog' has \d+ tokens.* takes 77"):
        encode_prompts(info, ["cat", "a very long dog"], ["{}, " + "far " * 21], tmp_path)


def test_bank_rows_take_the_place_of_prompts(denoiser):
    order = orders(2, classes=3)
    order.images["template"] = -1
    rows = {"tokens": noise(2, 5, 32), "pooled": noise(2, 20), "null.tokens": noise(5, 32), "null.pooled": noise(20)}
    guided = denoiser.condition(order, rows, True)
    torch.testing.assert_close(guided["tokens"][2:], rows["tokens"])
    torch.testing.assert_close(guided["pooled"][0], rows["null.pooled"])
    assert denoiser(noise(4, 4, SIDE, SIDE), torch.tensor(500.0), guided).shape == (4, 4, SIDE, SIDE)


def test_it_runs_in_half_precision(folder, tmp_path):
    denoiser = prompted(folder, tmp_path, dtype=torch.bfloat16)
    conditioning = denoiser.condition(orders(2, classes=3), {}, False)
    out = denoiser(noise(2, 4, SIDE, SIDE).bfloat16(), torch.tensor(500.0), conditioning)
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()
    assert denoiser.decode(out.float()).shape == (2, 3, SIZE, SIZE)


def test_sizes_are_multiples_of_a_patch_up_to_the_positions_that_were_learned(folder):
    assert denoisers.inspect(folder).latent_shape == (4, 8, 8)
    info = denoisers.inspect(folder, 24)
    assert info.image_shape == (3, 24, 24) and info.latent_shape == (4, 12, 12)
    assert info.conditioning == "prompt" and info.guidance == "cfg"
    with pytest.raises(ModelError, match=r"multiples of 4, data\.image_size is 18.*16 or 20"):
        denoisers.inspect(folder, 18)
    with pytest.raises(ModelError, match=r"at most 32 pixels.*is 36.*works: 32"):
        denoisers.inspect(folder, 36)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda folder: shutil.rmtree(folder / "vae"), "no vae/config.json"),
        (lambda folder: shutil.rmtree(folder / "tokenizer_3"), "no tokenizer in tokenizer_3"),
        (lambda folder: (folder / "text_encoder_2/model.safetensors").unlink(), "text_encoder_2.*safetensors"),
        (lambda folder: (folder / "transformer/diffusion_pytorch_model.safetensors").unlink(), "safetensors"),
        (lambda folder: edit(folder / "transformer/config.json", in_channels=5), "takes 5 channels, the vae has 4"),
    ],
)
def test_a_broken_folder_is_refused_with_what_is_wrong(folder, tmp_path, broken, said):
    copy = shutil.copytree(folder, tmp_path / "copy")
    broken(copy)
    with pytest.raises(ModelError, match=said):
        denoisers.inspect(copy, SIZE)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_prompts_and_image_files_become_images(folder, tmp_path):
    looks = images_from_files(tmp_path, folder, image_size=24, guidance=(1.0, 5.0))
    assert looks.shape == (2, 3, 3, 24, 24) and looks.std() > 1
