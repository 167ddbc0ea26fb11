"""GDP: gates, proximal step and bilinear cost by hand, folding against gated activations, targets in runs, refusals."""

from __future__ import annotations

import copy
import functools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_lab import models
from prune_lab.accounting.costs import count_parameters, dense_macs, profile
from prune_lab.cli import command as cli
from prune_lab.compose.overrides import compose_checked
from prune_lab.config.schedule import PhaseSchedule
from prune_lab.core.context import Context
from prune_lab.foundations.errors import UserError
from prune_lab.methods.gdp import GDP, dual_rate, gate_rate
from prune_lab.pipeline import runner
from prune_lab.pipeline.saved_model import load_model
from prune_lab.pruning.channels import surgery
from prune_lab.pruning.channels.costs import ChannelCosts
from prune_lab.pruning.channels.groups import ChannelMap, channel_map
from prune_lab.pruning.gates import polarized as pg
from tests.helpers.contexts import context_of
from tests.helpers.method_runs import CONF, configure, finish, make, run_folder, summary

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(7))
LABELS = torch.arange(16) % 5


class Forked(nn.Module):
    """A tensor that a depthwise and a regular convolution read, an addition, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.left = nn.Conv2d(6, 4, 3, padding=1)
        self.right = nn.Conv2d(6, 4, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (self.left(x) + self.right(self.depthwise(x))).relu()
        return self.fc(x.mean([2, 3]))


def forked(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = Forked()
    nn.init.uniform_(model.norm.bias, 0.2, 1.0)  # so that a channel that is read although it should not be shows
    return model.train()


def set_up(model: nn.Module, *, weight_decay: float = 0.0, **options: Any) -> tuple[GDP, Context]:
    context = context_of(model, {}, image_size=8)
    context.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=weight_decay)
    context.schedule = PhaseSchedule(10, 0.1, "constant", [], 0.1, 0.0, 0.0)
    context.dataset = SimpleNamespace(info=SimpleNamespace(image_size=8, num_train=1000))
    method = make("gdp", **options)
    method.setup(context)
    return method, context


def spread(method: GDP, context: Context, seed: int = 3) -> None:
    """Give the gates values between 0 and 1, some of them 0, and the model the weights times them."""
    t = torch.rand(len(method.t), generator=torch.Generator().manual_seed(seed)) * 2 - 0.5
    method.t = torch.where(t.abs() < 0.2, 0.0, t)
    method.write(context, method.gates(0))


def do_step(method: GDP, context: Context, step: int = 0) -> None:
    """Do what the loop does in a step."""
    context.optimizer.zero_grad()
    F.cross_entropy(context.model(IMAGES), LABELS).backward()
    method.after_backward(context, step)
    context.optimizer.step()
    method.after_step(context, step)


FAMILIES = {
    "resnet20": ("model.width=0.25",), "resnet18": ("model.width=0.0625",), "vgg16": ("model.width=0.0625",),
    "mobilenet_v2": ("model.width=0.25",), "mobilenet_v3_small": ("model.width=0.35",),
}  # fmt: skip


@functools.cache
def family(name: str) -> tuple[nn.Module, ChannelMap, int]:
    """Return a network, its channels and its image size; do not change it."""
    if name == "forked":
        return forked(), channel_map(forked(), 8), 8
    (config,) = compose_checked(CONF, [f"model={name}", *FAMILIES[name], "dataset=fake"], sweep=False)
    torch.manual_seed(0)
    model = models.build(config.model, num_classes=10, image_size=32)
    return model, channel_map(model, 32), 32


# Gates


@pytest.mark.parametrize(
    ("eps", "values", "steepest"),
    [
        (0.1, [0.000999, 0.090909, 0.714286, 0.909091], 2.0540),
        (0.01, [0.009901, 0.5, 0.961538, 0.990099], 6.4952),
        (1e-4, [0.5, 0.990099, 0.9996, 0.9999], 64.952),
    ],
)
def test_gate_and_its_steepest_slope(eps: float, values: list[float], steepest: float) -> None:
    t = torch.tensor([0.01, 0.1, 0.5, 1.0], dtype=torch.float64)
    assert pg.gate(t, eps).tolist() == pytest.approx(values, abs=5e-7)
    assert pg.slope(torch.tensor([(eps / 3) ** 0.5], dtype=torch.float64), eps).item() == pytest.approx(steepest, 1e-4)
    around = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert pg.slope(around, eps).max().item() <= steepest * (1 + 1e-4)


def test_gates_are_even_and_zero_stays_zero() -> None:
    t = torch.tensor([0.0, 0.03, 0.7])
    assert torch.equal(pg.gate(t, 0.01), pg.gate(-t, 0.01))
    assert torch.equal(pg.slope(t, 0.01), -pg.slope(-t, 0.01))
    assert pg.gate(t, 0.01)[0] == 0 and pg.slope(t, 0.01)[0] == 0
    moved = pg.proximal_step(t[:1], 100 * pg.slope(t[:1], 0.01), torch.zeros(1), lr=0.1)
    assert moved.item() == 0


@pytest.mark.parametrize("eps", [0.1, 1e-4, 1e-20])
def test_slope_is_the_derivative_and_stays_finite(eps: float) -> None:
    t = torch.tensor([1e-12, 1e-6, 0.003, -0.02, 0.4, 1.0], dtype=torch.float64, requires_grad=True)
    pg.gate(t, eps).sum().backward()
    torch.testing.assert_close(pg.slope(t.detach(), eps), t.grad, rtol=1e-6, atol=1e-12)
    assert torch.isfinite(pg.slope(t.detach().float(), eps)).all()


@pytest.mark.parametrize(("price", "expected"), [(0.4, 0.02), (0.7, 0.0)])
def test_proximal_step(price: float, expected: float) -> None:
    """t=0.05, rate 0.1, dL/dt=-0.1: u=0.06; thresholds 0.04 and 0.07."""
    t, gradient = torch.tensor([0.05, -0.05]), torch.tensor([-0.1, 0.1])
    moved = pg.proximal_step(t, gradient, torch.tensor([price, price]), lr=0.1)
    assert moved.tolist() == pytest.approx([expected, -expected], abs=1e-7)
    assert expected or (moved == 0).all()


def test_eps_falls_geometrically_until_t_is_fixed() -> None:
    found = [pg.eps_at(step, start=0.1, end=1e-4, num_steps=30) for step in (0, 10, 20, 30, 35)]
    assert found == pytest.approx([0.1, 0.01, 0.001, 1e-4, 1e-4])


def test_the_widest_gate_of_a_lane_stays() -> None:
    lanes = pg.members(torch.tensor([0, 1, 0, 1, 1]), 2)
    before = torch.tensor([0.1, 0.2, -0.3, 0.2, 0.1])
    assert pg.keep_best(torch.zeros(5), before, lanes).tolist() == pytest.approx([0.0, 0.2, -0.3, 0.0, 0.0])
    alive = torch.tensor([0.0, 0.0, 0.01, 0.0, 0.0])
    assert pg.keep_best(alive, before, lanes).tolist() == pytest.approx([0.0, 0.2, 0.01, 0.0, 0.0])


def test_sums_over_groups() -> None:
    groups = pg.members(torch.tensor([2, -1, 0, 2, -1, 2]), 3)
    values = torch.tensor([1.0, 50.0, 2.0, 3.0, 70.0, 5.0])
    assert pg.sums(values, groups).tolist() == [2.0, 0.0, 9.0]


# Columns


def test_gates_multiply_columns_by_hand() -> None:
    """eps=0.01, t=[0, 0.1, 1], inputs 4, weights [1, 2, 3]: 15.881188, and the same with the first channel removed."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 1, 1, bias=False))
    model[0].weight.data.copy_(torch.eye(3).view(3, 3, 1, 1))
    raw = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    channels = channel_map(model, 4)
    columns = pg.ColumnGates(model, channels, torch.ones(3, dtype=torch.bool))
    gates = pg.gate(torch.tensor([0.0, 0.1, 1.0]), 0.01)
    assert columns.parameters == ["1.weight"]
    model[1].weight.data.copy_(raw * columns.factors(gates)[0])
    image = torch.full((1, 3, 4, 4), 4.0)
    assert model(image)[0, 0, 0, 0].item() == pytest.approx(15.881188, abs=1e-5)
    small = surgery.remove_channels(model, channels, gates > 0)
    assert small[1].weight.flatten().tolist() == pytest.approx([1.0, 2.970297], abs=1e-6)
    assert small(image)[0, 0, 0, 0].item() == pytest.approx(15.881188, abs=1e-5)


