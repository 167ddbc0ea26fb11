"""AutoSparse: learned soft thresholds; gradients of pruned weights count less and less."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from prune_lab.accounting.costs import sparse_macs
from prune_lab.core.card import Card
from prune_lab.core.method import MethodConfig
from prune_lab.families import schedule_length
from prune_lab.families.annealed_gradient import AnnealingConfig, GradientAnnealing
from prune_lab.families.soft_threshold import SoftThreshold, SoftThresholdConfig, check_decay
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import NonNegative, Range
from prune_lab.pruning.masks import top_k

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.config.run import RunConfig
    from prune_lab.core.context import Context


_PUBLISHED = -5.0
"""start of the thresholds in the PQuant library"""

_REACH = 1.5
"""multiple of the median weight at which thresholds start on short trainings, in which they hardly move"""


@dataclass(frozen=True)
class AutoSparseConfig(SoftThresholdConfig, AnnealingConfig):
    threshold_decay: NonNegative
    """weight decay of the thresholds"""
    backward_density: Annotated[float, Range(0, 1, open_low=True)]
    """fraction of a layer's weights, including kept ones, that get a gradient; kept ones always do, then the pruned
    ones nearest to their threshold; 1: all; at or below the density: kept ones only"""

    def check(self, path: str) -> None:
        init = _PUBLISHED if self.threshold_init == "auto" else self.threshold_init
        check_decay(path, init=init, decay=self.threshold_decay)


class AutoSparse(GradientAnnealing, SoftThreshold):
    Config = AutoSparseConfig
    card = Card(
        summary="each layer learns a soft threshold; gradients of pruned weights count alpha times, alpha falls to 0",
        paper="Kundu, Mellempudi, Vooturi, Kaul, Dubey 2023, AutoSparse: Towards Automated Sparse Training of Deep "
        "Neural Networks, arXiv 2304.06941",
        acts="during training, in every step",
        eligible="weights of convolutions and linear layers; depthwise ones only if included",
        cost="a second copy of the weights, a dense weight gradient while alpha is above 0; a few elementwise passes "
        "over the weights per step",
        differences="no official code is known, and only the paper's abstract was read: alpha 0.75, sigmoid_cosine, "
        "threshold_init -5 and cutoff 0.9 are not checked against the paper; the last two are those of the PQuant "
        "library, which has alpha 0.5, one threshold per channel, and multiplies alpha by its schedule again and again "
        f"(method.compound=true). threshold_init=auto is {_PUBLISHED:g} from {schedule_length.LONG:,} steps on, and on "
        f"shorter trainings (this program's) {_REACH:g} times the median weight of the start. "
        "The sparsity is an outcome, and no search over alpha for a target is offered: "
        "autosparse_topk has an exact budget. Thresholds are not clipped",
    )

    def for_schedule(self, config: RunConfig, steps_per_epoch: int) -> MethodConfig:
        if self.config.threshold_init != "auto" or not schedule_length.is_long(config, steps_per_epoch):
            return self.config
        return replace(self.config, threshold_init=_PUBLISHED)

    def start(self, context: Context) -> float:
        if self.config.threshold_init != "auto":
            return super().start(context)
        limit = min(_REACH * schedule_length.median_weight(context), 0.5)
        return max(math.log(limit / (1 - limit)), _PUBLISHED) if limit else _PUBLISHED

    def _num_trained(self, context: Context, name: str) -> int:
        """Return the number of a layer's weights that get a gradient while alpha is above 0."""
        return max(round(self.config.backward_density * self.raw[name].numel()), context.masks.counts()[name])

    def gate(self, context: Context, name: str, step: int) -> Tensor:
        factor = super().gate(context, name, step)
        if self.config.backward_density == 1 or not self.alpha(step):
            return factor
        # Weights above their threshold are kept, so the highest are the kept ones, then the nearest pruned ones.
        excess = self.raw[name].abs() - torch.sigmoid(self.thresholds[name].detach())
        return factor * top_k.keep_top(excess, self._num_trained(context, name))

    def weight_gradient_macs(self, context: Context, step: int) -> int | None:
        if not self.needs_dense_gradient(step):
            return None
        if self.config.backward_density == 1:
            return context.dense_macs
        return sparse_macs(context.costs, {name: self._num_trained(context, name) for name in self.raw})
