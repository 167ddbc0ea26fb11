"""Dep-L0: what makes the gates, where they stand, gradients by autograd, expected costs, runs, refusals."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_lab import models
from prune_lab.accounting.costs import profile
from prune_lab.accounting.network import Network
from prune_lab.cli import command as cli
from prune_lab.compose.overrides import compose_checked
from prune_lab.config.schedule import PhaseSchedule
from prune_lab.core.context import Context
from prune_lab.foundations import checkpoint, distributed, seeding
from prune_lab.methods.dep_l0 import DepL0, dual_rate, learning_rate
from prune_lab.pipeline import runner
from prune_lab.pipeline.saved_model import load_model
from prune_lab.pruning.channels.groups import channel_groups
from prune_lab.pruning.gates import hard_concrete as hc
from prune_lab.pruning.gates.channels import ExpectedCost, GatedChannels
from prune_lab.pruning.gates.generator import GateGenerator, IndependentGates
from prune_lab.pruning.gates.norms import Draw, find_norms
from prune_lab.training.loop import TrainState
from tests.helpers.contexts import context_of
from tests.helpers.method_runs import CONF, configure, finish, last_result, make, summary, watch

NAME = "dep_l0"
IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(7))
LABELS = torch.arange(16) % 5
PRICED = {"macs_ratio": None, "penalty": 1e-4}

VGG16 = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
RESNET56 = [16] * 10 + [32] * 9 + [64] * 9
"""the stem and the first convolution of each block"""
RESNET50 = [64] * 7 + [128] * 8 + [256] * 12 + [512] * 6
"""the stem and the first two convolutions of each block"""


def generator(sizes: list[int], *, backward: bool = False, width: int | None = None, seed: int = 0) -> GateGenerator:
    return GateGenerator(sizes, backward=backward, width=width, source=torch.Generator().manual_seed(seed))


# What makes the gates


@pytest.mark.parametrize(
    ("sizes", "backward", "width", "count"),
    [
        (VGG16, False, 64, 1_642_624),
        (VGG16, True, 64, 1_671_296),
        (RESNET56, False, 16, 47_104),
        (RESNET56, True, 64, 50_944),
        (RESNET50, False, 64, 2_354_624),
    ],
)
def test_parameters_of_the_published_networks(sizes: list[int], backward: bool, width: int, count: int) -> None:
    made = generator(sizes, backward=backward, width=width)
    assert sum(parameter.numel() for parameter in made.parameters()) == count
    if (sizes, backward) != (VGG16, True):  # 64 is published there, where the last layer has 512
        assert sum(parameter.numel() for parameter in generator(sizes, backward=backward).parameters()) == count


@pytest.mark.parametrize("backward", [False, True])
def test_gates_by_the_formula(backward: bool) -> None:
    made = generator([3, 2, 4], backward=backward, width=5)
    with torch.no_grad():
        for bias in made.biases:
            bias.normal_(generator=torch.Generator().manual_seed(1))
    hidden, parts = torch.ones(5), []
    for weight, bias in zip(made.weights, made.biases, strict=True):
        hidden = math.log(100) * torch.tanh(weight @ hidden + bias)
        parts.append(hidden)
    assert [len(part) for part in parts] == ([4, 2, 3] if backward else [3, 2, 4])
    torch.testing.assert_close(made(), torch.cat(parts[::-1] if backward else parts))


def test_a_bias_of_3_alone() -> None:
    made = generator([6, 5])
    with torch.no_grad():
        for weight, bias in zip(made.weights, made.biases, strict=True):
            weight.zero_(), bias.fill_(3.0)
    assert made().tolist() == pytest.approx([4.582396] * 11, abs=1e-5)
    assert hc.open_probability(made()).tolist() == pytest.approx([0.99794] * 11, abs=1e-5)


def test_gates_at_the_bounds_keep_their_order() -> None:
    made = generator([4])
    with torch.no_grad():
        made.weights[0].zero_()
        made.biases[0].copy_(torch.tensor([20.0, 30.0, -20.0, 25.0]))
    assert made()[:2].tolist() == pytest.approx([hc.LIMIT] * 2) and made()[0] == made()[1]
    assert made.inner().argsort().tolist() == [2, 0, 3, 1]


def test_the_start_is_that_of_linear_layers_with_biases_around_3() -> None:
    made = generator([512, 512, 512])
    biases = torch.cat(list(made.biases))
    assert biases.mean().item() == pytest.approx(3, abs=2e-3) and biases.std().item() == pytest.approx(0.01, rel=0.1)
    for weight in made.weights:
        assert weight.abs().max().item() == pytest.approx(512**-0.5, rel=1e-3)
        assert weight.std().item() == pytest.approx((3 * 512) ** -0.5, rel=0.01)
    alone = IndependentGates([512, 512], source=torch.Generator().manual_seed(0))().detach()
    assert alone.mean().item() == pytest.approx(3, abs=2e-3) and alone.std().item() == pytest.approx(0.01, rel=0.1)
    assert hc.open_probability(alone.mean()).item() == pytest.approx(0.99003, abs=1e-4)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_gates_depend_on_the_layers_made_before_and_are_bounded(backward: bool, layer: int) -> None:
    made = generator([4, 3, 2], backward=backward)
    with torch.no_grad():
        before = made()
        made.weights[layer] += 5 * torch.rand(made.weights[layer].shape, generator=torch.Generator().manual_seed(2)) - 3
        after = made()
    assert bool((after.abs() <= hc.LIMIT).all())
    same = [torch.equal(*pair) for pair in zip(before.split([4, 3, 2]), after.split([4, 3, 2]), strict=True)]
    same = same[::-1] if backward else same
    assert same == [index < layer for index in range(3)]


# Where gates stand


@pytest.mark.parametrize(
    ("name", "norms"),
    [
        ("vgg16", 13),
        ("resnet56", 27),  # the stem is tied by an addition
        ("resnet50", 33),
        ("mobilenet_v2", 20),
        ("mobilenet_v3_small", 13),
    ],
)
def test_gated_layers_of_the_families(name: str, norms: int) -> None:
    (config,) = compose_checked(CONF, [f"model={name}"], sweep=False)
    with torch.device("meta"):
        model = models.build(config.model, num_classes=10, image_size=224 if name == "resnet50" else 32)
    found = find_norms(model, 224 if name == "resnet50" else 32)
    assert len(found) == len({path for _, path in found}) == norms
    if name == "resnet50":
        assert sorted(group.size for group, _ in found) == RESNET50
    if name == "mobilenet_v2":
        for group, path in found:  # behind the depthwise convolution, where there is one
            assert path == group.norms[-1] and len(group.norms) == (2 if group.followers else 1)
        assert any(group.followers for group, _ in found)


class Fork(nn.Module):
    """Two ways with a batch norm each from one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.bare, self.flat = nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5, affine=False)
        self.late, self.norm, self.head = nn.Conv2d(5, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.flat(self.bare(torch.cat([self.one(x), self.two(x)], 1)[:, :4]))
        return self.head(self.norm(torch.relu(self.late(x)))).mean([2, 3])


def test_channels_without_a_norm_of_their_own_have_no_gates() -> None:
    """Two norms side by side, a norm without scale, a norm behind an activation."""
    assert find_norms(Fork(), 8) == []


# A step, against autograd


def network(*, depthwise: bool = False) -> nn.Module:
    torch.manual_seed(0)
    middle = [nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU()] if depthwise else []
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), *middle,
        nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.MaxPool2d(4), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.train()


