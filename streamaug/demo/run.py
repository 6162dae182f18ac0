"""`streamaug demo`: real images alone against real images and the stream, on data that nobody has to download."""

import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from streamaug.config import Config
from streamaug.data import ImageSet
from streamaug.demo.pictures import SampleRow, Sibling, curves_png, samples_png
from streamaug.demo.report import Arm, Curve, Timeline, build_report, write_report
from streamaug.demo.view import DemoView
from streamaug.engine import build
from streamaug.errors import ConfigError
from streamaug.experiment import for_arm, run_arm
from streamaug.filtering.calibration import fit_judge
from streamaug.filtering.judge import Judge, pack_state
from streamaug.orders import ORDER_DTYPE, OrderBatch
from streamaug.preparation import Prepared, prepare
from streamaug.stream import Stream
from streamaug.training.trainer import TrainResult

FULL_SEEDS = 20
_SEED_SPACE = 1 << 32  # order batches a seed may use; keeps the ids of seeds apart
_PICTURE_DEPTHS = (0.4, 0.6, 0.8)


@dataclass
class _Arm:
    results: list[TrainResult] = field(default_factory=list)
    extra_seconds: list[float] = field(default_factory=list)  # spent for this arm outside of the training loop

    def add(self, result: TrainResult, extra: float = 0.0) -> None:
        self.results.append(result)
        self.extra_seconds.append(extra)

    def report(self) -> Arm:
        return Arm(
            [result.accuracy for result in self.results],
            [result.steps for result in self.results],
            [result.seconds + extra for result, extra in zip(self.results, self.extra_seconds, strict=True)],
        )

    @property
    def mean(self) -> float:
        return float(np.mean([result.accuracy for result in self.results]))


def smoke_config(config: Config) -> Config:
    """The same chain with everything small: does it run?"""
    prior = config.prior and config.prior.model_copy(update={"steps": 40})
    return config.model_copy(
        update={
            "prior": prior,
            "judge": config.judge.model_copy(update={"steps": 60}),
            "train": config.train.model_copy(update={"steps": 20}),
            "demo": config.demo.model_copy(update={"seeds": 2}),
        }
    )


