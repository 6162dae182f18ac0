"""Says how fast it goes: before the first image what can be fed, once what is too slow, and a line now and then."""

import logging
import os
import sys
import time
from contextlib import suppress

from streamaug.errors import StreamaugError
from streamaug.stream.delivery import NAP_SECONDS
from streamaug.stream.dispatch import Dispatch
from streamaug.stream.plan import Plan
from streamaug.stream.producers.fleet import Fleet
from streamaug.stream.rates.advice import Generator, announcement, verdict
from streamaug.stream.rates.recorder import Recorder
from streamaug.stream.rates.stats import StreamStats

log = logging.getLogger("streamaug")

_FIRST_LOOK = 8  # calls of take before supply and demand are compared; after that at twice as many, and so on
_LEAST_SECONDS = 0.5  # that these calls must have taken
_SECOND_BATCH = 1.5  # how many times as long as a first batch the second one may take to be waited for
_SECOND_BATCH_SECONDS = 0.05  # and this much on top


class Reporter:
    """Of one stream; logs as "streamaug". ratio: the synthetic share that the loop asks for, None where unknown."""

    def __init__(self, fleet: Fleet, plan: Plan, dispatch: Dispatch, recorder: Recorder, trainers: int = 1):
        """trainers: on this machine, this one included."""
        self._fleet = fleet
        self._trainers = trainers
        self._plan = plan
        self._dispatch = dispatch
        self._recorder = recorder
        self._announced = False
        self._next_look: int | None = _FIRST_LOOK  # calls of take at which rates are compared; None once it was said

    def stats(self, ratio: float | None, *, timeline: bool = True) -> StreamStats:
        _, made = self._dispatch.queues()
        return self._recorder.stats(made, self._fleet.restarts, asked_ratio=ratio, timeline=timeline)

    def before_first(self, ratio: float | None) -> float:
        """Say, before the first image, what producers can feed; returns for how many seconds that was waited for.

        Under `starved: real`, which never waits, it is said as soon as it is known. Raises what `Fleet.check` raises.
        """
        if self._announced:
            return 0.0
        waited = 0.0
        self._dispatch.issue()
        if self._fleet.config.starved != "real":
            began = time.monotonic()
            self._await_second_batch()
            waited = time.monotonic() - began
            self._dispatch.issue()  # which takes in how long batches took
        if self._recorder.rate() is not None:
            self._announced = True
            ready = (self._fleet.ready_ns - (self._recorder.started_ns or 0)) / 1e9
            rate = self._recorder.rate(self._plan.mean_evaluations()) or 0.0
            log.info("%s", announcement(ready, rate, ratio, warm=self._recorder.is_warm))
        return waited

    def _await_second_batch(self) -> None:
        """The first batch of a producer loads, compiles and allocates: how fast it is, the second one tells."""
        while not any(ring.published for ring in self._fleet.rings):
            self._nap()
        began = time.monotonic()
        with suppress(StreamaugError):  # the first images are there: what goes wrong from here is the next call's
            while self._fleet.layout.slots > 1:
                first, is_there = self._dispatch.first_times()
                if is_there or time.monotonic() - began > _SECOND_BATCH * first + _SECOND_BATCH_SECONDS:
                    return
                self._nap()

    def _nap(self) -> None:
        self._fleet.check()
        self._fleet.wait(NAP_SECONDS)

    def after(self, ratio: float | None) -> None:
        """At the end of a call of take."""
        if self._recorder.report_due():
            log.info("%s", self.stats(ratio, timeline=False).line())
        if self._next_look is not None and self._recorder.steps >= self._next_look:
            self._next_look *= 2
            self._compare_rates(ratio)

    def _compare_rates(self, ratio: float | None) -> None:
        """Say once, with what to do about it, that producers do not make what the loop could use."""
        pace = self._recorder.pace(ratio)
        if pace is None or not pace.too_slow or self._recorder.demand.seconds < _LEAST_SECONDS:
            return
        self._next_look = None
        work = self._fleet.work
        generator = Generator.of(
            work.options,
            self._fleet.config,
            sampling=self._recorder.share_of("sample"),
            acceptance=self._recorder.acceptance,
            on_cpu=not _has_gpu() or work.environment.get("CUDA_VISIBLE_DEVICES") == "",
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            trainers=self._trainers,
            sharers=self._fleet.sharers(),
        )
        log.warning("%s", verdict(pace, generator))


def _has_gpu() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_available())
