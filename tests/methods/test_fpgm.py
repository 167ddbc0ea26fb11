"""Filters nearest to the geometric median: distances, the mix with norms, and choices during the fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prune_lab.foundations.errors import UserError
from prune_lab.pruning.channels.filter_scores import distance_sums, per_class
from prune_lab.pruning.channels.groups import channel_map
from tests.helpers.channel_networks import NARROW, chosen, one_layer, phase
from tests.helpers.method_runs import configure, finish, make, summary

CORNERS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
LINE = torch.tensor([[0.1], [0.1], [0.1], [1.0], [2.0], [4.0]])


def keeping(ratio: float, **options):
    return make("fpgm", macs_ratio=None, channels_ratio=ratio, **options)


def kept(filters: Tensor, ratio: float, **options) -> list[int]:
    return chosen(keeping(ratio, **options), phase(one_layer(filters), 2))["0"]


def random_filters(count: int = 12, size: int = 20, seed: int = 0) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


# Distances


def test_sums_of_distances_by_hand() -> None:
    expected = torch.tensor([7.0, 6.8863, 6.6569, 13.7148], dtype=torch.float64)
    torch.testing.assert_close(distance_sums(CORNERS, "l2"), expected, atol=5e-5, rtol=0)
    assert distance_sums(CORNERS, "l1").tolist() == [9.0, 9.0, 9.0, 19.0]
    # Angles: zeros have a distance of 1 to all; (1, 0) and (0, 1) are at right angles; (3, 4) lies at 0.6 and 0.8.
    expected = torch.tensor([3.0, 1 + 1 + 0.4, 1 + 1 + 0.2, 1 + 0.4 + 0.2], dtype=torch.float64)
    torch.testing.assert_close(distance_sums(CORNERS, "cosine"), expected)


def test_the_filter_nearest_to_all_others_goes_not_the_smallest() -> None:
    assert kept(CORNERS, 0.75) == [0, 1, 3]
    l1 = make("l1_filter", macs_ratio=None, channels_ratio=0.75)
    assert chosen(l1, phase(one_layer(CORNERS), 2))["0"] == [1, 2, 3]


def test_distances_are_chosen_by_name() -> None:
    filters = torch.tensor([[1.0, 0.0], [1.0, 0.05], [9.0, 0.9], [0.0, 2.0], [-3.0, 1.0]])
    assert kept(filters, 0.8) == [0, 2, 3, 4]
    assert kept(filters, 0.8, distance="cosine") == [0, 1, 3, 4]  # the long one points between others
    with pytest.raises(UserError, match=r"method\.distance=cos is not allowed .*allowed: l2, l1, cosine$"):
        make("fpgm", distance="cos")


@pytest.mark.parametrize("distance", ["l2", "l1"])
def test_a_common_shift_does_not_matter(distance: str) -> None:
    filters, shift = random_filters(), torch.randn(20, generator=torch.Generator().manual_seed(9))
    before, after = distance_sums(filters.double(), distance), distance_sums(filters.double() + 50 * shift, distance)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("distance", ["l2", "l1", "cosine"])
def test_the_order_of_the_filters_does_not_matter(distance: str) -> None:
    filters, order = random_filters(), torch.randperm(12, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(distance_sums(filters[order], distance), distance_sums(filters, distance)[order])


def test_alike_filters_have_no_distance() -> None:
    assert distance_sums(torch.zeros(5, 4), "l2").tolist() == [0.0] * 5
    filters = 100 * random_filters(2).repeat(3, 1)
    sums = distance_sums(filters, "l2")
    torch.testing.assert_close(sums, torch.full((6,), 3 * float((filters[0] - filters[1]).norm())).double())


# Counts and the mix


@pytest.mark.parametrize(("size", "removed", "expected"), [
    (16, 0.4, 10), (32, 0.4, 20), (64, 0.4, 39), (16, 0.3, 12), (100, 0.29, 71), (10, 0.3, 7), (3, 0.3, 3),
    (64, 0.99, 1),
])  # fmt: skip
def test_what_goes_is_rounded_down(size: int, removed: float, expected: int) -> None:
    assert keeping(round(1 - removed, 6)).count(size) == expected


# 10 % by norm and 30 % by distance, each rounded down.
@pytest.mark.parametrize(("size", "expected"), [(16, 11), (32, 20), (64, 39), (10, 6)])
def test_both_parts_of_the_mix_are_rounded_down(size: int, expected: int) -> None:
    assert keeping(0.6, by_norm=0.1).count(size) == expected


def test_the_mix_measures_distances_among_what_the_norm_leaves() -> None:
    # Three go by norm. Of 1, 2 and 4 the middle one is nearest to the others; among all six it is 1.
    assert kept(LINE, 0.3, by_norm=0.5) == [3, 5]
    sums = distance_sums(LINE, "l2")
    assert sums[3] < sums[4] < sums[5]


def test_without_a_part_the_mix_is_one_rule() -> None:
    filters = random_filters(12, 3) + 2
    by_norm = filters.norm(dim=1).argsort(descending=True)[:6].sort().values.tolist()
    assert kept(filters, 0.5, by_norm=0.5) == by_norm != kept(filters, 0.5)


def test_the_mix_goes_with_other_budgets() -> None:
    model = NARROW["resnet20-A"]()
    method = make("fpgm", macs_ratio=0.5, by_norm=0.2)
    first, all_by_distance = chosen(method, phase(model, 32)), chosen(make("fpgm", macs_ratio=0.5), phase(model, 32))
    assert {name: len(lane) for name, lane in first.items()} == {n: len(lane) for n, lane in all_by_distance.items()}
    assert first != all_by_distance


def test_the_norm_cannot_remove_more_than_goes() -> None:
    with pytest.raises(UserError, match=r"method\.by_norm=0\.5 removes more than method\.channels_ratio=0\.6 allows; "
                                          r"allowed: up to 0\.4$"):
        keeping(0.6, by_norm=0.5)
    keeping(0.6, by_norm=0.4)


def test_tied_channels_are_worth_the_mean_over_their_filters() -> None:
    model = NARROW["resnet20-A"]()
    channels = channel_map(model, 32)
    scores = per_class(model, channels, lambda filters: distance_sums(filters, "l2"))
    writers = channels.lanes[0].producers[:4]
    assert len(channels.lanes[0].producers) == 10
    by_hand = [distance_sums(model.get_submodule(path).weight.detach().flatten(1), "l2") for path in writers]
    some = per_class(model, channels, lambda filters: torch.zeros(len(filters)) + filters.shape[1])
    assert float(some[channels.lanes[0].classes[0]]) == pytest.approx((27 + 3 * 72 + 3 * 144 + 3 * 288) / 10)
    assert scores[channels.lanes[1].classes].tolist() == pytest.approx(
        distance_sums(model.layer1[0].conv1.weight.detach().flatten(1), "l2").tolist()
    )
    assert len(by_hand[0]) == 8


def test_filters_that_are_left_out_count_for_nobody() -> None:
    model = one_layer(LINE)
    channels = channel_map(model, 2)
    among = torch.tensor([False] * 3 + [True] * 3)
    worth = per_class(model, channels, lambda filters: distance_sums(filters, "l2"), among=among)
    torch.testing.assert_close(worth, torch.tensor([0, 0, 0, 4.0, 3.0, 5.0], dtype=torch.float64))


# Choices during the fine-tuning


def start(filters: Tensor, **options):
    """Return a method that chooses during the fine-tuning, its phase of 4 epochs, and the first layer's filters."""
    method = keeping(0.75, **({"reselect_every": 1} | options))
    context = phase(one_layer(filters), 2, "finetune")
    method.setup(context)
    return method, context, context.model[0].weight.data[:, :2, 0, 0]


