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
from streamaug.prepare import prepare
from streamaug.stream import Stream

FIRST_SEED = 10_000  # reports count from config.seed, so these labelled draws are never reported

# What is tried, as `--set` would say it: as many trials for one arm as for the other.
REAL_ONLY_TRIALS = [
    ["demo.real_only.lr=0.001"],
    ["demo.real_only.lr=0.002"],
    ["demo.real_only.lr=0.005"],
    ["demo.real_only.label_smoothing=0.2"],
    ["demo.real_only.label_smoothing=0.3"],
    ["demo.real_only.label_smoothing=0.2", "demo.real_only.lr=0.001"],
    ["demo.real_only.label_smoothing=0.2", "demo.real_only.lr=0.005"],
    ["demo.real_only.label_smoothing=0.2", "demo.real_only.weight_decay=0.1"],
]
_NOISE = "recipes=[{kind: noise, depth: [0.25, 0.5]}]"
_DEEPER = "recipes=[{kind: noise, depth: [0.35, 0.65]}]"
_PAIRS = "recipes=[{kind: interpolate, depth: [0.25, 0.5]}]"
_DEEPER_PAIRS = "recipes=[{kind: interpolate, depth: [0.35, 0.65]}]"
_BOTH = "recipes=[{kind: noise, depth: [0.25, 0.5]}, {kind: interpolate, depth: [0.35, 0.65]}]"
STREAM_TRIALS = [
    [_NOISE],
    [_DEEPER],
    [_PAIRS],
    [_DEEPER_PAIRS],
    [_BOTH],
    [_NOISE, "train.label_smoothing=0.2"],
    [_BOTH, "train.label_smoothing=0.2"],
    ["recipes=[{kind: noise, depth: [0.25, 0.625]}]", "train.label_smoothing=0.2", "judge.min_score=0.6"],
]


def tune(config: Config, *, seeds: int, shots: int, skip: int = 0) -> dict[str, Any]:
    """Validation accuracy of both arms' trials, from number `skip` on: fractions, one per seed."""
    config = _with(config, [f"data.shots={shots}"])
    numbers = [FIRST_SEED + i for i in range(seeds)]
    draws = LabelledDraws.of(config, numbers)
    with PlainView() as view:
        validation = prepare(config, progress=view, labelled=draws.union, with_judge=False).splits.validation
    real_only, stream_trials = [], []
    for trial in REAL_ONLY_TRIALS[skip:]:
        settings = for_arm(config.train, _with(config, trial).demo.real_only)
        reached = [
            run_arm(config, settings, draws.of_seed(at), validation, seed=seed).accuracy
            for at, seed in enumerate(numbers)
        ]
        real_only.append(_entry(trial, reached))
    for trial in STREAM_TRIALS[skip:]:
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
        stream_trials.append(_entry(trial, reached) | {"acceptance": round(acceptance, 4)})
    return {"real_only": real_only, "stream": stream_trials}


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
    skip: Annotated[int, typer.Option(help="Begin at this trial, for going on with an earlier run.")] = 0,
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
    for count in shots or [3, 1]:
        report[f"shots_{count}"] = tune(settings, seeds=seeds, shots=count, skip=skip)
        report["seconds"] = round(time.monotonic() - began, 1)
        write_json(report, out)


if __name__ == "__main__":
    typer.run(main)
