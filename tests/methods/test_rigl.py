"""RigL against the hand examples and invariants of Evci et al. 2020 (arXiv 1911.11134) and its official code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from prune_lab.foundations.errors import UserError
from prune_lab.training.loop import TrainState
from tests.helpers.method_runs import configure, finish, make, watch
from tests.helpers.toys import GRADIENT, WEIGHT, OneLayer, example_b, mask_of, one_step, open_phase, state_of

AFTER = [[1, 0, 1, 0], [1, 1, 0, 1], [0, 0, 1, 1]]


def rigl(**changes):
    """Return RigL at 7 of 12 weights with an update every second step, 0 to 6 of 10."""
    usual = {"sparsity": 5 / 12, "distribution": "uniform", "first_layer": "sparse", "interval": 2}
    return make("rigl", **usual | changes)


# Example B: one update


def test_example_b_grows_by_gradient_and_lets_the_just_dropped_come_back() -> None:
    method = rigl()
    context = example_b(method)
    one_step(context, method, 0)
    assert mask_of(context) == AFTER
    weight = context.parameters()["fc.weight"].detach()
    expected = WEIGHT.clone()
    expected[0, 1] = 0  # dropped; (1, 0) was dropped and regrown and keeps 0.05
    assert torch.equal(weight, expected)


def test_example_b_with_regrown_weights_at_zero() -> None:
    method = rigl(regrown="zero")
    context = example_b(method)
    one_step(context, method, 0)
    assert mask_of(context) == AFTER
    assert context.parameters()["fc.weight"][1, 0] == 0
    assert state_of(context, "momentum_buffer")[1, 0] == 0


def test_number_moved_is_a_floor() -> None:
    method = rigl(alpha=0.4)  # 0.4 * 7 = 2.8; three would drop 0.2 as well
    context = example_b(method)
    one_step(context, method, 0)
    assert mask_of(context) == AFTER


def test_floor_is_that_of_the_decimal_product() -> None:
    weight = torch.arange(1.0, 201).view(1, 200)
    method = rigl(sparsity=0.5, alpha=0.29, decay="constant")  # 0.29 * 100 is 28.999999999999996 in binary
    mask = weight > 100
    context = open_phase(OneLayer(weight[:, :12]), method)
    assert int(method._kept(weight, mask, method.moved_fraction(context, 0)).sum()) == 71


def test_by_sign_drops_the_same_share_of_positives_and_negatives() -> None:
    method = rigl(drop="by_sign", alpha=0.5)
    context = example_b(method)  # positives 0.05 0.2 0.3 0.4 0.9: two go; negatives -0.1 -0.7: one goes
    context.parameters()["fc.weight"].grad = torch.where(WEIGHT != 0, 0.0, GRADIENT)
    one_step(context, method, 0)
    assert mask_of(context) == [[1, 0, 1, 1], [0, 1, 0, 1], [1, 0, 0, 1]]


# Optimizer state


def test_momentum_restarts_at_new_weights_only() -> None:
    method = rigl()
    context = example_b(method)
    one_step(context, method, 0)
    expected = torch.ones(3, 4)
    expected[0, 2] = 0
    assert torch.equal(state_of(context, "momentum_buffer"), expected)


def test_both_adam_moments_restart_and_the_step_counter_goes_on() -> None:
    method = rigl()
    context = example_b(method, optimizer="adam")
    one_step(context, method, 0)
    expected = torch.ones(3, 4)
    expected[0, 2] = 0
    assert torch.equal(state_of(context, "exp_avg"), expected)
    assert torch.equal(state_of(context, "exp_avg_sq"), expected)
    assert state_of(context, "step") == 1


def test_optimizer_state_stays_without_reset() -> None:
    method = rigl(reset_state=False)
    context = example_b(method)
    one_step(context, method, 0)
    assert torch.equal(state_of(context, "momentum_buffer"), torch.ones(3, 4))


# Which steps


def test_an_update_replaces_the_optimizer_step() -> None:
    method = rigl()
    context = example_b(method)
    assert [one_step(context, method, step) for step in range(4)] == [False, True, False, True]


def test_an_update_may_follow_the_optimizer_step() -> None:
    method = rigl(skip_step_on_update=False)
    context = example_b(method)
    assert one_step(context, method, 0)
    assert method.churn["updates"] == 1
    # SGD moved the kept weights by -0.1 * (0.9 + gradient) before the weakest of them were sought.
    moved = (WEIGHT - 0.1 * (0.9 + GRADIENT)) * torch.tensor(mask_of(context))
    was_kept = (WEIGHT != 0) & (torch.tensor(mask_of(context)) == 1)
    torch.testing.assert_close(context.parameters()["fc.weight"].detach()[was_kept], moved[was_kept])


def test_update_steps_are_those_listed_and_masks_then_freeze() -> None:
    method = rigl(begin=3, interval=4, end=0.6)
    context = example_b(method, steps=30)
    assert list(method.updates) == [3, 7, 11, 15]
    changed, before = [], context.masks.digest()
    torch.manual_seed(0)
    for step in range(30):
        context.parameters()["fc.weight"].grad = torch.randn(3, 4)
        one_step(context, method, step)
        if context.masks.digest() != before:
            changed.append(step)
        before = context.masks.digest()
    assert method.churn["updates"] == 4
    assert set(changed) <= {3, 7, 11, 15} and 3 in changed


def test_dense_gradients_are_asked_for_at_updates_and_not_before_the_first() -> None:
    method = rigl(begin=7, interval=4, end=0.75)
    example_b(method, steps=24)
    assert [step for step in range(24) if method.needs_dense_gradient(step)] == [7, 11, 15]
    method = rigl(begin=7, interval=4, end=0.75, grow_batches=3)
    example_b(method, steps=24)
    assert [step for step in range(24) if method.needs_dense_gradient(step)] == [5, 6, 7, 9, 10, 11, 13, 14, 15]


def test_end_scales_with_the_length_of_training_and_interval_and_alpha_do_not() -> None:
    for steps, updates in ((80, [0, 20, 40]), (160, [0, 20, 40, 60, 80, 100])):
        method = rigl(interval=20)
        context = example_b(method, steps=steps)
        assert list(method.updates) == updates
        assert method.moved_fraction(context, 0) == 0.3
        assert method.moved_fraction(context, steps * 3 // 8) == pytest.approx(0.15)


def test_an_end_that_binary_numbers_miss() -> None:
    method = rigl(end=0.29)
    context = example_b(method, steps=100)
    assert method.end_step(context) == 29


def test_multiplier_stretches_the_real_schedule(tmp_path, monkeypatch) -> None:
    lengths: dict[int, list[int]] = {}

    def look(training: TrainState, step: int) -> None:
        lengths[training.context.total_steps] = list(training.method.updates)

    watch(monkeypatch, look)
    for factor in (1, 2):
        finish(configure(tmp_path / str(factor), "rigl", f"schedule.multiplier={factor}"))
    assert lengths == {9: [0, 2, 4], 18: [0, 2, 4, 6, 8, 10, 12]}


@pytest.mark.parametrize("changes", [{"interval": 8}, {"begin": 9}, {"end": 0.1}, {"end": 0.0, "decay": "constant"}])
def test_a_schedule_without_updates_is_refused(changes) -> None:
    method = rigl(**changes)
    with pytest.raises(UserError, match=r"method\.interval=\d+ with method\.begin=\d+ leaves no mask update"):
        open_phase(OneLayer(WEIGHT), method, steps=10)


def test_a_window_longer_than_the_interval_is_refused() -> None:
    with pytest.raises(UserError, match="method.grow_batches must not exceed method.interval=2, got 3"):
        rigl(grow_batches=3)


# Decay: example C


@pytest.mark.parametrize(
    ("decay", "step", "fraction"),
    [
        ("cosine", 0, 0.3), ("cosine", 2500, 0.292658), ("cosine", 6250, 0.256066), ("cosine", 12500, 0.15),
        ("cosine", 18750, 0.043934), ("linear", 12500, 0.15), ("cubic", 12500, 0.0375), ("constant", 18750, 0.3),
    ],
)  # fmt: skip
def test_example_c(decay: str, step: int, fraction: float) -> None:
    method = rigl(decay=decay, interval=100)
    context = example_b(method, steps=33334)  # 0.75 of them are 25,000
    assert method.end_step(context) == 25000
    assert method.moved_fraction(context, step) == pytest.approx(fraction, abs=5e-7)


# Growth score


def test_growth_window_averages_before_the_absolute_value() -> None:
    """Example D over two batches: gradients (1, 0.6) and (-1, 0.6) score (0, 0.6)."""
    method = rigl(grow_batches=2, alpha=0.3, begin=1, interval=2)
    context = example_b(method)
    weight = context.parameters()["fc.weight"]
    first, second = torch.zeros(3, 4), torch.zeros(3, 4)
    first[0, 3], second[0, 3] = 1.0, -1.0
    first[2, 0] = second[2, 0] = 0.6
    first[0, 2] = second[0, 2] = 0.5
    with torch.no_grad():
        weight.grad = first
        assert method.after_backward(context, 0)
        weight.grad = second
        assert not method.after_backward(context, 1)
    assert mask_of(context) == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 1]]
    assert method.gradient_sums == {}


def test_weight_decay_is_not_in_the_score(tmp_path, monkeypatch) -> None:
    """The same run with and without weight decay makes the same first update, on freshly drawn weights."""
    masks: dict[str, list] = {}

    def look(training: TrainState, step: int) -> None:
        masks.setdefault(tmp_folder, []).append(training.context.masks.digest())

    watch(monkeypatch, look)
    for decay in ("0", "10"):
        tmp_folder = decay
        finish(configure(tmp_path / decay, "rigl", f"optimizer.weight_decay={decay}", "schedule.train.lr=0.001"))
    assert masks["0"][0] == masks["10"][0]
    assert masks["0"][0] != masks["0"][2]


def test_masked_gradients_are_refused() -> None:
    method = rigl()
    context = example_b(method)
    context.parameters()["fc.weight"].grad *= WEIGHT != 0
    with pytest.raises(UserError, match="all gradients at step 0 are zero at pruned weights"):
        method.after_backward(context, 0)


def test_nan_gradients_are_refused() -> None:
    method = rigl()
    context = example_b(method)
    context.parameters()["fc.weight"].grad[0, 2] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        method.after_backward(context, 0)


# fp16: a gradient that overflowed


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("batches", [1, 2])
def test_an_overflow_postpones_the_update(skip: bool, batches: int) -> None:
    method = rigl(skip_step_on_update=skip, grow_batches=batches, interval=4)
    context = example_b(method, steps=20)
    context.amp_scaled = True
    weight = context.parameters()["fc.weight"]
    before = mask_of(context)
    weight.grad[0, 3] = math.inf
    assert method.after_backward(context, 0)  # the scaler leaves the optimizer's step out
    method.after_step(context, 0)
    assert method.churn["updates"] == 0 and mask_of(context) == before
    assert method.needs_dense_gradient(1) and method.state_dict()["postponed"]
    weight.grad = GRADIENT.clone()
    assert method.after_backward(context, 1) is not skip
    method.after_step(context, 1)
    assert method.churn["updates"] == 1
    assert mask_of(context) == AFTER
    assert not method.needs_dense_gradient(2) and not method.state_dict()["postponed"]


def test_a_window_survives_a_checkpoint() -> None:
    results = []
    for interrupted in (False, True):
        method = rigl(grow_batches=2, begin=1)
        context = example_b(method)
        weight = context.parameters()["fc.weight"]
        weight.grad = GRADIENT.clone()
        weight.grad[0, 3] = 5.0
        method.after_backward(context, 0)
        if interrupted:
            state = {"masks": context.masks.state_dict(), "method": method.state_dict()}
            method = rigl(grow_batches=2, begin=1)
            context = example_b(method)
            weight = context.parameters()["fc.weight"]
            context.masks.load_state_dict(state["masks"])
            method.load_state_dict(state["method"])
        weight.grad = GRADIENT.clone()
        method.after_backward(context, 1)
        results.append(mask_of(context))
    assert results[0] == results[1] != AFTER


# Invariants on a network with several layers


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.99])
def test_invariants_of_an_update(alpha: float) -> None:
    model = network()
    method = rigl(sparsity=0.75, distribution="erk", alpha=alpha)
    context = open_phase(model, method)
    old = {name: mask.clone() for name, mask in context.masks.masks.items()}
    counts = context.masks.counts()
    # ERK: 142 weights over dimensions 13, 48 and 18 saturate the last layer (18 * 142 / 79 > 32) and no other.
    assert [name for name, mask in old.items() if mask.all()] == ["5.weight"]
    images = torch.randn(16, 3, 2, 2)
    model(images).square().sum().backward()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert not one_step(context, method, 0)
    new, named = context.masks.masks, context.parameters()
    assert context.masks.counts() == counts
    for name in old:
        dropped, grown = old[name] & ~new[name], new[name] & ~old[name]
        kept = old[name] & new[name]
        gradient = named[name].grad.abs()
        assert dropped.sum() == grown.sum() <= math.floor(counts[name] * alpha)
        assert not named[name].detach()[grown].any() and not named[name].detach()[~new[name]].any()
        assert torch.equal(named[name].detach()[kept], before[name][kept])
        if new[name].all():
            continue
        strongest = (before[name].abs() * old[name]).flatten().topk(counts[name] - math.floor(counts[name] * alpha))
        assert new[name].flatten()[strongest.indices].all()
        if grown.any():
            assert gradient[grown].min() >= gradient[~new[name]].max()
    assert torch.equal(named["5.weight"].detach(), before["5.weight"]) and new["5.weight"].all()
    assert (alpha == 0) == all(torch.equal(old[name], new[name]) for name in old)
    without = network()
    without.load_state_dict({n: v * new[n] if n in new else v for n, v in before.items()})
    assert torch.equal(model(images), without(images))


def test_paper_cost_and_counted_cost() -> None:
    method = rigl(sparsity=0.9, interval=100, distribution="uniform")
    context = open_phase(OneLayer(torch.randn(20, 12)), method, steps=1000)
    assert context.forward_macs == 24 and context.dense_macs == 240
    assert method.paper_train_ratio(context) == pytest.approx(0.10297, abs=5e-6)
