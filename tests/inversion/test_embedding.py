"""Diffusion Inversion: what is fitted denoises its image better, resumes to the bit, and images made from it are near.

The model is a small class-conditional prior trained here on real digits.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from sampling.denoisers.tiny import deepfloyd_if, dit, flux, sd3, sdxl, stable_diffusion, unet2d

from streamaug.bank import BankPlan, BankWriter, Checkpoint
from streamaug.config import DataConfig, PriorConfig, TrainConfig, parse
from streamaug.data import load_splits
from streamaug.errors import ConfigError, MemoryTooSmall, ModelError
from streamaug.inversion.embedding import Embedding, Group, fit, trained_levels
from streamaug.orders import ORDER_DTYPE, OrderBatch
from streamaug.prior import train_prior
from streamaug.sampling import denoisers
from streamaug.sampling.conditioning import encode_prompts
from streamaug.sampling.denoisers import LoadSettings
from streamaug.sampling.latents import row_conditioning
from streamaug.sampling.residence import Rows
from streamaug.sampling.sampler import Sampler
from streamaug.training.classifiers import build_classifier
from streamaug.training.trainer import train

CPU = torch.device("cpu")
PROMPTED = {
    "Stable Diffusion": (stable_diffusion.build, {"tokens": (5, 32)}),
    "SDXL": (sdxl.build, {"tokens": (5, 80), "pooled": (24,)}),
    "Stable Diffusion 3": (sd3.build, {"tokens": (5, None), "pooled": (None,)}),
    "Flux": (flux.build, {"tokens": (5, 32), "pooled": (8,)}),
    "DeepFloyd IF": (deepfloyd_if.build, {"tokens": (5, 16)}),
}


class Kept(Checkpoint):
    """A checkpoint in memory. stop_at: the saving after which the work is interrupted."""

    def __init__(self, stop_at=None):
        super().__init__(None)
        self.held, self.savings, self.stop_at = None, 0, stop_at

    def load(self):
        return self.held

    def save(self, tensors):
        self.held = {name: tensor.clone() for name, tensor in tensors.items()}
        self.savings += 1
        if self.savings == self.stop_at:
            raise InterruptedError


@pytest.fixture(scope="module")
def digits():
    return load_splits(DataConfig(), 0).unlabelled


@pytest.fixture(scope="module")
def prior(digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("prior") / "prior"
    config = PriorConfig(labels=True, steps=250, batch_size=32, channels=[16, 32])
    return train_prior(digits, config, path, labels=digits.labels, num_classes=10)


def method(path, dtype="float32", prompts=None, size=None, **settings):
    listed = ", ".join(f"{name}: {value}" for name, value in settings.items())
    text = (
        f"model: {{path: {path}, device: cpu}}\nbank: {{methods: [embedding], dtype: {dtype}, embedding: {{{listed}}}}}"
    )
    return Embedding(denoisers.inspect(path, size), parse(text), prompts)


def computed(digits, path, count=6, rows=None, checkpoint=None, **settings):
    rows = np.arange(count) if rows is None else np.asarray(rows)
    made = method(path, **settings)
    return made.compute(digits.images[rows], digits.labels[rows], rows, checkpoint or Kept())


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def standard_errors(gains):
    return float(gains.mean() / gains.std() * math.sqrt(len(gains)))


@pytest.fixture(scope="module")
def fitted(digits, prior):
    """32 images, 150 visits each."""
    return computed(digits, prior, 32, visits=150)


def test_a_row_denoises_its_image_better_than_the_class_does(fitted):
    loss, of_class = fitted["embedding.loss"], fitted["embedding.class_loss"]
    assert fitted["class_embedding"].shape == (32, 64)
    assert standard_errors(of_class - loss) > 3
    assert float(loss.mean()) < 0.95 * float(of_class.mean())


def test_the_stored_row_is_what_the_loss_was_measured_with(digits, prior, fitted):
    denoiser = denoisers.load(denoisers.inspect(prior), LoadSettings(CPU))
    latents = torch.from_numpy(digits.images[:32]).float() / 127.5 - 1
    group = Group(denoiser, trained_levels(denoisers.load_scheduler(prior)), latents, np.arange(32), 32)
    measured = group.measure({"class_embedding": fitted["class_embedding"]})
    torch.testing.assert_close(measured, fitted["embedding.loss"], rtol=1e-5, atol=1e-6)


def test_images_made_from_a_row_are_nearer_to_its_source_than_images_of_the_class(digits, prior, fitted):
    classifier = build_classifier("small_cnn", channels=1, image_size=8, num_classes=10)
    pixels, labels = torch.from_numpy(digits.images).float() / 255, torch.from_numpy(digits.labels)
    rng = np.random.default_rng(0)
    batches = ((pixels[at], labels[at]) for at in (rng.integers(len(pixels), size=64) for _ in range(150)))
    train(classifier, batches, TrainConfig(steps=150), seed=0)
    denoiser = denoisers.load(denoisers.inspect(prior), LoadSettings(CPU))
    sampler = Sampler(denoiser, denoisers.load_scheduler(prior), 8)
    images = np.zeros(32, ORDER_DTYPE)
    images["label"], images["guidance"] = digits.labels[:32], 1.0
    by_label = OrderBatch(0, 0, 0, 0, images)
    by_row = replace(by_label, images=images.copy())
    by_row.images["template"] = -1

    @torch.no_grad()
    def distances(order, rows, noise):
        made = sampler.sample(noise, order, rows).clamp(-1, 1) / 2 + 0.5
        features = classifier.eval().features(torch.cat([made, pixels[:32]])).flatten(1)
        return (features[:32] - features[32:]).norm(dim=1)

    gains = []
    for seed in range(3):
        noise = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        rows = {"class_embedding": fitted["class_embedding"]}
        gains.append(distances(by_label, {}, noise) - distances(by_row, rows, noise))
    gain = torch.stack(gains).mean(0)
    assert standard_errors(gain) > 3, gain.mean()


def test_it_is_adamw(prior, digits):
    """One batch a visit, so every row moves at every step, as torch's own optimizer moves them."""
    made = method(prior, visits=6, patience=0, lr=0.01, weight_decay=0.1)
    latents = torch.from_numpy(digits.images[:4]).float() / 127.5 - 1
    group = Group(made._denoiser, made._levels, latents, np.arange(4), 50)
    start = made._denoiser.class_rows(digits.labels[:4])
    ours = fit(group, start, made._settings, Kept())["class_embedding"]
    theirs = start["class_embedding"].clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    for visit in range(6):
        at, levels, noise = group.draw(visit, 0)
        optimizer.zero_grad()
        group.losses({"class_embedding": theirs[at]}, at, levels, noise).sum().backward()
        optimizer.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-5)


