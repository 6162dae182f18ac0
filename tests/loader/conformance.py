"""What every stateful loader promises: saved anywhere and restored elsewhere, it delivers what it would have.

The pattern is that of torchdata's own node tests: at the start, in the middle, at the end, in the second epoch, and
after a resume; into a new loader, and back into the one that went on.
"""

import copy

import torch


def plain(value):
    """Something comparable: tensors as lists, structure kept."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def epochs_of(loader, count):
    return [[plain(item) for item in loader] for _ in range(count)]


class Reader:
    """Reads a loader item by item over the ends of its epochs."""

    def __init__(self, loader):
        self.loader, self._items = loader, None

    def read(self, count):
        read = []
        while len(read) < count:
            if self._items is None:
                self._items = iter(self.loader)
            item = next(self._items, None)
            if item is None:
                self._items = None
            else:
                read.append(plain(item))
        return read

    def save(self):
        return copy.deepcopy(self.loader.state_dict())

    def restore(self, state):
        self.loader.load_state_dict(state)
        self._items = None


def assert_resumes_exactly(make, epochs=3):
    """`make()` builds the same loader anew, on a stream of its own."""
    by_epoch = epochs_of(make(), epochs)
    whole = [item for epoch in by_epoch for item in epoch]
    size = len(by_epoch[0])
    assert size > 2 and len({repr(item) for item in whole}) > size, "the second epoch must not repeat the first"
    stops = {"start": 0, "first": 1, "middle": size // 2, "end": size, "second epoch": size + size // 2}
    for name, stop in stops.items():
        reader = Reader(make())
        assert reader.read(stop) == whole[:stop], name
        state = reader.save()
        fresh = Reader(make())
        fresh.restore(state)
        again = size // 3
        assert fresh.read(again) == whole[stop : stop + again], f"{name}: restored in a new loader"
        second = fresh.save()
        fresher = Reader(make())
        fresher.restore(second)
        assert fresher.read(len(whole) - stop - again) == whole[stop + again :], f"{name}: after a resume"
        if stop:
            reader.read(1)
            reader.restore(state)
            assert reader.read(size) == whole[stop : stop + size], f"{name}: restored in the loader that went on"
