"""Hidden channels with one gate each, in one flat vector: which of them stay, and the resulting cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from prune_lab.accounting.network import Network
from prune_lab.foundations.lazy import torch
from prune_lab.pruning.channels.costs import ChannelCosts, Unit
from prune_lab.pruning.channels.groups import ChannelGroup, channel_map
from prune_lab.pruning.channels.selection import Budget, choose_counts, top
from prune_lab.pruning.gates import hard_concrete

if TYPE_CHECKING:
    from torch import Tensor


class GatedChannels:
    """The channels of some groups of a network, one gate each, group by group."""

    def __init__(self, network: Network, groups: Sequence[ChannelGroup]) -> None:
        """Gate `groups` of `network`, from `groups.channel_groups`."""
        self.groups = list(groups)
        self.sizes = [group.size for group in self.groups]
        self.num_gates = sum(self.sizes)
        self.channels = channel_map(network.model, network.image_size)
        self.costs = ChannelCosts(network.model, self.channels, network.costs)
        # The MACs of a network whose layers have one position each are its weights.
        named = network.parameters()  # computed kernels are not parameters
        flat = [replace(cost, positions=1) for cost in network.costs if cost.parameter in named]
        self.weights = ChannelCosts(network.model, self.channels, flat)
        self.places = torch.cat([self.channels.rows[group.producer] for group in self.groups])
        """class of each gate's channel, int64 [num_gates]"""
        self.lanes = self.channels.lane_of()[self.places]
        """lane of each gate, int64 [num_gates]"""
        self.free = [bool((self.lanes == index).any()) for index in range(len(self.channels.lanes))]
        """per lane, whether its channels have gates"""

    def alive(self, opened: Tensor) -> Tensor:
        """Return the remaining classes of channels, bool [num_classes].

        Args:
            opened: bool [num_gates], as in the other functions.
        """
        alive = torch.ones(self.channels.num_classes, dtype=torch.bool)
        alive[self.places] = opened.cpu()
        return alive

    def cost(self, unit: Unit, opened: Tensor) -> int:
        """Return the remaining MACs per image, parameters or prunable channels."""
        return self.costs.at(unit, self.costs.kept(self.alive(opened)))

    def dense(self, unit: Unit) -> int:
        return self.costs.at(unit, self.costs.sizes)

    def keep_one(self, opened: Tensor, log_alpha: Tensor) -> Tensor:
        """Return `opened`, plus the best gate of each group that has none open.

        Args:
            log_alpha: [num_gates], higher is better.
        """
        kept = opened.clone()
        for part, values in zip(kept.split(self.sizes), log_alpha.split(self.sizes), strict=True):
            part[values.argmax()] |= ~part.any()
        return kept

    def best_within(self, log_alpha: Tensor, budget: Budget) -> Tensor:
        """Return the highest gates within a budget of the network, bool [num_gates]; every group keeps one at least.

        Raises:
            UserError: the budget is below the cost of the network with one channel in each group.
        """
        scores = torch.zeros(self.channels.num_classes, dtype=torch.float64)
        scores[self.places] = log_alpha.double().cpu()
        counts = choose_counts(scores, self.channels, self.costs, budget, free=self.free)
        return top(scores, self.channels, counts)[self.places].to(log_alpha.device)


class ExpectedCost:
    """The expected cost of a network with random gates, times a factor.

    Gates are independent given their parameters, so the expectation of a product of two layers' widths is the product
    of their expectations.
    """

    def __init__(
        self, gated: GatedChannels, unit: Unit | Literal["weights"], factor: float, device: torch.device
    ) -> None:
        """Count `unit`; "weights" are those of convolutions and linear layers."""
        matrix = gated.weights.matrix("macs") if unit == "weights" else gated.costs.matrix(unit)
        self._matrix = torch.tensor(factor * matrix, dtype=torch.float32, device=device)
        self._lanes = gated.lanes.to(device)
        sizes, free = torch.from_numpy(gated.costs.sizes), torch.tensor(gated.free)
        self._fixed = (sizes * ~free).float().to(device)
        # A product with a matrix adds in the same order on every process, unlike a sum by index on a GPU.
        members = torch.zeros(len(sizes), gated.num_gates)
        members[gated.lanes, torch.arange(gated.num_gates)] = 1
        self._members = members.to(device)

    def at(self, opened: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cost, a scalar, and its derivative with respect to each gate's P(open).

        Args:
            opened: P(open) [num_gates].
        """
        widths = self._fixed + self._members @ opened
        value, by_width = hard_concrete.expected_cost(widths, self._matrix)
        return value, by_width[self._lanes]
