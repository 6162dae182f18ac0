"""Orders out into the rings, and their slots back: which batch is in which ring, and which ones have been made."""

import numpy as np

from streamaug.config import StreamConfig
from streamaug.stream.plan import Plan, Planned
from streamaug.stream.producers.fleet import Fleet
from streamaug.stream.rates.recorder import Recorder
from streamaug.stream.ring import Slot


class Dispatch:
    """Of one fleet and one plan. Its methods are for the trainer's thread, like the fleet's."""

    def __init__(self, fleet: Fleet, plan: Plan, recorder: Recorder, config: StreamConfig):
        self._fleet = fleet
        self._plan = plan
        self._recorder = recorder
        self._in_order = config.in_order
        self._in_flight = config.in_flight
        self._turn = 0
        self._released = [0] * config.producers  # by ring: batches whose slot is free again
        self._drop_to = [0] * config.producers  # by ring: batches below are discarded when they arrive
        self._noted = [0] * config.producers  # by ring: batches whose times were noted
        self._evaluations = np.zeros((config.producers, fleet.layout.slots), np.int64)  # of the batch in each slot
        self._posts: dict[int, int] = {}  # judge version -> its post in the mailboxes
        self._last_post = -1

    def issue(self) -> None:
        """Write planned orders into the rings, as far as there are free slots."""
        self._note_times()
        self._discard_arrivals()
        self._announce_drops()
        rings = self._fleet.rings
        for batch in self._plan.undelivered:
            if self._drop_to[batch.ring] <= batch.number < rings[batch.ring].issued:
                continue
            taken = [ring.issued - released for ring, released in zip(rings, self._released, strict=True)]
            at = self._turn % len(rings) if self._in_order else int(np.argmin(taken))
            if taken[at] == self._fleet.layout.slots:
                return
            # Known before it is so, that an interruption in between does not have it issued twice.
            batch.ring, batch.number = at, rings[at].issued
            self._evaluations[at, batch.number % self._fleet.layout.slots] = self._plan.evaluations(batch.order)
            self._fleet.issue(at, batch.order, self._post(batch.order.judge_version))
            self._turn += 1

    def _post(self, version: int) -> int:
        """Where producers find that version of the judge; puts it there first when it is not there yet."""
        if self._fleet.mailboxes is None:
            return 0
        if version not in self._posts:
            # Of issued orders alone: more may be planned than there are mailboxes, where other ranks' were dealt out.
            issued = {batch.order.judge_version for batch in self._plan.undelivered if batch.number >= 0}
            self._posts = {named: post for named, post in self._posts.items() if named in issued}
            self._last_post += 1
            self._fleet.mailboxes.write(self._last_post, self._plan.judges[version], keep=set(self._posts.values()))
            self._posts[version] = self._last_post
        return self._posts[version]

    def _note_times(self) -> None:
        """How long batches took to make, before their slots are written over."""
        for at, ring in enumerate(self._fleet.rings):
            for number in range(self._noted[at], published := ring.published):
                slot = ring.slot(number)
                if not slot.abandoned:
                    evaluations = int(self._evaluations[at, number % self._fleet.layout.slots])
                    self._recorder.made(slot, evaluations, first=number == 0)
            self._noted[at] = published

    def _discard_arrivals(self) -> None:
        """Free the slots of batches that a redirection made useless, once they are published."""
        for at, ring in enumerate(self._fleet.rings):
            while self._released[at] < min(self._drop_to[at], ring.published):
                slot = ring.slot(self._released[at])
                self._recorder.arrived(slot.order, slot)
                self._recorder.dropped(slot.count)
                self._released[at] += 1

    def ready(self) -> Planned | None:
        """The next batch to deliver from: the first in order, or the first that is made; None when it is not made."""
        rings, waiting = self._fleet.rings, list(self._plan.undelivered)
        candidates = waiting[:1] if self._in_order else waiting
        return next((b for b in candidates if self._drop_to[b.ring] <= b.number < rings[b.ring].published), None)

    def slot(self, batch: Planned) -> Slot:
        return self._fleet.rings[batch.ring].slot(batch.number)

    def free(self, batch: Planned) -> None:
        """Its slot is no longer needed. Batches of one ring are freed in their order there."""
        self._discard_arrivals()  # of those before it, which may have arrived since the last order
        self._released[batch.ring] = batch.number + 1

    def drop_everything(self, current: Planned | None) -> None:
        """Whatever was issued is not wanted any more: it is passed over, or discarded when it arrives.

        current: the batch that is being delivered from, whose slot is free at once. Batches that are still planned
        after all, because what follows was refused or interrupted, are issued anew.
        """
        self._discard_arrivals()
        rings, released = self._fleet.rings, list(self._released)
        drop_to = [ring.issued for ring in rings] or self._drop_to  # there are none before the start
        if current is not None:
            released[current.ring] = current.number + 1
        self._released, self._drop_to = released, drop_to  # at once, whatever interrupts
        self._announce_drops()
        self._posts.clear()

    def _announce_drops(self) -> None:
        """To producers; again, where a redirection was interrupted before all had been told."""
        for at, ring in enumerate(self._fleet.rings):
            if ring.skipping_to < self._drop_to[at]:
                self._fleet.skip_to(at, self._drop_to[at])

    def queues(self) -> tuple[float, float]:
        """Shares of the orders in flight: not yet made, and made but not yet taken."""
        waiting = ready = 0
        for ring, released in zip(self._fleet.rings, self._released, strict=False):
            published, issued = ring.published, ring.issued
            waiting += issued - min(published, issued)
            ready += min(published, issued) - released
        return min(waiting / self._in_flight, 1.0), min(ready / self._in_flight, 1.0)

    def first_times(self) -> tuple[float, bool]:
        """(seconds that the slowest first batch of a ring took, 0 while there is none; whether a later one is made,
        which nothing but its images took time for)."""
        rings = self._fleet.rings
        spans = [ring.slot(0).span_ns for ring in rings if ring.published == 1]
        slowest = max((ended - began for began, ended in spans), default=0) / 1e9
        return slowest, any(ring.published > 1 for ring in rings)
