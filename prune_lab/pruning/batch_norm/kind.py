"""Which modules are batch norms."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

from prune_lab.foundations.lazy import torch

if TYPE_CHECKING:
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm


def is_norm(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """Return whether a module is a batch norm of any dimension."""
    return isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
