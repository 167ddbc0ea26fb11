"""DST-EE: its worked examples, its relation to RigL, its counter."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from prune_lab.cli import command as cli
from prune_lab.core.context import Context
from prune_lab.training.loop import TrainState
from tests.helpers.contexts import context_of
from tests.helpers.method_runs import configure, finish, last_result, make, watch


def one_layer(weights: list[float], gradient: list[float], active: list[int]) -> Context:
    """Return a phase on one linear layer of one output."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(len(weights), 1, bias=False))
    weight = model[1].weight
    with torch.no_grad():
        weight.copy_(torch.tensor([weights]))
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[0, active] = True
    context = context_of(model, {"1.weight": mask}, image_size=1, channels=len(weights))
    weight.grad = torch.tensor([gradient])
    return context


def dst_ee(context: Context, **changes):
    method = make("dst_ee", **changes)
    method.rounds_active = {name: mask.int() for name, mask in context.masks.masks.items()}
    return method


@pytest.mark.parametrize(
    ("step", "c", "eps", "expected"),
    [
        (1, 0.05, 1, [0.9, 0.5, 0.1, 0.05, 0.3]),
        (100, 0.001, 1, [0.90230, 0.50461, 0.10461, 0.05230, 0.30092]),
        (100, 0.05, 1, [1.01513, 0.73026, 0.33026, 0.16513, 0.34605]),
        (100, 0.05, 0.1, [1.10933, 2.80259, 2.40259, 0.25933, 0.35616]),
        (1000, 0.05, 1, [1.07269, 0.84539, 0.44539, 0.22269, 0.36908]),
        (1000, 0.05, 0.1, [1.21399, 3.95388, 3.55388, 0.36399, 0.38424]),
    ],
)
def test_scores_of_the_example(step, c, eps, expected):
    context = one_layer([0.0] * 5, [0.9, -0.5, 0.1, -0.05, 0.3], [])
    method = dst_ee(context, c=c, eps=eps)
    method.rounds_active["1.weight"] = torch.tensor([[1, 0, 0, 1, 4]], dtype=torch.int32)
    scores = method.grow_scores(context, step, context.masks.masks)
    assert scores["1.weight"].flatten().tolist() == pytest.approx(expected, abs=6e-6)


@pytest.mark.parametrize(
    ("c", "eps", "bonuses"),
    [
        (1e-4, 0.1, (0.010127, 0.000921, 0.000100, 0.000010)),
        (1e-3, 1, (0.010127, 0.005063, 0.000921, 0.000100)),
        (1e-2, 1, (0.101266, 0.050633, 0.009206, 0.001003)),
    ],
)
def test_bonus_at_step_25000(c, eps, bonuses):
    method = make("dst_ee", c=c, eps=eps)
    method.rounds_active = {"w": torch.tensor([0, 1, 10, 100])}
    assert method.bonus("w", 25_000).tolist() == pytest.approx(bonuses, abs=6e-7)


def test_sequence_of_the_example():
    """Three updates: never active positions come first, so R_s rises to 1; RigL stops at 4/6."""
    context = one_layer([0.9, -0.3, 0.1, 0.0, 0.0, 0.0], [0.0] * 6, [0, 1, 2])
    weight = context.parameters()["1.weight"]
    method = dst_ee(context, c=0.05, eps=0.1, alpha=0.34, decay="constant")
    gradients = {
        1: [0.2, 0.1, 0.05, 0.4, 0.3, 0.02],
        100: [0.2, 0.1, 0.3, 0.4, 0.3, 0.02],
        200: [0.2, 0.1, 0.3, 0.4, 0.25, 0.02],
    }
    active = {1: [0, 1, 3], 100: [0, 1, 4], 200: [0, 1, 5]}
    counts = {1: [2, 2, 1, 1, 0, 0], 100: [3, 3, 1, 1, 1, 0], 200: [4, 4, 1, 1, 1, 1]}
    explored = []
    for step, gradient in gradients.items():
        weight.grad = torch.tensor([gradient])
        method.update(context, step)
        mask = context.masks.masks["1.weight"][0]
        assert mask.nonzero().flatten().tolist() == active[step]
        assert method.rounds_active["1.weight"][0].tolist() == counts[step]
        assert int(method.rounds_active["1.weight"].sum()) == 3 * (len(explored) + 2)
        explored.append(context.history.figures(context.masks.masks)["mask/exploration"])
        with torch.no_grad():
            for index in active[step]:
                if weight[0, index] == 0:
                    weight[0, index] = 0.05 * (index + 1)
    assert explored == pytest.approx([4 / 6, 5 / 6, 1])
    assert int((method.rounds_active["1.weight"] > 0).sum()) == 6


def test_equal_gradients_grow_by_ascending_count_then_index():
    context = one_layer([0.5, 0.4, 0.3, 0, 0, 0, 0], [0.1] * 7, [0, 1, 2])
    method = dst_ee(context, c=0.05, alpha=0.67, decay="constant")
    method.rounds_active["1.weight"] = torch.tensor([[9, 9, 1, 2, 1, 0, 1]], dtype=torch.int32)
    method.update(context, 50)
    assert context.masks.masks["1.weight"][0].nonzero().flatten().tolist() == [0, 2, 5]


