"""Which channels are one class, and what ties them: counts of whole networks, and structures that broke other tools."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_lab.foundations.errors import UserError
from prune_lab.pruning.channels.groups import ChannelMap, channel_map
from tests.helpers.channel_networks import FULL, NARROW, ours, thinned


@functools.cache
def full(name: str) -> ChannelMap:
    build, image_size, _ = FULL[name]
    with torch.device("meta"):
        model = build()
    return channel_map(model, image_size)


@functools.cache
def narrow(family: str) -> tuple[nn.Module, ChannelMap]:
    model = NARROW[family]()
    return model, channel_map(model, 32)


def sizes(channels: ChannelMap, *, summed: bool) -> int:
    return sum(lane.size for lane in channels.lanes if lane.summed == summed)


# Whole networks


@pytest.mark.parametrize("name", FULL)
def test_number_of_classes(name: str) -> None:
    assert full(name).num_classes == FULL[name][2]


def test_residual_networks_have_inner_channels_trunks_and_a_stem() -> None:
    lanes = full("resnet50").lanes
    assert [sum(lane.size for lane in lanes if lane.summed), lanes[0].name, lanes[0].size] == [3840, "conv1", 64]
    assert sum(lane.size for lane in lanes[1:] if not lane.summed) == 7552
    assert [sizes(full("resnet110-A"), summed=flag) for flag in (False, True)] == [2016, 64]
    assert [sizes(full("resnet110-B"), summed=flag) for flag in (False, True)] == [2016, 112]


def test_hidden_linear_layers_of_vgg_are_channels_too() -> None:
    lanes = {lane.name: lane for lane in full("vgg16-imagenet").lanes}
    assert sum(lane.size for name, lane in lanes.items() if name.startswith("classifier")) == 8192
    assert "classifier.6" not in lanes


def test_option_a_carries_a_channel_through_all_stages_at_an_offset() -> None:
    channels = channel_map(ours("resnet20"), 32)
    stages = [channels.rows[f"layer{stage}.2.conv2"] for stage in (1, 2, 3)]
    for index in range(16):
        assert stages[0][index] == stages[1][index + 8] == stages[2][index + 24]
    assert torch.equal(channels.pads["layer2.0.shortcut"][0], stages[1][:8])
    assert torch.equal(channels.pads["layer3.0.shortcut"][1], stages[2][48:])
    assert [lane.size for lane in channels.lanes if lane.summed] == [16, 16, 32]


@pytest.mark.parametrize("family", NARROW)
def test_lanes_hold_every_class_once(family: str) -> None:
    _, channels = narrow(family)
    held = torch.cat([lane.classes for lane in channels.lanes])
    assert torch.equal(held.sort().values, torch.arange(channels.num_classes))
    assert len({lane.name for lane in channels.lanes}) == len(channels.lanes)
    for number, lane in enumerate(channels.lanes):
        assert set(channels.lane_of()[lane.classes].tolist()) == {number}
        assert lane.producers == tuple(
            path for path in channels.producers() if bool(torch.isin(channels.rows[path], lane.classes).any())
        )


@pytest.mark.parametrize("family", NARROW)
def test_images_and_outputs_stay(family: str) -> None:
    _, channels = narrow(family)
    assert bool((channels.columns[channels.producers()[0]] == -1).all())
    assert bool((channels.rows[channels.producers()[-1]] == -1).all())
    assert not any(bool((rows == -1).any()) for path, rows in channels.rows.items() if path != channels.producers()[-1])


@pytest.mark.parametrize("family", NARROW)
def test_masked_classes_are_neither_written_nor_read(family: str) -> None:
    model, channels = narrow(family)
    alive = thinned(channels)
    masks = channels.weight_masks(alive, model)
    assert all(torch.equal(used, alive) for used in channels.used(masks))
    rows_only = {name: mask.flatten(1).any(1).view(-1, *[1] * (mask.dim() - 1)).expand_as(mask)
                 for name, mask in masks.items()}
    written, read = channels.used(rows_only)
    assert torch.equal(written, alive) and bool(read.all())
    assert torch.equal(channels.dead(rows_only), ~alive)
    assert all(bool(used.all()) for used in channels.used({}))


def test_whole_masks_without_dead_classes() -> None:
    model, channels = narrow("mobilenet_v3_small")
    masks = channels.weight_masks(torch.ones(channels.num_classes, dtype=torch.bool), model)
    assert all(bool(mask.all()) for mask in masks.values())


# Structures


class Net(nn.Module):
    """conv a (3 -> 8), batch norm, `middle`, conv b (-> 6), pooling, linear."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.a, self.norm = conv(3, 8), nn.BatchNorm2d(8)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.b, self.fc = conv(8, 6), nn.Linear(6, 5)

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.middle(self.norm(self.a(x)).relu())).mean([2, 3]))


