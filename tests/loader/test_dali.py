import builtins
import contextlib
import copy
import functools
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stream import fakes as streams

from streamaug.errors import MismatchError, MissingExtra, StateError, UsageError
from streamaug.loader import DALIStreamLoader, dali_source, stream_source

from .conformance import assert_resumes_exactly, plain
from .fakes import FakeStream, Steered

dali = pytest.importorskip("nvidia.dali")
from nvidia.dali import fn, pipeline_def, types  # noqa: E402

SHAPE = (3, 8, 8)
CLASSES = ["ant", "bee"]
COUNT, BATCH = 22, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """22 real images in two classes; all pixels of image i are i, so real pixels are below 50, synthetic from 50."""
    root = tmp_path_factory.mktemp("images")
    for i in range(COUNT):
        path = root / CLASSES[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(path)
    return root


@pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, exec_dynamic=False, seed=3)
def training(folder, source=None, shuffle=True, noise=0.4, size=8, dtype=types.FLOAT, pad=True):
    """Real images through the file reader and the decoder, synthetic ones through the same operators after them."""
    if source is None:
        encoded, labels = fn.readers.file(
            file_root=str(folder), random_shuffle=shuffle, pad_last_batch=pad, name="reader"
        )
        images = fn.resize(fn.decoders.image(encoded, device="cpu"), size=[size, size])
    else:
        images, labels = fn.external_source(source=source, num_outputs=2)
    images = fn.crop_mirror_normalize(images, mirror=fn.random.coin_flip(), dtype=types.FLOAT)
    if noise:
        images = images + fn.random.uniform(range=[0, noise])
    return fn.cast(images, dtype=dtype), labels


def colours(ids):
    return [identity % 200 + 50 for identity in ids]


def stream(**options):
    return FakeStream(SHAPE, CLASSES, **options)


def loader(folder, synthetic=None, ratio=0.5, noise=0.0, **options):
    built = functools.partial(training, folder, noise=noise)
    return DALIStreamLoader(built, synthetic or stream(), ratio, **({"with_ids": True} | options))


def threads():
    return {path.name for path in Path("/proc/self/task").iterdir()}


# As a source of the user's own pipeline.


def test_a_classic_pipeline_gets_each_image_once_with_its_label_through_its_own_operators(folder):
    synthetic = stream()
    pipe = training(folder, stream_source(synthetic, BATCH), noise=0.0)
    pipe.build()
    for step in range(5):
        images, labels = pipe.run()
        ids = range(step * BATCH, step * BATCH + BATCH)
        assert images.as_tensor().shape() == [BATCH, 3, 8, 8]
        assert np.asarray(images.as_tensor())[:, 0, 4, 4].tolist() == colours(ids)
        assert np.asarray(labels.as_tensor()).tolist() == [[identity % 2] for identity in ids]
    assert synthetic.next_id > 5 * BATCH, "the pipeline reads ahead"


def test_the_source_gives_contiguous_batches_with_labels_beside(folder):
    images, labels, ids = stream_source(stream(), 5, with_ids=True)()
    assert images.layout() == "HWC" and images.is_dense_tensor() and len(images) == 5
    assert np.asarray(images.as_tensor()).shape == (5, 8, 8, 3)
    assert np.asarray(labels.as_tensor()).dtype == np.int32
    assert np.asarray(ids.as_tensor())[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert np.asarray(stream_source(stream(), layout="CHW")()[0].as_tensor()).shape == (16, *SHAPE)
    soft = stream_source(stream(mixed=True), 2, soft_labels=True)()[1]
    assert np.asarray(soft.as_tensor()).tolist() == [[0.75, 0.25], [0.25, 0.75]]
    swapped = stream_source(stream(), 2, classes=CLASSES[::-1])()[1]
    assert np.asarray(swapped.as_tensor()).tolist() == [[1], [0]]


def test_memory_that_is_in_place_is_handed_on_without_a_copy():
    pixels = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
    for images in (pixels, torch.from_numpy(pixels)):
        tensors = dali_source.Tensors("CHW")
        handed, labels = tensors.lists(tensors.moved(images, np.array([[1], [0]], np.int32)))
        assert handed.data_ptr() == pixels.ctypes.data and handed.layout() == "CHW"
        assert np.asarray(labels.as_tensor()).tolist() == [[1], [0]]
    turned = dali_source.Tensors("HWC").moved(torch.from_numpy(pixels))[0]
    assert turned.is_contiguous() and turned[1, 2, 3].tolist() == pixels[1, :, 2, 3].tolist()


@pytest.mark.parametrize("layout", ["CHW", "HWC"])
def test_a_pipeline_that_does_not_copy_reads_what_is_held_for_it(layout):
    synthetic, depth = stream(), 3

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, exec_dynamic=False, prefetch_queue_depth=depth)
    def uncopied():
        source = stream_source(synthetic, BATCH, layout=layout, hold=depth + 1)
        images, labels = fn.external_source(source=source, num_outputs=2, no_copy=True)
        return fn.cast(images, dtype=types.FLOAT), labels

    pipe = uncopied()
    pipe.build()
    for step in range(12):
        images = np.asarray(pipe.run()[0].as_tensor())
        assert images[:, 1, 2, 2].tolist() == colours(range(step * BATCH, step * BATCH + BATCH))
        np.full((64, *SHAPE), 7, np.uint8)  # takes up memory that was given back too early


