"""The ddim method: the sampler run backwards, from an image to the latent that the sampler makes this image from.

A deterministic solver step is x' = (cx + c0·a)·x + (ce + c0·s)·e(x), with e what the network predicts at x (see
`solvers.table`). Its inverse is a fixed point in x, since e is wanted where the step began. Taking e at x', where it
ended, is the plain DDIM inversion (Song, Meng & Ermon 2021; Mokady et al. 2023); iterating solves it (Pan et al. 2023,
"AIDI"), here with Anderson acceleration of depth 1, which also converges where the prediction's weight is large.

A clamp of the predicted clean image (`clip_sample`) has no inverse. It is off where a bank has this method (see
`engine.solver_settings`), unless the configuration asks for it: then it is left out on the way back, and the image that
comes back differs by what it does; "ddim.error" says how much. Measured with the prior of
the digits configuration on 64 held-out images, fp16 rows: relative error by iterations, mean (largest):

                               0              1              2              5
    50 steps                   1.8% (12%)     0.7% (2.3%)    0.6% (0.9%)    0.4% (0.7%)
    50 steps, clip_sample      4.6% (11%)                                   3.3% (5.2%)
    20 steps                   3.7% (15%)     1.3% (8.1%)    1.1% (2.3%)    0.6% (1.3%)
    5 steps                    10% (21%)      6.1% (16%)     4.0% (7.0%)    1.8% (3.1%)
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamaug.bank import Checkpoint, Part
from streamaug.config import Config
from streamaug.engine import load_settings, resolve_device, solver_settings, told_besides
from streamaug.errors import ConfigError, ModelError
from streamaug.inversion.encode import Codec, relative_error, row_bytes
from streamaug.kernels.step import Column
from streamaug.orders import ORDER_DTYPE, OrderBatch, Schedule
from streamaug.sampling import denoisers
from streamaug.sampling.denoisers import Denoiser, ModelInfo
from streamaug.sampling.guidance import combine
from streamaug.sampling.solvers.driver import Driver, learned_variance
from streamaug.sampling.solvers.probe import probe
from streamaug.sampling.solvers.schedulers import configured, setting
from streamaug.sampling.solvers.table import SolverTable, schedule_of, solver_for

_log = logging.getLogger("streamaug")

_LATENT_CELLS = 1 << 18  # computed together at most: 64 latents of 64 x 64
_GROUP_ROWS = 64
_SAME_LEVEL = 0.02  # of the latent's standard deviation
_DISTILLED = ("LCM", "TCD", "CM", "FlowMatchLCM")  # their samplers jump to the clean image: no path to go back
_LEAST_SLOPE = 0.5  # of the growth; a smaller weight of x does not tell how the result moves with x, the growth does
_said: set[str] = set()

Predict = Callable[[torch.Tensor, int], torch.Tensor]
"""The network's output at x fp32 [n, c, h, w] before the given step, guidance done."""


@dataclass(frozen=True)
class Steps:
    """Deterministic solver steps of one evaluation each: m0 = clamp(a·x + s·e), x' = cx·x + ce·e + c0·m0.

    coef: float64 [E, 5], the columns a, s, cx, ce, c0; timesteps: float64 [E], what the network is told; in_scale:
    float64 [E], the factor on its input; growth: float64 [E], the standard deviation of a noised image after the step,
    as a multiple of that before; clip: the bound of m0, or None.
    """

    coef: np.ndarray
    timesteps: np.ndarray
    in_scale: np.ndarray
    growth: np.ndarray
    clip: float | None = None

    def __len__(self) -> int:
        return len(self.coef)


