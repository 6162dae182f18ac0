"""Every scheduler class of diffusers is fused with parity, stepped with parity, or refused with a reason."""

from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    RePaintScheduler,
    SchedulerMixin,
)
from diffusers import schedulers as diffusers_schedulers
from scheduler_runs import difference, inputs, run_scheduler, run_table
from streamaug.kernels.philox import normal

from streamaug.errors import ModelError
from streamaug.sampling.solvers.page import NEED_TORCHSDE, STEPS, VARIANTS, Row, page, row
from streamaug.sampling.solvers.schedulers import ALIASES, OTHER_JOBS, make_scheduler, scheduler_class, scheduler_names
from streamaug.sampling.solvers.stepped import SteppedSolver
from streamaug.sampling.solvers.table import solver_for

pytestmark = pytest.mark.filterwarnings("ignore")
DOCS = Path(__file__).parents[3] / "docs" / "schedulers.md"


def test_every_scheduler_class_is_among_the_names():
    exported = {
        name
        for module in (diffusers, diffusers_schedulers)
        for name in dir(module)
        if isinstance(getattr(module, name, None), type) and issubclass(getattr(module, name), SchedulerMixin)
    }
    assert exported - {"SchedulerMixin"} <= set(scheduler_names())
    assert len(scheduler_names()) > 45
    assert set(OTHER_JOBS) <= set(scheduler_names())


CASES = [(name, {}, {}) for name in scheduler_names() if name not in NEED_TORCHSDE] + VARIANTS


@pytest.mark.parametrize(("name", "config", "options"), CASES, ids=lambda value: value if type(value) is str else "")
def test_every_scheduler_is_fused_or_stepped_with_parity_or_refused_with_a_reason(name, config, options):
    found = row(name, config, options)
    if found.runs == "refused":
        assert found.reason
        with pytest.raises(ModelError):
            scheduler_class(name)
        return
    scheduler = scheduler_class(name)(**config)
    for start in (0,) if name == "PNDMScheduler" and not config else (0, 4):
        solver = solver_for(scheduler, STEPS, start, options=options)
        assert found.evaluations == len(solver) or start > 0
        if isinstance(solver, SteppedSolver):
            x, outputs, _ = inputs(len(solver), torch.float32)
            if solver.learned_variance:
                outputs = [torch.cat([output, output.abs()], 1) for output in outputs]
            ids = torch.arange(len(x))
            noise = [normal(ids, x.shape[1:], seed=2, stream=1, step=step) for step in range(len(solver))]
            run = solver.begin(x, ids, seed=2)
            for evaluation, output in enumerate(outputs):
                run.network_input(evaluation)
                run.advance(evaluation, output)
            ours = run.x
            assert found.runs == "stepped"
        else:
            x, outputs, noise = inputs(len(solver))
            ours = run_table(solver, x, outputs, noise)
            assert found.runs == "fused" and found.history == solver_for(scheduler, STEPS, options=options).history
        expected = run_scheduler(scheduler, STEPS, start, x, outputs, noise, options=options)
        assert difference(ours, expected) <= 2e-5


def test_the_documented_table_is_what_the_program_prints():
    """For the diffusers that it names; another one is covered by the test above."""
    written = DOCS.read_text("utf-8")
    if f"diffusers {diffusers.__version__} runs" in written:
        assert page() == written, "run: python -m streamaug.sampling.solvers.page > docs/schedulers.md"
    else:
        assert len(page().splitlines()) > 60


def test_a_scheduler_whose_dependency_is_missing_names_the_install():
    for name in NEED_TORCHSDE:
        if not issubclass(type(getattr(diffusers, name)), type(SchedulerMixin)):
            continue
        with pytest.raises(ModelError, match=f"{name} needs torchsde; pip install torchsde"):
            scheduler_class(name)


def test_a_row_of_the_page_tells_the_settings_or_the_short_names():
    assert (
        "| `DDIMScheduler` (ddim) | fused | 10 | 1 | no | < 1e-10 |"
        in Row("DDIMScheduler", {}, {}, "fused", 10, 1, False, 1e-14).markdown()
    )
    assert "`DDIMScheduler` eta=1.0 | fused" in Row("DDIMScheduler", {}, {"eta": 1.0}, "fused").markdown()


