"""The stepped solver: a scheduler's own step with our noise, against the scheduler run as a pipeline runs it."""

import copy
import importlib
import sys
import threading
import types

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    TCDScheduler,
)
from scheduler_runs import SHAPE, difference, inputs, run_scheduler
from streamaug.kernels.philox import normal

from streamaug.errors import ModelError
from streamaug.sampling.solvers.stepped import SteppedSolver
from streamaug.sampling.solvers.table import SolverTable, solver_for

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.tensor([11, -3])

SCHEDULERS = [
    DDIMScheduler(thresholding=True, clip_sample=False),
    DDPMScheduler(thresholding=True, variance_type="fixed_large"),
    DDPMScheduler(variance_type="learned_range"),
    DDPMScheduler(variance_type="learned", clip_sample=False, prediction_type="v_prediction"),
    DDPMScheduler(variance_type="learned_range", thresholding=True),
    PNDMScheduler(),
    PNDMScheduler(skip_prk_steps=True),
    DPMSolverSinglestepScheduler(algorithm_type="sde-dpmsolver++", solver_order=3),
    DPMSolverSinglestepScheduler(thresholding=True),
    SASolverScheduler(thresholding=True),
    TCDScheduler(),
    EulerAncestralDiscreteScheduler(),
]


def philox(count):
    return [normal(IDS, SHAPE[1:], seed=5, stream=1, step=evaluation) for evaluation in range(count)]


def network(solver, count):
    """fp32 outputs, with a variance of its own where the solver takes one."""
    x, outputs, variances = inputs(count, torch.float32)
    if solver.learned_variance:
        outputs = [torch.cat([output, variance.abs()], 1) for output, variance in zip(outputs, variances, strict=True)]
    return x, outputs


def sample(solver, x, outputs, ids=IDS, seed=5):
    run = solver.begin(x, ids, seed=seed)
    for evaluation, output in enumerate(outputs):
        run.network_input(evaluation)
        run.advance(evaluation, output)
    return run.x


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
def test_a_stepped_run_is_the_schedulers_own(scheduler):
    whole = isinstance(scheduler, PNDMScheduler) and not scheduler.config.skip_prk_steps
    for start in (0,) if whole else (0, 2):
        solver = SteppedSolver(scheduler, 6, start)
        x, outputs = network(solver, len(solver))
        expected = run_scheduler(scheduler, 6, start, x, outputs, philox(len(solver)))
        assert torch.equal(sample(solver, x, outputs), expected)


def test_runge_kutta_steps_cannot_be_entered_part_way_and_the_setting_that_can_is_named():
    with pytest.raises(ModelError, match=r"set model\.scheduler_config to \{skip_prk_steps: true\}"):
        solver_for(PNDMScheduler(), 6, 2)
    assert len(solver_for(PNDMScheduler(skip_prk_steps=True), 6, 2)) == 5


def test_a_stepped_run_takes_options_of_the_step_and_of_the_timesteps():
    scheduler = DDPMScheduler(variance_type="learned_range")
    solver = SteppedSolver(scheduler, 3, timing={"timesteps": [900, 400, 50]})
    assert solver.timesteps.tolist() == [900, 400, 50]
    options = {"eta": 0.7}
    stochastic = SteppedSolver(DDIMScheduler(thresholding=True), 3, options=options)
    x, outputs = network(stochastic, 3)
    expected = run_scheduler(DDIMScheduler(thresholding=True), 3, 0, x, outputs, philox(3), options=options)
    assert torch.equal(sample(stochastic, x, outputs), expected)
    assert stochastic.noisy


def test_an_image_depends_on_its_id_and_the_seed_not_on_its_batch():
    solver = SteppedSolver(EulerAncestralDiscreteScheduler(), 4)
    x, outputs = network(solver, 4)
    both = sample(solver, x, outputs)
    alone = sample(solver, x[1:], [output[1:] for output in outputs], ids=IDS[1:])
    assert torch.equal(both[1:], alone)
    assert not torch.equal(both, sample(solver, x, outputs, seed=6))


def test_runs_do_not_disturb_one_another_nor_the_scheduler():
    scheduler = DPMSolverSinglestepScheduler(algorithm_type="sde-dpmsolver++", solver_order=3)
    before = copy.deepcopy(scheduler.__dict__)
    solver = SteppedSolver(scheduler, 4)
    x, outputs = network(solver, 4)
    expected = sample(solver, x, outputs)
    first, second = (solver.begin(x, IDS, seed=5) for _ in range(2))
    for evaluation, output in enumerate(outputs):
        for run in (first, second):
            run.network_input(evaluation)
            run.advance(evaluation, output)
    assert torch.equal(first.x, expected) and torch.equal(second.x, expected)
    assert scheduler.step_index == before["_step_index"] and scheduler.num_inference_steps is None


