"""Which weights may be pruned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prune_lab.accounting.eligibility import select_layers
from prune_lab.foundations.errors import UserError


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 3, groups=8),
        nn.Conv2d(16, 16, 3, groups=4),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def eligible(model: nn.Module, **options) -> list[str]:
    return [layer.name for layer in select_layers(model, **options) if layer.eligible]


def test_conv_and_linear_are_eligible_depthwise_is_not():
    layers = select_layers(network())
    assert [(layer.name, layer.kind, layer.eligible) for layer in layers] == [
        ("0", "conv", True),
        ("2", "depthwise conv", False),
        ("3", "grouped conv", True),
        ("5", "linear", True),
    ]
    assert [layer.parameter for layer in layers] == ["0.weight", "2.weight", "3.weight", "5.weight"]
    assert layers[3].shape == (10, 16) and layers[3].size == 160
    assert "depthwise" in layers[1].reason
    assert all(bool(layer.reason) != layer.eligible for layer in layers)


def test_one_input_channel_is_no_depthwise_convolution():
    assert eligible(nn.Sequential(nn.Conv2d(1, 8, 3))) == ["0"]


def test_patterns_and_first_layer():
    assert eligible(network(), include=["2"]) == ["0", "2", "3", "5"]
    assert eligible(network(), exclude=["[35]"]) == ["0"]
    assert eligible(network(), include=["2"], exclude=["2"]) == ["0", "3", "5"]
    assert eligible(network(), dense_first=True) == ["3", "5"]
    assert "first layer" in select_layers(network(), dense_first=True)[0].reason


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_without_a_match_is_refused(option):
    model = nn.ModuleDict({"conv1": nn.Conv2d(3, 8, 3), "fc": nn.Linear(8, 2)})
    with pytest.raises(UserError, match=rf"method\.{option}: 'conv2' matches no layer.*did you mean 'conv1'"):
        select_layers(model, **{option: ["conv2"]})


def test_nothing_left_to_prune_is_refused():
    with pytest.raises(UserError, match=r"method\.exclude leaves no layer"):
        select_layers(network(), exclude=["*"])
    with pytest.raises(UserError, match="no layer to prune"):
        select_layers(nn.Sequential(nn.BatchNorm2d(3)))


def test_a_shared_weight_is_listed_once_under_the_name_the_model_gives_it():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4)
            self.encode = nn.Linear(4, 4)
            self.again = nn.Linear(4, 4)
            self.decode = nn.Linear(4, 10)
            self.again.weight = self.encode.weight
            self.decode.weight = self.table.weight

    model = Tied()
    layers = select_layers(model)
    assert [layer.parameter for layer in layers] == ["encode.weight", "table.weight"]
    assert all(layer.parameter in dict(model.named_parameters()) for layer in layers)


def test_selection_draws_no_random_numbers_and_needs_no_memory():
    with torch.device("meta"):
        model = network()
    before = torch.get_rng_state()
    select_layers(model)
    assert torch.equal(before, torch.get_rng_state())
