"""The producers of one stream and their rings, as the trainer's thread sees them."""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from streamaug.config import StreamConfig
from streamaug.errors import StreamaugError
from streamaug.orders import OrderBatch
from streamaug.stream.producer import hint, wait
from streamaug.stream.producers.backends import Lane, ProcessProducer, Producer, ThreadProducer, Work
from streamaug.stream.producers.keeper import Keeper, Watch, remote_error
from streamaug.stream.producers.placement import Placement
from streamaug.stream.producers.sharing import Sharing
from streamaug.stream.producers.starting import Starter, start_method
from streamaug.stream.ranks import Meeting
from streamaug.stream.ring import FAILED, Layout, Mailboxes, Ring, memory
from streamaug.stream.ring.memory import Memory

log = logging.getLogger("streamaug")

_POLL_SECONDS = 50e-6
_BACKENDS: dict[str, Callable[[Lane, Work], Producer]] = {"process": ProcessProducer, "local": ThreadProducer}


class Fleet:
    """`config.producers` producers and their rings. Nothing is allocated before `start`; from then on a thread, the
    keeper, sees to the producers. All methods are for the trainer's thread."""

    def __init__(
        self,
        config: StreamConfig,
        backend: str,
        layout: Layout,
        judge_nbytes: int,
        work: Work,
        *,
        trainer_device: str = "cpu",
        meeting: Meeting | None = None,
    ):
        """backend: local or process. trainer_device: where `take` hands out images, "cpu" or "cuda:0". meeting: with
        the other ranks of this machine, where they share producers.

        Raises MemoryTooSmall when the rings cannot fit, UsageError when what was configured contradicts itself.
        """
        self.config = config
        self.work = work
        self.backend = backend
        self.placement = Placement(config, backend, layout, work, trainer_device, shared=meeting is not None)
        self.layout = self.placement.layout
        on_gpu = self.placement.sees_gpus(work)
        self._start_method = start_method(config.start_method, on_gpu=on_gpu, threads=work.threads)
        self.mailboxes: Mailboxes | None = None
        self._mailboxes_shape = (config.producers * layout.slots + 2, judge_nbytes) if judge_nbytes else None
        self._mailboxes_memory: Memory | None = None
        self._watches: list[Watch] = []
        self._starter: Starter | None = None
        self._meeting = meeting
        self._sharing: Sharing | None = None
        self._sharers = 1
        self._closed = False
        self._release_in_keeper = False
        self._keeper: Keeper | None = None
        self._owner = os.getpid()
        self._require_memory()

    @property
    def nbytes(self) -> int:
        """Memory of the host that all rings and mailboxes take together."""
        mailboxes = Mailboxes.nbytes(*self._mailboxes_shape) if self._mailboxes_shape else 0
        return self.config.producers * self.layout.nbytes + mailboxes

    @property
    def rings(self) -> list[Ring]:
        return [watch.lane.ring for watch in self._watches]

    @property
    def pids(self) -> list[int]:
        return [pid for watch in self._watches if (pid := watch.producer.pid) is not None]

    @property
    def restarts(self) -> int:
        """Producers that were replaced."""
        return 0 if self._keeper is None else self._keeper.restarts

    def sharers(self) -> int:
        """How many ranks the producers make images for, this one included; after the end, as it was then."""
        self._sharers = max((ring.sharers for ring in self.rings), default=self._sharers)
        return self._sharers

    @property
    def ready_ns(self) -> int:
        """When the last producer became ready, CLOCK_MONOTONIC nanoseconds."""
        return max(ring.ready_ns for ring in self.rings)

    def start(self) -> None:
        """Allocate the rings and start the producers, without waiting for them to be ready."""
        self.check()
        if self._keeper is None:
            self._begin()
        assert self._keeper is not None
        try:
            self._keeper.start()
        except RuntimeError as error:
            self._keeper.release()
            self._keeper = None
            self.release()
            raise StreamaugError(f"producers cannot be watched: {error} (see ulimit -u)") from None
        self._keeper.spawned.wait()
        self.check()

    def _begin(self) -> None:
        """Allocate the rings. What was interrupted may be begun again."""
        self._require_memory()
        try:
            self._allocate()
            self._keeper = Keeper(self.config, self._watches, self._producers_ended, self._gave_up)
        except OSError as error:
            self.release()
            raise StreamaugError(f"the ring cannot be made: {error.strerror} (see ulimit -n)") from None
        except Exception:
            self.release()
            raise
        except BaseException:
            self._give_back()
            raise

    def issue(self, at: int, order: OrderBatch, judge_post: int) -> int:
        """Write an order into ring `at` and wake its producer; returns the order's number there."""
        lane = self._watches[at].lane
        while not lane.ring.slot(lane.ring.issued).free:  # the trainer's GPU still reads what the order would overwrite
            self.check()
            time.sleep(_POLL_SECONDS)
        number = lane.ring.issue(order, judge_post)
        hint(lane.wake)
        return number

    def new_images(self, n: int) -> Any:
        """Room for n images where the trainer takes them: a uint8 array or tensor [n, C, H, W], to which
        `Slot.copy_images` copies."""
        shape = (n, *self.layout.image_shape)
        return self.placement.new_images(shape)

    def skip_to(self, at: int, number: int) -> None:
        lane = self._watches[at].lane
        lane.ring.skip_to(number)
        hint(lane.wake)

    def wait(self, seconds: float) -> None:
        """Sleep until a producer says that something changed, at most `seconds`."""
        wait([watch.lane.wake for watch in self._watches], seconds)

    def check(self) -> None:
        """Raise what went wrong for good: the producer's own exception, or that it keeps dying."""
        self._hear_failures()
        if self._keeper is not None and self._keeper.failure is not None:
            raise self._keeper.failure
        if self._closed:
            raise StreamaugError("the stream was closed")

    def _hear_failures(self) -> None:
        # Not in `check`, whose variables the exception that it raises would keep alive, the rings' memory with them.
        for watch in self._watches:
            if watch.lane.ring.state == FAILED and self._keeper is not None:
                self._keeper.failed(remote_error(watch.lane.ring))

    @property
    def closed(self) -> bool:
        return self._closed

    def stop(self) -> None:
        """End all producers. Does nothing in a process forked from the trainer."""
        if os.getpid() != self._owner:
            return
        self._closed = True
        if self._keeper is not None:
            self._keeper.stop()

    def close(self) -> None:
        """End all producers and give the memory back."""
        keeper = self._keeper
        if keeper is not None and self._is_own_thread() and not keeper.has_ended:
            self._closed = self._release_in_keeper = True  # garbage collection may strike on any thread
            keeper.leave()
        elif os.getpid() == self._owner:
            self.stop()
            self.release()

    def _is_own_thread(self) -> bool:
        here = threading.current_thread()
        keeper = self._keeper is not None and self._keeper.is_this_thread()
        return keeper or here in [watch.producer.thread for watch in self._watches]

    def _producers_ended(self) -> Callable[[], None] | None:
        rest = None if self._sharing is None else self._sharing.rest(self._starter)
        if self._starter is not None and rest is None:
            self._starter.close()
        if self._release_in_keeper:
            self.release()
        return rest

    def _gave_up(self) -> None:
        """Where the engine raised, the other ranks are told in their rings."""
        if self._sharing is not None and all(ring.state != FAILED for ring in self.rings):
            self._sharing.withdraw()

    def release(self) -> None:
        if self._sharing is not None:
            self._sharing.withdraw()
        self._give_back()

    def _give_back(self) -> None:
        self.sharers()
        for watch in self._watches:
            watch.lane.close()
        self._watches.clear()
        self.mailboxes = None
        if self._mailboxes_memory is not None:
            self._mailboxes_memory.close()
            self._mailboxes_memory = None
        if self._keeper is not None:
            self._keeper.release()

    def _require_memory(self) -> None:
        layout = self.layout
        what = (
            f"{self.config.producers} x {layout.slots} slots of {layout.batch_size} images of "
            f"{'x'.join(str(side) for side in layout.image_shape)}"
        )
        self.placement.require(self.nbytes, what)

    def _allocate(self) -> None:
        self._starter = Starter(self._start_method, self.work.engine.partition(":")[0])
        log.debug("%s", self.placement)
        if self._mailboxes_shape is not None:
            self._mailboxes_memory = Memory.create(self.placement.host, Mailboxes.nbytes(*self._mailboxes_shape))
            self.mailboxes = Mailboxes(self._mailboxes_memory, *self._mailboxes_shape)
            self.mailboxes.clear()
        if self._meeting is not None:
            # Where it was interrupted, the others may have found it since.
            self._sharing = self._sharing or Sharing(self._meeting, self.config)
            self._sharing.meet()
        for at in range(self.config.producers):
            with contextlib.ExitStack() as undo:
                lane, work = self._new_lane(undo), self.placement.work(self.work, at)
                if self._sharing is not None:
                    producer: Producer = self._sharing.producer(lane, work, at)
                else:
                    producer = _BACKENDS[self.backend](lane, work)
                self._watches.append(Watch(producer, lane))
                undo.pop_all()

    def _new_lane(self, undo: contextlib.ExitStack) -> Lane:
        block = Memory.create(self.placement.host, self.layout.nbytes, huge_pages=self.config.huge_pages)
        undo.callback(block.close)
        images = self.placement.images(block)
        if images is not None:
            undo.callback(images.close)
        ring = Ring(block, self.layout)
        ring.place(images)
        ours, theirs = socket.socketpair()
        if self.config.huge_pages and not block.huge_pages and not self._watches:
            log.warning("stream.huge_pages: %s", memory.why_no_huge_pages(self.placement.host))
        return Lane(
            layout=self.layout,
            memory=block,
            ring=ring,
            wake=ours,
            wake_producer=theirs,
            mailboxes_memory=self._mailboxes_memory,
            mailboxes=self.mailboxes,
            mailboxes_shape=self._mailboxes_shape,
            starter=self._starter,
            images=images,
        )
