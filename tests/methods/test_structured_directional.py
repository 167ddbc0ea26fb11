"""Structured directional pruning: group gRDA by hand and by its invariants, the runs, what they refuse."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from prune_lab.cli import command as cli
from prune_lab.compose.overrides import compose_checked
from prune_lab.config.schedule import PhaseSchedule
from prune_lab.core.context import Context
from prune_lab.optim.grda_threshold import thresholds
from prune_lab.optim.group_grda import GroupGRDA, shrink_factors
from prune_lab.optim.row_groups import RowGroups, group_sizes
from prune_lab.pipeline import runner
from prune_lab.pipeline.saved_model import load_model
from prune_lab.pruning.scores.flat_directions import direction_scores, directions, measure, order, shrunk, strength
from prune_lab.pruning.scores.hessian import unflatten
from tests.helpers.contexts import context_of
from tests.helpers.method_runs import CONF, configure, finish, last_result, make, summary

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


def test_threshold_stops_at_its_cap_and_never_falls() -> None:
    weight = parameter((1.0,))
    optimizer, reached = optimizer_of(weight, c=1.0), []
    for cap in (math.inf, 0.11, 0.11, 0.05, 0.12):
        optimizer.limit(cap)
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        reached.append(optimizer.threshold)
    assert reached == [pytest.approx(0.1**1.01), 0.11, 0.11, 0.11, 0.12]


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
    assert math.isnan(weight[0, 0].item()) and not weight[1].any()


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


# The projection of a trained network


def test_scores_and_shrinkage_by_hand() -> None:
    """v = (3, 4), (0, 2), the first axis sharp: d = (0.6, 0.8), (0, 1) becomes (0, 0.8), (0, 1); scores 0.64 and 1."""
    groups, values = RowGroups([torch.tensor([0, 1])], 2), [torch.tensor([[3.0, 4.0], [0.0, 2.0]])]
    norms = groups.norms(values)
    (d,) = directions(groups, values, norms, torch.ones(2))
    assert d.flatten().tolist() == pytest.approx([0.6, 0.8, 0, 1])
    d[0, 0] = 0
    scores = direction_scores(groups, values, norms, [d])
    assert scores.tolist() == pytest.approx([0.64, 1])
    assert shrunk(norms, scores, 2.0).tolist() == pytest.approx([1 - 2 * 0.64 / 5, 0])
    assert order(norms, scores).tolist() == pytest.approx([-0.64 / 5, -1 / 2])
    assert strength(norms, scores, torch.tensor([False, True])) == 2.0
    assert strength(norms, torch.tensor([0.64, -1.0]), torch.tensor([False, True])) == 0.0


@pytest.mark.parametrize("score", [0.7, -0.7])
def test_shrinkage_is_the_minimiser(score: float) -> None:
    """Of 1/2 |v - w|^2 + strength score |w|, also where the score pushes outward."""
    v = torch.tensor([0.6, -0.8], dtype=torch.float64)
    factor = float(shrunk(v.norm()[None], torch.tensor([score]), 0.5))
    at = torch.linspace(0, 2, 4001, dtype=torch.float64)[:, None] * v
    values = (at - v).square().sum(1) / 2 + 0.5 * score * at.norm(dim=1)
    assert factor == pytest.approx(float(values.argmin()) / 2000, abs=1e-3)
    assert (factor > 1) == (score < 0)


class Images:
    """A few training images, the same in each call."""

    info = SimpleNamespace(image_size=4, num_train=6, num_classes=3)

    def train_subset(self, parts, *, augment_seed):
        source = torch.Generator().manual_seed(0)
        images, labels = torch.randn(6, 3, 4, 4, generator=source), torch.tensor([0, 1, 2, 0, 1, 2])
        for part in parts:
            yield images[part], labels[part]


def curved() -> Context:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    context = context_of(model, {})
    context.dataset = Images()
    return context


def test_measured_scores_are_those_of_the_whole_hessian() -> None:
    context, k = curved(), 2
    model, named = context.model.eval(), dict(context.model.named_parameters())
    (images, labels), = Images().train_subset([torch.arange(6)], augment_seed=None)

    def loss(vector: torch.Tensor) -> torch.Tensor:
        parts = dict(zip(named, unflatten(vector, list(named.values())), strict=True))
        return nn.functional.cross_entropy(torch.func.functional_call(model, parts, (images,)), labels)

    v = torch.cat([weight.detach().flatten() for weight in named.values()])
    eigenvalues, vectors = torch.linalg.eigh(torch.autograd.functional.hessian(loss, v))
    filters = named["0.weight"].detach().flatten(1)
    d = torch.zeros_like(v)
    d[: filters.numel()] = (2 * filters / filters.norm(dim=1, keepdim=True)).flatten()
    flat = d - vectors[:, -k:] @ (vectors[:, -k:].T @ d)
    expected = (filters * flat[: filters.numel()].view_as(filters)).sum(1) / filters.norm(dim=1)
    rows = {named["0.weight"]: torch.arange(4)}
    found = measure(
        context.network, rows, torch.full((4,), 2.0), lambda: iter([(images, labels)]), eigenvectors=k, num_images=6,
        generator=context.generator, report=print,
    )  # fmt: skip
    assert found.pairs.converged
    assert torch.allclose(found.pairs.values.float(), eigenvalues.flip(0)[:k], rtol=1e-2)
    assert torch.allclose(found.scores, expected, atol=5e-3) and float((expected - 2).abs().max()) > 0.02
    assert found.by_chance == pytest.approx(math.sqrt(k / len(v)))
    assert found.sharp == pytest.approx(float((vectors[:, -k:].T @ d).norm() / d.norm()), abs=5e-3)
    assert found.macs == 9 * 6 * found.pairs.num_products * context.dense_macs


# Groups of a network


def phase(model: nn.Module, **options: Any) -> tuple[Any, Context]:
    """Return the method set up for a training phase on `model`, and the context."""
    context = context_of(model, {}, image_size=8)
    context.dataset = SimpleNamespace(info=SimpleNamespace(image_size=8, num_train=100))
    context.schedule = PhaseSchedule(epochs=10, lr=0.1, policy="constant", milestones=[], gamma=0.1, warmup_epochs=0,
                                     final_lr=0.0)  # fmt: skip
    lines: list[str] = []
    context.report = lines.append
    context.lines = lines
    method = make(NAME, **options)
    method.setup(context)
    return method, context


class Trunk(nn.Module):
    """Two convolutions that write the same four channels, and a hidden layer of three."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.inner, self.inner_norm = nn.Conv2d(4, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.outer, self.last = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.outer(torch.relu(self.inner_norm(self.inner(x))))
        return self.last(x.mean((2, 3)))


