"""Figures are ratios of things measured alternately in one run; the `alternate` fixture measures them."""

import statistics
import time
from collections.abc import Callable

import pytest


def median_seconds(
    functions: dict[str, Callable[[], object]], rounds: int, calls: int, warmup: int = 3
) -> dict[str, float]:
    """Median seconds of one call of each; a round runs every function `calls` times, in turn."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(-warmup, rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls):
                function()
            if turn >= 0:
                samples[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(values) for name, values in samples.items()}


@pytest.fixture
def alternate(benchmark) -> Callable[..., dict[str, float]]:
    """alternate(rounds=, calls=, ours=f, other=g, ...) -> median seconds of each, by name; also recorded."""

    def measure(rounds: int, calls: int, **functions: Callable[[], object]) -> dict[str, float]:
        seconds = median_seconds(functions, rounds, calls)
        benchmark.pedantic(functions["ours"], rounds=5, iterations=calls)
        benchmark.extra_info |= {f"{name}_us": round(value * 1e6, 2) for name, value in seconds.items()}
        return seconds

    return measure
