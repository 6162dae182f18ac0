"""DiT against its own pipeline, from the same latents."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from harness import assert_same_images, assert_same_latents, images_from_files, loaded, noise, orders
from tiny import dit as tiny

from streamaug.errors import MismatchError, ModelError
from streamaug.sampling import denoisers
from streamaug.sampling.sampler import Sampler

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dit")
    tiny.build(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def denoiser(folder):
    return loaded(denoisers.inspect(folder))


def latents_of(pipeline, monkeypatch, labels, guidance):
    """The pipeline's latents, which it only hands to its autoencoder, and its images."""
    seen = []
    decode = type(pipeline.vae).decode
    monkeypatch.setattr(type(pipeline.vae), "decode", lambda vae, x, **k: (seen.append(x), decode(vae, x, **k))[1])
    images = pipeline(
        labels,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(5),
        num_inference_steps=STEPS,
        output_type="np",
    ).images
    monkeypatch.undo()
    return seen[0] * pipeline.vae.config.scaling_factor, images


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_latents_and_images_equal_the_pipelines(pipeline, denoiser, monkeypatch, batch_size, guidance):
    order = orders(batch_size, classes=3, guidance=guidance)
    theirs, images = latents_of(pipeline, monkeypatch, order.images["label"].tolist(), guidance)
    ours = Sampler(denoiser, pipeline.scheduler, STEPS).sample(noise(batch_size, 4, 8, 8), order)
    assert_same_latents(ours, theirs)
    assert_same_images(denoiser.decode(ours), images)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
@torch.no_grad()
def test_images_that_enter_part_way_equal_the_loop_over_the_rest(pipeline, denoiser, batch_size, guidance):
    start, order = 3, orders(batch_size, classes=3, start=3, guidance=guidance)
    x = noise(batch_size, 4, 8, 8)
    ours = Sampler(denoiser, pipeline.scheduler, STEPS).sample(x, order)
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    labels = torch.tensor(order.images["label"])
    for t in scheduler.timesteps[start:]:
        cond, uncond = (
            pipeline.transformer(x, t.expand(batch_size), each).sample[:, :4]
            for each in (labels, torch.full_like(labels, 1000))
        )
        x = scheduler.step(uncond + guidance * (cond - uncond), t, x).prev_sample
    assert_same_latents(ours, x)


def test_the_label_and_the_null_class_are_what_the_network_is_told(denoiser):
    x, t = noise(2, 4, 8, 8), torch.tensor(500.0)
    order = orders(2, classes=2)
    guided = denoiser.condition(order, {}, True)
    assert guided["class_labels"].tolist() == [1000, 1000, 0, 1]
    same = x[:1].expand(2, -1, -1, -1)
    first, second = denoiser(same, t, denoiser.condition(order, {}, False))
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_rows_that_are_the_labels_own_embeddings_sample_what_the_labels_do(pipeline, denoiser, guidance):
    order = orders(3, classes=3, guidance=guidance)
    own, null = (denoiser.class_rows(labels)["class_embedding"] for labels in (order.images["label"], np.full(3, 1000)))
    assert own.shape == (3, 2, 16)
    rows = {"class_embedding": own, "null.class_embedding": null}
    by_rows = replace(order, images=order.images.copy())
    by_rows.images["template"] = -1
    sampler = Sampler(denoiser, pipeline.scheduler, STEPS)
    by_label = sampler.sample(noise(3, 4, 8, 8), order)
    assert torch.equal(sampler.sample(noise(3, 4, 8, 8), by_rows, rows), by_label)
    swapped = {name: value.flip(1) for name, value in rows.items()}
    assert not torch.equal(sampler.sample(noise(3, 4, 8, 8), by_rows, swapped), by_label)
    with pytest.raises(ModelError, match=r"are \[3, 16\], the transformer takes \[2, 16\]"):
        denoiser.condition(by_rows, {"class_embedding": torch.zeros(3, 3, 16)}, False)


def test_a_model_without_sigma_equals_the_pipeline(tmp_path, monkeypatch):
    pipeline = tiny.build(tmp_path, sigma=False)
    denoiser = loaded(denoisers.inspect(tmp_path))
    assert not denoiser.learned_variance
    theirs, _ = latents_of(pipeline, monkeypatch, [0, 1], 4.0)
    ours = Sampler(denoiser, pipeline.scheduler, STEPS).sample(noise(2, 4, 8, 8), orders(2, classes=2, guidance=4.0))
    assert_same_latents(ours, theirs)


def test_a_folder_saved_before_the_transformer_had_a_class_of_its_own_is_read(folder, denoiser, tmp_path):
    old = shutil.copytree(folder, tmp_path / "old")
    config = json.loads((old / "transformer/config.json").read_text())
    config |= {"_class_name": "Transformer2DModel", "num_vector_embeds": None, "caption_channels": None}
    (old / "transformer/config.json").write_text(json.dumps(config))
    before = loaded(denoisers.inspect(old))
    x, order = noise(1, 4, 8, 8), orders(1, classes=1)
    out = (each(x, torch.tensor(3.0), each.condition(order, {}, False)) for each in (before, denoiser))
    torch.testing.assert_close(*out)


