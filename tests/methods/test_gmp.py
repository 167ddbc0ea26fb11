"""Gradual magnitude pruning: the cubic of Zhu and Gupta 2017 (arXiv 1710.01878), exact counts, nested masks."""

from __future__ import annotations

import json

import pytest
import torch

from prune_lab.foundations.errors import UserError
from prune_lab.pruning.masks.distributions import num_keep_total
from tests.helpers.method_runs import configure, finish, last_result, make, watch
from tests.helpers.toys import OneLayer, mask_of, one_step, open_phase, state_of

WEIGHT = torch.tensor([[0.5, -0.1, 0.3, 0.05, -0.7, 0.2, 0.2, 0.0]])


def gmp(**changes):
    return make("gmp", **{"first_layer": "sparse", "sparsity": 0.8} | changes)


def big() -> OneLayer:
    return OneLayer(torch.randn(100_000, 10, generator=torch.Generator().manual_seed(0)))


def test_ramp_of_the_rigl_papers_runs() -> None:
    """10k to 25k of 32k steps in cuts of 1k: the note's table for 0 to 0.8."""
    method = gmp(begin=10 / 32, end=25 / 32, num_cuts=15)
    context = open_phase(big(), method, steps=32_000)
    cuts = {step: 1 - kept["fc.weight"] / 1_000_000 for step, kept in method.cuts.items()}
    assert list(cuts) == list(range(10_000, 26_000, 1000))
    expected = {10_000: 0, 11_000: 0.149570, 12_000: 0.279230, 15_000: 0.562963, 20_000: 0.770370, 25_000: 0.8}
    for step, sparsity in expected.items():
        assert cuts[step] == pytest.approx(sparsity, abs=1e-6)
    assert context.total_steps == 32_000


@pytest.mark.parametrize("target", [0.9, 0.873, 1 / 3])
@pytest.mark.parametrize("num_cuts", [1, 7, 30])
def test_the_last_cut_meets_the_target_exactly(target: float, num_cuts: int) -> None:
    method = gmp(sparsity=target, num_cuts=num_cuts)
    open_phase(OneLayer(torch.randn(83, 11)), method, steps=100)
    counts = [kept["fc.weight"] for kept in method.cuts.values()]
    assert counts[-1] == num_keep_total(913, target)
    assert counts == sorted(counts, reverse=True) and len(counts) == num_cuts + 1
    assert list(method.cuts)[0] == 30 and list(method.cuts)[-1] == 80


def test_ramp_scales_with_the_length_of_training() -> None:
    steps = {}
    for total in (100, 200):
        method = gmp(num_cuts=5)
        open_phase(OneLayer(WEIGHT), method, steps=total)
        steps[total] = list(method.cuts)
    assert steps == {100: [30, 40, 50, 60, 70, 80], 200: [60, 80, 100, 120, 140, 160]}


def test_cut_of_the_hand_example_zeroes_weights_and_their_momentum() -> None:
    method = gmp(sparsity=0.5, begin=0.0, end=0.1, num_cuts=1)
    context = open_phase(OneLayer(WEIGHT), method, steps=10)
    weight = context.parameters()["fc.weight"]
    weight.grad = torch.zeros_like(weight)
    one_step(context, method, 0)  # the first cut, at sparsity 0
    assert mask_of(context) == [[1] * 8]
    state_of(context, "momentum_buffer").fill_(1.0)
    with torch.no_grad():
        weight.copy_(WEIGHT)
    method.after_step(context, 1)
    assert mask_of(context) == [[1, 0, 1, 0, 1, 1, 0, 0]]
    assert weight.detach().tolist() == (WEIGHT * torch.tensor(mask_of(context))).tolist()
    assert state_of(context, "momentum_buffer").tolist() == torch.tensor(mask_of(context)).float().tolist()


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk", "global"])
def test_masks_are_nested_and_change_at_cuts_only(distribution: str, tmp_path, monkeypatch) -> None:
    history: list[dict] = []

    def look(training, step: int) -> None:
        history.append({name: mask.clone() for name, mask in training.context.masks.masks.items()})

    watch(monkeypatch, look)
    options = (f"method.distribution={distribution}", "method.begin=0.1", "method.num_cuts=3", "method.sparsity=0.9")
    finish(configure(tmp_path, "gmp", *options))
    cuts = {1, 3, 5, 7}  # of nine steps; the first one is at sparsity 0
    for step in range(1, len(history)):
        before, after = history[step - 1], history[step]
        assert all(not (after[name] & ~before[name]).any() for name in after), "a weight came back"
        changed = any(not torch.equal(after[name], before[name]) for name in after)
        assert changed == (step in cuts - {1}), step


def test_a_file_takes_every_layer_to_its_own_density(tmp_path) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 20), torch.nn.Linear(20, 10))
    path = tmp_path / "densities.json"
    path.write_text(json.dumps({"1": 0.1, "2": 0.34}))  # 24 + 68 of 440
    method = gmp(distribution="file", densities=str(path), sparsity=1 - 92 / 440, begin=0.0, end=0.5, num_cuts=4)
    open_phase(model, method, steps=20)
    kept = list(method.cuts.values())
    assert kept[0] == {"1.weight": 240, "2.weight": 200} and kept[-1] == {"1.weight": 24, "2.weight": 68}
    for index, level in enumerate(1 - (1 - index / 4) ** 3 for index in range(5)):
        assert kept[index]["1.weight"] == pytest.approx(240 - 216 * level, abs=1)
        assert kept[index]["2.weight"] == pytest.approx(200 - 132 * level, abs=1)


def test_initial_sparsity_is_in_force_from_the_first_cut() -> None:
    method = gmp(initial_sparsity=0.5, num_cuts=5)
    open_phase(OneLayer(torch.randn(10, 10)), method, steps=100)
    assert next(iter(method.cuts.values())) == {"fc.weight": 50}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"begin": 0.8, "end": 0.8}, "method.end must exceed method.begin"),
        ({"initial_sparsity": 0.8}, "method.initial_sparsity must be below method.sparsity"),
    ],
)
def test_impossible_ramps_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        gmp(**changes)


def test_more_cuts_than_steps_are_refused() -> None:
    with pytest.raises(UserError, match=r"method\.num_cuts=15 does not fit the ramp of 5 steps"):
        open_phase(OneLayer(WEIGHT), gmp(num_cuts=15), steps=10)


def test_global_target_is_met_over_all_layers(tmp_path) -> None:
    masks = last_result(finish(configure(tmp_path, "gmp", "method.distribution=global")))["masks"]
    shares = {int(mask.sum()) / mask.numel() for mask in masks.values()}
    assert len(shares) > 5  # layers differ
