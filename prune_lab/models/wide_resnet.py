"""Wide ResNets WRN-16-8, 22-2 and 28-10 with pre-activation blocks (Zagoruyko and Komodakis 2016, arXiv 1605.07146)."""

from __future__ import annotations

from torch import Tensor, nn

from prune_lab.models.common import init_weights, scale_channels
from prune_lab.models.configs import WideResNetConfig

STEM_CHANNELS = 16
STAGE_CHANNELS = (16, 32, 64)


class PreActivationBlock(nn.Module):
    """BN, ReLU, 3x3 convolution, twice; a 1x1 convolution on the shortcut where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        out = self.conv2(self.dropout(self.relu2(self.bn2(self.conv1(active)))))
        # A convolutional shortcut takes the activated input, an identity shortcut the raw one (official code).
        return out + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """Stem, three stages, BN and ReLU, global average pooling, one linear layer."""

    def __init__(
        self, num_blocks: int, stage_channels: list[int], *, stem_channels: int, num_classes: int, dropout: float
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem_channels, 3, padding=1, bias=False)
        channels = stem_channels
        stages = []
        for stage, out_channels in enumerate(stage_channels):
            blocks = []
            for index in range(num_blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(PreActivationBlock(channels, out_channels, stride=stride, dropout=dropout))
                channels = out_channels
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(self.avgpool(self.relu(self.bn(out))).flatten(1))


def build(config: WideResNetConfig, *, num_classes: int, image_size: int) -> WideResNet:
    """Return the network; depth 6n + 4 means n blocks per stage. The same form serves every image size."""
    depth, widening = (int(part) for part in config.name.split("_")[1:])
    return WideResNet(
        (depth - 4) // 6,
        [scale_channels(count * widening, config.width) for count in STAGE_CHANNELS],
        stem_channels=scale_channels(STEM_CHANNELS, config.width),
        num_classes=num_classes,
        dropout=config.dropout,
    )