def gated_forward(model: nn.Module, channels: ChannelMap, gates: Tensor, images: Tensor) -> Tensor:
    """Return the outputs of `model` when each layer that mixes channels gets them times their gates."""
    whole = torch.cat([gates, torch.ones(1)])
    hooks = []
    for path, classes in channels.columns.items():
        layer = model.get_submodule(path)
        factors = whole[classes] if isinstance(layer, nn.Linear) else whole[classes].view(-1, 1, 1)
        hooks.append(layer.register_forward_pre_hook(lambda _, inputs, factors=factors: (inputs[0] * factors,)))
    try:
        return model(images)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("name", ["forked", *FAMILIES])
def test_gated_folded_and_smaller_network_agree(name: str) -> None:
    """With batch norms that are not as they begin, and padding."""
    model, channels, size = family(name)
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5),
                                (module.running_var, 0.5)):
                tensor.uniform_(low, low + 1)
    model.eval()
    t = torch.rand(channels.num_classes) + 0.1
    t[torch.rand(channels.num_classes) < 0.3] = 0
    for lane in channels.lanes:
        t[lane.classes[0]] = 0.5
    gates = pg.gate(t, 0.01)
    images = torch.randn(2, 3, size, size)
    expected = gated_forward(model, channels, gates, images)
    columns = pg.ColumnGates(model, channels, torch.ones(channels.num_classes, dtype=torch.bool))
    for path, factor in zip(columns.parameters, columns.factors(gates), strict=True):
        model.get_parameter(path).mul_(factor)
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    small = surgery.remove_channels(model, channels, gates > 0)
    torch.testing.assert_close(small(images), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, gated_forward(model, channels, gates, images))  # the gates matter


