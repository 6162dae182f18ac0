"""DALI's own PyTorch iterators, wrapped: the script around them stays as it is."""

import copy
import logging
import re

import numpy as np
import pytest
import torch
from PIL import Image

from streamaug.errors import MismatchError, StateError, UsageError
from streamaug.loader import DALIStreamLoader, StreamLoader, ranks
from streamaug.loader.compose import Composer, Options
from streamaug.loader.stats import LoaderStats

from .conformance import assert_resumes_exactly, plain
from .fakes import FakeStream

dali = pytest.importorskip("nvidia.dali")
from nvidia.dali import fn, pipeline_def, types  # noqa: E402
from nvidia.dali.plugin.base_iterator import LastBatchPolicy  # noqa: E402
from nvidia.dali.plugin.pytorch import DALIClassificationIterator, DALIGenericIterator  # noqa: E402

CLASSES = ["ant", "bee"]
COUNT, BATCH = 22, 4
POLICIES = [(LastBatchPolicy.PARTIAL, 6, 22), (LastBatchPolicy.DROP, 5, 20), (LastBatchPolicy.FILL, 6, 24)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """22 real images in two classes: pixel [4, 4] of image i is i, which is below 50; synthetic ones have 50 and up."""
    root = tmp_path_factory.mktemp("images")
    for i in range(COUNT):
        path = root / CLASSES[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.full((8, 8, 3), 90, np.uint8)
        pixels[4, 4], pixels[:, 5:7], pixels[0] = i, 0, 255
        Image.fromarray(pixels).save(path)
    return root


@pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, seed=3)
def reading(folder, layout="CHW", dtype=types.FLOAT, shuffle=True, pad=True, shards=1, shard=0):
    encoded, labels = fn.readers.file(
        file_root=str(folder),
        random_shuffle=shuffle,
        pad_last_batch=pad,
        num_shards=shards,
        shard_id=shard,
        stick_to_shard=True,
        name="reader",
    )
    images = fn.decoders.image(encoded, device="cpu")
    return fn.crop_mirror_normalize(images, dtype=dtype, output_layout=layout), labels


def iterator(folder, policy=LastBatchPolicy.PARTIAL, auto_reset=True, pipeline=None, kind=DALIClassificationIterator):
    return kind(
        pipeline or reading(folder, exec_dynamic=False),
        reader_name="reader",
        last_batch_policy=policy,
        auto_reset=auto_reset,
    )


def stream(**options):
    return FakeStream((3, 8, 8), CLASSES, **options)


def wrapped(folder, ratio=0.5, mode=None, displaced=None, **options):
    return StreamLoader(iterator(folder, **options), stream(), ratio, mode, displaced=displaced, with_ids=True)


def real_pixels(batch):
    return batch["data"][batch["synthetic_ids"] < 0][:, 0, 4, 4].tolist()


@pytest.mark.parametrize("executor", [{"exec_dynamic": False}, {"exec_dynamic": True}])
@pytest.mark.parametrize("layout", ["CHW", "HWC"])
@pytest.mark.parametrize("dtype", [types.FLOAT, types.FLOAT16, types.UINT8])
def test_a_training_script_gets_synthetic_images_in_the_batches_it_knows(folder, layout, dtype, executor):
    def train(loader):
        read = []
        for data in loader:
            images, labels = data[0]["data"], data[0]["label"].squeeze(-1).long()
            pixel = images[:, 4, 4, 1] if layout == "HWC" else images[:, 1, 4, 4]
            read.append((images.dtype, tuple(images.shape), pixel.float().round().tolist(), labels.tolist()))
        loader.reset()
        return read

    def fresh():
        return iterator(folder, auto_reset=False, pipeline=reading(folder, layout, dtype, **executor))

    plain_batches = train(fresh())
    loader = StreamLoader(fresh(), stream(), 0.5)
    ids, labels_of = 0, {}
    for epoch in range(2):
        mixed = train(loader)
        assert len(mixed) == len(plain_batches) == len(loader)
        for (*form, pixels, labels), (*real_form, real, real_labels) in zip(mixed, plain_batches, strict=True):
            assert form == real_form
            made = [value >= 50 for value in pixels]
            assert sum(made) == len(made) // 2
            labels_of |= {v: label for v, label, is_made in zip(pixels, labels, made, strict=True) if is_made}
            ids += sum(made)
            if epoch == 0:  # the real rows stand where they stood
                for row in range(len(made)):
                    assert made[row] or (pixels[row], labels[row]) == (real[row], real_labels[row])
    assert ids == 22 and labels_of == {i + 50: i % 2 for i in range(22)}


def test_the_structure_types_and_ids_are_dalis(folder):
    for batch in wrapped(folder):
        assert type(batch) is list and len(batch) == 1
        [fields] = batch
        assert list(fields) == ["data", "label", "synthetic_ids"]
        assert fields["label"].dtype == torch.int32 and fields["label"].shape == (len(fields["data"]), 1)
        made = fields["synthetic_ids"] >= 0
        assert fields["label"][made][:, 0].tolist() == (fields["synthetic_ids"][made] % 2).tolist()


@pytest.mark.parametrize("auto_reset", [True, False])
@pytest.mark.parametrize(("policy", "length", "images"), POLICIES)
def test_epochs_end_and_begin_as_dali_has_them(folder, policy, length, images, auto_reset):
    loader = wrapped(folder, 0.5, "append", policy=policy, auto_reset=auto_reset)
    alone = iterator(folder, policy, auto_reset)
    for _ in range(3):
        own = [batch["data"][:, 0, 4, 4].tolist() for [batch] in alone]
        delivered = [batch for [batch] in loader]
        assert len(delivered) == len(loader) == len(alone) == length
        assert [real_pixels(batch) for batch in delivered] == own
        assert sum(map(len, own)) == images


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("policy", [policy for policy, *_ in POLICIES])
def test_deferred_epochs_are_as_long_as_they_say(folder, policy, pad):
    for shard in (0, 1):
        pipeline = reading(folder, pad=pad, shards=2, shard=shard, exec_dynamic=False)
        loader = wrapped(folder, displaced="defer", policy=policy, pipeline=pipeline)
        for _ in range(2):
            expected, batches = len(loader), [batch for [batch] in loader]
            assert len(batches) == expected
            if policy is LastBatchPolicy.PARTIAL and pad:
                assert len({pixel for batch in batches for pixel in real_pixels(batch)}) == 11


def test_at_ratio_zero_batches_are_the_iterators_own_and_the_stream_is_not_touched(folder):
    class Told(DALIClassificationIterator):
        def __next__(self):
            self.last = super().__next__()
            return self.last

    real, synthetic = iterator(folder, kind=Told), stream()
    count = 0
    for batch in StreamLoader(real, synthetic, 0):
        assert batch is real.last
        count += 1
    assert count == len(real) and synthetic.calls == 0


def test_a_subclass_that_gives_tuples_is_wrapped_as_well(folder):
    class Pairs(DALIClassificationIterator):
        def __next__(self):
            [batch] = super().__next__()
            return batch["data"], batch["label"].squeeze(1).long()

    for images, labels, ids in StreamLoader(iterator(folder, kind=Pairs), stream(), 0.5, with_ids=True):
        made = ids >= 0
        assert images[made][:, 0, 4, 4].round().tolist() == (ids[made] + 50).tolist()
        assert labels[made].tolist() == (ids[made] % 2).tolist()


def test_fields_of_other_names_are_found_by_key_and_others_filled(folder):
    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, exec_dynamic=False)
    def three():
        encoded, labels = fn.readers.file(file_root=str(folder), name="reader")
        images = fn.crop_mirror_normalize(fn.decoders.image(encoded, device="cpu"), dtype=types.FLOAT)
        return labels, images, labels + 100

    def build():
        return DALIGenericIterator(three(), ["kind", "picture", "index"], reader_name="reader")

    with pytest.raises(UsageError, match="fields beside images and labels: 'index'"):
        list(StreamLoader(build(), stream(), 0.5, label_key="kind"))
    loader = StreamLoader(
        build(), stream(), 0.5, label_key="kind", fill=lambda key, made: -made.ids[:, None] - 1, with_ids=True
    )
    for [batch] in loader:
        made = batch["synthetic_ids"] >= 0
        assert batch["index"][made][:, 0].tolist() == (-batch["synthetic_ids"][made] - 1).tolist()
        assert bool((batch["index"][~made] >= 100).all())


