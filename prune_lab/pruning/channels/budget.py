"""How many channels each layer keeps under a budget when all layers keep alike, and what a network then costs."""

from __future__ import annotations

from prune_lab.accounting.costs import sparse_macs
from prune_lab.accounting.network import Network
from prune_lab.foundations.lazy import torch
from prune_lab.pruning.channels.costs import ChannelCosts, Unit
from prune_lab.pruning.channels.groups import ChannelGroup, channel_map, weight_counts
from prune_lab.pruning.channels.selection import Budget, choose_counts, within_lanes


def macs(network: Network, groups: list[ChannelGroup], kept: dict[str, int]) -> int:
    """Return MACs per image when producers keep so many channels; those that are missing keep all."""
    return sparse_macs(network.costs, weight_counts(network.model, groups, kept))


def alike(network: Network, groups: list[ChannelGroup], unit: Unit, ratio: float) -> dict[str, int]:
    """Return the channels to keep, producer -> count: about the same fraction of each group, within the budget.

    Raises:
        UserError: one channel per group costs more.
    """
    channels = channel_map(network.model, network.image_size)
    costs = ChannelCosts(network.model, channels, network.costs)
    producers = {group.producer for group in groups}
    ranked = within_lanes(torch.zeros(channels.num_classes), channels)
    free = [lane.name in producers for lane in channels.lanes]
    counts = choose_counts(ranked, channels, costs, Budget(unit, ratio, even=True), free=free)
    return {lane.name: int(count) for lane, count in zip(channels.lanes, counts, strict=True) if lane.name in producers}