def conv(inputs: int, outputs: int, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def net(middle, **layers: nn.Module) -> Net:
    """Return the network with `middle(model, x)` between its convolutions."""
    return type("Net", (Net,), {"middle": middle})(**layers)


def names(model: nn.Module) -> dict[str, int]:
    """Return the lanes of a network for images of 8 px: name -> channels."""
    return {lane.name: lane.size for lane in channel_map(model, 8).lanes}


FREE, HELD = {"a": 8, "b": 6}, {"b": 6}


@pytest.mark.parametrize(("middle", "layers", "expected"), [
    (lambda m, x: x, {}, FREE),
    (lambda m, x: m.c(x), {"c": conv(8, 8, groups=8)}, FREE),  # depthwise
    (lambda m, x: m.c(x), {"c": conv(8, 8, groups=2)}, HELD),
    (lambda m, x: m.d(m.c(x)), {"c": conv(8, 16, groups=8), "d": conv(16, 8)}, {"d": 8, "b": 6}),  # multiplier
    (lambda m, x: m.c(m.c(x)), {"c": conv(8, 8)}, HELD),  # called twice
    (lambda m, x: m.n(m.c(m.n(x))), {"n": nn.BatchNorm2d(8, affine=False), "c": conv(8, 8)}, HELD),
    (lambda m, x: m.r(m.c(m.r(x))), {"r": nn.ReLU(), "c": conv(8, 8)}, {"a": 8, "c": 8, "b": 6}),
    (lambda m, x: F.conv2d(x, m.c.weight), {"c": conv(8, 8)}, HELD),
    (lambda m, x: F.conv2d(m.c(x), m.c.weight), {"c": conv(8, 8)}, HELD),
    (lambda m, x: m.c(x), {"c": nn.utils.parametrizations.weight_norm(conv(8, 8))}, HELD),
    (lambda m, x: m.c(x), {"c": nn.utils.spectral_norm(conv(8, 8))}, HELD),
    (lambda m, x: m.c(x), {"c": nn.GroupNorm(2, 8)}, HELD),
    (lambda m, x: m.c(x), {"c": nn.PReLU(8)}, HELD),
    (lambda m, x: m.c(x)[0], {"c": nn.MaxPool2d(2, return_indices=True)}, HELD),
    (lambda m, x: F.softmax(x, 1), {}, HELD),
    (lambda m, x: F.pad(x, pad=(1, 1, 1, 1)), {}, FREE),
    (lambda m, x: F.pad(x, (1, 1), value=0.5), {}, FREE),
    (lambda m, x: F.pad(x, (0, 0, 0, 0, 2, 0))[:, 2:], {}, HELD),  # channels come and go by numbers in the code
    (lambda m, x: x[:, :, ::2, ::2], {}, FREE),
    (lambda m, x: x.flip(1), {}, HELD),
    (lambda m, x: torch.cat(x.chunk(2, 1)[::-1], 1), {}, HELD),
    (lambda m, x: m.c(torch.cat([x, x], 1)), {"c": conv(16, 8)}, {"a": 8, "c": 8, "b": 6}),
    (lambda m, x: torch.cat([x, x], 2), {}, HELD),
    (lambda m, x: x + m.c(x), {"c": conv(8, 8)}, FREE),
    (lambda m, x: x * torch.sigmoid(m.c(x)), {"c": conv(8, 1)}, FREE),  # one gate for all channels stays
    (lambda m, x: x * m.d(F.relu(m.c(x.mean((2, 3), keepdim=True)))),
     {"c": nn.Conv2d(8, 4, 1), "d": nn.Conv2d(4, 8, 1)}, {"a": 8, "c": 4, "b": 6}),
    (lambda m, x: x.view(-1, 8, 8, 8), {}, HELD),
])  # fmt: skip
def test_structures(middle, layers: dict[str, nn.Module], expected: dict[str, int]) -> None:
    assert names(net(middle, **layers)) == expected


def test_an_ordinary_convolution_of_one_channel_is_not_depthwise() -> None:
    model = nn.Sequential(conv(3, 1), nn.ReLU(), conv(1, 1), nn.Flatten(), nn.Linear(64, 5))
    channels = channel_map(model, 8)
    assert channels.producers() == ["0", "2", "4"] and channels.num_classes == 2
    assert channels.columns["2"].tolist() == channels.rows["0"].tolist() != channels.rows["2"].tolist()


def test_a_channel_joined_twice_has_two_columns() -> None:
    channels = channel_map(net(lambda m, x: m.c(torch.cat([x, x], 1)), c=conv(16, 8)), 8)
    assert channels.columns["c"].tolist() == 2 * channels.rows["a"].tolist()


def test_squeeze_and_excitation_follows_the_channels_it_scales() -> None:
    channels = channel_map(ours("mobilenet_v3_small"), 32)
    expanded = channels.rows["features.4.block.0.0"]
    for path in ("features.4.block.1.0", "features.4.block.2.fc2"):  # depthwise, and what makes the factors
        assert torch.equal(channels.rows[path], expanded)
    for path in ("features.4.block.2.fc1", "features.4.block.3.0"):
        assert torch.equal(channels.columns[path], expanded)
    assert torch.equal(channels.columns["features.4.block.2.fc2"], channels.rows["features.4.block.2.fc1"])
    squeezed = next(lane for lane in channels.lanes if lane.name == "features.4.block.2.fc1")
    assert squeezed.producers == ("features.4.block.2.fc1",) and squeezed.size == 24


def test_a_flatten_repeats_each_channel() -> None:
    model = nn.Sequential(conv(3, 4), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(16, 5))
    channels = channel_map(model, 8)
    assert channels.columns["3"].tolist() == channels.rows["0"].repeat_interleave(4).tolist()


class Branching(Net):
    def middle(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class Mismatched(Net):
    def middle(self, x: Tensor) -> Tensor:
        return x + x[:, :3]


@pytest.mark.parametrize(("model", "named"), [
    (Branching(), r"Branching is not: .*control flow \(test_flow.py, line \d+: if x.sum\(\) > 0:\)$"),
    (Mismatched(), r"Mismatched is not: operation add: .*broadcast"),
])
def test_an_untraceable_network_is_refused_with_the_operation(model: nn.Module, named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        channel_map(model, 8)
    assert "\n" not in str(caught.value)
