"""The page that says how every scheduler of the installed diffusers runs here: fused, stepped or refused, and why.

python -m streamaug.sampling.solvers.page > docs/schedulers.md
"""

import logging
from dataclasses import dataclass
from typing import Any

from streamaug.errors import ModelError
from streamaug.sampling.solvers.schedulers import ALIASES, OTHER_JOBS, scheduler_class, scheduler_names
from streamaug.sampling.solvers.table import NotFused, SolverTable, solver_for, solver_table

STEPS = 10

# Configurations beside the default one that run differently, or that a checkpoint is likely to have.
VARIANTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("DDIMScheduler", {}, {"eta": 1.0}),
    ("DDIMScheduler", {"clip_sample": False, "thresholding": True}, {}),
    ("DDPMScheduler", {"variance_type": "learned_range"}, {}),
    ("DEISMultistepScheduler", {"solver_order": 3}, {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}, {}),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, {}),
    ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("EulerDiscreteScheduler", {}, {"s_churn": 1.0}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {}),
    ("HeunDiscreteScheduler", {"clip_sample": True}, {}),
    ("PNDMScheduler", {"skip_prk_steps": True}, {}),
    ("TCDScheduler", {}, {"eta": 0.0}),
    ("UniPCMultistepScheduler", {"solver_order": 3}, {}),
]

# Classes of diffusers only where torchsde is installed: looked up, they would make the page depend on the machine.
NEED_TORCHSDE = {
    "CosineDPMSolverMultistepScheduler": "fused",
    "DPMSolverSDEScheduler": "stepped",
}

_PAGE = """\
# Schedulers

How each scheduler of diffusers {version} runs, read off {steps} steps of its own `step` by
`python -m streamaug.sampling.solvers.page`; a test keeps this page as the program prints it.

- **fused**: the step comes down to a short recurrence, which one kernel runs together with guidance.
- **stepped**: `scheduler.step` itself runs, with our noise: slower, the same images. The log says so once.
- **refused**: an error with the reason given here.

*History* counts the evaluations a step looks at, the present one included. *Error* is the largest difference from
`scheduler.step` at the end of the run, in standard deviations, on random inputs with the same noise: schedulers that
compute in single precision show it, a stepped one has none. Names in brackets are those of `model.scheduler`.

| scheduler | runs | evaluations | history | noise | error | reason |
|---|---|---|---|---|---|---|
{rows}

With `pip install torchsde` also {torchsde}.
"""


@dataclass(frozen=True)
class Row:
    """One line of the page: what became of a configuration of a scheduler in STEPS steps."""

    name: str
    config: dict[str, Any]
    options: dict[str, Any]
    runs: str
    evaluations: int | None = None
    history: int | None = None
    noisy: bool | None = None
    error: float | None = None
    reason: str = ""

    def markdown(self) -> str:
        aliases = [alias for alias, (name, _) in ALIASES.items() if name == self.name]
        settings = ", ".join(f"{key}={value}" for key, value in (self.config | self.options).items())
        label = f"`{self.name}`"
        if settings:
            label += f" {settings}"
        elif aliases:
            label += f" ({', '.join(aliases)})"
        noise = {None: "", True: "yes", False: "no"}[self.noisy]
        return (
            f"| {label} | {self.runs} | {self.evaluations or ''} | {self.history or ''} | {noise} "
            f"| {_magnitude(self.error)} | {self.reason} |"
        )


def row(name: str, config: dict[str, Any] | None = None, options: dict[str, Any] | None = None) -> Row:
    """What becomes of the scheduler class `name` with this configuration and these options of its step."""
    config, options = config or {}, options or {}
    if name in OTHER_JOBS:
        return Row(name, config, options, "refused", reason=OTHER_JOBS[name])
    try:
        scheduler = scheduler_class(name)(**config)
        solver = solver_for(scheduler, STEPS, options=options)
    except ModelError as error:
        return Row(name, config, options, "refused", reason=str(error))
    if isinstance(solver, SolverTable):
        return Row(name, config, options, "fused", len(solver), solver.history, solver.noisy, solver.error)
    return Row(name, config, options, "stepped", len(solver), None, solver.noisy, None, _why(scheduler, options))


def rows() -> list[Row]:
    """Every scheduler class in its default configuration, each followed by its VARIANTS."""
    found = []
    for name in scheduler_names():
        if name not in NEED_TORCHSDE:
            found.append(row(name))
            found += [row(variant, config, options) for variant, config, options in VARIANTS if variant == name]
    return found


def page() -> str:
    """The page in Markdown."""
    import diffusers

    lines = "\n".join(found.markdown() for found in rows())
    torchsde = ", ".join(f"`{name}` ({runs})" for name, runs in NEED_TORCHSDE.items())
    return _PAGE.format(version=diffusers.__version__, steps=STEPS, rows=lines, torchsde=torchsde)


def _why(scheduler: Any, options: dict[str, Any]) -> str:
    try:
        solver_table(scheduler, STEPS, options=options)
    except NotFused as why:
        return str(why)
    raise AssertionError("a stepped scheduler has no table")


def _magnitude(error: float | None) -> str:
    """Coarse, so that the page is the same on every machine."""
    if error is None:
        return ""
    return "< 1e-10" if error < 1e-10 else "< 1e-5"


if __name__ == "__main__":
    logging.disable()  # diffusers warns of the configurations that are tried here
    print(page(), end="")
