"""DeepFloyd IF's base model against its own pipelines, from the same latents and noise; the cascade's folders."""

import json
import logging
import re
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, IFImg2ImgPipeline, IFPipeline
from harness import images_from_files
from prompted import CLASSES, NEGATIVE, TEMPLATES, adapter, deviation, orders, sampler, texts_of
from recorded import our_noise
from safetensors.torch import load_file
from streamaug.kernels.philox import normal
from tiny import deepfloyd_if as tiny

from streamaug.errors import ModelError
from streamaug.sampling.conditioning import encode_prompts
from streamaug.sampling.denoisers import FAMILIES, inspect

STEPS = 6
START, SOLVER = 0, 1  # Philox streams
SCHEDULERS = {
    "learned variance, thresholding": DDPMScheduler(**tiny.SCHEDULE, **tiny.LEARNED),
    "fixed variance": DDPMScheduler(**tiny.SCHEDULE, variance_type="fixed_small", clip_sample=True),
}


@pytest.fixture(scope="module", params=SCHEDULERS)
def model(request, tmp_path_factory):
    return built(tmp_path_factory, SCHEDULERS[request.param])


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return built(tmp_path_factory)


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upscaler")
    tiny.build_upscaler(folder)
    return folder


def built(tmp_path_factory, scheduler=None):
    folder = tmp_path_factory.mktemp("if")
    pipeline = tiny.build(folder, scheduler=scheduler)
    return SimpleNamespace(folder=folder, pipeline=pipeline, sampler=sampler(folder, STEPS))


def run(pipeline, order, guidance, **arguments):
    """The pipeline's images [B, C, H, W] in [-1, 1] for the order, with its noise."""
    with our_noise(pipeline, order, drawn=[START], solver=SOLVER):
        return pipeline(
            prompt=texts_of(order),
            negative_prompt=[NEGATIVE] * len(order),
            guidance_scale=guidance,
            num_inference_steps=STEPS,
            output_type="pt",
            **arguments,
        ).images


def start_noise(order):
    return normal(torch.from_numpy(order.images["id"].copy()), (3, tiny.SIZE, tiny.SIZE), seed=0, stream=START)


