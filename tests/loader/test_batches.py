from collections import namedtuple
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from streamaug.errors import MismatchError, UsageError
from streamaug.loader import StreamLoader

from .fakes import FakeStream, Images, listed, real_indices, real_loader

Pair = namedtuple("Pair", "image label")


def batches_of(make, count=4, rows=8):
    """Preloaded batches; make(images, labels) gives them their structure."""
    dataset = Images(count * rows)
    out = []
    for start in range(0, count * rows, rows):
        items = [dataset[start + i] for i in range(rows)]
        out.append(make(torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])))
    return out


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: (x, y),
        lambda x, y: [x, y],
        Pair,
        lambda x, y: {"pixel_values": x, "labels": y},
        lambda x, y: {"label": y, "image": x, "name": "a batch"},
        lambda x, y: (y, x),
    ],
    ids=["tuple", "list", "namedtuple", "pixel_values", "image and label", "labels first"],
)
def test_the_batch_keeps_its_structure(make):
    real = batches_of(make)
    for delivered, original in zip(StreamLoader(real, FakeStream(), ratio=0.5), real, strict=True):
        assert type(delivered) is type(original)
        if isinstance(original, dict):
            assert list(delivered) == list(original)
            assert delivered.get("name") == original.get("name")
        images = [v for v in _values(delivered) if isinstance(v, torch.Tensor) and v.ndim == 4]
        assert images[0].shape == (8, 1, 8, 8)


def test_replace_keeps_the_size_and_swaps_the_share_and_the_real_rows_keep_their_places():
    stream = FakeStream()
    loader = StreamLoader(real_loader(), stream, ratio=0.5, with_ids=True)
    plain = list(real_loader())
    for (images, labels, ids), (real_images, real_labels) in zip(loader, plain, strict=True):
        assert len(images) == 8 and int((ids >= 0).sum()) == 4
        kept = ids < 0
        assert torch.equal(images[kept], real_images[kept])
        assert torch.equal(labels[kept], real_labels[kept])
        assert torch.equal(labels[~kept], ids[~kept] % 10)
        assert torch.allclose(images[~kept][:, 0, 4, 4], (ids[~kept] % 200 + 50) / 255)
    stats = loader.stats()
    assert (stats.real, stats.synthetic, stats.displaced, stats.shortfall) == (20, 20, 20, 0)
    assert stats.realised_ratio == 0.5 == stats.as_dict()["realised_ratio"]
    assert stream.next_id == 20


def test_append_adds_the_share_and_keeps_every_real_image_in_order():
    loader = StreamLoader(real_loader(), FakeStream(), ratio=0.2, mode="append", with_ids=True)
    delivered = list(loader)
    assert [len(batch[0]) for batch in delivered] == [10] * 5
    assert [index for batch in delivered for index in real_indices(batch)] == list(range(40))
    assert loader.stats().displaced == 0


def test_synthetic_images_stand_at_places_drawn_by_seed_and_step():
    def ids(seed, stream=None):
        return [
            b[2].tolist() for b in StreamLoader(real_loader(), stream or FakeStream(), 0.5, seed=seed, with_ids=True)
        ]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)
    assert ids(1) != ids(1, FakeStream(rank=1))
    masks = [[i >= 0 for i in batch] for batch in ids(1)]
    assert len({tuple(mask) for mask in masks}) > 1