def test_a_depthwise_and_a_regular_reader_share_a_gate() -> None:
    method, context = set_up(forked())
    assert method.columns.parameters == ["left.weight", "right.weight", "fc.weight"]
    assert method.problem.num_gates == 10
    spread(method, context)
    closed = method.t[method.problem.map.rows["stem"]] == 0
    assert closed.any() and not closed.all()
    for layer in (context.model.left, context.model.right):
        assert not layer.weight[:, closed].any() and layer.weight[:, ~closed].any()
    assert context.model.depthwise.weight[closed].any()  # it follows when channels are removed


@pytest.mark.parametrize(
    ("options", "gated"),
    [({"residual": False}, ["stem"]), ({"gate_linear": False}, ["stem"]), ({"exclude": ["stem"]}, ["left"])],
)
def test_options_leave_channels_without_gates(options: dict[str, Any], gated: list[str]) -> None:
    method, context = set_up(forked(), macs_ratio=0.7, **options)
    lanes = method.problem.map.lanes
    assert [lane.name for lane, free in zip(lanes, method.problem.lane_is_free, strict=True) if free] == gated
    method.multiplier = torch.tensor(1e6)
    do_step(method, context)
    assert (method.gates(1)[~method.gated] == 1).all() and (method.t[~method.gated] == 1).all()
    with pytest.raises(UserError, match=r"method.macs_ratio=0.02 is out of reach"):
        set_up(forked(), macs_ratio=0.02, **options)


# Gradients


