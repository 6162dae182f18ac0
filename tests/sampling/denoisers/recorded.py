"""Pipelines run with our noise: what they draw is replaced by the normals that an order's images have."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from streamaug.kernels.philox import normal

from streamaug.orders import OrderBatch


@contextmanager
def our_noise(pipeline: Any, order: OrderBatch, *, drawn: Sequence[int], solver: int, seed: int = 0) -> Iterator[None]:
    """drawn: the streams of what the pipeline itself draws, in order; solver: that of its scheduler's steps."""
    ids = torch.from_numpy(order.images["id"].copy())
    streams, steps = iter(drawn), itertools.count()

    def by_pipeline(shape: Sequence[int], **ignored: Any) -> torch.Tensor:
        return normal(ids, shape[1:], seed=seed, stream=next(streams))

    def by_scheduler(shape: Sequence[int], **ignored: Any) -> torch.Tensor:
        return normal(ids, shape[1:], seed=seed, stream=solver, step=next(steps))

    pipelines, schedulers = (sys.modules[type(each).__module__] for each in (pipeline, pipeline.scheduler))
    with (
        mock.patch.object(pipelines, "randn_tensor", by_pipeline),
        mock.patch.object(schedulers, "randn_tensor", by_scheduler),
    ):
        yield
    assert next(streams, None) is None, "the pipeline drew less than it was said to"