def test_every_visit_sees_each_image_once(prior, digits):
    made = method(prior)
    group = Group(made._denoiser, made._levels, torch.zeros(7, 1, 8, 8), np.arange(7) + 40, 3)
    assert group.batches == 3
    for visit in range(3):
        seen = torch.cat([group.draw(visit, batch)[0] for batch in range(3)])
        assert sorted(seen.tolist()) == list(range(7))
    levels = torch.cat([group.draw(visit, batch)[1] for visit in range(200) for batch in range(3)])
    shares = torch.histc(levels.float(), 10, 0, 1000) / len(levels)
    assert (shares - 0.1).abs().max() < 0.03


def test_the_same_images_give_the_same_bits_whatever_was_drawn_before(digits, prior):
    one = computed(digits, prior, visits=3)
    torch.manual_seed(7)
    np.random.seed(7)
    with torch.no_grad():
        assert_equal(one, computed(digits, prior, visits=3))


def test_padding_changes_nothing(digits, prior, monkeypatch):
    alone = computed(digits, prior, rows=[40, 41, 42], visits=3, batch_size=2)
    sizes = []
    draw = Group.draw
    monkeypatch.setattr(Group, "draw", lambda group, *at: (sizes.append(group.size), draw(group, *at))[1])
    padded = computed(digits, prior, rows=[40, 41, 42, 42, 42, 42], visits=3, batch_size=2)
    assert_equal(alone, {name: value[:3] for name, value in padded.items()})
    assert torch.equal(padded["class_embedding"][2], padded["class_embedding"][5])
    assert set(sizes) == {3}


@pytest.mark.parametrize("stop_at", [1, 2, 5])
def test_interrupted_and_resumed_it_is_the_same_to_the_bit(digits, prior, stop_at):
    settings = {"visits": 12, "batch_size": 2, "patience": 6, "checkpoint_every": 5}
    undisturbed = computed(digits, prior, **settings)
    checkpoint = Kept(stop_at)
    with pytest.raises(InterruptedError):
        computed(digits, prior, checkpoint=checkpoint, **settings)
    assert checkpoint.held["step"] == 5 * stop_at
    assert_equal(undisturbed, computed(digits, prior, checkpoint=checkpoint, **settings))


