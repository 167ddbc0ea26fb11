"""Hard-concrete gates: published formulas by worked numbers, by sampling and by differentiation."""

from __future__ import annotations

import math

import pytest
import torch

from prune_lab.pruning.gates import hard_concrete as hc
from prune_lab.pruning.gates.hard_concrete import Term

# a, P(z > 0), P(z = 1), E[z], gate by Louizos, gate by the median
TABLE = [
    (-3.0, 0.19759, 0.00997, 0.0604, 0.0, 0.0),
    (-1.0, 0.64534, 0.06923, 0.2928, 0.22273, 0.11891),
    (0.0, 0.83182, 0.16818, 0.5, 0.5, 0.5),
    (0.8473, 0.92026, 0.32054, 0.6781, 0.74, 0.83709),
    (2.0, 0.97337, 0.59902, 0.8574, 0.95696, 1.0),
    (3.0, 0.99003, 0.80241, 0.9396, 1.0, 1.0),
]


def double(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def evenly_drawn(a: float, count: int = 200_000) -> torch.Tensor:
    """Return gates at the quantiles of the uniform draw."""
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return hc.sample(torch.full_like(uniform, a), uniform.logit())


@pytest.mark.parametrize(("a", "opened", "full", "mean", "louizos", "median"), TABLE)
def test_published_table(a: float, opened: float, full: float, mean: float, louizos: float, median: float) -> None:
    assert hc.open_probability(double(a)).item() == pytest.approx(opened, abs=6e-6)
    assert 1 - hc.open_probability(double(-a)).item() == pytest.approx(full, abs=6e-6)
    assert hc.fixed_gate(double(a), "louizos").item() == pytest.approx(louizos, abs=6e-6)
    assert hc.fixed_gate(double(a), "median").item() == pytest.approx(median, abs=6e-6)
    drawn = evenly_drawn(a)
    assert drawn.mean().item() == pytest.approx(mean, abs=2e-4)  # found by sampling
    assert (drawn > 0).double().mean().item() == pytest.approx(opened, abs=2e-5)
    assert (drawn == 1).double().mean().item() == pytest.approx(full, abs=2e-5)


@pytest.mark.parametrize("a", [-3.0, 0.0, 0.8473, 2.0])
def test_draws_have_the_probabilities_to_three_decimals(a: float) -> None:
    source = torch.Generator().manual_seed(0)
    drawn = hc.sample(torch.full((4_000_000,), a), hc.noise(4_000_000, source))
    assert drawn.dtype == torch.float32
    assert (drawn > 0).double().mean().item() == pytest.approx(hc.open_probability(double(a)).item(), abs=5e-4)
    assert (drawn == 1).double().mean().item() == pytest.approx(1 - hc.open_probability(double(-a)).item(), abs=5e-4)


def test_draws_by_hand() -> None:
    uniform = torch.tensor([0.5, 0.01, 0.99], dtype=torch.float64)
    assert hc.sample(torch.zeros(3, dtype=torch.float64), uniform.logit()).tolist() == pytest.approx([0.5, 0.0, 1.0])
    assert uniform.logit()[1].item() / hc.BETA == pytest.approx(-6.8927, abs=1e-4)


def test_the_same_generator_draws_the_same() -> None:
    one, same, other = (hc.noise(1000, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert bool(torch.isfinite(hc.noise(3_000_000, torch.Generator().manual_seed(1))).all())


def test_offset_and_where_fixed_gates_change() -> None:
    assert pytest.approx(-1.598597, abs=1e-6) == hc.OFFSET
    for rule, edge, shut, full in (("louizos", 2.397895, 0.3102, 0.9820), ("median", 1.598597, 0.5, 0.9607)):
        gates = hc.fixed_gate(torch.tensor([-edge - 1e-5, -edge + 1e-5, edge - 1e-5, edge + 1e-5]).double(), rule)
        assert [g == 0 for g in gates] == [True, False, False, False]
        assert [g == 1 for g in gates] == [False, False, False, True]
        probabilities = hc.open_probability(torch.tensor([-edge, edge]).double()).tolist()
        assert probabilities == pytest.approx([shut, full], abs=6e-5)


@pytest.mark.parametrize(("rate", "opened"), [(0.5, 0.8318), (0.3, 0.9203), (0.1, 0.9780), (0.05, 0.9895)])
def test_start_by_drop_rate(rate: float, opened: float) -> None:
    assert hc.open_probability(double(hc.start(rate))).item() == pytest.approx(opened, abs=6e-5)


def test_clamped_gates_have_a_least_probability() -> None:
    assert pytest.approx(4.60517, abs=1e-5) == hc.LIMIT
    both = hc.open_probability(torch.tensor([-hc.LIMIT, hc.LIMIT]).double()).tolist()
    assert both == pytest.approx([0.04713, 0.99798], abs=6e-6)


def test_slope_is_the_derivative_of_the_draw() -> None:
    a = torch.linspace(-4, 4, 201, dtype=torch.float64, requires_grad=True)
    logistic = hc.noise(201, torch.Generator().manual_seed(5)).double()
    stretched = torch.sigmoid((logistic + a) / hc.BETA) * (hc.ZETA - hc.GAMMA) + hc.GAMMA
    stretched.clamp(0, 1).sum().backward()
    drawn = hc.sample(a.detach(), logistic)
    torch.testing.assert_close(drawn, stretched.detach().clamp(0, 1))
    torch.testing.assert_close(hc.slope(drawn), a.grad)
    assert 0 < (a.grad == 0).sum() < 201  # draws of both kinds


def test_expected_number_of_open_gates_has_a_positive_derivative() -> None:
    a = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    opened = hc.open_probability(a)
    (gradient,) = torch.autograd.grad(opened.sum(), a)
    torch.testing.assert_close(gradient, (opened * (1 - opened)).detach())
    assert bool((gradient > 0).all())


def test_expected_weights_of_two_convolutions_in_a_row() -> None:
    """Widths 2 and 3, 3x3 kernels, all a = 0: 44.918 + 37.364 = 82.283 of 108 weights."""
    opened = hc.open_probability(torch.zeros(2))
    first = hc.cost_matrix([Term(54, rows=0)], 2)
    both = hc.cost_matrix([Term(54, rows=0), Term(54, rows=1, columns=0)], 2)
    assert hc.expected_cost(opened, first)[0].item() == pytest.approx(44.918, abs=1e-3)
    assert hc.expected_cost(opened, both)[0].item() == pytest.approx(82.283, abs=1e-3)
    assert hc.expected_cost(torch.ones(2), both)[0].item() == 108
    assert [2 * opened[0].item(), 3 * opened[0].item()] == pytest.approx([1.66364, 2.49547], abs=1e-5)


def test_gradient_of_the_expected_cost() -> None:
    terms = [Term(7), Term(5, rows=0), Term(3, columns=1), Term(2, rows=1, columns=0), Term(4, rows=2, columns=1)]
    x = torch.tensor([0.2, 0.5, 0.9], requires_grad=True)
    value = 7 + 5 * x[0] + 3 * x[1] + 2 * x[1] * x[0] + 4 * x[2] * x[1]
    value.backward()
    found, gradient = hc.expected_cost(x.detach(), hc.cost_matrix(terms, 3))
    assert found.item() == pytest.approx(value.item())
    torch.testing.assert_close(gradient, x.grad)


def test_drop_rate_is_the_chance_of_the_lower_half() -> None:
    """Before stretching, s < 1/2 exactly where the logistic draw lies below -a."""
    for rate in (0.05, 0.3, 0.5, 0.9):
        assert 1 / (1 + math.exp(hc.start(rate))) == pytest.approx(rate)