def set_up(model: nn.Module, **options: Any) -> tuple[DepL0, Context]:
    context = context_of(model, {}, image_size=8)
    context.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    context.schedule = PhaseSchedule(10, 0.1, "constant", [], 0.1, 0.0, 0.0)
    context.dataset = SimpleNamespace(info=SimpleNamespace(image_size=8, num_train=1000))
    context.last_step = context.total_steps
    method = make(NAME, **options)
    method.setup(context)
    return method, context


def set_gates(method: DepL0, values: Tensor) -> None:
    """Give independent gates their values."""
    method.gates.generator.log_alpha.data.copy_(values)
    method.gates.step(torch.zeros_like(values), slower=0.0)


def spread_gates(method: DepL0) -> None:
    set_gates(method, torch.linspace(-3, 4, method.gated.num_gates)[torch.randperm(
        method.gated.num_gates, generator=torch.Generator().manual_seed(3))])


def do_step(method: DepL0, context: Context, step: int = 0, *, after: bool = True, parts: int = 1) -> float:
    """Do what the loop does in a step; return the loss."""
    context.optimizer.zero_grad()
    method.before_forward(context, step)
    total = 0.0
    for images, labels in zip(IMAGES.chunk(parts), LABELS.chunk(parts), strict=True):
        loss = F.cross_entropy(context.model(images), labels) / parts
        loss.backward()
        total += loss.item()
    method.after_backward(context, step)
    if after:
        context.optimizer.step()
        method.after_step(context, step)
    return total


