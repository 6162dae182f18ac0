"""The ddim method: what enters the sampler so that the image comes out, for every parameterization and scheduler."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from sampling.denoisers.harness import sampler
from sampling.denoisers.tiny import dit, sd3, stable_diffusion, unet2d

from streamaug.bank import Checkpoint
from streamaug.config import BankConfig, Config, DataConfig, PriorConfig
from streamaug.data import ImageSet, load_splits
from streamaug.engine import solver_settings
from streamaug.errors import ConfigError
from streamaug.inversion import ddim
from streamaug.inversion.ddim import Ddim, Steps, run_backwards, run_forwards, steps_of
from streamaug.inversion.encode import Codec, relative_error
from streamaug.orders import ORDER_DTYPE, OrderBatch
from streamaug.prior import train_prior
from streamaug.sampling.conditioning import encode_prompts
from streamaug.sampling.denoisers import LoadSettings, ModelInfo, inspect, load
from streamaug.sampling.solvers.driver import schedule_of
from streamaug.sampling.solvers.schedulers import configured, make_scheduler
from streamaug.sampling.solvers.table import solver_for

CPU = torch.device("cpu")
COUNT = 6
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def images(seed: int = 0) -> torch.Tensor:
    return torch.rand((COUNT, 3, 4, 4), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def clean_of(x: torch.Tensor, signal: float, noise: float) -> torch.Tensor:
    """A smooth denoiser: the clean image that x = signal·image + noise·ξ is taken for; neighbours matter."""
    doubt = noise**2 / (signal**2 * 0.3 + noise**2)
    likely = signal * 0.3 * x / (signal**2 * 0.3 + noise**2)
    return likely + 0.3 * doubt * torch.tanh(3 * likely.roll(1, -1))


def predictor(scheduler: Any, count: int, start: int = 0) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """That denoiser's output as the scheduler's prediction type has it, before each of the solver steps."""
    schedule = schedule_of(scheduler, count)
    kind = getattr(scheduler.config, "prediction_type", "flow_prediction")

    def predict(x: torch.Tensor, i: int) -> torch.Tensor:
        signal, noise = schedule.signal[start + i], schedule.noise[start + i]
        clean = clean_of(x, signal, noise)
        size = float(np.hypot(signal, noise))
        return {
            "sample": clean,
            "epsilon": (x - signal * clean) / noise,
            "v_prediction": (signal * x / size - size * clean) / noise,
            "flow_prediction": (x - clean) / noise,
        }[kind]

    return predict


def errors(scheduler: Any, count: int, *, start: int = 0, iterations: tuple[int, ...] = (0, 8)) -> list[float]:
    """The largest relative error of the images that come back, by the number of iterations."""
    steps, predict, real = steps_of(scheduler, count, start), predictor(scheduler, count, start), images()
    found = [run_backwards(real, steps, predict, each) for each in iterations]
    return [float(relative_error(run_forwards(x, steps, predict), real).max()) for x in found]


# ---- the solver run backwards


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_the_plain_reverse_is_diffusers_inverse_ddim(spacing):
    count = 20
    settings = {**SD, "timestep_spacing": spacing, "set_alpha_to_one": False, "steps_offset": 0}
    scheduler, inverse = DDIMScheduler(**settings), DDIMInverseScheduler(**settings)
    epsilon = predictor(scheduler, count)
    ours = run_backwards(images(), steps_of(scheduler, count), epsilon, 0)
    inverse.set_timesteps(count)
    theirs = images()
    for i, t in enumerate(inverse.timesteps):
        theirs = inverse.step(epsilon(theirs, count - 1 - i), t, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", [0, 6])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_iterations_solve_what_the_plain_reverse_takes_as_it_comes(name, prediction, start):
    scheduler = getattr(diffusers, name).from_config({**SD, "prediction_type": prediction})
    plain, solved = errors(scheduler, 12, start=start)
    assert solved <= 2e-3 < plain


def test_flow_models_are_inverted_by_flow_match_euler():
    plain, solved = errors(FlowMatchEulerDiscreteScheduler(shift=3.0), 12)
    assert solved <= 2e-3 < plain


def test_more_iterations_come_closer():
    found = errors(DDIMScheduler(**SD, timestep_spacing="trailing"), 20, iterations=(0, 1, 2, 4))
    assert found == sorted(found, reverse=True) and found[-1] < found[0] / 20


def test_a_prediction_of_large_weight_still_converges():
    # Of the squared-cosine schedule's first steps, epsilon's weight is hundreds.
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", clip_sample=False)
    steps = steps_of(scheduler, 20)
    assert np.abs(steps.coef[0, 3] + steps.coef[0, 4] * steps.coef[0, 1]) > 100
    assert errors(scheduler, 20)[1] <= 5e-3


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_the_coefficients_of_ddim_between_noise_levels_are_those_of_ddims_own_step(spacing):
    settings = {**SD, "timestep_spacing": spacing, "prediction_type": "v_prediction"}
    own = steps_of(DDIMScheduler(**settings), 10)
    substitute = steps_of(diffusers.DDPMScheduler(**settings), 10)
    x, e = (torch.randn(2, 1, 4, 4, dtype=torch.float64) for _ in range(2))
    single = [Steps(s.coef[3:4], s.timesteps[3:4], s.in_scale[3:4], s.growth[3:4]) for s in (own, substitute)]
    results = [run_forwards(x, each, lambda *_: e) for each in single]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(own.timesteps, substitute.timesteps)


@pytest.mark.parametrize(
    "name", ["dpmsolver++", "dpmsolver++_sde", "unipc", "deis", "heun", "kdpm2", "lms", "pndm", "euler_a", "ddpm"]
)
def test_a_sampler_without_steps_of_its_own_to_reverse_is_inverted_at_its_noise_levels(name, monkeypatch, caplog):
    monkeypatch.setattr(ddim, "_said", set())
    scheduler = make_scheduler(DDIMScheduler(**SD, steps_offset=1), name)
    if name == "pndm":
        scheduler = configured(scheduler, {"skip_prk_steps": True})
    with caplog.at_level(logging.WARNING, "streamaug"):
        steps = steps_of(scheduler, 8, 2)
        steps_of(scheduler, 8, 3)
    assert [record.getMessage().split(" as configured")[0] for record in caplog.records] == [
        f"bank.methods ddim: {type(scheduler).__name__}"
    ]
    schedule = schedule_of(scheduler, 8)
    real, size = images(), np.hypot(schedule.signal, schedule.noise)
    moves = np.flatnonzero(np.diff(schedule.noise[2:])) + 2
    assert len(steps) == len(moves)
    # An exact denoiser's noise prediction stays as it is: the trajectory is signal·image + noise·ξ at every level.
    xi = torch.randn(real.shape, generator=torch.Generator().manual_seed(1))

    def predict(x: torch.Tensor, i: int) -> torch.Tensor:
        assert torch.allclose(x, schedule.signal[moves[i]] * real + schedule.noise[moves[i]] * xi, atol=1e-3 * size[2])
        return xi

    begin = float(schedule.signal[2]) * real + float(schedule.noise[2]) * xi
    torch.testing.assert_close(run_forwards(begin, steps, predict), real, rtol=1e-3, atol=1e-3)
    assert np.allclose(steps.in_scale, [_in_scale(scheduler, schedule.noise[i]) for i in moves], rtol=1e-4)


def _in_scale(scheduler: Any, noise: float) -> float:
    return 1 / np.hypot(1, noise) if scheduler.init_noise_sigma > 1 else 1.0


def test_clamped_predictions_come_back_as_the_clamp_leaves_them():
    scheduler = DDIMScheduler(**{**SD, "clip_sample": True, "clip_sample_range": 0.3})
    without = configured(scheduler, {"clip_sample": False})
    real, predict = images(), predictor(scheduler, 10)
    clamped, free = (steps_of(each, 10) for each in (scheduler, without))
    inverted = [run_backwards(real, each, predict, 6) for each in (clamped, free)]
    torch.testing.assert_close(*inverted, rtol=1e-4, atol=1e-4)
    assert relative_error(run_forwards(inverted[0], free, predict), real).max() < 0.01
    assert relative_error(run_forwards(inverted[0], clamped, predict), real).min() > 0.1


# ---- the method


def config(path: Path, **ddim_settings: Any) -> Config:
    model = {"path": str(path), "device": "cpu", "steps": 8} | ddim_settings.pop("model", {})
    return Config.model_validate(
        {
            "model": model,
            "bank": {"methods": ["ddim"], "dtype": ddim_settings.pop("dtype", "float32"), "ddim": ddim_settings},
        }
    )


def method(path: Path, *, size: int = 8, prompts: Path | None = None, **settings: Any) -> Ddim:
    info = inspect(path, size)
    return Ddim(info, config(path, **settings), prompts, Codec(info, CPU))


def pictures(size: int, count: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def run(made: Ddim, size: int, classes: int = 5) -> tuple[np.ndarray, np.ndarray, dict[str, torch.Tensor]]:
    pixels = pictures(size)
    labels = np.arange(len(pixels)) % classes
    return pixels, labels, made.compute(pixels, labels, np.arange(len(pixels)), Checkpoint(None))


def sampled(made: Ddim, info: ModelInfo, inverted: torch.Tensor, labels: np.ndarray, guidance: float, **settings):
    """What the sampler makes of inverted latents, as a producer runs it."""
    order = np.zeros(len(labels), ORDER_DTYPE)
    order["id"], order["label"], order["guidance"] = np.arange(len(labels)), labels, guidance
    scheduler = made._scheduler
    denoiser = load(info, LoadSettings(CPU, **settings))
    return sampler(denoiser, scheduler, made.steps).sample(inverted, OrderBatch(0, made.start, 0, 0, order))


@pytest.fixture(scope="module")
def classy(tmp_path_factory) -> Path:
    """A class-conditional pixel model of 5 classes and a null class, whose random weights predict v."""
    folder = tmp_path_factory.mktemp("classy")
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")
    unet2d.build(folder, scheduler=scheduler, num_class_embeds=6)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    unet2d.build(folder, scheduler=DDIMScheduler(prediction_type="v_prediction", clip_sample=False))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, ImageSet]:
    """A small prior of the digits, barely trained, and digits it has not seen."""
    digits = load_splits(DataConfig())
    path = tmp_path_factory.mktemp("trained") / "prior"
    train_prior(digits.train, PriorConfig(channels=[16, 32], steps=100, batch_size=64), path)
    return path, digits.test.subset(range(12))


def test_digits_come_back_from_fifty_steps_within_two_percent(trained):
    path, digits = trained
    found = {}
    for iterations in (0, 2):
        made = method(path, iterations=iterations, dtype="float16", model={"steps": 50})
        made_rows = made.compute(digits.images, digits.labels, np.arange(12), Checkpoint(None))
        found[iterations] = made_rows["ddim.error"]
    assert found[2].max() <= 0.002 < found[0].mean() < 0.05
    assert 0.3 < made_rows["inverted"].float().std() < 3, "what comes out is no noise"


def test_the_clamp_of_a_sampler_is_off_unless_asked_for_and_then_named_in_the_log(tmp_path, caplog):
    unet2d.build(tmp_path, scheduler=DDIMScheduler(prediction_type="v_prediction", clip_sample=True))
    with caplog.at_level(logging.WARNING, "streamaug"):
        made = method(tmp_path)
        assert made.solver.clip is None and not caplog.records
        made = method(tmp_path, model={"scheduler_config": {"clip_sample": True}})
        assert made.solver.clip == 1.0
    assert "clip_sample asks for a clamp" in caplog.text
    without = config(tmp_path).model_copy(update={"bank": BankConfig(methods=["encode"])})
    for settings, clamped in ((config(tmp_path), False), (without, True)):
        assert solver_settings(settings, inspect(tmp_path, 8))[0].config.clip_sample == clamped


@pytest.mark.parametrize(("scheduler", "guidance"), [("keep", 1.0), ("keep", 2.0), ("euler", 1.0)])
@pytest.mark.parametrize("depth", [0.5, 1.0])
def test_the_sampler_makes_the_image_of_what_was_inverted(classy, scheduler, guidance, depth):
    made = method(classy, depth=depth, guidance=guidance, iterations=6, model={"scheduler": scheduler, "null_class": 5})
    pixels, labels, found = run(made, 8)
    assert made.start == (4 if depth == 0.5 else 0) and found["inverted"].shape == pixels.shape
    back = sampled(made, inspect(classy), found["inverted"], labels, guidance, null_class=5)
    real = torch.from_numpy(pixels).float() / 127.5 - 1
    assert relative_error(back, real).max() <= 0.02
    torch.testing.assert_close(relative_error(back, real), found["ddim.error"], rtol=0.05, atol=1e-4)


def test_an_image_is_inverted_as_its_label(classy):
    made = method(classy)
    pixels, labels, found = run(made, 8)
    other = made.compute(pixels, (labels + 1) % 5, np.arange(len(pixels)), Checkpoint(None))
    assert not torch.allclose(found["inverted"], other["inverted"], atol=1e-4)


def test_the_error_is_that_of_the_row_as_it_is_stored(plain):
    exact, coarse = (method(plain, dtype=dtype, iterations=8) for dtype in ("float32", "bfloat16"))
    found = {made.part.dtype: run(made, 8)[2] for made in (exact, coarse)}
    assert found["bfloat16"]["inverted"].dtype == torch.bfloat16
    assert found["bfloat16"]["ddim.error"].min() > 2 * found["float32"]["ddim.error"].max()


def test_the_network_runs_as_often_as_it_says(plain, monkeypatch):
    made = method(plain, iterations=2, depth=0.5)
    calls = []
    run_network = type(made._denoiser).__call__
    monkeypatch.setattr(type(made._denoiser), "__call__", lambda *given: calls.append(1) or run_network(*given))
    run(made, 8)
    assert len(calls) == made.evaluations == 4 * 4


@pytest.mark.parametrize(
    ("tiny", "size", "guidance", "prompted"),
    [(stable_diffusion, 32, 1.0, True), (stable_diffusion, 32, 2.0, True), (sd3, 16, 2.0, True), (dit, 16, 1.0, False)],
    ids=["Stable Diffusion", "Stable Diffusion, guided", "Stable Diffusion 3, guided", "DiT, learned variance"],
)
def test_latent_models_are_inverted_as_they_are_sampled(tmp_path, tiny, size, guidance, prompted):
    tiny.build(tmp_path / "model")
    info = inspect(tmp_path / "model", size)
    prompts = encode_prompts(info, ["cat", "dog"], ["a photo of a {}"], tmp_path) if prompted else None
    made = method(tmp_path / "model", size=size, prompts=prompts, guidance=guidance, iterations=2)
    pixels, labels, found = run(made, size, 2)
    assert found["inverted"].shape == (4, *info.latent_shape)
    assert made.part.meta["prompts"] == (prompts.stem if prompts else None)
    # What random weights predict is no denoiser's, so little comes back: but the sampler brings back the same.
    back = sampled(made, info, found["inverted"], labels, guidance, prompts=prompts)
    latent = Codec(info, CPU).encode(pixels)
    torch.testing.assert_close(relative_error(back, latent), found["ddim.error"], rtol=1e-2, atol=1e-4)


def test_large_latents_are_computed_in_smaller_groups(plain, tmp_path, monkeypatch):
    assert method(plain).part.group_rows == 64
    monkeypatch.setattr(ddim, "_LATENT_CELLS", 5 * 64)
    assert method(plain).part.group_rows == 5


def test_every_setting_that_changes_rows_changes_the_part(classy, tmp_path):
    changes: list[dict[str, Any]] = [
        {},
        {"depth": 0.5},
        {"iterations": 1},
        {"guidance": 2.0, "model": {"null_class": 5}},
        {"steps": 4},
        {"model": {"steps": 9}},
        {"model": {"scheduler": "euler"}},
        {"model": {"scheduler_config": {"clip_sample": True}}},
        {"model": {"dtype": "bfloat16"}},
    ]
    metas = [str(method(classy, **change).part.meta) for change in changes]
    assert len(set(metas)) == len(changes)
    assert str(method(classy).part.meta) == metas[0]


@pytest.mark.parametrize("depth", [0.25, 0.5, 1.0])
def test_more_steps_enter_where_sampling_does(classy, depth):
    made = method(classy, steps=40, depth=depth)
    sampling = solver_for(made._scheduler, 8, schedule_of(made._scheduler, 8).start_of(depth))
    assert made.steps == 40 and made.solver.timesteps[0] == sampling.timesteps[0]


def test_steps_that_enter_elsewhere_are_refused_with_the_spacing_that_helps(plain):
    match = r"bank\.ddim\.steps 3: at depth 1, sampling in 8 steps begins with signal 0\..* to null, or "
    with pytest.raises(ConfigError, match=match + r"model\.scheduler_config\.timestep_spacing to trailing or linspace"):
        method(plain, steps=3)
    method(plain, steps=3, model={"scheduler_config": {"timestep_spacing": "trailing"}})


def test_guidance_needs_something_to_leave_out(plain, classy):
    with pytest.raises(ConfigError, match=r"bank\.ddim\.guidance: this model has no condition to leave out; set it to"):
        method(plain, guidance=2.0)
    with pytest.raises(ConfigError, match=r"bank\.ddim\.guidance: needs the class that means 'no class'"):
        method(classy, guidance=2.0)


@pytest.mark.parametrize("scheduler", ["lcm", "tcd"])
def test_samplers_of_distilled_models_are_refused(plain, scheduler):
    with pytest.raises(ConfigError, match=r"ddim runs an ODE solver backwards, .* set model\.scheduler to ddim"):
        method(plain, model={"scheduler": scheduler})
