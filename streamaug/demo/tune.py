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

from streamaug.config import Config, Recipe, load
from streamaug.demo.report import write_json
from streamaug.demo.run import LabelledDraws
from streamaug.demo.view import PlainView
from streamaug.doctor import hardware, installed_versions
from streamaug.experiment import run_arm
from streamaug.filtering.calibration import fit_judge
from streamaug.filtering.judge import pack_state
from streamaug.prepare import prepare
from streamaug.stream import Stream

FIRST_SEED = 10_000  # reports count from config.seed, so these labelled draws are never reported

# Settings tried per arm: as many for one as for the other.
REAL_ONLY_TRIALS: list[dict[str, Any]] = [
    {"lr": 0.001},
    {"lr": 0.002},
    {"lr": 0.005},
    {"lr": 0.002, "label_smoothing": 0.2},
]
STREAM_TRIALS: list[list[dict[str, Any]]] = [
    [{"kind": "noise", "depth": [0.25, 0.5]}],
    [{"kind": "noise", "depth": [0.35, 0.65]}],
    [{"kind": "interpolate", "depth": [0.25, 0.5], "t": [0.0, 0.5]}],
    [{"kind": "interpolate", "depth": [0.35, 0.65], "t": [0.0, 0.5]}],
]


def tune(config: Config, *, seeds: int, shots: int, report: dict[str, Any]) -> dict[str, Any]:
    """Validation accuracy of every trial: fractions, one per seed. `report` is filled as trials end."""
    config = config.model_copy(update={"data": config.data.model_copy(update={"shots": shots})})
    numbers = [FIRST_SEED + i for i in range(seeds)]
    draws = LabelledDraws.of(config, numbers)
    with PlainView() as view:
        prepared = prepare(config, progress=view, labelled=draws.union, with_judge=False)
    validation = prepared.splits.validation
    report["real_only"] = []
    for trial in REAL_ONLY_TRIALS:
        settings = config.train.model_copy(update=trial)
        reached = [
            run_arm(config, settings, draws.of_seed(at), validation, seed=seed).accuracy
            for at, seed in enumerate(numbers)
        ]
        _record(report["real_only"], trial, reached)
    judges = [pack_state(fit_judge(config, draws.of_seed(at), seed)) for at, seed in enumerate(numbers)]
    report["stream"] = []
    for recipes in STREAM_TRIALS:
        tried = config.model_copy(update={"recipes": [Recipe(**recipe) for recipe in recipes]})
        reached = []
        with Stream.from_prepared(prepare(tried, labelled=draws.union, with_judge=False)) as stream:
            for at, seed in enumerate(numbers):
                stream.replan(row_weights=draws.row_weights(at), judge_state=judges[at], first_k=at << 32)
                result = run_arm(tried, config.train, draws.of_seed(at), validation, seed=seed, stream=stream)
                reached.append(result.accuracy)
            stats = stream.stats()
        _record(report["stream"], {"recipes": recipes}, reached, acceptance=round(stats.acceptance, 4))
    return report


def _record(trials: list[dict[str, Any]], trial: dict[str, Any], reached: list[float], **more: float) -> None:
    entry = {
        **trial,
        "accuracy_mean": round(float(np.mean(reached)), 4),
        "accuracies": [round(value, 4) for value in reached],
        **more,
    }
    trials.append(entry)
    typer.echo(json.dumps(entry))


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
    for count in shots or [3, 1]:
        report[f"shots_{count}"] = tune(settings, seeds=seeds, shots=count, report={})
        report["seconds"] = round(time.monotonic() - began, 1)
        write_json(report, out)


if __name__ == "__main__":
    typer.run(main)