class Gate(nn.Module):
    """Multiplies channels by z [images, channels]."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.z = z

    def forward(self, x: Tensor) -> Tensor:
        return x * self.z[:, :, None, None]


def with_gates(model: nn.Module, gates: dict[int, Tensor]) -> nn.Module:
    """Return the layers of `model` with a gate behind each numbered one."""
    layers: list[nn.Module] = []
    for index, layer in enumerate(model):
        layers += [layer, Gate(gates[index])] if index in gates else [layer]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("kind", ["forward", "backward", "independent"])
def test_gradients_are_those_of_the_written_loss(kind: str, parts: int, depthwise: bool) -> None:
    """CE(x -> conv -> batch norm -> z x -> ReLU ...) + lambda sum of expected weights, each image its own z."""
    method, context = set_up(network(depthwise=depthwise), generator=kind, **PRICED | {"penalty": 0.01})
    if kind == "independent":
        spread_gates(method)
    made, reference = copy.deepcopy(method.gates.generator), network(depthwise=depthwise)
    a = made()
    behind = [4, 7] if depthwise else [1, 4]
    losses = []
    for index, (images, labels) in enumerate(zip(IMAGES.chunk(parts), LABELS.chunk(parts), strict=True)):
        source = seeding.generator(context.seed, context.phase, "gates", 5, index)
        z = (torch.sigmoid((hc.noise((len(images), 10), source) + a) / hc.BETA) * 1.2 - 0.1).clamp(0, 1)
        gated = with_gates(reference, dict(zip(behind, z.split([6, 4], 1), strict=True)))
        losses.append(F.cross_entropy(gated(images), labels) / parts)
    loss = sum(losses)
    first, second = (torch.sigmoid(part + 1.598597).sum() for part in a.split([6, 4]))
    weights = 27 * first + 9 * first * second + 20 * second + (9 * first if depthwise else 0)
    (loss + 0.01 * weights).backward()
    assert do_step(method, context, 5, after=False, parts=parts) == pytest.approx(loss.item(), rel=1e-5)
    for mine, other in zip(context.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)
    made_by = method.gates.generator
    before = [parameter.detach().clone() for parameter in made_by.parameters()]
    method.gates.step(method.gradient, slower=0.0)
    for mine, other, held in zip(made_by.parameters(), made.parameters(), before, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)
        assert torch.equal(mine, held) and other.grad.any()


def test_with_all_gates_open_the_network_is_the_dense_one() -> None:
    method, context = set_up(network(), generator="independent", **PRICED)
    set_gates(method, torch.full((10,), 40.0))
    dense = network()
    loss = F.cross_entropy(dense(IMAGES), LABELS)
    loss.backward()
    assert do_step(method, context, after=False) == pytest.approx(loss.item())
    for mine, other in zip(context.model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_between_steps_scale_and_shift_hold_the_gates_without_chance() -> None:
    """As a gate behind the batch norm would; twice alike, and in a copy, as a moving average is."""
    method, context = set_up(network(depthwise=True), generator="independent", **PRICED)
    spread_gates(method)
    do_step(method, context)
    gates = hc.fixed_gate(method.gates.values, "louizos")
    assert (gates == 0).any() and ((gates > 0) & (gates < 1)).any()
    raw = copy.deepcopy(context.model).eval()
    for path, value in method.norms.raw.items():
        raw.get_parameter(path).data.copy_(value)
    each = dict(zip([4, 7], gates.expand(16, -1).split([6, 4], 1), strict=True))
    model = context.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), with_gates(raw, each)(IMAGES))
        assert torch.equal(model(IMAGES), model(IMAGES))
        assert torch.equal(copy.deepcopy(model)(IMAGES), model(IMAGES))


def test_each_pass_and_image_has_its_own_gates_and_each_step_the_same_again() -> None:
    log_alpha, seen = torch.zeros(5), []
    for step in (0, 1, 0):
        draw = Draw(log_alpha, [3, 2], lambda n, step=step: torch.Generator().manual_seed(10 * step + n))
        passes = [torch.cat([draw.gates(0, 4), draw.gates(1, 4)], 1) for _ in range(2)]
        assert passes[0].shape == (4, 5) and not torch.equal(*passes)
        assert not torch.equal(passes[0][0], passes[0][1])
        seen.append(torch.cat(passes))
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


def test_processes_draw_for_their_own_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(num_images: int) -> Tensor:
        return Draw(torch.zeros(5), [5], lambda n: torch.Generator().manual_seed(n)).gates(0, num_images)

    whole = drawn(6)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(drawn(3))
    assert torch.equal(torch.cat(parts), whole)


def test_a_step_that_fp16_skips_moves_nothing() -> None:
    context = context_of(network(), {}, image_size=8)
    context.optimizer, context.amp_scaled = torch.optim.SGD(context.model.parameters(), lr=0.1), True
    context.schedule = PhaseSchedule(10, 0.1, "constant", [], 0.1, 0.0, 0.0)
    context.dataset = SimpleNamespace(info=SimpleNamespace(image_size=8, num_train=1000))
    method = make(NAME)
    method.setup(context)
    owned = [parameter for group in context.optimizer.param_groups for parameter in group["params"]]
    assert any(parameter is method.gates.leaf for parameter in owned)  # its gradient is unscaled with theirs
    do_step(method, context)
    kept = {name: value.detach().clone() for name, value in context.parameters().items()}
    before, price = method.gates.values.clone(), method.multiplier.clone()
    method.before_forward(context, 1)
    F.cross_entropy(context.model(IMAGES), LABELS).backward()
    context.model[0].weight.grad[0] = torch.inf
    method.after_backward(context, 1)
    method.after_step(context, 1)  # the scaler has left out the optimizer's step
    assert torch.equal(before, method.gates.values) and torch.equal(price, method.multiplier)
    assert all(torch.equal(value, context.parameters()[name]) for name, value in kept.items())
    do_step(method, context, 2)
    assert not torch.equal(before, method.gates.values) and method.multiplier > price


def test_the_weights_optimizer_knows_nothing_of_the_gates() -> None:
    method, context = set_up(network())
    owned = {id(p) for group in context.optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in context.model.parameters()}
    assert not owned & {id(p) for p in (*method.gates.generator.parameters(), method.gates.leaf)}


@pytest.mark.parametrize(("schedule", "rate"), [("constant", 0.02), ("weights", 0.002)])
def test_the_rate_of_the_gates(schedule: str, rate: float) -> None:
    method, context = set_up(network(), gate_schedule=schedule, gate_lr=0.02)
    context.optimizer.param_groups[0]["lr"] = 0.01  # a tenth of the peak
    do_step(method, context)
    assert method.gates._optimizer.param_groups[0]["lr"] == pytest.approx(rate)
    assert [learning_rate("forward", steps) for steps in (10, 100_000)] == [0.3, 0.001]
    assert learning_rate("independent", 2000) == 0.01 and dual_rate(200, 50) == 4


# Expected cost


def test_expected_weights_of_two_convolutions_in_a_row() -> None:
    """Widths 2 and 3, 3x3 kernels, all a = 0: 82.283 of 108 weights, and what reads them."""
    model = nn.Sequential(
        nn.Conv2d(3, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 3, bias=False),
        nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5, bias=False),
    )  # fmt: skip
    method, _ = set_up(model, generator="independent", **PRICED | {"penalty": 2.0})
    set_gates(method, torch.zeros(5))
    opened = hc.open_probability(method.gates.values)
    value, _ = method.priced.at(opened)
    assert value.item() / 2 == pytest.approx(82.283 + 5 * 2.49547, abs=1e-3)
    assert method.priced.at(torch.ones(5))[0].item() / 2 == 108 + 15


def gated_network(name: str) -> tuple[GatedChannels, Network]:
    (config,) = compose_checked(CONF, [f"model={name}", "model.width=0.25"], sweep=False)
    model = models.build(config.model, num_classes=10, image_size=32)
    network = Network(model, [], profile(model, 32), 32)
    return GatedChannels(network, [group for group, _ in find_norms(model, 32)]), network


@pytest.mark.parametrize("name", ["vgg16", "mobilenet_v3_small"])
def test_expected_costs_of_gates_that_are_sure_are_exact(name: str) -> None:
    gated, context = gated_network(name)
    source, device = torch.Generator().manual_seed(0), torch.device("cpu")
    for unit in ("macs", "params", "channels"):
        expected = ExpectedCost(gated, unit, 1.0, device)
        for share in (0.0, 0.3, 1.0):
            opened = torch.rand(gated.num_gates, generator=source) < share
            assert expected.at(opened.float())[0].item() == pytest.approx(gated.cost(unit, opened), rel=1e-5)
    opened = torch.rand(gated.num_gates, generator=source) < 0.5
    masks = gated.channels.weight_masks(gated.alive(opened), context.model)
    weights, _ = ExpectedCost(gated, "weights", 1.0, device).at(opened.float())
    assert weights.item() == pytest.approx(sum(int(mask.sum()) for mask in masks.values()), rel=1e-6)


def test_the_price_of_a_gate_is_what_its_channel_is_expected_to_cost() -> None:
    """The expectation is linear in each gate's P: open it and close it."""
    gated, _ = gated_network("mobilenet_v3_small")
    expected = ExpectedCost(gated, "macs", 1 / gated.dense("macs"), torch.device("cpu"))
    opened = torch.rand(gated.num_gates, generator=torch.Generator().manual_seed(0))
    _, price = expected.at(opened)
    assert bool((price > 0).all())
    for index in range(0, gated.num_gates, 17):
        ends = [expected.at(torch.where(torch.arange(gated.num_gates) == index, end, opened))[0] for end in (0.0, 1.0)]
        assert (ends[1] - ends[0]).item() == pytest.approx(price[index].item(), rel=1e-2)


