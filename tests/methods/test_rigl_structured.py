"""Structured RigL: whole kernels in every mask, budgets in kernels, the right kernels move."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from prune_lab.cli import command as cli
from prune_lab.pruning.masks.distributions import whole_units
from prune_lab.training.loop import TrainState
from tests.helpers.contexts import context_of
from tests.helpers.method_runs import configure, finish, make, watch


def test_counts_become_whole_kernels_and_the_sum_stays_near():
    assert whole_units({"a": 13, "b": 23, "c": 5}, {"a": 9, "b": 9, "c": 1}) == {"a": 9, "b": 27, "c": 5}
    assert whole_units({"a": 2, "b": 100}, {"a": 9, "b": 1}) == {"a": 9, "b": 100}  # no layer is emptied
    assert whole_units({"a": 18, "b": 27}, {"a": 9, "b": 9}) == {"a": 18, "b": 27}


@pytest.mark.parametrize("score", ["abs_of_mean", "mean_of_abs"])
def test_an_update_moves_the_weakest_kernel_to_the_strongest_gradient(score):
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(32, 3))
    weight = model[0].weight
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[0] = True
    with torch.no_grad():
        weight.fill_(0.5)
        weight[0, 1] = 0.2
        weight[0, 1, 0, 0] = 3.0  # one large weight; the mean of the kernel, 0.51, is above that of kernel 0, 0.5
    context = context_of(model, {"0.weight": mask}, channels=2)
    weight.grad = torch.full_like(weight, 0.1)
    weight.grad[1, 1, 0, 0] = 5.0
    weight.grad[1, 0] = -0.6  # mean 0.6, just below that of kernel (1, 1), 5.8 / 9
    make("rigl_structured", alpha=0.5, decay="constant", kernel_score=score).update(context, 0)
    kept = context.masks.masks["0.weight"].flatten(2).all(2)
    assert kept.tolist() == [[False, True], [False, True]]
    assert context.masks.num_kept == 18


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, [[False, True], [False, True]]), ({"kernel_score": "mean_of_abs"}, [[True, False], [True, False]])],
)
def test_signs_cancel_within_a_kernel_as_in_the_reports_repository(changes, expected):
    """|mean| of the first kernels is 1/9 of their absolute values, below the even ones beside them."""
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(32, 3))
    weight, signs = model[0].weight, torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1, 1]).view(3, 3)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[0] = True
    with torch.no_grad():
        weight[0, 0], weight[0, 1], weight[1] = signs, 0.2, 0.0
    weight.grad = torch.zeros_like(weight)
    weight.grad[1, 0], weight.grad[1, 1] = 0.9 * signs, -0.3
    context = context_of(model, {"0.weight": mask}, channels=2)
    make("rigl_structured", alpha=0.5, decay="constant", **changes).update(context, 0)
    assert context.masks.masks["0.weight"].flatten(2).all(2).tolist() == expected


def test_the_plan_names_the_sparsity_that_pays_for_dense_linear_layers():
    model = nn.Sequential(nn.Conv2d(3, 10, 4), nn.Flatten(), nn.Linear(10, 2))  # 480 and 20 weights
    method, told = make("rigl_structured", sparsity=0.9, alpha=0.5, interval=10), []
    context = context_of(model, {})
    context.layers, context.report = method.layers(model), told.append
    method.setup(context)
    assert "linear layers stay dense: 20 weights beside a budget of 48; method.sparsity=0.9375 pays for them" in told


def test_kernels_are_never_cut_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    digests = set()

    def look(training: TrainState, step: int) -> None:
        context = training.context
        digests.add(context.masks.digest())
        for mask in context.masks.masks.values():
            per_kernel = mask.flatten(2).sum(2)
            assert set(per_kernel.unique().tolist()) <= {0, mask[0, 0].numel()}
        assert "fc.weight" not in context.masks.masks

    watch(monkeypatch, look)
    finish(configure(tmp_path, "rigl_structured", "method.alpha=0.5"))
    assert len(digests) > 2


@pytest.mark.parametrize("option", ["method.drop=by_sign", "method.redistribution=gradient"])
def test_what_would_cut_kernels_is_refused(option, capsys):
    assert cli.main(["method=rigl_structured", option]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{option} is not allowed" in line


def test_the_dry_run_says_so_too(tmp_path: Path, capsys: pytest.CaptureFixture):
    options = ["method=rigl_structured", "model.width=0.25", "dry_run=true", f"output_dir={tmp_path}"]
    assert cli.main(options) == 0
    out = capsys.readouterr().out
    assert "linear layers stay dense: 160 weights beside a budget of " in out
    assert "mask updates: " in out