def test_preloaded_batches_are_never_written_to():
    real = batches_of(lambda x, y: (x, y))
    before = [listed(batch) for batch in real]
    list(StreamLoader(real, FakeStream(), ratio=0.5))
    assert [listed(batch) for batch in real] == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_synthetic_images_take_the_real_float_type(dtype):
    real = batches_of(lambda x, y: (x.to(dtype), y))
    images, _, ids = next(iter(StreamLoader(real, FakeStream(), ratio=0.5, with_ids=True)))
    assert images.dtype == dtype
    expected = ((ids[ids >= 0] % 200 + 50) / 255).to(dtype)
    assert torch.allclose(images[ids >= 0][:, 0, 4, 4], expected, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
@pytest.mark.parametrize("mode", ["replace", "append"])
def test_bytes_in_any_integer_type_are_met_with_bytes_and_are_not_to_be_normalised(dtype, mode):
    """Hugging Face datasets give lists of pixels as int64."""
    real = batches_of(lambda x, y: {"image": (x * 255).to(dtype), "label": y})
    for batch in StreamLoader(real, FakeStream(), 0.5, mode, with_ids=True):
        made = batch["synthetic_ids"] >= 0
        assert batch["image"].dtype == dtype
        assert batch["image"][made][:, 0, 4, 4].tolist() == (batch["synthetic_ids"][made] % 200 + 50).tolist()
    with pytest.raises(UsageError, match=f"normalize= makes floats and the real images are {str(dtype)[6:]}"):
        next(iter(StreamLoader(real, FakeStream(), 0.5, normalize=(0.5, 0.5))))


@pytest.mark.parametrize(
    ("convert", "back"),
    [
        (lambda x: (x * 255).to(torch.uint8), lambda v: v.float()),
        (lambda x: x * 255, lambda v: v),
        (lambda x: x * 2 - 1, lambda v: (v + 1) * 127.5),
    ],
    ids=["uint8", "0 to 255", "-1 to 1"],
)
def test_synthetic_images_take_the_real_range(convert, back):
    real = batches_of(lambda x, y: (convert(x), y))
    images, _, ids = next(iter(StreamLoader(real, FakeStream(), ratio=0.5, with_ids=True)))
    assert torch.allclose(back(images[ids >= 0][:, 0, 4, 4]), (ids[ids >= 0] % 200 + 50).float(), atol=1e-3)


@pytest.mark.parametrize("mode", ["replace", "append"])
def test_channels_last_is_kept(mode):
    real = [(torch.rand(8, 3, 16, 16).contiguous(memory_format=torch.channels_last), torch.arange(8))]
    images, _ = next(iter(StreamLoader(real, FakeStream(shape=(3, 16, 16)), ratio=0.5, mode=mode)))
    assert images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()


def test_one_hot_and_soft_labels_are_kept_and_mixed_labels_become_soft_targets():
    one_hot = torch.nn.functional.one_hot
    soft = batches_of(lambda x, y: (x, one_hot(y, 10).float()))
    _, labels, ids = next(iter(StreamLoader(soft, FakeStream(mixed=True), ratio=0.5, with_ids=True)))
    for row, i in zip(labels, ids.tolist(), strict=True):
        assert float(row.sum()) == pytest.approx(1.0)
        if i >= 0:
            assert row[i % 10] == pytest.approx(0.75) and row[(i + 1) % 10] == pytest.approx(0.25)

    hard = batches_of(lambda x, y: (x, one_hot(y, 10)))
    _, labels, ids = next(iter(StreamLoader(hard, FakeStream(), ratio=0.5, with_ids=True)))
    assert labels.dtype == torch.int64
    assert labels[ids >= 0].argmax(1).tolist() == (ids[ids >= 0] % 10).tolist()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_integer_labels_keep_their_type(dtype):
    real = batches_of(lambda x, y: (x, y.to(dtype)))
    assert next(iter(StreamLoader(real, FakeStream(), ratio=0.5)))[1].dtype == dtype


def test_mixed_labels_with_integer_labels_are_refused_with_the_way_out():
    with pytest.raises(MismatchError, match="one_hot"):
        next(iter(StreamLoader(real_loader(), FakeStream(mixed=True), ratio=0.5)))


def test_extra_fields_are_refused_without_fill_and_filled_with_it():
    def make(x, y):
        paths = [str(i) for i in range(8)]
        return {
            "image": x,
            "label": y,
            "weight": torch.ones(8),
            "path": paths,
            "row": np.arange(8),
            "split": "train",
        }

    with pytest.raises(UsageError, match=r"'weight', 'path', 'row'.*(?s:.*)fill="):
        next(iter(StreamLoader(batches_of(make), FakeStream(), ratio=0.5)))

    def fill(key, synthetic):
        return {
            "weight": np.full(len(synthetic), 0.5),
            "path": [f"synthetic {i}" for i in synthetic.ids],
            "row": synthetic.ids + 1000,
        }[key]

    for mode, displaced in (("replace", None), ("append", None), ("replace", "defer")):
        loader = StreamLoader(batches_of(make), FakeStream(), 0.5, mode, displaced=displaced, fill=fill, with_ids=True)
        for batch in loader:
            assert batch["split"] == "train" and isinstance(batch["row"], np.ndarray)
            ids = batch["synthetic_ids"].tolist()
            for i, weight, path, row in zip(ids, batch["weight"], batch["path"], batch["row"], strict=True):
                made = i >= 0
                assert weight == (0.5 if made else 1.0)
                assert path == f"synthetic {i}" if made else path.isdigit()
                assert row == i + 1000 if made else row < 8
    for value, what in (([0], "1 values"), (None, "a NoneType")):
        with pytest.raises(MismatchError, match=f"gave {what} for field 'weight'; needed is a tensor or list of"):
            list(StreamLoader(batches_of(make), FakeStream(), 0.5, fill=lambda key, synthetic, value=value: value))


def test_fields_are_found_by_the_keys_given():
    real = batches_of(lambda x, y: {"left": x, "right": torch.zeros_like(x), "kind": y, "other": y})

    def fill(key, synthetic):
        return torch.zeros((len(synthetic), 1, 8, 8)) if key == "right" else torch.zeros(len(synthetic))

    loader = StreamLoader(real, FakeStream(), 0.5, image_key="left", label_key="kind", fill=fill)
    assert next(iter(loader))["left"].max() == 1
    with pytest.raises(MismatchError, match="did you mean 'left'"):
        next(iter(StreamLoader(real, FakeStream(), 0.5, image_key="lift")))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x, y: x, "a batch with labels is needed"),
        (lambda x, y: (x,), "a batch without labels"),
        (lambda x, y: (x, y.float()), "a batch without labels"),
        (lambda x, y: (y, y), "no images found"),
        (lambda x, y: [{"data": x, "label": y}] * 2, r"a batch of each of 2 DALI pipelines: .*over one pipeline"),
    ],
)
def test_a_batch_without_images_or_labels_is_refused(make, message):
    with pytest.raises(MismatchError, match=message):
        next(iter(StreamLoader(batches_of(make), FakeStream(), ratio=0.5)))


