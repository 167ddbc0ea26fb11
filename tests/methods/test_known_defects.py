"""Defects found in public sparse-training code, each as a test that our engine does not share it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prune_lab.compose.choices import options_of
from prune_lab.core.context import Context
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import parse
from prune_lab.foundations.seeding import generator
from prune_lab.methods.rigl import RigL
from prune_lab.methods.set import SET
from prune_lab.pruning.masks.distributions import LayerSize, allocate, num_keep_total
from prune_lab.pruning.masks.mask_set import MaskSet
from prune_lab.pruning.masks.sparsity_schedules import cubic_sparsity
from prune_lab.pruning.masks.top_k import grow, keep_top, random_mask
from tests.helpers.contexts import context_of

CONF = Path(__file__).parents[2] / "conf" / "method"


def method(cls: type, **changes: Any) -> Any:
    """Return the method of conf/method with `changes`, short of its set-up."""
    node = options_of(CONF / f"{cls.__name__.lower()}.yaml") | changes
    del node["_target_"]
    return cls(parse(cls.Config, node, "method"))


def example_b() -> tuple[Context, nn.Parameter]:
    """Return rigl.md example B as a network of one layer."""
    model = nn.Sequential(nn.Conv2d(3, 1, 1, bias=False), nn.Flatten(), nn.Linear(4, 3, bias=False))
    weight = model[2].weight
    with torch.no_grad():
        weight.copy_(torch.tensor([[0.9, -0.1, 0, 0], [0.05, 0.4, 0, -0.7], [0, 0, 0.2, 0.3]]))
    weight.grad = torch.tensor([[0.1, 0.2, 0.8, -0.3], [-0.9, 0.05, 0.1, 0.4], [0.6, -0.2, 0.3, 0]])
    return context_of(model, {"2.weight": weight.detach() != 0}, image_size=2), weight


# --- distributions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", ["er", "erk"])
@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_saturated_layers_lose_no_budget(distribution, sparsity):
    """TurboPrune clips densities at 1 without solving again: 0.190280 instead of 0.2 on this example."""
    layers = [LayerSize("conv1", (16, 3, 3, 3)), LayerSize("conv2", (32, 16, 3, 3)), LayerSize("fc", (10, 32))]
    budget = num_keep_total(5360, sparsity)
    assert sum(allocate(distribution, layers, budget).values()) == budget


def test_no_density_exceeds_one():
    """sparse_learning "linear" leaves probabilities such as 6.6 for a 1x1 shortcut in place."""
    layers = [LayerSize("shortcut", (32, 16, 1, 1)), LayerSize("conv", (64, 64, 3, 3))]
    counts = allocate("erk", layers, num_keep_total(512 + 36_864, 0.9))
    assert counts["shortcut"] == 512
    assert sum(counts.values()) == 3738


def test_masks_have_exact_counts_for_every_seed():
    """Bernoulli masks (rigl-reproducibility, ITOP, GraNet, sparse_learning) realise a random density."""
    assert {int(random_mask((64, 32, 3, 3), 1843, generator(seed)).sum()) for seed in range(20)} == {1843}


def test_layers_keep_their_budget_through_updates():
    """sparse_learning "none" regrows in proportion to layer size: 50/50 becomes 30/70 in one update."""
    model = nn.Sequential(nn.Conv2d(3, 4, 5, bias=False), nn.Flatten(), nn.Linear(900, 1, bias=False))
    masks = {
        name: random_mask(tuple(weight.shape), 50, generator(0, name)) for name, weight in model.named_parameters()
    }
    context = context_of(model, masks, image_size=19)
    set_ = method(SET, alpha=0.5)
    for step in range(0, 50, 10):
        set_.update(context, step)
        assert context.masks.counts() == {"0.weight": 50, "2.weight": 50}


def test_gradual_pruning_reaches_its_target():
    """STR and ITOP divide by end - start + 1 and stop at 0.899970 instead of 0.9."""
    assert cubic_sparsity(30, begin=0, end=30, initial=0.0, final=0.9) == 0.9


# --- dropping --------------------------------------------------------------------------------------------------------


def test_set_drops_its_fraction_and_not_the_whole_layer():
    """sparse_learning's "SET" pruning clears nearly the whole mask."""
    context, weight = example_b()
    old = context.masks.masks["2.weight"]
    set_ = method(SET, alpha=0.3)
    set_.update(context, 0)
    new = context.masks.masks["2.weight"]
    assert int(new.sum()) == 7
    assert int((old & ~new).sum()) <= 2
    assert bool(new[old & (weight.detach().abs() > 0.15)].all())  # the five largest stay


