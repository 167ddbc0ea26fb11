"""The gRDA optimizer against worked examples, its invariants, and plain SGD."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from prune_lab.optim.grda import GRDA
from prune_lab.optim.grda_threshold import increment, steps_to_reach, thresholds


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def take(optimizer: GRDA, weight: nn.Parameter, gradient: Sequence[float], lr: float) -> tuple[float, list[float]]:
    """Do one step with a given gradient; return threshold and weight."""
    weight.grad = torch.tensor(gradient, dtype=weight.dtype)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    return optimizer.state[weight]["T"], weight.tolist()


def near(*values: float):
    return pytest.approx(values, abs=6e-7)


# Worked examples


def test_first_steps_with_a_constant_gradient() -> None:
    weight = parameter(0.5, -0.2, 0.01)
    optimizer = GRDA([weight], lr=0.1, c=0.005, mu=0.51)
    expected = [
        (0.0004886, (0.4, 0.0, -0.04), (0.3995114, 0.0, -0.0395114)),
        (0.0006958, (0.3, 0.2, -0.09), (0.2993042, 0.1993042, -0.0893042)),
        (0.0008557, (0.2, 0.4, -0.14), (0.1991443, 0.3991443, -0.1391443)),
    ]
    for threshold, iterate, shrunk in expected:
        reached, values = take(optimizer, weight, (1, -2, 0.5), 0.1)
        assert reached == pytest.approx(threshold, abs=6e-8)
        assert optimizer.state[weight]["v"].tolist() == near(*iterate)
        assert values == near(*shrunk)


GRADIENTS = [(0, 0, 1), (0, 0, -1), (0.1, 0, 0), (0, 0, 0)]


@pytest.mark.parametrize(
    ("rates", "reached", "weights"),
    [
        (
            (1, 1, 1, 1),
            (0.1, 0.141421, 0.173205, 0.2),
            [(0.15, 0, -0.4), (0.108579, 0, 0.358579), (0, 0, 0.326795), (0, 0, 0.3)],
        ),
        (
            (1, 1, 0.25, 0.25),
            (0.1, 0.141421, 0.149367, 0.156066),
            [(0.15, 0, -0.4), (0.108579, 0, 0.358579), (0.075633, 0, 0.350633), (0.068934, 0, 0.343934)],
        ),
    ],
    ids=["constant", "falling"],
)
def test_threshold_grows_with_the_learning_rate_in_force(rates, reached, weights) -> None:
    weight = parameter(0.25, -0.05, 0.5)
    optimizer = GRDA([weight], lr=1, c=0.1, mu=0.5)
    for gradient, rate, threshold, values in zip(GRADIENTS, rates, reached, weights, strict=True):
        found, shrunk = take(optimizer, weight, gradient, rate)
        assert (found, *shrunk) == near(threshold, *values)


def cifar_rate(epoch: int, epochs: int) -> float:
    """The published learning rate: constant to half, linear to a hundredth at 0.9, then constant."""
    done = epoch / epochs
    return 0.1 * (1 if done <= 0.5 else 0.01 if done > 0.9 else 1 - (done - 0.5) / 0.4 * 0.99)


@pytest.mark.parametrize(
    ("epochs", "c", "mu", "last"),
    [
        (200, 0.001, 0.501, 0.02352),
        (200, 0.001, 0.55, 0.03572),
        (200, 0.001, 0.6, 0.05470),
        (200, 0.001, 0.65, 0.08371),
        (600, 0.0005, 0.51, 0.02227),
    ],
)
def test_thresholds_at_the_end_of_the_published_cifar_trainings(epochs, c, mu, last) -> None:
    rates = (cifar_rate(epoch, epochs) for epoch in range(1, epochs + 1) for _ in range(391))
    *_, found = thresholds(rates, c=c, mu=mu)
    assert found == pytest.approx(last, abs=5.1e-6)


@pytest.mark.parametrize(
    ("c", "mu", "steps"), [(0.001, 0.501, 39_343), (0.0005, 0.51, 132_339), (0.005, 0.501, 1_584)]
)
def test_steps_until_a_weight_without_gradient_is_zero(c: float, mu: float, steps: int) -> None:
    found = steps_to_reach(0.02, 0.1, c=c, mu=mu)
    assert found - steps in (0, 1)  # the expected numbers are rounded, the step is the first one at which it is zero
    *_, before, there = thresholds([0.1] * found, c=c, mu=mu)
    assert before < 0.02 <= there + 1e-12


def test_without_a_threshold_no_weight_ever_gets_there() -> None:
    assert steps_to_reach(0.02, 0.1, c=0, mu=0.5) == math.inf


@pytest.mark.parametrize(
    ("mu", "reached", "flat", "bias"),
    [pytest.param(0.51, 0.1733684, 0.1266316, 8.842e-6, marks=pytest.mark.slow), (0.7, 0.9976, 0.0, 6.98e-5)],
)
def test_flat_direction_goes_to_zero_and_sharp_one_stays(mu: float, reached: float, flat: float, bias: float) -> None:
    """f = (w1 - 1)^2 / 2, w2 absent: the curvature gives w1 back what the threshold takes, w2 gets nothing back."""
    weight = parameter(0.3, 0.3)
    weight.grad = torch.zeros_like(weight)
    optimizer = GRDA([weight], lr=0.1, c=0.005, mu=mu)
    sharp, slope = weight.detach()[0], weight.grad[0]
    for _ in range(100_000):
        torch.sub(sharp, 1, out=slope)
        optimizer.step()
    assert optimizer.threshold == pytest.approx(reached, rel=1e-4)
    ended = weight.detach().tolist()
    assert ended[1] == pytest.approx(flat, abs=1e-6)
    assert 1 - ended[0] == pytest.approx(bias, rel=1e-3)
    # The bias is what the curvature has to balance: dT/dt at t = 100000 * 0.1.
    assert bias == pytest.approx(0.005 * math.sqrt(0.1) * mu * 10_000 ** (mu - 1), rel=1e-3)


# Invariants


def network() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3))
    return model, torch.randn(20, 6), torch.randint(3, (20,))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, inputs, labels, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def test_without_threshold_it_is_sgd_bit_for_bit() -> None:
    model, inputs, labels = network()
    other = copy.deepcopy(model)
    train(model, GRDA(model.parameters(), lr=0.3, c=0, mu=0.7), inputs, labels, 50)
    train(other, torch.optim.SGD(other.parameters(), lr=0.3), inputs, labels, 50)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


def test_weights_are_the_shrunk_iterate_after_every_step() -> None:
    model, inputs, labels = network()
    optimizer = GRDA(model.parameters(), lr=0.3, c=0.05, mu=0.6)
    zeros = 0
    for _ in range(20):
        train(model, optimizer, inputs, labels, 1)
        for weight in model.parameters():
            state, values = optimizer.state[weight], weight.detach()
            expected = state["v"].sign() * (state["v"].abs() - state["T"]).clamp(min=0)
            assert torch.allclose(values, expected, atol=1e-7)
            assert (values.abs() <= state["v"].abs()).all()
            assert torch.equal(values.sign()[values != 0], state["v"].sign()[values != 0])
            assert not values[state["v"].abs() < state["T"]].any()
            zeros += int((values == 0).sum())
    assert zeros > 0


def test_weights_without_gradient_shrink_by_the_threshold_alone() -> None:
    weight = nn.Parameter(torch.linspace(-0.2, 0.2, 41, dtype=torch.float64))
    start, zeros = weight.detach().clone(), 0
    optimizer = GRDA([weight], lr=0.1, c=0.05, mu=0.51)
    for _ in range(30):
        reached, values = take(optimizer, weight, [0.0] * 41, 0.1)
        assert torch.allclose(weight.abs(), (start.abs() - reached).clamp(min=0), atol=1e-15)
        assert zeros <= values.count(0.0)
        zeros = values.count(0.0)
    assert 1 < zeros < 41


def test_constant_learning_rate_gives_the_closed_form() -> None:
    found = list(thresholds([0.1] * 1000, c=0.005, mu=0.51))
    assert found == pytest.approx([0.005 * 0.1**1.01 * n**0.51 for n in range(1, 1001)], rel=1e-12)


def test_threshold_never_drops() -> None:
    rates = [0.1] * 100 + [0.01] * 100 + [1e-5] * 10 + [0.1] * 10
    found = list(thresholds(rates, c=0.005, mu=0.51))
    assert all(before < after for before, after in zip(found, found[1:], strict=False))
    assert increment(7, 0.0, c=0.005, mu=0.51) == 0


def test_a_group_without_threshold_is_trained_by_sgd() -> None:
    weight, bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.tensor([0.3, -0.001]))
    optimizer = GRDA([{"params": [weight]}, {"params": [bias], "c": 0.0}], lr=0.5, c=0.1, mu=0.6)
    start = bias.detach().clone()
    for _ in range(3):
        weight.grad, bias.grad = torch.ones_like(weight), torch.full_like(bias, 0.01)
        optimizer.step()
    assert torch.equal(bias, start - 0.005 - 0.005 - 0.005)
    assert optimizer.state[bias]["T"] == 0 < optimizer.state[weight]["T"] == optimizer.threshold


def test_a_tensor_counts_only_the_steps_in_which_it_has_a_gradient() -> None:
    often, seldom = parameter(1.0), parameter(1.0)
    optimizer = GRDA([often, seldom], lr=0.1, c=0.1, mu=0.6)
    for step in range(5):
        often.grad = torch.ones_like(often)
        seldom.grad = torch.ones_like(seldom) if step % 2 else None
        optimizer.step()
    assert (optimizer.state[often]["n"], optimizer.state[seldom]["n"]) == (5, 2)
    *_, second, _, _, last = thresholds([0.1] * 5, c=0.1, mu=0.6)
    assert (optimizer.state[often]["T"], optimizer.state[seldom]["T"]) == (last, second)


def test_an_overflowed_step_counts_for_nothing() -> None:
    weight = nn.Parameter(torch.tensor([0.5, -0.2]))
    optimizer, scaler = GRDA([weight], lr=0.1, c=0.1, mu=0.6), torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(optimizer.state[weight])
    for bad, steps in ((math.inf, 0), (1.0, 1)):
        optimizer.zero_grad()
        scaler.scale((weight * bad).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.state[weight]["n"] == steps
        assert (optimizer.state[weight]["T"] == before["T"]) == (steps == 0)
        assert torch.equal(optimizer.state[weight]["v"], before["v"]) == (steps == 0)


def test_nan_stays_visible() -> None:
    weight = parameter(0.5, 0.5)
    _, values = take(GRDA([weight], lr=0.1, c=0.1, mu=0.6), weight, (math.nan, 0), 0.1)
    assert math.isnan(values[0]) and not math.isnan(values[1])


def test_weights_keep_their_storage_and_memory_format() -> None:
    layer = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer, place = GRDA(layer.parameters(), lr=0.1, c=0.5, mu=0.6), layer.weight.data_ptr()
    layer(torch.ones(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    assert layer.weight.data_ptr() == place and layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert optimizer.state[layer.weight]["v"].stride() == layer.weight.stride()


# State


def test_saved_in_the_middle_it_goes_on_alike() -> None:
    model, inputs, labels = network()
    optimizer = GRDA(model.parameters(), lr=0.3, c=0.02, mu=0.6)
    train(model, optimizer, inputs, labels, 7)
    other, saved = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    again = GRDA(other.parameters(), lr=0.1, c=0.5, mu=0.9)  # c, mu and lr are in the state, too
    again.load_state_dict(saved)
    train(model, optimizer, inputs, labels, 5)
    train(other, again, inputs, labels, 5)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))
    assert again.threshold == optimizer.threshold
    assert {(type(state["n"]), state["n"]) for state in again.state.values()} == {(int, 12)}


@pytest.mark.parametrize("lost", ["v", "n", "T", "all"])
def test_state_that_lacks_something_is_refused(lost: str) -> None:
    model, inputs, labels = network()
    optimizer = GRDA(model.parameters(), lr=0.3, c=0.02, mu=0.6)
    train(model, optimizer, inputs, labels, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    if lost == "all":
        saved["state"] = {}
    else:
        del saved["state"][1][lost]
    fresh = GRDA(model.parameters(), lr=0.3, c=0.02, mu=0.6)
    with pytest.raises(ValueError, match=f"without the state {'T, n, v' if lost == 'all' else lost} of"):
        fresh.load_state_dict(saved)
    assert fresh.threshold == 0


@pytest.mark.parametrize(
    "wrong",
    [{"lr": -1}, {"c": -0.1}, {"c": math.nan}, {"mu": 0}, {"mu": -0.5}, {"mu": 1.1}, {"mu": math.nan}],
    ids=str,
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    good = {"lr": 0.1, "c": 0.1, "mu": 0.5}
    with pytest.raises(ValueError, match="lr and c must be at least 0 and mu in"):
        GRDA([parameter(1.0)], **good | wrong)
    with pytest.raises(ValueError, match="lr and c must be at least 0 and mu in"):
        GRDA([{"params": [parameter(1.0)], **wrong}], **good)
