"""Probe: what each call of a scheduler's `step` does to its sample, the network's outputs and the noise, in symbols.

A step is linear in them as long as nothing is clamped. Each call is fed symbols of its own (one-hot images), so that
the coefficients stand in the result, also those on the inputs of earlier calls that the scheduler kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from streamaug.errors import ModelError
from streamaug.sampling.solvers.driver import Driver
from streamaug.sampling.solvers.schedulers import kind, setting


@dataclass(frozen=True)
class Probe:
    """E evaluations, clamps and dynamic thresholding left out.

    on_x, on_e, on_noise: float64 [E, E]; row i: the weights, in the result of evaluation i, of the sample, the
    network's output and the noise of evaluations 0..i.
    clean: float64 [E, 2], the predicted clean image is clean[i, 0]·x + clean[i, 1]·e; None if the scheduler cannot
    tell. converted: the same for the scheduler's `convert_model_output`. in_scale: float64 [E], the factor on the
    network's input. x0_scale: float64 [E], (noise scale / signal scale)².
    """

    on_x: np.ndarray
    on_e: np.ndarray
    on_noise: np.ndarray
    clean: np.ndarray | None
    converted: np.ndarray | None
    in_scale: np.ndarray
    x0_scale: np.ndarray

    def __len__(self) -> int:
        return len(self.in_scale)

    def stochastic(self) -> bool:
        return bool(self.on_noise.any())


def probe(make: Callable[..., Driver], scheduler: Any, config: dict[str, Any]) -> Probe:
    """Probe the run that `make(config=...)` starts, `config` being what is to be switched off.

    Raises ModelError when a step gives values that are not finite, which it then does in any pipeline.
    """
    driver = make(config=config)
    count = len(driver)
    results = np.zeros((count, 3 * count))
    clean, converted = np.full((count, 2), np.nan), np.full((count, 2), np.nan)
    in_scale = np.zeros(count)

    def symbol(position: int) -> torch.Tensor:
        one_hot = torch.zeros((1, 1, 1, 3 * count), dtype=torch.float64)
        one_hot[..., position] = 1.0
        return one_hot

    one = torch.ones((1, 1, 1, 1), dtype=torch.float64)
    for i in range(count):
        in_scale[i] = driver.network_input(i, one).item()
        x, e, noise = symbol(i), symbol(count + i), symbol(2 * count + i)
        prediction = driver.converted(i, e, x)
        if prediction is not None:
            converted[i] = prediction.flatten()[[i, count + i]]
        after, predicted = driver.step(i, e, x, lambda shape, noise=noise: noise)  # type: ignore[misc]
        results[i] = after.flatten()
        if predicted is not None:
            clean[i] = predicted.flatten()[[i, count + i]]
        if not np.isfinite(results[i]).all():
            raise ModelError(
                f"{type(scheduler).__name__} gives values that are not finite at timestep "
                f"{float(driver.timesteps[i]):g}{_why_not_finite(scheduler)}"
            )
    on_x, on_e, on_noise = results[:, :count], results[:, count : 2 * count], results[:, 2 * count :]

    signal, noise_scale = np.array([driver.noising(driver.first + i) for i in range(count)]).T
    pairs: np.ndarray | None = clean
    if np.isnan(clean).any():
        pairs = _clean(scheduler, signal, noise_scale, converted, np.stack([on_x.diagonal(), on_e.diagonal()], 1))
    return Probe(
        on_x,
        on_e,
        on_noise,
        pairs,
        None if np.isnan(converted).any() else converted,
        in_scale,
        _x0_scale(scheduler, signal, noise_scale, pairs),
    )


def _clean(
    scheduler: Any, signal: np.ndarray, noise: np.ndarray, converted: np.ndarray, step: np.ndarray
) -> np.ndarray | None:
    """The predicted clean image where the step's output does not carry it: float64 [E, 2], None if unknown."""
    ones = np.ones_like(signal)
    prediction, family = setting(scheduler, "prediction_type"), kind(type(scheduler), scheduler.config)
    if family == "consistency":
        return step  # its step is the clean image, plus noise
    if not np.isnan(converted).any() and _converts_to_clean(scheduler):
        return converted
    if family == "flow matching":
        return np.stack([ones, -noise], 1)
    size = signal**2 + noise**2
    if prediction == "epsilon" and (signal > 0).all():
        return np.stack([1 / signal, -noise / signal], 1)
    if prediction == "v_prediction":
        return np.stack([signal / size, -noise / np.sqrt(size)], 1)
    if prediction == "sample":
        return np.stack([0 * ones, ones], 1)
    return None


def _converts_to_clean(scheduler: Any) -> bool:
    """Whether `convert_model_output` gives the clean image, not the noise."""
    if setting(scheduler, "predict_x0") is not None:
        return bool(setting(scheduler, "predict_x0"))
    algorithm = setting(scheduler, "algorithm_type")
    return algorithm is None or algorithm.endswith("++") or algorithm == "data_prediction"


def _x0_scale(scheduler: Any, signal: np.ndarray, noise: np.ndarray, clean: np.ndarray | None) -> np.ndarray:
    """(noise / signal)² where the network is called: between two noise levels of the schedule if a step has two."""
    prediction = setting(scheduler, "prediction_type")
    if clean is not None and getattr(scheduler, "order", 1) == 2 and prediction in ("epsilon", "v_prediction"):
        return clean[:, 1] ** 2 if prediction == "epsilon" else 1 / clean[:, 0] - 1
    return (noise / np.maximum(signal, 1e-12)) ** 2


def _why_not_finite(scheduler: Any) -> str:
    if setting(scheduler, "rescale_betas_zero_snr") and setting(scheduler, "prediction_type") == "epsilon":
        return ": rescale_betas_zero_snr leaves no signal to predict epsilon from; it needs v_prediction or sample"
    if setting(scheduler, "variance_type") == "fixed_large_log":
        return ": variance_type fixed_large_log takes the root of a negative number; use fixed_large"
    if setting(scheduler, "final_sigmas_type") == "zero":
        return ": this solver cannot end at noise 0; set final_sigmas_type to sigma_min"
    return ""
