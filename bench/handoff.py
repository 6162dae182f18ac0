"""What it costs to get a batch out of the ring: its bandwidth, its latency and what a profiler's trace of it shows."""

import re
import statistics
import time
from bisect import bisect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from bench import filling

if TYPE_CHECKING:
    from streamaug.stream import Stream

BATCH, LARGE, SMALL = 64, (3, 224, 224), (1, 8, 8)
SMALL_BATCH, SMALL_SECONDS = 8, 0.002  # long enough for a trainer that waits to be asleep
_SOURCES = 5  # of plain copies, in turn, as a ring's slots are
_PAUSE = 0.001  # seconds; more than a profiler's clocks of host and device differ

# Of CUDA's runtime and driver; freeing memory synchronises too.
_SYNCHRONISING = re.compile(r"cu(da)?(\w*Synchronize|Memcpy(?!\w*Async)\w*|Free|FreeHost)(_v\d+)?")


def make_stream(
    device: torch.device,
    backend: str,
    memory: str,
    *,
    image_shape: tuple[int, int, int],
    batch_size: int,
    in_flight: int,
    seconds: float = 0.0,
) -> "Stream":
    """Producer and trainer on one device; seconds: what a batch takes besides being filled. Needs pydantic."""
    from streamaug.config import Recipe, StreamConfig
    from streamaug.orders import Planner, Schedule
    from streamaug.stream import Stream

    schedule = Schedule(np.linspace(0, 1, 11), np.linspace(1, 0, 11))
    options = {"image_shape": list(image_shape), "batch_size": batch_size, "device": str(device), "seconds": seconds}
    settings = {
        "batch_size": batch_size,
        "in_flight": in_flight,
        "backend": backend,
        "memory": memory,
        "deliver_on": str(device),
        "start_timeout": 120,
        "hang_timeout": 60,
        "max_restarts": 0,
    }
    return Stream(
        Planner(np.arange(30) % 10, 10, schedule, [Recipe(kind="noise")], batch_size, seed=0),
        engine=f"{filling.__name__}:build",
        engine_options=options,
        image_shape=image_shape,
        config=StreamConfig.model_validate(settings),
        device=str(device),
    )


def bandwidth(device: torch.device, backend: str, memory: str, *, quick: bool) -> dict[str, Any]:
    """`take` of a batch that is ready beside a plain copy of the same bytes from the same kind of memory, alternated.

    `take_us`, `copy_us`: medians by the clock, to the end of what the device does. `device_copy_over_take`: of the time
    that the device itself takes, as the trace has it. `synchronising_calls`: a take, of the trainer's process; with
    backend local that is the producer's too. The last two are absent where the trace does not show the device.
    """
    image_shape = (3, 16, 16) if quick else LARGE
    with make_stream(device, backend, memory, image_shape=image_shape, batch_size=BATCH, in_flight=4) as stream:
        copy = _plain_copy(device, memory, (BATCH, *image_shape))
        calls = {"take": lambda: stream.take(BATCH), "copy": copy}
        stream.take(BATCH)
        copy()
        samples: dict[str, list[float]] = {name: [] for name in calls}
        ends = time.perf_counter() + (0 if quick else 1)
        while len(samples["take"]) < 3 or time.perf_counter() < ends:
            _until_full(stream)
            for name, call in calls.items():
                samples[name].append(_seconds(device, call))
        found: dict[str, Any] = {f"{name}_us": 1e6 * statistics.median(values) for name, values in samples.items()}
        found["copy_over_take"] = found["copy_us"] / found["take_us"]
        events = trace(device, calls, 2 if quick else 20, lambda: _until_full(stream))
    return found | _shown(events, device, "HtoD" if memory == "pinned" else "DtoD")


