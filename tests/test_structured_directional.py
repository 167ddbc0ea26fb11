"""Structured directional pruning: group gRDA by hand and by its invariants, the runs, what they refuse."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import configure, finish
from torch import nn

from prune_lab.grda import thresholds
from prune_lab.group_grda import GroupGRDA, RowGroups, group_sizes, shrink_factors

NAME = "structured_directional"


def parameter(*rows: Any) -> nn.Parameter:
    return nn.Parameter(torch.tensor(rows, dtype=torch.float64))


def optimizer_of(*weights: nn.Parameter, c: float, lr: float = 0.1, mu: float = 0.51) -> GroupGRDA:
    """Return group gRDA with a group for each row of the first weight; the others have none."""
    groups = torch.arange(len(weights[0]))
    return GroupGRDA(weights, lr, c=c, mu=mu, rows={weights[0]: groups}, scales=torch.ones(len(groups)))


# Worked examples


def test_group_threshold_by_hand() -> None:
    """Threshold 1: (3, 4) -> (2.4, 3.2), (0.3, 0.4) -> 0, 0 -> 0."""
    groups = parameter((3, 4), (0.3, 0.4), (0, 0))
    norms = groups.detach().norm(dim=1)
    shrunk = shrink_factors(norms, torch.ones(3)).unsqueeze(1) * groups.detach()
    assert shrunk.flatten().tolist() == pytest.approx([2.4, 3.2, 0, 0, 0, 0])


def test_a_norm_that_equals_the_threshold_gives_zero() -> None:
    assert shrink_factors(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])).tolist() == [0, 0]


def test_group_of_one_value_is_grda() -> None:
    weight = parameter((0.02,))
    optimizer = optimizer_of(weight, c=0.05)
    expected = [(0.1, 0.010, 0.004886, 0.005114), (-0.05, 0.015, 0.006958, 0.008042), (0.02, 0.013, 0.008557, 0.004443)]
    for gradient, iterate, threshold, value in expected:
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        assert float(optimizer.state[weight]["a"]) == pytest.approx(iterate)
        assert optimizer.threshold == pytest.approx(threshold, abs=6e-7)
        assert weight.item() == pytest.approx(value, abs=6e-7)


# Groups


def test_sums_over_rows_of_several_tensors() -> None:
    groups = RowGroups([torch.tensor([0, 2, -1]), torch.tensor([2, 2])], 4)
    sums = groups.sums([torch.tensor([1.0, 2.0, 4.0]), torch.tensor([8.0, 16.0])])
    assert sums.tolist() == [1, 0, 26, 0]
    first, second = groups.spread(torch.tensor([0.1, 0.2, 0.3, 0.4]), outside=7.0)
    assert first.tolist() == pytest.approx([0.1, 0.3, 7]) and second.tolist() == pytest.approx([0.3, 0.3])


def test_norm_of_a_filter_with_its_batch_norm_scale() -> None:
    """|(1, 2, 2, 4)| = 5 of the class that a 1x1 filter (1, 2, 2) and a scale of 4 make."""
    filters, scales = torch.tensor([[1.0, 2, 2], [0, 0, 0]]).view(2, 3, 1, 1), torch.tensor([4.0, 1.0])
    groups = RowGroups([torch.tensor([0, 1]), torch.tensor([0, 1])], 2)
    assert groups.norms([filters, scales]).tolist() == [5, 1]
    rows = {nn.Parameter(filters): torch.tensor([0, 1]), nn.Parameter(scales): torch.tensor([0, -1])}
    assert group_sizes(rows, 2).tolist() == [4, 3]


# Invariants


def network() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3))
    return model, torch.randn(20, 6), torch.randint(3, (20,))


def grouped(model: nn.Module, *, c: float, lr: float = 0.3, mu: float = 0.7, scales: float = 1.0) -> GroupGRDA:
    """Return group gRDA: a group is a row of the first layer with its scale."""
    rows = {model[0].weight: torch.arange(8), model[2].weight: torch.arange(8)}
    return GroupGRDA(model.parameters(), lr, c=c, mu=mu, rows=rows, scales=torch.full((8,), scales))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, inputs, labels, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_without_threshold_it_is_sgd_bit_for_bit() -> None:
    model, inputs, labels = network()
    other = copy.deepcopy(model)
    train(model, grouped(model, c=0), inputs, labels, 50)
    train(other, torch.optim.SGD(other.parameters(), lr=0.3), inputs, labels, 50)
    assert same(model, other)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_groups_are_the_shrunk_iterate_after_every_step(scale: float) -> None:
    model, inputs, labels = network()
    optimizer, zeros, before = grouped(model, c=0.8, scales=scale), 0, 0.0
    for _ in range(25):
        train(model, optimizer, inputs, labels, 1)
        assert optimizer.threshold > before
        before = optimizer.threshold
        a = torch.cat([optimizer.state[p]["a"].view(8, -1) for p in (model[0].weight, model[2].weight)], 1)
        w = torch.cat([p.detach().view(8, -1) for p in (model[0].weight, model[2].weight)], 1)
        expected = (a.norm(dim=1) - before * scale).clamp(min=0)
        assert torch.allclose(w.norm(dim=1), expected, atol=1e-6)
        alive = expected > 1e-5
        assert torch.allclose(nn.functional.cosine_similarity(w[alive], a[alive]), torch.ones(int(alive.sum())))
        assert not w[expected == 0].any()
        zeros = max(zeros, int((expected == 0).sum()))
    assert 0 < zeros
    assert "a" not in optimizer.state[model[3].weight] and bool(model[3].weight.all())


def test_threshold_grows_whatever_the_data() -> None:
    weight = parameter((1.0,))
    optimizer, rates = optimizer_of(weight, c=0.05, mu=0.6), [0.1, 0.1, 0.01, 0.0, 0.1]
    for rate, expected in zip(rates, thresholds(rates, c=0.05, mu=0.6), strict=True):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        assert optimizer.threshold == expected


def test_a_zero_group_goes_on_collecting_gradients_and_comes_back() -> None:
    weight = parameter((0.3, 0.4), (3.0, 4.0))
    optimizer = optimizer_of(weight, c=10.0, lr=0.1)
    seen = []
    for _ in range(20):
        weight.grad = torch.tensor([[-1.5, -2.0], [0.0, 0.0]], dtype=torch.float64)
        optimizer.step()
        seen.append(bool(weight[0].any()))
    assert not seen[0] and seen[-1]
    back = torch.tensor([1.5, 2.0], dtype=torch.float64) * 2 + torch.tensor([0.3, 0.4], dtype=torch.float64)
    assert torch.allclose(optimizer.state[weight]["a"][0], back)


def test_rows_in_no_group_are_trained_by_sgd() -> None:
    weight, plain = parameter((1.0, 1.0), (1.0, 1.0)), parameter(1.0)
    optimizer = GroupGRDA([weight, plain], 0.1, c=100.0, mu=0.6, rows={weight: torch.tensor([-1, 0])},
                          scales=torch.ones(1))  # fmt: skip
    weight.grad, plain.grad = torch.ones_like(weight), torch.ones_like(plain)
    optimizer.step()
    assert weight.tolist() == [[0.9, 0.9], [0, 0]] and plain.tolist() == [0.9]


def test_nan_stays_visible() -> None:
    weight = parameter((0.1, 0.1), (0.1, 0.1))
    optimizer = optimizer_of(weight, c=100.0)
    weight.grad = torch.tensor([[math.nan, 0], [0, 0]], dtype=torch.float64)
    optimizer.step()
    assert math.isnan(float(weight[0, 0])) and not weight[1].any()


def test_weights_keep_their_storage_and_memory_format() -> None:
    layer = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    rows = {layer.weight: torch.arange(4)}
    optimizer = GroupGRDA(layer.parameters(), 0.1, c=0.5, mu=0.6, rows=rows, scales=torch.ones(4))
    place = layer.weight.data_ptr()
    layer(torch.ones(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    assert layer.weight.data_ptr() == place and layer.weight.is_contiguous(memory_format=torch.channels_last)


# State


def test_saved_in_the_middle_it_goes_on_alike() -> None:
    model, inputs, labels = network()
    optimizer = grouped(model, c=0.2)
    train(model, optimizer, inputs, labels, 7)
    other, saved = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    again = grouped(other, c=0.9, lr=0.1)  # c, mu and lr are in the state, too
    again.load_state_dict(saved)
    train(model, optimizer, inputs, labels, 5)
    train(other, again, inputs, labels, 5)
    assert same(model, other) and again.threshold == optimizer.threshold > 0


@pytest.mark.parametrize("lost", ["a", "n", "T", "all"])
def test_state_that_lacks_something_is_refused(lost: str) -> None:
    model, inputs, labels = network()
    optimizer = grouped(model, c=0.2)
    train(model, optimizer, inputs, labels, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    if lost == "all":
        saved = torch.optim.SGD(model.parameters(), lr=0.1).state_dict()
    elif lost == "a":
        del saved["state"][2]["a"]
    else:
        del saved["param_groups"][0][lost]
    fresh = grouped(model, c=0.2)
    with pytest.raises(ValueError, match=f"without its state {'T, a, n' if lost == 'all' else lost}$"):
        fresh.load_state_dict(saved)
    assert fresh.threshold == 0


@pytest.mark.parametrize("wrong", [{"lr": -1}, {"c": -0.1}, {"c": math.nan}, {"mu": 0}, {"mu": 1.1}], ids=str)
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="lr and c must be at least 0 and mu in"):
        optimizer_of(parameter((1.0,)), **({"c": 0.1} | wrong))


