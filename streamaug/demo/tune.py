"""Choose the demo's settings on the validation split, with the same number of trials for both arms.

    python -m streamaug.demo.tune digits --out bench/results/tuning_digits.json

Tuning draws labelled images by seeds that no report uses, and never looks at the test split. What it finds is written
into the YAML by hand, with the result file committed beside it.
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from streamaug.config import Config, load, parse
from streamaug.demo.run import LabelledDraws
from streamaug.demo.view import PlainView
from streamaug.doctor import hardware, installed_versions
from streamaug.experiment import for_arm, run_arm
from streamaug.filtering.calibration import fit_judge
from streamaug.filtering.judge import pack_state
from streamaug.outputs import write_json
from streamaug.preparation import prepare
from streamaug.stream import Stream

FIRST_SEED = 10_000  # reports count from config.seed, so these labelled draws are never reported

# What is tried, as `--set` would say it. What both arms share is chosen by what is best for real images alone, then
# each arm has as many trials of its own.
SHARED_TRIALS = [
    ["train.classifier=small_cnn"],
    ["train.classifier=small_cnn_pooled"],
    ["train.augment.shift=0.1"],
    ["train.augment.shift=0.25"],
    ["train.augment.rotation=20"],
]
REAL_ONLY_TRIALS = [
    ["demo.real_only.label_smoothing=0"],
    ["demo.real_only.label_smoothing=0.2"],
    ["demo.real_only.label_smoothing=0.3"],
    ["demo.real_only.label_smoothing=0.4"],
    ["demo.real_only.label_smoothing=0.3", "demo.real_only.lr=0.001"],
    ["demo.real_only.label_smoothing=0.3", "demo.real_only.lr=0.004"],
]


def _noise(steps: int, low: float, high: float) -> list[str]:
    return [f"model.steps={steps}", f"recipes=[{{kind: noise, depth: [{low}, {high}]}}]"]


STREAM_TRIALS = [
    [*_noise(6, 0.25, 0.75), "train.label_smoothing=0.2", "judge.min_score=0.6"],
    [*_noise(5, 0.42, 0.75), "train.label_smoothing=0.2", "judge.min_score=0.6"],
    [*_noise(5, 0.42, 0.9), "train.label_smoothing=0.2", "judge.min_score=0.6"],
    [*_noise(4, 0.42, 0.9), "train.label_smoothing=0.2", "judge.min_score=0.6"],
    [*_noise(4, 0.42, 0.9), "train.label_smoothing=0.2", "judge.min_score=0.5"],
    [*_noise(4, 0.42, 0.9), "train.label_smoothing=0.3", "judge.min_score=0.6"],
]


def tune(config: Config, *, seeds: int, shots: int) -> dict[str, Any]:
    """Validation accuracy of every trial: fractions, one per seed; and the best of each group."""
    config = _with(config, [f"data.shots={shots}"])
    numbers = [FIRST_SEED + i for i in range(seeds)]
    draws = LabelledDraws.of(config, numbers)
    with PlainView() as view:
        validation = prepare(config, progress=view, labelled=draws.union, with_judge=False).splits.validation

    def real_only(trial: list[str]) -> dict[str, Any]:
        tried = _with(config, trial)
        settings = for_arm(tried.train, tried.demo.real_only)
        return _entry(
            trial,
            [
                run_arm(tried, settings, draws.of_seed(at), validation, seed=seed).accuracy
                for at, seed in enumerate(numbers)
            ],
        )

    def stream(trial: list[str]) -> dict[str, Any]:
        tried = _with(config, trial)
        prepared = prepare(tried, labelled=draws.union, with_judge=False)
        reached = []
        with Stream.from_prepared(prepared) as stream:
            for at, seed in enumerate(numbers):
                judge = pack_state(fit_judge(tried, draws.of_seed(at), seed, prepared.features))
                stream.replan(row_weights=draws.row_weights(at), judge_state=judge, first_k=at << 32)
                result = run_arm(tried, tried.train, draws.of_seed(at), validation, seed=seed, stream=stream)
                reached.append(result.accuracy)
            acceptance = stream.stats().acceptance
        return _entry(trial, reached) | {"acceptance": round(acceptance, 4)}

    shared = [real_only(trial) for trial in SHARED_TRIALS]
    config = _with(config, _best(shared))
    alone = [real_only(trial) for trial in REAL_ONLY_TRIALS]
    mixed = [stream(trial) for trial in STREAM_TRIALS]
    best = {"shared": _best(shared), "real_only": _best(alone), "stream": _best(mixed)}
    return {"shared": shared, "real_only": alone, "stream": mixed, "best": best}


def _best(entries: list[dict[str, Any]]) -> list[str]:
    """The settings of the trial with the highest mean, the first of equals."""
    return max(entries, key=lambda entry: entry["accuracy_mean"])["set"]


def _with(config: Config, overrides: list[str]) -> Config:
    return parse(config.to_yaml(), "the configuration", overrides)


def _entry(trial: list[str], reached: list[float]) -> dict[str, Any]:
    entry = {
        "set": trial,
        "accuracy_mean": round(float(np.mean(reached)), 4),
        "accuracies": [round(value, 4) for value in reached],
    }
    typer.echo(json.dumps(entry))
    return entry


def main(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a bundled configuration.")] = "digits",
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = Path("tuning.json"),
    seeds: Annotated[int, typer.Option(help="Labelled draws per trial.")] = 4,
    shots: Annotated[list[int] | None, typer.Option(help="Labelled images per class.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Try every setting of both arms on the validation split and write the accuracies."""
    settings = load(config, overrides or [])
    began = time.monotonic()
    report: dict[str, Any] = {
        "split": "validation",
        "seeds": [FIRST_SEED + i for i in range(seeds)],
        "versions": installed_versions(),
        "hardware": hardware(),
        "config": settings.model_dump(mode="json"),
    }
    for count in shots or [settings.data.shots or 3]:
        report[f"shots_{count}"] = tune(settings, seeds=seeds, shots=count)
        report["seconds"] = round(time.monotonic() - began, 1)
        write_json(report, out)


if __name__ == "__main__":
    typer.run(main)
