"""CUDA graphs: an evaluation of the sampling loop is captured once and replayed for every step of every batch.

Not measured on a GPU yet.
"""

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

_log = logging.getLogger("streamaug")


class Graphs:
    """The captured evaluations of one sampler, by key. Their intermediate values share one memory pool."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._captured: dict[Hashable, Any] = {}

    def replay(self, key: Hashable, body: Callable[[], None], changed: Sequence[torch.Tensor]) -> None:
        """Run `body`, which reads and writes buffers that keep their address, as a graph.

        changed: the buffers that `body` writes, all on one device. Raises RuntimeError when it cannot be captured;
        they then hold what they held before.
        """
        if key not in self._captured:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            began = time.monotonic()
            self._captured[key] = capture(body, changed, self._pool)
            _log.info("captured the network as CUDA graph %d in %.1f s", len(self._captured), time.monotonic() - began)
        self._captured[key].replay()


def capture(body: Callable[[], None], changed: Sequence[torch.Tensor], pool: Any) -> Any:
    """A CUDA graph of `body`, which is first run twice, so that nothing compiles or tunes itself while captured."""
    before = [tensor.clone() for tensor in changed]

    def restore() -> None:
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)

    with torch.cuda.device(changed[0].device):
        try:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):
                    body()
                    restore()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # Other threads (a trainer on the same GPU) may allocate and synchronise meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                body()
        finally:
            torch.cuda.synchronize()
            restore()
    return graph
