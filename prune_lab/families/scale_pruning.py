"""Channels ranked by their batch-norm scales, which a penalty has driven towards zero during training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prune_lab.families.channel_pruning import ChannelPruning, ChannelPruningConfig
from prune_lab.foundations.lazy import torch
from prune_lab.pruning.batch_norm import masks, penalty, thresholds

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.core.context import Context
    from prune_lab.families.channel_pruning import Problem
    from prune_lab.pruning.batch_norm.penalty import ScalePenalty
    from prune_lab.pruning.channels.groups import ChannelMap, Lane


_SMALL = 0.1
"""removed scales above this fraction of the others are reported: their channels still matter"""


class ScalePruning(ChannelPruning):
    """Base of the methods that train under a penalty on batch-norm scales."""

    Config: type[ChannelPruningConfig] = ChannelPruningConfig
    sparse_phases: tuple[str, ...]
    """names of the phases that train under the penalty"""

    def __init__(self, config: ChannelPruningConfig) -> None:
        super().__init__(config)
        self.penalty: ScalePenalty | None = None

    def scores(self, context: Context, channels: ChannelMap) -> Tensor:
        """Return |scale|, the mean over the batch norms that a class of channels passes."""
        found = thresholds.absolute_scales(context.model, channels)
        return thresholds.class_means(channels, found)

    def comparable(self, scores: Tensor, channels: ChannelMap) -> Tensor:
        """Return the scales as they are: batch norm makes all layers comparable."""
        return scores

    def can_rank(self, channels: ChannelMap, lane: Lane) -> bool:
        return bool(thresholds.passed_norms(channels, lane))

    def layout(self, context: Context) -> list[tuple[int, dict[str, int]]] | None:
        """Return the kept weights; the phases under the penalty train the whole network."""
        penalty.scales(context.model)  # raises for networks without
        known = super().layout(context)
        return [(0, {})] if context.phase in self.sparse_phases else known

    def leave_out(self, context: Context, problem: Problem, alive: Tensor) -> dict[str, float]:
        """Mask the channels that are not kept; return and report the remaining size and the removed scales."""
        found = thresholds.absolute_scales(context.model, problem.channels)
        marked = torch.cat(list(masks.left_out(problem.channels, alive).values()))
        values = torch.cat(list(found.values())).cpu()
        gone, others = float(values[marked].mean()), float(values[~marked].mean())
        text = f"scales: removed ones {gone:.2g} on average, others {others:.2g}"
        if gone > _SMALL * others:
            text += "; they have not come close to zero: train longer, or raise method.scale_penalty"
        context.report(text)
        return super().leave_out(context, problem, alive) | {"prune/removed_scale": gone, "prune/kept_scale": others}

    def make_penalty(self, context: Context) -> ScalePenalty:
        """Return the penalty of the phase."""
        raise TypeError(f"{type(self).__name__} does not say what it penalises")

    def setup(self, context: Context) -> None:
        """Create the penalty of a phase that trains under one.

        Raises:
            UserError: no batch norm, or one whose scale is not trainable.
        """
        if context.phase in self.sparse_phases:
            penalty.check_training(context.model)
            self.penalty = self.make_penalty(context)

    def after_backward(self, context: Context, step: int) -> bool:
        """Add the penalty to the gradients of the scales, not of the shifts."""
        if self.penalty is not None:
            self.penalty.add(context.optimizer.param_groups[0]["lr"])
        return True

    def end_epoch(self, context: Context, epoch: int) -> dict[str, float]:
        """Return scales/mean: the mean of |scale|; scales/near_zero: the fraction of scales up to 0.01."""
        if self.penalty is None:
            return {}
        values = self.penalty.values().abs()
        near_zero = (values <= thresholds.NEAR_ZERO).double().mean()
        return {"scales/mean": float(values.mean()), "scales/near_zero": float(near_zero)}
