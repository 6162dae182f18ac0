"""Stepped solver: a diffusers scheduler run through its own `step`, with our noise, where the fused kernel cannot.

Slower than the fused step (many small operations, some wait for the device) and exact by construction.
"""

from functools import partial
from typing import Any

import numpy as np
import torch

from streamaug.errors import ModelError
from streamaug.kernels.philox import normal
from streamaug.sampling.solvers.driver import Driver, learned_variance
from streamaug.sampling.solvers.probe import probe
from streamaug.sampling.solvers.schedulers import setting


class SteppedSolver:
    """The evaluations from solver step `start` to the end, by `scheduler.step`.

    timesteps: float64 [E], what the network is told; learned_variance: whether `advance` takes the network's variance
    too, twice the channels; x0_scale, clean: as in SolverTable; clip: the bound of the predicted clean image, or None.
    options, timing: keyword arguments of `scheduler.step` and of `set_timesteps`. Raises ModelError when the
    scheduler cannot be used, or draws noise that does not come from us.
    """

    def __init__(
        self,
        scheduler: Any,
        steps: int,
        start: int = 0,
        *,
        options: dict[str, Any] | None = None,
        timing: dict[str, Any] | None = None,
    ):
        make = partial(Driver, scheduler, steps, start, options=options, timing=timing)
        self.start = start
        self.learned_variance = learned_variance(scheduler)
        self._make = make
        self._drivers = {torch.device("cpu"): make()}
        driver = self._drivers[torch.device("cpu")]
        self.timesteps: np.ndarray = driver.timesteps.double().numpy()
        clamps = ("clip_sample", "clip_denoised", "thresholding")
        plain: dict[str, Any] = {key: False for key in clamps if setting(scheduler, key)}
        if self.learned_variance:
            plain["variance_type"] = "fixed_small"
        found = probe(make, scheduler, plain)
        self.in_first = float(found.in_scale[0])
        self.x0_scale = found.x0_scale
        self.clean = found.clean
        self.thresholding = bool(setting(scheduler, "thresholding"))
        self.clip: float | None = None
        if not self.thresholding and (setting(scheduler, "clip_sample") or setting(scheduler, "clip_denoised")):
            self.clip = float(setting(scheduler, "clip_sample_range") or 1.0)
        self.noisy = found.stochastic()
        self._check(type(scheduler).__name__)

    def __len__(self) -> int:
        return len(self.timesteps)

    def begin(self, x: torch.Tensor, ids: torch.Tensor, *, seed: int, stream: int = 1) -> "SteppedRun":
        """A run of a batch: x fp32 [B, ...] as it enters, ids int64 [B], which with the seed choose the noise."""
        if x.device not in self._drivers:
            self._drivers[x.device] = self._make(device=x.device)
        return SteppedRun(self, self._drivers[x.device].copy(), x, ids, seed, stream)

    def _check(self, name: str) -> None:
        """Two runs of the same images give the same finite result, whatever the global generator holds."""
        results = []
        random = torch.Generator().manual_seed(0)
        shape = (2, 3, 8, 8)
        x = torch.randn(shape, generator=random) * self._initial_noise()
        outputs = [torch.randn(shape, generator=random) for _ in range(len(self))]
        if self.learned_variance:
            outputs = [torch.cat([output, torch.rand(shape, generator=random)], 1) for output in outputs]
        for _ in range(2):
            run = self.begin(x, torch.arange(2), seed=0)
            for i, output in enumerate(outputs):
                run.network_input(i)
                run.advance(i, output)
            results.append(run.x)
        if not torch.isfinite(results[0]).all():
            raise ModelError(f"{name} gives values that are not finite with this configuration")
        if not torch.equal(*results):
            raise ModelError(f"{name} draws random numbers of its own, so its images cannot be made again")

    def _initial_noise(self) -> float:
        return float(getattr(self._drivers[torch.device("cpu")].scheduler, "init_noise_sigma", 1.0))


class SteppedRun:
    """One batch on its way: x is fp32 [B, ...] before the evaluation that comes next."""

    def __init__(
        self, solver: SteppedSolver, driver: Driver, x: torch.Tensor, ids: torch.Tensor, seed: int, stream: int
    ):
        self.x = x
        self._solver, self._driver = solver, driver
        self._ids, self._seed, self._stream = ids, seed, stream

    def network_input(self, evaluation: int) -> torch.Tensor:
        """x as the network wants it, fp32 [B, ...]; to be called once before each `advance`."""
        return self._driver.network_input(evaluation, self.x)

    def advance(self, evaluation: int, model_output: torch.Tensor) -> None:
        """Move x on by the network's output [B, ...] (guidance done; twice the channels with a learned variance)."""

        def noise(shape: torch.Size) -> torch.Tensor:
            return normal(self._ids, shape[1:], seed=self._seed, stream=self._stream, step=evaluation)

        after, _ = self._driver.step(evaluation, model_output.float(), self.x, noise)
        self.x = after.float()

    def predicted_clean(self, evaluation: int, model_output: torch.Tensor) -> torch.Tensor:
        """The clean image the network's output [B, ...] stands for, clamped or thresholded as the scheduler does.

        Raises ModelError when the scheduler does not tell.
        """
        solver = self._solver
        if solver.clean is None:
            raise ModelError("this scheduler does not tell the predicted clean image, which classifier guidance needs")
        on_x, on_e = solver.clean[evaluation]
        clean = float(on_x) * self.x + float(on_e) * model_output[:, : self.x.shape[1]].float()
        if solver.thresholding:
            return self._driver.scheduler._threshold_sample(clean)
        return clean if solver.clip is None else clean.clamp(-solver.clip, solver.clip)