def test_ids_are_added_as_the_last_field_whatever_the_ratio():
    loader = StreamLoader(real_loader(), FakeStream(), ratio=0.0, with_ids=True)
    batches = iter(loader)
    assert next(batches)[2].tolist() == [-1] * 8
    loader.ratio = 0.5
    assert int((next(batches)[2] >= 0).sum()) == 4
    named = batches_of(Pair)
    with pytest.raises(UsageError, match="named tuple Pair"):
        next(iter(StreamLoader(named, FakeStream(), ratio=0.5, with_ids=True)))


def test_a_starved_stream_leaves_real_images_in_place_and_counts_the_shortfall():
    stream = FakeStream(starved="real")
    stream.available = 1
    loader = StreamLoader(real_loader(), stream, ratio=0.5, with_ids=True)
    delivered = list(loader)
    assert len(delivered) == len(loader) == 5
    assert [int((ids >= 0).sum()) for _, _, ids in delivered] == [1] * 5
    assert loader.stats().shortfall == 15 and loader.stats().displaced == 5

    stream.available = 0
    appended = list(StreamLoader(real_loader(), stream, ratio=0.5, mode="append"))
    assert [len(images) for images, _ in appended] == [8] * 5


def test_the_configuration_of_the_stream_gives_the_defaults_and_arguments_override_it():
    from streamaug.config import LoaderConfig

    stream = FakeStream(loader_config=LoaderConfig(ratio=0.25, mode="append", displaced="drop"))
    loader = StreamLoader(real_loader(), stream)
    assert (loader.ratio, loader.mode) == (0.25, "append")
    assert StreamLoader(real_loader(), stream, ratio=0.75, mode="replace").ratio == 0.75
    assert StreamLoader(real_loader(), FakeStream()).ratio == 0.5


