"""Selection over all layers with a floor per layer."""

from __future__ import annotations

import pytest
import torch

from prune_lab.pruning.masks.top_k import keep_top_global

SCORES = {
    "wide": torch.tensor([[9.0, 8.0, 7.0], [6.0, 5.0, 4.0]]),
    "thin": torch.tensor([1.0, 3.0, 2.0]),
    "tied": torch.tensor([0.0, 0.0]),
}


def kept(num_keep: int, **options) -> dict[str, list[int]]:
    """Return the kept flat positions per layer."""
    masks = keep_top_global(SCORES, num_keep, **options)
    return {name: mask.flatten().nonzero().flatten().tolist() for name, mask in masks.items()}


def test_without_a_floor_layers_may_be_empty():
    assert kept(4) == {"wide": [0, 1, 2, 3], "thin": [], "tied": []}


def test_the_floor_takes_each_layers_best_and_the_rest_goes_by_score():
    assert kept(4, least=1) == {"wide": [0, 1], "thin": [1], "tied": [0]}
    assert kept(7, least=2) == {"wide": [0, 1, 2], "thin": [1, 2], "tied": [0, 1]}


def test_a_floor_that_binds_nowhere_changes_nothing():
    assert kept(11, least=1) == kept(11)
    assert kept(10, least=1) == kept(10)


def test_a_layer_smaller_than_the_floor_is_kept_whole():
    assert kept(9, least=3) == {"wide": [0, 1, 2, 3], "thin": [0, 1, 2], "tied": [0, 1]}


def test_the_floor_is_chosen_among_the_candidates():
    candidates = {name: torch.ones_like(score, dtype=torch.bool) for name, score in SCORES.items()}
    candidates["thin"][1] = False
    candidates["tied"][:] = False
    assert kept(4, least=1, candidates=candidates) == {"wide": [0, 1, 2], "thin": [2], "tied": []}


def test_a_floor_above_the_total_is_refused():
    with pytest.raises(ValueError, match="cannot keep -1 of"):
        keep_top_global(SCORES, 2, least=1)
