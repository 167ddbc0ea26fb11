"""How many channels each layer keeps under a budget when all layers keep alike, and what a network then costs."""

from __future__ import annotations

import torch

from prune_lab.accounting import sparse_macs
from prune_lab.channel_costs import ChannelCosts, Unit
from prune_lab.channel_selection import Budget, choose_counts, within_lanes
from prune_lab.channels import ChannelGroup, channel_map, weight_counts
from prune_lab.context import Context


def macs(context: Context, groups: list[ChannelGroup], kept: dict[str, int]) -> int:
    """Return MACs per image when producers keep so many channels; those that are missing keep all."""
    return sparse_macs(context.costs, weight_counts(context.model, groups, kept))


def alike(context: Context, groups: list[ChannelGroup], unit: Unit, ratio: float) -> dict[str, int]:
    """Return the channels to keep, producer -> count: about the same fraction of each group, within the budget.

    Raises:
        ConfigError: one channel per group costs more.
    """
    channels = channel_map(context.model, context.dataset.info.image_size)
    costs = ChannelCosts(context.model, channels, context.costs)
    producers = {group.producer for group in groups}
    ranked = within_lanes(torch.zeros(channels.num_classes), channels)
    free = [lane.name in producers for lane in channels.lanes]
    counts = choose_counts(ranked, channels, costs, Budget(unit, ratio, even=True), free=free)
    return {lane.name: int(count) for lane, count in zip(channels.lanes, counts, strict=True) if lane.name in producers}
