"""Channels taken out: the smaller network computes what the masked one did, costs what was counted, is built again."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch
from torch import Tensor, nn

from prune_lab.accounting.costs import count_parameters, dense_macs, profile
from prune_lab.foundations.errors import UserError
from prune_lab.models.resnet_cifar import ZeroPadShortcut
from prune_lab.pruning.channels import surgery
from prune_lab.pruning.channels.costs import ChannelCosts
from prune_lab.pruning.channels.groups import ChannelMap, channel_map
from prune_lab.pruning.channels.surgery import narrow, remove_channels, widths
from tests.helpers.channel_networks import FULL, NARROW, disturb, ours, outputs, thinned


@functools.cache
def disturbed(family: str) -> tuple[nn.Module, ChannelMap]:
    """Return a narrow network with lively batch norms and its map; not to be changed."""
    torch.manual_seed(0)
    model = disturb(NARROW[family]())
    return model, channel_map(model, 32)


@functools.cache
def thin(family: str) -> nn.Module:
    """Return the network that is left of 60 % of the channels; not to be changed."""
    model, channels = disturbed(family)
    return remove_channels(model, channels, thinned(channels))


def masked(model: nn.Module, channels: ChannelMap, alive: Tensor) -> nn.Module:
    """Return a copy with zeros in the rows and columns of dead classes."""
    copied = copy.deepcopy(model)
    for name, mask in channels.weight_masks(alive, copied).items():
        copied.get_parameter(name).data.mul_(mask)
    return copied


def assert_equal_when_cut(model: nn.Module, channels: ChannelMap, image_size: int) -> nn.Module:
    """Cut 40 % of the classes, compare with the masked network, and return the small one."""
    alive = thinned(channels)
    small, whole = remove_channels(model, channels, alive), outputs(model, image_size)
    expected, got = outputs(masked(model, channels, alive), image_size), outputs(small, image_size)
    off, scale = float((got - expected).abs().max()), float(expected.abs().max())
    assert off < 1e-5 * max(1, scale) and off < 1e-4 * scale
    assert float((whole - expected).abs().max() / whole.abs().max()) > 1e-3  # what went mattered
    return small


@pytest.mark.parametrize("family", NARROW)
def test_the_smaller_network_computes_what_the_masked_one_does(family: str) -> None:
    assert_equal_when_cut(*disturbed(family), 32)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_whole_networks_compute_what_they_did_masked(name: str) -> None:
    build, image_size, _ = FULL[name]
    torch.manual_seed(0)
    model = disturb(build())
    channels = channel_map(model, image_size)
    small = assert_equal_when_cut(model, channels, image_size)
    rebuilt = build()
    narrow(rebuilt, widths(small, channels))
    rebuilt.load_state_dict(small.state_dict())
    assert torch.equal(outputs(rebuilt.eval(), image_size), outputs(small, image_size))


@pytest.mark.parametrize("family", NARROW)
def test_costs_of_the_smaller_network_are_those_counted_beforehand(family: str) -> None:
    model, channels = disturbed(family)
    costs, alive = ChannelCosts(model, channels, profile(model, 32)), thinned(channels)
    small, kept = thin(family), costs.kept(alive)
    counted = profile(small, 32)
    assert dense_macs(counted) == costs.at("macs", kept)
    assert count_parameters(small) == costs.at("params", kept)
    assert int(alive.sum()) == costs.at("channels", kept)
    assert {cost.parameter: cost.weights for cost in counted} == costs.layer_weights(kept)


@pytest.mark.parametrize("family", NARROW)
def test_sizes_noted_in_modules_are_those_of_their_tensors(family: str) -> None:
    for module in thin(family).modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
            assert module.groups in (1, module.in_channels)
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.BatchNorm2d):
            assert len(module.weight) == len(module.bias) == len(module.running_var) == module.num_features


@pytest.mark.parametrize("family", NARROW)
def test_a_network_is_rebuilt_from_its_widths_and_trains(family: str) -> None:
    small, (_, channels) = thin(family), disturbed(family)
    rebuilt = NARROW[family]()
    narrow(rebuilt, json.loads(json.dumps(widths(small, channels))))
    rebuilt.load_state_dict(small.state_dict())
    assert torch.equal(outputs(rebuilt.eval()), outputs(small))
    optimizer = torch.optim.SGD(rebuilt.train().parameters(), lr=0.01)
    rebuilt(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert all(parameter.grad is not None for parameter in rebuilt.parameters())


def test_the_whole_network_is_left_alone_and_shares_nothing() -> None:
    model, channels = disturbed("mobilenet_v3_small")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = remove_channels(model, channels, thinned(channels))
    for tensor in small.state_dict().values():
        tensor.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_cut_once_can_be_cut_again() -> None:
    model, channels = disturbed("mobilenet_v3_small")
    small = remove_channels(model, channels, thinned(channels, 0.5))
    smaller = assert_equal_when_cut(small, channel_map(small, 32), 32)
    rebuilt = NARROW["mobilenet_v3_small"]()
    narrow(rebuilt, widths(smaller, channels))
    rebuilt.load_state_dict(smaller.state_dict())


def test_depthwise_convolutions_cut_to_one_channel_still_work() -> None:
    model, channels = disturbed("mobilenet_v2")
    alive = torch.zeros(channels.num_classes, dtype=torch.bool)
    alive[torch.stack([lane.classes[-1] for lane in channels.lanes])] = True
    small = remove_channels(model, channels, alive)
    assert torch.allclose(outputs(small), outputs(masked(model, channels, alive)), atol=1e-6)
    again = channel_map(small, 32)
    assert again.num_classes == len(again.lanes) >= len(channels.lanes)


# By hand


def shifted_example() -> nn.Sequential:
    """Return 1x1 conv 2 -> 2, batch norm, 1x1 conv 2 -> 1 with weights 1 and 1; channel 1 has a shift of 0.7."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1, bias=False)).eval()
    model[0].weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(2, 2, 1, 1)
    model[1].bias.data = torch.tensor([0.0, 0.7])
    model[2].weight.data.fill_(1)
    return model


