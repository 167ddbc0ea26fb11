"""What a filter is worth by its weights, and what a class of tied channels is worth by its filters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from prune_lab.foundations.lazy import torch
from prune_lab.pruning.channels.groups import ChannelMap

if TYPE_CHECKING:
    from torch import Tensor, nn


def l1_norms(filters: Tensor) -> Tensor:
    """Return the sums of absolute weights [filters].

    Args:
        filters: [filters, weights].

    Source: Li et al. 2017, arXiv 1608.08710.
    """
    return filters.abs().sum(1)


def l2_norms(filters: Tensor) -> Tensor:
    """Return the Euclidean norms [filters] of filters [filters, weights]."""
    norms: Tensor = filters.norm(dim=1)
    return norms


def distance_sums(filters: Tensor, distance: str) -> Tensor:
    """Return the sum of each filter's distances to all others, float64 [filters].

    The filter with the smallest sum is the nearest to the geometric median of the filters.

    Args:
        filters: [filters, weights].
        distance: l2, l1, or cosine: 1 - the cosine of the angle; 1 to a filter of zeros.

    Source: He et al. 2019, eq. 4, arXiv 1811.00250.
    """
    if distance == "l1":
        return torch.cdist(filters, filters, p=1.0).sum(1, dtype=torch.float64)
    if distance == "cosine":
        directions = torch.nn.functional.normalize(filters.double())
        distances = 1 - directions @ directions.T
    else:
        # A matrix product is many times faster than differences; float64 and the mean taken out keep it exact enough.
        centred = filters.double() - filters.mean(0, dtype=torch.float64)
        squares = centred.square().sum(1)
        distances = (squares[:, None] + squares - 2 * centred @ centred.T).clamp(min=0).sqrt()
    return distances.fill_diagonal_(0).sum(1)


def per_class(
    model: nn.Module, channels: ChannelMap, measure: Callable[[Tensor], Tensor], *, among: Tensor | None = None
) -> Tensor:
    """Return the mean of a measure over all filters that write a class of channels, float64 [num_classes].

    Args:
        measure: filters of one layer [filters, weights] -> their worth [filters].
        among: bool [num_classes], leaves the filters of other classes out of their layers; those are worth 0.
    """
    among = torch.ones(channels.num_classes, dtype=torch.bool) if among is None else among
    sums, counts = (torch.zeros(channels.num_classes, dtype=torch.float64) for _ in range(2))
    for path in channels.producers():
        rows, filters = channels.rows[path], model.get_parameter(f"{path}.weight").detach().flatten(1)
        present = channels.kept(rows, among).nonzero().flatten()
        worth = measure(filters.index_select(0, present.to(filters.device))).double().cpu()
        rows = rows[present]
        ours = rows >= 0
        sums.index_add_(0, rows[ours], worth[ours])
        counts.index_add_(0, rows[ours], torch.ones_like(worth[ours]))
    return sums / counts.clamp(min=1)
