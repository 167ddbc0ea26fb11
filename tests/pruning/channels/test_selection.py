"""What channels cost, and which of them a budget keeps: exact integers, targets met from below and nearly used up."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prune_lab.accounting.costs import profile
from prune_lab.foundations.errors import UserError
from prune_lab.pruning.channels.costs import ChannelCosts
from prune_lab.pruning.channels.groups import ChannelMap, channel_map
from prune_lab.pruning.channels.selection import Budget, choose_counts, relative, top, within_lanes
from tests.helpers.channel_networks import FULL, thinned

UNITS = ("macs", "params", "channels")


@functools.cache
def counted(name: str) -> tuple[ChannelMap, ChannelCosts]:
    """Return the map and the costs of a network without memory."""
    build, image_size, _ = FULL[name]
    with torch.device("meta"):
        model = build()
    channels = channel_map(model, image_size)
    return channels, ChannelCosts(model, channels, profile(model, image_size))


def drawn(channels: ChannelMap, seed: int = 0) -> Tensor:
    return torch.rand(channels.num_classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chosen(name: str, budget: Budget, *, even: bool = False, free=None, seed: int = 0) -> np.ndarray:
    channels, costs = counted(name)
    scores = within_lanes(drawn(channels, seed), channels) if even else drawn(channels, seed)
    return choose_counts(scores, channels, costs, budget, free=free or [True] * len(channels.lanes))


# Costs


def test_costs_of_one_channel_of_resnet110() -> None:
    channels, costs = counted("resnet110-A")
    whole = costs.at("macs", costs.sizes)
    assert whole == 252_887_680 and costs.at("params", costs.sizes) == 1_727_962

    def percent(lane: str) -> float:
        less = costs.sizes.copy()
        less[[one.name for one in channels.lanes].index(lane)] -= 1
        return round(100 * (whole - costs.at("macs", less)) / whole, 3)

    assert [percent(f"layer{stage}.5.conv1") for stage in (1, 2, 3)] == [0.117, 0.058, 0.029]
    # The trunk through all stages, from the second on, of the third.
    assert [percent(lane) for lane in ("conv1", "layer2.0.conv2", "layer3.0.conv2")] == [3.684, 1.545, 0.510]


# The percentages were counted with batch norm and ReLU, which fall less than the MACs.
@pytest.mark.parametrize(("removed", "percent"), [(0.3, 50.7), (0.5, 74.1), (0.7, 90.4)])
def test_a_fraction_of_the_channels_is_not_that_fraction_of_the_cost(removed: float, percent: float) -> None:
    _, costs = counted("resnet50")
    kept = np.array([int(size * (1 - removed)) for size in costs.sizes])
    assert 100 * (1 - costs.at("macs", kept) / costs.at("macs", costs.sizes)) == pytest.approx(percent, abs=0.2)


def test_costs_count_what_has_no_channels() -> None:
    class WithTable(nn.Module):
        """A parameter of its own, and a convolution of two groups that loses no channels."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False)
            self.c, self.table = nn.Conv2d(4, 2, 1, groups=2, bias=False), nn.Parameter(torch.zeros(7))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x))).mean([2, 3]) + self.table.sum()

    model = WithTable()
    channels = channel_map(model, 2)
    costs = ChannelCosts(model, channels, profile(model, 2))
    assert [lane.name for lane in channels.lanes] == ["a"]
    assert costs.at("params", [4]) == 12 + 16 + 4 + 7 and costs.at("params", [1]) == 3 + 4 + 4 + 7
    assert costs.at("macs", [4]) == 4 * (12 + 16 + 4) and costs.at("macs", [1]) == 4 * (3 + 4 + 4)


@pytest.mark.parametrize("unit", UNITS)
def test_the_bilinear_form_is_the_cost(unit: str) -> None:
    channels, costs = counted("mobilenet_v3_small")
    kept = costs.kept(thinned(channels))
    extended = np.append(kept, 1)
    assert extended @ costs.matrix(unit) @ extended == costs.at(unit, kept)


# Scores


def toy_map(*sizes: int) -> ChannelMap:
    """Return the map of a chain of 1x1 convolutions with these hidden widths."""
    widths = (3, *sizes, 2)
    return channel_map(nn.Sequential(*[nn.Conv2d(a, b, 1) for a, b in zip(widths, widths[1:], strict=False)]), 2)


def test_scores_within_lanes_are_ranks_over_sizes() -> None:
    scores = torch.tensor([0.1, 0.4, 5.0, 3.0, 9.0, 3.0])
    ranked = within_lanes(scores, toy_map(2, 4))
    assert torch.allclose(ranked, -torch.tensor([2 / 2, 1 / 2, 2 / 4, 3 / 4, 1 / 4, 4 / 4], dtype=torch.float64))


def test_relative_scores_are_multiples_of_their_lanes_mean() -> None:
    scores = torch.tensor([1.0, 3.0, 10.0, 20.0, 30.0, 40.0])
    expected = torch.tensor([0.5, 1.5, 0.4, 0.8, 1.2, 1.6], dtype=torch.float64)
    assert torch.allclose(relative(scores, toy_map(2, 4)), expected)
    assert relative(torch.zeros(6), toy_map(2, 4)).tolist() == [0.0] * 6


def test_the_best_of_each_lane_are_kept_and_ties_go_to_the_lower_index() -> None:
    scores = torch.tensor([0.1, 0.4, 5.0, 3.0, 9.0, 3.0])
    assert top(scores, toy_map(2, 4), [1, 3]).tolist() == [False, True, True, True, True, False]


