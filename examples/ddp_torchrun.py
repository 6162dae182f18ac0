"""A classifier of digits on several ranks: DistributedDataParallel under torchrun, as anybody writes it.

torchrun --nproc-per-node 2 examples/ddp_torchrun.py --real-only   # without the marked line
torchrun --nproc-per-node 2 examples/ddp_torchrun.py               # with it
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, Subset
from torchvision.transforms import v2

import streamaug as sa
from streamaug.data import ImageDataset, load_splits

EPOCHS = 16

dist.init_process_group("gloo")  # "nccl" on GPUs
rank = dist.get_rank()

digits = load_splits(sa.load("digits").data)
shots = ImageDataset(digits.train.subset(digits.train.select_shots(3, seed=0)))
train = Subset(shots, [*range(len(shots))] * 64)  # an epoch shows each of the 30 images 64 times
test = ImageDataset(digits.test)

torch.manual_seed(0)
loader = DataLoader(train, batch_size=32, sampler=DistributedSampler(train))
if "--real-only" not in sys.argv:
    loader = sa.StreamLoader(loader, sa.Stream.from_config("digits"), ratio=0.5)  # the line that changes

model = nn.Sequential(
    *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten()),
    nn.Linear(64 * 4 * 4, 10),
)
model = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
augment = v2.RandomAffine(degrees=10, translate=(0.15, 0.15), scale=(0.9, 1.1))

for epoch in range(EPOCHS):
    loader.sampler.set_epoch(epoch)
    for images, labels in loader:
        loss = nn.functional.cross_entropy(model(augment(images)), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if rank == 0:
        print(f"epoch {epoch + 1}/{EPOCHS}: loss {loss.item():.3f}", flush=True)

if rank == 0:
    model.eval()
    images, labels = next(iter(DataLoader(test, batch_size=len(test))))
    accuracy = (model.module(images).argmax(1) == labels).float().mean()
    print(f"accuracy on {len(test)} held-out images: {accuracy:.3f}")
dist.barrier()  # the other ranks wait for the evaluation
dist.destroy_process_group()
