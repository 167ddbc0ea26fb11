"""SET: random growth; magnitude and by-sign drops (Mocanu et al. 2018, arXiv 1707.04780)."""

from __future__ import annotations

import torch

from tests.helpers.method_runs import make
from tests.helpers.toys import WEIGHT, OneLayer, example_b, mask_of, one_step, open_phase, state_of

VALUES = torch.tensor([[-0.9, -0.5, -0.2, -0.1, 0, 0, 0, 0.1, 0.3, 0.6, 1.0]])


def set_(**changes):
    usual = {"sparsity": 5 / 12, "distribution": "uniform", "first_layer": "sparse", "interval": 2}
    return make("set", **usual | changes)


def kept_values(**changes) -> list[float]:
    """Return what is left of the example's values after dropping 0.3 of them, before growth."""
    method = set_(**changes)
    kept = method._kept(VALUES, VALUES != 0, 0.3)
    return [round(value, 1) for value in VALUES[kept].tolist()]


def test_drop_by_magnitude_takes_floor_of_the_fraction() -> None:
    assert kept_values() == [-0.9, -0.5, -0.2, 0.3, 0.6, 1.0]


def test_drop_by_sign_takes_one_on_each_side() -> None:
    assert kept_values(drop="by_sign") == [-0.9, -0.5, -0.2, 0.3, 0.6, 1.0]


def test_drop_by_sign_differs_from_magnitude_where_signs_are_uneven() -> None:
    weight = torch.tensor([[0.1, 0.2, 0.3, 0.4, -0.5, -0.6, -0.7, -0.8]])
    everywhere = torch.ones_like(weight, dtype=torch.bool)
    assert set_(drop="by_sign")._kept(weight, everywhere, 0.5).int().tolist() == [[0, 0, 1, 1, 0, 0, 1, 1]]
    assert set_()._kept(weight, everywhere, 0.5).int().tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]


def test_the_update_follows_the_optimizer_step_by_default() -> None:
    method = set_()
    context = example_b(method)
    assert one_step(context, method, 0) and method.churn["updates"] == 1
    method = set_(skip_step_on_update=True)
    context = example_b(method)
    assert not one_step(context, method, 0) and method.churn["updates"] == 1
    assert one_step(context, method, 1) and method.churn["updates"] == 1


def test_counts_stay_and_growth_needs_no_gradient() -> None:
    method = set_(alpha=0.9)
    context = open_phase(OneLayer(WEIGHT), method, masks={"fc.weight": WEIGHT != 0})
    assert context.parameters()["fc.weight"].grad is None
    method.after_step(context, 0)
    assert context.masks.counts() == {"fc.weight": 7}
    assert mask_of(context) != (WEIGHT != 0).int().tolist()
    assert not any(method.needs_dense_gradient(step) for step in range(10))


def test_draws_depend_on_seed_layer_and_step_only() -> None:
    method = set_()
    context = example_b(method)
    candidates = {"fc.weight": WEIGHT != 0, "other": WEIGHT != 0}
    scores = method.grow_scores(context, 4, candidates)
    torch.manual_seed(99)  # no global generator is involved
    again = set_().grow_scores(example_b(set_()), 4, {"other": WEIGHT != 0, "fc.weight": WEIGHT != 0})
    assert torch.equal(scores["fc.weight"], again["fc.weight"])
    assert not torch.equal(scores["fc.weight"], scores["other"])
    assert not torch.equal(scores["fc.weight"], method.grow_scores(context, 6, candidates)["fc.weight"])
    context.seed = 1
    assert not torch.equal(scores["fc.weight"], method.grow_scores(context, 4, candidates)["fc.weight"])


def test_growth_is_uniform_over_everything_outside_the_kept_set() -> None:
    method = set_(alpha=0.99)  # six of seven move: the largest stays, eleven places for six weights
    grown = torch.zeros(3, 4)
    for seed in range(300):
        context = example_b(method)
        context.seed = seed
        method.update(context, 0)
        grown += context.masks.masks["fc.weight"]
    assert grown[0, 0] == 300
    rest = torch.cat([grown.flatten()[1:]]) / 300
    assert torch.all((rest - 6 / 11).abs() < 0.12), rest  # four standard deviations of a share over 300 draws


def test_grown_weights_start_at_zero_with_fresh_momentum() -> None:
    method = set_(alpha=0.99)
    context = example_b(method)
    method.update(context, 0)
    new = context.masks.masks["fc.weight"] & (WEIGHT == 0)
    assert new.any()
    assert not context.parameters()["fc.weight"].detach()[new].any()
    assert torch.equal(state_of(context, "momentum_buffer") == 0, new)


def test_training_cost_is_that_of_the_sparse_network() -> None:
    method = set_(sparsity=0.5)
    context = open_phase(OneLayer(WEIGHT), method)
    assert method.paper_train_ratio(context) == 0.5
