"""What a network costs with fewer channels: exact MACs and parameters from the channels each lane keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from prune_lab.accounting.costs import LayerCost, count_parameters
from prune_lab.foundations.lazy import torch
from prune_lab.pruning.channels.groups import ChannelMap

if TYPE_CHECKING:
    from torch import Tensor, nn

Unit = Literal["macs", "params", "channels"]


@dataclass(frozen=True)
class _Extent:
    """A number of rows or columns: those that stay, and how many each kept channel of a lane adds."""

    fixed: int
    per_channel: np.ndarray
    """int64 [lanes]"""

    def at(self, kept: np.ndarray) -> int:
        return self.fixed + int(self.per_channel @ kept)

    def extended(self) -> np.ndarray:
        """Return what each channel of a lane adds and, behind it, what stays: int64 [lanes + 1]."""
        return np.append(self.per_channel, self.fixed)


@dataclass(frozen=True)
class _Part:
    """Weights of one layer: rows x columns x kernel, each used `positions` times per image."""

    rows: _Extent
    columns: _Extent
    kernel: int
    positions: int
    per_row: int
    """values beside the weights: biases; of a batch norm: scale and shift"""


class ChannelCosts:
    """Costs of a network as a function of the channels that each lane keeps."""

    def __init__(self, model: nn.Module, channels: ChannelMap, costs: Sequence[LayerCost]) -> None:
        """Take the network as it is now; `costs` is its profile."""
        self._channels, self._lane_of = channels, channels.lane_of()
        self.sizes = np.array([lane.size for lane in channels.lanes], dtype=np.int64)
        positions = {cost.parameter: cost.positions for cost in costs}
        self._parts = [self._layer(model, path, positions) for path in channels.rows]
        self._parts += [self._norm(model.get_submodule(path), rows) for path, rows in channels.norms.items()]
        self._other_params = count_parameters(model) - self._params(self.sizes)
        self._other_macs = sum(cost.macs for cost in costs) - self._macs(self.sizes)

    def _layer(self, model: nn.Module, path: str, positions: dict[str, int]) -> _Part:
        columns = self._channels.columns.get(path)
        reads = _Extent(1, np.zeros_like(self.sizes)) if columns is None else self._extent(columns)
        kernel = int(np.prod(model.get_parameter(f"{path}.weight").shape[2:], dtype=np.int64))
        places = positions.get(f"{path}.weight", 0)
        biases = int(model.get_submodule(path).bias is not None)
        return _Part(self._extent(self._channels.rows[path]), reads, kernel, places, biases)

    def _norm(self, norm: nn.Module, rows: Tensor) -> _Part:
        affine = sum(parameter is not None for parameter in (norm.weight, norm.bias))
        return _Part(self._extent(rows), _Extent(0, np.zeros_like(self.sizes)), 0, 0, affine)

    def _extent(self, classes: Tensor) -> _Extent:
        lanes = self._lane_of[classes[classes >= 0]]
        counts = torch.bincount(lanes, minlength=len(self.sizes)).numpy()
        return _Extent(int((classes < 0).sum()), counts // self.sizes)

    def _params(self, kept: np.ndarray) -> int:
        total = 0
        for part in self._parts:
            rows = part.rows.at(kept)
            total += rows * part.columns.at(kept) * part.kernel + rows * part.per_row
        return total

    def _macs(self, kept: np.ndarray) -> int:
        return sum(part.rows.at(kept) * part.columns.at(kept) * part.kernel * part.positions for part in self._parts)

    def at(self, unit: Unit, kept: Sequence[int] | np.ndarray) -> int:
        """Return the MACs per image, parameters or prunable channels left.

        Args:
            kept: channels per lane.
        """
        kept = np.asarray(kept, dtype=np.int64)
        if unit == "macs":
            return self._other_macs + self._macs(kept)
        return self._other_params + self._params(kept) if unit == "params" else int(kept.sum())

    def matrix(self, unit: Unit) -> np.ndarray:
        """Return A with `at(unit, kept)` = x A x, x = `kept` and a 1 behind them; float64 [lanes + 1, lanes + 1].

        It also holds for widths that are no whole numbers.
        """
        matrix = np.zeros((len(self.sizes) + 1,) * 2)
        if unit == "channels":
            matrix[:-1, -1] = 1
            return matrix
        for part in self._parts:
            uses = part.kernel * (part.positions if unit == "macs" else 1)
            matrix += uses * np.outer(part.rows.extended(), part.columns.extended())
            if unit == "params":
                matrix[:, -1] += part.per_row * part.rows.extended()
        matrix[-1, -1] += self._other_macs if unit == "macs" else self._other_params
        return matrix

    def kept(self, alive: Tensor) -> np.ndarray:
        """Return the channels per lane that are left, int64 [lanes].

        Args:
            alive: bool [num_classes].
        """
        return torch.bincount(self._lane_of[alive], minlength=len(self.sizes)).numpy()

    def layer_weights(self, kept: np.ndarray) -> dict[str, int]:
        """Return the weights left in each layer: parameter path -> count."""
        return {
            f"{path}.weight": part.rows.at(kept) * part.columns.at(kept) * part.kernel
            for path, part in zip(self._channels.rows, self._parts, strict=False)
        }
