"""ResNet-20/32/44/56/110 in CIFAR form (He et al. 2015, section 4.2, arXiv 1512.03385).

Parameter names are those of the widely used public checkpoints (`layer1.0.conv1.weight`, `linear.weight`).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from prune_lab.models.common import init_weights, scale_channels
from prune_lab.models.configs import ResNetCifarConfig

STAGE_CHANNELS = (16, 32, 64)


class ZeroPadShortcut(nn.Module):
    """Option A: every second pixel, and zero channels in front and behind. No parameters."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.front = (out_channels - in_channels) // 2
        self.back = out_channels - in_channels - self.front

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.front, self.back))

    def for_export(self) -> nn.Module:
        """Return the same function, bit for bit, without a strided slice, which ncnn does not support.

        The mean over one pixel is that pixel.
        """
        return nn.Sequential(nn.AvgPool2d(1, 2), nn.ConstantPad3d((0, 0, 0, 0, self.front, self.back), 0.0))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BN and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = _make_shortcut(in_channels, out_channels, stride=stride, option=shortcut)
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.shortcut(x))


def _make_shortcut(in_channels: int, out_channels: int, *, stride: int, option: str) -> nn.Module:
    if stride == 1:
        return nn.Identity()
    if option == "A":
        return ZeroPadShortcut(in_channels, out_channels)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class ResNetCifar(nn.Module):
    """Stem, three stages of `num_blocks` blocks, global average pooling, one linear layer."""

    def __init__(self, num_blocks: int, *, num_classes: int, width: float, shortcut: str) -> None:
        super().__init__()
        channels = [scale_channels(count, width) for count in STAGE_CHANNELS]
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU(inplace=True)
        stages = []
        for stage, out_channels in enumerate(channels):
            in_channels = channels[max(stage - 1, 0)]
            blocks = [BasicBlock(in_channels, out_channels, stride=1 if stage == 0 else 2, shortcut=shortcut)]
            for _ in range(1, num_blocks):
                blocks.append(BasicBlock(out_channels, out_channels, stride=1, shortcut=shortcut))
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels[-1], num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(self.avgpool(out).flatten(1))


def build(config: ResNetCifarConfig, *, num_classes: int, image_size: int) -> ResNetCifar:
    """Return the network; depth 6n + 2 means n blocks per stage. The same form serves every image size."""
    depth = int(config.name.removeprefix("resnet"))
    return ResNetCifar((depth - 2) // 6, num_classes=num_classes, width=config.width, shortcut=config.shortcut)