@pytest.mark.parametrize("step", [0, 1, 2])
def test_scores_are_finite_in_the_first_steps(step):
    context = one_layer([0.5, 0, 0, 0], [0.1, 0.2, 0.3, 0.4], [0])
    scores = dst_ee(context, c=10.0, eps=1e-3).grow_scores(context, step, context.masks.masks)
    assert bool(torch.isfinite(scores["1.weight"]).all())


def test_round_counts_updates():
    method = make("dst_ee", c=1.0, eps=1.0, time="round")
    method.rounds_active = {"w": torch.tensor([0])}
    assert float(method.bonus("w", 5000)) == 0  # ln 1 at the first update
    method.churn["updates"] = 19  # done before the twentieth
    assert float(method.bonus("w", 5000)) == pytest.approx(math.log(20))


@pytest.mark.parametrize("grow_batches", [1, 3])
def test_several_gradients_are_averaged_before_the_bonus_is_added(grow_batches):
    """A sum would make c as many times weaker."""
    context = one_layer([0.5, 0, 0, 0], [0.4, 0.1, -0.2, 0.3], [0])
    method = dst_ee(context, c=0.05, grow_batches=grow_batches, interval=10)
    method.updates = range(50, 100, 10)
    for step in range(50 - grow_batches + 1, 50):
        assert method.after_backward(context, step)
    scores = {}
    original = method.grow_scores
    method.grow_scores = lambda *given: scores.setdefault("all", original(*given))
    assert not method.after_backward(context, 50)
    bonus = 0.05 * math.log(50)
    expected = [0.4 + bonus / 2, 0.1 + bonus, 0.2 + bonus, 0.3 + bonus]
    assert scores["all"]["1.weight"].flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_clipping_does_not_reach_the_scores(tmp_path: Path):
    """With the update after the optimizer step, clipping comes first."""
    rows = {}
    for clip in ("null", "0.001"):
        options = ("method.skip_step_on_update=false", "schedule.train.epochs=1", "schedule.train.warmup_epochs=0",
                   f"trainer.clip_norm={clip}", "method.interval=1", "method.end=1")  # fmt: skip
        folder = finish(configure(tmp_path / clip, "dst_ee", *options))
        rows[clip] = json.loads((folder / "metrics.jsonl").open().readline())
    free, clipped = (row["pruned/gradient/layer2.0.conv1"] for row in rows.values())
    assert clipped > free / 10  # clipped gradients would be thousands of times smaller


def test_layer_rms_makes_the_gradient_scale_vanish():
    small = one_layer([0.5, 0, 0, 0], [1e-6, 2e-6, 3e-6, 6e-6], [0])
    large = one_layer([0.5, 0, 0, 0], [10.0, 20.0, 30.0, 60.0], [0])
    one, other = (
        dst_ee(context, normalize="layer_rms").grow_scores(context, 100, context.masks.masks)["1.weight"]
        for context in (small, large)
    )
    assert torch.allclose(one, other, rtol=1e-5)
    rms = math.sqrt((400 + 900 + 3600) / 3)
    assert float(other[0, 3] - other[0, 1]) == pytest.approx(40 / rms, rel=1e-5)


def masks_of_a_run(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[list, dict]:
    seen = []

    def look(training: TrainState, step: int) -> None:
        seen.append(training.context.masks.digest())

    with monkeypatch.context() as patch:
        watch(patch, look)
        run = finish(configure(folder, name, *options))
    return seen, last_result(run)


@pytest.mark.parametrize("options", [(), ("method.grow_batches=2", "optimizer=adam", "schedule.train.lr=0.01")])
def test_without_exploration_it_is_rigl_bit_for_bit(options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    masks, result = masks_of_a_run(tmp_path / "dst", "dst_ee", monkeypatch, "method.c=0", *options)
    same_masks, same = masks_of_a_run(tmp_path / "rigl", "rigl", monkeypatch, *options)
    assert masks == same_masks and len(set(masks)) > 2
    assert all(torch.equal(tensor, same["model"][key]) for key, tensor in result["model"].items())


def test_a_large_c_explores_more_than_rigl(tmp_path: Path):
    def explored(name: str, *options: str) -> dict:
        place = tmp_path / "-".join((name, *options)).replace("=", "-")
        folder = finish(configure(place, name, "method.interval=1", "method.alpha=0.5", *options))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert not any(key.startswith("grown/") for key in rows[2])  # no update in the last epoch: nothing is repeated
        return rows[1] | rows[2]

    bold, rigl = explored("dst_ee", "method.c=1000"), explored("rigl")
    rigl_like = explored("dst_ee", "method.c=0")
    assert bold["mask/exploration"] > rigl["mask/exploration"]
    assert bold["grown/never_active/layer3.0.conv1"] == 1.0
    assert bold["grown/bonus/layer3.0.conv1"] > bold["pruned/bonus/layer3.0.conv1"] > 0
    assert min(value for key, value in rigl_like.items() if key.startswith("grown/never_active/")) < 1


@pytest.mark.parametrize("option", ["method.c=-0.1", "method.eps=0", "method.eps=-1", "method.time=epoch"])
def test_bad_values_are_refused(option, capsys):
    assert cli.main(["method=dst_ee", option]) == 1
    assert option.partition("=")[0] in capsys.readouterr().err
