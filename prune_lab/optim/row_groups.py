"""Groups of rows of several tensors, which are removed together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from prune_lab.foundations.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


class RowGroups:
    """Groups of rows of several tensors: sums over each group, and values per group expanded to the rows."""

    def __init__(self, rows: Sequence[Tensor], num_groups: int) -> None:
        """Take the group of every row of each tensor.

        Args:
            rows: int64 [first dimension] per tensor; -1: in no group.
        """
        self._num_rows = [len(ids) for ids in rows]
        ids = torch.cat([*rows, torch.zeros(0, dtype=torch.int64)])
        self._group_of = torch.where(ids < 0, num_groups, ids)
        counts = torch.bincount(self._group_of, minlength=num_groups + 1)[:num_groups]
        # A gathered table instead of index_add_, whose order of additions is not deterministic on a GPU. Processes that
        # disagreed about the last bit of a norm would disagree about which groups are zero.
        self._places = torch.full((num_groups, int(counts.max()) if num_groups else 0), len(ids))
        order = self._group_of.argsort(stable=True)[: int(counts.sum())]
        group = self._group_of[order]
        self._places[group, torch.arange(len(order)) - (counts.cumsum(0) - counts)[group]] = order

    def to(self, device: torch.device) -> RowGroups:
        """Move to `device` and return itself."""
        self._group_of, self._places = self._group_of.to(device), self._places.to(device)
        return self

    def sums(self, per_row: Sequence[Tensor]) -> Tensor:
        """Return the sum of each group's rows [groups].

        Args:
            per_row: a value for each row [rows] of every tensor.
        """
        return torch.cat([*per_row, per_row[0].new_zeros(1)])[self._places].sum(1)

    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the L2 norm of all values of each group [groups]."""
        return self.sums([_row_norms(tensor).square() for tensor in tensors]).sqrt()

    def spread(self, values: Tensor, *, outside: float) -> tuple[Tensor, ...]:
        """Return for each tensor the value of each row's group [rows].

        Args:
            values: [groups].
            outside: for rows in no group.
        """
        return torch.cat([values, values.new_full((1,), outside)])[self._group_of].split(self._num_rows)


def group_sizes(rows: Mapping[nn.Parameter, Tensor], num_groups: int) -> Tensor:
    """Return the number of values in each group, float32 [groups].

    Args:
        rows: parameter -> group of each of its rows; -1: in none.
    """
    sizes = torch.zeros(num_groups, dtype=torch.int64)
    for parameter, ids in rows.items():
        sizes += torch.bincount(ids[ids >= 0], minlength=num_groups) * parameter[0].numel()
    return sizes.float()


def _row_norms(tensor: Tensor) -> Tensor:
    if tensor.dim() == 1:
        return tensor
    return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.dim())))


def as_rows(values: Tensor, tensor: Tensor) -> Tensor:
    """Return `values` [rows] shaped so that they multiply the rows of `tensor`."""
    return values.view(-1, *[1] * (tensor.dim() - 1))