def test_classes_are_mapped_and_feedback_gets_the_streams_labels(folder):
    loader = StreamLoader(iterator(folder), stream(), 0.5, with_ids=True, classes=CLASSES[::-1])
    batch = next(iter(loader))
    labels, ids = loader.labels_and_ids(batch)
    made = ids >= 0
    assert batch[0]["label"][made][:, 0].tolist() == (1 - ids[made] % 2).tolist()
    assert labels.shape == (BATCH,) and labels[made].tolist() == (ids[made] % 2).tolist()


def test_several_pipelines_are_refused_with_what_works(folder):
    pipelines = [reading(folder, shards=2, shard=shard, exec_dynamic=False) for shard in (0, 1)]
    with pytest.raises(UsageError, match=r"over 2 pipelines .*one pipeline with shard_id=rank"):
        StreamLoader(iterator(folder, pipeline=pipelines), stream(), 0.5)


def test_ranks_that_all_read_the_whole_folder_are_warned_of(folder, caplog, monkeypatch):
    monkeypatch.setattr(ranks, "in_group", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 2)
    for shards, warnings in ((1, 2), (2, 0)):

        def build(source=None, shards=shards, **options):
            return reading(folder, shards=shards, exec_dynamic=False, **options)

        caplog.clear()
        for real in (iterator(folder, pipeline=build()), DALIStreamLoader(build, stream()).real_loader):
            ranks.check_real(real)
        assert caplog.text.count("num_shards=world_size and shard_id=rank") == warnings