def test_all_that_writes_a_channel_is_one_group() -> None:
    model = Trunk()
    method, context = phase(model, bn_scale=True)
    filters = torch.cat([model.stem.weight.flatten(1), model.outer.weight.flatten(1), model.norm.weight[:, None]], 1)
    inner = torch.cat([model.inner.weight.flatten(1), model.inner_norm.weight[:, None]], 1)
    assert torch.equal(context.optimizer.scales.square().round().int(), torch.tensor([31] * 4 + [37] * 3))
    expected = torch.cat([filters.norm(dim=1) / 31**0.5, inner.norm(dim=1) / 37**0.5]).detach()
    assert torch.allclose(method.norms.float(), expected)


@pytest.mark.parametrize(
    ("options", "held"),
    [
        ({}, ["stem.weight", "inner.weight", "outer.weight"]),
        ({"bn_scale": True}, ["stem.weight", "norm.weight", "inner.weight", "inner_norm.weight", "outer.weight"]),
        ({"residual": False}, ["inner.weight"]),
        ({"exclude": ["inner"]}, ["stem.weight", "outer.weight"]),
        ({"scale_by_size": False}, ["stem.weight", "inner.weight", "outer.weight"]),
    ],
    ids=str,
)
def test_which_parameters_have_a_threshold(options: dict[str, Any], held: list[str]) -> None:
    model = Trunk()
    _, context = phase(model, **options)
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [named[id(parameter)] for parameter in context.optimizer.state] == held
    assert bool((context.optimizer.scales == 1).all()) != options.get("scale_by_size", True)


@pytest.mark.parametrize("bn_scale", [False, True])
def test_a_zero_channel_gets_a_gradient_unless_its_scale_is_zero_too(bn_scale: bool) -> None:
    model = Trunk()
    with torch.no_grad():
        model.inner_norm.bias.fill_(1)
    _, context = phase(model, bn_scale=bn_scale, c=1000.0)
    for _ in range(2):
        context.optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(8, 3, 8, 8)), torch.tensor([0, 1] * 4)).backward()
        context.optimizer.param_groups[0]["lr"] = 0.1
        context.optimizer.step()
    assert not model.inner.weight.any()
    with torch.no_grad():
        model.outer.weight.fill_(0.5)  # somebody reads the channel
    context.optimizer.zero_grad()
    nn.functional.cross_entropy(model(torch.randn(8, 3, 8, 8)), torch.tensor([0, 1] * 4)).backward()
    assert bool(model.inner.weight.grad.any()) != bn_scale


