"""Floating-point numbers by their bits: an order that flushing denormals cannot change, and zeros without a sign."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prune_lab.foundations.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


def make_zeros_positive(model: nn.Module) -> None:
    """Replace every -0.0 among the network's tensors by +0.0 in place; all other bits stay.

    Multiplying by a mask keeps the sign of what it removes. Libraries that compare bits then see no zero, and files
    compress less well.
    """
    for tensor in model.state_dict().values():
        clear_sign_of_zeros(tensor)


def clear_sign_of_zeros(values: Tensor) -> None:
    """Replace every -0.0 by +0.0 in place; integers stay as they are."""
    if values.is_floating_point():
        bits = bits_of(values)
        bits.masked_fill_(bits == torch.iinfo(bits.dtype).min, 0)  # comparing as numbers would clear denormals


def bits_of(values: Tensor) -> Tensor:
    """Return a view of floating-point numbers of 16, 32 or 64 bits as integers."""
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