@pytest.mark.parametrize("checkpoints", [True, False])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
def test_at_the_end_of_an_epoch_another_number_of_ranks_goes_on_with_all_images(folder, before, after, checkpoints):
    def ranks_of(count):
        for rank in range(count):
            pipeline = reading(folder, shards=count, shard=rank, exec_dynamic=False, enable_checkpointing=checkpoints)
            synthetic = stream(rank=rank)
            synthetic.world_size = count
            yield StreamLoader(iterator(folder, pipeline=pipeline), synthetic, 0)

    with_last_batch, after_it = [], []
    for loader in ranks_of(before):
        batches = iter(loader)
        for _ in range(len(loader)):
            next(batches)
        with_last_batch.append(copy.deepcopy(loader.state_dict()))
        assert list(batches) == []
        after_it.append(loader.state_dict())
    for states in (with_last_batch, after_it):
        seen = []
        for loader in ranks_of(after):
            loader.load_state_dict({"ranks": states})
            for [batch] in [*loader] or [*loader]:
                seen += batch["data"][:, 0, 4, 4].int().tolist()
        assert sorted(seen) == list(range(COUNT))


def test_inside_an_epoch_another_number_of_ranks_is_refused(folder):
    first = wrapped(folder)
    next(iter(first))
    state = first.state_dict() | {"stream": None}
    with pytest.raises(StateError, match=r"saved by 2 ranks inside an epoch and is loaded by 1.*start 2 ranks"):
        wrapped(folder).load_state_dict({"ranks": [state] * 2})


def test_images_of_another_size_are_refused_in_dalis_layout_too(folder):
    pipeline = reading(folder, "HWC", exec_dynamic=False)
    with pytest.raises(MismatchError, match=r"float32 \[8, 8, 3\](.|\n)*float32 \[3, 16, 16\]"):
        list(StreamLoader(iterator(folder, pipeline=pipeline), FakeStream((3, 16, 16), CLASSES), 0.5))


def test_an_iterator_without_a_size_has_no_length_and_is_read_until_it_ends(folder):
    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, exec_dynamic=False)
    def endless():
        pixels = np.zeros((BATCH, 3, 8, 8), np.float32)
        pixels[:, :, 0] = 255

        def source(iteration):
            if iteration == 3:
                raise StopIteration
            return pixels, np.zeros((BATCH, 1), np.int32)

        images, labels = fn.external_source(source=source, num_outputs=2)
        return images, labels

    loader = StreamLoader(DALIGenericIterator(endless(), ["data", "label"]), stream(), 0.5)
    with pytest.raises(TypeError, match="built without reader_name= and size="):
        len(loader)
    assert [len([*loader]) for _ in range(2)] == [3, 3]


@pipeline_def(batch_size=BATCH, num_threads=1, device_id=None)
def augmenting(folder, pad=True):
    """Shuffled, with draws of its own."""
    encoded, labels = fn.readers.file(file_root=str(folder), random_shuffle=True, pad_last_batch=pad, name="reader")
    images = fn.crop_mirror_normalize(fn.decoders.image(encoded, device="cpu"), dtype=types.FLOAT)
    return images * fn.random.uniform(range=[0.9, 1]), labels


