"""What a filter is worth by its weights, and what a class of tied channels is worth by its filters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from prune_lab.channels import ChannelMap


def l1_norms(filters: Tensor) -> Tensor:
    """Return the sums of absolute weights [filters].

    Args:
        filters: [filters, weights].

    Source: Li et al. 2017, arXiv 1608.08710.
    """
    return filters.abs().sum(1)


def per_class(model: nn.Module, channels: ChannelMap, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the mean of a measure over all filters that write a class of channels, float64 [num_classes].

    Args:
        measure: filters of one layer [filters, weights] -> their worth [filters].
    """
    sums, counts = (torch.zeros(channels.num_classes, dtype=torch.float64) for _ in range(2))
    for path in channels.producers():
        rows = channels.rows[path]
        ours = rows >= 0
        worth = measure(model.get_submodule(path).weight.detach().flatten(1)).double().cpu()
        sums.index_add_(0, rows[ours], worth[ours])
        counts.index_add_(0, rows[ours], torch.ones_like(worth[ours]))
    return sums / counts
