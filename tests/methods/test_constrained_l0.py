"""Constrained L0: multipliers by hand, constraints and their derivatives, feasibility in runs, refusals."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prune_lab.accounting.costs import profile, sparse_macs
from prune_lab.cli import command as cli
from prune_lab.pruning.channels.costs import ChannelCosts
from prune_lab.pruning.channels.groups import channel_groups, channel_map
from prune_lab.pruning.gates import hard_concrete as hc
from prune_lab.pruning.gates.hard_concrete import Term
from prune_lab.pruning.gates.multipliers import ascend, dual_rate
from prune_lab.pruning.masks.distributions import num_keep_total
from tests.helpers.method_runs import configure, finish, last_result, make, summary
from tests.methods.test_l0 import LABELS, do_step, load_dense, network, set_up, spread_gates, trained

NAME = "constrained_l0"
TARGET = {"constrain": "model", "sparsity": 0.5}


# Multipliers

DENSITIES = [0.9, 0.8, 0.6, 0.55, 0.49, 0.45, 0.52]


@pytest.mark.parametrize(
    ("restart", "expected"),
    [
        (True, [0.04, 0.07, 0.08, 0.085, 0.0, 0.0, 0.002]),
        (False, [0.04, 0.07, 0.08, 0.085, 0.084, 0.079, 0.081]),
    ],
)
def test_multiplier_at_target_one_half(restart: bool, expected: list[float]) -> None:
    value, seen = torch.zeros(1, dtype=torch.float64), []
    for density in DENSITIES:
        value = ascend(value, torch.tensor([density - 0.5], dtype=torch.float64), lr=0.1, restart=restart)
        seen.append(value.item())
    assert seen == pytest.approx(expected, abs=1e-9)


def test_a_target_met_exactly_does_not_restart() -> None:
    held = ascend(torch.tensor([0.3, 0.3, 0.3]), torch.tensor([0.0, -1e-6, 1.0]), lr=0.1, restart=True)
    assert held.tolist() == pytest.approx([0.3, 0.0, 0.4])


def test_multipliers_are_never_negative() -> None:
    low = ascend(torch.tensor([0.01]), torch.tensor([-0.9]), lr=0.1, restart=False)
    assert low.item() == 0


def test_rates_without_a_given_one() -> None:
    """0.01 x gates / steps: the published WRN-28-10 (4480 filters, 78200 steps, 7e-4) lies within a factor of 1.3."""
    assert dual_rate(4480, 78_200) == pytest.approx(7e-4, rel=0.3)
    method, _ = set_up(network(), NAME, sparsity=0.5, constrain="layer", macs_ratio=0.9, dual_lr=None)
    sizes = [162, 216, 80]
    assert method.rates.tolist() == pytest.approx([size / 10_000 for size in (*sizes, sum(sizes))])
    method, _ = set_up(network(), NAME, **TARGET, dual_lr=0.25)
    assert method.rates.tolist() == [0.25]


# Constraints


def test_density_of_a_model_is_the_mean_over_its_weights() -> None:
    """Layers of 100 and 300 weights with densities 0.5 and 0.9: 0.8."""
    matrix = hc.cost_matrix([Term(100 / 400, rows=0), Term(300 / 400, rows=1)], 2)
    assert hc.expected_cost(torch.tensor([0.5, 0.9]), matrix)[0].item() == pytest.approx(0.8)


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_model_density_is_the_weighted_mean_of_layers(granularity: str) -> None:
    whole, _ = set_up(network(), NAME, **TARGET, granularity=granularity)
    each, _ = set_up(network(), NAME, sparsity=0.5, constrain="layer", granularity=granularity)
    for method in (whole, each):
        spread_gates(method)
    layers, _ = each._constrained(each.open_fractions())
    sizes = torch.tensor([float(group.weights) for group in each.layout_of.groups])
    density, _ = whole._constrained(whole.open_fractions())
    assert density.item() == pytest.approx(float((layers * sizes).sum() / sizes.sum()))
    assert sizes.tolist() == ([162, 216, 80] if granularity == "weight" else [162, 216])


def test_expected_macs_are_the_mean_over_draws() -> None:
    """Over all 1024 states of 10 channels, with their probabilities."""
    method, context = set_up(network(depthwise=True), NAME, sparsity=None, macs_ratio=0.8, granularity="filter")
    spread_gates(method, -3.0, 0.0)
    opened = hc.open_probability(method.log_alpha.detach())
    (expected,), _ = method._constrained(method.open_fractions())
    mean = 0.0
    for state in itertools.product([0.0, 1.0], repeat=10):
        gates = torch.tensor(state)
        masks = method.layout_of.masks(context.model, gates)
        macs = sparse_macs(context.costs, {path: int(mask.sum()) for path, mask in masks.items()})
        mean += macs * torch.where(gates > 0, opened, 1 - opened).prod().item()
    assert expected.item() == pytest.approx(mean / context.dense_macs, rel=1e-4) and 0 < expected.item() < 0.9


def test_expected_macs_of_single_weights() -> None:
    method, context = set_up(network(), NAME, sparsity=None, macs_ratio=0.8)
    spread_gates(method)
    kept = method.open_fractions() * torch.tensor([162.0, 216.0, 80.0])
    macs = (kept * torch.tensor([64.0, 64.0, 1.0])).sum().item()  # positions of each layer
    (expected,), _ = method._constrained(method.open_fractions())
    assert expected.item() == pytest.approx(macs / context.dense_macs)


@pytest.mark.parametrize(
    "options", [TARGET, {"sparsity": 0.5, "constrain": "layer"}, {"sparsity": None, "macs_ratio": 0.6},
                {"sparsity": 0.5, "constrain": "layer", "macs_ratio": 0.6}], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_price_is_the_derivative_of_the_lagrangian(granularity: str, options: dict[str, Any]) -> None:
    method, context = set_up(network(), NAME, granularity=granularity, **options)
    spread_gates(method)
    method.multipliers = torch.linspace(1, 2, len(method.targets))
    opened = hc.open_probability(method.log_alpha.detach()).requires_grad_()
    values, _ = method._constrained(method.layout_of.fractions(opened))
    (expected,) = torch.autograd.grad((method.multipliers * (values - method.targets)).sum(), opened)
    torch.testing.assert_close(method.price(context, opened.detach()), expected)
    assert bool((expected > 0).all())


def test_met_constraints_do_not_push() -> None:
    method, context = set_up(network(), NAME, **TARGET, dual_lr=1.0, decay_moves_gates=False, gate_lr=1e-9)
    method.multipliers.fill_(3.0)
    method.log_alpha.data.fill_(-3.0)  # P(open) 0.198, target 0.5
    do_step(method, context)
    assert method.multipliers.item() == 0
    assert not method.price(context, hc.open_probability(method.log_alpha.detach())).any()


def test_a_layer_with_a_target_of_all_its_weights_is_left_alone() -> None:
    targets = [0.0, 0.9, 0.9]
    method, context = set_up(network(), NAME, sparsity=0.9, constrain="layer", layer_sparsities=targets, dual_lr=1.0)
    for step in range(3):
        do_step(method, context, step)
    assert method.multipliers[0] == 0 and bool((method.multipliers[1:] > 0).all())


def test_constraints_do_not_depend_on_the_batch() -> None:
    found = []
    for step in (0, 9):  # other draws, other losses
        method, context = set_up(network(seed=step), NAME, **TARGET)
        method.log_alpha.data.fill_(1.0)
        do_step(method, context, step, after=False)
        found.append(method.violations)
    assert torch.equal(*found) and len(LABELS) == 16


def test_gates_and_multipliers_move_at_once() -> None:
    """The first step has no price yet; the multiplier follows the density before the step."""
    method, context = set_up(network(), NAME, **TARGET, dual_lr=0.1, gate_lr=1.0, gate_optimizer="sgd")
    before = method.open_fractions()
    density = method._constrained(before)[0].item()
    do_step(method, context)
    assert method.multipliers.item() == pytest.approx(0.1 * (density - 0.5), rel=1e-5)
    grad = method.log_alpha.grad.clone()
    do_step(method, context, 1)
    priced = method.log_alpha.grad
    assert not torch.equal(grad, priced)


# Runs


def rows(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["phase"] == "train"]


def run(folder: Path, *options: str, **kwargs: Any) -> Path:
    return finish(configure(folder, NAME, "method.macs_ratio=null", "method.rounding=gates", *options, **kwargs))


@pytest.mark.parametrize(
    "options",
    [
        ["method.sparsity=0.7"],
        ["method.sparsity=0.7", "method.constrain=layer"],
        ["method.sparsity=0.6", "method.granularity=filter"],
        ["method.sparsity=null", "method.macs_ratio=0.8", "method.granularity=filter"],
    ],
    ids=" ".join,
)
def test_targets_are_met_with_a_strong_push(options: list[str], tmp_path: Path) -> None:
    folder = run(tmp_path, *options)
    written, last = summary(folder), rows(folder)[-1]
    assert rows(folder)[0]["l0/feasible"] == 0 and rows(folder)[0]["l0/violation"] > 0.01
    assert written["l0/feasible"] == 1 and written["l0/violation"] <= 0.01
    assert last["l0/expected_density"] == written["l0/expected_density"]
    if "method.constrain=layer" in options or "method.granularity=filter" not in options:
        assert written["l0/expected_density"] <= 0.31
        assert written["sparsity/requested"] == 0.7
    else:
        assert written["sparsity/requested"] is None
    if "method.macs_ratio=0.8" in options:
        assert written["l0/expected_macs"] <= 0.81 and written["macs/inference"] < 0.9 * written["macs/dense"]


def test_gates_that_hardly_move_are_reported_as_infeasible(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = run(tmp_path, "method.gate_lr=1e-6", "method.dual_lr=1e-6")
    assert summary(folder)["l0/feasible"] == 0
    assert summary(folder)["l0/expected_density"] == pytest.approx(0.9780, abs=1e-3)
    assert "the target is missed by 0.778 (l0/violation); raise method.dual_lr" in capsys.readouterr().out


@pytest.mark.parametrize(("rate", "closed"), [(1e-6, False), (1.0, True)])
def test_exact_rounding_keeps_the_highest_gates(rate: float, closed: bool, tmp_path: Path) -> None:
    """From too many open gates and from too few."""
    options = (f"method.gate_lr={rate}", "method.rounding=exact", "method.macs_ratio=null", "method.sparsity=0.3337")
    if closed:
        options = (*options, "method.dual_restart=false")
    result = last_result(finish(configure(tmp_path, NAME, *options)))
    log_alpha = result["method"]["log_alpha"]
    kept = torch.cat([mask.flatten() for mask in result["masks"].values()])
    num_open = int((hc.fixed_gate(log_alpha, "median") > 0).sum())
    num_keep = num_keep_total(len(kept), 0.3337)
    assert int(kept.sum()) == num_keep and (num_open < num_keep if closed else num_open == len(kept))
    assert log_alpha[kept].min() >= log_alpha[~kept].max()
    weights = torch.cat([result["model"][path].flatten() for path in result["masks"]])
    assert bool((weights[kept] != 0).all()) and not weights[~kept].any()


CHANNELS = ("method.granularity=filter", "method.rounding=exact", "method.sparsity=null")


@pytest.mark.parametrize("options", [("method.gate_lr=1e-6",), ("method.gate_lr=1", "method.dual_restart=false")])
def test_exact_rounding_meets_the_macs_with_the_highest_gates(options: tuple[str, ...], tmp_path: Path) -> None:
    """From too many open gates and from too few: no other channel of a gated layer would fit."""
    folder = finish(configure(tmp_path, NAME, *CHANNELS, "method.macs_ratio=0.6", *options))
    written, result = summary(folder), trained(folder)
    model = load_dense()
    channels, groups = channel_map(model, 16), channel_groups(model, 16)
    costs = ChannelCosts(model, channels, profile(model, 16))
    alive = ~channels.dead(result["masks"])
    counts = costs.kept(alive)
    assert written["macs/inference"] == costs.at("macs", counts) <= 0.6 * written["macs/dense"]
    num_open = int((hc.fixed_gate(result["method"]["log_alpha"], "median") > 0).sum())
    num_gates, num_gone = len(result["method"]["log_alpha"]), channels.num_classes - int(counts.sum())
    assert num_open == num_gates if len(options) == 1 else num_open < num_gates - num_gone
    for group, a in zip(groups, result["method"]["log_alpha"].split([g.size for g in groups]), strict=True):
        kept = alive[channels.rows[group.producer]]
        assert kept.any() and (kept.all() or a[kept].min() >= a[~kept].max())
        lane = [lane.producers[0] for lane in channels.lanes].index(group.producer)
        more = counts.copy()
        more[lane] += 1
        assert kept.all() or costs.at("macs", more) > 0.6 * written["macs/dense"]


def test_the_start_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(tmp_path, "method.sparsity=0.05", "method.drop_rate=0.9", "schedule.train.epochs=1",
        "schedule.train.warmup_epochs=0")  # fmt: skip
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.startswith("gates: ")]
    assert " on 20 layers; expected at the start: density 0.3546 (target 0.95); 1 of 1 targets are met before" in line


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["method.sparsity=0"], "method.sparsity must lie in (0, 1)"),
        (["method.sparsity=null"], "method.sparsity and method.macs_ratio are both null"),
        (["method.sparsity=0.96"], "method.sparsity=0.96: clamped gates are open with a probability of 0.04713 at"),
        (["method.constrain=layer", "method.layer_sparsities=[0.5,0.96]"], "layer_sparsities[1]=0.96: clamped"),
        (["method.constrain=layer", "method.layer_sparsities=[0.5,1]"], "layer_sparsities[1] must lie in [0, 1)"),
        (["method.constrain=layer", "method.layer_sparsities=[0.5,0.7]"], "has 2 targets for 20 gated layers"),
        (["method.layer_sparsities=[0.5]"], "method.layer_sparsities goes with method.constrain=layer, got model"),
        (["method.constrain=layer", "method.sparsity=null", "method.macs_ratio=0.5"], "constrain=layer needs"),
        (["method.rounding=exact", "method.constrain=layer"], "method.constrain=model, got 0.9 and layer"),
        (["method.rounding=exact", "method.sparsity=null", "method.macs_ratio=0.5"], "got null and model"),
        (["method.rounding=exact", "method.granularity=filter"], "meets method.macs_ratio alone: set it, and"),
        ([*CHANNELS, "method.sparsity=0.5", "method.macs_ratio=0.5"], "method.sparsity=null; got 0.5 and 0.5"),
        ([*CHANNELS, "method.macs_ratio=0.03", "method.clamp_gates=false"], "0.03 is out of reach: the smallest"),
        (["method.macs_ratio=1.5"], "method.macs_ratio must lie in (0, 1)"),
        (["method.macs_ratio=0.01"], "method.macs_ratio=0.01 is out of reach: 0.04713 of the MACs are in layers"),
        (["method.dual_lr=0"], "method.dual_lr must lie in (0, inf)"),
        (["method.penalty=0.1"], "unknown option method.penalty: the price of open gates is found by the multipliers"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_options_are_refused_in_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    assert cli.main([f"method={NAME}", "dataset=fake", f"output_dir={tmp_path}/outputs", *options]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert not list(tmp_path.glob("outputs/*"))


def test_targets_below_the_clamp_are_reached_without_it() -> None:
    method = make(NAME, sparsity=0.99, clamp_gates=False)
    assert method.requested_sparsity() == 0.99
    assert make(NAME, sparsity=0.9, granularity="filter").requested_sparsity() is None


@pytest.mark.parametrize(
    ("exact", "options"),
    [
        (True, {}),
        (True, {"granularity": "filter", "sparsity": None, "macs_ratio": 0.5}),
        (False, {"rounding": "gates"}),
        (False, {"constrain": "layer"}),
        (False, {"macs_ratio": 0.5}),
        (False, {"sparsity": None, "macs_ratio": 0.5}),
        (False, {"granularity": "filter"}),
    ],
    ids=str,
)
def test_the_end_is_rounded_to_the_budget_where_that_is_the_only_target(exact: bool, options: dict[str, Any]) -> None:
    assert make(NAME, **options).budget_is_exact() == exact


def flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def test_spreading_is_the_derivative_of_the_means() -> None:
    method, _ = set_up(network(), NAME, **TARGET)
    values = torch.rand(method.layout_of.num_gates, generator=torch.Generator().manual_seed(0)).requires_grad_()
    slopes = torch.tensor([3.0, -1.0, 2.0])
    (expected,) = torch.autograd.grad((method.layout_of.fractions(values) * slopes).sum(), values)
    torch.testing.assert_close(method.layout_of.spread(slopes), expected)
    assert torch.equal(flat(method.layout_of.parts(values)), values)