def test_gradients_are_those_of_gated_activations() -> None:
    method, context = set_up(forked())
    spread(method, context)
    raw = {path: weight.clone().requires_grad_() for path, weight in method.raw.items()}
    t = method.t.clone().requires_grad_()
    factors = method.columns.factors(pg.gate(t, 0.1))
    effective = {path: weight * factor for (path, weight), factor in zip(raw.items(), factors, strict=True)}
    F.cross_entropy(torch.func.functional_call(forked(), effective, IMAGES), LABELS).backward()
    F.cross_entropy(context.model(IMAGES), LABELS).backward()
    method.after_backward(context, 0)
    torch.testing.assert_close(method.gradient, t.grad, rtol=1e-4, atol=1e-7)
    for path, weight in raw.items():
        torch.testing.assert_close(context.parameters()[path].grad, weight.grad, rtol=1e-4, atol=1e-7)
        assert torch.equal(context.parameters()[path].data, method.raw[path])
    assert (method.t == 0).any() and (method.gradient[method.t == 0] == 0).all()


def test_the_network_begins_as_it_is() -> None:
    plain, (method, context) = forked(), set_up(forked())
    method.write(context, method.gates(0))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(context.model.state_dict()[name], value)


def test_closed_gates_stay_closed_and_batch_norm_before_them_sees_no_gate() -> None:
    method, context = set_up(forked())
    spread(method, context)
    closed = method.t == 0
    for step in range(5):
        do_step(method, context, step)
    assert closed.any() and (method.t[closed] == 0).all() and (method.t[~closed] != 0).any()
    (gated, one), (opened, other) = set_up(forked()), set_up(forked())
    gated.t = torch.linspace(0, 1, 10)
    gated.write(one, gated.gates(0))
    for context in (one, other):
        context.model(IMAGES)
    assert torch.equal(one.model.norm.running_mean, other.model.norm.running_mean)
    assert torch.equal(one.model.norm.running_var, other.model.norm.running_var)
    assert opened.t.tolist() == [1.0] * 10


def test_weight_decay_acts_on_raw_weights_and_never_on_t() -> None:
    (decayed, one), (plain, other) = set_up(forked(), weight_decay=0.3), set_up(forked())
    for method, context in ((decayed, one), (plain, other)):
        spread(method, context)
        do_step(method, context)
    torch.testing.assert_close(decayed.t, plain.t, rtol=0, atol=0)
    start, _ = set_up(forked())
    for path, weight in decayed.raw.items():
        torch.testing.assert_close(weight, plain.raw[path] - 0.1 * 0.3 * start.raw[path], rtol=1e-4, atol=1e-6)


def test_a_step_that_overflowed_moves_nothing() -> None:
    method, context = set_up(forked())
    context.amp_scaled = True
    spread(method, context)
    before = method.t.clone(), {path: weight.clone() for path, weight in method.raw.items()}
    weights = {name: value.clone() for name, value in context.model.named_parameters()}
    F.cross_entropy(context.model(IMAGES), LABELS).backward()
    context.model.left.weight.grad[0, 0, 0, 0] = torch.inf
    method.after_backward(context, 0)
    method.after_step(context, 0)  # the loss scaler leaves the optimizer's step out
    assert torch.equal(method.t, before[0]) and method.multiplier == 0
    assert all(torch.equal(method.raw[path], weight) for path, weight in before[1].items())
    method.write(context, method.gates(0))  # eps went on
    assert all(torch.equal(value, weights[name]) for name, value in context.model.named_parameters())


def test_t_is_kept_in_single_precision() -> None:
    method, _ = set_up(forked(), eps_end=1e-6)
    assert method.t.dtype == torch.float32
    assert pg.gate(torch.tensor([1e-4]), 1e-6).item() == pytest.approx(1e-8 / 1.01e-6)


# Costs


def test_bilinear_cost_by_hand() -> None:
    """3x3 on 8x8, 3 -> 5 channels: 8640 MACs, 2880 per input; a shared gate pays for its producer, too."""
    matrix = torch.zeros(3, 3, dtype=torch.float64)
    matrix[1, 0] = 9 * 8 * 8
    value, marginal = pg.cost(torch.tensor([3.0, 5.0], dtype=torch.float64), matrix)
    assert value.item() == 8640 and marginal.tolist() == [2880, 576 * 3]
    layers = [nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 5, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
              nn.Linear(5, 2)]
    model = nn.Sequential(*layers)
    channels = channel_map(model, 8)
    costs = ChannelCosts(model, channels, profile(model, 8))
    value, marginal = pg.cost(torch.tensor([3.0, 5.0], dtype=torch.float64), torch.tensor(costs.matrix("macs")))
    assert value.item() == 3 * 3 * 64 + 8640 + 10
    assert marginal.tolist() == [3 * 64 + 2880, 576 * 3 + 2]