def test_a_ratio_may_follow_the_step_or_be_set_while_iterating():
    loader = StreamLoader(real_loader(), FakeStream(), ratio=lambda step: 0.25 * (step % 3), with_ids=True)
    assert [int((ids >= 0).sum()) for _, _, ids in loader] == [0, 2, 4, 0, 2]
    loader = StreamLoader(real_loader(), FakeStream(), ratio=0.5, with_ids=True)
    counts = []
    for _, _, ids in loader:
        counts.append(int((ids >= 0).sum()))
        if len(counts) == 2:
            loader.ratio = 0
    assert counts == [4, 4, 0, 0, 0]
    with pytest.raises(UsageError, match="ratio"):
        loader.ratio = 1.5
    with pytest.raises(UsageError, match="ratio"):
        list(StreamLoader(real_loader(), FakeStream(), ratio=lambda step: 2.0))


def test_custom_collate_functions_and_subclasses_of_dict_are_kept():
    class Features(dict):
        pass

    def collate(items):
        return Features(image=torch.stack([i for i, _ in items]), label=torch.tensor([k for _, k in items]))

    loader = StreamLoader(DataLoader(Images(), batch_size=8, collate_fn=collate), FakeStream(), ratio=0.5)
    assert type(next(iter(loader))) is Features


def _values(batch):
    return batch.values() if isinstance(batch, dict) else batch


@pytest.mark.parametrize("batch", ["a string", 5, object()], ids=["a string", "a number", "an object"])
def test_what_is_no_batch_is_refused_at_once_and_left_alone_at_ratio_0(batch):
    with pytest.raises(MismatchError, match=r"the real loader yields .*; a batch with labels is needed"):
        list(StreamLoader([batch], FakeStream(), ratio=0.5))
    assert list(StreamLoader([batch], FakeStream(), ratio=0)) == [batch]


def test_a_mapping_that_cannot_be_changed_becomes_a_dict():
    real = batches_of(lambda x, y: MappingProxyType({"image": x, "label": y, "epoch": 3}))
    for batch in StreamLoader(real, FakeStream(), 0.5, with_ids=True):
        assert list(batch) == ["image", "label", "epoch", "synthetic_ids"]
        assert batch["image"].shape == (8, 1, 8, 8) and int((batch["synthetic_ids"] >= 0).sum()) == 4


@pytest.mark.parametrize(("dtype", "classes"), [(torch.bool, 10), (torch.int8, 200), (torch.uint8, 300)])
def test_labels_of_a_type_too_small_for_the_streams_classes_are_refused(dtype, classes):
    real = batches_of(lambda x, y: (x, (y % 2).to(dtype)))
    stream = FakeStream(class_names=[f"class {i}" for i in range(classes)])
    with pytest.raises(MismatchError, match=rf"labels {str(dtype)[6:]}(.|\n)*{classes} classes"):
        next(iter(StreamLoader(real, stream, 0.5)))
    two = StreamLoader(batches_of(lambda x, y: (x, y % 2 == 1)), FakeStream(class_names=["no", "yes"]), 0.5)
    assert next(iter(two))[1].dtype == torch.bool


@pytest.mark.parametrize("make", [lambda x, y: ((x, y), y), lambda x, y: ([x, x], y)], ids=["nested", "two views"])
def test_tensors_inside_a_field_are_named_as_what_is_in_the_way(make):
    with pytest.raises(
        MismatchError, match="tensors inside a list or tuple: let the collate_fn give each its own field"
    ):
        next(iter(StreamLoader(batches_of(make), FakeStream(), 0.5)))
