"""A scheduler run as a diffusers pipeline runs it, with recorded noise, and a solver table run in float64."""

import copy
import sys
from unittest import mock

import torch
from streamaug.kernels.step import Column

PAST = (Column.C0, Column.C1, Column.C2, Column.C3, Column.C4)
SHAPE = (2, 3, 4, 4)


def inputs(count, dtype=torch.float64, seed=0, scale=1.0):
    """x, and for `count` evaluations the network's outputs and the noise."""
    generator = torch.Generator().manual_seed(seed)
    x, *rest = torch.randn(1 + 2 * count, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    return x * scale, rest[:count], rest[count:]


def run_scheduler(scheduler, steps, start, x, outputs, noise, *, options=None, timing=None):
    """x after the last evaluation, by `scheduler.step`, entered at step `start` as in an image-to-image pipeline."""
    fresh = copy.deepcopy(scheduler)
    listed = {"timesteps", "sigmas"} & set(timing or {})
    fresh.set_timesteps(**({} if listed else {"num_inference_steps": steps}), **(timing or {}))
    order = getattr(fresh, "order", 1)
    if hasattr(fresh, "set_begin_index"):
        fresh.set_begin_index(start * order)
    one_dimensional = type(fresh).__name__ == "DDPMWuerstchenScheduler"
    timesteps = fresh.timesteps[: -1 if one_dimensional else None][start * order :]
    module = sys.modules[type(fresh).__module__]
    for i, t in enumerate(timesteps):
        if hasattr(fresh, "scale_model_input"):
            fresh.scale_model_input(x, t)
        draw = mock.Mock(side_effect=lambda shape, dtype=None, i=i, **_: noise[i].to(dtype))
        with mock.patch.object(module, "randn_tensor", draw, create=True):
            x = fresh.step(outputs[i], t[None] if one_dimensional else t, x, **(options or {})).prev_sample
        assert draw.call_count <= 1
    assert i + 1 == len(outputs)
    return x


def run_table(table, x, outputs, noise):
    """The recurrence in the inputs' precision."""
    history = [torch.zeros_like(x)] * (len(PAST) - 1)
    for row, e, xi in zip(table.coef, outputs, noise, strict=True):
        h = row[Column.A] * x + row[Column.S] * e
        if table.clip is not None:
            h = h.clamp(-table.clip, table.clip)
        history = [h, *history]
        x = row[Column.CX] * x + row[Column.CE] * e + row[Column.CN] * xi
        x = x + sum(row[column] * past for column, past in zip(PAST, history, strict=True))
        history = history[:-1]
    return x


def difference(a, b):
    """The largest difference in standard deviations of `b`."""
    return float((a.double() - b.double()).abs().max() / b.double().std())