def pictures(batch_size):
    return torch.rand(batch_size, 3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_images_equal_the_pipelines(model, batch_size, guidance):
    order = orders(batch_size, guidance=guidance)
    ours = model.sampler.sample(start_noise(order), order)
    assert deviation(ours, run(model.pipeline, order, guidance)) <= 1e-4


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_images_from_partial_depth_equal_the_image_to_image_pipelines(model, batch_size, guidance):
    pipeline = IFImg2ImgPipeline(**model.pipeline.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    order = orders(batch_size, start=2, guidance=guidance)
    schedule, images = model.sampler.schedule, pictures(batch_size)
    noised = (schedule.signal[2] * images + schedule.noise[2] * start_noise(order)).float()
    theirs = run(pipeline, order, guidance, image=images, strength=(STEPS - 2) / STEPS + 1e-6)
    assert deviation(model.sampler.sample(noised, order), theirs) <= 1e-4


def test_each_image_has_its_own_guidance(model):
    scales = np.array([1.5, 3.0, 6.0], np.float32)
    order = orders(3, guidance=scales)
    ours = model.sampler.sample(start_noise(order), order)
    for i, scale in enumerate(scales):
        assert deviation(ours[i], run(model.pipeline, order, float(scale))[i]) <= 1e-4


def caption_cleaning(monkeypatch, pipeline=IFPipeline, *, installed):
    """Has the pipeline find beautifulsoup4 and ftfy, or not; where they are not there, it finds small doubles."""
    module = sys.modules[pipeline.__module__]
    if installed and not (module.is_bs4_available() and module.is_ftfy_available()):
        tagless = lambda text, features: SimpleNamespace(text=re.sub("<[^>]*>", "", text))  # noqa: E731
        fixed = SimpleNamespace(fix_text=lambda text: text.replace("ã¶", "ö"))
        monkeypatch.setattr(module, "BeautifulSoup", tagless, raising=False)
        monkeypatch.setattr(module, "ftfy", fixed, raising=False)
    for name in ("is_bs4_available", "is_ftfy_available"):
        monkeypatch.setattr(module, name, lambda: installed)


@pytest.mark.parametrize("installed", [True, False], ids=["beautifulsoup4 and ftfy", "neither"])
@pytest.mark.parametrize("pipeline", [IFPipeline, IFImg2ImgPipeline])
def test_prompts_are_encoded_as_the_pipeline_encodes_them(published, monkeypatch, tmp_path, pipeline, installed):
    caption_cleaning(monkeypatch, pipeline, installed=installed)
    theirs = pipeline(**published.pipeline.components, requires_safety_checker=False)
    names = ["Cat", " a fire engine ", "<b>dog</b> &amp; http://a.com/dog.jpg SchÃ¶n @me"]
    negative = "BLURRY, <i>dark</i> 200x300"
    info = replace(inspect(published.folder), pipeline=pipeline.__name__)
    ours = load_file(encode_prompts(info, names, TEMPLATES, tmp_path, negative=negative))
    for label, name in enumerate(names):
        for template, wording in enumerate(TEMPLATES):
            tokens, null = theirs.encode_prompt(
                wording.format(name), negative_prompt=negative, device=torch.device("cpu"), clean_caption=True
            )
            torch.testing.assert_close(ours["tokens"][label, template], tokens[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(ours["null.tokens"], null[0], atol=1e-5, rtol=0)


def test_prompts_that_were_not_cleaned_are_not_taken_for_cleaned_ones(published, monkeypatch, tmp_path):
    made = {}
    for installed in (True, False):
        caption_cleaning(monkeypatch, installed=installed)
        for name in ("cat", "<b>cat</b>"):
            made[name, installed] = encode_prompts(inspect(published.folder), [name], ["a {}"], tmp_path)
    assert made["<b>cat</b>", True] != made["<b>cat</b>", False]
    assert made["<b>cat</b>", True] == made["cat", True] == made["cat", False], "one text, encoded once"


def test_classes_that_cleaning_makes_one_are_named(published, monkeypatch, tmp_path, caplog):
    caption_cleaning(monkeypatch, installed=True)
    with caplog.at_level(logging.WARNING, logger="streamaug"):
        encode_prompts(inspect(published.folder), ["猫", "cat", "犬"], ["a {}"], tmp_path)
    (said,) = [record.getMessage() for record in caplog.records if record.name == "streamaug"]
    assert said.startswith("classes '猫' and '犬' have the same prompt, 'a'")


def test_a_prompt_that_the_encoder_cannot_take_whole_names_its_class(published):
    with pytest.raises(ModelError, match=r"the prompt of class 'z{80}' has \d+ tokens, the text encoder takes 77"):
        encode_prompts(inspect(published.folder), [*CLASSES, "z" * 80], TEMPLATES, published.folder / "prompts")


def test_inverted_embeddings_take_the_place_of_the_prompts(published):
    order, prompted = orders(2, guidance=4.0, template=-1), orders(2, guidance=4.0, template=0)
    table = published.sampler.denoiser.prompts
    rows = {"tokens": table.embeddings["tokens"][:2, 0], "null.tokens": table.null["tokens"]}
    ours = published.sampler.denoiser.condition(order, rows, True)["tokens"]
    torch.testing.assert_close(ours, published.sampler.denoiser.condition(prompted, {}, True)["tokens"])


def test_the_size_is_the_models_own_or_any_multiple(published, upscaler):
    assert inspect(published.folder).latent_shape == inspect(published.folder).image_shape == (3, 16, 16)
    assert inspect(published.folder, 24).image_shape == (3, 24, 24)
    cascade = inspect(published.folder, upscaler=upscaler)
    assert (cascade.image_shape, cascade.latent_shape) == ((3, 32, 32), (3, 16, 16))
    assert cascade.upscaler.image_shape == cascade.upscaler.latent_shape == (3, 32, 32)
    smaller = inspect(published.folder, 24, upscaler=upscaler)
    assert (smaller.image_shape, smaller.latent_shape) == ((3, 24, 24), (3, 12, 12))
    assert cascade.digest != inspect(published.folder).digest


@pytest.mark.parametrize(("size", "with_upscaler", "near"), [(17, False, "16 or 18"), (30, True, "28 or 32")])
def test_a_size_that_does_not_fit_names_the_nearest_that_does(published, upscaler, size, with_upscaler, near):
    with pytest.raises(ModelError, match=f"data.image_size is {size}; the nearest that works: {near}"):
        inspect(published.folder, size, upscaler=upscaler if with_upscaler else None)


def test_a_super_resolution_model_is_refused_as_the_model(published, upscaler):
    with pytest.raises(ModelError, match=r"second stage of a cascade; set model\.upscaler to this folder and model\.p"):
        inspect(upscaler)
    with pytest.raises(ModelError, match=r"'IFPipeline' is no upscaler.*accepted: IFSuperResolutionPipeline"):
        inspect(published.folder, upscaler=published.folder)


@pytest.fixture
def damaged(published, upscaler, tmp_path):
    """Copies of both folders, and how to change one of their files."""
    base, second = tmp_path / "base", tmp_path / "second"
    shutil.copytree(published.folder, base)
    shutil.copytree(upscaler, second)

    def change(file, **values):
        config = json.loads((tmp_path / file).read_text()) | values
        (tmp_path / file).write_text(json.dumps(config))

    def refusal():
        with pytest.raises(ModelError) as error:
            inspect(base, upscaler=second)
        return str(error.value)

    return SimpleNamespace(base=base, second=second, change=change, refusal=refusal)


@pytest.mark.parametrize(
    ("file", "values", "parts"),
    [
        ("base/unet/config.json", {"in_channels": 6}, ["takes 6 channels", "model.upscaler"]),
        ("base/unet/config.json", {"out_channels": 4}, ["predicts 4", "predicts 3, or 6 with its variance"]),
        ("base/unet/config.json", {"addition_embed_type": "text_time"}, ["'text_time'", "'text'"]),
        ("base/unet/config.json", {"encoder_hid_dim": 8}, ["embeddings of 8 values", "text encoder makes 16"]),
        ("base/unet/config.json", {"sample_size": None}, ["sample_size None"]),
        (
            "second/unet/config.json",
            {"in_channels": 3, "out_channels": 1},
            ["second: the unet takes 3", "takes 6 channels"],
        ),
        ("second/unet/config.json", {"class_embed_type": None}, ["model.upscaler", "None", "takes 6 channels and 'ti"]),
        ("second/unet/config.json", {"encoder_hid_dim": 8}, ["second: the unet takes embeddings of 8 values"]),
        ("second/unet/config.json", {"sample_size": 40}, ["40x40", "16x16", "such as 64x64"]),
    ],
)
def test_folders_that_do_not_fit_are_refused_by_what_does_not(damaged, file, values, parts):
    damaged.change(file, **values)
    message = damaged.refusal()
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("missing", "part"),
    [
        ("base/unet/diffusion_pytorch_model.safetensors", "no unet/diffusion_pytorch_model.safetensors"),
        ("base/text_encoder/model.safetensors", "no text_encoder/"),
        ("second/unet/diffusion_pytorch_model.safetensors", "no unet/diffusion_pytorch_model.safetensors"),
        ("second/image_noising_scheduler/scheduler_config.json", "no image_noising_scheduler/scheduler_config.json"),
    ],
)
def test_a_missing_file_is_named(damaged, missing, part):
    (damaged.base.parent / missing).unlink()
    assert part in damaged.refusal()


def test_bank_rows_are_the_images_reduced_to_the_base_size(published, upscaler):
    info = inspect(published.folder, upscaler=upscaler)
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), np.uint8)
    rows = FAMILIES[info.family].encoder(info, torch.device("cpu"), None)(images)
    means = images.astype(np.float64).reshape(2, 3, 16, 2, 16, 2).mean((3, 5)) / 127.5 - 1
    torch.testing.assert_close(rows, torch.from_numpy(means).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("guidance", [(1.0, 1.0), (2.0, 4.0)])
def test_image_files_become_images(tmp_path, model, guidance):
    pixels = images_from_files(tmp_path, model.folder, image_size=tiny.SIZE, guidance=guidance)
    assert pixels.shape == (2, 3, 3, tiny.SIZE, tiny.SIZE)
    assert pixels.std(axis=(2, 3, 4)).min() > 0


def test_the_denoiser_says_whether_its_network_predicts_a_variance(tmp_path):
    tiny.build(tmp_path, out_channels=3)
    assert not adapter(tmp_path).learned_variance