def checkpointed(folder, seed=3, pad=True, **executor):
    return augmenting(folder, seed=seed, pad=pad, enable_checkpointing=True, **executor)


@pytest.mark.parametrize("executor", [{"exec_dynamic": False}, {"exec_dynamic": True, "prefetch_queue_depth": 3}])
@pytest.mark.parametrize("auto_reset", [True, False])
@pytest.mark.parametrize(
    ("policy", "pad"),
    [
        (LastBatchPolicy.PARTIAL, True),
        pytest.param(LastBatchPolicy.DROP, True, marks=pytest.mark.matrix),
        pytest.param(LastBatchPolicy.FILL, True, marks=pytest.mark.matrix),
        (LastBatchPolicy.FILL, False),
    ],
)
def test_a_pipeline_with_checkpoints_resumes_exactly_anywhere(folder, policy, pad, auto_reset, executor):
    def build():
        pipeline = checkpointed(folder, pad=pad, **executor)
        return wrapped(folder, policy=policy, pipeline=pipeline, auto_reset=auto_reset)

    assert_resumes_exactly(build)


@pytest.mark.parametrize("auto_reset", [True, False])
@pytest.mark.parametrize("options", [{"mode": "append", "ratio": 0.3}, {"displaced": "defer"}])
def test_a_pipeline_with_checkpoints_resumes_exactly_in_every_mode(folder, options, auto_reset):
    assert_resumes_exactly(lambda: wrapped(folder, pipeline=checkpointed(folder), auto_reset=auto_reset, **options))


def test_checkpoints_need_no_seed_and_survive_a_file(folder, tmp_path, caplog):
    first = wrapped(folder, pipeline=checkpointed(folder, seed=None))
    batches = (batch for _ in range(3) for batch in first)
    for _ in range(9):
        next(batches)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = wrapped(folder, pipeline=checkpointed(folder, seed=None))
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [plain(batch) for _ in range(2) for batch in second] == [plain(batch) for batch in batches]
    assert "again" not in caplog.text and "anew" not in caplog.text


def test_without_checkpoints_a_seeded_pipeline_is_read_again_from_its_beginning_at_a_cost_that_is_said(folder, caplog):
    def build(seed=3, auto_reset=True):
        return wrapped(folder, pipeline=augmenting(folder, seed=seed), auto_reset=auto_reset)

    for auto_reset in (True, False):
        for stop in (1, 4, 8):
            first = build(auto_reset=auto_reset)
            batches = (batch for _ in range(3) for batch in first)
            for _ in range(stop):
                next(batches)
            state = copy.deepcopy(first.state_dict())
            second = build(auto_reset=auto_reset)
            second.load_state_dict(state)
            assert second.state_dict() == state
            caplog.clear()
            again = (batch for _ in range(3) for batch in second)
            assert plain(next(again)) == plain(next(batches))
            assert f"{stop} batches are read again" in caplog.text and "enable_checkpointing=True" in caplog.text
            assert re.search(rf"reading {stop} batches again took \d+\.\d", caplog.text)
            third = build(auto_reset=auto_reset)
            third.load_state_dict(copy.deepcopy(second.state_dict()))
            expected = [plain(batch) for batch in batches]
            assert [plain(batch) for batch in again][: len(expected)] == expected
            assert [plain(batch) for _ in range(3) for batch in third][: len(expected)] == expected
    with pytest.raises(StateError, match=r"has read .* batches and cannot go back"):
        second.load_state_dict(state)
    with pytest.raises(StateError, match=r"seed of the DALI pipeline was 3 .* and is 4 now"):
        build(seed=4).load_state_dict(state)


def test_a_state_of_a_pipeline_with_checkpoints_needs_one(folder):
    first = wrapped(folder, pipeline=checkpointed(folder))
    next(iter(first))
    with pytest.raises(StateError, match="built without enable_checkpointing=True"):
        wrapped(folder).load_state_dict(first.state_dict())