def test_work_for_the_gpu_is_queued_on_the_sources_own_stream_and_waited_for_before_dali_gets_it(monkeypatch):
    happened = []

    class Lane:
        def synchronize(self):
            happened.append("synchronised")

    @contextlib.contextmanager
    def inside(lane):
        happened.append(type(lane).__name__)
        yield
        happened.append("left")

    def work(tensors, kept=dali_source.Tensors.work):
        tensors._lane = Lane()
        tensors._list = lambda capsule, layout: happened.append("handed on")
        return kept(tensors)

    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(dali_source.Tensors, "work", work)
    taking = stream()
    monkeypatch.setattr(taking, "take", lambda n, take=taking.take: happened.append("taken") or take(n))
    stream_source(taking, 4)()
    assert happened == ["Lane", "taken", "left", "synchronised", "handed on", "handed on"]


@pytest.mark.gpu
def test_on_a_gpu_images_arrive_in_device_memory_and_are_those_of_the_cpu():
    def images(device):
        @pipeline_def(batch_size=BATCH, num_threads=1, device_id=0, prefetch_queue_depth=2)
        def uncopied():
            source = stream_source(stream(), BATCH, layout="CHW", device=device, hold=3)
            on = "cpu" if device == "cpu" else "gpu"
            made, labels = fn.external_source(source=source, num_outputs=2, device=on, no_copy=True)
            return fn.cast(made.gpu(), dtype=types.FLOAT), labels.gpu()

        from nvidia.dali.plugin.pytorch import DALIGenericIterator

        batches = DALIGenericIterator(uncopied(), ["data", "label"])
        return [next(batches)[0] for _ in range(6)]

    for here, there in zip(images("cpu"), images("cuda"), strict=True):
        assert there["data"].is_cuda and torch.equal(here["data"], there["data"])
        assert torch.equal(here["label"], there["label"])


@pytest.mark.gpu
def test_on_a_gpu_the_loader_mixes_in_device_memory(folder):
    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=0, seed=3)
    def on_gpu(source=None):
        if source is None:
            encoded, labels = fn.readers.file(file_root=str(folder), pad_last_batch=True, name="reader")
            pixels = fn.decoders.image(encoded, device="mixed")
        else:
            pixels, labels = fn.external_source(source=source, num_outputs=2, device="gpu", no_copy=True)
        return fn.crop_mirror_normalize(pixels, dtype=types.FLOAT), labels.gpu()

    mixed = DALIStreamLoader(on_gpu, stream(), 0.5, device="cuda", with_ids=True)
    for [batch] in mixed:
        made = batch["synthetic_ids"] >= 0
        assert batch["data"].is_cuda and batch["label"].is_cuda
        assert batch["data"].cpu()[made][:, 0, 4, 4].tolist() == colours(batch["synthetic_ids"][made].tolist())
    assert mixed.stats().synthetic == 11


def test_the_dynamic_mode_gets_the_same_images(folder):
    import nvidia.dali.experimental.dynamic as ndd

    source = ndd.ExternalSource(stream_source(stream(), BATCH), num_outputs=2)
    reader = ndd.readers.File(file_root=str(folder))
    seen = []
    for encoded, real_labels in reader.next_epoch(batch_size=BATCH):
        real = ndd.decoders.image(encoded, device="cpu")
        images, labels = source()
        both = [ndd.crop_mirror_normalize(side, dtype=ndd.float32).torch() for side in (real, images)]
        assert both[0].shape[1:] == both[1].shape[1:] == SHAPE
        assert real_labels.torch().dtype == labels.torch().dtype
        seen += both[1][:, 0, 4, 4].tolist()
    assert seen == colours(range(24))


