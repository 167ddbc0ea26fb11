"""Whole numbers that the device computes and the host reads late, because every reading stalls a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from prune_lab.foundations.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class DeviceCounts:
    """Whole numbers by name, exact; those still on the device are read on request, all at once."""

    def __init__(self, numbers: Mapping[str, int | Tensor]) -> None:
        """Set the initial numbers; tensors are int64 without dimensions."""
        self._known = dict.fromkeys(numbers, 0)
        self._unknown: dict[str, Tensor] = {}  # to be added: only sums between two readings must fit into 64 bits
        self.add(numbers)

    @property
    def names(self) -> list[str]:
        return list(self._known)

    def add(self, numbers: Mapping[str, int | Tensor]) -> None:
        """Add to the numbers of these names without waiting for the device."""
        for name, number in numbers.items():
            if isinstance(number, torch.Tensor):
                self._unknown[name] = self._unknown[name] + number if name in self._unknown else number
            else:
                self._known[name] += number

    def read(self) -> dict[str, int]:
        """Return the numbers; the host waits for the device if it has added any since the last reading."""
        if self._unknown:
            values = torch.stack(list(self._unknown.values())).tolist()
            added, self._unknown = dict(zip(self._unknown, values, strict=True)), {}
            self.add(added)
        return dict(self._known)

    def weighted_sum(self, factors: Mapping[str, int]) -> int | Tensor:
        """Return the sum of all numbers times their factors, as a tensor if any has not been read yet."""
        known = sum(number * factors[name] for name, number in self._known.items())
        if not self._unknown:
            return known
        products = torch._foreach_mul(list(self._unknown.values()), [factors[name] for name in self._unknown])
        return known + torch.stack(products).sum()
