"""Optimizer steps against steps by hand, and learning rates at exact steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from prune_lab.config.optimizer import AdamConfig, SGDConfig
from prune_lab.config.schedule import PhaseSchedule
from prune_lab.optim.learning_rate import learning_rate, set_learning_rate
from prune_lab.optim.optimizer import build_optimizer
from tests.helpers.runs import compose


def schedule(**changes) -> PhaseSchedule:
    values = {"epochs": 10, "lr": 1.0, "policy": "constant", "milestones": [], "gamma": 0.1, "warmup_epochs": 0.0,
              "final_lr": 0.0}
    return PhaseSchedule(**values | changes)


def test_step_policy_falls_at_the_first_step_of_the_milestone_epoch():
    plan = schedule(policy="step", milestones=[3, 7.5], gamma=0.5)
    assert [learning_rate(plan, step, 4) for step in (0, 11, 12, 29, 30, 39)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("policy, middle", [("cosine", 0.55), ("linear", 0.55)])
def test_cosine_and_linear_start_at_lr_and_reach_final_lr_after_the_last_step(policy, middle):
    plan = schedule(policy=policy, final_lr=0.1)
    assert learning_rate(plan, 0, 4) == 1.0
    assert learning_rate(plan, 20, 4) == pytest.approx(middle)
    assert learning_rate(plan, 40, 4) == pytest.approx(0.1)
    assert learning_rate(plan, 39, 4) > 0.1


def test_cosine_follows_the_formula_after_warm_up():
    plan = schedule(policy="cosine", warmup_epochs=2)
    expected = [0.125 * (step + 1) for step in range(8)]
    expected += [(1 + math.cos(math.pi * (step - 8) / 32)) / 2 for step in range(8, 40)]
    assert [learning_rate(plan, step, 4) for step in range(40)] == pytest.approx(expected)


def test_linear_falls_by_equal_steps():
    values = [learning_rate(schedule(policy="linear"), step, 1) for step in range(10)]
    assert values == pytest.approx([1 - step / 10 for step in range(10)])


def test_warm_up_that_ends_between_two_steps_does_not_overshoot():
    values = [learning_rate(schedule(warmup_epochs=0.5), step, 7) for step in range(5)]
    assert values == pytest.approx([1 / 3.5, 2 / 3.5, 3 / 3.5, 1, 1])


def test_warm_up_shorter_than_a_step_is_none():
    assert learning_rate(schedule(warmup_epochs=0.01), 0, 7) == 1.0


def test_constant_stays():
    assert {learning_rate(schedule(lr=0.3), step, 5) for step in range(50)} == {0.3}


def test_multiplier_stretches_epochs_milestones_and_warm_up():
    config = compose("schedule=cifar_160", "schedule.multiplier=0.5").schedule
    plain, half = config.train, config.phase("train")
    assert half.epochs == plain.epochs / 2
    assert half.milestones == [milestone / 2 for milestone in plain.milestones]
    assert half.warmup_epochs == plain.warmup_epochs / 2
    assert half.lr == plain.lr


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))


def with_gradients(model: nn.Module, seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_sgd_with_nesterov_and_decay_equals_steps_by_hand():
    model = network()
    config = SGDConfig("sgd", momentum=0.9, nesterov=True, weight_decay=0.01, decay_norm_and_bias=True)
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, 0.1)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    momenta = [torch.zeros_like(weight) for weight in weights]
    for seed in (1, 2, 3):
        for i, gradient in enumerate(with_gradients(model, seed)):
            gradient += 0.01 * weights[i]
            momenta[i] = 0.9 * momenta[i] + gradient
            weights[i] -= 0.1 * (gradient + 0.9 * momenta[i])
        optimizer.step()
    for weight, parameter in zip(weights, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), weight)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_equals_steps_by_hand(name):
    model = network()
    config = AdamConfig(name, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1, decay_norm_and_bias=True)
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, 0.01)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    first, second = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    for step in (1, 2, 3):
        for i, gradient in enumerate(with_gradients(model, step)):
            if name == "adam":
                gradient += 0.1 * weights[i]
            else:
                weights[i] *= 1 - 0.01 * 0.1
            first[i] = 0.8 * first[i] + 0.2 * gradient
            second[i] = 0.95 * second[i] + 0.05 * gradient.square()
            root = (second[i] / (1 - 0.95**step)).sqrt() + 1e-6
            weights[i] -= 0.01 * first[i] / (1 - 0.8**step) / root
        optimizer.step()
    for weight, parameter in zip(weights, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), weight)


@pytest.mark.parametrize("decay_all", [True, False])
def test_decay_on_norm_and_bias_is_an_option(decay_all):
    model = network()
    config = SGDConfig("sgd", momentum=0.0, nesterov=False, weight_decay=0.5, decay_norm_and_bias=decay_all)
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, 1.0)
    nn.init.constant_(model[0].bias, 2.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.5 if decay_all or name == "0.weight" else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name])


def test_every_parameter_belongs_to_exactly_one_group():
    model = network()
    config = SGDConfig("sgd", momentum=0.0, nesterov=False, weight_decay=0.5, decay_norm_and_bias=False)
    grouped = [id(p) for group in build_optimizer(model, config).param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
