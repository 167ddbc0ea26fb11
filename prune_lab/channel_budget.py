"""How many channels each layer keeps under a budget of MACs."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from prune_lab.accounting import sparse_macs
from prune_lab.channels import ChannelGroup, weight_counts
from prune_lab.context import Context
from prune_lab.schema import ConfigError


def macs(context: Context, groups: list[ChannelGroup], kept: dict[str, int]) -> int:
    """Return MACs per image when producers keep so many channels; those that are missing keep all."""
    return sparse_macs(context.costs, weight_counts(context.model, groups, kept))


def largest_within(
    groups: list[ChannelGroup], limit: Fraction, cost: Callable[[dict[str, int]], int], dense: int
) -> dict[str, int]:
    """Return the channels to keep: the largest common fraction within `limit`, then one more per layer where it fits.

    Args:
        limit: MACs, below those of the dense network.
        cost: channels per producer -> MACs.
        dense: MACs of the dense network, for the message.

    Raises:
        ConfigError: one channel per layer costs more.
    """
    def at(fraction: Fraction) -> dict[str, int]:
        return {group.producer: max(1, math.floor(fraction * group.size)) for group in groups}

    least = cost(at(Fraction(0)))
    if least > limit:
        raise ConfigError(
            f"method.macs_ratio={float(limit / dense):g} is out of reach: with one channel left in every prunable "
            f"layer the network still has {least / dense:.4g} of its MACs; allowed: that or more, below 1"
        )
    fractions = sorted({Fraction(count, group.size) for group in groups for count in range(group.size + 1)})
    low, high = 0, len(fractions) - 1  # all channels never fit: the ratio is below 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(at(fractions[middle])) <= limit else (low, middle)
    kept = at(fractions[low])
    for group in groups:
        trial = kept | {group.producer: min(group.size, kept[group.producer] + 1)}
        kept = trial if cost(trial) <= limit else kept
    return kept
