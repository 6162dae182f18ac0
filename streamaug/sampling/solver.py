"""Solver table: the few coefficients a diffusers scheduler's step comes down to, found by probing the object itself.

One step of a scheduler is linear in the sample, the model outputs and the noise. Feeding it one-hot symbols instead
of images gives the coefficients of the recurrence that the `step` kernel runs:

    m0 = clamp(a·x + s·e)            the predicted clean image
    x' = cx·x + ce·e + c0·m0 + c1·m1 + c2·m2

where m1 and m2 are the predictions of the two evaluations before. One row per network evaluation.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from streamaug.errors import ModelError
from streamaug.kernels.step import Column
from streamaug.orders import Schedule

A, S, CX, CE, C0, C1, C2 = (Column[name] for name in ("A", "S", "CX", "CE", "C0", "C1", "C2"))

SUPPORTED = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
}


@dataclass(frozen=True)
class SolverTable:
    """The evaluations from solver step `start` to the end.

    coef: float64 [E, len(Column)], the guidance column left to the sampler; timesteps: float64 [E], what the network
    is told; in_first: the factor on the latent for the first evaluation; clip: bound of the predicted clean image, or
    None; x0_scale: float64 [E], (noise scale / signal scale)² of each evaluation, which classifier guidance needs.
    """

    start: int
    coef: np.ndarray
    timesteps: np.ndarray
    in_first: float
    clip: float | None
    x0_scale: np.ndarray

    def __len__(self) -> int:
        return len(self.timesteps)


def make_scheduler(saved: Any, name: str) -> Any:
    """The model's own scheduler ("keep"), or another of SUPPORTED built from its configuration."""
    import diffusers

    if name == "keep":
        if type(saved).__name__ not in SUPPORTED.values():
            raise ModelError(
                f"{type(saved).__name__} is not supported yet; set model.scheduler to one of {', '.join(SUPPORTED)}"
            )
        return saved
    cls = getattr(diffusers, SUPPORTED[name])
    return saved if type(saved) is cls else cls.from_config(saved.config)


def schedule_of(scheduler: Any, steps: int) -> Schedule:
    """Signal and noise scale at each solver step, read off the scheduler's own `add_noise`."""
    fresh = _prepared(scheduler, steps)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    signal, noise = np.ones(steps + 1), np.zeros(steps + 1)
    for step, t in enumerate(fresh.timesteps):
        signal[step] = fresh.add_noise(one, zero, t[None]).item()
        noise[step] = fresh.add_noise(zero, one, t[None]).item()
    return Schedule(signal, noise, float(fresh.init_noise_sigma))


def solver_table(scheduler: Any, steps: int, start: int = 0) -> SolverTable:
    """The table for images that enter at solver step `start`, checked against `scheduler.step` on random inputs.

    Raises ModelError when the scheduler's step does not come down to this recurrence.
    """
    fresh = _prepared(scheduler, steps)
    if len(fresh.timesteps) != steps:
        raise ModelError(
            f"{type(scheduler).__name__} evaluates {len(fresh.timesteps)} times in {steps} steps; "
            f"one evaluation a step is supported: {', '.join(SUPPORTED)}"
        )
    clip = float(scheduler.config.clip_sample_range) if scheduler.config.get("clip_sample") else None
    coef, in_scale = _probe(scheduler, steps, start, clip)
    timesteps = fresh.timesteps[start:].double().numpy()
    schedule = schedule_of(scheduler, steps)
    x0_scale = (schedule.noise[start:steps] / np.maximum(schedule.signal[start:steps], 1e-12)) ** 2
    coef[:-1, Column.IN_NEXT] = in_scale[1:]
    coef[-1, Column.IN_NEXT] = 1.0
    table = SolverTable(start, coef, timesteps, float(in_scale[0]), clip, x0_scale)
    _check(scheduler, steps, table)
    return table


def _prepared(scheduler: Any, steps: int, start: int = 0) -> Any:
    fresh = copy.deepcopy(scheduler)
    if fresh.config.get("thresholding"):
        raise ModelError("dynamic thresholding is not supported; set thresholding to false in the scheduler")
    try:
        fresh.set_timesteps(steps)
    except ValueError as error:
        raise ModelError(f"model.steps {steps}: {error}") from None
    if hasattr(fresh, "set_begin_index"):
        fresh.set_begin_index(start)
    return fresh


