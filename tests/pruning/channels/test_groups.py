"""Channel groups, judged by what they promise: a removed channel changes no other."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn

from prune_lab import models
from prune_lab.foundations.errors import UserError
from prune_lab.pruning.channels.groups import ChannelGroup, Consumer, channel_groups, columns
from tests.helpers.runs import compose

FAMILIES = {
    "resnet20": ("model.width=0.5",),
    "resnet18": ("model.width=0.125",),
    "resnet50": ("model.width=0.125",),
    "vgg16": ("model.width=0.125",),
    "mobilenet_v2": ("model.width=0.25",),
    "mobilenet_v3_small": ("model.width=0.5",),
    "wrn_16_8": ("model.width=0.0625",),
}
IMAGE_SIZE = 32


def network(*options: str, image_size: int = IMAGE_SIZE) -> nn.Module:
    """Return a network in evaluation mode whose batch norms pass something else than 0 for an input of 0."""
    torch.manual_seed(0)
    model = models.build(compose(*options).model, num_classes=5, image_size=image_size).eval()
    return disturb(model)


def disturb(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def masked(model: nn.Module, group: ChannelGroup, kept: Tensor) -> nn.Module:
    """Return a copy with zeros in the producer's rows and the consumers' columns of channels that are not kept."""
    copied = copy.deepcopy(model)
    copied.get_submodule(group.producer).weight.data[~kept] = 0
    for consumer in group.consumers:
        copied.get_submodule(consumer.path).weight.data[:, columns(~kept, consumer.span)] = 0
    return copied


def sliced(model: nn.Module, group: ChannelGroup, kept: Tensor) -> nn.Module:
    """Return a copy whose layers lack the channels that are not kept."""
    copied = copy.deepcopy(model)
    for path in (group.producer, *group.norms, *group.followers):
        module = copied.get_submodule(path)
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(module, name, None) is not None:
                getattr(module, name).data = getattr(module, name).data[kept]
        if getattr(module, "groups", 1) > 1:
            module.groups = int(kept.sum())
    for consumer in group.consumers:
        weight = copied.get_submodule(consumer.path).weight
        weight.data = weight.data[:, columns(kept, consumer.span)]
    return copied


def outputs(model: nn.Module, image_size: int = IMAGE_SIZE) -> Tensor:
    images = torch.randn(3, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(images)


def some_kept(group: ChannelGroup) -> Tensor:
    kept = torch.rand(group.size, generator=torch.Generator().manual_seed(2)) < 0.5
    kept[0], kept[-1] = True, False
    return kept


def assert_removable(model: nn.Module, image_size: int = IMAGE_SIZE) -> None:
    """Zeroed and sliced networks agree for every group, and what is zeroed matters."""
    whole, groups = outputs(model, image_size), channel_groups(model, image_size)
    assert groups
    for group in groups:
        if group.size == 1:
            continue
        kept = some_kept(group)
        zeroed = outputs(masked(model, group, kept), image_size)
        scale = zeroed.abs().max()
        cut = outputs(sliced(model, group, kept), image_size)
        assert torch.allclose(zeroed, cut, atol=float(1e-5 * scale), rtol=1e-4), group.producer
        assert not torch.equal(zeroed, whole), group.producer


@pytest.mark.thin(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_zeroed_channels_can_be_sliced_off(family: str) -> None:
    assert_removable(network(f"model={family}", *FAMILIES[family]))


@pytest.mark.parametrize("name", ["squeezenet1_1", "mnasnet0_5", "shufflenet_v2_x0_5", "densenet121", "convnext_tiny"])
@pytest.mark.slow
def test_zeroed_channels_of_torchvision_networks_can_be_sliced_off(name: str) -> None:
    torch.manual_seed(0)
    assert_removable(disturb(torchvision.models.get_model(name, weights=None)).eval(), 64)


@pytest.mark.thin(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_norms_of_a_channel_without_columns_do_not_matter(family: str) -> None:
    model = network(f"model={family}", *FAMILIES[family])
    for group in channel_groups(model, IMAGE_SIZE):
        kept = some_kept(group)
        zeroed = masked(model, group, kept)
        scrambled = copy.deepcopy(zeroed)
        for path in (*group.norms, *group.followers):
            for tensor in scrambled.get_submodule(path).parameters():
                tensor.data[~kept] = 7.0
        assert torch.equal(outputs(zeroed), outputs(scrambled)), group.producer


def producers(*options: str, image_size: int = IMAGE_SIZE) -> list[str]:
    model = models.build(compose(*options).model, num_classes=10, image_size=image_size)
    return [group.producer for group in channel_groups(model, image_size)]


def test_residual_blocks_give_their_inner_channels() -> None:
    blocks = [f"layer{stage}.{index}" for stage in (1, 2, 3) for index in (0, 1, 2)]
    assert producers("model=resnet20") == [f"{block}.conv1" for block in blocks]
    assert len(producers("model=resnet110", "model.width=0.25")) == 54
    assert len(producers("model=resnet18", "model.width=0.125")) == 8
    bottlenecks = producers("model=resnet50", "model.width=0.125")
    # Two per block, and the stem, which no addition ties: layer1.0 reads it by convolutions on both paths.
    assert len(bottlenecks) == 33 and bottlenecks[:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert producers("model=wrn_16_8", "model.width=0.0625")[1:] == [
        f"layer{stage}.{index}.conv1" for stage in (1, 2, 3) for index in (0, 1)
    ]


def test_a_stem_that_two_convolutions_read_has_two_consumers() -> None:
    model = models.build(compose("model=resnet50", "model.width=0.125").model, num_classes=10, image_size=32)
    stem = channel_groups(model, 32)[0]
    assert stem == ChannelGroup(
        "conv1", ("bn1",), (), (Consumer("layer1.0.conv1", 1), Consumer("layer1.0.downsample.0", 1)), 8
    )


def test_plain_networks_give_all_convolutions_and_the_last_feeds_the_linear_layer() -> None:
    model = models.build(compose("model=vgg16", "model.width=0.125").model, num_classes=10, image_size=32)
    groups = channel_groups(model, 32)
    assert len(groups) == 13
    assert groups[-1] == ChannelGroup("features.40", ("features.41",), (), (Consumer("classifier", 1),), 64)


def test_span_is_the_map_size_where_a_flatten_follows() -> None:
    with torch.device("meta"):
        model = models.build(compose("model=vgg16").model, num_classes=10, image_size=224)
    spans = {group.producer: group.consumers[0].span for group in channel_groups(model, 224)}
    assert spans.pop("features.40") == 49 and set(spans.values()) == {1}


def test_inverted_residuals_give_their_hidden_channels_with_the_depthwise_filter() -> None:
    model = models.build(compose("model=mobilenet_v2", "model.width=0.25").model, num_classes=10, image_size=32)
    groups = {group.producer: group for group in channel_groups(model, 32)}
    for block in range(2, 18):
        path = f"features.{block}.conv"
        assert groups[f"{path}.0.0"] == ChannelGroup(
            f"{path}.0.0", (f"{path}.0.1", f"{path}.1.1"), (f"{path}.1.0",), (Consumer(f"{path}.2", 1),),
            model.get_submodule(f"{path}.0.0").out_channels,
        )  # fmt: skip


def test_channels_under_squeeze_and_excitation_go_with_their_factors() -> None:
    model = models.build(compose("model=mobilenet_v3_small", "model.width=0.35").model, num_classes=10, image_size=32)
    found = {group.producer: group for group in channel_groups(model, 32)}
    gated = [name for name, module in model.named_modules() if type(module).__name__ == "SqueezeExcitation"]
    assert len(gated) == 9
    for name in gated:
        block = name.rpartition(".")[0]
        owner = next(group for group in found.values() if f"{name}.fc2" in group.followers)
        assert owner.producer in (f"{block}.0.0", "features.0.0") and Consumer(f"{name}.fc1", 1) in owner.consumers
        assert f"{name}.fc1" in found and f"{name}.fc2" not in found


# Small networks


class Branching(nn.Module):
    """conv a, then something between it and conv b."""

    def __init__(self, between) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.wide = nn.Conv2d(8, 2, 1)
        self.narrow = nn.Conv2d(2, 4, 1)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2, padding=1)
        self.prelu = nn.PReLU(4)
        self.head = nn.Linear(4 * 16, 2)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self, self.a(x)).flatten(1))


TIED = {
    "addition": lambda net, x: x + net.b(x),
    "concatenation": lambda net, x: net.narrow(net.wide(torch.cat([x, net.b(x)], 1))),
    "grouped convolution": lambda net, x: net.b(net.grouped(x)),
    "parameters per channel that nothing slices": lambda net, x: net.b(net.prelu(x)),
    "layer called twice": lambda net, x: net.b(net.b(x)),
    "slice": lambda net, x: net.b(x[:, [1, 0, 2, 3]]),
    "statistics over channels": lambda net, x: net.b(x - x.mean(1, keepdim=True)),
    "batch and map mixed": lambda net, x: net.b(x.reshape(-1, 4, 4, 4)),
}


@pytest.mark.parametrize("case", TIED)
def test_tied_channels_are_not_free(case: str) -> None:
    assert "a" not in [group.producer for group in channel_groups(Branching(TIED[case]), 4)]


def test_flatten_in_every_spelling_gives_the_span() -> None:
    kept = torch.tensor([True, False, True, False])
    for flat in (
        lambda net, x: x,
        lambda net, x: torch.flatten(x, 1),
        lambda net, x: x.view(x.size(0), -1),
        lambda net, x: x.reshape(x.shape[0], -1),
    ):
        model = Branching(flat)
        (group,) = channel_groups(model, 4)
        assert group == ChannelGroup("a", (), (), (Consumer("head", 16),), 4)
        assert torch.allclose(outputs(masked(model, group, kept), 4), outputs(sliced(model, group, kept), 4), atol=1e-6)


def test_shared_weights_are_not_free() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1))
    assert [group.producer for group in channel_groups(model, 4)] == ["0", "2"]
    model[2].weight = model[0].weight
    assert channel_groups(model, 4) == []


def test_channels_of_the_output_are_not_free() -> None:
    assert channel_groups(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), 4) == []


def test_columns_of_a_channel_follow_each_other() -> None:
    assert columns(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]
    assert columns(torch.tensor([True, False, True]), 2).tolist() == [True, True, False, False, True, True]


class Looking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else self.conv(-x)


def test_a_network_that_cannot_be_traced_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="torch.fx can trace; Looking is not: ") as caught:
        channel_groups(Looking(), 4)
    assert "\n" not in str(caught.value)


def test_the_model_is_left_as_it_was() -> None:
    model = network("model=mobilenet_v2", "model.width=0.25").train()
    before = copy.deepcopy(model.state_dict())
    channel_groups(model, IMAGE_SIZE)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert next(model.parameters()).device.type == "cpu"