@pytest.mark.parametrize("name", ["forked", *FAMILIES])
def test_cost_of_open_gates_is_that_of_the_counter(name: str) -> None:
    model, channels, size = family(name)
    table = profile(model, size)
    costs = ChannelCosts(model, channels, table)
    generator = torch.Generator().manual_seed(0)
    for kept in (costs.sizes, *(1 + (torch.rand(len(costs.sizes), generator=generator).numpy() * (costs.sizes - 1))
                                .astype("int64") for _ in range(2))):
        for unit in ("macs", "params", "channels"):
            widths = torch.tensor(kept, dtype=torch.float64).requires_grad_()
            value, marginal = pg.cost(widths, torch.tensor(costs.matrix(unit)))
            assert value.item() == costs.at(unit, kept)
            (slope,) = torch.autograd.grad(value, widths)
            torch.testing.assert_close(marginal, slope)
    assert costs.at("macs", costs.sizes) == dense_macs(table)


def test_price_is_the_derivative_of_the_cost_of_one_gate() -> None:
    """dF/dg of each gate, by differences; F of open gates is 1."""
    method, context = set_up(forked())
    method.t = torch.full_like(method.t, 1e6)
    assert method.smooth_cost(0)[0].item() == pytest.approx(1, abs=1e-6)
    spread(method, context)
    matrix, gates = method.matrix.double(), method.gates(0).double()
    _, marginal = method.smooth_cost(0)
    for index in range(len(gates)):
        shifted = [pg.cost(pg.sums(gates + h * F.one_hot(torch.tensor(index), len(gates)), method.lanes), matrix)[0]
                   for h in (1e-4, -1e-4)]
        found = (shifted[0] - shifted[1]).item() / 2e-4
        assert marginal[method.lane_of[index]].item() == pytest.approx(found, rel=1e-4)


def test_multiplier_looks_at_gates_that_are_zero() -> None:
    """Gates between 0 and 1 cost less, but are not closed."""
    method, context = set_up(forked(), macs_ratio=0.6, dual_lr=0.1)
    method.t = torch.full_like(method.t, 0.2)
    assert method.smooth_cost(0)[0] < 0.6
    do_step(method, context)
    assert (method.t != 0).all() and method.multiplier.item() == pytest.approx(0.1 * 0.4)


def test_rates_without_given_ones() -> None:
    """Gates: 2000 / steps within [0.01, 2]. The multiplier's alone moves t from 1 to 0 in a third of the steps."""
    assert [gate_rate(steps) for steps in (0, 100, 1950, 1_000_000)] == [2.0, 2.0, 2000 / 1950, 0.01]
    for price, excess, num_steps, lr in ((0.005, 0.5, 176, 2.0), (0.001, 0.3, 60_000, 0.03)):
        rate, t, multiplier, steps = dual_rate(price, excess, num_steps, lr), 1.0, 0.0, 0
        while t > 0:
            t -= lr * multiplier * price
            multiplier += rate * excess
            steps += 1
        assert steps / num_steps == pytest.approx(1 / 3, abs=0.02)
    method, _ = set_up(forked(), macs_ratio=0.6, dual_lr=None, gate_lr=None)
    macs = {"stem": 27 + 9 + 36 + 4, "left": 54 + 6}  # per channel and position: what makes it, what reads it
    total = 6 * (27 + 9) + 4 * (54 + 6)
    mean = (6 * macs["stem"] * 64 + 4 * (macs["left"] * 64 + 5)) / 10 / (total * 64 + 20)
    assert method.dual_lr == pytest.approx(dual_rate(mean, 0.4, 100, 2.0))


# Decision