def steps_of(
    scheduler: Any,
    steps: int,
    start: int = 0,
    *,
    options: dict[str, Any] | None = None,
    timing: dict[str, Any] | None = None,
) -> Steps:
    """The scheduler's own steps from solver step `start` on, where they are deterministic and look at no other step.

    Else (multistep, second-order and stochastic schedulers) those of DDIM between the same noise levels: the predicted
    clean image and the predicted noise are kept, and mixed anew. With noise scaled instead of signal this is Euler's
    step, for flow matching flow-match Euler's. The log says so once a scheduler class. options, timing: as for
    `solver_for`. Raises ModelError.
    """
    solver = solver_for(scheduler, steps, start, options=options, timing=timing)
    schedule = schedule_of(scheduler, steps, options=options, timing=timing)
    one_step = isinstance(solver, SolverTable) and solver.history == 1 and not solver.noisy
    if isinstance(solver, SolverTable) and one_step and len(solver) == steps - start:
        columns = [Column.A, Column.S, Column.CX, Column.CE, Column.C0]
        in_scale = np.append(solver.in_first, solver.coef[:-1, Column.IN_NEXT])
        size = np.hypot(schedule.signal, schedule.noise)[start:]
        return Steps(solver.coef[:, columns], solver.timesteps, in_scale, size[1:] / size[:-1], solver.clip)
    name = type(scheduler).__name__
    if name not in _said:
        _said.add(name)
        _log.warning(
            "bank.methods ddim: %s as configured has no steps of its own to run backwards; images are inverted by DDIM "
            "between the same noise levels, and come back closely only where model.scheduler is ddim, euler or "
            "flow_euler",
            name,
        )
    return _ddim_steps(scheduler, schedule, start, options, timing)


def _ddim_steps(
    scheduler: Any, schedule: Schedule, start: int, options: dict[str, Any] | None, timing: dict[str, Any] | None
) -> Steps:
    clamps = ("clip_sample", "clip_denoised", "thresholding")
    plain: dict[str, Any] = {key: False for key in clamps if setting(scheduler, key)}
    if learned_variance(scheduler):
        plain["variance_type"] = "fixed_small"
    make = partial(Driver, scheduler, schedule.steps, start, options=options, timing=timing)
    found, driver = probe(make, scheduler, plain), make()
    if found.clean is None:
        raise ModelError(
            f"{type(scheduler).__name__} does not tell the predicted clean image, so nothing can be inverted by it; "
            "set model.scheduler to ddim or euler, or take ddim out of bank.methods"
        )
    signal, noise = schedule.signal[start:], schedule.noise[start:]
    # A scheduler that visits a noise level twice, as PNDM does, is inverted in one go.
    moves = np.flatnonzero(np.diff(noise))
    at = np.array([driver.entry(start + step) - driver.first for step in moves.tolist()])
    kept = noise[moves + 1] / noise[moves]
    from_clean = signal[moves + 1] - signal[moves] * kept
    coef = np.column_stack([found.clean[at], kept, np.zeros(len(at)), from_clean])
    size = np.hypot(signal, noise)
    return Steps(coef, driver.timesteps.double().numpy()[at], found.in_scale[at], size[moves + 1] / size[moves])


@torch.no_grad()
def run_backwards(x: torch.Tensor, steps: Steps, predict: Predict, iterations: int) -> torch.Tensor:
    """What enters the steps, fp32 [n, c, h, w], for x to come out of them, with 1 + iterations predictions a step."""
    for i in reversed(range(len(steps))):
        x = _solve(x, i, steps, predict, iterations)
    return x


def _solve(after: torch.Tensor, i: int, steps: Steps, predict: Predict, iterations: int) -> torch.Tensor:
    """x with on_x·x + on_e·e(x) = after."""
    a, s, cx, ce, c0 = steps.coef[i].tolist()
    on_x, on_e, growth = cx + c0 * a, ce + c0 * s, float(steps.growth[i])
    slope = on_x if on_x >= _LEAST_SLOPE * growth else growth
    x, last = after / growth, None
    for _ in range(iterations + 1):
        missing = (after - on_x * x - on_e * predict(x, i)) / slope
        moved = x + missing
        x = moved if last is None else _accelerated(moved, missing, *last)
        last = moved, missing
    return x


def _accelerated(
    moved: torch.Tensor, missing: torch.Tensor, moved_before: torch.Tensor, missing_before: torch.Tensor
) -> torch.Tensor:
    """Anderson acceleration: the mixture of two iterates whose residual, were the map linear, would be least."""
    change = missing - missing_before
    share = (missing * change).flatten(1).sum(1) / change.square().flatten(1).sum(1).clamp(min=1e-30)
    return moved - share.view(-1, 1, 1, 1) * (moved - moved_before)


