"""Which channels of a network may have gates before all layers that read them, and what it costs with some of them."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prune_lab.channel_costs import ChannelCosts, Unit
from prune_lab.channel_selection import Budget, choose_counts, top
from prune_lab.channels import Lane, channel_map
from prune_lab.context import Context
from prune_lab.schema import ConfigError, suggestion

WORDS = {"macs": "MACs", "params": "parameters", "channels": "channels"}


class GateBudget:
    """The channels with gates, and a target for the network that is left when some of the gates are 0."""

    def __init__(
        self, context: Context, unit: Unit, ratio: float, *, linear: bool, residual: bool, exclude: Sequence[str]
    ) -> None:
        """Look at the network of `context`.

        Args:
            unit, ratio: the target.
            linear: whether linear layers may have gates; if not, channels that they read have none.
            residual: whether channels that are added to others may have gates.
            exclude: patterns of layers whose output channels have none.

        Raises:
            ConfigError: no channels to gate, a pattern without a match, a target out of reach.
        """
        model = context.model
        self.channels = channel_map(model, context.dataset.info.image_size)
        self.costs = ChannelCosts(model, self.channels, context.costs)
        self.lane_of = self.channels.lane_of()
        """int64 [classes]"""
        self._check_patterns(exclude)
        barred = set() if linear else {
            path for path in self.channels.columns if isinstance(model.get_submodule(path), nn.Linear)
        }
        self.free = [self._may_close(lane, barred, residual, exclude) for lane in self.channels.lanes]
        """per lane, whether its channels have gates"""
        if not any(self.free):
            raise ConfigError(
                f"{type(model).__name__} has no channels to gate under method.exclude, method.residual and "
                "method.gate_linear"
            )
        self.gated = torch.tensor(self.free)[self.lane_of]
        """bool [classes]"""
        self.num_gates = int(self.gated.sum())
        self.unit: Unit = unit
        self.dense = self.costs.at(unit, self.costs.sizes)
        self.budget = Budget(unit, ratio)
        self.largest(torch.zeros(self.channels.num_classes, dtype=torch.float64))  # refuses what is out of reach

    def _check_patterns(self, exclude: Sequence[str]) -> None:
        names = self.channels.producers()
        for pattern in exclude:
            if not fnmatch.filter(names, pattern):
                raise ConfigError(
                    f"method.exclude: {pattern!r} matches no layer that makes channels{suggestion(pattern, names)}; "
                    f"there are {', '.join(names)}"
                )

    def _may_close(self, lane: Lane, barred: set[str], residual: bool, exclude: Sequence[str]) -> bool:
        named = any(fnmatch.filter(lane.producers, pattern) for pattern in exclude)
        columns = self.channels.columns.items()
        readers = {path for path, classes in columns if bool((classes == lane.classes[0]).any())}
        return bool(readers) and not readers & barred and not named and (residual or not lane.summed)

    def largest(self, ranking: Tensor) -> Tensor:
        """Return the classes of the largest network found within the target, bool [classes].

        Args:
            ranking: float64 [classes], higher is kept first. Every lane keeps one at least.
        """
        counts = choose_counts(ranking, self.channels, self.costs, self.budget, free=self.free)
        return top(ranking, self.channels, counts)

    def kept(self, alive: Tensor) -> float:
        """Return what the network costs with the classes `alive`, bool [classes], as a fraction."""
        return self.costs.at(self.unit, self.costs.kept(alive)) / self.dense