def test_exact_rounding_brings_back_the_gates_that_closed_last() -> None:
    method, context = set_up(forked(), macs_ratio=None, channels_ratio=0.6)
    method.t = torch.tensor([0.9, 0.8, 0.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0])
    method.last_open = torch.tensor([9.0, 9.0, 3.0, 8.0, 1.0, 7.0, 9.0, 2.0, 6.0, 5.0])
    method.settle(context, 10)
    assert (method.t != 0).nonzero().flatten().tolist() == [0, 1, 3, 5, 6, 8]
    assert method.t[[3, 5, 8]].tolist() == pytest.approx([0.85, 0.85, 0.5])
    assert (~method.problem.map.dead(context.masks.masks)).nonzero().flatten().tolist() == [0, 1, 3, 5, 6, 8]


def test_exact_rounding_closes_the_narrowest_gates() -> None:
    method, context = set_up(forked(), macs_ratio=None, channels_ratio=0.6)
    method.t = torch.tensor([0.9, -0.8, 0.1, 0.5, 0.02, 0.3, 0.5, 0.0, 0.6, 0.4])
    method.settle(context, 10)
    assert (method.t == 0).nonzero().flatten().tolist() == [2, 4, 5, 7]


def test_rounding_by_gates_leaves_them_as_they_are() -> None:
    method, context = set_up(forked(), macs_ratio=None, channels_ratio=0.3, rounding="gates")
    spread(method, context)
    before = method.t.clone()
    method.settle(context, 10)
    assert torch.equal(method.t, before)
    assert torch.equal(~method.problem.map.dead(context.masks.masks), before != 0)


@pytest.mark.parametrize(("unit", "ratio"), [("macs", 0.55), ("params", 0.5), ("channels", 0.4)])
def test_exact_rounding_meets_the_target(unit: str, ratio: float) -> None:
    method, context = set_up(forked(), **{"macs_ratio": None, f"{unit}_ratio": ratio})
    spread(method, context)
    method.settle(context, 10)
    channels = channel_map(context.model, 8)
    small = surgery.remove_channels(context.model, channels, ~channels.dead(context.masks.masks))
    left = {"macs": dense_macs(profile(small, 8)) / dense_macs(profile(forked(), 8)),
            "params": count_parameters(small) / count_parameters(forked()),
            "channels": int((method.t != 0).sum()) / 10}[unit]
    assert ratio - 0.15 < left <= ratio
    assert method.end_epoch(context, 9)[f"gdp/{unit}"] == pytest.approx(left)


def test_every_layer_keeps_a_channel_however_high_the_price() -> None:
    method, context = set_up(forked(), macs_ratio=0.3)
    method.multiplier = torch.tensor(1e6)
    for step in range(3):
        do_step(method, context, step)
    assert [int((method.t[lane.classes] != 0).sum()) for lane in method.problem.map.lanes] == [1, 1]


# Runs


def rows_of(folder: Path, phase: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["phase"] == phase]


def test_gates_rest_in_the_last_part_of_the_training_and_the_target_holds(tmp_path: Path) -> None:
    """Four epochs of three steps, t fixed after two. The smaller network computes what the gated one did."""
    options = ("method.freeze_fraction=0.5", "schedule.train.epochs=4", "method.macs_ratio=0.6")
    folder = finish(configure(tmp_path, "gdp", *options))
    rows, written, (removed,) = rows_of(folder, "train"), summary(folder), rows_of(folder, "remove")
    assert [row["gdp/eps"] for row in rows] == pytest.approx([10**-2.5, 1e-4, 1e-4, 1e-4])
    opened = [row["gdp/open_gates"] for row in rows]
    assert opened[1] == opened[2] == opened[3] < 1
    assert rows[0]["macs/inference"] == written["macs/dense"]
    assert rows[1]["macs/inference"] == rows[3]["macs/inference"] == written["macs/inference"]
    assert removed["eval/loss"] == pytest.approx(rows[-1]["eval/loss"], rel=1e-5)
    assert dense_macs(profile(load_model(folder), 16)) == written["macs/inference"]
    assert 0.55 < written["macs/inference_ratio"] <= 0.6
    assert written["gdp/macs"] == pytest.approx(written["macs/inference_ratio"]) and written["gdp/feasible"] == 1


