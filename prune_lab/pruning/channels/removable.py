"""Channels that the options leave free to go: their rows as groups, their cost, the best under a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from prune_lab.accounting.network import Network
from prune_lab.foundations import patterns
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.pruning.channels.costs import ChannelCosts, Unit
from prune_lab.pruning.channels.groups import ChannelMap, Lane, channel_map
from prune_lab.pruning.channels.selection import Budget, choose_counts, top

if TYPE_CHECKING:
    from torch import Tensor, nn


class RemovableChannels:
    """Channel classes of a network, and which of them may be removed."""

    def __init__(
        self,
        network: Network,
        *,
        residual: bool,
        exclude: Sequence[str],
        can_rank: Callable[[ChannelMap, Lane], bool] = lambda channels, lane: True,
    ) -> None:
        """Follow the channels of the network.

        Args:
            residual: whether channels that are added to others may go.
            exclude: patterns of layers that keep all of their output channels.
            can_rank: whether a method can tell what the channels of a lane are worth; the others stay.

        Raises:
            UserError: the network cannot be traced, a pattern matches nothing, or nothing may go.
        """
        self.map: ChannelMap = channel_map(network.model, network.image_size)
        self.costs = ChannelCosts(network.model, self.map, network.costs)
        patterns.check("method.exclude", exclude, self.map.producers(), "layer that makes channels")
        self.free_lanes = [
            (residual or not lane.summed) and not patterns.matches(exclude, *lane.producers)
            and can_rank(self.map, lane)
            for lane in self.map.lanes
        ]
        """per lane, whether it may lose channels"""
        if not any(self.free_lanes):
            raise UserError("no channels of this network may be removed under method.exclude and method.residual"
                              if self.map.lanes else
                              f"no channels of this network can be removed: {self.map.holders()}")
        self.free = self.map.members(self.free_lanes)
        """bool [num_classes]"""

    def rows(self, model: nn.Module, *, norm_scales: bool) -> dict[nn.Parameter, Tensor]:
        """Return the class of each row of all that makes or passes a removable channel; -1: of none.

        Weights of convolutions (depthwise ones, too) and linear layers; no biases, no shifts, no frozen parameters.

        Args:
            norm_scales: also the scales of batch norms.
        """
        places = {path: classes for path, classes in self.map.rows.items()}
        places |= self.map.norms if norm_scales else {}
        found: dict[nn.Parameter, Tensor] = {}
        for path, classes in places.items():
            weight = dict(model.get_submodule(path).named_parameters(recurse=False)).get("weight")
            ours = self.map.kept(classes, self.free) & (classes >= 0)
            if weight is not None and weight.requires_grad and bool(ours.any()):
                found[weight] = torch.where(ours, classes, -1)
        return found

    def at(self, unit: Unit, alive: Tensor) -> float:
        """Return which fraction of its MACs, parameters or channels the network has with these classes alone.

        Args:
            unit: macs, params or channels.
            alive: bool [num_classes].
        """
        return self.costs.at(unit, self.costs.kept(alive)) / self.costs.at(unit, self.costs.sizes)

    def best(self, scores: Tensor, macs_ratio: float) -> Tensor:
        """Return the classes with the highest scores under a budget of MACs, bool [num_classes].

        Raises:
            UserError: out of reach.
        """
        counts = choose_counts(scores, self.map, self.costs, Budget("macs", macs_ratio), free=self.free_lanes)
        return top(scores, self.map, counts)

    def threshold(self, scores: Tensor, macs_ratio: float) -> float:
        """Return the lowest t for which the network without the channels of scores up to t has the budget.

        Args:
            scores: float64 [num_classes].

        Returns:
            The highest score where even without all removable channels the network costs more.
        """
        ranked = scores[self.free].unique()
        low, high = 0, len(ranked) - 1
        while low < high:
            middle = (low + high) // 2
            fits = self.at("macs", ~self.free | (scores > ranked[middle])) <= macs_ratio
            low, high = (low, middle) if fits else (middle + 1, high)
        return float(ranked[low])

    def largest_of_empty(self, scores: Tensor, alive: Tensor) -> dict[str, int]:
        """Return for each lane without a channel its name and the class with the highest score."""
        empty = np.flatnonzero(self.costs.kept(alive) == 0)
        lanes = [self.map.lanes[index] for index in empty]
        return {lane.name: int(lane.classes[scores[lane.classes].argmax()]) for lane in lanes}

