"""Flux against its own pipelines, from the same latents and prompts: like dev, and like schnell."""

import json
import shutil

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline
from harness import assert_same_images, assert_same_latents, images_from_files, loaded, noise, orders, sampler
from safetensors.torch import load_file
from tiny import flux as tiny

from streamaug.config import parse
from streamaug.engine import solver_settings
from streamaug.errors import ConfigError, ModelError
from streamaug.sampling import denoisers
from streamaug.sampling.conditioning import encode_prompts
from streamaug.sampling.denoisers import flux

STEPS, SIZE, SIDE = 6, 16, 8
CLASSES, TEMPLATES = ["cat", "red fox", "dog"], ["a photo of a {}", "{}, drawn"]
PROMPTS = [TEMPLATES[0].replace("{}", name) for name in CLASSES]
TOKENS = {"dev": 512, "schnell": 256}


@pytest.fixture(scope="module", params=["dev", "schnell"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp(kind)
    tiny.build(folder, dev=kind == "dev")
    return folder


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline(folder):
    return quiet(FluxPipeline.from_pretrained(folder))


def prompted(folder, cache, **settings):
    info = denoisers.inspect(folder, SIZE)
    return loaded(info, prompts=encode_prompts(info, CLASSES, TEMPLATES, cache), **settings)


@pytest.fixture(scope="module")
def denoiser(folder, tmp_path_factory):
    return prompted(folder, tmp_path_factory.mktemp("cache"))


def asked(order, guidance, kind, output_type="latent"):
    """The pipeline's arguments for the same images."""
    return {
        "prompt": [PROMPTS[label] for label in order.images["label"]],
        "guidance_scale": guidance,
        "num_inference_steps": STEPS,
        "max_sequence_length": TOKENS[kind],
        "height": SIZE,
        "width": SIZE,
        "output_type": output_type,
    }


def scale_of(kind):
    return 3.5 if kind == "dev" else 1.0


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_latents_and_images_equal_the_pipelines(pipeline, denoiser, kind, batch_size):
    scale = scale_of(kind)
    order, x = orders(batch_size, classes=3, guidance=scale), noise(batch_size, 4, SIDE, SIDE)
    ours = sampler(denoiser, pipeline.scheduler, STEPS).sample(x, order)
    packed = flux.pack(x)
    theirs = pipeline(latents=packed, **asked(order, scale, kind)).images
    assert_same_latents(ours, flux.unpack(theirs, SIDE, SIDE))
    if batch_size == 2:
        images = pipeline(latents=packed, **asked(order, scale, kind, "np")).images
        assert_same_images(denoiser.decode(ours), images)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_images_that_enter_part_way_equal_the_image_to_image_pipelines(pipeline, denoiser, kind, batch_size):
    scale = scale_of(kind)
    order, clean = orders(batch_size, classes=3, start=3, guidance=scale), noise(batch_size, 4, SIDE, SIDE, seed=6)
    ours = sampler(denoiser, pipeline.scheduler, STEPS)
    signal, dark = ours.schedule.signal[3], ours.schedule.noise[3]
    x = float(signal) * clean + float(dark) * noise(batch_size, 4, SIDE, SIDE)
    from_image = quiet(FluxImg2ImgPipeline(**pipeline.components))
    generator = torch.Generator().manual_seed(5)
    theirs = from_image(image=clean, strength=0.5, generator=generator, **asked(order, scale, kind)).images
    assert_same_latents(ours.sample(x, order), flux.unpack(theirs, SIDE, SIDE))


def test_the_embedded_scale_is_each_images_own(pipeline, denoiser, kind):
    order, x = orders(2, classes=1), noise(1, 4, SIDE, SIDE).expand(2, -1, -1, -1)
    order.images["guidance"] = [1.0, 5.0]
    ours = sampler(denoiser, pipeline.scheduler, STEPS)
    if kind == "schnell":
        with pytest.raises(ModelError, match="guidance"):
            ours.sample(x, order)
        return
    made = ours.sample(x, order)
    for i, scale in enumerate((1.0, 5.0)):
        theirs = pipeline(latents=flux.pack(x[:1]), **asked(orders(1, classes=1), scale, kind)).images
        assert_same_latents(made[i : i + 1], flux.unpack(theirs, SIDE, SIDE))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_true_guidance_beside_the_embedded_one_equals_the_pipelines(pipeline, folder, kind, tmp_path, batch_size):
    """Away from the negative prompt, with a fixed scale as the network's input."""
    if kind == "schnell":
        with pytest.raises(ModelError, match="takes no scale as an input"):
            solver_settings(parse(f"model: {{path: {folder}, embedded_guidance: 2}}"), denoisers.inspect(folder, SIZE))
        return
    info = denoisers.inspect(folder, SIZE)
    prompts = encode_prompts(info, CLASSES, TEMPLATES, tmp_path, negative="blurry")
    denoiser = loaded(info, prompts=prompts, embedded_guidance=3.5)
    assert denoiser.guidance == "cfg"
    order, x = orders(batch_size, classes=3, guidance=4.0), noise(batch_size, 4, SIDE, SIDE)
    ours = sampler(denoiser, pipeline.scheduler, STEPS)
    more = {"negative_prompt": ["blurry"] * batch_size, "true_cfg_scale": 4.0}
    theirs = pipeline(latents=flux.pack(x), **asked(order, 3.5, kind) | more).images
    assert_same_latents(ours.sample(x, order), flux.unpack(theirs, SIDE, SIDE))
    order.images["guidance"] = 1.0
    theirs = pipeline(latents=flux.pack(x), **asked(order, 3.5, kind)).images
    assert_same_latents(ours.sample(x, order), flux.unpack(theirs, SIDE, SIDE))


def test_encoded_prompts_equal_the_pipelines(pipeline, folder, kind, tmp_path):
    info = denoisers.inspect(folder, SIZE)
    ours = load_file(encode_prompts(info, CLASSES, TEMPLATES, tmp_path, negative="blurry"))
    with torch.no_grad():
        tokens, pooled, _ = pipeline.encode_prompt(PROMPTS, max_sequence_length=TOKENS[kind])
    torch.testing.assert_close(ours["tokens"][:, 0], tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours["pooled"][:, 0], pooled, atol=1e-5, rtol=1e-5)


def test_timing_gives_the_noise_levels_that_the_pipeline_runs_through(pipeline, denoiser, kind):
    pipeline(latents=flux.pack(noise(1, 4, SIDE, SIDE)), **asked(orders(1, classes=1), 1.0, kind))
    timing = flux.timing(denoiser.info, pipeline.scheduler, STEPS)
    assert ("mu" in timing) == pipeline.scheduler.config.use_dynamic_shifting == (kind == "dev")
    ours = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    ours.set_timesteps(STEPS, **timing)
    assert torch.equal(ours.sigmas, pipeline.scheduler.sigmas)
    assert flux.timing(denoiser.info, FlowMatchHeunDiscreteScheduler(), STEPS) is None


def test_packing_is_the_pipelines_and_unpacking_undoes_it(pipeline):
    x = noise(3, 4, 6, 8)
    assert torch.equal(flux.pack(x), pipeline._pack_latents(x, 3, 4, 6, 8))
    assert torch.equal(flux.unpack(flux.pack(x), 6, 8), x)


def test_positions_are_computed_once_for_each_shape_and_are_the_networks_own(pipeline, denoiser, kind, monkeypatch):
    computed = []
    rotary = denoiser.network.pos_embed.rotary
    forward = rotary.forward
    monkeypatch.setattr(rotary, "forward", lambda ids: (computed.append(len(ids)), forward(ids))[1])
    order, t = orders(1, classes=1), torch.tensor(500.0)
    conditioning = denoiser.condition(order, {}, False)
    for _ in range(2):
        for h, w in ((4, 6), (6, 4)):
            ours = denoiser(noise(1, 4, h, w), t, conditioning)
            with torch.no_grad():
                theirs = pipeline.transformer(
                    hidden_states=flux.pack(noise(1, 4, h, w)),
                    timestep=t[None] / 1000,
                    guidance=torch.ones(1) if kind == "dev" else None,
                    encoder_hidden_states=conditioning["tokens"],
                    pooled_projections=conditioning["pooled"],
                    txt_ids=torch.zeros(TOKENS[kind], 3),
                    img_ids=pipeline._prepare_latent_image_ids(1, h // 2, w // 2, "cpu", torch.float32),
                ).sample
            torch.testing.assert_close(ours, flux.unpack(theirs, h, w), atol=1e-5, rtol=1e-5)
    assert computed == [TOKENS[kind] + 6, TOKENS[kind] + 6]


def test_it_runs_in_half_precision(folder, tmp_path):
    denoiser = prompted(folder, tmp_path, dtype=torch.bfloat16)
    conditioning = denoiser.condition(orders(2, classes=3), {}, False)
    out = denoiser(noise(2, 4, SIDE, SIDE).bfloat16(), torch.tensor(500.0), conditioning)
    assert out.dtype == torch.bfloat16 and out.is_contiguous() and torch.isfinite(out).all()


def test_sizes_are_multiples_of_two_latent_cells(folder, kind):
    assert denoisers.inspect(folder).image_shape == (3, 256, 256)
    info = denoisers.inspect(folder, 24)
    assert info.image_shape == (3, 24, 24) and info.latent_shape == (4, 12, 12)
    assert info.conditioning == "prompt" and info.guidance == ("embedded" if kind == "dev" else "none")
    with pytest.raises(ModelError, match=r"multiples of 4, data\.image_size is 18.*16 or 20"):
        denoisers.inspect(folder, 18)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda folder: shutil.rmtree(folder / "vae"), "no vae/config.json"),
        (lambda folder: shutil.rmtree(folder / "tokenizer_2"), "no tokenizer in tokenizer_2"),
        (lambda folder: (folder / "text_encoder/model.safetensors").unlink(), "text_encoder.*safetensors"),
        (lambda folder: (folder / "transformer/diffusion_pytorch_model.safetensors").unlink(), "safetensors"),
        (lambda folder: edit(folder / "transformer/config.json", in_channels=24), "takes 24 channels, the vae has 4"),
    ],
)
def test_a_broken_folder_is_refused_with_what_is_wrong(folder, tmp_path, broken, said):
    copy = shutil.copytree(folder, tmp_path / "copy")
    broken(copy)
    with pytest.raises(ModelError, match=said):
        denoisers.inspect(copy, SIZE)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_prompts_and_image_files_become_images(folder, kind, tmp_path):
    looks = images_from_files(tmp_path, folder, image_size=24, guidance=(1.0, scale_of(kind)))
    assert looks.shape == (2, 3, 3, 24, 24) and looks.std() > 1
    if kind == "schnell":
        with pytest.raises(ConfigError, match="guidance"):
            images_from_files(tmp_path / "guided", folder, image_size=24, guidance=(1.0, 3.5))