def test_macs_are_priced_like_weights_on_average() -> None:
    method, _ = set_up(network(), penalise="macs", **PRICED)
    other, _ = set_up(network(), **PRICED)
    ones = torch.ones(10)
    assert method.priced.at(ones)[0].item() == pytest.approx(other.priced.at(ones)[0].item())
    ratio = method.priced.at(ones)[1] / other.priced.at(ones)[1]
    assert ratio[:6].max() > 1 > ratio[6:].max()  # the linear layer has one position


@pytest.mark.parametrize(("restart", "after"), [(True, 0.0), (False, 0.5)])
def test_the_multiplier_rises_until_the_gates_without_chance_meet_the_target(restart: bool, after: float) -> None:
    options = {"generator": "independent", "gate_lr": 1e-9, "dual_lr": 1.0, "dual_restart": restart}
    method, context = set_up(network(), macs_ratio=0.5, **options)
    do_step(method, context)
    first = method.multiplier.item()
    assert first == pytest.approx(0.5)  # all are open
    set_gates(method, torch.full((10,), -2.3))  # open without chance, though P(open) is a third
    do_step(method, context, 1)
    assert method.multiplier.item() == pytest.approx(1.0)
    set_gates(method, torch.full((10,), -2.5))
    do_step(method, context, 2)
    closed = method.share.at(torch.zeros(10))[0].item()
    assert method.multiplier.item() == pytest.approx(0 if restart else 1.0 + closed - 0.5)


