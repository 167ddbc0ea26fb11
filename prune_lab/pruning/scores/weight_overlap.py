"""Overlap between the large weights of two networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from prune_lab.foundations.lazy import torch
from prune_lab.pruning.masks.top_k import keep_top

if TYPE_CHECKING:
    from torch import Tensor


def overlap_of_largest(
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    fraction: float,
    masks: Mapping[str, Tensor] | None = None,
) -> float:
    """Return the fraction of each layer's largest weights of `first` that are also among the largest of `second`.

    About `fraction` for unrelated weights, 1 for equal ones. Above `fraction` after training: initially large weights
    remained large, as with a small learning rate or a short training.

    Args:
        first, second: layer -> weights, of the same shapes.
        fraction: fraction of a layer's weights that count as large, in (0, 1]; rounded per layer.
        masks: layer -> True where weights are kept; only those count. None: all.

    Source: Ma et al. 2021, Sanity Checks for Lottery Tickets, arXiv 2107.00166.
    """
    shared, chosen = torch.zeros((), dtype=torch.int64), 0
    for name, weight in first.items():
        kept = None if masks is None else masks[name]
        count = round(fraction * (weight.numel() if kept is None else int(torch.count_nonzero(kept))))
        tops = [keep_top(values.abs(), count, candidates=kept) for values in (weight, second[name])]
        shared = shared + torch.count_nonzero(tops[0] & tops[1]).cpu()
        chosen += count
    return int(shared) / chosen if chosen else 1.0