@torch.no_grad()
def run_forwards(x: torch.Tensor, steps: Steps, predict: Predict) -> torch.Tensor:
    """What comes out of the steps when x enters, fp32 [n, c, h, w], as the sampler computes it."""
    for i in range(len(steps)):
        a, s, cx, ce, c0 = steps.coef[i].tolist()
        e = predict(x, i)
        clean = a * x + s * e
        if steps.clip is not None:
            clean = clean.clamp(-steps.clip, steps.clip)
        x = cx * x + ce * e + c0 * clean
    return x


class Ddim:
    """Tensors: "inverted" [n, c, h, w], and "ddim.error" [n] of the latent that the sampler makes of it.

    A row is in the sampler's own units at the solver step where images of `bank.ddim.depth` enter: what `orders` with
    weight 1 hand to the sampler. It is conditioned as sampling is, on the label or its first prompt wording, at
    `bank.ddim.guidance` throughout (guidance_interval and guidance_rescale are left out).
    """

    def __init__(self, info: ModelInfo, config: Config, prompts: Path | None, codec: Codec):
        """prompts: the file of encoded prompts, for models that take them. No weights are read.

        Raises ConfigError for a guidance that the model has no condition to leave out for, a scheduler of distilled
        models, and `bank.ddim.steps` of which none begins where sampling does at that depth, within 2%.
        """
        self._info, self._prompts, self._codec = info, prompts, codec
        self._model, self._settings = config.model, config.bank.ddim
        self._device = resolve_device(config.model.device)
        self._dtype = _network_dtype(config.model.dtype, self._device)
        self._null_class = info.null_class if config.model.null_class is None else config.model.null_class
        self._load_settings = load_settings(config, info, self._device, self._dtype, prompts, decodes=False)
        self._scheduler, self._options, _ = solver_settings(config, info)
        self._check_guidance()
        self._check_scheduler()
        self.steps = self._settings.steps or config.model.steps
        self.start = self._entry()
        self._timing = denoisers.timing(info, self._scheduler, self.steps)
        meta = {
            "model": info.digest,
            "class_ids": info.class_ids,
            "latent_shape": list(info.latent_shape),
            "scheduler": _digest(self._scheduler),
            "options": self._options,
            "timing": self._timing,
            "steps": self.steps,
            "depth": self._settings.depth,
            "iterations": self._settings.iterations,
            "guidance": self._settings.guidance,
            "null_class": self._null_class,
            "prompts": None if prompts is None else prompts.stem,  # named by the hash of what they came from
            "network_dtype": str(self._dtype).removeprefix("torch."),
            **told_besides(config.model),
        }
        _, height, width = info.latent_shape
        rows = max(1, min(_GROUP_ROWS, _LATENT_CELLS // (height * width)))
        self.part = Part("ddim", meta, rows, config.bank.dtype, row_bytes(info, config.bank))

    @property
    def evaluations(self) -> int:
        """How often the network runs on each image, the check of what comes back included."""
        return len(self.solver) * (self._settings.iterations + 2)

    @cached_property
    def solver(self) -> Steps:
        """The steps that are run, backwards and forwards."""
        if setting(self._scheduler, "clip_sample"):
            _log.warning(
                "bank.methods ddim: model.scheduler_config.clip_sample asks for a clamp of the sampler's predictions, "
                "which cannot be inverted, so images come back less closely (see ddim.error)"
            )
        return steps_of(self._scheduler, self.steps, self.start, options=self._options, timing=self._timing)

    def compute(
        self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray, checkpoint: Checkpoint
    ) -> dict[str, torch.Tensor]:
        clean = self._codec.encode(images).to(self._device)
        predict = self._predictor(labels)
        inverted = run_backwards(clean, self.solver, predict, self._settings.iterations).to(self.part.torch_dtype)
        back = run_forwards(inverted.float(), self.solver, predict)
        return {"inverted": inverted, "ddim.error": relative_error(back, clean)}

    def _predictor(self, labels: np.ndarray) -> Predict:
        """The network for images of these labels, int64 [n]."""
        denoiser, scale, count = self._denoiser, self._settings.guidance, len(labels)
        images = np.zeros(count, ORDER_DTYPE)
        images["label"] = images["label_b"] = labels
        images["row_a"] = images["row_b"] = -1
        images["guidance"] = scale
        guided = denoiser.guidance == "cfg" and scale > 1.0
        conditioning = denoiser.condition(OrderBatch(0, self.start, 0, 0, images), {}, guided)
        timesteps = torch.from_numpy(self.solver.timesteps).to(self._device, torch.float32)
        scales = torch.full((count,), scale, device=self._device)
        layout = torch.channels_last if self._model.channels_last else torch.contiguous_format

        def predict(x: torch.Tensor, i: int) -> torch.Tensor:
            given = (x * float(self.solver.in_scale[i])).to(denoiser.dtype).repeat(1 + guided, 1, 1, 1)
            out = denoiser(given.contiguous(memory_format=layout), timesteps[i], conditioning)
            out = out[:, : x.shape[1]].float()
            return combine(out, scales) if guided else out

        return predict

    @cached_property
    def _denoiser(self) -> Denoiser:
        return denoisers.load(self._info, self._load_settings)

    def _check_guidance(self) -> None:
        if self._settings.guidance <= 1.0 or self._info.guidance == "embedded":
            return
        if self._info.guidance == "none":
            raise ConfigError("bank.ddim.guidance: this model has no condition to leave out; set it to 1")
        if self._info.conditioning == "class" and self._null_class is None:
            raise ConfigError(
                "bank.ddim.guidance: needs the class that means 'no class': set model.null_class, or guidance to 1"
            )

    def _check_scheduler(self) -> None:
        name = type(self._scheduler).__name__
        if name.startswith(_DISTILLED):
            raise ConfigError(
                f"bank.methods: ddim runs an ODE solver backwards, and {name} is none: it jumps to the clean image and "
                "adds noise; set model.scheduler to ddim or euler for a model that was not distilled, or leave ddim out"
            )

    def _entry(self) -> int:
        """The solver step at which images enter: where the noise level is that of sampling at the same depth.

        Raises ConfigError when none of `bank.ddim.steps` begins near it.
        """
        asked, sampled, depth = self._settings.steps, self._model.steps, self._settings.depth
        schedule = self._schedule(self._scheduler, sampled)
        start = schedule.start_of(depth)
        if asked in (None, sampled):
            return start
        found = self._nearest_entry(self._scheduler, asked)
        if found is not None:
            return found
        spacings = [
            spacing
            for spacing in ("trailing", "linspace", "leading")
            if setting(self._scheduler, "timestep_spacing") not in (None, spacing)
            and self._nearest_entry(configured(self._scheduler, {"timestep_spacing": spacing}), asked) is not None
        ]
        respaced = f", or model.scheduler_config.timestep_spacing to {' or '.join(spacings)}" if spacings else ""
        raise ConfigError(
            f"bank.ddim.steps {asked}: at depth {depth:g}, sampling in {sampled} steps begins with signal "
            f"{schedule.signal[start]:.3f} and noise {schedule.noise[start]:.3f}, and none of {asked} steps begins "
            f"within {_SAME_LEVEL:.0%} of that; set bank.ddim.steps to null{respaced}"
        )

    def _nearest_entry(self, scheduler: Any, steps: int) -> int | None:
        """Which of that many steps begins where sampling does at this depth, None if none does."""
        sampled = self._schedule(scheduler, self._model.steps)
        start = sampled.start_of(self._settings.depth)
        signal, noise = sampled.signal[start], sampled.noise[start]
        ours = self._schedule(scheduler, steps)
        distance = np.maximum(np.abs(ours.signal - signal), np.abs(ours.noise - noise))[:-1]
        nearest = int(distance.argmin())
        return nearest if distance[nearest] <= _SAME_LEVEL * np.hypot(signal, noise) else None

    def _schedule(self, scheduler: Any, steps: int) -> Schedule:
        when = denoisers.timing(self._info, scheduler, steps)
        return schedule_of(scheduler, steps, options=self._options, timing=when)


def _network_dtype(name: str, device: torch.device) -> torch.dtype:
    """What the sampler computes in, so that it is the sampler's network that is inverted."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def _digest(scheduler: Any) -> str:
    """Hash of the scheduler's class and settings."""
    settings = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    described = json.dumps([type(scheduler).__name__, settings], sort_keys=True, default=str)
    return hashlib.sha256(described.encode()).hexdigest()[:16]
