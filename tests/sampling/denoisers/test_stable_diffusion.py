"""Stable Diffusion and its distilled kin against their own diffusers pipelines, from the same latents."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from harness import images_from_files
from prompted import (
    CPU,
    NEGATIVE,
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
from tiny.stable_diffusion import SCHEDULE, build, tiny_autoencoder

from streamaug import config, engine
from streamaug.errors import ModelError
from streamaug.preparation import prepare
from streamaug.sampling.conditioning import encode_prompts
from streamaug.sampling.denoisers import LoadSettings, inspect, load
from streamaug.sampling.denoisers.stable_diffusion import guidance_embedding
from streamaug.sampling.sampler import Sampler

STEPS = 5
V_PREDICTION = DDIMScheduler(
    **SCHEDULE, clip_sample=False, steps_offset=1, prediction_type="v_prediction", rescale_betas_zero_snr=True
)


def opened(cls, folder, **components):
    pipeline = cls.from_pretrained(folder, **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder and pipeline of an epsilon model, a v model and one that is told the guidance scale."""
    made = {}
    for name, settings in {
        "epsilon": {},
        "v": {"scheduler": V_PREDICTION},
        "lcm": {
            "scheduler": LCMScheduler(**SCHEDULE),
            "pipeline": "LatentConsistencyModelPipeline",
            "time_cond_proj_dim": 32,
        },
    }.items():
        folder = tmp_path_factory.mktemp(name)
        build(folder, **settings)
        cls = LatentConsistencyModelPipeline if name == "lcm" else StableDiffusionPipeline
        made[name] = SimpleNamespace(folder=folder, pipeline=opened(cls, folder))
    return made


