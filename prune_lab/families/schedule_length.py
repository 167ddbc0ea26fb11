"""Defaults where sparsity is an outcome: published values on long trainings, derived from the weights on short ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prune_lab.foundations.lazy import torch

if TYPE_CHECKING:
    from prune_lab.config.run import RunConfig
    from prune_lab.core.context import Context


LONG = 10_000
"""minimum number of optimizer steps for published values. These come from trainings of 60,000 steps and more. In far
fewer steps weights and thresholds do not move far enough for the values to be meaningful."""


def is_long(config: RunConfig, steps_per_epoch: int) -> bool:
    return steps_per_epoch * config.schedule.phase("train").epochs >= LONG


def median_weight(context: Context) -> float:
    """Return the median |w| of all eligible weights in their current state."""
    named = context.parameters()
    sizes = [named[layer.parameter].detach().abs().flatten() for layer in context.eligible()]
    return float(torch.cat(sizes).median())
