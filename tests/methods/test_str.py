"""STR: when its thresholds wake up, what is refused, that pruned weights get no gradient."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from prune_lab.cli import command as cli
from prune_lab.families import soft_threshold
from prune_lab.families.soft_threshold import AWAKE, decayed, wake_step, waking_decay
from prune_lab.foundations.errors import UserError
from prune_lab.training.loop import TrainState
from tests.helpers.method_runs import configure, finish, make, summary, watch
from tests.methods.test_autosparse import CHANNELS_U, CHANNELS_W, U, W, backward, layer_of, set_up

STEPS = 5005
SGD = {"momentum": 0.875, "nesterov": False}


def official_rate(epoch: int) -> float:
    """Return the learning rate of the official recipe, which changes once per epoch: 5 of warm-up, 95 of cosine."""
    return 0.256 * ((epoch + 1) / 5 if epoch < 5 else (1 + math.cos(math.pi * (epoch - 5) / 95)) / 2)


RATES = [official_rate(epoch) for epoch in range(40) for _ in range(STEPS)]


def first_epoch_above(values: list[float], limit: float) -> int:
    """Return the number of the epoch, from 1, that ends with T above `limit`."""
    return next(epoch for epoch in range(1, 41) if values[epoch * STEPS - 1] > limit)


def test_published_settings_of_resnet50():
    """T = -1601 after epoch 5, -506 after 10, -53.4 after 20, above -10 from epoch 28, above -5 from epoch 32."""
    values = list(decayed(-3200.0, 2.251757813e-5, RATES, SGD))
    after = [values[epoch * STEPS - 1] for epoch in (5, 10, 20)]
    assert after == pytest.approx([-1601, -506, -53.4], rel=1e-3)
    assert first_epoch_above(values, -10) == 28 and first_epoch_above(values, -5) == 32
    assert 27 * STEPS < wake_step(-3200.0, 2.251757813e-5, RATES, SGD) <= 28 * STEPS


def test_published_settings_of_mobilenet_v1():
    values = list(decayed(-12800.0, 3.751757813e-5, RATES, SGD))
    assert first_epoch_above(values, -10) == 21 and first_epoch_above(values, -5) == 23


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.02),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.02, nesterov=True),
    "plain": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.02),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.02),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.02),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_prediction_is_what_the_optimizer_does(kind):
    threshold = torch.nn.Parameter(torch.tensor([-20.0], dtype=torch.float64))
    optimizer = OPTIMIZERS[kind]([threshold])
    rates = [0.1 * (1 - step / 60) for step in range(50)]
    expected = list(decayed(-20.0, 0.02, rates, optimizer.param_groups[0]))
    for rate, value in zip(rates, expected, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        threshold.grad = torch.zeros_like(threshold)
        optimizer.step()
        assert threshold.item() == pytest.approx(value, rel=1e-9)
    assert threshold.item() > -20


def test_proposed_decay_wakes_by_a_third_of_the_way():
    rates = [0.1] * 3000
    for start in (-3200.0, -100.0, -11.0):
        decay = waking_decay(start, rates, SGD)
        step = wake_step(start, decay, rates, SGD)
        assert 900 < step <= 1000, (start, decay, step)
        assert wake_step(start, 0.9 * decay, rates, SGD) > 1000
        assert max(decayed(start, decay, rates, SGD)) < 0


def test_no_decay_is_proposed_where_t_would_pass_zero():
    assert waking_decay(-3200.0, [0.1] * 30, SGD) is None
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    assert waking_decay(-3200.0, [0.1] * 300, adam) is None
    assert waking_decay(-3200.0, [], SGD) is None


def test_a_start_out_of_reach_is_given_up_after_one_look(monkeypatch: pytest.MonkeyPatch):
    """Adam's steps are about as long as the learning rate, whatever the decay."""
    seen = 0

    def counted(*arguments):
        nonlocal seen
        for value in decayed(*arguments):
            seen += 1
            yield value

    monkeypatch.setattr(soft_threshold, "decayed", counted)
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    assert waking_decay(-3200.0, [0.1] * 3000, adam) is None
    assert seen == 1000


def test_proposals_for_adam():
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    rates = [0.01 * (1 + math.cos(math.pi * step / 3000)) / 2 for step in range(3000)]
    assert waking_decay(-15.0, rates, adam) == pytest.approx(1.1e-9)


def test_alpha_is_zero():
    method, context = set_up(W, "str", threshold_init=0.0, threshold_decay=0.0)
    assert torch.equal(backward(method, context, U), torch.tensor([[1.0, 2.0, 0.0, 0.0]]))
    assert method.thresholds["1.weight"].grad.item() == pytest.approx(0.25)
    assert not method.needs_dense_gradient(0)