def _probe(scheduler: Any, steps: int, start: int, clip: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Run the trajectory on symbols, without the clamp, and fit each step in its few terms."""
    fresh = _prepared(scheduler, steps, start)
    if clip is not None:
        fresh.register_to_config(clip_sample=False)
    evaluations = steps - start
    coef, in_scale = np.zeros((evaluations, len(Column))), np.zeros(evaluations)
    symbols = torch.eye(1 + evaluations, dtype=torch.float64)
    x = symbols[0]
    predictions: list[torch.Tensor] = []
    for i, t in enumerate(fresh.timesteps[start:]):
        in_scale[i] = fresh.scale_model_input(torch.ones(1, dtype=torch.float64), t).item()
        e = symbols[1 + i]
        if hasattr(fresh, "convert_model_output"):
            # This reads the step index, which `step` moves on.
            if fresh.step_index is None:
                fresh._init_step_index(t)
            m0 = fresh.convert_model_output(e, sample=x).double()
            after = fresh.step(e, t, x).prev_sample.double()
        else:
            output = fresh.step(e, t, x)
            m0, after = output.pred_original_sample.double(), output.prev_sample.double()
        coef[i, [A, S]] = _fit(m0, [x, e], scheduler)
        if clip is not None:
            coef[i, [CX, CE, C0]] = _saturated(scheduler, steps, start + i, t, coef[i, A], coef[i, S], clip)
        elif predictions:
            coef[i, [CX, C0, C1, C2]] = _history(after, x, m0, predictions, scheduler)
        else:
            coef[i, [CX, CE]] = _fit(after, [x, e], scheduler)
        x, predictions = after, [*predictions, m0]
    return coef, in_scale


def _history(
    after: torch.Tensor, x: torch.Tensor, m0: torch.Tensor, before: list[torch.Tensor], scheduler: Any
) -> np.ndarray:
    """cx, c0, c1, c2 with as little history as explains the step."""
    for depth in range(3):
        history = before[-depth:][::-1] if depth else []
        found = _fit(after, [x, m0, *history], scheduler, strict=depth == min(2, len(before)))
        if found is not None:
            return np.concatenate([found, np.zeros(4 - len(found))])
    raise AssertionError("the last fit is strict")


def _fit(target: torch.Tensor, terms: list[torch.Tensor], scheduler: Any, strict: bool = True) -> Any:
    """Weights of the terms that give the target exactly; None (or ModelError when strict) if none do."""
    matrix = torch.stack(terms, 1).numpy()
    weights = np.linalg.lstsq(matrix, target.numpy(), rcond=None)[0]
    residual = np.abs(matrix @ weights - target.numpy()).max()
    if residual <= 1e-5 * max(1.0, float(target.abs().max())):
        return weights
    if not strict:
        return None
    raise ModelError(
        f"{type(scheduler).__name__} with this configuration does not come down to two steps of history "
        f"(residual {residual:.1e}); set model.scheduler to one of {', '.join(SUPPORTED)}"
    )


def _saturated(
    scheduler: Any, steps: int, index: int, t: torch.Tensor, a: float, s: float, clip: float
) -> tuple[float, float, float]:
    """cx, ce, c0 of a clamping one-step scheduler, from points whose clean image lies far beyond the clamp."""
    fresh = _prepared(scheduler, steps, index)
    towards = np.array([a, s]) / np.hypot(a, s)
    far = 1e3 * clip / np.hypot(a, s) * towards
    along = np.array([-towards[1], towards[0]])  # moves x and e while m0 stays
    points = np.stack([far, 2 * far, far + along])
    x, e = torch.from_numpy(points[:, 0].copy()), torch.from_numpy(points[:, 1].copy())
    out = fresh.step(e, t, x).prev_sample.double().numpy()
    cx, ce, c0 = np.linalg.solve(np.column_stack([points, np.full(3, clip)]), out)
    return cx, ce, c0


def _check(scheduler: Any, steps: int, table: SolverTable) -> None:
    """Run the table beside `scheduler.step` on random inputs."""
    fresh = _prepared(scheduler, steps, table.start)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(64, generator=random, dtype=torch.float64)
    if table.clip is None:
        x *= float(fresh.init_noise_sigma)
    mine, history = x.clone(), [torch.zeros_like(x)] * 2
    for row, t in zip(table.coef, fresh.timesteps[table.start :], strict=True):
        fresh.scale_model_input(x, t)
        e = torch.randn(64, generator=random, dtype=torch.float64)
        x = fresh.step(e, t, x).prev_sample.double()
        m0 = row[A] * mine + row[S] * e
        if table.clip is not None:
            m0 = m0.clamp(-table.clip, table.clip)
        mine = row[CX] * mine + row[CE] * e + row[C0] * m0 + row[C1] * history[0] + row[C2] * history[1]
        history = [m0, history[0]]
    error = ((x - mine).abs().max() / x.std()).item()
    if not error <= 1e-4:
        raise ModelError(
            f"the coefficients found for {type(scheduler).__name__} do not reproduce its own step (error {error:.1e}); "
            f"set model.scheduler to one of {', '.join(SUPPORTED)}"
        )