def test_another_thread_keeps_its_own_noise_meanwhile():
    """A pipeline that runs on another thread draws from its own generator while a stepped solver steps."""
    solver = SteppedSolver(EulerAncestralDiscreteScheduler(), 4)
    module = sys.modules[EulerAncestralDiscreteScheduler.__module__]
    run = solver.begin(torch.zeros(SHAPE), IDS, seed=5)
    drawn = []

    def other():
        drawn.append(module.randn_tensor((3,), generator=torch.Generator().manual_seed(1)))

    class Output(torch.Tensor):
        """A network output that has the other thread draw in the middle of the step."""

        @classmethod
        def __torch_function__(cls, func, kinds, args=(), kwargs=None):
            if not drawn:
                thread = threading.Thread(target=other)
                thread.start()
                thread.join()
            return super().__torch_function__(func, kinds, args, kwargs or {})

    run.network_input(0)
    run._driver.step(0, torch.zeros(SHAPE).as_subclass(Output), run.x, lambda shape: torch.zeros(shape))
    assert torch.equal(drawn[0], torch.randn(3, generator=torch.Generator().manual_seed(1)))


def test_the_predicted_clean_image_is_what_the_scheduler_predicts():
    for scheduler in (DDIMScheduler(thresholding=True), DDIMScheduler(), DDPMScheduler(variance_type="learned_range")):
        solver = SteppedSolver(scheduler, 4)
        x, outputs = network(solver, 4)
        run = solver.begin(x, IDS, seed=5)
        fresh = copy.deepcopy(scheduler)
        fresh.set_timesteps(4)
        run.network_input(0)
        predicted = run.predicted_clean(0, outputs[0])
        expected = fresh.step(outputs[0], fresh.timesteps[0], x).pred_original_sample
        assert difference(predicted, expected) <= 1e-5


def test_learned_variance_is_said_only_of_a_step_that_takes_it():
    assert SteppedSolver(DDPMScheduler(variance_type="learned_range"), 3).learned_variance
    assert not SteppedSolver(DDPMScheduler(), 3).learned_variance
    dropped = DPMSolverSinglestepScheduler(variance_type="learned_range")
    assert not SteppedSolver(dropped, 3).learned_variance


def test_a_scheduler_with_random_numbers_of_its_own_is_refused():
    class Restless(DDIMScheduler):
        def step(self, model_output, timestep, sample, return_dict=True):
            return super().step(model_output, timestep, sample + torch.randn(sample.shape, dtype=sample.dtype))

    with pytest.raises(ModelError, match="random numbers of its own"):
        SteppedSolver(Restless(thresholding=True), 3)


def test_a_scheduler_that_draws_twice_in_a_step_is_refused():
    class Twice(DDPMScheduler):
        def step(self, model_output, timestep, sample, generator=None, return_dict=True):
            once = super().step(model_output, timestep, sample).prev_sample
            return super().step(model_output, timestep, once)

    with pytest.raises(ModelError, match="draws noise twice"):
        solver_for(Twice(), 3)


def test_a_subclass_of_ones_own_runs_like_its_base():
    class Mine(DDPMScheduler):
        pass

    table = solver_for(Mine(), 6)
    assert isinstance(table, SolverTable)
    np.testing.assert_array_equal(table.coef, solver_for(DDPMScheduler(), 6).coef)


@pytest.fixture
def with_torchsde(monkeypatch):
    """The module of a scheduler that imports torchsde, of which we use nothing: the noise is ours."""
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    names = [f"diffusers.schedulers.scheduling_{name}" for name in ("dpmsolver_sde", "cosine_dpmsolver_multistep")]
    yield lambda number: importlib.import_module(names[number])
    for name in names:
        sys.modules.pop(name, None)


def test_the_noise_of_a_brownian_path_is_ours(with_torchsde):
    scheduler = with_torchsde(0).DPMSolverSDEScheduler()
    solver = solver_for(scheduler, 4)
    assert isinstance(solver, SteppedSolver) and len(solver) == 7
    x, outputs = network(solver, 7)
    assert torch.equal(sample(solver, x, outputs), sample(solver, x, outputs))
    noise = philox(7)
    increments = []

    def sampler(sigma, sigma_next):
        """Two increments from one level: the second goes on from where the first ended."""
        fresh = noise[len(increments)]
        if len(increments) % 2:
            middle, before = increments[-1]
            shared = float((sigma - middle) / (sigma - sigma_next))
            fresh = shared**0.5 * before + (1 - shared) ** 0.5 * fresh
        increments.append((sigma_next, fresh))
        return fresh

    scheduler.set_timesteps(4)
    scheduler.noise_sampler = sampler
    expected = x
    for t, output in zip(scheduler.timesteps, outputs, strict=True):
        expected = scheduler.step(output, t, expected).prev_sample
    assert difference(sample(solver, x, outputs), expected) <= 1e-5


def test_the_cosine_solver_is_fused(with_torchsde):
    assert isinstance(solver_for(with_torchsde(1).CosineDPMSolverMultistepScheduler(), 6), SolverTable)