def latency(device: torch.device, backend: str, memory: str, *, quick: bool) -> dict[str, Any]:
    """Of small batches that the trainer waits for, medians: from published to seen, and until `take` has returned."""
    seen, returned = [], []
    with make_stream(
        device,
        backend,
        memory,
        image_shape=SMALL,
        batch_size=SMALL_BATCH,
        in_flight=1,
        seconds=SMALL_SECONDS,
    ) as stream:
        age = 0.0
        for _ in range(20 if quick else 300):
            stream.take(SMALL_BATCH)
            arrived = time.monotonic()
            stats = stream.stats()
            before, age = age, stats.mean_age_seconds * stats.delivered
            seen.append((age - before) / SMALL_BATCH)
            returned.append(arrived - (stream.started_at or 0.0) - stats.timeline[-1][1])
    # The first calls come before everything is warm.
    return {
        "latency_p50_us": 1e6 * statistics.median(seen[5:]),
        "latency_p99_us": 1e6 * float(np.percentile(seen[5:], 99)),
        "returned_p50_us": 1e6 * statistics.median(returned[5:]),
    }


def _plain_copy(device: torch.device, memory: str, shape: tuple[int, ...]) -> Callable[[], object]:
    where: dict[str, Any] = {"pin_memory": True} if memory == "pinned" else {"device": device}
    sources = [torch.full(shape, at, dtype=torch.uint8, **where) for at in range(_SOURCES)]
    target = torch.empty(shape, dtype=torch.uint8, device=device)

    def copy() -> None:
        sources.append(sources.pop(0))
        target.copy_(sources[0], non_blocking=True)

    return copy


def _until_full(stream: "Stream") -> None:
    """The producer has made all it may (the next order is issued by the next take), and sleeps."""
    deadline = time.monotonic() + 5
    while stream.stats().ring_fill < 0.75 and time.monotonic() < deadline:
        time.sleep(_PAUSE / 2)
    time.sleep(_PAUSE)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(device: torch.device, call: Callable[[], object]) -> float:
    _synchronize(device)
    began = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - began


# What a trace shows.


def trace(
    device: torch.device, calls: dict[str, Callable[[], object]], rounds: int, prepare: Callable[[], object]
) -> list[Any]:
    """The profiler's events of so many rounds, in each of which every call has a range of its name around it.

    Each begins when the device has ended what came before.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(rounds):
            prepare()
            for name, call in calls.items():
                with record_function(name):
                    call()
                _synchronize(device)
                time.sleep(_PAUSE)
    return list(profiler.events())


def _shown(events: list[Any], device: torch.device, direction: str) -> dict[str, Any]:
    copies = copied_us(events, ("take", "copy"), direction)
    found: dict[str, Any] = {}
    if copies["take"] and copies["copy"]:
        found["device_copy_over_take"] = statistics.median(copies["copy"]) / statistics.median(copies["take"])
    if copies["take"] or device.type != "cuda":
        names = synchronising(events, "take")
        found["synchronising_calls"] = len(names) / len(_ranges(events, ["take"]))
        if names:
            found["synchronising"] = sorted(set(names))
    return found


def synchronising(events: list[Any], name: str) -> list[str]:
    """Names of the calls within ranges of that name, on any thread, for which a host waits for its device."""
    within = [(began, ended) for began, ended, _ in _ranges(events, [name])]
    return [
        event.name
        for event in events
        if event.device_type == DeviceType.CPU
        and _SYNCHRONISING.fullmatch(event.name)
        and any(began <= event.time_range.start <= ended for began, ended in within)
    ]


def copied_us(events: list[Any], names: Iterable[str], direction: str) -> dict[str, list[float]]:
    """Microseconds that the device took for copies ("DtoD", "HtoD"), by the name of the range that came before."""
    found: dict[str, list[float]] = {name: [] for name in names}
    ranges = _ranges(events, found)
    starts = [began for began, _, _ in ranges]
    for event in events:
        if event.device_type == DeviceType.CUDA and event.name.startswith(f"Memcpy {direction}"):
            at = bisect(starts, event.time_range.start)
            if at:
                found[ranges[at - 1][2]].append(event.time_range.elapsed_us())
    return found


def _ranges(events: list[Any], names: Iterable[str]) -> list[tuple[float, float, str]]:
    """(began, ended, name) on the host; a trace has ranges on the device too."""
    named = [event for event in events if event.device_type == DeviceType.CPU and event.name in names]
    return sorted((event.time_range.start, event.time_range.end, event.name) for event in named)