@pytest.mark.parametrize("alias", [alias for alias in ALIASES if not alias.startswith(("edm", "flow", "consistency"))])
def test_every_short_name_makes_a_scheduler_that_runs_from_a_saved_ddim(alias):
    saved = DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", timestep_spacing="trailing")
    made = make_scheduler(saved, alias)
    class_name, settings = ALIASES[alias]
    assert type(made).__name__ == class_name
    assert made.config.beta_schedule == "scaled_linear" and made.config.prediction_type == "v_prediction"
    assert all(made.config[key] == value for key, value in settings.items())
    assert len(solver_for(made, 5)) >= 5
    assert type(make_scheduler(saved, class_name)) is type(made)


@pytest.mark.parametrize(
    "alias", ["flow_euler", "flow_heun", "flow_lcm", "dpmsolver++", "dpmsolver++_sde", "dpmsolver++_single", "unipc"]
)
def test_every_flow_solver_runs_from_a_saved_flow_scheduler(alias):
    made = make_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), alias)
    assert made.config.get("shift", made.config.get("flow_shift")) == 3.0
    table = solver_for(made, 5)
    # The exact solution for a network that predicts one straight line is that line, whatever the solver.
    image, noise = (
        torch.full((1, 1, 1, 1), 0.4, dtype=torch.float64),
        torch.full((1, 1, 1, 1), -1.1, dtype=torch.float64),
    )
    sigma = table.x0_scale[0] ** 0.5 / (1 + table.x0_scale[0] ** 0.5)
    x = (1 - sigma) * image + sigma * noise
    if not table.noisy:
        quiet = [torch.zeros_like(x)] * len(table)
        assert abs(run_table(table, x, [noise - image] * len(table), quiet) - image).item() < 1e-4


def test_the_shift_of_a_flow_schedule_is_kept_between_families():
    multistep = make_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), "dpmsolver++")
    assert make_scheduler(multistep, "unipc").config.flow_shift == 3.0
    assert make_scheduler(multistep, "flow_euler").config.shift == 3.0
    assert make_scheduler(multistep, "dpmsolver++") is multistep


def test_a_scheduler_as_saved_is_kept():
    saved = DPMSolverMultistepScheduler()
    assert make_scheduler(saved, "keep") is saved
    assert make_scheduler(saved, "dpmsolver++") is saved
    assert make_scheduler(saved, "dpmsolver++_sde").config.algorithm_type == "sde-dpmsolver++"


@pytest.mark.parametrize(
    ("saved", "name", "message"),
    [
        (DDIMScheduler(), "unpic", "unknown .did you mean 'unipc'.*keep, one of ddim, ddpm"),
        (DDIMScheduler(), "HeunDiscreteSchedulr", "did you mean 'HeunDiscreteScheduler'"),
        (DDIMScheduler(), "SchedulerMixin", "unknown"),
        (DDIMScheduler(), "UNet2DModel", "unknown"),
        (DDIMScheduler(), "VQDiffusionScheduler", "discrete tokens"),
        (RePaintScheduler(), "keep", "an image and a mask.*set model.scheduler to one of ddim"),
        (DDIMScheduler(), "flow_euler", "runs flow matching models.*DDIMScheduler is for diffusion.*one of ddim, ddpm"),
        (FlowMatchEulerDiscreteScheduler(), "deis", "runs diffusion models.*is for flow matching.*dpmsolver"),
        (FlowMatchEulerDiscreteScheduler(), "heun", "is for flow matching; keep it, or choose one of .*flow_euler"),
        (CMStochasticIterativeScheduler(), "ddim", "is for consistency; keep it, or choose one of consistency"),
        (DDIMScheduler(rescale_betas_zero_snr=True), "heun", "no rescale_betas_zero_snr.*another noise schedule"),
        (EDMEulerScheduler(), "euler", "is for EDM; keep it, or choose one of edm_euler"),
        (DDPMScheduler(), "consistency", "runs consistency models"),
        (HeunDiscreteScheduler(), "edm_euler", "runs EDM models"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_name_that_cannot_be_made_from_the_saved_scheduler_is_refused(saved, name, message):
    with pytest.raises(ModelError, match=message):
        make_scheduler(saved, name)
