"""timm's loaders, the Trainer's refusals, and frameworks that are not installed."""

import importlib
import sys

import numpy as np
import pytest
import torch
from loader.fakes import FakeStream, Images
from PIL import Image

from streamaug.errors import MissingExtra, UsageError
from streamaug.loader import StreamLoader

pytestmark = pytest.mark.timeout(300)  # importing a framework takes long on a busy machine


class Pictures(Images):
    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        return self.transform(Image.fromarray(pixels)), index % 10


@pytest.mark.parametrize("prefetcher", [False, True])
def test_timms_loader_is_wrapped_with_its_own_transform(prefetcher):
    from timm.data import create_loader

    real = create_loader(
        Pictures(24),
        input_size=(3, 8, 8),
        batch_size=8,
        is_training=True,
        use_prefetcher=prefetcher,
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    stream = FakeStream(shape=(3, 12, 12))
    if prefetcher:
        real.loader = StreamLoader(real.loader, stream, ratio=0.5)
        loader, mixed = real, real.loader
    else:
        loader = mixed = StreamLoader(real, stream, ratio=0.5)
    batches = list(loader)
    assert [images.shape for images, _ in batches] == [(8, 3, 8, 8)] * 3 == [(8, 3, 8, 8)] * len(loader)
    assert all(images.dtype == torch.float32 and images.min() < -0.5 for images, _ in batches)
    assert mixed.stats().synthetic == stream.next_id == 12


def test_the_trainer_keeps_its_class_and_refuses_what_is_no_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    from streamaug.integrations import add_stream

    class Mine(Trainer):
        pass

    trainer = Mine(
        torch.nn.Linear(1, 1), TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]), train_dataset=[]
    )
    assert add_stream(trainer, FakeStream(), ratio=0.5) is trainer
    assert isinstance(trainer, Mine) and type(trainer).__name__ == "Mine"
    with pytest.raises(UsageError, match="got a Linear"):
        add_stream(torch.nn.Linear(1, 1), FakeStream())


def test_the_trainer_refuses_to_sort_images_by_length(tmp_path):
    from transformers import Trainer, TrainingArguments

    from streamaug.integrations import add_stream

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], train_sampling_strategy="group_by_length")
    trainer = add_stream(Trainer(torch.nn.Linear(1, 1), arguments, train_dataset=Images()), FakeStream(), ratio=0.5)
    with pytest.raises(UsageError, match=r"train_sampling_strategy='group_by_length' .*set it to 'random'"):
        trainer.get_train_dataloader()


@pytest.mark.parametrize("name", ["accelerate", "lightning", "transformers"])
def test_a_framework_that_is_not_installed_is_named_with_the_line_that_installs_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"streamaug.integrations.{name}", raising=False)
    with pytest.raises(MissingExtra, match=rf'{name} is not installed; .*pip install "streamaug\[integrations\]"'):
        importlib.import_module(f"streamaug.integrations.{name}")