def shifted_map() -> ChannelMap:
    stays = torch.tensor([-1, -1])
    rows = {"0": torch.arange(2), "2": stays[:1]}
    return ChannelMap(rows, {"0": stays, "2": torch.arange(2)}, {"1": torch.arange(2)}, {}, (), 2)


def test_the_shift_of_a_dead_channel_goes_with_it() -> None:
    model, alive = shifted_example(), torch.tensor([True, False])
    images = torch.rand(1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    rows_only, small = copy.deepcopy(model), remove_channels(model, shifted_map(), alive)
    rows_only[0].weight.data[1] = 0
    assert torch.allclose(rows_only(images) - small(images), torch.tensor(0.7), atol=1e-6)
    assert torch.allclose(masked(model, shifted_map(), alive)(images), small(images), atol=1e-6)


class OptionA(nn.Module):
    """A stem of 2 channels, and a block of 4 behind a shortcut that pads one zero channel in front and behind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(2, 4, 3, 2, padding=1)
        self.shortcut, self.fc = ZeroPadShortcut(2, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.fc((self.conv(x) + self.shortcut(x)).relu().mean([2, 3]))


# stem a, b; padded p, a, b, q; conv c, d, e, f: p = c, a = d, b = e, q = f
@pytest.mark.parametrize(("row", "stem", "pads"), [(1, 1, (1, 1)), (0, 2, (0, 1)), (2, 1, (1, 1)), (3, 2, (1, 0))])
def test_pads_of_option_a(row: int, stem: int, pads: tuple[int, int]) -> None:
    model = OptionA()
    channels = channel_map(model, 8)
    assert channels.num_classes == 4
    assert torch.equal(channels.rows["conv"][1:3], channels.rows["stem"])
    alive = torch.ones(4, dtype=torch.bool)
    alive[channels.rows["conv"][row]] = False
    small = remove_channels(model, channels, alive)
    assert small.stem.out_channels == stem and small.conv.out_channels == 3
    assert (small.shortcut.front, small.shortcut.back) == pads
    assert torch.allclose(outputs(small, 8), outputs(masked(model, channels, alive), 8), atol=1e-6)


# Bad input


def test_nothing_dead_is_an_error() -> None:
    model, channels = disturbed("vgg16")
    with pytest.raises(UserError, match="no channels to remove"):
        remove_channels(model, channels, torch.ones(channels.num_classes, dtype=torch.bool))


def test_a_layer_without_channels_is_an_error_that_names_it() -> None:
    model, channels = disturbed("resnet20-A")
    alive = torch.ones(channels.num_classes, dtype=torch.bool)
    alive[channels.rows["layer2.1.conv1"]] = False
    assert [lane.name for lane in surgery.emptied(channels, alive)] == ["layer2.1.conv1"]
    with pytest.raises(UserError, match=r"layer2\.1\.conv1 would be left without channels"):
        remove_channels(model, channels, alive)


@pytest.mark.parametrize("wrong", [torch.ones(7, dtype=torch.bool), torch.ones(528), torch.ones(528, 1) > 0])
def test_a_choice_of_another_length_or_type_is_an_error(wrong: Tensor) -> None:
    model, channels = disturbed("vgg16")
    with pytest.raises(ValueError, match=r"alive must be bool of shape \(528,\), got"):
        remove_channels(model, channels, wrong)


@pytest.mark.parametrize("wrap", [nn.DataParallel, pytest.param(torch.compile, marks=pytest.mark.slow)])
def test_wrapped_networks_are_refused(wrap) -> None:
    model, channels = disturbed("vgg16")
    expected = r"from plain networks, got (DataParallel|OptimizedModule); remove first, then wrap or compile"
    with pytest.raises(UserError, match=expected):
        channel_map(wrap(model), 32)
    with pytest.raises(UserError, match=expected):
        remove_channels(wrap(model), channels, thinned(channels))


@pytest.mark.parametrize(("path", "size"), [
    ("layer9.conv", [4, 4]), ("layer1.0.conv1", [4]), ("layer1.0.conv1", [4, 99]), ("layer1.0.conv1", [0, 8]),
    ("layer1.0.bn1", [9]), ("layer1.0.bn1", ["4"]), ("layer1.0.relu1", [4, 4]), ("layer2.0.shortcut", [1]),
    ("layer1.0.bn1", []),
])  # fmt: skip
def test_widths_of_another_network_are_refused_by_name(path: str, size: list) -> None:
    with pytest.raises(UserError, match=rf"channels: the widths .* of '{path}' are not this network's"):
        narrow(ours("resnet20", "model.width=0.5"), {path: size})
