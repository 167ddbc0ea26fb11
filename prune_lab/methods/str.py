"""STR: soft thresholds that weight decay alone activates, without gradients for pruned weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from prune_lab.core.card import Card
from prune_lab.core.method import MethodConfig
from prune_lab.families.soft_threshold import (
    AWAKE,
    HIGHER_STARTS,
    SoftThreshold,
    SoftThresholdConfig,
    check_decay,
    decayed,
    waking_start,
)
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import NonNegative
from prune_lab.optim import learning_rate, optimizer

if TYPE_CHECKING:
    from prune_lab.config.run import RunConfig
    from prune_lab.core.context import Context


_PUBLISHED = -3200.0
"""start of the thresholds of the published ResNet-50 (90.23 %)"""


@dataclass(frozen=True)
class STRConfig(SoftThresholdConfig):
    threshold_decay: NonNegative | Literal["auto"] | None
    """weight decay of the thresholds; None: the optimizer's (published); auto: the same if it activates the thresholds
    within half of the training, else one that activates them after a third"""

    def check(self, path: str) -> None:
        if self.threshold_init != "auto" and self.threshold_decay != "auto":
            check_decay(path, init=self.threshold_init, decay=self.threshold_decay or 0.0)


class STR(SoftThreshold):
    Config = STRConfig
    card = Card(
        summary="each layer learns a soft threshold; the network is dense until weight decay has woken the thresholds",
        paper="Kusupati, Ramanujan, Somani, Wortsman, Jain, Kakade, Farhadi 2020, Soft Threshold Weight "
        "Reparameterization for Learnable Sparsity, arXiv 2002.03231",
        acts="during training, in every step once the thresholds are awake",
        eligible="weights of convolutions and linear layers; depthwise ones only if included (the official code prunes "
        "them)",
        cost="a second copy of the weights; a few elementwise passes over them per step",
        differences="the sparsity is an outcome of start and decay of the thresholds; settings that would never prune "
        "are refused. Thresholds start at -3200 (ResNet-50, ImageNet, 90%; MobileNetV1: -12800) and are not clipped. "
        "With threshold_decay=auto trainings that are too short for these (less than twice the steps in which the "
        "optimizer's decay wakes the thresholds) get a decay that wakes them after a third, and where none does "
        "thresholds that start higher, in a handful of steps at -10 (this program's)",
    )

    def decay(self, context: Context) -> float:
        own = self.config.threshold_decay
        return context.optimizer.defaults["weight_decay"] if own is None else own

    def for_schedule(self, config: RunConfig, steps_per_epoch: int) -> MethodConfig:
        schedule = config.schedule.phase("train")
        steps = range(steps_per_epoch * schedule.epochs)
        rates = [learning_rate.learning_rate(schedule, step, steps_per_epoch) for step in steps]
        group = optimizer.build_optimizer(torch.nn.Linear(1, 1, device="meta"), config.optimizer).param_groups[-1]
        return self._fitting(rates, group, config.optimizer.weight_decay)

    def _fitting(self, rates: Sequence[float], group: Mapping[str, Any], inherited: float) -> STRConfig:
        """Return the options with numbers for `auto`.

        Args:
            rates: learning rate of each step.
            group: the optimizer's options, as for `decayed`.
            inherited: its weight decay.
        """
        options = self.config
        free = options.threshold_init == "auto"
        init = _PUBLISHED if free else options.threshold_init
        if options.threshold_decay != "auto":
            return replace(options, threshold_init=init)
        values = list(decayed(init, inherited, rates, group))
        if not values or (values[len(values) // 2] >= AWAKE and max(values) <= 0):
            return replace(options, threshold_init=init, threshold_decay=None)
        if free:
            start, decay = waking_start((init, *HIGHER_STARTS), rates, group) or (AWAKE, None)
        else:
            start, decay = waking_start((init,), rates, group) or (init, None)  # `setup` rejects the latter
        return replace(options, threshold_init=start, threshold_decay=decay)