# Runs


def trained(folder: Path, phase: str = "0-train") -> dict[str, Any]:
    return checkpoint.load(folder / "phases" / phase / "result.pt")


@pytest.mark.parametrize("unit", ["macs", "params", "channels"])
def test_targets_are_met_exactly(unit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest network within the target, by the ranks of the gates; nothing moves the gates in the last part."""
    gates: list[Tensor] = []
    watch(monkeypatch, lambda training, step: gates.append(training.method.gates.values.clone()))
    options = ["method.macs_ratio=null", f"method.{unit}_ratio=0.6", "method.penalty=0", "method.gate_lr=0.1"]
    folder = finish(configure(tmp_path, NAME, *options, "method.freeze_fraction=0.4"))
    written, result = summary(folder), trained(folder)
    assert written["params/total"] == written["params/kept"] < written["params/dense"]
    got = {"macs": written["macs/inference_ratio"], "params": written["params/total"] / written["params/dense"],
           "channels": written["remove/channels_kept"]}[unit]
    assert 0.57 < got <= 0.6 and written[f"l0/{unit}"] == pytest.approx(got)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row for row in records if row["phase"] == "train"][-1]["channels/kept"] == written["remove/channels_kept"]
    assert len(gates) == 9 and not torch.equal(gates[3], gates[4])
    assert all(torch.equal(later, gates[4]) for later in gates[5:])  # fixed after 0.6 x 9 = 5 steps
    model = models.build(configure(Path("unused"), "dense").model, num_classes=10, image_size=16)
    groups = channel_groups(model, 16)
    for group, a in zip(groups, gates[-1].split([group.size for group in groups]), strict=True):
        kept = result["masks"][f"{group.producer}.weight"].flatten(1).any(1) if (
            f"{group.producer}.weight" in result["masks"]) else torch.ones(group.size, dtype=torch.bool)
        assert kept.any() and (kept.all() or a[kept].min() >= a[~kept].max())


def test_the_penalty_alone_closes_gates_and_a_layer_keeps_its_best(tmp_path: Path, capsys: Any) -> None:
    options = ("method.macs_ratio=null", "method.penalty=1e6", "method.freeze_fraction=0", "method.gate_lr=2",
               "method.generator=independent")  # fmt: skip
    folder = finish(configure(tmp_path, NAME, *options))
    small, shown = load_model(folder), capsys.readouterr().out
    names = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)]
    assert [small.get_submodule(name).weight.shape[0] for name in names] == [1] * 9
    assert "84 of 84 were closed, 9 of them stay all the same, 0 go" in shown
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in records if row["phase"] == "train"]
    assert train[1]["l0/open_gates"] == 0 and train[1]["macs/inference"] < train[-1]["macs/inference"]
    assert train[-1]["l0/macs"] == pytest.approx(summary(folder)["macs/inference_ratio"])
    assert summary(folder)["macs/train"] == summary(folder)["macs/train_dense"]  # nothing is fixed before the end
    norms = [small.get_submodule(name.replace("conv1", "bn1")) for name in names]
    assert all(norm.weight.any() for norm in norms) and all(math.isfinite(norm.weight.item()) for norm in norms)


def test_from_a_trained_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks: list[int] = []

    def look(training: TrainState, step: int) -> None:
        hooks.append(sum(len(module._forward_hooks) for module in training.context.model.modules()))

    watch(monkeypatch, look)
    dense = finish(configure(tmp_path, "dense"))
    config = configure(tmp_path, NAME, "method.start=dense", "method.freeze_fraction=0.5")
    assert runner.run(config) == 0
    (folder,) = [path for path in tmp_path.glob("*/summary.json") if "dep_l0" in path.parent.name]
    phases = json.loads(folder.read_text())["phases"]
    assert [phase["name"] for phase in phases] == ["train", "gates", "remove"]
    assert phases[0]["key"] == summary(dense)["phases"][0]["key"] and phases[0]["reused"]
    assert hooks == [0] * 9 + [9, 9, 0, 0, 0, 0]  # six steps of gates, from the third on without them
    assert last_result(folder.parent)["widths"]


def test_excluded_layers_keep_all_of_their_channels(tmp_path: Path) -> None:
    folder = finish(configure(tmp_path, NAME, "method.exclude=[layer1.*,layer3.2.conv1]"))
    model = load_model(folder)
    for name, size in (("layer1.0", 4), ("layer1.2", 4), ("layer3.2", 16)):
        assert model.get_submodule(f"{name}.conv1").weight.shape[0] == size
    others = [model.get_submodule(f"layer{stage}.{block}.conv1") for stage in (2, 3) for block in (0, 1)]
    assert sum(layer.weight.shape[0] for layer in others) < 48


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["method.macs_ratio=1.5"], "method.macs_ratio must lie in (0, 1)"),
        (["method.macs_ratio=0.5", "method.params_ratio=0.5"],
         "at most one of method.macs_ratio, method.params_ratio, method.channels_ratio"),
        (["method.macs_ratio=null"], "method.penalty=0 without one of method.macs_ratio, method.params_ratio"),
        (["method.macs_ratio=0.01"], "method.macs_ratio=0.01 is out of reach: the smallest network"),
        (["method.start=dense", "method.macs_ratio=0.01"], "method.macs_ratio=0.01 is out of reach"),
        (["method.penalty=-1"], "method.penalty must lie in [0, inf)"),
        (["method.freeze_fraction=1"], "method.freeze_fraction must lie in [0, 1)"),
        (["method.freeze_fraction=0.9999", "schedule.train.epochs=1"], "leaves no step for the gates: there are"),
        (["method.generator=independent", "method.generator_width=3"], "method.generator_width=3 goes with"),
        (["method.generator=sideways"], "method.generator=sideways is not allowed"),
        (["method.exclude=[nothing]"], "method.exclude: 'nothing' matches no layer"),
        (["method.exclude=[layer*.conv1]"], "method=dep_l0: ResNetCifar has no channels of their own behind a batch"),
        (["method.start=dense", "schedule.finetune.epochs=0"], "schedule.finetune.epochs=0 does not go with"),
        (["method.start=dense", "schedule.train.epochs=0"], "schedule.train.epochs=0 does not go with"),
        (["trainer.compile=true"], "trainer.compile=true does not go with method=dep_l0"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_options_are_refused_in_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    fixed = ["model.width=0.25", "schedule.train.warmup_epochs=0", f"output_dir={tmp_path}/outputs"]
    assert cli.main([f"method={NAME}", "dataset=fake", *fixed, *options]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert not list(tmp_path.glob("outputs/*"))