def test_autosparse_without_alpha_is_str():
    options = {"threshold_init": -1.0, "threshold_decay": 0.0, "granularity": "channel"}
    states = []
    for name, more in (("str", {}), ("autosparse", {"alpha": 0.0})):
        method, context = set_up(CHANNELS_W, name, **options, **more)
        for step in range(4):
            backward(method, context, CHANNELS_U, step)
            context.optimizer.step()
            method.after_step(context, step)
        states.append((context.model[1].weight.data, method.raw["1.weight"], method.thresholds["1.weight"].detach()))
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_sleeping_thresholds_move_by_decay_alone():
    context = layer_of(W)
    context.optimizer = torch.optim.SGD(context.model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.001)
    method = make("str", threshold_init=-11.0, threshold_decay=0.01)
    method.setup(context)
    expected = list(decayed(-11.0, 0.01, [0.1] * 5, context.optimizer.param_groups[-1]))
    for step in range(5):
        backward(method, context, torch.zeros_like(W), step)
        context.optimizer.step()
        method.after_step(context, step)
    assert method.thresholds["1.weight"].item() == pytest.approx(expected[-1], rel=1e-5)
    assert context.masks.density == 1


def test_decay_is_the_optimizers_unless_given():
    for own, expected in ((None, 0.03), (0.02, 0.02)):
        context = layer_of(W)
        context.optimizer = torch.optim.SGD(context.model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.03)
        said: list[str] = []
        context.report = said.append
        make("str", threshold_init=-12.0, threshold_decay=own).setup(context)
        assert context.optimizer.param_groups[-1]["weight_decay"] == expected
        assert re.search(r"alone brings T to -10 .* at step \d+ of 100", said[0])


def test_sleeping_through_the_training_is_refused_with_a_way_out():
    context = layer_of(W)
    context.optimizer = torch.optim.SGD(context.model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    context.total_steps, context.steps_per_epoch = 3000, 300
    with pytest.raises(UserError, match=r"^method\.threshold_init=-3200 with .*never brings T to -10") as caught:
        make("str", threshold_init=-3200.0, threshold_decay=None).setup(context)
    advice = re.search(r"; method\.threshold_init=(\S+) with method\.threshold_decay=(\S+) brings", str(caught.value))
    said: list[str] = []
    again = layer_of(W)
    again.total_steps, again.steps_per_epoch, again.report = 3000, 300, said.append
    make("str", threshold_init=float(advice[1]), threshold_decay=float(advice[2])).setup(again)
    assert int(re.search(r"at step (\d+)", said[0])[1]) <= 1000


BAD = {
    ("method.threshold_init=-5",): "method.threshold_decay=0.0005 pushes T towards 0",
    ("method.threshold_init=-9", "method.threshold_decay=0.1"): "method.threshold_decay=0.1 pushes T towards 0",
    ("method.threshold_init=1",): "method.threshold_init must lie in (-inf, 0]",
    ("method.threshold_decay=-1",): "method.threshold_decay must lie in [0, inf)",
    ("method.threshold_init=-3200", "method.threshold_decay=null"): "method.threshold_init=-3200 with "
    "method.threshold_decay=0.0005 never brings T to -10",
    ("method.threshold_init=-20", "method.threshold_decay=100"): "method.threshold_decay=100 takes T past 0, where "
    "weights up to 0.5 act as zero, at step 1 of ",
    ("method.threshold_init=-10", "method.threshold_decay=100"): "; lower method.threshold_decay",
    ("method.alpha=0.5",): "unknown option method.alpha",
    ("method.sparsity=0.8",): "unknown option method.sparsity: the sparsity is an outcome of trained thresholds",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_input_is_one_line(options, capsys: pytest.CaptureFixture, tmp_path: Path):
    assert cli.main(["method=str", *options, "dataset=fake", f"output_dir={tmp_path}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert BAD[options] in line
    assert not list(tmp_path.iterdir())


def test_run_is_dense_until_the_thresholds_wake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[float, float]] = []

    def look(training: TrainState, step: int) -> None:
        lowest = min(float(t.detach().min()) for t in training.method.thresholds.values())
        seen.append((lowest, training.context.masks.density))

    watch(monkeypatch, look)
    folder = finish(configure(tmp_path, "str", "method.threshold_init=-20", "method.threshold_decay=0.5"))
    assert all(density > 0.999 for lowest, density in seen if lowest < AWAKE)
    assert seen[0][0] < AWAKE < seen[-1][0] and seen[-1][1] < 1
    assert summary(folder)["sparsity/achieved"] == pytest.approx(1 - seen[-1][1])
