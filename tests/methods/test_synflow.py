"""SynFlow: worked examples, conservation of flow, what the scoring form replaces, what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_lab import models
from prune_lab.accounting.eligibility import select_layers
from prune_lab.compose.overrides import compose_checked
from prune_lab.core.context import Context
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.seeding import generator
from prune_lab.pruning.masks.distributions import num_keep_total
from prune_lab.pruning.scores import synaptic_flow
from tests.helpers.contexts import context_of
from tests.helpers.method_runs import CONF, make


class First(nn.Module):
    """The first values of each image, so that linear networks can have few inputs."""

    def __init__(self, num_values: int) -> None:
        super().__init__()
        self.num_values = num_values

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, : self.num_values]


def chain(*weights: Tensor) -> nn.Sequential:
    """Return linear layers with these weights [out, in] and ReLU between them, without biases."""
    model = nn.Sequential(First(weights[0].shape[1]))
    for index, weight in enumerate(weights):
        if index:
            model.append(nn.ReLU())
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight.clone())
        model.append(layer)
    return model


def example_b() -> nn.Sequential:
    return chain(torch.tensor([[1.0, -2.0], [3.0, 0.5]]), torch.tensor([[0.5, -0.1]]))


def example_c() -> nn.Sequential:
    return chain(torch.tensor([[2.0], [1.0]]), torch.ones(2, 2), torch.ones(1, 2))


def wide_chain(seed: int) -> nn.Sequential:
    """Return 1-10-10-1 with weights uniform in [0.5, 1.5]."""
    draw = generator(seed, "chain")
    return chain(*(torch.rand(shape, generator=draw) + 0.5 for shape in ((10, 1), (10, 10), (1, 10))))


def small_cnn(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return a chain of convolutions, BN and a linear layer, as after some training: no statistic is trivial."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), activation(), nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), activation(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(6, 4),
    )  # fmt: skip
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                module.weight.normal_()
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model


@dataclass
class Rounds:
    """What each round of a pruning saw and kept."""

    flows: list[synaptic_flow.Flow] = field(default_factory=list)
    kept: list[dict[str, Tensor]] = field(default_factory=list)
    reports: list[str] = field(default_factory=list)


def context_for(model: nn.Module, image_size: int, seen: Rounds) -> Context:
    context = context_of(model, {}, image_size=image_size)
    context.dataset = SimpleNamespace(info=SimpleNamespace(image_size=image_size))  # no images: none are needed
    context.report = seen.reports.append
    return context


def prune(model: nn.Module, monkeypatch: pytest.MonkeyPatch, image_size: int = 1, **options: Any) -> Rounds:
    """Choose masks with the method and return what happened in each round; the last masks are the result."""
    seen, score, method = Rounds(), synaptic_flow.flow, make("synflow", **options)

    def flow(model: nn.Module, tensors: dict[str, Tensor], names: list[str], image: Tensor) -> synaptic_flow.Flow:
        if seen.flows:
            seen.kept.append({name: tensors[name] != 0 for name in names})
        seen.flows.append(score(model, tensors, names, image))
        return seen.flows[-1]

    monkeypatch.setattr(synaptic_flow, "flow", flow)
    seen.kept.append(method.choose(context_for(model, image_size, seen)))
    monkeypatch.setattr(synaptic_flow, "flow", score)
    return seen


def counts(masks: dict[str, Tensor]) -> list[int]:
    return [int(mask.sum()) for mask in masks.values()]


def flow_of(model: nn.Module, image_size: int = 1) -> synaptic_flow.Flow:
    """Return the flow of a network in evaluation mode in float64."""
    names = [layer.parameter for layer in select_layers(model)]
    image = torch.ones(1, 3, image_size, image_size, dtype=torch.float64)
    return synaptic_flow.flow(model.eval(), synaptic_flow.positive_form(model, torch.float64), names, image)


def assert_scores(found: dict[str, Tensor], *wanted: list) -> None:
    for score, values in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(score, torch.tensor(values, dtype=torch.float64), rtol=1e-6, atol=0)


# Worked examples


def test_scores_of_two_layers():
    flow = flow_of(example_b())
    assert flow.total == pytest.approx(1.85) and flow.conserved == pytest.approx(1)
    assert_scores(flow.scores, [[0.5, 1.0], [0.3, 0.05]], [[1.5, 0.35]])


def test_four_linear_rounds_on_two_layers(monkeypatch):
    seen = prune(example_b(), monkeypatch, sparsity=4 / 6, rounds=4, schedule="linear")
    assert [flow.total for flow in seen.flows] == pytest.approx([1.85, 1.80, 1.50, 1.50])
    assert [6 - sum(counts(kept)) for kept in seen.kept] == [1, 2, 3, 4]
    first, second = seen.kept[-1].values()
    assert first.tolist() == [[False, True], [False, False]] and second.tolist() == [[True, False]]


def test_one_shot_empties_the_middle_layer(monkeypatch):
    seen = prune(example_c(), monkeypatch, sparsity=5 / 8, rounds=1)
    assert seen.flows[0].total == 6
    assert_scores(seen.flows[0].scores, [[4], [2]], [[2, 1], [2, 1]], [[3, 3]])
    first, middle, last = seen.kept[-1].values()
    assert first.flatten().tolist() == [True, False] and not middle.any() and last.all()


def test_one_weight_at_a_time_keeps_a_path(monkeypatch):
    model = example_c()
    seen = prune(model, monkeypatch, sparsity=5 / 8, rounds=5, schedule="linear")
    gone, before = [], {name: torch.ones_like(mask) for name, mask in seen.kept[0].items()}
    for kept in seen.kept:
        gone += [(name[0], *position) for name in kept for position in (before[name] & ~kept[name]).nonzero().tolist()]
        before = kept
    assert gone == [("3", 1, 1), ("3", 0, 1), ("1", 1, 0), ("5", 0, 1), ("3", 1, 0)]
    with torch.no_grad():
        for name, mask in seen.kept[-1].items():
            model.get_parameter(name).mul_(mask)
    assert flow_of(model).total == 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("keep", "sparsity"), [(3, 0.975), (6, 0.95), (12, 0.9)])
def test_rounds_avoid_the_collapse_of_one_shot(keep, sparsity, seed, monkeypatch):
    one_shot = counts(prune(wide_chain(seed), monkeypatch, sparsity=sparsity, rounds=1).kept[-1])
    rounds = counts(prune(wide_chain(seed), monkeypatch, sparsity=sparsity, rounds=10).kept[-1])
    assert sum(one_shot) == sum(rounds) == keep
    assert one_shot[1] == 0 and min(rounds) > 0
    if keep == 3:  # the most a network of three layers can be compressed
        assert rounds == [1, 1, 1]


# Conservation


def test_every_layer_of_a_chain_carries_all_of_the_flow():
    flow = flow_of(small_cnn(), image_size=8)
    assert flow.total > 0 and flow.conserved == pytest.approx(1, rel=1e-12)
    assert [float(score.sum()) for score in flow.scores.values()] == pytest.approx([flow.total] * 3, rel=1e-9)
    assert all(bool((score >= 0).all()) for score in flow.scores.values())


def test_hidden_units_pass_on_what_enters_them():
    scores = list(flow_of(wide_chain(0)).scores.values())
    torch.testing.assert_close(scores[0].sum(1), scores[1].sum(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(scores[1].sum(1), scores[2].sum(0), rtol=1e-9, atol=0)


def test_signs_of_weights_do_not_matter():
    model = small_cnn()
    before = flow_of(model, image_size=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.randn_like(parameter).sign())
    after = flow_of(model, image_size=8)
    assert after.total == before.total
    assert all(torch.equal(after.scores[name], score) for name, score in before.scores.items())


def test_positive_form_has_no_additive_terms():
    model = small_cnn()
    form = synaptic_flow.positive_form(model, torch.float64)
    assert {name for name, value in form.items() if not value.any()} == {
        "0.bias", "1.bias", "1.running_mean", "5.bias", "5.running_mean", "10.bias"
    }  # fmt: skip
    assert all(value.dtype == torch.float64 and bool((value >= 0).all()) for value in form.values())
    assert torch.equal(form["1.running_var"], model[1].running_var.double())
    assert not any(name.endswith("num_batches_tracked") for name in form)


# The network afterwards


def test_choosing_leaves_no_trace_on_the_network(monkeypatch):
    model = small_cnn().train().to(memory_format=torch.channels_last)
    model[1].eval()
    model[10].bias.requires_grad_(False)
    with torch.no_grad():
        model[0].weight[0] = -0.0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    prune(model, monkeypatch, image_size=8, rounds=3)
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype and value.stride() == before[name].stride(), name
        assert torch.equal(value, before[name]) and torch.equal(value.signbit(), before[name].signbit()), name
    assert [module.training for module in model] == [index != 1 for index in range(len(model))]
    assert [n for n, p in model.named_parameters() if not p.requires_grad or p.grad is not None] == ["10.bias"]
    assert torch.equal(torch.get_rng_state(), random)


def test_the_memory_format_of_the_network_does_not_matter(monkeypatch):
    one = prune(small_cnn(), monkeypatch, image_size=8, rounds=4).kept[-1]
    other = prune(small_cnn().to(memory_format=torch.channels_last), monkeypatch, image_size=8, rounds=4).kept[-1]
    assert all(torch.equal(one[name], other[name]) for name in one)


# Counts


@pytest.mark.parametrize("schedule", ["exponential", "linear"])
@pytest.mark.parametrize("distribution", ["global", "uniform", "erk"])
def test_every_round_is_exact_and_nested(distribution, schedule, monkeypatch):
    options = {"distribution": distribution, "schedule": schedule, "rounds": 37, "sparsity": 0.873}
    seen = prune(small_cnn(), monkeypatch, image_size=8, first_layer="sparse", **options)
    density = 1 - 0.873
    for index, kept in enumerate(seen.kept, start=1):
        level = density ** (index / 37) if schedule == "exponential" else 1 - (1 - density) * index / 37
        assert sum(counts(kept)) == pytest.approx(672 * level, abs=0.5 + 1e-6)
    assert sum(counts(seen.kept[-1])) == num_keep_total(672, 0.873) and len(seen.kept) == 37
    for larger, smaller in zip(seen.kept, seen.kept[1:], strict=False):
        assert not any(bool((smaller[name] & ~larger[name]).any()) for name in larger)
    for flow, kept in zip(seen.flows[1:], seen.kept, strict=False):
        assert not any(bool(flow.scores[name][~kept[name]].any()) for name in kept)


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
def test_layers_end_with_the_counts_of_the_distribution(distribution, monkeypatch):
    options = {"distribution": distribution, "sparsity": 0.9, "first_layer": "sparse"}
    model = small_cnn()
    seen = prune(model, monkeypatch, image_size=8, rounds=100, **options)
    expected = make("synflow", **options).allocate(context_of(model, {}, image_size=8), 0.9)
    assert dict(zip(seen.kept[-1], counts(seen.kept[-1]), strict=True)) == expected


def test_rounds_go_straight_to_the_densities_of_a_file(tmp_path, monkeypatch):
    (tmp_path / "d.json").write_text('{"0": 0.5, "4": 0.25, "10": 0.75}')  # 108 of 216, 108 of 432, 18 of 24
    options = {"distribution": "file", "densities": str(tmp_path / "d.json"), "sparsity": 1 - 234 / 672}
    seen = prune(small_cnn(), monkeypatch, image_size=8, rounds=3, schedule="linear", first_layer="sparse", **options)
    assert [counts(kept) for kept in seen.kept] == [[180, 324, 22], [144, 216, 20], [108, 108, 18]]


def test_a_validation_scores_once_and_cuts_all_at_once(monkeypatch):
    calls, score = [], synaptic_flow.flow
    monkeypatch.setattr(synaptic_flow, "flow", lambda *args: calls.append(0) or score(*args))
    context = context_for(small_cnn(), 8, Rounds())
    context.validating = True
    assert sum(counts(make("synflow").choose(context))) == num_keep_total(672, 0.9) and len(calls) == 1


def test_cost_is_three_forward_passes_of_one_image_per_round():
    context = context_of(small_cnn(), {}, image_size=8)
    assert make("synflow", rounds=7).phase_cost(context) == 3 * 7 * (3 * 8 * 9 * 64 + 8 * 6 * 9 * 16 + 24)


def test_inverted_scores_keep_the_lowest_that_carry_flow(monkeypatch):
    model = chain(torch.tensor([[4.0], [3.0], [2.0], [0.0]]), torch.ones(1, 4))
    seen = prune(model, monkeypatch, sparsity=5 / 8, rounds=5, schedule="linear", control="invert")
    # Scores are 4, 3, 2, 0 in both layers: the pair without flow goes in two rounds, then the strongest path.
    first, second = ([kept[name].flatten().tolist() for kept in seen.kept[2:]] for name in ("1.weight", "3.weight"))
    assert second == [[False, True, True, False], [False, True, True, False], [False, False, True, False]]
    assert first == [[True, True, True, False], [False, True, True, False], [False, True, True, False]]


# Activations


class Functional(nn.Module):
    """The chain of `small_cnn` with activations called as functions."""

    def __init__(self, activation) -> None:
        super().__init__()
        self.chain, self.activation = small_cnn(nn.Identity), activation

    def forward(self, x: Tensor) -> Tensor:
        for module in self.chain:
            x = module(x)
            if isinstance(module, nn.BatchNorm2d):
                x = self.activation(x)
        return x


class Gated(nn.Module):
    """A convolution whose channels are gated as in squeeze-and-excitation."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.excite = nn.Conv2d(4, 4, 1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * self.gate(self.excite(x.mean((2, 3), keepdim=True)))


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.ReLU6, "relu6/hardtanh"),
        (lambda: nn.ReLU6(inplace=True), "relu6/hardtanh"),
        (nn.Hardswish, "hardswish"),
        (lambda: nn.Hardswish(inplace=True), "hardswish"),
        (nn.SiLU, "silu"),
        (nn.GELU, "gelu"),
        (nn.Mish, "mish"),
        (nn.ELU, "elu"),
        (nn.Tanh, "tanh"),
        (lambda: F.relu6, "relu6/hardtanh"),
        (lambda: F.hardswish, "hardswish"),
        (lambda: F.silu, "silu"),
        (lambda: torch.tanh, "tanh"),
        (lambda: lambda x: x.tanh(), "tanh"),
        (lambda: lambda x: F.silu(x).mul_(2).mul_(0.5), "silu"),
        (lambda: lambda x: x * x.sigmoid(), "sigmoid"),
    ],
)
def test_saturating_activations_count_as_relu(activation, name):
    plain, flow = flow_of(small_cnn(), image_size=8), flow_of(Functional(activation()), image_size=8)
    assert dict(flow.replaced) == {name: 2} and not plain.replaced
    assert flow.total == plain.total
    for one, other in zip(flow.scores.values(), plain.scores.values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("gate", [nn.Sigmoid, nn.Hardsigmoid, lambda: nn.Hardsigmoid(inplace=True)])
def test_gates_let_everything_pass(gate):
    flow = flow_of(Gated(gate()), image_size=4)
    assert flow.conserved == pytest.approx(1) and sum(flow.replaced.values()) == 1
    assert float(flow.scores["conv.weight"].sum()) == pytest.approx(flow.total)
    assert not flow.scores["excite.weight"].any()


def test_replacements_and_layers_without_flow_are_named(monkeypatch):
    seen = prune(nn.Sequential(Gated(nn.Sigmoid()), nn.ReLU6()), monkeypatch, image_size=4, rounds=2, sparsity=0.5)
    assert any("relu6/hardtanh (1), sigmoid (1)" in line for line in seen.reports)
    assert any(line.startswith("no flow reaches 1 layers") and "0.excite" in line for line in seen.reports)


@pytest.mark.parametrize(
    "activation",
    [
        lambda x: x * torch.clamp(x, max=2.0),  # no function that could be replaced
        lambda x: F.layer_norm(x, x.shape[1:]) + 1,
    ],
)
def test_flow_that_is_not_conserved_is_reported(activation, monkeypatch):
    seen = prune(Functional(activation), monkeypatch, image_size=8, rounds=2)
    assert any(line.startswith("flow is not conserved") for line in seen.reports)


def test_a_plain_relu_network_has_nothing_to_report(monkeypatch):
    assert prune(small_cnn(), monkeypatch, image_size=8, rounds=3).reports == []


# Range of the number format


def overflowing() -> nn.Sequential:
    return chain(*(torch.full((1, 1), 1e20) for _ in range(3)))


def test_overflow_in_float32_names_the_format_to_use(monkeypatch):
    with pytest.raises(UserError, match=r"method\.dtype=float32: .*round 1 .*inf.*use method\.dtype=float64"):
        prune(overflowing(), monkeypatch, dtype="float32", sparsity=0.1)
    prune(overflowing(), monkeypatch, dtype="float64", sparsity=0.1)


def test_overflow_in_float32_is_found_before_the_run():
    context = opened(overflowing(), 1, validating=True)
    with pytest.raises(UserError, match=r"use method\.dtype=float64"):
        make("synflow", dtype="float32", sparsity=0.1, samples_per_class=1).setup(context)
    make("synflow", dtype="float64", sparsity=0.1, samples_per_class=1).setup(context)


def test_float32_is_warned_about(monkeypatch):
    assert "float64" in prune(small_cnn(), monkeypatch, image_size=8, rounds=1, dtype="float32").reports[0]


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_weights_that_are_not_finite_are_refused(value, monkeypatch):
    model = small_cnn()
    with torch.no_grad():
        model[4].weight[0, 0] = value
    with pytest.raises(UserError, match=r"method\.dtype=float64: .*weights that are not finite"):
        prune(model, monkeypatch, image_size=8)


def test_scores_beyond_the_format_are_refused_though_the_sum_is_finite(monkeypatch):
    model = chain(torch.tensor([[1e-30]]), torch.tensor([[1e38]]), torch.tensor([[1e20]]))  # gradient 1e58, R 1e28
    with pytest.raises(UserError, match=r"method\.dtype=float32: .*1e\+28"):
        prune(model, monkeypatch, dtype="float32", sparsity=0.1)


def network(name: str, image_size: int, num_classes: int) -> nn.Module:
    options = [f"model={name}", f"dataset.image_size={image_size}", "dataset=fake"]
    (config,) = compose_checked(CONF, options, sweep=False)
    torch.manual_seed(0)
    return models.build(config.model, num_classes=num_classes, image_size=image_size)


@pytest.mark.parametrize(
    ("name", "image_size", "num_classes", "power"),
    [
        ("resnet20", 32, 10, 24),
        pytest.param("resnet110", 32, 10, 138, marks=pytest.mark.slow),
        pytest.param("resnet50", 224, 1000, 72, marks=pytest.mark.slow),
    ],
)
def test_deep_networks_stay_within_float64(name, image_size, num_classes, power):
    flow = flow_of(network(name, image_size, num_classes), image_size)
    assert 10 ** (power - 1) < flow.total < 10 ** (power + 2)
    assert all(bool(torch.isfinite(score).all()) for score in flow.scores.values())


# Refused and reported


def opened(model: nn.Module, image_size: int, **changes: Any) -> Context:
    context = context_for(model, image_size, Rounds())
    labels, info = torch.arange(40) % 4, SimpleNamespace(image_size=image_size, num_classes=4)
    context.dataset = SimpleNamespace(info=info, train_labels=labels)
    for name, value in changes.items():
        setattr(context, name, value)
    return context


def test_a_floor_above_the_budget_is_refused():
    with pytest.raises(UserError, match=r"method\.min_per_layer=30 keeps 84 weights, method\.sparsity=0\.9 only 67"):
        make("synflow", min_per_layer=30).setup(opened(small_cnn(), 8))
    make("synflow", min_per_layer=20).setup(opened(small_cnn(), 8))


def test_float64_is_refused_where_the_device_has_none(monkeypatch):
    monkeypatch.setattr(Context, "device", SimpleNamespace(type="mps"))
    with pytest.raises(UserError, match=r"method\.dtype=float64: MPS"):
        make("synflow").setup(opened(small_cnn(), 8))


def test_fewer_weights_than_layers_are_refused():
    with pytest.raises(UserError, match=r"method\.sparsity=0\.999 leaves 1 weights for 3 layers"):
        make("synflow", sparsity=0.999).setup(opened(small_cnn(), 8))


def test_layers_at_the_floor_are_named(monkeypatch):
    seen = prune(example_c(), monkeypatch, sparsity=5 / 8, rounds=1, min_per_layer=1)
    assert counts(seen.kept[-1]) == [1, 1, 1]
    assert seen.reports == ["layers held at method.min_per_layer=1: 1, 3, 5"]
