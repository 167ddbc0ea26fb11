"""Sparse momentum: the worked example, what its momentum must hold, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from prune_lab.cli import command as cli
from prune_lab.core.context import Context
from prune_lab.foundations.errors import UserError
from prune_lab.pipeline import runner
from prune_lab.training.loop import TrainState
from tests.helpers.contexts import context_of
from tests.helpers.method_runs import configure, finish, make, run_folder, summary, watch


def example(claim_a: float = 0.3, claim_b: float = 0.1) -> Context:
    """Return two layers of 40 and 200 weights with 10 and 20 kept; |momentum| as given."""
    model = nn.Sequential(nn.Conv2d(3, 10, 1, bias=False), nn.Flatten(), nn.Linear(40, 5, bias=False))
    model[0] = nn.Conv2d(4, 10, 1, bias=False)
    masks = {"0.weight": torch.zeros(10, 4, 1, 1, dtype=torch.bool), "2.weight": torch.zeros(5, 40, dtype=torch.bool)}
    masks["0.weight"].view(-1)[:10] = True
    masks["2.weight"].view(-1)[:20] = True
    with torch.no_grad():
        for weight in (model[0].weight, model[2].weight):
            weight.copy_(torch.arange(1.0, weight.numel() + 1).view_as(weight))
    context = context_of(model, {}, image_size=2, channels=4)
    for weight, claim in ((model[0].weight, claim_a), (model[2].weight, claim_b)):
        rising = torch.linspace(0.5, 1.5, weight.numel()).view_as(weight)  # absent positions differ in their momentum
        buffer = torch.where(masks["0.weight" if weight.dim() == 4 else "2.weight"], claim * torch.ones(()), rising)
        context.optimizer.state[weight]["momentum_buffer"] = -buffer  # the sign must not matter
    context.install_masks(masks)
    return context


def snfs(**changes):
    return make("snfs", **changes)


def test_exact_apportionment_of_the_example():
    context = example()
    snfs(decay="constant").update(context, 0)
    assert context.masks.counts() == {"0.weight": 16, "2.weight": 14}


def test_official_apportionment_of_the_example():
    context, method = example(), snfs(decay="constant", apportion="official")
    method.update(context, 0)
    assert context.masks.counts() == {"0.weight": 17, "2.weight": 14}
    assert method.residuals == [-1]
    assert method.adjustment == pytest.approx(-1.75)
    assert not method.budget_is_exact()


def test_official_correction_uses_the_distance_from_the_first_total():
    """total 31 after one update: the next residual counts from 30, not from 31."""
    method = snfs(apportion="official")
    share = {"a": 0.75, "b": 0.25}
    sizes = {"a": 40, "b": 200}
    method.new_totals(share, {"a": 5, "b": 10}, {"a": 10, "b": 20}, sizes)
    totals = method.new_totals(share, {"a": 8, "b": 7}, {"a": 17, "b": 14}, sizes)  # T = 16, adj = -1.75: 14.25
    assert totals == {"a": 8 + 11, "b": 7 + 4}
    assert method.residuals == [-1, 0]
    assert method.adjustment == pytest.approx(0.25 * -1.75 + 0.75 * 0 - 0.5)


def test_grows_where_the_absent_momentum_is_largest_and_keeps_it():
    context = example()
    weight = context.parameters()["2.weight"]
    before = context.optimizer.state[weight]["momentum_buffer"].clone()
    snfs(decay="constant").update(context, 0)
    new = context.masks.masks["2.weight"].view(-1)
    assert new.nonzero().flatten().tolist() == [*range(10, 20), 196, 197, 198, 199]  # smallest |w| gone
    assert torch.equal(context.optimizer.state[weight]["momentum_buffer"], before)  # official: never masked nor reset
    assert not weight.detach().view(-1)[196:].any()


def test_rate_zero_changes_nothing():
    context = example()
    old = {name: mask.clone() for name, mask in context.masks.masks.items()}
    snfs(alpha=0.0, floor=0.0).update(context, 0)
    assert all(torch.equal(mask, old[name]) for name, mask in context.masks.masks.items())


def test_a_layer_without_momentum_gets_nothing_and_none_at_all_is_an_error():
    context = example(claim_b=0.0)
    snfs(decay="constant").update(context, 0)
    assert context.masks.counts() == {"0.weight": 20, "2.weight": 10}
    with pytest.raises(ValueError, match="claims"):
        snfs().update(example(claim_a=0.0, claim_b=0.0), 0)


def test_no_layer_drops_its_last_weight():
    method = snfs()
    assert [method.num_dropped(0.5, count, ()) for count in (1, 2, 3, 10)] == [0, 1, 2, 5]
    assert method.num_dropped(0.99, 2, ()) == 1
    assert method.num_dropped(0.3, 10, ()) == 3  # 0.3 * 10 is 3.0000000000000004 in binary for some factors


def test_masked_momentum_is_noticed():
    context = example()
    for name, weight in context.parameters().items():
        context.optimizer.state[weight]["momentum_buffer"] *= context.masks.masks[name]
    with pytest.raises(UserError, match="momenta at step 0 are zero"):
        snfs().update(context, 0)


def test_total_is_exact_after_every_step_and_layers_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    totals, layouts, absent = set(), set(), []
    spent, forwards = [0], []

    def look(training: TrainState, step: int) -> None:
        context = training.context
        spent.append(context.cost.total)
        forwards.append(context.cost.forward // 8 - sum(forwards))  # of the step, as masked while it ran
        totals.add(context.masks.num_kept)
        layouts.add(tuple(context.masks.counts().values()))
        for name, mask in context.masks.masks.items():
            momentum = context.optimizer.state[context.parameters()[name]]["momentum_buffer"]
            absent.append(bool(momentum[~mask].any()) or bool(mask.all()))

    watch(monkeypatch, look)
    folder = finish(configure(tmp_path, "snfs", "method.sparsity=0.8"))
    assert len(totals) == 1 and len(layouts) > 1 and all(absent)
    written = summary(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-2]["mask/grown"] == written["mask/grown"] > 0 and rows[-2]["mask/updates"] == 4
    assert written["macs/train"] == spent[-1]
    for step in range(9):  # a dense weight gradient up to the last update, at step 7
        forward = forwards[step]
        assert spent[step + 1] - spent[step] == 8 * (2 * forward + (written["macs/dense"] if step <= 7 else forward))
    mean = sum(forwards[:9]) / 9
    assert written["macs/train_ratio_paper"] == pytest.approx((2 * mean / written["macs/dense"] + 1) / 3)


def test_official_total_differs_from_the_target_and_the_run_says_so(tmp_path: Path):
    rules = ("official", "exact")
    official, exact = (
        summary(finish(configure(tmp_path / rule, "snfs", f"method.apportion={rule}"))) for rule in rules
    )
    assert official["sparsity/requested"] == exact["sparsity/requested"] == 0.8
    assert official["sparsity/achieved"] != exact["sparsity/achieved"]
    assert official["sparsity/achieved"] == pytest.approx(0.8, abs=0.02)


def test_adam_grows_by_its_normalised_mean(tmp_path: Path):
    folder = finish(configure(tmp_path, "snfs", "optimizer=adam", "schedule.train.lr=0.01"))
    assert summary(folder)["sparsity/achieved"] == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("name", ["snfs", "rigl"])
def test_optimizer_without_momentum_is_refused_before_anything_is_written(name, tmp_path: Path, capsys):
    options = ["method.redistribution=momentum", "optimizer.momentum=0", "method.begin=null"]
    config = configure(tmp_path, name, *options)
    with pytest.raises(ValueError, match=r"optimizer\.momentum"):
        runner.run(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["method=snfs", "method.redistribution=none", "method.apportion=official"], "method.apportion"),
        (["method=snfs", "method.floor=0.6"], "method.floor"),
    ],
)
def test_nonsense_is_refused(options, named, capsys):
    assert cli.main(options) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rigl", ["method.redistribution=momentum"]),
        ("rigl", ["method.redistribution=momentum", "method.begin=null", "method.interval=1"]),
        ("snfs", ["method.skip_step_on_update=true", "method.interval=1"]),
        ("snfs", ["method.skip_step_on_update=true", "method.begin=0"]),
    ],
)
def test_momentum_that_does_not_exist_yet_is_refused(name, options, tmp_path: Path):
    with pytest.raises(ValueError, match=r"no momentum at step 0; method\.begin must be null or above 0"):
        runner.run(configure(tmp_path, name, *options))
    assert not list(tmp_path.iterdir())


def test_momentum_after_the_first_step_will_do(tmp_path: Path):
    options = ("method.redistribution=momentum", "method.begin=0", "method.skip_step_on_update=false")
    assert summary(finish(configure(tmp_path, "rigl", *options)))["mask/updates"] > 2


@pytest.mark.parametrize("signal", ["gradient", "momentum"])
def test_rigl_with_redistribution_keeps_the_total_and_moves_layers(signal, tmp_path: Path, monkeypatch):
    totals, layouts = set(), set()

    def look(training: TrainState, step: int) -> None:
        totals.add(training.context.masks.num_kept)
        layouts.add(tuple(training.context.masks.counts().values()))

    watch(monkeypatch, look)
    options = (f"method.redistribution={signal}", "method.begin=null", "method.distribution=uniform")
    config = configure(tmp_path, "rigl", *options)
    finish(config)
    assert len(totals) == 1 and len(layouts) > 1
    assert "layer budgets start as uniform and move" in (run_folder(config) / "log.txt").read_text()
