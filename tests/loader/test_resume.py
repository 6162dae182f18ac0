import copy
import gc
import json
import logging
import re

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from streamaug.errors import StateError
from streamaug.loader import StreamLoader
from streamaug.loader import real as real_module

from .fakes import FakeStream, listed, real_loader

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")

EPOCHS = 3
BATCHES = 5


class Run:
    """A training run that draws random numbers of its own and can be stopped after any batch.

    Where the loader's own random state covers it, the dataset draws as well.
    """

    def __init__(self, kind=DataLoader, workers=0, generator=False, prefetch=None, count=40, batch_size=8, **options):
        torch.manual_seed(11)
        draws = kind is DataLoader and (workers > 0 or not generator)
        extra = {"generator": torch.Generator().manual_seed(4)} if generator else {}
        real = real_loader(
            count,
            batch_size,
            loader=kind,
            shuffle=True,
            num_workers=workers,
            prefetch_factor=prefetch,
            draws=draws,
            **extra,
        )
        options = {"ratio": 0.3, "with_ids": True} | options
        self.loader = StreamLoader(real, FakeStream(), **options)

    def batches(self, epochs):
        for _ in range(epochs):
            for batch in self.loader:
                torch.rand(2)  # dropout
                yield listed(batch)


def interrupted(stop, again=None, epochs=EPOCHS, **options):
    """The batches of a run stopped after `stop` (and after `again` more) and resumed by a new loader."""
    delivered = []
    run = Run(**options)
    for count in [stop] + ([again] if again else []):
        batches = run.batches(epochs)
        delivered += [next(batches) for _ in range(count)]
        state = copy.deepcopy(run.loader.state_dict())
        batches.close()
        del batches, run
        if options.get("workers"):
            gc.collect()  # torchdata's iterators end their workers here, and not while the next ones are being forked
        run = Run(**options)
        torch.manual_seed(99)
        run.loader.load_state_dict(state)
    left = epochs - state["epoch"]
    return delivered + list(run.batches(left))


STOPS = {"start": 0, "first": 1, "middle": 3, "end": BATCHES, "second epoch": BATCHES + 2}


VARIANTS = [{}, {"mode": "append"}, {"displaced": "defer"}, {"ratio": 0}]


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, options) for kind in (DataLoader, StatefulDataLoader) for options in VARIANTS]
    + [(DataLoader, {"generator": True})],
)
def test_an_interrupted_run_delivers_what_the_uninterrupted_one_does(kind, options):
    options = options | {"kind": kind}
    whole = list(Run(**options).batches(EPOCHS))
    for name, stop in STOPS.items():
        assert interrupted(stop, **options) == whole, name
    assert interrupted(2, again=2, **options) == whole, "after a resume"


@pytest.mark.parametrize(("kind", "prefetch", "mode"), [(DataLoader, 2, "replace"), (StatefulDataLoader, 1, "append")])
def test_prefetching_workers_do_not_move_the_state(kind, prefetch, mode):
    options = {"kind": kind, "workers": 2, "prefetch": prefetch, "mode": mode, "generator": kind is DataLoader}
    whole = list(Run(**options).batches(2))
    for stop in (2, BATCHES + 3):
        assert interrupted(stop, epochs=2, **options) == whole


@pytest.mark.matrix
@pytest.mark.parametrize("mode", ["replace", "append"])
@pytest.mark.parametrize(
    ("workers", "prefetch"), [(0, None), *((workers, ahead) for workers in (1, 2) for ahead in (1, 2, 3, 4))]
)
@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_a_run_interrupted_at_any_step_of_two_epochs_delivers_what_the_uninterrupted_one_does(
    kind, workers, prefetch, mode
):
    options = {"kind": kind, "workers": workers, "prefetch": prefetch, "mode": mode}
    options["generator"] = kind is DataLoader and workers > 0
    whole = list(Run(**options).batches(2))
    for stop in range(2 * BATCHES + 1):
        assert interrupted(stop, epochs=2, **options) == whole, stop


@pytest.mark.parametrize(("long", "level"), [(0.0, "WARNING"), (60.0, "INFO")])
def test_a_plain_loader_says_what_its_resume_costs_and_warns_where_it_is_long(long, level, caplog, monkeypatch):
    monkeypatch.setattr(real_module, "_LONG_RESUME", long)
    run = Run()
    next(run.batches(1))
    state = run.loader.state_dict()
    fresh = Run()
    fresh.loader.load_state_dict(state)
    with caplog.at_level(logging.INFO, logger="streamaug"):
        next(iter(fresh.loader))
    (record,) = (record for record in caplog.records if "resumed in mid-epoch" in record.message)
    assert record.levelname == level
    assert re.search(r"first 1 batches .* again, which took \d+\.\d s; with torchdata's Stateful", record.message)


