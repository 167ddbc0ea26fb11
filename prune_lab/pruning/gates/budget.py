"""The channels of a network that may have gates before all layers that read them, and a target for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prune_lab.accounting.network import Network
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.pruning.channels.costs import Unit
from prune_lab.pruning.channels.removable import RemovableChannels
from prune_lab.pruning.channels.selection import Budget, choose_counts, top
from prune_lab.pruning.gates.polarized import cost

if TYPE_CHECKING:
    from torch import Tensor, nn


class GateBudget(RemovableChannels):
    """Removable channels under a budget; `free` are those with gates."""

    def __init__(
        self, network: Network, unit: Unit, ratio: float, *, linear: bool, residual: bool, exclude: Sequence[str]
    ) -> None:
        """Examine the network of `network`.

        Args:
            unit, ratio: the target.
            linear: whether linear layers may have gates; if not, channels that they read have none.
            residual: whether channels that are added to others may have gates.
            exclude: patterns of layers whose output channels have none.

        Raises:
            UserError: no channels to gate, a pattern without a match, or an unreachable target.
        """
        super().__init__(network, residual=residual, exclude=exclude)
        if not linear:
            self._leave_linear(network.model)
        self.lane_of = self.map.lane_of()
        """int64 [classes]"""
        self.lane_is_free = [bool(self.free[lane.classes[0]]) for lane in self.map.lanes]
        self.num_gates = int(self.free.sum())
        self.unit: Unit = unit
        whole = self.costs.at(unit, self.costs.sizes)
        self.matrix = torch.tensor(self.costs.matrix(unit) / whole)
        """float64 [lanes + 1, lanes + 1] for `polarized.cost`, as a fraction of the dense network's"""
        self.budget = Budget(unit, ratio)
        self.largest(torch.zeros(self.map.num_classes, dtype=torch.float64))  # raises if out of reach

    def _leave_linear(self, model: nn.Module) -> None:
        for path, classes in self.map.columns.items():
            if isinstance(model.get_submodule(path), torch.nn.Linear):
                self.free[classes[classes >= 0]] = False
        if not bool(self.free.any()):
            raise UserError("method.gate_linear=false: linear layers read all channels that could have gates")

    def largest(self, ranking: Tensor) -> Tensor:
        """Return the classes of the largest network found within the target, bool [classes].

        Args:
            ranking: float64 [classes], higher is kept first. Every lane keeps at least one.
        """
        counts = choose_counts(ranking, self.map, self.costs, self.budget, free=self.lane_is_free)
        return top(ranking, self.map, counts)

    def prices(self) -> Tensor:
        """Return the cost of each gate when all are open, a fraction of the dense network's cost, float64 [gates]."""
        _, marginal = cost(torch.tensor(self.costs.sizes, dtype=torch.float64), self.matrix)
        return marginal[self.lane_of][self.free]

    def kept(self, alive: Tensor) -> float:
        """Return the cost of the network with the classes `alive`, bool [classes], as a fraction."""
        return self.at(self.unit, alive)


WORDS = {"macs": "MACs", "params": "parameters", "channels": "channels"}
