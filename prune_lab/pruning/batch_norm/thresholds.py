"""Channels to remove by thresholds on batch-norm scales, and the agreement of several norms of the same channels."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

from prune_lab.foundations.lazy import torch
from prune_lab.pruning.channels.groups import ChannelMap, Lane

if TYPE_CHECKING:
    from torch import Tensor, nn

NEAR_ZERO = 0.01
"""|scale| up to which a channel is reported as closed (the official threshold of MaskSparsity)"""


def above_quantile(values: Tensor, kept: float) -> Tensor:
    """Return which of `values` lie above the entry number int(N * (1 - kept)) of the sorted list, bool like `values`.

    Without ties int(N * (1 - kept)) + 1 values do not, one more than requested; ties at the threshold do not either.

    Args:
        values: [N].
        kept: fraction to keep, in (0, 1].

    Source: official code of Liu et al. 2017, arXiv 1708.06519 (vggprune.py).
    """
    index = int(len(values) * (1 - Fraction(str(kept))))  # 10 * (1 - 0.9) is not 1 in floating point
    return values > values.sort().values[index]


def energy_threshold(values: Tensor, fraction: float) -> float:
    """Return the threshold below which scales hold at most `fraction` of the sum of squares.

    It lies midway between the last scale below and the first above; 0 if none is below; 1 if all scales are smaller
    than 1e-3, so that all may be removed.

    Args:
        values: absolute scales of one batch norm, [channels].

    Source: official code of Jiang et al. 2022, arXiv 2201.06776 (css_thresholding).
    """
    rising = values.double().clamp(min=1e-18).sort().values
    if rising[-1] < 1e-3:
        return 1.0
    share = rising.square().cumsum(0) / rising.square().sum()
    first = int((share > fraction).nonzero()[0])
    return 0.0 if first == 0 else float(rising[first - 1] + rising[first]) / 2


def agreed(pruned: Tensor) -> Tensor:
    """Return the channels kept by a vote of the norms whose outputs are added, bool [channels]; perhaps none.

    The required number of votes is the largest that removes at least as many channels as the norm that prunes fewest.

    Args:
        pruned: channels that each norm would prune by itself, bool [norms, channels].

    Source: official code of Jiang et al. 2022, arXiv 2201.06776 (liu2017).
    """
    votes, fewest = pruned.sum(0), pruned.sum(1).min()
    for asked in range(len(pruned), 0, -1):
        if (votes >= asked).sum() >= fewest:
            break
    return votes < asked


def with_least(kept: Tensor, worth: Tensor, least: int) -> Tensor:
    """Return `kept` (bool [channels]) joined with the best of the others, if fewer than `least` are kept.

    Args:
        worth: [channels]; ties: the lower index.
    """
    missing = least - int(kept.sum())
    if missing <= 0:
        return kept
    order = worth.masked_fill(kept, -torch.inf).argsort(descending=True, stable=True)
    filled = kept.clone()
    filled[order[:missing]] = True
    return filled


def class_means(channels: ChannelMap, values: Mapping[str, Tensor]) -> Tensor:
    """Return the mean of `values` over all positions of a class of channels in batch norms, float64 [num_classes].

    0 for classes that pass none.

    Args:
        values: module path of a batch norm -> [channels].
    """
    sums, counts = (torch.zeros(channels.num_classes, dtype=torch.float64) for _ in range(2))
    for path, rows in channels.norms.items():
        ours = rows >= 0
        sums.index_add_(0, rows[ours], values[path].detach().double().cpu()[ours])
        counts.index_add_(0, rows[ours], torch.ones(int(ours.sum()), dtype=torch.float64))
    return sums / counts.clamp(min=1)


def passed_norms(channels: ChannelMap, lane: Lane) -> list[str]:
    """Return the module paths of the batch norms that a lane's channels pass, in the order of the forward pass."""
    return [path for path, rows in channels.norms.items() if bool((rows == lane.classes[0]).any())]


def lane_values(channels: ChannelMap, lane: Lane, values: Mapping[str, Tensor]) -> Tensor:
    """Return the values of each batch norm at the channels of a lane, [norms, lane.size].

    Args:
        values: module path of a batch norm -> [channels].
    """
    members = []
    for path in passed_norms(channels, lane):
        rows = channels.norms[path]
        places = torch.isin(rows, lane.classes).nonzero().flatten()
        # A norm behind a concatenation may see a channel several times; each time is a member.
        ordered = places[rows[places].argsort(stable=True)].view(lane.size, -1)
        members.append(values[path].detach().cpu()[ordered].T)
    return torch.cat(members)


def absolute_scales(model: nn.Module, channels: ChannelMap) -> dict[str, Tensor]:
    """Return |scale| of the batch norms that channels pass: module path -> [channels]."""
    return {path: model.get_parameter(f"{path}.weight").detach().abs() for path in channels.norms}
