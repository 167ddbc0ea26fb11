"""Which gate scales which weights: one per weight, or one per hidden channel with all dependent weights.

All gates of a network are one flat vector; a group of gates is a layer's part of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prune_lab.accounting.costs import LayerCost, dense_macs
from prune_lab.accounting.network import Network
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.pruning.batch_norm.kind import is_norm
from prune_lab.pruning.channels.groups import ChannelGroup, channel_map, columns, groups_of
from prune_lab.pruning.gates.channels import GatedChannels
from prune_lab.pruning.gates.hard_concrete import Term

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class GateGroup:
    """The gates of one layer; each controls the same number of weights."""

    name: str
    """module path of the layer"""
    size: int
    """number of gates"""
    view: tuple[int, ...]
    """shape in which the gates multiply the layer's weights"""
    weights: int
    """weights of the layer"""

    @property
    def parameter(self) -> str:
        return f"{self.name}.weight"


class WeightGates:
    """One gate per weight of every eligible layer."""

    def __init__(self, network: Network) -> None:
        layers = network.eligible()
        self.groups = [GateGroup(_path(x.parameter), x.size, x.shape, x.size) for x in layers]
        self.parameters = [layer.parameter for layer in layers]
        """paths of all parameters that gates change"""
        self.rows = {layer.parameter: index for index, layer in enumerate(layers)}
        """parameter -> group whose gates scale its rows or weights"""
        self.columns: dict[str, int] = {}
        """parameter -> group whose closed gates close its input columns"""
        self._count(network)

    def _count(self, network: Network) -> None:
        sizes = [group.size for group in self.groups]
        self.num_gates, self._sizes = sum(sizes), torch.tensor(sizes, device=network.device)

    def parts(self, values: Tensor) -> list[Tensor]:
        """Return a flat vector over all gates [num_gates] as views, one per group, shaped to multiply weights."""
        split = values.split([group.size for group in self.groups])
        return [part.view(group.view) for part, group in zip(split, self.groups, strict=True)]

    def fractions(self, values: Tensor) -> Tensor:
        """Return the means [groups] of a flat vector over all gates."""
        return torch.stack([part.mean() for part in values.split([group.size for group in self.groups])])

    def spread(self, values: Tensor) -> Tensor:
        """Return the flat vector over all gates whose entries are those of `values` [groups], divided by group size.

        It is the gradient of a function of `fractions` with respect to the gates' values.
        """
        return (values / self._sizes).repeat_interleave(self._sizes, output_size=self.num_gates)

    def factors(self, gates: Tensor) -> dict[str, Tensor]:
        """Return the factor on each parameter, parameter path -> tensor that broadcasts to it."""
        return dict(zip(self.parameters, self.parts(gates), strict=True))

    def gate_gradient(self, gradients: Mapping[str, Tensor], raw: Mapping[str, Tensor], gates: Tensor) -> Tensor:
        """Return dL/dz [num_gates].

        Args:
            gradients: dL/d(w z) per parameter.
            raw: w per parameter.
            gates: z, flat.
        """
        products = torch._foreach_mul([gradients[path] for path in self.parameters], [raw[p] for p in self.parameters])
        return torch.cat([product.reshape(-1) for product in products])

    def squares(self, raw: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the sum of squares of the weights of each gate, flat, one tensor per group."""
        return [raw[group.parameter].square().reshape(group.size, -1).sum(1) for group in self.groups]

    def masks(self, model: nn.Module, gates: Tensor) -> dict[str, Tensor]:
        """Return the masks of `model` without the closed gates: parameter path -> bool, True = kept."""
        return dict(zip(self.parameters, self.parts(gates > 0), strict=True))

    def weight_terms(self) -> list[Term]:
        """Return the expected number of open gated weights, as a fraction of all gated weights."""
        total = sum(group.weights for group in self.groups)
        return [Term(group.weights / total, rows=index) for index, group in enumerate(self.groups)]

    def macs_terms(self, costs: Sequence[LayerCost]) -> list[Term]:
        """Return the expected MACs of the network as a fraction of the dense one's."""
        total = dense_macs(costs)
        names = [cost.parameter for cost in costs]
        places = [(self.rows.get(name), self.columns.get(name)) for name in names]
        return [Term(cost.macs / total, *place) for cost, place in zip(costs, places, strict=True)]

    def save_statistics(self) -> None:
        """Save the running statistics of channels that closed gates disable; see `restore_statistics`."""

    def restore_statistics(self, gates: Tensor) -> None:
        """Restore the running statistics of closed channels to their values at `save_statistics`."""


class FilterGates(WeightGates):
    """One gate per hidden channel, on the rows of the layer that produces it.

    Where a gate is exactly 0, so are the rows of depthwise convolutions and squeeze-and-excitation that follow the
    channel, and the input columns that read it. So no layer reads the constant that batch norm returns for an empty
    channel, and running statistics of such channels do not change. Outputs and gradients are those of the L0BatchNorm
    of the official code, which excludes closed channels from the batch norm.

    Source: official code of Gallego-Posada et al. 2022, arXiv 2208.04425.
    """

    def __init__(self, network: Network) -> None:
        allowed = {layer.name for layer in network.eligible()}
        self.map = channel_map(network.model, network.image_size)
        self.channels = [group for group in groups_of(self.map) if group.producer in allowed]
        if not self.channels:
            raise UserError(
                f"method.granularity=filter: {type(network.model).__name__} has no hidden channels of their own among "
                "the layers that method.exclude leaves"
            )
        self.groups = [_filter_group(network.model, group) for group in self.channels]
        self._count(network)
        self.rows = {
            f"{path}.weight": index
            for index, group in enumerate(self.channels) for path in (group.producer, *group.followers)
        }
        self._consumers = {
            f"{consumer.path}.weight": (index, consumer.span)
            for index, group in enumerate(self.channels) for consumer in group.consumers
        }
        self.columns = {path: index for path, (index, _) in self._consumers.items()}
        self.parameters = list(dict.fromkeys([*self.rows, *self.columns]))
        self._dims = {path: network.model.get_parameter(path).dim() for path in self.parameters}
        norms = [
            (index, network.model.get_submodule(path))
            for index, group in enumerate(self.channels) for path in group.norms
        ]
        self._statistics = [
            (index, buffer)
            for index, norm in norms if is_norm(norm)
            for buffer in (norm.running_mean, norm.running_var) if buffer is not None
        ]
        self._saved: list[Tensor] = []

    def factors(self, gates: Tensor) -> dict[str, Tensor]:
        drawn = self.parts(gates)
        factors = {}
        for path, index in self.rows.items():
            gate = drawn[index] if path == self.groups[index].parameter else drawn[index] > 0  # followers: open or not
            factors[path] = gate.reshape(-1, *[1] * (self._dims[path] - 1)).to(gates.dtype)
        for path, column in self._open_columns(gates).items():
            factors[path] = factors[path] * column if path in factors else column
        return factors

    def _open_columns(self, gates: Tensor) -> dict[str, Tensor]:
        """Return 1 for the input columns of open channels, 0 for the others, shaped [1, columns, ...] per consumer."""
        opened = [part.flatten() > 0 for part in self.parts(gates)]
        return {
            path: columns(opened[index], span).reshape(1, -1, *[1] * (self._dims[path] - 2)).to(gates.dtype)
            for path, (index, span) in self._consumers.items()
        }

    def gate_gradient(self, gradients: Mapping[str, Tensor], raw: Mapping[str, Tensor], gates: Tensor) -> Tensor:
        readable, sums = self._open_columns(gates), []
        for group in self.groups:
            path = group.parameter
            product = gradients[path] * raw[path]
            sums.append((product * readable[path] if path in readable else product).flatten(1).sum(1))
        return torch.cat(sums)

    def masks(self, model: nn.Module, gates: Tensor) -> dict[str, Tensor]:
        named = dict(model.named_parameters())
        return {path: (factor != 0).expand_as(named[path]) for path, factor in self.factors(gates).items()}

    def removable(self, network: Network) -> GatedChannels:
        """Return the channels, with the cost of the network without some of them."""
        return GatedChannels(network, self.channels)

    def save_statistics(self) -> None:
        buffers = [buffer for _, buffer in self._statistics]
        self._saved = list(torch._foreach_add(buffers, 0)) if buffers else []

    def restore_statistics(self, gates: Tensor) -> None:
        closed = [part.flatten() == 0 for part in self.parts(gates)]
        for (index, buffer), before in zip(self._statistics, self._saved, strict=True):
            buffer.copy_(torch.where(closed[index], before, buffer))
        self._saved = []


def _filter_group(model: nn.Module, group: ChannelGroup) -> GateGroup:
    weight = model.get_parameter(f"{group.producer}.weight")
    return GateGroup(group.producer, group.size, (group.size, *[1] * (weight.dim() - 1)), weight.numel())


def _path(parameter: str) -> str:
    return parameter.removesuffix(".weight")
