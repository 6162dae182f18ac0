import copy
import json
import logging

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from streamaug.errors import StateError
from streamaug.loader import StreamLoader

from .fakes import FakeStream, listed, real_loader

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")

EPOCHS = 3
BATCHES = 5


class Run:
    """A training run that draws random numbers of its own and can be stopped after any batch.

    Where the loader's own random state covers it, the dataset draws as well.
    """

    def __init__(self, kind=DataLoader, workers=0, generator=False, **options):
        torch.manual_seed(11)
        draws = kind is DataLoader and (workers > 0 or not generator)
        extra = {"generator": torch.Generator().manual_seed(4)} if generator else {}
        real = real_loader(loader=kind, shuffle=True, num_workers=workers, draws=draws, **extra)
        options = {"ratio": 0.3, "with_ids": True} | options
        self.loader = StreamLoader(real, FakeStream(), **options)

    def batches(self, epochs=EPOCHS):
        for _ in range(epochs):
            for batch in self.loader:
                torch.rand(2)  # dropout
                yield listed(batch)


def interrupted(stop, again=None, **options):
    """The batches of a run stopped after `stop` (and after `again` more) and resumed by a new loader."""
    delivered = []
    run = Run(**options)
    for count in [stop] + ([again] if again else []):
        batches = run.batches()
        delivered += [next(batches) for _ in range(count)]
        state = copy.deepcopy(run.loader.state_dict())
        batches.close()
        run = Run(**options)
        torch.manual_seed(99)
        run.loader.load_state_dict(state)
    left = EPOCHS - state["epoch"]
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
    whole = list(Run(**options).batches())
    for name, stop in STOPS.items():
        assert interrupted(stop, **options) == whole, name
    assert interrupted(2, again=2, **options) == whole, "after a resume"


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_prefetching_workers_do_not_move_the_state(kind):
    options = {"kind": kind, "workers": 2, "generator": kind is DataLoader}
    whole = list(Run(**options).batches())
    for stop in (2, BATCHES + 3):
        assert interrupted(stop, **options) == whole


def test_a_plain_loader_says_what_its_resume_costs(caplog):
    run = Run()
    batches = run.batches()
    next(batches)
    state = run.loader.state_dict()
    fresh = Run()
    fresh.loader.load_state_dict(state)
    with caplog.at_level(logging.WARNING, logger="streamaug"):
        next(iter(fresh.loader))
    assert "reading 1 batches again" in caplog.text and "StatefulDataLoader" in caplog.text


def test_the_state_is_numbers_but_for_the_random_states():
    run = Run()
    next(run.batches())
    state = run.loader.state_dict()
    assert set(state["real"].pop("tensors")) == {"now_global", "began_global"}
    assert json.loads(json.dumps(state))["step"] == 1


def test_a_state_of_another_loader_is_refused_with_both_values():
    state = Run().loader.state_dict()
    with pytest.raises(StateError, match=r"mode='replace', this loader has mode='append'"):
        Run(mode="append").loader.load_state_dict(state)
    with pytest.raises(StateError, match="seed=0, this loader has seed=3"):
        Run(seed=3).loader.load_state_dict(state)
    with pytest.raises(StateError, match="real_loader='plain', this loader has real_loader='stateful'"):
        Run(kind=StatefulDataLoader).loader.load_state_dict(state)
    with pytest.raises(StateError, match="version None"):
        Run().loader.load_state_dict({})


def test_counts_go_on_after_a_resume():
    run = Run()
    batches = run.batches()
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
    batches = run.batches()
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