def test_dense_start_trains_gates_over_the_finetune_block(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With gates that close too late, and rounding that leaves them: the miss is told."""
    late = ("method.rounding=gates", "method.gate_lr=1e-6", "method.freeze_fraction=0.0", "method.start=dense")
    config = configure(tmp_path, "gdp", *late)
    assert runner.run(config) == 1
    streams = capsys.readouterr()
    assert "t is fixed with 100.0000% of the MACs; the target is missed: raise method.gate_lr" in streams.out
    assert "nothing to remove: no channel has all of its weights at zero" in streams.err
    assert [row["epoch"] for row in rows_of(run_folder(config), "train")] == [1, 2, 3]
    assert "gdp/eps" not in rows_of(run_folder(config), "train")[0]
    gates = rows_of(run_folder(config), "gates")
    assert [row["gdp/eps"] for row in gates] == pytest.approx([10**-2.5, 1e-4])
    assert gates[-1]["gdp/feasible"] == 0


# Refusals

REFUSED = {
    "two targets": (("method.macs_ratio=0.5", "method.params_ratio=0.5"),
                    "method.macs_ratio=0.5 and method.params_ratio=0.5"),
    "no target": (("method.macs_ratio=null",), "exactly one of method.macs_ratio, method.params_ratio"),
    "eps of 0": (("method.eps_end=0",), "method.eps_end"),
    "eps below 0": (("method.eps_start=-0.1",), "method.eps_start"),
    "eps that rises": (("method.eps_end=0.2",), "method.eps_end=0.2 must not exceed method.eps_start=0.1"),
    "gates shut for ever": (("method.t_init=0",), "method.t_init"),
    "no time for gates": (("method.freeze_fraction=1",), "method.freeze_fraction"),
    "no training": (("schedule.train.epochs=0",), "schedule.train.epochs=0 does not go with method.start=scratch"),
    "no fine-tuning": (
        ("method.start=dense", "schedule.finetune.epochs=0"), "schedule.finetune.epochs=0 does not go with"
    ),
    "dense but untrained": (
        ("method.start=dense", "schedule.train.epochs=0"), "method.start=dense, which needs a trained network"
    ),
    "below the floor": (
        ("method.macs_ratio=0.001",), r"method.macs_ratio=0.001 is out of reach: .* has 0.0\d+ of the MACs"
    ),
    "floor of a dense start": (("method.start=dense", "method.macs_ratio=0.001"), "method.macs_ratio=0.001 is out of"),
    "a weight decay of t": (("method.gate_decay=1e-4",), "unknown option method.gate_decay"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [({"exclude": ["stam"]}, r"method.exclude: 'stam' matches no layer that makes channels \(did you mean 'stem'"),
     ({"exclude": ["*"]}, "no channels of this network may be removed under method.exclude"),
     ({"freeze_fraction": 0.999}, "method.freeze_fraction=0.999 leaves no step for the gates: there are 100"),
     ({"params_ratio": 0.01, "macs_ratio": None}, "method.params_ratio=0.01 is out of reach")],
    ids=["misspelt layer", "nothing to gate", "no step for gates", "parameters"],
)  # fmt: skip
def test_networks_that_do_not_fit_the_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        set_up(forked(), **options)


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_option(case: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options, message = REFUSED[case]
    tiny = ("dataset=fake", "dataset.image_size=16", "dataset.num_train=24", "dataset.num_test=8", "model=resnet20",
            "model.width=0.25", "schedule.batch_size=8", "schedule.train.epochs=2", "schedule.train.warmup_epochs=0",
            "trainer.device=cpu", "logger.wandb=disabled", f"output_dir={tmp_path}")  # fmt: skip
    chosen = {line.partition("=")[0]: line for line in ("method=gdp", *tiny, *options)}
    assert cli.main(list(chosen.values())) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert not list(tmp_path.glob("*/metrics.jsonl"))
