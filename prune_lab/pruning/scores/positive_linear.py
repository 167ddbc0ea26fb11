"""Functions of torch within which a network is a positive linear map."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

ACTIVATIONS = frozenset(
    ("relu6", "hardtanh", "hardswish", "silu", "gelu", "mish", "elu", "selu", "celu", "softplus", "tanh")
)
"""functions that do not scale with their input, or saturate: ReLU replaces them"""
GATES = frozenset(("sigmoid", "hardsigmoid"))
"""functions whose values multiply a feature map, as in squeeze-and-excitation: 1 replaces them"""
_SHOWN = {"hardtanh": "relu6/hardtanh", "relu6": "relu6/hardtanh"}  # torch's ReLU6 calls hardtanh


class PositiveLinear(TorchFunctionMode):
    """Within it ReLU replaces ACTIVATIONS and 1 replaces GATES, called as modules, functions or methods."""

    def __init__(self) -> None:
        super().__init__()
        self.replaced: Counter[str] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "").rstrip("_")
        if name not in ACTIVATIONS | GATES:
            return func(*args, **(kwargs or {}))
        self.replaced[_SHOWN.get(name, name)] += 1
        values = args[0] if args else (kwargs or {})["input"]
        # Not relu: its backward needs its output, which networks may overwrite, as these functions allow.
        return torch.ones_like(values) if name in GATES else values.clamp(min=0)
