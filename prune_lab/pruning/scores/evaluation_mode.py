"""Networks prepared for scoring, and restored afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prune_lab.foundations.lazy import torch
from prune_lab.pruning.batch_norm.kind import is_norm

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextlib.contextmanager
def preserve_state(model: nn.Module, *, train_mode: bool) -> Iterator[None]:
    """Context for scoring: gradients for all parameters, no autocast, batch norm on batch or on running statistics.

    Everything else is in evaluation mode: dropout would make each pass score another network. Afterwards parameters'
    gradients are gone, and buffers, modes, `requires_grad` and random states are restored, bit for bit. The caller is
    responsible for the parameters' values. The weights are not copied.
    """
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    device = next(model.parameters()).device
    drawing = torch.random.fork_rng([device] if device.type == "cuda" else [])
    try:
        for module in model.modules():
            module.training = train_mode and is_norm(module)
        for parameter in wanted:
            parameter.requires_grad_(True)
            parameter.grad = None
        with drawing, torch.autocast(device.type, enabled=False):
            yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        for parameter, needed in wanted.items():
            parameter.grad = None
            parameter.requires_grad_(needed)
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def redrawn_linear(model: nn.Module, source: Callable[[str], torch.Generator]) -> Iterator[None]:
    """Give every linear layer Xavier-normal weights in the context; then restore its own, bit for bit.

    Args:
        source: layer name -> generator of its draws.
    """
    own = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    kept = {name: module.weight.data for name, module in own.items()}
    try:
        for name, module in own.items():
            drawn = torch.empty(module.weight.shape)
            torch.nn.init.xavier_normal_(drawn, generator=source(name))
            module.weight.data = drawn.to(kept[name])
        yield
    finally:
        for name, module in own.items():
            module.weight.data = kept[name]


@contextlib.contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Replace, in the context, functions of modules that have no second derivative; values are the same."""
    changed = [module for module in model.modules() if type(module) is torch.nn.Hardsigmoid]
    try:
        for module in changed:
            vars(module)["forward"] = _hard_sigmoid
        yield
    finally:
        for module in changed:
            del module.forward


def _hard_sigmoid(x: Tensor) -> Tensor:
    """Return hard sigmoid from operators with a second derivative, which torch's own lacks."""
    return torch.nn.functional.relu6(x + 3) / 6
