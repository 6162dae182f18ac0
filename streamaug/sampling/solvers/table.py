"""Solver table: the few coefficients a diffusers scheduler's step comes down to, found by probing the object itself.

The recurrence is the one that the `step` kernel runs, one row per network evaluation:

    h0 = clamp(a·x + s·e)            kept for the next four evaluations as h1, ..., h4
    x' = cx·x + ce·e + c0·h0 + c1·h1 + c2·h2 + c3·h3 + c4·h4 + cn·ξ

h is the predicted clean image where that gives the shortest history, else what the scheduler itself keeps (the noise,
a derivative). What needs more history, or is no linear function, runs through `scheduler.step` (`stepped`).
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from streamaug.errors import ModelError
from streamaug.kernels.step import HISTORY, Column
from streamaug.sampling.solvers.driver import Driver, learned_variance, schedule_of
from streamaug.sampling.solvers.probe import Probe, probe
from streamaug.sampling.solvers.schedulers import make_scheduler, setting
from streamaug.sampling.solvers.stepped import SteppedSolver

__all__ = ["NotFused", "SolverTable", "SteppedSolver", "make_scheduler", "schedule_of", "solver_for", "solver_table"]

_log = logging.getLogger("streamaug")
_A_S = [Column.A, Column.S]
_PAST = [Column.C0, Column.C1, Column.C2, Column.C3, Column.C4]
_FIT = 2e-6  # of the largest weight: schedulers compute in fp32
_EXACT, _EXACT_FP32 = 1e-5, 5e-5  # of the result's standard deviation, with the table in float64 and in fp32
_said: set[str] = set()


class NotFused(ModelError):
    """The scheduler's step does not come down to the recurrence; `solver_for` then steps the scheduler itself."""


@dataclass(frozen=True)
class SolverTable:
    """The evaluations from solver step `start` to the end.

    coef: float64 [E, len(Column)], the guidance column left to the sampler; timesteps: float64 [E], what the network
    is told; in_first: the factor on the latent for the first evaluation; clip: bound of h0 (then the predicted clean
    image), or None; x0_scale: float64 [E], (noise scale / signal scale)² of each evaluation, and clean: float64
    [E, 2], the predicted clean image (before the clamp) as clean[:, 0]·x + clean[:, 1]·e, None if the scheduler
    cannot tell: what classifier guidance needs. error: of the check against `scheduler.step`, in standard deviations.
    """

    start: int
    coef: np.ndarray
    timesteps: np.ndarray
    in_first: float
    clip: float | None
    x0_scale: np.ndarray
    clean: np.ndarray | None = None
    error: float = 0.0

    learned_variance = False

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def history(self) -> int:
        """Evaluations that a step looks at: 1 is the present one alone."""
        used = [age for age, column in enumerate(_PAST) if (self.coef[:, column] != 0).any()]
        return 1 + max(used, default=0)

    @property
    def noisy(self) -> bool:
        return bool((self.coef[:, Column.CN] != 0).any())


def solver_for(
    scheduler: Any,
    steps: int,
    start: int = 0,
    *,
    options: dict[str, Any] | None = None,
    timing: dict[str, Any] | None = None,
) -> SolverTable | SteppedSolver:
    """The fused solver of a scheduler, or the scheduler itself behind `SteppedSolver` where there is none.

    start: the solver step at which the images enter; options: keyword arguments of `scheduler.step`, such as
    {"eta": 1.0}; timing: keyword arguments of `set_timesteps` (mu, sigmas, timesteps, ...). Which of the two runs is
    logged once for each scheduler class. Raises ModelError when the scheduler can do neither.
    """
    try:
        return solver_table(scheduler, steps, start, options=options, timing=timing)
    except NotFused as why:
        stepped = SteppedSolver(scheduler, steps, start, options=options, timing=timing)
        name = type(scheduler).__name__
        if name not in _said:
            _said.add(name)
            _log.info("%s runs step by step, slower than the fused solver and as exact: %s", name, why)
        return stepped


def solver_table(
    scheduler: Any,
    steps: int,
    start: int = 0,
    *,
    options: dict[str, Any] | None = None,
    timing: dict[str, Any] | None = None,
) -> SolverTable:
    """The table for images that enter at solver step `start`, checked against `scheduler.step` on random inputs.

    options, timing: as for `solver_for`. Raises NotFused when the step does not come down to the recurrence,
    ModelError when the scheduler cannot be used at all.
    """
    make = partial(Driver, scheduler, steps, start, options=options, timing=timing)
    if setting(scheduler, "thresholding"):
        raise NotFused("dynamic thresholding looks at whole images")
    if learned_variance(scheduler):
        raise NotFused(f"variance_type {scheduler.config.variance_type}: the network's variance scales the noise")
    clip, unclamped = _clamp(scheduler)
    found = probe(make, scheduler, unclamped)
    coef, error = _recurrence(make, scheduler, found, clip)
    coef[:-1, Column.IN_NEXT] = found.in_scale[1:]
    coef[-1, Column.IN_NEXT] = 1.0
    timesteps = make().timesteps.double().numpy()
    return SolverTable(start, coef, timesteps, float(found.in_scale[0]), clip, found.x0_scale, found.clean, error)


