"""A classifier of digits with Lightning: a LightningModule, a LightningDataModule and a Trainer.

python examples/with_lightning.py --real-only   # without the marked line
python examples/with_lightning.py               # with it
"""

import sys

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

import streamaug as sa
from streamaug.data import ImageDataset, load_splits
from streamaug.integrations import StreamCallback

EPOCHS = 16
WITH_STREAM = "--real-only" not in sys.argv


class Digits(pl.LightningDataModule):
    def setup(self, stage):
        digits = load_splits(sa.load("digits").data)
        shots = ImageDataset(digits.train.subset(digits.train.select_shots(3, seed=0)))
        self.train = Subset(shots, [*range(len(shots))] * 64)  # an epoch shows each of the 30 images 64 times
        self.test = ImageDataset(digits.test)

    def train_dataloader(self):
        loader = DataLoader(self.train, batch_size=64, shuffle=True)
        if WITH_STREAM:
            loader = sa.StreamLoader(loader, sa.Stream.from_config("digits"), ratio=0.5)  # the line that changes
        return loader

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=250)


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten()),
            nn.Linear(64 * 4 * 4, 10),
        )
        self.augment = v2.RandomAffine(degrees=10, translate=(0.15, 0.15), scale=(0.9, 1.1))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.network(self.augment(images)), labels, label_smoothing=0.1)
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch, batch_idx):
        images, labels = batch
        self.log("accuracy", (self.network(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


if __name__ == "__main__":
    pl.seed_everything(0)
    callbacks = [StreamCallback()] if WITH_STREAM else []  # shares among ranks, logs, and ends the producers
    trainer = pl.Trainer(max_epochs=EPOCHS, callbacks=callbacks, logger=False, enable_checkpointing=False)
    model, digits = Classifier(), Digits()
    trainer.fit(model, datamodule=digits)
    accuracy = trainer.test(model, datamodule=digits, verbose=False)[0]["accuracy"]
    print(f"accuracy on 500 held-out images: {accuracy:.3f}")
