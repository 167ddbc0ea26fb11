"""VGG-16 and VGG-19 with batch normalisation (Simonyan and Zisserman 2014, arXiv 1409.1556).

With the imagenet head and biases, parameter names and shapes are torchvision's, so its weights load. The
small heads follow the CIFAR form of the pruning papers: global average pooling and one linear layer.
"""

from __future__ import annotations

from torch import Tensor, nn

from prune_lab.models.common import init_weights, is_small, scale_channels
from prune_lab.models.configs import VggConfig

# Channels of the convolutions; each of the five groups ends with 2x2 max-pooling.
_GROUPS = {
    "vgg16": ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    "vgg19": ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}
HIDDEN_UNITS = 512
IMAGENET_UNITS = 4096
IMAGENET_GRID = 7
LINEAR_STD = 0.01


class Vgg(nn.Module):
    """Convolutions, pooling to a fixed grid, classifier."""

    def __init__(self, features: nn.Sequential, classifier: nn.Module, *, grid: int) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d(grid)
        self.classifier = classifier
        init_weights(self)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, LINEAR_STD)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def build(config: VggConfig, *, num_classes: int, image_size: int) -> Vgg:
    """Return the network.

    A max-pooling layer whose input would be 1 px wide is left out, so images below 32 px work as well.
    """
    head = config.head
    if head == "auto":
        head = "single" if is_small(image_size) else "imagenet"
    conv_bias = head == "imagenet" if config.conv_bias is None else config.conv_bias
    groups = [[scale_channels(count, config.width) for count in group] for group in _GROUPS[config.name]]
    features = _make_features(groups, conv_bias=conv_bias, image_size=image_size)
    grid = IMAGENET_GRID if head == "imagenet" else 1
    classifier = _make_classifier(head, groups[-1][-1], num_classes=num_classes, width=config.width)
    return Vgg(features, classifier, grid=grid)


def _make_features(groups: list[list[int]], *, conv_bias: bool, image_size: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for group in groups:
        for count in group:
            conv = nn.Conv2d(channels, count, 3, padding=1, bias=conv_bias)
            layers += [conv, nn.BatchNorm2d(count), nn.ReLU(inplace=True)]
            channels = count
        if image_size >= 2:
            layers.append(nn.MaxPool2d(2))
            image_size //= 2
    return nn.Sequential(*layers)


def _make_classifier(head: str, channels: int, *, num_classes: int, width: float) -> nn.Module:
    if head == "single":
        return nn.Linear(channels, num_classes)
    if head == "hidden":
        hidden = scale_channels(HIDDEN_UNITS, width)
        return nn.Sequential(
            nn.Linear(channels, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, num_classes),
        )
    hidden = scale_channels(IMAGENET_UNITS, width)
    return nn.Sequential(
        nn.Linear(channels * IMAGENET_GRID**2, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(hidden, num_classes),
    )