def test_cap_is_the_lowest_threshold_that_meets_the_budget() -> None:
    method, context = phase(Trunk(), macs_ratio=0.6)
    channels, norms, cap = method.channels, method.norms, context.optimizer.param_groups[0]["cap"]
    below = float(norms[norms < cap].max())
    assert cap in norms.tolist()
    assert channels.at("macs", norms > cap) <= 0.6 < channels.at("macs", norms > below)


def test_in_a_handful_of_steps_the_threshold_ends_at_the_median() -> None:
    method, _ = phase(Trunk())
    assert method._size([1.0] * 8) == pytest.approx(float(method.norms.median()))


@pytest.mark.parametrize(("options", "times"), [({}, 1.23325), ({"macs_ratio": 0.6}, 6)], ids=str)
def test_size_of_the_threshold_where_none_is_given(options: dict[str, float], times: float) -> None:
    method, context = phase(Trunk(), **options)
    c = context.optimizer.param_groups[0]["c"]
    *_, end = thresholds([0.1] * 100, c=c, mu=0.51)
    assert end == pytest.approx(times * float(method.norms.median()), rel=1e-4)
    (line,) = context.lines
    stop = ", or where method.macs_ratio is met" if options else ""
    assert f"in 100 steps (method.c={c:.4g}){stop}; the 7 channels have norms of " in line
    assert "half of them are zero after step" in line


def test_a_threshold_that_stays_low_is_told_with_advice() -> None:
    _, context = phase(Trunk(), c=0.001, mu=0.4)
    outside, line = context.lines
    assert outside == "method.mu=0.4 lies outside of (0.5, 1), which the theory of gRDA covers"
    advised = float(line.partition("half of them with method.c=")[2])
    _, context = phase(Trunk(), c=advised * 1.05, mu=0.4)  # the advice has two digits
    assert "without gradient half of them are zero after step" in context.lines[1]


# Runs


