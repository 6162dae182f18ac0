"""The solver table against diffusers' own schedulers, in every configuration the three of them have."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from streamaug.kernels.step import Column

from streamaug.errors import ModelError
from streamaug.sampling.solver import make_scheduler, schedule_of, solver_table

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")


def run_table(table, x, outputs):
    """The recurrence in float64."""
    history = [torch.zeros_like(x), torch.zeros_like(x)]
    for row, e in zip(table.coef, outputs, strict=True):
        m0 = row[Column.A] * x + row[Column.S] * e
        if table.clip is not None:
            m0 = m0.clamp(-table.clip, table.clip)
        x = row[Column.CX] * x + row[Column.CE] * e + row[Column.C0] * m0
        x = x + row[Column.C1] * history[0] + row[Column.C2] * history[1]
        history = [m0, history[0]]
    return x


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (DDIMScheduler, {"clip_sample": True}),
        (DDIMScheduler, {"clip_sample": True, "clip_sample_range": 1.7}),
        (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
        (
            DDIMScheduler,
            {"clip_sample": False, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        ),
        (EulerDiscreteScheduler, {}),
        (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
        (DPMSolverMultistepScheduler, {}),
        (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
        (DPMSolverMultistepScheduler, {"lower_order_final": False}),
        (DPMSolverMultistepScheduler, {"solver_type": "heun"}),
    ],
)
def test_the_table_reproduces_the_scheduler_from_any_step(cls, options):
    for prediction, spacing in itertools.product(PREDICTIONS, SPACINGS):
        scheduler = cls(
            **{
                "beta_schedule": "squaredcos_cap_v2",
                "prediction_type": prediction,
                "timestep_spacing": spacing,
                **options,
            }
        )
        for steps, start in ((4, 0), (12, 5), (12, 11)):
            table = solver_table(scheduler, steps, start)
            reference = cls.from_config(scheduler.config)
            reference.set_timesteps(steps)
            if hasattr(reference, "set_begin_index"):
                reference.set_begin_index(start)
            generator = torch.Generator().manual_seed(steps + start)
            x = torch.randn(50, generator=generator, dtype=torch.float64)
            outputs = [torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(len(table))]
            ours = run_table(table, x, outputs)
            for t, e in zip(reference.timesteps[start:], outputs, strict=True):
                reference.scale_model_input(x, t)
                x = reference.step(e, t, x).prev_sample.double()
            assert (x - ours).abs().max() <= 1e-4 * x.std(), (prediction, spacing, steps, start)


def test_input_scaling_is_the_schedulers():
    scheduler = EulerDiscreteScheduler()
    table = solver_table(scheduler, 6)
    scheduler.set_timesteps(6)
    scales = [scheduler.scale_model_input(torch.ones(1), t).item() for t in scheduler.timesteps[:1]]
    np.testing.assert_allclose(table.in_first, scales[0], rtol=1e-5)
    sigma = scheduler.sigmas.double().numpy()
    np.testing.assert_allclose(table.coef[:-1, Column.IN_NEXT], 1 / np.sqrt(sigma[1:-1] ** 2 + 1), rtol=1e-5)


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


def test_an_unsupported_scheduler_names_the_supported_ones():
    with pytest.raises(ModelError, match="ddim, euler, dpmsolver"):
        make_scheduler(HeunDiscreteScheduler(), "keep")
    assert isinstance(make_scheduler(HeunDiscreteScheduler(), "euler"), EulerDiscreteScheduler)


@pytest.mark.parametrize(
    "scheduler",
    [
        HeunDiscreteScheduler(),
        EulerAncestralDiscreteScheduler(),
        DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
        DDIMScheduler(thresholding=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_what_does_not_come_down_to_the_recurrence_is_refused(scheduler):
    with pytest.raises(ModelError):
        solver_table(scheduler, 8)


def test_more_steps_than_the_schedule_has_is_refused():
    with pytest.raises(ModelError, match=r"model.steps 2000"):
        solver_table(DDIMScheduler(), 2000)
