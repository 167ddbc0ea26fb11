"""STR: soft thresholds that weight decay alone brings to life, without gradients for pruned weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prune_lab.methods.base import Card
from prune_lab.methods.families.soft_threshold import SoftThreshold, SoftThresholdConfig, check_decay
from prune_lab.schema import NonNegative

if TYPE_CHECKING:
    from prune_lab.context import Context


@dataclass(frozen=True)
class STRConfig(SoftThresholdConfig):
    threshold_decay: NonNegative | None
    """weight decay of the thresholds; None: the optimizer's"""

    def check(self, path: str) -> None:
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
        "are refused. Thresholds start at -3200 (ResNet-50, ImageNet, 90%; MobileNetV1: -12800) and are not clipped",
    )

    def decay(self, context: Context) -> float:
        own = self.config.threshold_decay
        return context.optimizer.defaults["weight_decay"] if own is None else own