@pytest.mark.parametrize("checkpoints", [True, False])
def test_the_rest_of_a_resumed_epoch_can_be_left(folder, checkpoints):
    def build():
        return wrapped(folder, pipeline=augmenting(folder, seed=3, enable_checkpointing=checkpoints))

    first = build()
    batches = iter(first)
    for _ in range(4):
        next(batches)
    state = copy.deepcopy(first.state_dict())
    assert len(list(batches)) == 2
    next_epoch = [batch for [batch] in StreamLoader(first.real_loader, stream(), 0)]
    second = build()
    second.load_state_dict(state)
    second.end_resumed_epoch()
    for [batch], real in zip(second, next_epoch, strict=True):
        kept = batch["synthetic_ids"] < 0
        assert torch.equal(batch["data"][kept], real["data"][kept]) and bool((~kept).any())


def test_without_seed_and_checkpoints_a_state_is_refused_inside_an_epoch_and_goes_on_between_epochs(folder, caplog):
    def wrapped(folder):
        return StreamLoader(iterator(folder, pipeline=augmenting(folder, seed=None)), stream(), 0.5, with_ids=True)

    whole = wrapped(folder)
    expected = [plain(batch) for _ in range(2) for batch in whole][6:]
    first = wrapped(folder)
    batches = iter(first)
    assert first.state_dict()["real"] == {"pulled": 0, "finished": False}
    for _ in range(5):
        next(batches)
        with pytest.raises(StateError, match=r"inside an epoch: .*enable_checkpointing=True.*sa\.DALIStreamLoader"):
            first.state_dict()
    next(batches)
    before_its_end = first.state_dict()
    assert list(batches) == []
    for state in (before_its_end, first.state_dict()):
        second = wrapped(folder)
        second.load_state_dict(state)
        assert second.state_dict() == state
        caplog.clear()
        rest = [plain(batch) for batch in second] or [plain(batch) for batch in second]
        assert [batch["synthetic_ids"] for [batch] in rest] == [batch["synthetic_ids"] for [batch] in expected]
        assert caplog.text.count("begins its shuffling and its random operators anew") == 1
    batches = iter(second)
    next(batches)
    with pytest.raises(StateError, match="cannot go back: load the state into a StreamLoader around a new iterator"):
        second.load_state_dict(before_its_end)
    other = StreamLoader([[{"data": torch.rand(4, 3, 8, 8), "label": torch.zeros(4, 1).int()}]], stream(), 0.5)
    with pytest.raises(StateError, match=r"real_loader was 'dali' and is 'plain' now"):
        other.load_state_dict(before_its_end)


def test_an_epoch_that_was_left_goes_on_in_the_next_loop_as_without_the_wrapper(folder):
    def counts(loader):
        next(iter(loader))
        return [len([*loader]) for _ in range(2)]

    assert counts(wrapped(folder)) == counts(iterator(folder)) == [5, 6]


def test_closed_it_gives_nothing_more_and_the_iterator_is_the_users(folder):
    real = iterator(folder)
    loader = StreamLoader(real, stream(), 0.5)
    assert loader.batch_size == BATCH and not hasattr(loader, "next")
    next(iter(loader))
    loader.close()
    with pytest.raises(UsageError, match="was closed"):
        list(loader)
    assert len([*real]) == 5


class OnGpu(torch.Tensor):
    device = torch.device("cuda:0")


@pytest.mark.parametrize(
    ("images", "deliver_on", "producers_on_gpu", "hints"),
    [
        (OnGpu, "cpu", None, 1),
        (OnGpu, "cpu", True, 1),
        (OnGpu, "cpu", False, 0),
        (OnGpu, "cuda", True, 0),
        (torch.Tensor, "cpu", True, 0),
    ],
)
def test_images_that_go_through_the_host_to_a_gpu_are_hinted_at_once(
    caplog, images, deliver_on, producers_on_gpu, hints
):
    caplog.set_level(logging.INFO, "streamaug")
    synthetic = stream()
    synthetic.config = synthetic.config.model_copy(update={"deliver_on": deliver_on})
    if producers_on_gpu is not None:
        synthetic.producers_on_gpu = producers_on_gpu
    options = dict.fromkeys(Options.__dataclass_fields__) | {"soft_labels": False, "with_ids": False}
    composer = Composer(synthetic, Options(**options), LoaderStats())
    batch = torch.rand(4, 3, 8, 8).as_subclass(images), torch.zeros(4, dtype=torch.int64)
    for _ in range(2):
        composer.prepare(batch, None, lambda *given: object())
    hint = "stream.deliver_on: cuda hands images out there without a copy through the host"
    assert caplog.text.count(hint) == hints