def test_a_bank_that_was_interrupted_twice_is_the_undisturbed_one(digits, prior, tmp_path, monkeypatch):
    made = method(prior, "float16", visits=6, group_rows=4, batch_size=2, patience=0, checkpoint_every=5)
    plan = BankPlan(
        labels=digits.labels[:6],
        source_hashes=digits.hashes[:6],
        source_names=digits.sources[:6],
        class_names=digits.class_names,
        meta={"image_shape": [1, 8, 8], "model": "m"},
        parts=[made.part],
    )

    def write(path):
        with BankWriter(path, plan) as writer:
            for group in writer.pending("embedding"):
                rows = group.padded
                checkpoint = writer.checkpoint("embedding", group)
                tensors = made.compute(digits.images[rows], digits.labels[rows], rows, checkpoint)
                writer.put("embedding", group, tensors)
            return writer.finish()

    whole = write(tmp_path / "whole")
    save, savings = Checkpoint.save, []

    def interrupted(checkpoint, tensors):
        save(checkpoint, tensors)
        savings.append(1)
        if len(savings) in (1, 3):
            raise InterruptedError

    monkeypatch.setattr(Checkpoint, "save", interrupted)
    for _ in range(2):
        with pytest.raises(InterruptedError):
            write(tmp_path / "interrupted")
    bank = write(tmp_path / "interrupted")
    assert bank.digest == whole.digest
    assert bank.tensors_of("embedding") == ["class_embedding"]
    assert (bank.row_array("embedding.loss") > 0).all()
    # The unconditional half is told the mean of each image's own group.
    images = np.zeros(2, ORDER_DTYPE)
    images["template"], images["row_a"], images["row_b"], images["cond_w"] = -1, [1, 5], -1, (1, 0, 0)
    order = OrderBatch(0, 0, 0, 0, images)
    rows = row_conditioning(Rows(bank, CPU), order, seed=0, kernels="torch")
    stored = bank.gather("class_embedding", np.arange(6)).float()
    torch.testing.assert_close(rows["class_embedding"], stored[[1, 5]])
    means = torch.stack([stored[:4].mean(0), stored[4:].mean(0)])
    torch.testing.assert_close(rows["null.class_embedding"], means)
    guided = made._denoiser.condition(order, rows, True)["class_embedding"]
    torch.testing.assert_close(guided, torch.cat([means, stored[[1, 5]]]))
    images["guidance"] = 2.0
    sampled = Sampler(made._denoiser, denoisers.load_scheduler(prior), 3).sample(torch.randn(2, 1, 8, 8), order, rows)
    assert torch.isfinite(sampled).all()


def test_a_plateau_ends_the_group(digits, prior, monkeypatch):
    visited = []
    draw = Group.draw
    monkeypatch.setattr(Group, "draw", lambda group, *at: (visited.append(at[0]), draw(group, *at))[1])
    computed(digits, prior, 4, visits=200, patience=9, lr=1e-6)
    assert visited[-1] + 1 < 100
    ended = len(visited)
    visited.clear()
    computed(digits, prior, 4, visits=ended + 20, patience=0, lr=1e-6)
    assert visited[-1] + 1 == ended + 20


def test_the_part_names_all_that_the_rows_depend_on(prior):
    part = method(prior, group_rows=7).part
    assert part.name == "embedding" and part.group_rows == 7 and part.dtype == "float32"
    for changed in ({"visits": 5}, {"lr": 0.5}, {"batch_size": 3}, {"patience": 1}, {"weight_decay": 0.5}):
        assert method(prior, **changed).part.meta != part.meta
    assert method(prior, checkpoint_every=3).part.meta == part.meta
    assert part.meta["network_dtype"] == "float32", "what the network computes in decides a row's bits"


def test_a_rehearsal_tells_the_time_and_the_shapes(digits, prior):
    rows = np.array([0, 1, 2, 2])
    made = method(prior, visits=10)
    seconds, tensors = made.rehearse(digits.images[rows], digits.labels[rows], rows)
    assert 0 < seconds < 100
    assert tensors["class_embedding"].shape == (3, 64) and tensors["embedding.loss"].shape == (3,)


@pytest.mark.parametrize("sigma", [True, False])
def test_a_dit_has_a_row_for_each_of_its_blocks(tmp_path, sigma):
    dit.build(tmp_path, sigma=sigma)
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), np.uint8)
    found = method(tmp_path, visits=2).compute(images, np.array([0, 3, 3]), np.arange(3), Kept())
    assert found["class_embedding"].shape == (3, 2, 16)
    assert torch.isfinite(found["class_embedding"]).all()