def test_a_stateful_loader_resumes_without_reading_again(caplog):
    run = Run(kind=StatefulDataLoader)
    next(run.batches(1))
    fresh = Run(kind=StatefulDataLoader)
    fresh.loader.load_state_dict(run.loader.state_dict())
    read = []
    fresh.loader.dataset.__class__.__getitem__, original = (
        lambda self, index: read.append(index) or original(self, index),
        fresh.loader.dataset.__class__.__getitem__,
    )
    try:
        next(iter(fresh.loader))
    finally:
        fresh.loader.dataset.__class__.__getitem__ = original
    assert len(read) == 8 and "again" not in caplog.text


def test_the_state_is_numbers_but_for_the_random_states():
    run = Run()
    next(run.batches(1))
    state = run.loader.state_dict()
    assert set(state["real"].pop("tensors")) == {"now_global", "began_global"}
    assert json.loads(json.dumps(state))["step"] == 1


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"mode": "append"}, "mode was 'replace' and is 'append' now"),
        ({"displaced": "defer"}, "displaced was 'drop' and is 'defer' now"),
        ({"seed": 3}, "seed was 0 and is 3 now"),
        ({"kind": StatefulDataLoader}, "real_loader was 'plain' and is 'stateful' now"),
        ({"batch_size": 4}, "batch_size was 8 and is 4 now"),
        ({"count": 48}, "real_images was 40 and is 48 now"),
    ],
)
def test_a_state_of_another_configuration_is_refused_with_both_hashes_and_what_differs(options, difference):
    state = Run().loader.state_dict()
    with pytest.raises(StateError, match=r"\(([0-9a-f]{12}), this one is (?!\1)[0-9a-f]{12}\)") as refusal:
        Run(**options).loader.load_state_dict(state)
    assert str(refusal.value).splitlines()[1:-1] == [f"  {difference}"]


def test_all_that_differs_is_named_at_once_and_a_state_of_no_loader_is_refused():
    state = StreamLoader(None, FakeStream(), epoch_steps=4, batch_size=8).state_dict()
    with pytest.raises(StateError, match=r"epoch_steps was 4 and is 5 now"):
        StreamLoader(None, FakeStream(), epoch_steps=5, batch_size=8).load_state_dict(state)
    with pytest.raises(StateError, match=r"real_loader was None and is 'plain' now\n  seed was 0 and is 3 now"):
        Run(seed=3).loader.load_state_dict(state)
    with pytest.raises(StateError, match="version None"):
        Run().loader.load_state_dict({})


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"ranks": [state]}, lambda s: {"ranks": [s, s]}])
def test_a_state_that_another_version_saved_is_refused_with_what_works(wrap):
    state = {"version": 2, "batch": 3}
    with pytest.raises(StateError, match=r"version 3 is needed, got version 2: .*the streamaug that saved it"):
        Run().loader.load_state_dict(wrap(state))
    with pytest.raises(StateError, match=r"version 3 is needed, got version None"):
        Run().loader.load_state_dict({"ranks": []})


def test_passing_over_batches_of_an_epoch_that_was_resumed_passes_over_none():
    expected = list(Run(generator=True).batches(1))
    run = Run(generator=True)
    batches = run.batches(1)
    for _ in range(3):
        next(batches)
    for first in (2, 3, 5):
        fresh = Run(generator=True)
        fresh.loader.load_state_dict(run.loader.state_dict())
        rest = fresh.loader.from_batch(first)
        assert len(rest) == 2 and [listed(batch) for batch in rest] == expected[3:]
    assert len(list(Run(generator=True).loader.from_batch(2))) == 3


def test_counts_go_on_after_a_resume():
    run = Run()
    batches = run.batches(1)
    for _ in range(3):
        next(batches)
    fresh = Run()
    fresh.loader.load_state_dict(run.loader.state_dict())
    list(fresh.batches(1))
    whole = Run()
    list(whole.batches(1))
    assert fresh.loader.stats().synthetic == whole.loader.stats().synthetic
    assert fresh.loader.stats().batches == BATCHES


def test_a_state_saved_after_an_error_says_what_is_lost(caplog):
    run = Run()
    batches = run.batches(1)
    next(batches)
    run.loader.stream.take = lambda n: 1 / 0
    with pytest.raises(ZeroDivisionError):
        next(batches)
    with caplog.at_level(logging.WARNING, logger="streamaug"):
        assert run.loader.state_dict()["batch"] == 1
    assert "lost" in caplog.text


def test_synthetic_only_epochs_resume():
    def loader():
        return StreamLoader(None, FakeStream(), epoch_steps=4, with_ids=True)

    whole = loader()
    expected_batches = [listed(batch) for _ in range(2) for batch in whole]
    first = loader()
    batches = iter(first)
    delivered = [listed(next(batches)) for _ in range(3)]
    second = loader()
    second.load_state_dict(first.state_dict())
    delivered += [listed(batch) for _ in range(2) for batch in second]
    assert delivered == expected_batches