def test_an_error_of_the_stream_comes_out_of_the_pipeline(folder):
    with streams.make_stream(backend="process", engine_options={"raise_at": 1}) as real:
        source = stream_source(real, 8, layout="CHW")
        source()
        with pytest.raises(Exception, match="the weights are rotten"):
            source()


# The loader.


@pytest.mark.parametrize(("mode", "per_epoch"), [("replace", 11), ("append", 22)])
def test_synthetic_images_arrive_in_their_share_with_labels_and_ids(folder, mode, per_epoch):
    mixed = loader(folder, mode=mode)
    ids, real = [], []
    for _ in range(2):
        for [batch] in mixed:
            assert set(batch) == {"data", "label", "synthetic_ids"} and batch["label"].shape == (len(batch["data"]), 1)
            made = batch["synthetic_ids"] >= 0
            arrived = batch["synthetic_ids"][made].tolist()
            assert batch["data"][made][:, 0, 4, 4].tolist() == colours(arrived)
            assert batch["label"][made][:, 0].tolist() == [identity % 2 for identity in arrived]
            pixels = batch["data"][~made][:, 0, 4, 4].tolist()
            assert [value % 2 for value in pixels] == batch["label"][~made][:, 0].tolist()
            ids, real = ids + arrived, real + pixels
    assert sorted(ids) == list(range(2 * per_epoch))
    assert mixed.stats().synthetic == 2 * per_epoch and mixed.stats().realised_ratio == 0.5
    if mode == "append":
        assert sorted(real) == sorted(list(range(COUNT)) * 2)
    mixed.close()


@pytest.mark.parametrize(("last_batch", "length", "images"), [("partial", 6, 22), ("drop", 5, 20), ("fill", 6, 24)])
def test_the_length_is_the_readers_epoch(folder, last_batch, length, images):
    mixed = loader(folder, last_batch=last_batch)
    for _ in range(2):
        batches = [batch for [batch] in mixed]
        assert len(batches) == len(mixed) == length
        assert sum(len(batch["data"]) for batch in batches) == images


def test_deferred_real_images_are_each_delivered_once_an_epoch(folder):
    mixed = loader(folder, displaced="defer")
    for _ in range(2):
        length, batches = len(mixed), [batch for [batch] in mixed]
        assert len(batches) == length == 11
        real = torch.cat([batch["data"][batch["synthetic_ids"] < 0] for batch in batches])
        assert sorted(real[:, 0, 4, 4].tolist()) == list(range(COUNT))


def test_at_ratio_zero_the_batches_are_dalis_own_and_the_stream_is_not_touched(folder):
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    synthetic = stream()
    mixed = [plain(batch) for batch in loader(folder, synthetic, 0, noise=0.4, with_ids=False)]
    alone = DALIGenericIterator(
        training(folder), ["data", "label"], reader_name="reader", last_batch_policy=LastBatchPolicy.PARTIAL
    )
    assert mixed == [plain(batch) for batch in alone] and synthetic.calls == 0


def test_a_new_ratio_and_feedback_are_in_a_state_saved_while_the_pipeline_holds_images_taken_before_them(folder):
    def read(mixed, synthetic, first, last):
        """Batches `first` to `last` of a script that steers the stream as it goes."""
        batches = (batch for _ in range(3) for [batch] in mixed)
        for step in range(first, last):
            if step in (2, 7):
                mixed.ratio = {"ant": 0.3, "bee": 0.6} if step == 2 else {"ant": 0.7, "bee": 0.1}
            if step in (3, 4, 8):
                synthetic.feedback()
            batch = next(batches)
            yield batch["label"][:, 0].tolist(), batch["synthetic_ids"].tolist()

    def built():
        synthetic = Steered(SHAPE, CLASSES)
        return loader(folder, synthetic), synthetic

    whole = list(read(*built(), 0, 14))
    synthetic_labels = [{label for label, identity in zip(*batch, strict=True) if identity >= 0} for batch in whole]
    assert synthetic_labels[0] == {0} and {1} in synthetic_labels and synthetic_labels[-1] == {0}
    for stop in range(1, 11):
        mixed, synthetic = built()
        assert list(read(mixed, synthetic, 0, stop)) == whole[:stop]
        state = copy.deepcopy(mixed.state_dict())
        mixed, synthetic = built()
        mixed.load_state_dict(state)
        assert plain(mixed.state_dict()) == plain(state), "saved again before the first batch"
        assert list(read(mixed, synthetic, stop, stop + 1)) == whole[stop : stop + 1], stop
        state = copy.deepcopy(mixed.state_dict())
        mixed, synthetic = built()
        mixed.load_state_dict(state)
        assert list(read(mixed, synthetic, stop + 1, 14)) == whole[stop + 1 :], f"{stop}, resumed twice"


