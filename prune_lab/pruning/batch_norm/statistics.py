"""Recalibrates the running statistics of batch norm for a network that has changed since they were measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prune_lab.foundations.lazy import no_grad
from prune_lab.pruning.batch_norm.kind import is_norm

if TYPE_CHECKING:
    from torch import Tensor, nn


@no_grad
def measure_statistics(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Set the statistics of every batch norm of `model` to their means over `batches`; nothing else changes.

    Mean and (unbiased) variance are averaged over the batches, with equal weights. All other modules are in evaluation
    mode.

    Returns:
        The number of images; 0 if there is no batch norm with running statistics.
    """
    norms = [
        module for module in model.modules()
        if is_norm(module) and module.running_mean is not None
    ]  # fmt: skip
    if not norms:
        return 0
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    counted = [counter.clone() for counter in counters]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
        norm.train()
    num_images = 0
    try:
        for images in batches:
            model(images)
            num_images += len(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for counter, count in zip(counters, counted, strict=True):
            counter.copy_(count)
        for module, mode in modes.items():
            module.training = mode
    return num_images