def test_it_runs_in_half_precision(folder):
    denoiser = loaded(denoisers.inspect(folder), dtype=torch.bfloat16)
    x, order = noise(2, 4, 8, 8).bfloat16(), orders(2, classes=2)
    out = denoiser(x, torch.tensor(500.0), denoiser.condition(order, {}, False))
    assert out.dtype == torch.bfloat16 and out.shape == (2, 8, 8, 8)


def test_what_the_folder_says_is_known_without_its_weights(folder):
    info = denoisers.inspect(folder, image_size=64)
    assert info.image_shape == (3, 16, 16) and info.latent_shape == (4, 8, 8)
    assert info.conditioning == "class" and info.guidance == "cfg"
    assert info.null_class == 1000 and info.num_classes == 1001


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda folder: shutil.rmtree(folder / "vae"), "no vae/config.json"),
        (lambda folder: (folder / "transformer/diffusion_pytorch_model.safetensors").unlink(), "safetensors"),
        (lambda folder: edit(folder / "transformer/config.json", sample_size="large"), "sample_size 'large'"),
        (lambda folder: edit(folder / "transformer/config.json", in_channels=5), "takes 5 channels"),
    ],
)
def test_a_broken_folder_is_refused_with_what_is_wrong(folder, tmp_path, broken, said):
    copy = shutil.copytree(folder, tmp_path / "copy")
    broken(copy)
    with pytest.raises(ModelError, match=said):
        denoisers.inspect(copy)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_image_files_become_images_of_the_models_own_size(folder, tmp_path):
    looks = images_from_files(tmp_path, folder, image_size=16, guidance=(1.0, 4.0))
    assert looks.shape == (2, 3, 3, 16, 16) and looks.std() > 1
    with pytest.raises(MismatchError, match=r"data\.image_size to 16"):
        images_from_files(tmp_path / "wrong", folder, image_size=24, guidance=(1.0, 1.0))


def test_labels_choose_the_class_in_a_mixed_batch(pipeline, denoiser):
    x = noise(1, 4, 8, 8).expand(5, -1, -1, -1)
    order = orders(5, classes=5)
    order.images["label"] = [7, 0, 7, 999, 0]
    out = Sampler(denoiser, pipeline.scheduler, 2).sample(x, order)
    np.testing.assert_allclose(out[0], out[2], atol=1e-5)
    np.testing.assert_allclose(out[1], out[4], atol=1e-5)
    assert (out[0] - out[3]).abs().max() > 1e-4


def of_labels(*labels):
    order = orders(len(labels), classes=1)
    order.images["label"] = labels
    return order


def named(folder, tmp_path, id2label):
    """The model with a model_index.json that names labels."""
    shutil.copytree(folder, tmp_path / "named")
    file = tmp_path / "named" / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"id2label": id2label}))
    return denoisers.inspect(tmp_path / "named")


def test_classes_that_the_model_names_are_told_as_its_labels(folder, tmp_path, denoiser):
    id2label = {str(label): f"thing {label}" for label in range(1000)} | {
        "7": "tabby, tabby cat",
        "3": "Golden Retriever",
    }
    info = denoisers.with_class_ids(named(folder, tmp_path, id2label), ["golden_retriever", "tabby cat"])
    assert info.class_ids == (3, 7)
    by_name, by_number = loaded(info), denoiser
    assert by_name.condition(of_labels(1, 0), {}, False)["class_labels"].tolist() == [7, 3]
    told = by_number.condition(of_labels(7, 3), {}, True)["class_labels"]
    assert torch.equal(by_name.condition(of_labels(1, 0), {}, True)["class_labels"], told)
    rows = by_name.class_rows(np.array([1, 0]))["class_embedding"]
    assert torch.equal(rows, by_number.class_rows(np.array([7, 3]))["class_embedding"])


def test_classes_that_the_model_does_not_all_name_are_numbers_and_that_is_said(folder, tmp_path, caplog):
    info = named(folder, tmp_path, {"0": "tench", "1": "goldfish"})
    with caplog.at_level("WARNING", logger="streamaug"):
        assert denoisers.with_class_ids(info, ["goldfish", "whale"]).class_ids is None
    assert "whale" in caplog.text and "tench" in caplog.text


@pytest.mark.parametrize("id2label", [None, {}, {"0": "a", "2": "c"}, ["a"]])
def test_labels_without_names_are_numbers(folder, tmp_path, id2label):
    info = named(folder, tmp_path, id2label)
    assert info.label_names == () and denoisers.with_class_ids(info, ["a"]).class_ids is None


@pytest.mark.parametrize("guided", [False, True])
def test_mixed_labels_are_told_as_both_classes_mixed(guided, folder):
    denoiser = loaded(denoisers.inspect(folder), null_class=4)
    order = orders(3, classes=1)
    images = order.images
    images["label"], images["label_b"], images["label_mix"] = [0, 1, 2], [1, 1, 0], [0.25, 0.0, 1.0]
    told = denoiser.condition(order, {}, guided)["class_embedding"]
    of = denoiser.class_rows(np.arange(5))["class_embedding"]
    expected = torch.stack([0.75 * of[0] + 0.25 * of[1], of[1], of[0]])
    torch.testing.assert_close(told, torch.cat([of[[4, 4, 4]], expected]) if guided else expected)