def test_ties_and_zeros_at_the_threshold_do_not_fall_together():
    """ITOP and GraNet keep |w| > threshold: equal weights, exact zeros above all, go together."""
    weight = torch.tensor([0.0, 0.0, 0.0, 0.5, 0.5, 0.5])
    assert keep_top(weight.abs(), 5).tolist() == [True, True, False, True, True, True]
    assert int(keep_top(torch.zeros(7), 4).sum()) == 4


def test_grown_zeros_survive_an_update_that_moves_nothing():
    """ITOP and sparse_learning replace the mask by W != 0 when the drop count is 0."""
    context, weight = example_b()
    grown = context.masks.masks["2.weight"].clone()
    grown[0, 3] = True  # active, still exactly 0
    context.masks.replace("2.weight", grown)
    before = weight.detach().clone()
    method(RigL, alpha=0.1).update(context, 0)  # floor(0.1 * 8) = 0
    assert torch.equal(context.masks.masks["2.weight"], grown)
    assert torch.equal(weight.detach(), before)
    assert bool((context.optimizer.state[weight]["momentum_buffer"] == 1).all())


def test_an_inactive_position_never_enters_by_the_drop_score():
    """google-research/rigl adds noise to the drop score of inactive positions too, so a random one may be kept."""
    weight = torch.tensor([1e-9, 1e-8, 0.0, 0.0, 0.0])
    mask = torch.tensor([True, True, False, False, False])
    assert keep_top(weight.abs(), 2, candidates=mask).tolist() == mask.tolist()


# --- growing ---------------------------------------------------------------------------------------------------------


def test_growth_moves_masks_and_does_not_only_undo_the_drop():
    """ITOP's growth "momentum" always regrows what was dropped: the mask never changes."""
    context, _ = example_b()
    old = context.masks.masks["2.weight"].clone()
    rigl = method(RigL, alpha=0.3)
    rigl.update(context, 0)
    new = context.masks.masks["2.weight"]
    assert new.int().tolist() == [[1, 0, 1, 0], [1, 1, 0, 1], [0, 0, 1, 1]]
    assert int((new & ~old).sum()) == rigl.churn["grown"] == 1


def test_regrown_weights_go_on_and_new_ones_start_at_zero():
    """rigl-reproducibility zeroes regrown weights; sparsimony leaves old dense values in new ones."""
    context, weight = example_b()
    method(RigL, alpha=0.3).update(context, 0)
    momentum = context.optimizer.state[weight]["momentum_buffer"]
    assert weight.detach()[1, 0] == torch.tensor(0.05) and momentum[1, 0] == 1  # dropped and regrown
    assert weight.detach()[0, 2] == 0 and momentum[0, 2] == 0  # new
    assert weight.detach()[0, 1] == 0  # dropped
    assert int((momentum == 0).sum()) == 1


def test_the_reproductions_rule_for_regrown_weights_is_an_option():
    context, weight = example_b()
    method(RigL, alpha=0.3, regrown="zero").update(context, 0)
    momentum = context.optimizer.state[weight]["momentum_buffer"]
    assert weight.detach()[1, 0] == 0 and momentum[1, 0] == 0


