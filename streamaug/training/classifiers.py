"""Classifiers by name: a small CNN for small images, and torchvision's models."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from streamaug.errors import ConfigError, nearest


class SmallCNN(nn.Module):
    """Convolution blocks that halve the image down to 4x4, then one linear layer; images [B, C, H, W] in [0, 1].

    29 k parameters at 8x8, 261 k at 28x28. The last map is flattened, because where a stroke is matters; `pooled`
    averages it.
    """

    def __init__(self, channels: int, image_size: int, num_classes: int, *, width: int = 32, pooled: bool = False):
        super().__init__()
        layers: list[nn.Module] = [_block(channels, width)]
        side = image_size
        while side > 4:
            layers += [nn.MaxPool2d(2, ceil_mode=True), _block(width, min(2 * width, 128))]
            side, width = (side + 1) // 2, min(2 * width, 128)
        if pooled:
            layers.append(nn.AdaptiveAvgPool2d(1))
            side = 1
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(width * side * side, num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


_OWN: dict[str, Callable[[int, int, int], nn.Module]] = {
    "small_cnn": SmallCNN,
    "small_cnn_pooled": partial(SmallCNN, pooled=True),
}


def build_classifier(name: str, *, channels: int, image_size: int, num_classes: int) -> nn.Module:
    """A classifier with random weights: logits [B, num_classes] from images [B, C, H, W] in [0, 1].

    `name` is "small_cnn", "small_cnn_pooled" or a torchvision classification model. Raises ConfigError naming the
    nearest known one.
    """
    if name in _OWN:
        return _OWN[name](channels, image_size, num_classes)
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ConfigError(
            f"unknown classifier '{name}'{nearest(name, [*_OWN, *known])}; "
            f"accepted: {', '.join(_OWN)}, or a torchvision classification model"
        )
    if channels != 3:
        raise ConfigError(f"classifier '{name}' takes 3-channel images; set data.channels to 3, or use small_cnn")
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes)
