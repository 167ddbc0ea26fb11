"""Directional pruning as a method: its optimizer, its records, what it leaves behind, what it refuses."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prune_lab.cli import command as cli
from prune_lab.compose.overrides import compose_checked
from prune_lab.config.schedule import PhaseSchedule
from prune_lab.optim.grda import GRDA
from prune_lab.optim.grda_threshold import thresholds
from prune_lab.optim.learning_rate import learning_rate
from prune_lab.pipeline import runner
from prune_lab.pipeline.saved_model import load_model
from prune_lab.training import evaluation, loop
from prune_lab.training.loop import TrainState
from tests.helpers.contexts import context_of
from tests.helpers.method_runs import CONF, TINY, configure, finish, last_result, make, summary, watch


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the records of the training's epochs."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["phase"] == "train"]


def small_network() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, groups=4), nn.Flatten(), nn.Linear(16, 2)]
    return nn.Sequential(*layers)


# Optimizer


@pytest.mark.parametrize(
    ("options", "spared"),
    [
        ({}, []),
        ({"prune_bn": False}, ["1.weight", "1.bias"]),
        ({"prune_bias": False}, ["0.bias", "2.bias", "4.bias"]),
        ({"prune_bn": False, "prune_bias": False}, ["0.bias", "1.weight", "1.bias", "2.bias", "4.bias"]),
    ],
    ids=str,  # of a list: the names of tests must not depend on the order of a set
)
def test_what_is_spared_is_a_group_without_threshold(options: dict[str, bool], spared: list[str]) -> None:
    model = small_network()
    optimizer = make("directional", c=0.3, mu=0.6, **options).build_optimizer(model, None)
    assert isinstance(optimizer, GRDA)
    size = {id(parameter): group["c"] for group in optimizer.param_groups for parameter in group["params"]}
    found = {name: size[id(parameter)] for name, parameter in model.named_parameters()}
    assert found == {name: 0.0 if name in spared else 0.3 for name in found}
    assert {group["mu"] for group in optimizer.param_groups} == {0.6}


def test_frozen_parameters_are_left_out() -> None:
    model = small_network()
    model[0].weight.requires_grad_(False)
    optimizer = make("directional").build_optimizer(model, None)
    (group,) = optimizer.param_groups
    assert all(parameter is not model[0].weight for parameter in group["params"]) and len(group["params"]) == 7


def test_depthwise_weights_count_too() -> None:
    layers = make("directional").layers(small_network())
    assert [(layer.name, layer.eligible) for layer in layers] == [("0", True), ("2", True), ("4", True)]


# Runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny run of nine steps."""
    return finish(configure(tmp_path_factory.mktemp("directional"), "directional", "method.mu=0.6"))


def test_records_follow_the_threshold_of_the_schedule(run: Path) -> None:
    (config,) = compose_checked(CONF, [*TINY, "method=directional"], sweep=False)
    schedule = config.schedule.phase("train")
    rates = [learning_rate(schedule, step, 3) for step in range(9)]
    expected = list(thresholds(rates, c=0.05, mu=0.6))
    assert [row["threshold"] for row in rows(run)] == [expected[2], expected[5], expected[8]]


def test_figures_of_the_last_epoch_are_those_of_the_finished_network(run: Path) -> None:
    model, last, written = load_model(run), rows(run)[-1], summary(run)
    named = dict(model.named_parameters())
    weights = {name: weight for name, weight in named.items() if weight.dim() > 1}
    zeros = {name: int((weight == 0).sum()) for name, weight in named.items()}
    num_weights = sum(weight.numel() for weight in weights.values())
    num_all = sum(parameter.numel() for parameter in named.values())
    assert 0 < sum(zeros[name] for name in weights) < sum(zeros.values())
    assert last["sparsity"] == pytest.approx(sum(zeros[name] for name in weights) / num_weights, abs=1e-12)
    assert last["sparsity/all_parameters"] == pytest.approx(sum(zeros.values()) / num_all, abs=1e-12)
    assert written["sparsity/achieved"] == last["sparsity"] and written["sparsity/requested"] is None
    assert written["sparsity/all_parameters"] == last["sparsity/all_parameters"]
    assert written["threshold"] == last["threshold"] > rows(run)[0]["threshold"]
    assert written["params/nonzero"] == num_all - sum(zeros[name] for name in weights)
    assert written["macs/inference"] == last["macs/inference"] < written["macs/dense"]
    for name, weight in weights.items():
        assert last[f"mask/density/{name.removesuffix('.weight')}"] == 1 - zeros[name] / weight.numel()