def test_a_ratio_set_between_a_resume_and_its_first_batch_steers_what_the_pipeline_reads_next(folder):
    first = loader(folder, Steered(SHAPE, CLASSES))
    next(iter(first))
    synthetic = Steered(SHAPE, CLASSES)
    second = loader(folder, synthetic)
    second.load_state_dict(first.state_dict())
    second.ratio = {"ant": 0.1, "bee": 0.6}
    list(second)
    assert synthetic.take(1).labels.tolist() == [1]


@pytest.mark.parametrize("options", [{}, {"mode": "append", "ratio": 0.3}, {"displaced": "defer"}])
def test_readers_random_operators_and_the_stream_resume_exactly(folder, options):
    assert_resumes_exactly(lambda: loader(folder, noise=0.4, **options))


def test_the_state_survives_a_file(folder, tmp_path):
    first = loader(folder, noise=0.4)
    batches = iter(first)
    next(batches)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = loader(folder, noise=0.4)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert plain(next(iter(second))) == plain(next(batches))


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("error", "failing"), [(RuntimeError, 1), (KeyboardInterrupt, 3), (KeyboardInterrupt, 5)])
def test_an_interrupted_call_of_the_stream_inside_the_pipeline_mislabels_and_loses_nothing(
    folder, error, failing, checkpointing
):
    def run(interrupted):
        synthetic = stream()
        mixed = loader(folder, synthetic, noise=0.4 if checkpointing else 0.0, checkpointing=checkpointing)
        take, calls = synthetic.take, 0

        def once(n):
            nonlocal calls
            calls += 1
            if interrupted and calls == failing:
                raise error("cell interrupted")
            return take(n)

        synthetic.take = once
        made = []
        epochs = 0
        while epochs < 3:
            try:
                for [batch] in mixed:
                    is_made = batch["synthetic_ids"] >= 0
                    ids, pixels = batch["synthetic_ids"][is_made], batch["data"][is_made]
                    assert pixels[:, 0, 4, 4].floor().tolist() == colours(ids.tolist())
                    assert batch["label"][is_made][:, 0].tolist() == (ids % 2).tolist()
                    # Without checkpoints the pipeline's own draws begin anew.
                    made += zip(ids.tolist(), plain(pixels) if checkpointing else ids.tolist(), strict=True)
                epochs += 1
            except error:
                if checkpointing:
                    mixed.state_dict()
        return sorted(made)

    expected, delivered = run(False), run(True)
    assert delivered[: len(expected)] == expected[: len(delivered)] and len(delivered) >= len(expected)


def test_a_state_saved_before_the_first_synthetic_image_takes_the_loader_that_went_on_back_there(folder):
    mixed = loader(folder, ratio=lambda step: 0.5 * (step > 1), noise=0.4)
    batches = iter(mixed)
    next(batches)
    state = copy.deepcopy(mixed.state_dict())
    expected = [plain(batch) for batch in batches]
    mixed.load_state_dict(state)
    assert [plain(batch) for batch in mixed] == expected and mixed.stats().synthetic


def test_another_number_of_ranks_is_refused(folder):
    first = loader(folder)
    next(iter(first))
    with pytest.raises(StateError, match=r"saved by 2 ranks and is loaded by 1: .*DALIStreamLoader.*start 2 ranks"):
        loader(folder).load_state_dict({"ranks": [first.state_dict()] * 2})


def test_an_epoch_left_by_break_is_followed_by_a_whole_one(folder, caplog):
    mixed = loader(folder, ratio=0.25)
    next(iter(mixed))
    assert sum(len(batch["data"]) for [batch] in mixed) == COUNT
    assert "the rest of it is read" in caplog.text


def test_a_reader_that_loses_images_is_warned_of(folder, caplog):
    DALIStreamLoader(functools.partial(training, folder, pad=False), stream())
    assert "pad_last_batch=True" in caplog.text


def test_pipelines_that_give_both_sides_another_form_are_refused(folder):
    for change, words in (({"size": 16}, r"float32 \[n, 3, 16, 16\](.|\n)*float32 \[n, 3, 8, 8\]"),):
        mixed = DALIStreamLoader(functools.partial(training, folder, **change), stream(), 0.5)
        with pytest.raises(MismatchError, match=words):
            list(mixed)


