"""A phase on a network of a few weights, for the hand examples of methods. Holds no tests."""

from __future__ import annotations

import torch
from torch import nn

from prune_lab.accounting.costs import profile
from prune_lab.accounting.eligibility import select_layers
from prune_lab.core.context import Context


def context_of(
    model: nn.Module, masks: dict[str, torch.Tensor], image_size: int = 4, *, channels: int = 3
) -> Context:
    """Return a phase of 100 steps on `model` with `masks` (none if empty), momentum filled with ones."""
    context = Context(
        model=model,
        costs=profile(model, image_size, channels=channels),
        layers=select_layers(model),
        phase="train",
        seed=0,
        total_steps=100,
        steps_per_epoch=10,
    )
    context.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        context.optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    if masks:
        context.install_masks(masks)
    return context
