"""A classifier of digits with Hugging Face Accelerate, on one process or several.

accelerate launch examples/with_accelerate.py --real-only   # without the marked line
accelerate launch examples/with_accelerate.py               # with it
"""

import sys

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

import streamaug as sa
from streamaug.data import ImageDataset, load_splits

EPOCHS = 16

accelerator = Accelerator()

digits = load_splits(sa.load("digits").data)
shots = ImageDataset(digits.train.subset(digits.train.select_shots(3, seed=0)))
train = Subset(shots, [*range(len(shots))] * 64)  # an epoch shows each of the 30 images 64 times
test = ImageDataset(digits.test)

torch.manual_seed(0)
loader = DataLoader(train, batch_size=64, shuffle=True)
test_loader = DataLoader(test, batch_size=250)
if "--real-only" not in sys.argv:
    loader = sa.StreamLoader(loader, sa.Stream.from_config("digits"), ratio=0.5)  # the line that changes

model = nn.Sequential(
    *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten()),
    nn.Linear(64 * 4 * 4, 10),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
augment = v2.RandomAffine(degrees=10, translate=(0.15, 0.15), scale=(0.9, 1.1))
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
test_loader = accelerator.prepare(test_loader)

for epoch in range(EPOCHS):
    for images, labels in loader:
        loss = nn.functional.cross_entropy(model(augment(images)), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
    accelerator.print(f"epoch {epoch + 1}/{EPOCHS}: loss {loss.item():.3f}", flush=True)

model.eval()
right = torch.cat([accelerator.gather_for_metrics(model(images).argmax(1) == labels) for images, labels in test_loader])
accelerator.print(f"accuracy on {len(right)} held-out images: {right.float().mean():.3f}")
accelerator.end_training()
