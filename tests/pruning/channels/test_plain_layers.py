"""Convolutions of other libraries: those that use their weight as it is lose channels, those that compute it do not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_lab.pruning.channels.cut_check import check_equal
from prune_lab.pruning.channels.groups import channel_map
from prune_lab.pruning.channels.surgery import remove_channels
from tests.helpers.channel_networks import thinned


class SamePadding(nn.Conv2d):
    """Pads by the size of its input, in a way that torch.fx cannot trace."""

    def forward(self, x: Tensor) -> Tensor:
        missing = max((x.shape[-1] - 1) % self.stride[0] + self.kernel_size[0] - self.stride[0], 0)
        x = F.pad(x, [missing // 2, missing - missing // 2] * 2)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class SamePool(nn.MaxPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, [0, 1, 0, 1]) if x.shape[-1] % 2 else x)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean([1, 2, 3], keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Adapted(nn.Conv2d):
    """Adds what two more matrices make of its input."""

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__(inputs, outputs, size)
        self.down, self.up = nn.Conv2d(inputs, 2, size), nn.Conv2d(2, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


def network(middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        SamePadding(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), SamePadding(6, 6, 3, groups=6), SamePool(2),
        middle, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip


def test_a_convolution_that_pads_by_itself_loses_channels_and_knows_its_size() -> None:
    torch.manual_seed(0)
    model = network(SamePadding(6, 8, 3))
    channels = channel_map(model, 10)
    assert [(lane.name, lane.size) for lane in channels.lanes] == [("0", 6), ("5", 8)]
    alive = thinned(channels)
    assert check_equal(model, channels, alive, 10) < 1e-13
    small = remove_channels(model, channels, alive)
    first, second = (int(alive[lane.classes].sum()) for lane in channels.lanes)
    assert first < 6 and second < 8
    sizes = [(layer.out_channels, layer.in_channels, layer.groups) for layer in (small[0], small[3], small[5])]
    assert sizes == [(first, 3, 1), (first, first, first), (second, first, 1)]
    assert all(isinstance(small[index], SamePadding) for index in (0, 3, 5)) and small[9].in_features == second


@pytest.mark.parametrize("kind", [Standardised, Adapted])
def test_what_computes_its_weight_or_holds_more_than_it_keeps_its_channels(kind: type[nn.Conv2d]) -> None:
    torch.manual_seed(0)
    model = network(kind(6, 8, 2))
    channels = channel_map(model, 10)
    assert "5" not in channels.rows and "5" not in channels.columns
    assert channels.num_classes == (0 if kind is Standardised else 2)


def test_same_padding_of_timm_is_one_step() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("tf_efficientnet_lite0")
    channels = channel_map(model, 32)
    other = channel_map(timm.create_model("efficientnet_lite0"), 32)  # the same with PyTorch's own convolutions
    assert channels.num_classes == other.num_classes > 10_000 and len(channels.lanes) == len(other.lanes)
    assert check_equal(model, channels, thinned(channels), 32) < 1e-12
