"""Network Slimming: an L1 penalty on batch-norm scales; the channels of the smallest are removed, then fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prune_lab.core.card import Card
from prune_lab.core.phase import TRAIN, Phase
from prune_lab.families.channel_pruning import ChannelPruningConfig
from prune_lab.families.scale_pruning import ScalePruning
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import NonNegative, Positive
from prune_lab.pruning.batch_norm import penalty, thresholds
from prune_lab.pruning.channels import selection

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.core.context import Context
    from prune_lab.families.channel_pruning import Problem
    from prune_lab.pruning.batch_norm.penalty import ScalePenalty


@dataclass(frozen=True)
class SlimmingConfig(ChannelPruningConfig):
    scale_penalty: NonNegative
    """factor of the penalty; its gradient is this times the sign of the scale"""
    scale_init: Positive | None
    """initial scales of an untrained network; None: the values with which the network is built"""
    official_threshold: bool
    """whether channels_ratio is read as in the official code, by a threshold whose own channel is removed"""

    def check(self, path: str) -> None:
        super().check(path)
        if self.official_threshold and (self.channels_ratio is None or self.scope != "global"):
            raise UserError(f"{path}.official_threshold=true goes with {path}.channels_ratio and {path}.scope=global")


class Slimming(ScalePruning):
    Config = SlimmingConfig
    sparse_phases = (TRAIN.name,)
    card = Card(
        summary="train with an L1 penalty on batch-norm scales, remove the channels with the smallest, fine-tune",
        paper="Liu, Li, Shen, Huang, Yan, Zhang 2017, Learning Efficient Convolutional Networks through Network "
        "Slimming, arXiv 1708.06519",
        acts="adds scale_penalty x sign(scale) to the gradients of all batch-norm scales in training; removes once; "
        "the fine-tuning trains the smaller network",
        eligible="channels that pass a batch norm. By default those of residual trunks stay, as in the official code; "
        "with residual=true a trunk's channel counts by the mean of its scales, and so does a depthwise pair",
        cost="one update of all scales per step; fine-tuning costs what the smaller network costs",
        differences="the official code removes one channel more than asked (official_threshold), may empty a layer "
        "(here least_channels stay), has pre-activation networks whose blocks pick channels of a full trunk (here they "
        "read all of it) and repeats the whole schedule to fine-tune. Budgets of MACs or parameters are this program's",
    )

    def before(self) -> tuple[Phase, ...]:
        return (TRAIN,)

    def phase_identity(self, phase: Phase) -> dict[str, Any]:
        """Return the options; all targets share the training under the penalty."""
        if phase == TRAIN:
            return {"scale_penalty": self.config.scale_penalty, "scale_init": self.config.scale_init}
        return super().phase_identity(phase)

    def setup(self, context: Context) -> None:
        super().setup(context)
        if context.phase == TRAIN.name and self.config.scale_init is not None:
            self._start_scales(context)

    def _start_scales(self, context: Context) -> None:
        found = penalty.scales(context.model).values()
        values = torch.cat([scale.detach() for scale in found])
        if not bool(((values == 0) | (values == 1)).all()):  # initial values of built networks
            context.report(f"method.scale_init={self.config.scale_init:g} is left out: these weights are trained")
            return
        for scale in found:
            scale.detach().fill_(self.config.scale_init)

    def make_penalty(self, context: Context) -> ScalePenalty:
        return penalty.ScalePenalty(context.model, self.config.scale_penalty)

    def choose(self, context: Context, problem: Problem) -> Tensor:
        """Return the classes of channels to keep, bool [num_classes]."""
        if not self.config.official_threshold:
            return super().choose(context, problem)
        scores, lanes = self.ranking(context, problem), problem.channels.lanes
        free = torch.zeros(len(scores), dtype=torch.bool)
        for lane, may_go in zip(lanes, problem.free, strict=True):
            free[lane.classes] = may_go
        kept = torch.ones_like(free)
        kept[free] = thresholds.above_quantile(scores[free], self.config.channels_ratio)
        counts = problem.fixed_counts({index: int(kept[lane.classes].sum()) for index, lane in enumerate(lanes)})
        return selection.top(scores, problem.channels, counts)