class Attention(nn.Module):
    """Self-attention over the pixels: its packed projection is a weight without a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(3, 1), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).permute(2, 0, 1)
        return self.last(self.attention(tokens, tokens, tokens)[0].mean(0))


def test_zeros_of_packed_attention_save_macs_and_are_masked() -> None:
    method, model = make("directional"), Attention()
    context = context_of(model, {})
    context.optimizer = method.build_optimizer(model, None)
    packed = model.attention.in_proj_weight
    with torch.no_grad():
        packed[:4] = 0
    row = method.end_epoch(context, 9)
    assert int((~context.masks.masks["attention.in_proj_weight"]).sum()) == 4 * 3
    assert row["macs/inference"] == context.forward_macs == context.dense_macs - 12 * 4 * 4  # pixels
    assert row["sparsity"] == 0 < row["sparsity/all_parameters"]


def test_training_is_counted_dense(run: Path) -> None:
    assert summary(run)["macs/train"] == summary(run)["macs/train_dense"]


def test_zeros_become_the_masks(run: Path) -> None:
    result = last_result(run)
    assert len(result["masks"]) == 20
    assert all(torch.equal(mask, result["model"][name] != 0) for name, mask in result["masks"].items())
    assert summary(run)["mask/exploration"] == 1  # the training was dense


def test_no_masks_hold_zeros_in_place_while_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before: dict[str, torch.Tensor] = {}
    back = 0

    def look(training: TrainState, step: int) -> None:
        nonlocal back
        assert training.context.masks is None
        for name, weight in training.context.parameters().items():
            if name in before:
                back += int(((before[name] == 0) & (weight != 0)).sum())
            before[name] = weight.detach().clone()

    watch(monkeypatch, look)
    finish(configure(tmp_path, "directional"))
    assert back > 0


def test_moving_average_has_the_same_zeros(tmp_path: Path) -> None:
    folder = finish(configure(tmp_path, "directional", "trainer.ema_decay=0.7"))
    model, written = load_model(folder), summary(folder)
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert written["sparsity/achieved"] == pytest.approx(zeros / sum(weight.numel() for weight in weights), abs=1e-12)
    everything = list(model.parameters())
    zeros = sum(int((parameter == 0).sum()) for parameter in everything)
    total = sum(parameter.numel() for parameter in everything)
    assert written["sparsity/all_parameters"] == pytest.approx(zeros / total, abs=1e-12)
    assert rows(folder)[-1]["eval/loss"] == pytest.approx(written["final/loss"])


def test_stopped_in_the_last_evaluation_it_leaves_the_same_records(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The zeros are masks already when the last epoch is evaluated, so a call that goes on begins with masks."""
    real, calls = evaluation.measure, []

    def measure(*arguments: Any, **kwargs: Any) -> dict[str, float]:
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **kwargs)

    monkeypatch.setattr(loop, "measure", measure)
    config = configure(tmp_path, "directional", "method.mu=0.6")
    assert runner.run(config) == 143
    resumed = rows(finish(config))
    assert [untimed(row) for row in resumed] == [untimed(row) for row in rows(run)]


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if not key.startswith("time/")}


def test_without_threshold_the_run_is_dense_plain_sgd(tmp_path: Path) -> None:
    ours = last_result(finish(configure(tmp_path / "ours", "directional", "method.c=0")))
    dense = last_result(finish(configure(tmp_path / "dense", "dense", "optimizer=sgd_plain")))
    for name, tensor in dense["model"].items():  # one of the two kernels may contract a product and a sum
        assert torch.allclose(ours["model"][name].double(), tensor.double(), rtol=1e-4, atol=1e-6), name


# What it says


