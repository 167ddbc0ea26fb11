"""Which modules are batch norms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prune_lab.foundations.lazy import torch

if TYPE_CHECKING:
    from torch import nn


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a batch norm, of whatever dimension."""
    return isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