def _clamp(scheduler: Any) -> tuple[float | None, dict[str, Any]]:
    """The bound of the predicted clean image, None if it has none, and the setting that takes it away."""
    if setting(scheduler, "clip_sample"):
        return float(setting(scheduler, "clip_sample_range") or 1.0), {"clip_sample": False}
    if setting(scheduler, "clip_denoised"):
        return 1.0, {"clip_denoised": False}
    return None, {}


def _recurrence(make: Any, scheduler: Any, found: Probe, clip: float | None) -> tuple[np.ndarray, float]:
    """float64 [E, len(Column)] with A, S, CX, CE, C0..C4 and CN, and its error against `scheduler.step`."""
    failure: NotFused | None = None
    for pairs, direct in _candidates(make, scheduler, found, clip):
        try:
            coef = _fit(found, pairs, direct)
            return coef, _check(make(), coef, clip)
        except NotFused as error:
            failure = failure or error
    raise failure or NotFused("it clamps a prediction that it does not tell")


def _candidates(
    make: Any, scheduler: Any, found: Probe, clip: float | None
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """What h may be, as weights of x and e [E, 2], and the weights of x and e beside it [E, 2] if they are known."""
    raw = np.tile([0.0, 1.0], (len(found), 1))
    if clip is None and all(_reads_only_now(found, i) for i in range(len(found))):
        yield raw if found.clean is None else found.clean, np.stack([found.on_x.diagonal(), found.on_e.diagonal()], 1)
    elif clip is None:
        yield from ((pairs, None) for pairs in (found.clean, found.converted, _kept(found), raw) if pairs is not None)
    elif found.clean is not None and setting(scheduler, "clip_sample_range") is not None:
        # A bound of 0 takes the clamped prediction out of the step: what is left acts on x and e directly.
        yield found.clean, _direct(probe(make, scheduler, {"clip_sample_range": 0.0}))
    elif found.clean is not None:
        yield found.clean, np.zeros((len(found), 2))


def _reads_only_now(found: Probe, i: int) -> bool:
    return not (found.on_x[i, :i].any() or found.on_e[i, :i].any() or found.on_noise[i, :i].any())


def _kept(found: Probe) -> np.ndarray:
    """What the scheduler keeps of an evaluation, as weights of x and e, seen by what later steps do with it."""
    pairs = np.tile([0.0, 1.0], (len(found), 1))
    for i in range(len(found) - 1):
        later = np.stack([found.on_x[i + 1 :, i], found.on_e[i + 1 :, i]], 1)
        strongest = later[np.abs(later[:, 1]).argmax()]
        if strongest[1] != 0:
            pairs[i] = strongest / strongest[1]
    return pairs


def _trajectory(found: Probe) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x before each evaluation and after the last, in the symbols of x_T, the outputs and the noise.

    Returns (x [E + 1, 1 + 2E], the symbols of e [E, 1 + 2E], those of ξ [E, 1 + 2E]).
    """
    count = len(found)
    x = np.zeros((count + 1, 1 + 2 * count))
    outputs, noise = np.eye(count, 1 + 2 * count, 1), np.eye(count, 1 + 2 * count, 1 + count)
    x[0, 0] = 1.0
    for i in range(count):
        now = i + 1
        x[now] = (
            found.on_x[i, :now] @ x[:now] + found.on_e[i, :now] @ outputs[:now] + found.on_noise[i, :now] @ noise[:now]
        )
    return x, outputs, noise


def _direct(rest: Probe) -> np.ndarray:
    """cx and ce of every step, from the run whose clamped predictions are 0: float64 [E, 2]."""
    x, outputs, noise = _trajectory(rest)
    direct = np.zeros((len(rest), 2))
    for i in range(len(rest)):
        target = x[i + 1] - rest.on_noise[i, i] * noise[i]
        if _reads_only_now(rest, i):
            direct[i] = rest.on_x[i, i], rest.on_e[i, i]
        else:
            direct[i], residual = _weights(target, [x[i], outputs[i]])
            if residual > _FIT:
                raise NotFused("it keeps more of an evaluation than the clamped prediction")
    return direct


def _fit(found: Probe, pairs: np.ndarray, direct: np.ndarray | None) -> np.ndarray:
    """The recurrence with h = pairs[:, 0]·x + pairs[:, 1]·e; direct: cx and ce if they are known. Raises NotFused."""
    x, outputs, noise = _trajectory(found)
    h = pairs[:, :1] * x[:-1] + pairs[:, 1:] * outputs
    coef = np.zeros((len(found), len(Column)))
    coef[:, _A_S] = pairs
    coef[:, Column.CN] = found.on_noise.diagonal()
    for i in range(len(found)):
        target = x[i + 1] - found.on_noise[i, i] * noise[i]
        past = [h[i - age] for age in range(min(i + 1, HISTORY))]
        terms: list[np.ndarray] = [x[i]] if direct is None else []
        if direct is not None:
            coef[i, [Column.CX, Column.CE]] = direct[i]
            target = target - direct[i] @ np.stack([x[i], outputs[i]])
        weights = np.zeros(0)
        if not np.abs(target).max() <= 1e-12 * np.abs(x[i + 1]).max():
            weights = _shortest(target, terms, past)
        if direct is None:
            coef[i, Column.CX], weights = (weights[0], weights[1:]) if len(weights) else (0.0, weights)
        coef[i, _PAST[: len(weights)]] = weights
    return coef


def _shortest(target: np.ndarray, terms: list[np.ndarray], past: list[np.ndarray]) -> np.ndarray:
    """The weights with as little of the past as explains the target as well as all of it. Raises NotFused."""
    fits = [_weights(target, terms + past[:depth]) for depth in range(1, len(past) + 1)]
    best = min(residual for _, residual in fits)
    if best > _FIT:
        raise NotFused(f"a step looks further back than {HISTORY} evaluations, or at more than one thing of each")
    return next(weights for weights, residual in fits if residual <= max(4 * best, 1e-11))


def _weights(target: np.ndarray, terms: list[np.ndarray]) -> tuple[np.ndarray, float]:
    """Weights of the terms that come closest to the target, and what is left of it, as a part of its largest entry."""
    matrix = np.stack(terms, 1)
    size = np.linalg.norm(matrix, axis=0)
    weights = np.linalg.lstsq(matrix / size, target, rcond=None)[0] / size
    return weights, float(np.abs(matrix @ weights - target).max() / np.abs(target).max())


def _check(driver: Driver, coef: np.ndarray, clip: float | None) -> float:
    """Run the table beside `scheduler.step` on random inputs, in float64 and in fp32; returns the larger error.

    The outputs resemble one another from step to step, as a network's do. Raises NotFused.
    """
    random = torch.Generator().manual_seed(0)
    shape = (1, 2, 8, 8)
    x = torch.randn(shape, generator=random, dtype=torch.float64)
    if clip is None:
        x *= float(getattr(driver.scheduler, "init_noise_sigma", 1.0))
    common = torch.randn(shape, generator=random, dtype=torch.float64)
    ours = {
        dtype: [x.to(dtype)] + [torch.zeros(shape, dtype=dtype)] * HISTORY for dtype in (torch.float64, torch.float32)
    }
    for i, row in enumerate(coef):
        driver.network_input(i, x)
        e = 0.8 * common + 0.6 * torch.randn(shape, generator=random, dtype=torch.float64)
        noise = torch.randn(shape, generator=random, dtype=torch.float64)
        x = driver.step(i, e, x, lambda shape, noise=noise: noise)[0].double()  # type: ignore[misc]
        for dtype, (mine, *history) in ours.items():
            ours[dtype] = recur(row, mine, e.to(dtype), noise.to(dtype), history, clip)
    errors = [float((x - state[0]).abs().max() / x.std()) for state in ours.values()]
    if not (errors[0] <= _EXACT and errors[1] <= _EXACT_FP32):
        raise NotFused(
            f"the coefficients found do not reproduce its step well enough: the error is {errors[0]:.0e} of a standard "
            f"deviation, {errors[1]:.0e} in fp32"
        )
    return errors[0]


def recur(
    row: np.ndarray,
    x: torch.Tensor,
    e: torch.Tensor,
    noise: torch.Tensor,
    history: list[torch.Tensor],
    clip: float | None,
) -> list[torch.Tensor]:
    """One evaluation in the inputs' own precision: the next x and the history, newest first.

    row: float64 [len(Column)]; history: the h of the evaluations before, newest first.
    """
    h = float(row[Column.A]) * x + float(row[Column.S]) * e
    if clip is not None:
        h = h.clamp(-clip, clip)
    kept = [h, *history][:HISTORY]
    x = float(row[Column.CX]) * x + float(row[Column.CE]) * e + float(row[Column.CN]) * noise
    for column, value in zip(_PAST, kept, strict=True):
        x = x + float(row[column]) * value
    return [x, *kept]
