"""Driver: runs a diffusers scheduler's own `step` through a schedule, with noise and start of our choosing.

The solver table is read off such a run and checked against another; the stepped solver is one.
"""

import contextlib
import copy
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from streamaug.errors import ModelError, nearest
from streamaug.orders import Schedule
from streamaug.sampling.solvers.schedulers import kind, refuse_other_jobs, setting

Noise = Callable[[torch.Size], torch.Tensor]

# `set_timesteps(n)` gives these n + 1 timesteps, of which the last is the end.
_END_INCLUDED = ("DDPMWuerstchenScheduler",)
_STEP_ARGUMENTS = ("self", "model_output", "timestep", "sample")
_NOT_OPTIONS = (*_STEP_ARGUMENTS, "generator", "variance_noise", "return_dict")
_REFUSALS = (
    NotImplementedError,
    ValueError,
    UnboundLocalError,
    AssertionError,
    IndexError,
    torch.linalg.LinAlgError,
)
_PATCHED = threading.RLock()


class Driver:
    """A fresh copy of a scheduler that enters at solver step `start`, as an image-to-image pipeline has it enter.

    options: keyword arguments of `scheduler.step` (`{"eta": 1.0}`); timing: those of `set_timesteps`
    (`mu`, `sigmas`, `timesteps`, ...); config: settings to change in the copy.
    timesteps: [E], what the network is told at each evaluation; first: the index of the first of them in the whole
    schedule. Raises ModelError.
    """

    def __init__(
        self,
        scheduler: Any,
        steps: int,
        start: int = 0,
        *,
        options: dict[str, Any] | None = None,
        timing: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        device: torch.device | str = "cpu",
    ):
        self.options = options or {}
        self.scheduler = copy.deepcopy(scheduler)
        name = type(scheduler).__name__
        refuse_other_jobs(name)
        _check_step(scheduler, self.options)
        changed = dict(config or {})
        if setting(scheduler, "variance_type") in ("learned", "learned_range") and not learned_variance(scheduler):
            changed["variance_type"] = None  # it would drop the variance: the sampler does so before
        self.scheduler.register_to_config(**changed)
        _set_timesteps(self.scheduler, steps, timing or {}, device)
        timesteps = self.scheduler.timesteps
        self._all = timesteps[:-1] if name in _END_INCLUDED else timesteps
        self.first = self.entry(start)
        if not 0 <= start < steps or self.first >= len(self._all):
            raise ModelError(f"start {start}: {name} has {len(self._all)} evaluations in {steps} steps")
        if start > 0 and name == "PNDMScheduler" and not setting(scheduler, "skip_prk_steps"):
            raise ModelError(
                "PNDMScheduler with Runge-Kutta steps starts at step 0 only; set model.scheduler_config to "
                "{skip_prk_steps: true}"
            )
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(self.first)
        self.timesteps = self._all[self.first :]
        self._brownian: _Brownian | None = None
        self._noiser: Any = None  # the scheduler that `noising` asks, which goes no step

    def __len__(self) -> int:
        return len(self.timesteps)

    def entry(self, step: int) -> int:
        """The evaluation at which solver step `step` begins."""
        return step * getattr(self.scheduler, "order", 1)

    def copy(self) -> "Driver":
        """An independent run from the same start."""
        other = copy.copy(self)
        other.scheduler = copy.deepcopy(self.scheduler)
        return other

    def network_input(self, evaluation: int, x: torch.Tensor) -> torch.Tensor:
        """x as the network wants it."""
        if not hasattr(self.scheduler, "scale_model_input"):
            return x
        return self.scheduler.scale_model_input(x, self.timesteps[evaluation])

    def converted(self, evaluation: int, model_output: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
        """What the scheduler makes of the network's output before its step; None if it has no such method."""
        if not hasattr(self.scheduler, "convert_model_output"):
            return None
        if self.scheduler.step_index is None:
            self.scheduler._init_step_index(self.timesteps[evaluation])
        with self._refusing():
            return self.scheduler.convert_model_output(model_output, sample=x)

    def step(
        self, evaluation: int, model_output: torch.Tensor, x: torch.Tensor, noise: Noise
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The next x, and the predicted clean image if the scheduler says it; `network_input` is called before."""
        t = self.timesteps[evaluation]
        if type(self.scheduler).__name__ in _END_INCLUDED:
            t = t[None]
        drawn = 0

        def draw(shape: torch.Size) -> torch.Tensor:
            nonlocal drawn
            drawn += 1
            if drawn > 1:
                raise ModelError(f"{type(self.scheduler).__name__} draws noise twice in a step, which is not supported")
            return noise(shape)

        with self._refusing(), self._noise_from(draw, x):
            output = self.scheduler.step(model_output, t, x, return_dict=True, **self.options)
        return output.prev_sample, getattr(output, "pred_original_sample", None)

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """Within it, what the scheduler cannot do is a ModelError."""
        try:
            yield
        except _REFUSALS as error:
            raise ModelError(
                f"{type(self.scheduler).__name__} cannot step with this configuration: {error or type(error).__name__}"
            ) from error

    @contextlib.contextmanager
    def _noise_from(self, draw: Noise, x: torch.Tensor) -> Iterator[None]:
        """Within it, the scheduler's noise comes from `draw`, on this thread alone."""
        if hasattr(self.scheduler, "noise_sampler"):
            self._brownian = self._brownian or _Brownian()
            self.scheduler.noise_sampler = self._brownian.sampler(draw, x)
            yield
            return
        owner = threading.get_ident()

        def ours(original: Callable) -> Callable:
            def randn_tensor(shape, generator=None, device=None, dtype=None, layout=None):
                if threading.get_ident() != owner:
                    return original(shape, generator=generator, device=device, dtype=dtype, layout=layout)
                return draw(torch.Size(shape)).to(device=device, dtype=dtype)

            return randn_tensor

        modules = {sys.modules[cls.__module__] for cls in type(self.scheduler).__mro__}
        with _PATCHED:
            originals = {module: vars(module)["randn_tensor"] for module in modules if "randn_tensor" in vars(module)}
            for module, original in originals.items():
                module.randn_tensor = ours(original)  # type: ignore[attr-defined]
            try:
                yield
            finally:
                for module, original in originals.items():
                    module.randn_tensor = original  # type: ignore[attr-defined]

    def noising(self, entry: int) -> tuple[float, float]:
        """Signal and noise scale of an image noised to evaluation `entry` of the whole schedule."""
        if self._noiser is None:
            self._noiser = copy.deepcopy(self.scheduler)
        fresh = self._noiser
        if hasattr(fresh, "set_begin_index"):
            fresh._step_index = None
            fresh.set_begin_index(entry)
        t = self._all[entry][None]
        one, zero = torch.ones((1, 1, 1, 1), dtype=torch.float64), torch.zeros((1, 1, 1, 1), dtype=torch.float64)
        if hasattr(fresh, "scale_noise"):
            return fresh.scale_noise(one, t, zero).item(), fresh.scale_noise(zero, t, one).item()
        if kind(type(fresh), fresh.config) == "flow matching":
            sigma = float(fresh.sigmas[entry])
            return 1.0 - sigma, sigma
        if hasattr(fresh, "add_noise"):
            return fresh.add_noise(one, zero, t).item(), fresh.add_noise(zero, one, t).item()
        raise ModelError(f"{type(fresh).__name__} has neither add_noise nor scale_noise: what a step holds is unknown")


class _Brownian:
    """Increments of one Brownian motion, normalised, as the noise samplers of the SDE schedulers return them.

    Two increments from the same noise level are those of one path: they overlap.
    """

    def __init__(self) -> None:
        self._last: tuple[float, float, torch.Tensor] | None = None

    def sampler(self, draw: Noise, x: torch.Tensor) -> Callable[[Any, Any], torch.Tensor]:
        def increment(sigma: Any, sigma_next: Any) -> torch.Tensor:
            begin, end = float(sigma), float(sigma_next)
            fresh = draw(x.shape).to(x)
            if self._last is not None and abs(self._last[0] - begin) <= 1e-5 * begin:
                _, middle, before = self._last
                shared = abs(begin - middle) / abs(begin - end)
                fresh = shared**0.5 * before + (1 - shared) ** 0.5 * fresh
            self._last = begin, end, fresh
            return fresh

        return increment


def learned_variance(scheduler: Any) -> bool:
    """Whether `step` takes the network's variance along with its prediction (twice the channels)."""
    if setting(scheduler, "variance_type") not in ("learned", "learned_range"):
        return False
    variance = getattr(scheduler, "_get_variance", None)
    return variance is not None and "predicted_variance" in inspect.signature(variance).parameters


def schedule_of(
    scheduler: Any, steps: int, *, options: dict[str, Any] | None = None, timing: dict[str, Any] | None = None
) -> Schedule:
    """Signal and noise scale at each solver step, read off the scheduler's own `add_noise` or `scale_noise`.

    options, timing: as in Driver. Raises ModelError.
    """
    driver = Driver(scheduler, steps, options=options, timing=timing)
    signal, noise = np.ones(steps + 1), np.zeros(steps + 1)
    for step in range(steps):
        if driver.entry(step) >= len(driver):
            raise ModelError(f"{type(scheduler).__name__} makes {len(driver)} evaluations in {steps} steps")
        signal[step], noise[step] = driver.noising(driver.entry(step))
    return Schedule(signal, noise, float(getattr(driver.scheduler, "init_noise_sigma", 1.0)))


def _check_step(scheduler: Any, options: dict[str, Any]) -> None:
    name = type(scheduler).__name__
    if not hasattr(scheduler, "step"):
        raise ModelError(f"{name} has no `step`")
    parameters = inspect.signature(scheduler.step).parameters
    needed = [
        key
        for key, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is not parameter.VAR_KEYWORD
        and key not in _STEP_ARGUMENTS
    ]
    if needed:
        raise ModelError(f"the step of {name} needs {', '.join(needed)}, which only its own pipeline has")
    known = [key for key in parameters if key not in _NOT_OPTIONS]
    for key in options:
        if key not in known:
            raise ModelError(
                f"{name} has no step option {key}{nearest(key, known)}; it takes {', '.join(known) or 'none'}"
            )


def _set_timesteps(scheduler: Any, steps: int, timing: dict[str, Any], device: torch.device | str) -> None:
    name = type(scheduler).__name__
    parameters = inspect.signature(scheduler.set_timesteps).parameters
    known = [key for key in parameters if key not in ("num_inference_steps", "device")]
    for key in timing:
        if key not in known:
            raise ModelError(
                f"{name} has no timing option {key}{nearest(key, known)}; it takes {', '.join(known) or 'none'}"
            )
    listed = timing.get("timesteps") if timing.get("timesteps") is not None else timing.get("sigmas")
    if listed is not None and len(listed) != steps:
        raise ModelError(f"{len(listed)} timesteps or sigmas are listed and model.steps is {steps}; make them the same")
    trained = setting(scheduler, "num_train_timesteps")
    if listed is None and trained and steps > trained:
        raise ModelError(
            f"model.steps {steps}: {name} was made with {trained} timesteps and takes at most as many steps; "
            "20 to 50 are usual"
        )
    arguments: dict[str, Any] = dict(timing) if listed is not None else {"num_inference_steps": steps, **timing}
    if "device" in parameters:
        arguments["device"] = device
    try:
        scheduler.set_timesteps(**arguments)
    except (ValueError, AssertionError) as error:
        raise ModelError(f"model.steps {steps}, {name}: {error}") from None