@pytest.fixture
def broken(models, tmp_path):
    """A copy of the epsilon model to break."""
    shutil.copytree(models["epsilon"].folder, tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def theirs(pipeline, order, latents, **call):
    guidance = float(order.images["guidance"][0])
    call = {"output_type": "latent", "negative_prompt": [NEGATIVE] * len(order)} | call
    return pipeline(texts_of(order), guidance_scale=guidance, latents=latents, num_inference_steps=STEPS, **call).images


@pytest.mark.parametrize("model", ["epsilon", "v"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_latents_equal_the_pipelines(models, model, batch_size, guidance):
    folder, pipeline = models[model].folder, models[model].pipeline
    order, x = orders(batch_size, guidance=guidance), noise((batch_size, 4, 16, 16))
    ours = sampler(folder, STEPS).sample(x, order)
    assert deviation(ours, theirs(pipeline, order, x)) <= 1e-4


def test_an_old_schedulers_settings_are_corrected_as_the_pipeline_does(broken):
    rewrite(broken, "scheduler/scheduler_config.json", steps_offset=0, clip_sample=True)
    with pytest.warns(FutureWarning, match="steps_offset"):
        pipeline = opened(StableDiffusionPipeline, broken)
    order, x = orders(2), noise((2, 4, 16, 16))
    assert deviation(sampler(broken, STEPS).sample(x, order), theirs(pipeline, order, x)) <= 1e-4


def test_the_scheduler_is_of_the_class_that_the_pipelines_index_names(broken):
    index = json.loads((broken / "model_index.json").read_text())
    rewrite(broken, "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    pipeline = opened(StableDiffusionPipeline, broken)
    order, x = orders(2), noise((2, 4, 16, 16))
    engine = sampler(broken, STEPS)
    assert type(engine.scheduler) is type(pipeline.scheduler) is EulerDiscreteScheduler
    assert deviation(engine.sample(x * engine.schedule.initial_noise, order), theirs(pipeline, order, x)) <= 1e-4
    digest = inspect(broken).digest
    rewrite(broken, "model_index.json", scheduler=index["scheduler"])
    assert inspect(broken).digest != digest


@pytest.mark.parametrize("eta", [None, 0.4])
def test_a_step_is_given_the_pipelines_eta_or_the_configured_one(models, monkeypatch, eta):
    """TCD's step draws noise unless it is told otherwise, and the pipeline tells it."""
    folder = models["epsilon"].folder
    data = "data: {source: folder, root: images, image_size: 32, channels: 3}"
    model = f"model: {{path: {folder}, scheduler: tcd, eta: {json.dumps(eta)}}}"
    scheduler, options, _ = engine.solver_settings(config.parse(f"{data}\n{model}\n"), inspect(folder))
    pipeline = opened(StableDiffusionPipeline, folder, scheduler=scheduler)
    order, x = orders(2, guidance=4.0), noise((2, 4, 16, 16))
    ours = Sampler(adapter(folder), scheduler, STEPS, options=options).sample(x, order)
    give_our_noise(monkeypatch, scheduler, order)
    assert deviation(ours, theirs(pipeline, order, x, **({} if eta is None else {"eta": eta}))) <= 1e-4


def test_guidance_and_prompt_move_the_image_far_beyond_the_tolerance(models):
    engine, x = sampler(models["epsilon"].folder, STEPS), noise((3, 4, 16, 16))
    plain = engine.sample(x, orders(3))
    assert deviation(engine.sample(x, orders(3, guidance=4.0)), plain) > 0.01
    assert deviation(engine.sample(x, orders(3, template=1)), plain) > 0.01


def test_every_image_has_its_own_guidance(models):
    order, x = orders(3, guidance=[1.5, 3.0, 7.0]), noise((3, 4, 16, 16))
    ours = sampler(models["epsilon"].folder, STEPS).sample(x, order)
    for i in range(3):
        one = SimpleNamespace(images=order.images[i : i + 1])
        alone = (
            models["epsilon"]
            .pipeline(
                texts_of(one),
                negative_prompt=[NEGATIVE],
                guidance_scale=float(order.images["guidance"][i]),
                latents=x[i : i + 1],
                num_inference_steps=STEPS,
                output_type="latent",
            )
            .images
        )
        assert deviation(ours[i : i + 1], alone) <= 1e-4


@pytest.mark.parametrize("model", ["epsilon", "v"])
@pytest.mark.parametrize(("batch_size", "guidance"), [(1, 1.0), (2, 4.0), (5, 4.0)])
def test_partial_depth_equals_the_image_to_image_pipeline(models, model, batch_size, guidance):
    folder = models[model].folder
    pipeline = opened(StableDiffusionImg2ImgPipeline, folder)
    order = orders(batch_size, start=2, guidance=guidance)
    clean = noise((batch_size, 4, 16, 16), seed=7)
    engine = sampler(folder, STEPS)
    schedule = engine.schedule
    noised = schedule.signal[2] * clean + schedule.noise[2] * noise(clean.shape)
    expected = pipeline(
        texts_of(order),
        image=clean,
        strength=0.6,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        negative_prompt=[NEGATIVE] * batch_size,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).images
    assert deviation(engine.sample(noised.float(), order), expected) <= 1e-4


def test_images_equal_the_pipelines(models):
    order, x = orders(2, guidance=4.0), noise((2, 4, 16, 16))
    engine = sampler(models["epsilon"].folder, STEPS)
    images = engine.denoiser.decode(engine.sample(x, order))
    assert images.shape == (2, 3, 32, 32)
    expected = theirs(models["epsilon"].pipeline, order, x, output_type="pt")
    assert ((images / 2 + 0.5).clamp(0, 1) - expected).abs().max() <= 1 / 255


def test_a_tiny_autoencoder_decodes_what_the_pipeline_with_it_does(models, tmp_path):
    tiny_autoencoder(tmp_path / "tiny")
    order, x = orders(2), noise((2, 4, 16, 16))
    engine = sampler(models["epsilon"].folder, STEPS, tiny_vae=tmp_path / "tiny")
    images = engine.denoiser.decode(engine.sample(x, order))
    vae = AutoencoderTiny.from_pretrained(tmp_path / "tiny")
    pipeline = opened(StableDiffusionPipeline, models["epsilon"].folder, vae=vae)
    expected = theirs(pipeline, order, x, output_type="pt")
    assert ((images / 2 + 0.5).clamp(0, 1) - expected).abs().max() <= 1 / 255
    with_kl = sampler(models["epsilon"].folder, STEPS).sample(x, order)
    torch.testing.assert_close(engine.sample(x, order), with_kl)


def test_a_tiny_autoencoder_of_another_kind_is_refused(models, tmp_path):
    folder = models["epsilon"].folder

    def refused(tiny):
        with pytest.raises(ModelError) as caught:
            adapter(folder, tiny_vae=tiny)
        return str(caught.value)

    assert "expected an AutoencoderTiny" in refused(folder / "vae")
    assert "no such folder" in refused(tmp_path / "none")
    tiny_autoencoder(tmp_path / "tiny")
    rewrite(tmp_path / "tiny", "config.json", latent_channels=16)
    assert "16 latent channels" in refused(tmp_path / "tiny")
    rewrite(tmp_path / "tiny", "config.json", latent_channels=4)
    (tmp_path / "tiny" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut short")
    assert "model.tiny_vae" in refused(tmp_path / "tiny")


def test_prompts_are_encoded_as_the_pipeline_does(models):
    texts = ["a photo of a cat", "", "Übergröße: two DOGS!"]
    ours = encoded(models["epsilon"].folder, texts)["tokens"]
    expected, negative = models["epsilon"].pipeline.encode_prompt(texts, CPU, 1, True, [NEGATIVE] * 3)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoded(models["epsilon"].folder, [NEGATIVE])["tokens"], negative[:1])


def test_inverted_embeddings_of_any_length_take_the_prompts_place(models):
    order, x = orders(2, guidance=3.0, template=-1), noise((2, 4, 16, 16))
    rows = {"tokens": noise((2, 5, 32), seed=1), "null.tokens": noise((2, 5, 32), seed=2)}
    ours = sampler(models["epsilon"].folder, STEPS).sample(x, order, rows)
    expected = (
        models["epsilon"]
        .pipeline(
            prompt_embeds=rows["tokens"],
            negative_prompt_embeds=rows["null.tokens"],
            guidance_scale=3.0,
            latents=x,
            num_inference_steps=STEPS,
            output_type="latent",
        )
        .images
    )
    assert deviation(ours, expected) <= 1e-4


def test_embeddings_that_are_not_there_or_another_models_are_refused(models):
    engine, x = sampler(models["epsilon"].folder, STEPS), noise((1, 4, 16, 16))
    with pytest.raises(ModelError, match="the bank has none"):
        engine.sample(x, orders(1, template=-1), {})
    with pytest.raises(ModelError, match="8 values a token, the unet takes 32"):
        engine.sample(x, orders(1, template=-1), {"tokens": torch.zeros(1, 5, 8)})
    with pytest.raises(ModelError, match="conditioned on tokens, the bank's inverted embeddings have only image"):
        engine.sample(x, orders(1, template=-1), {"image": torch.zeros(1, 5, 8)})
    unprompted = load(inspect(models["epsilon"].folder), LoadSettings(CPU))
    with pytest.raises(ModelError, match="none were encoded"):
        Sampler(unprompted, V_PREDICTION, STEPS).sample(x, orders(1))


@pytest.mark.parametrize("vectors", [1, 3])
def test_class_tokens_are_read_as_the_pipeline_does(models, tmp_path, vectors):
    embedding = noise((vectors, 32), seed=3)
    save_file({"<my-cat>": embedding if vectors > 1 else embedding[0]}, tmp_path / "learned_embeds.safetensors")
    texts = ["a photo of a <my-cat>, not <my-cats", "a cat"]
    ours = encoded(models["epsilon"].folder, texts, class_tokens=[tmp_path / "learned_embeds.safetensors"])["tokens"]
    pipeline = opened(StableDiffusionPipeline, models["epsilon"].folder)
    pipeline.load_textual_inversion(tmp_path, weight_name="learned_embeds.safetensors")
    expected, _ = pipeline.encode_prompt(texts, CPU, 1, False)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    plain = encoded(models["epsilon"].folder, texts)["tokens"]
    torch.testing.assert_close(ours[1], plain[1])
    assert (ours[0] - plain[0]).abs().max() > 0.1


def test_class_tokens_that_cannot_be_used_are_refused(models, tmp_path):
    def refused(*files):
        with pytest.raises(ModelError) as caught:
            encoded(models["epsilon"].folder, ["a cat"], class_tokens=files)
        return str(caught.value)

    def saved(name, **tensors):
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    token = saved("a.safetensors", sks=torch.zeros(2, 32))
    assert "takes [vectors, 32]" in refused(saved("wide.safetensors", sks=torch.zeros(2, 8)))
    assert "given twice" in refused(token, token)
    assert "already a token" in refused(saved("known.safetensors", a=torch.zeros(1, 32)))
    assert "expected one tensor" in refused(saved("two.safetensors", a=torch.zeros(1, 32), b=torch.zeros(1, 32)))
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x02}q\x00.")
    assert "cannot be read as safetensors" in refused(tmp_path / "pickle.safetensors")
    assert "cannot be read as safetensors" in refused(tmp_path / "none.safetensors")


def test_an_embedding_without_a_tokens_name_is_called_by_its_file(models, tmp_path):
    save_file({"emb_params": noise((2, 32), seed=3)}, tmp_path / "sks.safetensors")
    save_file({"sks": noise((2, 32), seed=3)}, tmp_path / "named.safetensors")
    folder = models["epsilon"].folder
    one, other = (
        encoded(folder, ["a sks"], class_tokens=[tmp_path / name])["tokens"]
        for name in ("sks.safetensors", "named.safetensors")
    )
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("width", [32, 33])
def test_the_guidance_embedding_is_the_pipelines(models, width):
    scales = torch.tensor([1.0, 1.3, 8.5])
    expected = models["lcm"].pipeline.get_guidance_scale_embedding(scales - 1, embedding_dim=width)
    torch.testing.assert_close(guidance_embedding(scales, width), expected, atol=1e-4, rtol=0)


def test_a_fixed_embedded_scale_leaves_guidance_to_the_negative_prompt(models):
    denoiser = adapter(models["lcm"].folder, embedded_guidance=8.0)
    assert denoiser.guidance == "cfg"
    order = orders(2, guidance=3.0)
    told = denoiser.condition(order, {}, True)
    torch.testing.assert_close(told["timestep_cond"], guidance_embedding(torch.full((4,), 8.0), 32))
    torch.testing.assert_close(told["tokens"][:2], denoiser.prompts.null["tokens"].expand(2, -1, -1))
    assert torch.equal(denoiser.condition(order, {}, False)["timestep_cond"], told["timestep_cond"][:2])


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("guidance", [1.0, 8.5])
def test_a_model_told_the_guidance_equals_its_pipeline(models, batch_size, guidance):
    folder = models["lcm"].folder
    order, x = orders(batch_size, guidance=guidance), noise((batch_size, 4, 16, 16))
    denoiser = adapter(folder)
    assert denoiser.guidance == "embedded"
    ddim = models["epsilon"].pipeline.scheduler
    expected = theirs(opened(StableDiffusionPipeline, folder, scheduler=ddim), order, x)
    assert deviation(Sampler(denoiser, ddim, STEPS).sample(x, order), expected) <= 1e-4


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("guidance", [1.0, 8.5])
def test_a_latent_consistency_model_equals_its_pipeline_given_our_noise(models, monkeypatch, batch_size, guidance):
    pipeline = models["lcm"].pipeline
    order, x = orders(batch_size, guidance=guidance), noise((batch_size, 4, 16, 16))
    ours = sampler(models["lcm"].folder, 4).sample(x, order)
    give_our_noise(monkeypatch, pipeline.scheduler, order)
    expected = pipeline(
        texts_of(order), guidance_scale=guidance, latents=x, num_inference_steps=4, output_type="latent"
    ).images
    assert deviation(ours, expected) <= 1e-4


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@torch.no_grad()
def test_a_latent_consistency_model_equals_its_scheduler_from_partial_depth(models, monkeypatch, batch_size):
    # Its image-to-image pipeline spreads all steps over the depth, so the loop is written out here.
    pipeline = models["lcm"].pipeline
    order, x = orders(batch_size, start=1, guidance=8.5), noise((batch_size, 4, 16, 16))
    ours = sampler(models["lcm"].folder, 4).sample(x, order)
    give_our_noise(monkeypatch, pipeline.scheduler, order)
    tokens, _ = pipeline.encode_prompt(texts_of(order), CPU, 1, False)
    scale = pipeline.get_guidance_scale_embedding(torch.full((batch_size,), 7.5), embedding_dim=32)
    pipeline.scheduler.set_timesteps(4)
    pipeline.scheduler.set_begin_index(1)
    for t in pipeline.scheduler.timesteps[1:]:
        out = pipeline.unet(x, t, encoder_hidden_states=tokens, timestep_cond=scale).sample
        x = pipeline.scheduler.step(out, t, x).prev_sample
    assert deviation(ours, x) <= 1e-4


@pytest.mark.parametrize("steps", [1, 2])
def test_a_turbo_model_equals_its_pipeline_in_few_steps(models, steps):
    scheduler = EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing", steps_offset=1)
    pipeline = opened(StableDiffusionPipeline, models["epsilon"].folder, scheduler=scheduler)
    order, x = orders(2), noise((2, 4, 16, 16))
    engine = Sampler(adapter(models["epsilon"].folder), scheduler, steps)
    # A pipeline scales the latents that it is given, also where that is by the schedule's first noise.
    expected = pipeline(
        texts_of(order), guidance_scale=0.0, latents=x, num_inference_steps=steps, output_type="latent"
    ).images
    assert deviation(engine.sample(x * engine.schedule.initial_noise, order), expected) <= 1e-4


@pytest.mark.parametrize("model", ["epsilon", "v", "lcm"])
def test_image_files_become_images(models, model, tmp_path):
    made = images_from_files(tmp_path, models[model].folder, image_size=40, guidance=(1.0, 6.0))
    assert made.shape == (2, 3, 3, 40, 40)


def test_class_tokens_wordings_and_a_tiny_autoencoder_are_set_in_the_configuration(models, tmp_path):
    images_from_files(tmp_path, models["epsilon"].folder, image_size=32, guidance=(1.0, 1.0))
    tiny_autoencoder(tmp_path / "tiny")
    save_file({"sks": noise((2, 32))}, tmp_path / "sks.safetensors")
    text = f"""
cache: {tmp_path / "cache"}
data: {{source: folder, root: {tmp_path / "images"}, image_size: 32, channels: 3, holdout: 0, validation: 0}}
model:
  path: {models["epsilon"].folder}
  device: cpu
  steps: 3
  compile: false
  prompts: ["a {{}}", "a sks {{}}"]
  class_tokens: [{tmp_path / "sks.safetensors"}]
  tiny_vae: {tmp_path / "tiny"}
recipes: [{{kind: noise, guidance: [2, 4]}}]
judge: {{enabled: false}}
stream: {{batch_size: 4}}
"""
    prepared = prepare(config.parse(text))
    expected = encoded(models["epsilon"].folder, ["a sks cat"], class_tokens=[tmp_path / "sks.safetensors"])["tokens"]
    torch.testing.assert_close(load_file(prepared.prompts)["tokens"][0, 1], expected[0])
    built = engine.build(prepared.engine_options)
    assert built.sampler.denoiser.vae.tiny
    pixels, _, reasons = built.look(prepared.planner.batch(0, prepared.planner.uniform()))
    assert pixels.shape == (4, 3, 32, 32) and not reasons.any()


def test_sizes_are_the_models_own_or_those_asked_for(models):
    native = inspect(models["epsilon"].folder)
    assert (native.image_shape, native.latent_shape) == ((3, 32, 32), (4, 16, 16))
    assert (native.family, native.conditioning, native.guidance) == ("StableDiffusion", "prompt", "cfg")
    assert inspect(models["lcm"].folder).guidance == "embedded"
    larger = inspect(models["epsilon"].folder, 48)
    assert (larger.image_shape, larger.latent_shape) == ((3, 48, 48), (4, 24, 24))
    with pytest.raises(ModelError, match=r"multiples of 2, data\.image_size is 33; the nearest that works: 32 or 34"):
        inspect(models["epsilon"].folder, 33)


def test_another_size_equals_the_pipeline_at_that_size(models):
    info = inspect(models["epsilon"].folder, 40)
    prompts = adapter(models["epsilon"].folder).settings.prompts
    denoiser = load(info, LoadSettings(CPU, prompts=prompts))
    order, x = orders(2, guidance=4.0), noise((2, *info.latent_shape))
    ours = Sampler(denoiser, models["epsilon"].pipeline.scheduler, STEPS).sample(x, order)
    assert deviation(ours, theirs(models["epsilon"].pipeline, order, x, height=40, width=40)) <= 1e-4


@pytest.mark.parametrize(
    ("name", "values", "part"),
    [
        ("unet/config.json", {"in_channels": 9}, "9 input channels: an inpainting UNet"),
        ("unet/config.json", {"in_channels": 8}, "a UNet that takes an image to edit"),
        ("unet/config.json", {"in_channels": 3}, "3 input channels; accepted is one with the autoencoder's 4"),
        ("unet/config.json", {"out_channels": 8}, "predicts 8"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "it belongs to another pipeline"),
        ("model_index.json", {"_class_name": "StableDiffusionInpaintPipeline"}, "an inpainting UNet"),
        ("model_index.json", {"_class_name": "StableDiffusionDepth2ImgPipeline"}, "takes a depth map"),
        ("model_index.json", {"_class_name": "StableDiffusionPipelin"}, "did you mean 'StableDiffusionPipeline'?"),
        ("model_index.json", {"_class_name": ["pipeline", "MyPipeline"]}, "code of its own"),
        ("model_index.json", {"unet": ["my_unet", "MyUNet"]}, "unet is a MyUNet of my_unet: code of its own"),
        ("model_index.json", {"scheduler": ["my_scheduler", "MyScheduler"]}, "code of its own"),
    ],
)
def test_a_model_of_another_kind_is_refused_with_the_reason(broken, name, values, part):
    rewrite(broken, name, **values)
    with pytest.raises(ModelError) as caught:
        inspect(broken)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("missing", "part"),
    [
        ("unet", "unet/config.json"),
        ("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"),
        ("text_encoder/model.safetensors", "no text_encoder/model.safetensors"),
        ("tokenizer", "no tokenizer in tokenizer"),
    ],
)
def test_a_missing_part_is_named(broken, missing, part):
    if (broken / missing).is_dir():
        shutil.rmtree(broken / missing)
    else:
        (broken / missing).unlink()
    with pytest.raises(ModelError) as caught:
        inspect(broken)
    assert part in str(caught.value)


def test_weights_that_are_pickled_alone_are_refused(broken):
    for component, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")):
        (weights,) = (broken / component).glob("*.safetensors")
        weights.rename(broken / component / f"{stem}.bin")
        with pytest.raises(ModelError, match=rf"{stem}\.bin is not read: it is pickled.*safe_serialization=True"):
            inspect(broken)
        (broken / component / f"{stem}.bin").rename(weights)


def test_a_text_encoder_that_gives_nan_is_refused(broken, tmp_path):
    weights = broken / "text_encoder" / "model.safetensors"
    save_file({name: value * torch.nan for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(ModelError, match="the prompt of class 'cat' is encoded as NaN or infinity"):
        encode_prompts(inspect(broken), ["cat"], ["a {}"], tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_weights_of_a_text_encoder_that_do_not_fit_are_refused(broken):
    rewrite(broken, "text_encoder/config.json", num_hidden_layers=5)
    with pytest.raises(ModelError, match="text_encoder lacks weights"):
        encoded(broken, ["a cat"])
    (broken / "text_encoder" / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ModelError, match="weights of text_encoder cannot be loaded"):
        encoded(broken, ["a cat"])
    rewrite(broken, "model_index.json", text_encoder=["custom", "MyEncoder"])
    with pytest.raises(ModelError, match="text_encoder is a MyEncoder; supported: CLIPTextModel"):
        encoded(broken, ["a cat"])