def test_what_goes_is_zeroed_with_its_readers_and_may_come_back() -> None:
    method, context, filters = start(CORNERS)
    assert filters.tolist() == [[0, 0], [1, 0], [0, 0], [3, 4]]
    assert context.masks is None
    columns = context.model[1].weight.data
    assert not columns[:, 2].any() and columns[:, [0, 1, 3]].all()
    filters[2] = torch.tensor([-5.0, 5.0])  # training moves it away from the others
    columns[:, 2] = 1
    assert method.end_epoch(context, 0) == {"prune/changed": 1}
    assert filters[2].tolist() == [-5, 5] and bool(columns[:, 2].all()) and filters.any(1).tolist() != [True] * 4


def test_channels_are_chosen_after_every_few_epochs_and_at_the_end() -> None:
    method, context, filters = start(CORNERS, reselect_every=3)
    found = []
    for epoch in range(4):
        filters[:] = CORNERS + 1
        found.append(bool(method.end_epoch(context, epoch)))
        assert (filters == 0).all(1).any() == found[-1]
    assert found == [False, False, True, True]


def test_the_last_choice_is_what_is_removed() -> None:
    method, context, _ = start(CORNERS)
    later = keeping(0.75, reselect_every=1)
    later.load_state_dict(method.state_dict())
    context.phase = "prune"
    later.setup(context)
    with torch.no_grad():
        context.model[0].weight.copy_(torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(0)))
    later.prune(context)
    assert (~context.masks.masks["0.weight"]).all(1).flatten().nonzero().flatten().tolist() == [2]


def test_without_reselection_the_fine_tuning_is_left_alone() -> None:
    method, context, filters = start(CORNERS, reselect_every=0)
    assert torch.equal(filters, CORNERS) and method.end_epoch(context, 0) == {} and method.state_dict() == {}


@pytest.mark.parametrize("options", [(), ("method.by_norm=0.1",), ("method.reselect_every=2",)])
def test_runs(tmp_path: Path, options: tuple[str, ...]) -> None:
    folder = finish(configure(tmp_path, "fpgm", "method.macs_ratio=null", "method.channels_ratio=0.6", *options))
    written = summary(folder)
    reselects = options == ("method.reselect_every=2",)
    names = [entry["name"] for entry in written["phases"]]
    last = names.index("finetune") == 3
    assert names == (["train", "prune", "remove", "finetune"] if last else ["train", "finetune", "prune", "remove"])
    assert last != reselects
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tuned = [row for row in rows if row["phase"] == "finetune"]
    assert [("prune/changed" in row) for row in tuned] == ([False, True] if reselects else [False, False])
    if reselects:  # what the last epoch measured is the network without the channels
        assert tuned[-1]["eval/loss"] == pytest.approx(written["final/loss"], rel=1e-5)
        assert written["macs/train_ratio"] == pytest.approx(5 / 3)  # 3 epochs and 2 of the whole network


def test_a_control_of_the_choice_during_fine_tuning_trains_new_weights_last(tmp_path: Path) -> None:
    options = ("method.reselect_every=1", "method.control=scratch")
    names = [entry["name"] for entry in summary(finish(configure(tmp_path, "fpgm", *options)))["phases"]]
    assert names == ["train", "finetune", "prune", "remove", "reinitialise", "scratch"]
