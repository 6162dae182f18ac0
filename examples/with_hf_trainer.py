"""A classifier of digits with the Hugging Face Trainer.

python examples/with_hf_trainer.py --real-only   # without the marked line
python examples/with_hf_trainer.py               # with it
"""

import sys
import tempfile

from torch import nn
from torch.utils.data import Subset, default_collate
from torchvision.transforms import v2
from transformers import Trainer, TrainingArguments

import streamaug as sa
from streamaug.data import ImageDataset, load_splits
from streamaug.integrations import add_stream

EPOCHS = 16


class Classifier(nn.Module):
    """Called as the Trainer calls every model."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten()),
            nn.Linear(64 * 4 * 4, 10),
        )
        self.augment = v2.RandomAffine(degrees=10, translate=(0.15, 0.15), scale=(0.9, 1.1))

    def forward(self, pixel_values, labels):
        logits = self.network(self.augment(pixel_values) if self.training else pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels, label_smoothing=0.1), "logits": logits}


def collate(rows):
    images, labels = default_collate(rows)
    return {"pixel_values": images, "labels": labels}


def accuracy(prediction):
    return {"accuracy": (prediction.predictions.argmax(1) == prediction.label_ids).mean()}


if __name__ == "__main__":
    digits = load_splits(sa.load("digits").data)
    shots = ImageDataset(digits.train.subset(digits.train.select_shots(3, seed=0)))
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        label_names=["labels"],
    )
    trainer = Trainer(
        Classifier(),
        arguments,
        data_collator=collate,
        train_dataset=Subset(shots, [*range(len(shots))] * 64),  # an epoch shows each of the 30 images 64 times
        eval_dataset=ImageDataset(digits.test),
        compute_metrics=accuracy,
    )
    if "--real-only" not in sys.argv:
        trainer = add_stream(trainer, sa.Stream.from_config("digits"), ratio=0.5)  # the line that changes
    trainer.train()
    print(f"accuracy on {len(digits.test)} held-out images: {trainer.evaluate()['eval_accuracy']:.3f}")