# Budgets


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.873])
@pytest.mark.parametrize("name", ["resnet110-A", "resnet50", "mobilenet_v2", "vgg16-imagenet"])
def test_budgets_are_met_from_below_and_nearly_used_up(name: str, ratio: float, unit: str) -> None:
    _, costs = counted(name)
    for even in (False, True):
        reached = costs.at(unit, chosen(name, Budget(unit, ratio, even=even), even=even))
        assert ratio - 0.003 < reached / costs.at(unit, costs.sizes) <= ratio


@pytest.mark.parametrize("unit", UNITS)
def test_no_channel_more_fits(unit: str) -> None:
    _, costs = counted("resnet110-A")
    counts = chosen("resnet110-A", Budget(unit, 0.5))
    assert costs.at(unit, counts) <= costs.at(unit, costs.sizes) / 2
    for lane in np.flatnonzero(counts < costs.sizes):
        more = counts.copy()
        more[lane] += 1
        assert costs.at(unit, more) > costs.at(unit, costs.sizes) / 2


@pytest.mark.parametrize("equal", [False, True])
def test_what_the_trunk_leaves_of_the_budget_goes_to_cheaper_channels(equal: bool) -> None:
    channels, costs = counted("resnet110-A")
    scores = drawn(channels) + 1
    trunk = channels.lanes[0]
    scores[trunk.classes] -= 1  # 3.684 % of the MACs each, and the first to go: 6 are too few, 7 too many
    if equal:
        scores[trunk.classes] = 0
    counts = choose_counts(scores, channels, costs, Budget("macs", 0.75), free=[True] * len(channels.lanes))
    assert counts[0] == 10 and any(counts[1:] < costs.sizes[1:])
    assert costs.at("macs", counts) / costs.at("macs", costs.sizes) > 0.7495
    only = [lane is trunk for lane in channels.lanes]
    assert choose_counts(scores, channels, costs, Budget("macs", 0.75), free=only)[0] == 9


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("step", [8, 16])
def test_rounded_widths_are_multiples_or_whole_and_the_budget_still_holds(step: int, even: bool) -> None:
    for name in ("resnet50", "mobilenet_v3_small"):
        _, costs = counted(name)
        counts = chosen(name, Budget("macs", 0.4, round_to=step, even=even), even=even)
        assert all(count % step == 0 or count == size for count, size in zip(counts, costs.sizes, strict=True))
        assert 0.39 < costs.at("macs", counts) / costs.at("macs", costs.sizes) <= 0.4


def test_lanes_keep_what_they_must() -> None:
    channels, costs = counted("resnet110-A")
    counts = chosen("resnet110-A", Budget("macs", 0.3, least=7))
    assert counts.min() == 7
    free = [not lane.summed for lane in channels.lanes]
    counts = chosen("resnet110-A", Budget("macs", 0.3), free=free)
    held = ~np.array(free)
    assert (counts[held] == costs.sizes[held]).all() and (counts[~held] < costs.sizes[~held]).all()


def test_even_lanes_keep_alike() -> None:
    _, costs = counted("resnet50")
    kept = chosen("resnet50", Budget("macs", 0.5, even=True), even=True) / costs.sizes
    assert kept.max() - kept.min() <= 2 / costs.sizes.min()


@pytest.mark.parametrize("even", [False, True])
def test_counts_of_even_lanes_do_not_depend_on_the_scores(even: bool) -> None:
    first, second = (chosen("mobilenet_v2", Budget("macs", 0.5, even=even), even=even, seed=seed) for seed in (0, 1))
    assert np.array_equal(first, second) == even


def test_ties_between_lanes_do_not_depend_on_the_place_of_a_class() -> None:
    """Two lanes of equal cost whose classes take turns: which of them gets the odd channel is no matter of scores."""
    channels = toy_map(4, 4)
    lanes = tuple(
        type(lane)(lane.name, lane.producers, torch.arange(first, 8, 2), lane.summed)
        for first, lane in enumerate(channels.lanes)
    )
    mixed = ChannelMap(channels.rows, channels.columns, channels.norms, channels.pads, lanes, 8)
    costs = ChannelCosts(nn.Sequential(*[nn.Conv2d(a, b, 1) for a, b in ((3, 4), (4, 4), (4, 2))]), mixed, [])
    found = {
        tuple(choose_counts(within_lanes(drawn(mixed, seed), mixed), mixed, costs, Budget("channels", 0.625, even=True),
                            free=[True, True]))
        for seed in range(20)
    }  # fmt: skip
    assert found == {(3, 2)}


@pytest.mark.parametrize(("budget", "message"), [
    (Budget("macs", 0.001), r"^method\.macs_ratio=0\.001 is out of reach: .* has 0\.00\d+ of the MACs; allowed: that"),
    (Budget("params", 0.2, least=30), r"^method\.params_ratio=0\.2 is out of reach: .* of the parameters; allowed"),
    (Budget("channels", 0.5, round_to=64), r"^method\.channels_ratio=0\.5 is out of reach: .* has 1 of the channels"),
])
def test_a_budget_out_of_reach_says_what_is_in_reach(budget: Budget, message: str) -> None:
    with pytest.raises(UserError, match=message):
        chosen("resnet110-A", budget)


def test_what_is_said_to_be_in_reach_is() -> None:
    channels, costs = counted("resnet110-A")
    floor = costs.at("macs", np.ones_like(costs.sizes)) / costs.at("macs", costs.sizes)
    assert chosen("resnet110-A", Budget("macs", floor * 1.0001)).max() <= 2
    with pytest.raises(UserError, match=f"{floor:.4g}"):
        chosen("resnet110-A", Budget("macs", floor * 0.9999))