def test_classes_in_another_order_are_mapped_by_name(folder):
    mixed = loader(folder, classes=CLASSES[::-1])
    [batch] = next(iter(mixed))
    made = batch["synthetic_ids"] >= 0
    assert batch["label"][made][:, 0].tolist() == [
        1 - identity % 2 for identity in batch["synthetic_ids"][made].tolist()
    ]


def test_bad_arguments_are_refused_in_plain_words(folder):
    with pytest.raises(UsageError, match="builds a pipeline"):
        DALIStreamLoader(training(folder), stream())
    with pytest.raises(UsageError, match="last_batch='half': accepted are 'partial', 'drop', 'fill'"):
        loader(folder, last_batch="half")
    with pytest.raises(UsageError, match="layout='NHWC'"):
        stream_source(stream(), layout="NHWC")
    with pytest.raises(UsageError, match=r"""device='gpu': accepted are "cpu", "cuda" and "cuda:1" \(DALI's "gpu"\)"""):
        stream_source(stream(), device="gpu")
    with pytest.raises(UsageError, match="starved: real"):
        loader(folder, stream(starved="real"))
    with pytest.raises(UsageError, match="a Stream is needed, got a list"):
        loader(folder, [1])
    with pytest.raises(StateError, match="checkpointing=False"):
        loader(folder, checkpointing=False).state_dict()


def test_without_dali_the_message_has_the_line_that_installs_it(monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("nvidia"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r'pip install "streamaug\[dali\]"'):
        dali_source.stream_source(stream())


def test_over_a_producer_process_images_arrive_resume_exactly_and_nothing_stays_behind(folder):
    gc.collect()
    before, python_threads = threads(), set(threading.enumerate())
    options = {"engine_options": {"image_shape": list(streams.IMAGE_SHAPE)}, "in_flight": 1}

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, exec_dynamic=False, seed=3)
    def grey(source=None):
        if source is None:
            encoded, labels = fn.readers.file(
                file_root=str(folder), random_shuffle=True, pad_last_batch=True, name="reader"
            )
            images = fn.decoders.image(encoded, device="cpu", output_type=types.GRAY)
        else:
            images, labels = fn.external_source(source=source, num_outputs=2)
        return fn.crop_mirror_normalize(images, dtype=types.FLOAT, mean=[0.0], std=[1.0]), labels

    def run(batches, state=None, steered=False):
        with streams.make_stream(backend="process", **options) as real:
            mixed = DALIStreamLoader(grey, real, 0.5, with_ids=True, classes=["0", "1", "2", "3"])
            if state is not None:
                mixed.load_state_dict(state)
            epochs = (batch for _ in range(2) for batch in mixed)
            read = []
            for _ in range(batches):
                [batch] = next(epochs)
                read.append(plain([batch]))
                labels = batch["label"][:, 0]
                if steered:
                    real.feedback(labels, 1 + 9 * (labels == 3))
            state = copy.deepcopy(mixed.state_dict())
            epochs.close()
            mixed.close()
            pids = streams.producers_of(real)
        streams.until(lambda: not any(streams.running(pid) for pid in pids))
        return read, state

    whole, _ = run(12)
    ids = [identity for [batch] in whole for identity in batch["synthetic_ids"] if identity >= 0]
    assert len(ids) == 22 == len(set(ids))
    pixels = {
        np.array(image, np.uint8).tobytes()
        for [batch] in whole
        for image, identity in zip(batch["data"], batch["synthetic_ids"], strict=True)
        if identity >= 0
    }
    assert pixels == {made for *_, made in streams.undisturbed([22])}
    steered, _ = run(12, steered=True)
    assert steered != whole
    for feedback, expected in ((False, whole), (True, steered)):
        head, state = run(5, steered=feedback)
        tail, _ = run(7, state, steered=feedback)
        assert head + tail == expected
    gc.collect()
    streams.until(lambda: threads() <= before and set(threading.enumerate()) <= python_threads)


@pytest.mark.timeout(200)
def test_a_held_unstopped_loader_lets_the_interpreter_exit(folder):
    body = (
        "import sys\n"
        "from loader.test_dali import loader, stream\n"
        "batches = iter(loader(sys.argv[1], stream()))\n"
        "print(next(batches)[0]['data'].shape, flush=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    script = [sys.executable, "-c", body, str(folder)]
    ended = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=170)
    assert ended.returncode == 0 and ended.stdout.startswith("torch.Size([4, 3, 8, 8])"), ended.stderr
