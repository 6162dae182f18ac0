"""The solver table against `scheduler.step` of diffusers with the same noise, in every configuration."""

import itertools
import logging

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    RePaintScheduler,
    SASolverScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from diffusers import logging as diffusers_logging
from scheduler_runs import difference, inputs, run_scheduler, run_table
from streamaug.kernels.step import HISTORY, Column, step, used_columns

from streamaug.errors import ModelError
from streamaug.sampling.solvers import table
from streamaug.sampling.solvers.stepped import SteppedSolver
from streamaug.sampling.solvers.table import NotFused, SolverTable, schedule_of, solver_for, solver_table

diffusers_logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")

PREDICTIONS = ("epsilon", "v_prediction", "sample")
NOISE_OR_V = ("epsilon", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
SIGMAS = ({}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True})
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
ENTRIES = ((10, 0), (20, 7), (12, 11), (5, 1), (4, 0))

# What is worth combining with every prediction type and spacing: class, prediction types, options of the constructor.
CONFIGURATIONS = [
    (DDIMScheduler, PREDICTIONS, {"clip_sample": True}),
    (DDIMScheduler, PREDICTIONS, {"clip_sample": True, "clip_sample_range": 1.7}),
    (DDIMScheduler, PREDICTIONS, {"clip_sample": False, "set_alpha_to_one": False}),
    (DDIMScheduler, PREDICTIONS[1:], {"clip_sample": False, "rescale_betas_zero_snr": True}),
    (DDPMScheduler, PREDICTIONS, {"variance_type": "fixed_small"}),
    (DDPMScheduler, PREDICTIONS, {"variance_type": "fixed_small_log", "clip_sample": False}),
    (DDPMScheduler, PREDICTIONS, {"variance_type": "fixed_large", "beta_schedule": "squaredcos_cap_v2"}),
    (EulerAncestralDiscreteScheduler, NOISE_OR_V, {}),
    (EulerAncestralDiscreteScheduler, NOISE_OR_V, {"rescale_betas_zero_snr": True}),
    (EulerDiscreteScheduler, PREDICTIONS, {"rescale_betas_zero_snr": True}),
    (HeunDiscreteScheduler, PREDICTIONS, {"clip_sample": True, "clip_sample_range": 1.5}),
    (LCMScheduler, PREDICTIONS, {}),
    (LCMScheduler, PREDICTIONS, {"clip_sample": True}),
    (TCDScheduler, PREDICTIONS, {}),
    (PNDMScheduler, NOISE_OR_V, {"skip_prk_steps": True}),
    (PNDMScheduler, NOISE_OR_V, {"skip_prk_steps": True, "set_alpha_to_one": True}),
    *[
        (cls, predictions, sigmas)
        for sigmas in SIGMAS
        for cls, predictions in (
            (EulerDiscreteScheduler, PREDICTIONS),
            (HeunDiscreteScheduler, PREDICTIONS),
            (KDPM2DiscreteScheduler, NOISE_OR_V),
            (KDPM2AncestralDiscreteScheduler, NOISE_OR_V),
            (LMSDiscreteScheduler, PREDICTIONS),
            (SASolverScheduler, PREDICTIONS),
        )
    ],
    *[
        (cls, PREDICTIONS, {**sigmas, "solver_order": order})
        for sigmas, order in itertools.product(SIGMAS, (1, 2, 3))
        for cls in (DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler)
    ],
    *[
        (DPMSolverMultistepScheduler, PREDICTIONS, options)
        for options in (
            {"algorithm_type": "sde-dpmsolver++"},
            {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, "solver_type": "heun"},
            {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
            {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
            {"lower_order_final": False},
            {"euler_at_final": True},
            {"solver_type": "heun"},
            {"rescale_betas_zero_snr": True},
            {"use_lu_lambdas": True},
            {"variance_type": "learned_range"},
        )
    ],
    *[
        (UniPCMultistepScheduler, PREDICTIONS, options)
        for options in (
            {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
            {"predict_x0": False, "final_sigmas_type": "sigma_min"},
            {"disable_corrector": [0, 1]},
            {"rescale_betas_zero_snr": True},
        )
    ],
]
# These have no timestep spacing of the common kind.
OWN_SPACING = [
    *[
        (DPMSolverSinglestepScheduler, PREDICTIONS, {**sigmas, "solver_order": order})
        for sigmas, order in itertools.product(SIGMAS, (1, 2, 3))
    ],
    (EDMEulerScheduler, NOISE_OR_V, {}),
    (EDMEulerScheduler, NOISE_OR_V, {"sigma_schedule": "exponential"}),
    (EDMDPMSolverMultistepScheduler, NOISE_OR_V, {}),
    (EDMDPMSolverMultistepScheduler, NOISE_OR_V, {"algorithm_type": "sde-dpmsolver++"}),
    (EDMDPMSolverMultistepScheduler, NOISE_OR_V, {"solver_order": 3}),
]
PLAIN = [
    (CMStochasticIterativeScheduler, {}),
    (CMStochasticIterativeScheduler, {"clip_denoised": False}),
    (FlowMatchEulerDiscreteScheduler, {}),
    (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    (FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}),
    (FlowMatchEulerDiscreteScheduler, {"use_karras_sigmas": True}),
    (FlowMatchHeunDiscreteScheduler, {"shift": 3.0}),
    (FlowMatchLCMScheduler, {}),
    *[
        (cls, {**FLOW, "flow_shift": 3.0})
        for cls in (DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler, SASolverScheduler)
    ],
]

GRID = [
    *[
        (cls, {**options, "prediction_type": prediction, "timestep_spacing": spacing})
        for cls, predictions, options in CONFIGURATIONS
        for prediction, spacing in itertools.product(predictions, SPACINGS)
    ],
    *[
        (cls, {**options, "prediction_type": prediction})
        for cls, predictions, options in OWN_SPACING
        for prediction in predictions
    ],
    *PLAIN,
]


def check(cls, configuration, steps, start, **options):
    """The table of this scheduler gives what its step gives, from the same start, outputs and noise."""
    scheduler = cls(**configuration)
    table = solver_table(scheduler, steps, start, **options)
    scale = 1.0 if table.clip is not None else schedule_of(scheduler, steps, **options).initial_noise
    x, outputs, noise = inputs(len(table), scale=scale)
    expected = run_scheduler(scheduler, steps, start, x, outputs, noise, **options)
    assert difference(run_table(table, x, outputs, noise), expected) <= 2e-5, (cls, configuration, steps, start)
    return table


def test_the_table_reproduces_every_scheduler_and_configuration():
    """Every class and option, with prediction types, spacings and starts taken in turn."""
    for number, (cls, configuration) in enumerate(GRID[::6]):
        check(cls, configuration, *ENTRIES[number % len(ENTRIES)])


@pytest.mark.matrix
@pytest.mark.timeout(1200)
def test_the_table_reproduces_every_combination_from_every_start():
    for (cls, configuration), entry in itertools.product(GRID, ENTRIES):
        check(cls, configuration, *entry)


@pytest.mark.parametrize(
    ("cls", "configuration", "options"),
    [
        (DDIMScheduler, {}, {"eta": 1.0}),
        (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}, {"eta": 0.3}),
        (DDIMScheduler, {}, {"eta": 0.5, "use_clipped_model_output": True}),
        (EulerDiscreteScheduler, {}, {"s_churn": 3.0, "s_tmin": 0.5, "s_noise": 1.1}),
        (FlowMatchHeunDiscreteScheduler, {}, {"s_churn": 3.0}),
        (LMSDiscreteScheduler, {}, {"order": 2}),
        (TCDScheduler, {}, {"eta": 0.8}),
    ],
)
def test_options_of_the_step_are_in_the_table(cls, configuration, options):
    for entry in ENTRIES:
        table = check(cls, configuration, *entry, options=options)
    assert table.noisy or cls is LMSDiscreteScheduler or entry != ENTRIES[0]


@pytest.mark.parametrize(
    ("scheduler", "steps", "timing"),
    [
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 6, {"mu": 0.9}),
        (FlowMatchEulerDiscreteScheduler(), 4, {"sigmas": [1.0, 0.7, 0.4, 0.1]}),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 2, {"mu": 0.9, "sigmas": [1.0, 0.5]}),
        (UniPCMultistepScheduler(**FLOW, use_dynamic_shifting=True), 6, {"mu": 0.9}),
        (DDPMScheduler(), 4, {"timesteps": [900, 500, 100, 3]}),
        (EulerDiscreteScheduler(), 3, {"timesteps": [900, 500, 100]}),
        (HeunDiscreteScheduler(), 3, {"timesteps": [900, 500, 100]}),
        (LCMScheduler(), 4, {"original_inference_steps": 20, "strength": 0.6}),
        (LCMScheduler(), 2, {"timesteps": [800, 200]}),
        (CMStochasticIterativeScheduler(), 2, {"timesteps": [22, 0]}),
    ],
)  # fmt: skip
def test_options_of_the_timesteps_are_in_the_table(scheduler, steps, timing):
    for start in range(2):
        table = solver_table(scheduler, steps, start, timing=timing)
        x, outputs, noise = inputs(len(table))
        expected = run_scheduler(scheduler, steps, start, x, outputs, noise, timing=timing)
        assert difference(run_table(table, x, outputs, noise), expected) <= 2e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": {"eat": 1.0}}, "no step option eat.*did you mean 'eta'"),
        ({"timing": {"mu": 1.0}}, "no timing option mu.*takes none"),
        ({"steps": 2000}, r"model\.steps 2000: DDIMScheduler was made with 1000 timesteps and takes at most as many"),
        ({"start": 10}, "start 10: DDIMScheduler has 10 evaluations"),
    ],
)
def test_what_a_scheduler_does_not_take_is_refused(arguments, message):
    with pytest.raises(ModelError, match=message):
        solver_for(DDIMScheduler(), **{"steps": 10, **arguments})


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "`mu` must be passed"),
        (RePaintScheduler(), "an image and a mask"),
        (DDPMScheduler(variance_type="fixed_large_log"), "not finite.*use fixed_large"),
        (UniPCMultistepScheduler(solver_type="bh1"), "not finite at timestep 100.*set final_sigmas_type to sigma_min"),
        (EulerAncestralDiscreteScheduler(prediction_type="sample"), "cannot step with this configuration"),
        (EDMDPMSolverMultistepScheduler(prediction_type="sample"), "Prediction type sample is not supported"),
        (
            UniPCMultistepScheduler(solver_order=3, use_beta_sigmas=True, lower_order_final=False),
            "UniPCMultistepScheduler cannot step with this configuration.*singular",
        ),
        (
            DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
            "not finite at timestep 999: rescale_betas_zero_snr leaves no signal",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_scheduler_that_cannot_run_is_refused_with_the_reason(scheduler, message):
    with pytest.raises(ModelError, match=message) as caught:
        solver_for(scheduler, 10)
    assert not isinstance(caught.value, NotFused)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(thresholding=True),
        DDPMScheduler(variance_type="learned_range"),
        PNDMScheduler(),
        DPMSolverSinglestepScheduler(algorithm_type="sde-dpmsolver++", solver_order=3),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_what_does_not_come_down_to_the_recurrence_is_stepped_and_said_once(scheduler, caplog, monkeypatch):
    monkeypatch.setattr(table, "_said", set())
    with pytest.raises(NotFused):
        solver_table(scheduler, 8)
    with caplog.at_level(logging.INFO, logger="streamaug"):
        for start in (0, 0):
            assert isinstance(solver_for(scheduler, 8, start), SteppedSolver)
    assert len(caplog.records) == 1
    assert f"{type(scheduler).__name__} runs step by step" in caplog.text


def test_settings_inherited_from_another_scheduler_are_not_its_own():
    inherited = EulerDiscreteScheduler.from_config(DDIMScheduler(clip_sample=True, thresholding=True).config)
    assert inherited.config.clip_sample and inherited.config.thresholding
    assert solver_table(inherited, 5).clip is None


def test_input_scaling_is_the_schedulers():
    scheduler = EulerDiscreteScheduler()
    table = solver_table(scheduler, 6)
    scheduler.set_timesteps(6)
    sigma = scheduler.sigmas.double().numpy()
    np.testing.assert_allclose(table.in_first, 1 / np.sqrt(sigma[0] ** 2 + 1), rtol=1e-5)
    np.testing.assert_allclose(table.coef[:-1, Column.IN_NEXT], 1 / np.sqrt(sigma[1:-1] ** 2 + 1), rtol=1e-5)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),
        DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
        DPMSolverMultistepScheduler(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
        DEISMultistepScheduler(prediction_type="v_prediction"),
        PNDMScheduler(skip_prk_steps=True),
        LCMScheduler(prediction_type="v_prediction"),
        LMSDiscreteScheduler(),
        KDPM2DiscreteScheduler(),
        HeunDiscreteScheduler(prediction_type="v_prediction"),
        EDMEulerScheduler(),
        FlowMatchHeunDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_perfect_network_predicts_the_clean_image_at_every_evaluation(scheduler):
    """The output that belongs to an image and its noise, as each family defines it, is turned back into the image."""
    table = solver_table(scheduler, 8)
    image, noise = 0.7, -1.3
    ratio = np.sqrt(table.x0_scale)  # noise scale / signal scale
    prediction = scheduler.config.get("prediction_type", "flow")
    if prediction == "flow":
        sigma = ratio / (1 + ratio)
        x, e = (1 - sigma) * image + sigma * noise, noise - image
        keep = sigma < 1 - 1e-9
    else:
        # The scale of x: variance preserving where the schedule is, else the signal is kept at 1.
        preserving = np.isclose(schedule_of(scheduler, 8).signal[0], 1) == 0
        signal = 1 / np.sqrt(1 + ratio**2) if preserving else np.ones_like(ratio)
        x = signal * (image + ratio * noise)
        e = noise if prediction == "epsilon" else (noise - ratio * image) / np.sqrt(1 + ratio**2)
        if type(scheduler) is EDMEulerScheduler:
            data = scheduler.config.sigma_data
            skip, out = data**2 / (ratio**2 + data**2), ratio * data / np.sqrt(ratio**2 + data**2)
            e = (image - skip * x) / out
        keep = np.ones_like(ratio, dtype=bool)
    clean = table.clean[:, 0] * x + table.clean[:, 1] * e
    np.testing.assert_allclose(clean[keep], image, rtol=2e-3)


def test_the_schedule_is_what_add_noise_does():
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    schedule = schedule_of(scheduler, 10)
    scheduler.set_timesteps(10)
    alphas = scheduler.alphas_cumprod[scheduler.timesteps].double().numpy()
    np.testing.assert_allclose(schedule.signal[:-1] ** 2, alphas, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(schedule.signal**2 + schedule.noise**2, 1, rtol=1e-5)
    assert schedule.start_of(1.0) == 0
    assert schedule.start_of(0.3) == 7
    assert schedule.start_of(0.0) == 9


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchHeunDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(**FLOW),
        SASolverScheduler(**FLOW),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_flow_schedule_mixes_image_and_noise_by_sigma_at_every_solver_step(scheduler):
    schedule = schedule_of(scheduler, 8)
    scheduler.set_timesteps(8)
    sigmas = scheduler.sigmas.double().numpy()[:: getattr(scheduler, "order", 1)][:8]
    np.testing.assert_allclose(schedule.noise[:-1], sigmas, rtol=1e-5)
    np.testing.assert_allclose(schedule.signal[:-1], 1 - sigmas, rtol=1e-4, atol=1e-6)
    assert schedule.initial_noise == 1.0


@pytest.mark.parametrize("cls", [CMStochasticIterativeScheduler, EDMEulerScheduler])
def test_a_sigma_schedule_keeps_the_image_and_adds_noise(cls):
    schedule = schedule_of(cls(), 8)
    assert (schedule.signal == 1).all()
    assert (np.diff(schedule.noise) < 0).all()
    np.testing.assert_allclose(schedule.noise[0], 80.0, rtol=1e-3)
    np.testing.assert_allclose(schedule.initial_noise, 80.0, rtol=1e-3)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),
        DDPMScheduler(),
        EulerAncestralDiscreteScheduler(),
        HeunDiscreteScheduler(use_karras_sigmas=True),
        DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
        UniPCMultistepScheduler(solver_order=3),
        LMSDiscreteScheduler(),
        PNDMScheduler(skip_prk_steps=True),
        FlowMatchLCMScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_fused_and_the_stepped_solver_make_the_same_image(scheduler):
    """In fp32, through the step kernel, with the noise of the same ids and seed."""
    for start in (0, 3):
        table, stepped = solver_for(scheduler, 8, start), SteppedSolver(scheduler, 8, start)
        assert isinstance(table, SolverTable) and len(table) == len(stepped)
        x, outputs, _ = inputs(len(table), torch.float32)
        ids = torch.tensor([4, 9])
        run = stepped.begin(x.clone(), ids, seed=3)
        coef = torch.from_numpy(table.coef).float()[:, None].repeat(1, len(x), 1)
        history, index = torch.zeros(HISTORY, *x.shape), torch.zeros(1, dtype=torch.int64)
        net_in = x * table.in_first
        for evaluation, output in enumerate(outputs):
            assert table.timesteps[evaluation] == stepped.timesteps[evaluation]
            torch.testing.assert_close(run.network_input(evaluation), net_in, atol=1e-4, rtol=1e-4)
            run.advance(evaluation, output)
            step(
                x, output, coef, index, history, net_in, ids, seed=3, guided=False, clip=table.clip,
                noisy=table.noisy, columns=used_columns(coef),
            )  # fmt: skip
            index += 1
        assert difference(x, run.x) <= 1e-4