def rows(folder: Path, name: str = "train") -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["phase"] == name]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny run without a budget: eighteen steps."""
    options = ("method.macs_ratio=null", "schedule.train.epochs=6", "method.c=0.6")
    return finish(configure(tmp_path_factory.mktemp(NAME), NAME, *options))


def test_channels_that_became_zero_are_removed(run: Path) -> None:
    trained, written = rows(run), summary(run)
    assert [row["threshold"] for row in trained] == sorted(row["threshold"] for row in trained)
    last, (removed,) = trained[-1], rows(run, "remove")
    assert 0 < last["groups/zero"] < 1
    assert removed["remove/channels_kept"] == pytest.approx(1 - last["groups/zero"])
    assert written["macs/inference"] == last["macs/inference"] < written["macs/dense"]
    assert last["channels/kept"] == removed["remove/channels_kept"] and "sparsity" not in last
    assert written["sparsity/achieved"] is written["sparsity/requested"] is written["params/nonzero"] is None
    assert written["macs/train"] == written["macs/train_dense"]
    model = load_model(run)
    filters = [module.weight.flatten(1) for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert all(bool(weight.any(1).all()) for weight in filters)
    assert written["params/total"] == sum(weight.numel() for weight in model.parameters())


def test_the_threshold_stops_at_the_budget_and_the_end_is_cut_to_it(tmp_path: Path) -> None:
    constant = ("schedule.train.policy=constant", "schedule.train.warmup_epochs=0")
    folder = finish(configure(tmp_path, NAME, "method.macs_ratio=0.6", "method.c=20", *constant))
    *_, unlimited = thresholds([0.1] * 9, c=20, mu=0.51)
    last = rows(folder)[-1]
    assert 0 < last["threshold"] < unlimited / 5 and last["groups/zero"] > 0
    assert 0.5 < summary(folder)["macs/inference_ratio"] <= 0.6


def test_a_budget_that_the_threshold_does_not_reach_is_met_by_rank(tmp_path: Path, capsys) -> None:
    folder = finish(configure(tmp_path, NAME, "method.macs_ratio=0.6", "method.c=0.0001"))
    assert "the threshold left 1 of the MACs: " in capsys.readouterr().out
    assert rows(folder)[-1]["groups/zero"] == 0
    assert 0.5 < summary(folder)["macs/inference_ratio"] <= 0.6


def test_a_layer_keeps_its_largest_channel(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = finish(configure(tmp_path, NAME, "method.macs_ratio=null", "method.c=1000"))
    assert "one channel, the largest, is kept where all were zero: conv1, layer1.0.conv1, " in capsys.readouterr().out
    assert rows(folder)[-1]["groups/zero"] == 1
    assert load_model(folder).layer1[0].conv1.weight.shape[:2] == (1, 1)


def test_batch_norm_is_measured_without_the_removed_channels(run: Path, tmp_path: Path) -> None:
    options = ("method.macs_ratio=null", "schedule.train.epochs=6", "method.c=0.6", "method.bn_images=16")
    folder = finish(configure(tmp_path, NAME, *options))
    ours, theirs = last_result(folder)["model"], last_result(run)["model"]
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed and all("running" in name for name in changed)
    forward = summary(folder)["macs/inference"]
    assert summary(folder)["macs/train"] == summary(run)["macs/train"] + 16 * forward


@pytest.mark.parametrize(
    ("options", "phases"),
    [
        (["method.start=dense"], ["train", "directional", "prune", "remove"]),
        (["method.finetune=true"], ["train", "prune", "remove", "finetune"]),
        (["method.variant=SDP", "method.eigenvectors=2", "method.hessian_images=8"], ["train", "prune", "remove"]),
    ],
    ids=lambda value: value[0] if "=" in value[0] else "",
)
def test_chains(options: list[str], phases: list[str], tmp_path: Path) -> None:
    folder = finish(configure(tmp_path, NAME, "method.macs_ratio=0.7", "schedule.train.epochs=2", *options))
    written = summary(folder)
    assert [entry["name"] for entry in written["phases"]] == phases
    assert 0.5 < written["macs/inference_ratio"] <= 0.7
    if options[0] == "method.variant=SDP":
        assert written["flat/strength"] > 0 and 0 < written["flat/sharp_share"] < 1
        assert written["macs/train"] > written["macs/train_dense"]


def test_nothing_zero_is_an_error_that_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert runner.run(configure(tmp_path, NAME, "method.macs_ratio=null", "method.c=1e-9")) == 1
    message = capsys.readouterr().err
    assert "no channel became zero: the threshold reached" in message and "raise method.c or method.mu" in message


# What it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["optimizer.momentum=0.9"], "optimizer.momentum=0.9 does not go with method=structured_directional"),
        (["optimizer.weight_decay=5e-4"], "optimizer.weight_decay=0.0005 does not go with"),
        (["optimizer=adamw"], "optimizer=adamw does not go with method=structured_directional"),
        (["method.c=0"], "method.c must lie in (0, inf)"),
        (["method.c=-1"], "method.c must lie in (0, inf)"),
        (["method.mu=0"], "method.mu must lie in (0, 1]"),
        (["method.mu=1.5"], "method.mu must lie in (0, 1]"),
        (["method.sparsity=0.5"], "unknown option method.sparsity: channels are removed under method.macs_ratio"),
        (["method.macs_ratio=0.001"], "method.macs_ratio=0.001 is out of reach"),
        (["method.exclude=[conv9]"], "method.exclude: 'conv9' matches no layer that makes channels"),
        (["method.exclude=['*']"], "no channels of this network may be removed under method.exclude"),
        (["method.bn_images=1"], "method.bn_images=1: one image has no variance"),
        (["method.variant=SDP"], "method.variant=SDP needs method.macs_ratio"),
        (["method.variant=SDP", "method.macs_ratio=0.5", "method.c=0.1"], "method.c=0.1 goes with"),
        (["method.start=dense", "method.finetune=true"], "method.finetune=true needs method.start=scratch"),
        (["schedule.train.epochs=0", "method.macs_ratio=null"], "epochs=0 does not go with method.start=scratch: the"),
        (["method.start=dense", "schedule.finetune.epochs=0"], "schedule.finetune.epochs=0 does not go with method.st"),
        (["method.start=dense", "schedule.train.epochs=0"], "does not go with method.start=dense"),
        (["method.variant=SDP", "method.macs_ratio=0.5", "schedule.train.epochs=0"], "method.variant=SDP, which needs"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_refused_in_one_line(options, message, tmp_path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["method=structured_directional", f"output_dir={tmp_path}", *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_projection_takes_networks_of_any_optimizer() -> None:
    options = ["method.variant=SDP", "method.macs_ratio=0.5", "optimizer=sgd"]
    (config,) = compose_checked(CONF, [f"method={NAME}", *options], sweep=False)
    assert config.optimizer.momentum == 0.9
