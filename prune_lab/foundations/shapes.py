"""Passes through networks without memory ("meta" device), for their shapes only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class QuickShapes(TorchDispatchMode):
    """Returns the output shapes of batch norm directly.

    On that device torch runs batch norm in Python, which takes longer than the rest of the pass.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.native_batch_norm.default and args[0].is_meta:
            images, training = args[0], args[5]
            kept = images.shape[1] if training else 0  # means and standard deviations, for the backward pass
            return meta_like(images), images.new_empty(kept), images.new_empty(kept)
        return func(*args, **(kwargs or {}))


def meta_like(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape, strides and type without memory."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
