"""ResNet-18/34/50 in ImageNet form (He et al. 2015, arXiv 1512.03385), stride in the 3x3 convolution.

Parameter names and shapes are torchvision's, so its weights load. On small images the stem is a 3x3
convolution with stride 1 and there is no max-pooling.
"""

from __future__ import annotations

from torch import Tensor, nn

from prune_lab.models.common import init_weights, is_small, scale_channels
from prune_lab.models.configs import ResNetConfig

STAGE_CHANNELS = (64, 128, 256, 512)
BOTTLENECK_EXPANSION = 4


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; ResNet-18 and 34."""

    def __init__(self, in_channels: int, inner_channels: int, *, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, inner_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(inner_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = _make_downsample(in_channels, out_channels, stride=stride)
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; ResNet-50."""

    def __init__(self, in_channels: int, inner_channels: int, *, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, inner_channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(inner_channels, inner_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner_channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(inner_channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _make_downsample(in_channels, out_channels, stride=stride)
        self.relu3 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu3(out + self.downsample(x))


def _make_downsample(in_channels: int, out_channels: int, *, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


# Blocks per stage, block, and the factor from a block's inner to its output channels.
_FORMS = {
    "resnet18": ((2, 2, 2, 2), BasicBlock, 1),
    "resnet34": ((3, 4, 6, 3), BasicBlock, 1),
    "resnet50": ((3, 4, 6, 3), Bottleneck, BOTTLENECK_EXPANSION),
}


class ResNet(nn.Module):
    """Stem, four stages of residual blocks, global average pooling, one linear layer."""

    def __init__(self, name: str, *, num_classes: int, width: float, small: bool) -> None:
        super().__init__()
        num_blocks, block, expansion = _FORMS[name]
        channels = scale_channels(STAGE_CHANNELS[0], width)
        kernel, stride, padding = (3, 1, 1) if small else (7, 2, 3)
        self.conv1 = nn.Conv2d(3, channels, kernel, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        stages = []
        for stage, stage_channels in enumerate(STAGE_CHANNELS):
            inner, out = scale_channels(stage_channels, width), scale_channels(stage_channels * expansion, width)
            blocks = []
            for index in range(num_blocks[stage]):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(channels, inner, out_channels=out, stride=stride))
                channels = out
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        out = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.fc(self.avgpool(out).flatten(1))


def build(config: ResNetConfig, *, num_classes: int, image_size: int) -> ResNet:
    """Return the network; `width` scales inner and output channels separately."""
    return ResNet(config.name, num_classes=num_classes, width=config.width, small=is_small(image_size))