@pytest.mark.parametrize("family", PROMPTED)
def test_models_that_take_prompts_have_tokens_for_each_image(tmp_path, family):
    build, shapes = PROMPTED[family]
    build(tmp_path / "model")
    info = denoisers.inspect(tmp_path / "model", 32)
    prompts = encode_prompts(info, ["cat", "dog"], ["a photo of a {}"], tmp_path)
    made = method(tmp_path / "model", prompts=prompts, size=32, visits=2)
    images = np.random.default_rng(0).integers(0, 256, (2, *info.image_shape), np.uint8)
    found = made.compute(images, np.array([1, 0]), np.arange(2), Kept())
    rows = {name: value for name, value in found.items() if "." not in name}
    assert rows.keys() == shapes.keys()
    # By which shards are kept from growing, for a row may have megabytes.
    assert made.part.row_bytes == sum(value[0].numel() * made.part.torch_dtype.itemsize for value in rows.values())
    for name, value in rows.items():
        assert all(size in (None, given) for size, given in zip(shapes[name], value.shape[1:], strict=True)), (
            value.shape
        )
    told = made._denoiser.class_rows(np.array([1, 0]))
    assert (found["tokens"] != told["tokens"][:, : found["tokens"].shape[1]]).any()
    # And the same model makes images from them.
    images = np.zeros(2, ORDER_DTYPE)
    images["template"], images["guidance"] = -1, 1.0
    conditioning = made._denoiser.condition(OrderBatch(0, 0, 0, 0, images), rows, False)
    noise = torch.zeros(2, *info.latent_shape)
    assert made._denoiser(noise, torch.tensor(500.0), conditioning).shape[0] == 2


def test_the_start_keeps_the_first_and_the_last_token_of_the_prompt(tmp_path):
    stable_diffusion.build(tmp_path / "model")
    prompts = encode_prompts(denoisers.inspect(tmp_path / "model"), ["cat"], ["a {}"], tmp_path)
    made = method(tmp_path / "model", prompts=prompts, tokens=3)
    told = made._denoiser.class_rows(np.array([0]))
    torch.testing.assert_close(made._start(told)["tokens"], told["tokens"][:, [0, 38, 76]])


def test_other_wordings_than_the_first_do_not_make_the_rows_anew(tmp_path):
    stable_diffusion.build(tmp_path / "model")
    info = denoisers.inspect(tmp_path / "model")
    one, more, other = (
        method(tmp_path / "model", prompts=encode_prompts(info, ["cat"], wordings, tmp_path, negative=negative))
        for wordings, negative in ((["a {}"], ""), (["a {}", "the {}"], "blurry"), (["the {}"], ""))
    )
    assert one.part.meta == more.part.meta != other.part.meta


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_levels_are_those_of_the_schedulers_own_noising(prediction):
    scheduler = DDIMScheduler(prediction_type=prediction, beta_schedule="squaredcos_cap_v2")
    levels = trained_levels(scheduler)
    clean, noise = torch.randn(2, 1000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    t = torch.arange(1000)
    wanted = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: scheduler.get_velocity(clean, noise, t),
        "sample": lambda: clean,
    }[prediction]()
    shares = (each.view(-1, 1, 1, 1) for each in (levels.signal, levels.noise, levels.clean, levels.noisy))
    signal, noisiness, of_clean, of_noise = shares
    torch.testing.assert_close(signal * clean + noisiness * noise, scheduler.add_noise(clean, noise, t))
    torch.testing.assert_close(of_clean * clean + of_noise * noise, wanted)
    assert torch.equal(levels.timesteps, t.float())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_levels_of_flow_matching_are_the_schedulers_training_timesteps(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    levels = trained_levels(scheduler)
    torch.testing.assert_close(levels.timesteps, scheduler.timesteps.flip(0).float())
    torch.testing.assert_close(levels.noise, scheduler.sigmas[:1000].flip(0).float())
    torch.testing.assert_close(levels.signal + levels.noise, torch.ones(1000))
    assert (levels.clean == -1).all() and (levels.noisy == 1).all()


@pytest.mark.parametrize(
    "scheduler",
    [CMStochasticIterativeScheduler(), EulerDiscreteScheduler(timestep_type="continuous")],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_model_trained_in_another_way_is_refused_with_what_is_accepted(scheduler):
    with pytest.raises(ModelError, match=r"'embedding'.*(accepted are|whole timesteps)"):
        trained_levels(scheduler)


def test_a_model_that_is_told_nothing_is_refused_with_those_that_fit(tmp_path):
    unet2d.build(tmp_path)
    with pytest.raises(ConfigError, match=r"told nothing; accepted are a UNet2DModel with class.*StableDiffusion.*DiT"):
        method(tmp_path)


def test_memory_that_does_not_suffice_names_the_setting(digits, prior, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Group, "losses", full)
    with pytest.raises(MemoryTooSmall, match=r"bank\.embedding\.batch_size 6 needs more"):
        computed(digits, prior, visits=1)


def test_the_loss_is_measured_alike_for_every_row(digits, prior):
    """The same image has the same loss, wherever it stands."""
    images = digits.images[[3, 8, 3]]
    found = method(prior, visits=1, batch_size=3).compute(images, digits.labels[[3, 8, 3]], np.arange(3), Kept())
    torch.testing.assert_close(found["embedding.class_loss"][0], found["embedding.class_loss"][2], rtol=1e-5, atol=0)