def run_demo(
    config: Config, *, out: Path, fresh: bool = False, full: bool = False, smoke: bool = False, view: DemoView
) -> dict[str, Any]:
    """Run both arms for every seed with one producer, write the report to `out`, and return it.

    full: 20 seeds and a real-only arm that trains as long as the stream's arm took. smoke: everything tiny.
    """
    began = time.monotonic()
    if smoke:
        config = smoke_config(config)
    seeds = [config.seed + i for i in range(FULL_SEEDS if full else config.demo.seeds)]
    draws = LabelledDraws.of(config, seeds)
    prepared = prepare(config, progress=view, labelled=draws.union, fresh=fresh, with_judge=False)
    if prepared.bank.edits:
        raise ConfigError(
            f"{prepared.bank.path}: its rows were edited, and the demo needs them all: set bank.path to null"
        )
    arms = {"real_only": _Arm(), "stream": _Arm()}
    if full:
        arms["real_only_equal_time"] = _Arm()
    spans: list[tuple[float, float, str]] = []
    curves: list[Curve] = []
    judge: Judge | None = None

    with Stream.from_prepared(prepared) as stream:
        stream.start()
        test = prepared.splits.test
        settings = {
            "real_only": for_arm(config.train, config.demo.real_only),
            "stream": config.train,
            "real_only_equal_time": for_arm(config.train, config.demo.real_only),
        }
        every = max(config.train.steps // 10, 1)

        def run(arm: str, position: int, extra: float = 0.0, deadline: float | None = None) -> TrainResult:
            view.phase(
                f"seed {position + 1} of {len(seeds)}: {_ARM_NAMES[arm]}",
                None if deadline else settings[arm].steps,
            )
            started = time.monotonic()
            result = run_arm(
                config,
                settings[arm],
                draws.of_seed(position),
                test,
                seed=seeds[position],
                stream=stream if arm == "stream" else None,
                eval_every=every,
                on_step=_Follow(view, stream, arms, arm),
                deadline_seconds=deadline,
            )
            arms[arm].add(result, extra)
            spans.append((started, time.monotonic(), arm))
            if arm != "real_only_equal_time":
                steps, accuracies = zip(*result.curve, strict=True)
                curves.append(Curve(arm, seeds[position], list(steps), list(accuracies)))
            return result

        for position, seed in enumerate(seeds):
            run("real_only", position)
            judge_began = time.monotonic()
            if config.judge.enabled:
                view.phase(f"seed {position + 1} of {len(seeds)}: fitting the judge")
                judge = fit_judge(config, draws.of_seed(position), seed, prepared.features)
            stream.replan(
                row_weights=draws.row_weights(position),
                judge_state=None if judge is None else pack_state(judge),
                first_k=position * _SEED_SPACE,
            )
            judge_seconds = time.monotonic() - judge_began
            result = run("stream", position, extra=judge_seconds)
            if full:
                run("real_only_equal_time", position, deadline=result.seconds + judge_seconds)
        stats = stream.stats()
        stream_began = stream.started_at or began

    view.phase("drawing the report")
    out.mkdir(parents=True, exist_ok=True)
    origin = min([span[0] for span in spans], default=began)
    timeline = Timeline(
        generation=[(a + stream_began - origin, b + stream_began - origin) for a, b, *_ in stats.timeline],
        training=[(a - origin, b - origin, arm) for a, b, arm in spans if arm != "real_only_equal_time"],
        steps=[(a - origin, b - origin) for result in arms["stream"].results for a, b in result.spans],
    )
    samples_png(sample_rows(prepared, judge, draws.rows_of_seed(len(seeds) - 1)), out / "samples.png")
    curves_png(curves, timeline, out / "curves.png")
    equal_time = arms.get("real_only_equal_time")
    report = build_report(
        data=_DATA_NAMES.get(config.data.source, config.data.source),
        shots=draws.shots,
        held_out=len(prepared.splits.test),
        seeds=seeds,
        real_only=arms["real_only"].report(),
        stream=arms["stream"].report(),
        real_only_equal_time=equal_time.report() if equal_time else None,
        images_generated=stats.made,
        images_delivered=stats.delivered,
        images_per_second=stats.images_per_second,
        fresh_share=stats.fresh_share,
        mean_reuse=stats.mean_reuse,
        acceptance=stats.acceptance,
        acceptance_per_class=stats.acceptance_per_class,
        stall_seconds=stats.stall_seconds,
        time_to_first_batch_seconds=stats.time_to_first_batch_seconds,
        seconds_total=time.monotonic() - began,
        command=shlex.join(["streamaug", *sys.argv[1:]]),
        config=config,
    )
    write_report(
        report,
        out,
        timeline=timeline,
        curves=curves,
        samples_png=out / "samples.png",
        curves_png=out / "curves.png",
    )
    return dict(report)


_ARM_NAMES = {
    "real_only": "real images only",
    "stream": "real images and the stream",
    "real_only_equal_time": "real images only, as long as the stream's arm took",
}
_DATA_NAMES = {"digits": "scikit-learn's handwritten digits (8x8 pixels)"}


@dataclass(frozen=True)
class LabelledDraws:
    """The labelled images of every seed, and their union, which is what one bank holds."""

    union: ImageSet
    rows: list[np.ndarray]  # per seed: positions in the union
    shots: int

    @classmethod
    def of(cls, config: Config, seeds: list[int]) -> "LabelledDraws":
        from streamaug.data import load_splits

        train = load_splits(config.data).train
        drawn = [train.select_shots(config.data.shots, seed) for seed in seeds]
        together = np.unique(np.concatenate(drawn))
        rows = [np.searchsorted(together, chosen) for chosen in drawn]
        return cls(train.subset(together), rows, config.data.shots or int(train.class_counts().min()))

    def rows_of_seed(self, position: int) -> np.ndarray:
        return self.rows[position]

    def of_seed(self, position: int) -> ImageSet:
        return self.union.subset(self.rows[position])

    def row_weights(self, position: int) -> np.ndarray:
        """1 for the seed's own images, 0 for the others: nothing is made from an image the arm does not have."""
        weights = np.zeros(len(self.union))
        weights[self.rows[position]] = 1.0
        return weights


class _Follow:
    """Keeps the live view current while an arm trains."""

    def __init__(self, view: DemoView, stream: Stream, arms: dict[str, _Arm], arm: str):
        self.view, self.stream, self.arms, self.arm = view, stream, arms, arm
        self.shown = 0.0

    def __call__(self, step: int, accuracy: float | None) -> None:
        self.view.advance()
        now = time.monotonic()
        if now - self.shown < 0.5:
            return
        self.shown = now
        stats = self.stream.stats()
        figures: dict[str, float | None] = {
            "images_made_per_s": stats.images_per_second,
            "images_delivered_per_s": stats.delivered_per_second,
            "ring_fill": stats.ring_fill,
            "fresh_share": stats.fresh_share,
            "acceptance": stats.acceptance,
            "stall_seconds": stats.stall_seconds,
        }
        for name in ("real_only", "stream"):
            if self.arms[name].results:
                figures[f"{name}_accuracy"] = self.arms[name].mean
        self.view.figures(**figures)


def sample_rows(prepared: Prepared, judge: Judge | None, rows: np.ndarray, siblings: int = 2) -> list[SampleRow]:
    """One real image of every class and its siblings at several depths, as the engine makes and judges them."""
    engine = build(prepared.engine_options)
    if judge is not None:
        engine.load_judge(0, pack_state(judge))
    labels = prepared.bank.labels[rows]
    anchors = np.array([rows[np.flatnonzero(labels == label)[0]] for label in range(len(prepared.class_names))])
    schedule = prepared.planner.schedule
    made: list[list[Sibling]] = [[] for _ in anchors]
    for at, depth in enumerate(_PICTURE_DEPTHS):
        start = schedule.start_of(depth)
        images = np.zeros(len(anchors) * siblings, ORDER_DTYPE)
        images["id"] = np.arange(len(images)) + at * len(images)
        images["row_a"] = np.repeat(anchors, siblings)
        images["row_b"] = -1
        images["label"] = images["label_b"] = prepared.bank.labels[images["row_a"]]
        images["latent_w"] = (schedule.signal[start], 0.0, schedule.noise[start])
        images["guidance"] = 1.0
        pixels, scores, reasons = engine.look(OrderBatch(-1, start, 0, 0, images))
        shown = (schedule.steps - start) / schedule.steps
        for position in range(len(images)):
            made[position // siblings].append(
                Sibling(pixels[position], f"depth {shown:.2f}", float(scores[position]), bool(reasons[position] == 0))
            )
    names = prepared.class_names
    return [
        SampleRow(names[prepared.bank.labels[row]], prepared.labelled.images[row], siblings_of)
        for row, siblings_of in zip(anchors, made, strict=True)
    ]