def said(*, mu: float = 0.501, c: float = 0.001, steps: int) -> list[str]:
    """Return what the set-up reports for `steps` steps at the learning rate 0.1."""
    lines: list[str] = []
    context = context_of(small_network(), {})
    context.report, context.total_steps, context.steps_per_epoch = lines.append, steps, steps
    rate = {"policy": "constant", "milestones": [], "gamma": 0.1, "warmup_epochs": 0, "final_lr": 0.0}
    context.schedule = PhaseSchedule(epochs=1, lr=0.1, **rate)
    make("directional", mu=mu, c=c).setup(context)
    return lines


def test_a_short_schedule_is_told_how_many_steps_it_lacks() -> None:
    (line,) = said(steps=100)
    assert "a weight of 0.02 without gradient stays above it" in line and "it is zero after 39344)" in line
    advised = float(line.rpartition("method.c=")[2].split()[0])
    (line,) = said(steps=100, c=advised * 1.05)  # the advice has two digits
    assert "is zero after" in line and "stays above" not in line


def test_a_long_schedule_is_told_when_a_small_weight_is_zero() -> None:
    (line,) = said(steps=2000, c=0.005)
    assert line.endswith("is zero after 1584")


def test_an_exponent_outside_of_the_theory_is_allowed_with_a_note() -> None:
    assert [("method.mu=0.4" in line) for line in said(steps=10, mu=0.4)] == [True, False]
    assert "method.mu=1 " in said(steps=10, mu=1)[0]
    assert len(said(steps=10, mu=0.51)) == 1


def test_layers_that_are_gone_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    finish(configure(tmp_path, "directional", "method.c=100"))
    assert "layers without any weight left: conv1, layer1.0.conv1, " in capsys.readouterr().out


def test_nothing_pruned_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    finish(configure(tmp_path, "directional", "method.c=1e-9"))
    assert "nothing was pruned: no weight became zero; raise method.c" in capsys.readouterr().out


# What it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["optimizer.momentum=0.9"], "optimizer.momentum=0.9 does not go with method=directional"),
        (["optimizer.weight_decay=5e-4"], "optimizer.weight_decay=0.0005 does not go with method=directional"),
        (["optimizer=sgd"], "optimizer.momentum=0.9 does not go with method=directional"),
        (["optimizer=adamw"], "optimizer=adamw does not go with method=directional"),
        (["method.c=-0.1"], "method.c must lie in [0, inf)"),
        (["method.c=nan"], "method.c must be a finite number"),
        (["method.mu=0"], "method.mu must lie in (0, 1]"),
        (["method.mu=-0.5"], "method.mu must lie in (0, 1]"),
        (["method.mu=1.01"], "method.mu must lie in (0, 1]"),
        (["method.sparsity=0.9"], "unknown option method.sparsity: the sparsity is an outcome of method.c, method.mu"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_options_are_refused_in_one_line(options, message, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["method=directional", *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1
    assert "optimizer" not in message or "use optimizer=sgd_plain" in captured.err


@pytest.mark.parametrize("options", [[], ["dataset=imagenet"], ["dataset=cifar10", "schedule=cifar_160"]], ids=str)
def test_the_method_brings_plain_sgd_whatever_the_data_set_prefers(options: list[str]) -> None:
    (config,) = compose_checked(CONF, [*options, "method=directional"], sweep=False)
    assert (config.optimizer.name, config.optimizer.momentum, config.optimizer.weight_decay) == ("sgd", 0, 0)


def test_other_methods_of_a_sweep_keep_their_optimizer() -> None:
    both = list(compose_checked(CONF, ["method=directional,gmp", "dataset=imagenet"], sweep=True))
    assert [config.optimizer.weight_decay for config in both] == [0, 1e-4]


def test_a_nan_is_not_taken_for_a_small_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def look(training: TrainState, step: int) -> None:
        if step == 4:
            training.context.optimizer.state[training.context.model.conv1.weight]["v"][0] = math.nan

    watch(monkeypatch, look)
    assert runner.run(configure(tmp_path, "directional")) == 1
    assert "weights are not finite in phase train, epoch 2" in capsys.readouterr().err