def test_a_new_weight_does_not_inherit_a_hidden_value():
    """sparsimony discards the result that should set grown weights."""
    context, weight = example_b()
    weight.data[0, 2] = 7.0  # what an optimizer may have left at a pruned position
    method(RigL, alpha=0.3).update(context, 0)
    assert bool(context.masks.masks["2.weight"][0, 2]) and weight.detach()[0, 2] == 0


def test_a_full_layer_is_left_alone():
    """rigl-reproducibility resets the smallest weights of dense layers at every update."""
    context, weight = example_b()
    context.masks.replace("2.weight", torch.ones(3, 4, dtype=torch.bool))
    before = weight.detach().clone()
    method(RigL, alpha=0.9).update(context, 0)
    assert torch.equal(weight.detach(), before)
    assert bool((context.optimizer.state[weight]["momentum_buffer"] == 1).all())


def test_growth_averages_before_the_absolute_value():
    """rigl-torch, condensed-sparsity and sparsimony average |g|, which grows where replicas disagree."""
    local = torch.tensor([[1.0, 0.6], [-1.0, 0.6]])
    none = torch.zeros(2, dtype=torch.bool)
    assert grow(none, local.mean(0).abs(), 1).tolist() == [False, True]
    assert grow(none, local.abs().mean(0), 1).tolist() == [True, False]  # what they do


def test_masked_gradients_are_noticed():
    """With gradients masked somewhere, growth would pick by position; that must not pass in silence."""
    context, weight = example_b()
    weight.grad *= context.masks.masks["2.weight"]
    with pytest.raises(UserError, match="all gradients at step 0 are zero at pruned weights"):
        method(RigL).update(context, 0)


def test_random_growth_needs_no_gradient_and_depends_on_seed_step_and_name_only():
    """google-research/rigl keys its draws with Python's salted string hash: processes may differ."""

    def grown(step: int) -> list:
        context, weight = example_b()
        weight.grad = None
        torch.rand(3)  # the global generator must not matter
        method(SET, alpha=0.5, decay="constant").update(context, step)
        return context.masks.masks["2.weight"].tolist()

    assert grown(10) == grown(10)
    assert len({str(grown(step)) for step in range(8)}) > 1


def test_output_after_an_update_is_that_without_the_dropped_weights():
    """A grown weight starts at zero, so growing alone must not change what the network computes."""
    context, weight = example_b()
    images = torch.randn(5, 3, 2, 2, generator=generator(0, "images"))
    without = weight.detach().clone()
    without[0, 1] = 0  # dropped and not regrown
    features = context.model[1](context.model[0](images))
    method(RigL, alpha=0.3).update(context, 0)
    assert torch.equal(context.model(images), features @ without.T)


# --- checkpoints and options -----------------------------------------------------------------------------------------


def test_restored_masks_are_the_saved_ones_including_grown_zeros():
    """rigl-reproducibility resumes with a new random mask; sparse_learning with W != 0."""
    context, weight = example_b()
    method(RigL, alpha=0.3).update(context, 0)
    saved, digest = {k: v.clone() for k, v in context.masks.state_dict().items()}, context.masks.digest()
    assert int((weight != 0).sum()) < context.masks.num_kept  # a grown weight is zero
    fresh = MaskSet({"2.weight": weight}, {"2.weight": random_mask((3, 4), 7, generator(1))})
    assert fresh.digest() != digest
    fresh.load_state_dict(saved)
    assert fresh.digest() == digest and fresh.num_kept == 7


@pytest.mark.parametrize("option", ["growth", "prune", "redistribute"])
def test_unknown_options_are_refused(option):
    """GraNet accepts --growth and --prune and ignores them."""
    with pytest.raises(ValueError, match=f"unknown option method.{option}"):
        method(RigL, **{option: "momentum"})


def test_density_instead_of_sparsity_cannot_empty_the_network():
    """GraNet's README starts dense-to-sparse training with density 0: an empty network."""
    for sparsity in (0.0, 1.0):
        with pytest.raises(ValueError, match="method.sparsity must lie in"):
            method(RigL, sparsity=sparsity)
