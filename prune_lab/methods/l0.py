"""L0 regularisation: hard-concrete gates, and a price on the expected number of open ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from prune_lab.core.card import Card
from prune_lab.core.method import MethodConfig
from prune_lab.families.gated_weights import GatedWeights, GatesConfig
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import NonNegative

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.config.run import RunConfig
    from prune_lab.core.context import Context


_PENALTY, _HIGHEST_PRICE = 1.0, 2e-4
"""lambda, and the maximum price of one weight (lambda / images) on small data sets: on 1,438 images lambda 1 leaves
2 % of the weights and a network that has learned little."""


@dataclass(frozen=True)
class L0Config(GatesConfig):
    penalty: NonNegative | Literal["auto"]
    """lambda: price of one expected weight, divided by the number of training images; auto: 1, less on few images"""

    @classmethod
    def absent(cls, option: str) -> str | None:
        if option != "sparsity":
            return None
        return (
            "the sparsity is an outcome of method.penalty; raise it for more zeros, or take method=constrained_l0, "
            "which finds the price that meets a target"
        )


class L0(GatedWeights):
    Config = L0Config
    rule = "louizos"
    card = Card(
        summary="random gates on weights or channels learn to stay shut, because every open one has a price",
        paper="Louizos, Welling, Kingma 2018, Learning Sparse Neural Networks through L0 Regularization, "
        "arXiv 1712.01312",
        acts="during training, in every step; filter: closed channels are then removed",
        eligible="weight: weights of convolutions and linear layers, depthwise ones only if included; filter: channels "
        "that no addition or concatenation ties to others",
        cost="a second copy of the weights, with granularity=weight three more tensors of their size, a few passes "
        "over them per step; training is computed dense",
        differences="a gated layer's bias is left as it is (official code: a sign error rewards its open gates; "
        "dropped in training, added in tests); filter gates work as the L0BatchNorm of Gallego-Posada et al. 2022; "
        "gates have an optimizer of their own, as under the weights' SGD rate they hardly move (AMLab-Amsterdam/"
        f"L0_regularization issue 6); penalty=auto, {_PENALTY:g} and at most {_HIGHEST_PRICE:g} per image of an epoch, "
        "is this program's",
    )

    def for_schedule(self, config: RunConfig, steps_per_epoch: int) -> MethodConfig:
        if self.config.penalty != "auto":
            return self.config
        images = steps_per_epoch * config.schedule.batch_size
        return replace(self.config, penalty=min(_PENALTY, float(f"{_HIGHEST_PRICE * images:.2g}")))

    def price(self, context: Context, probability: Tensor) -> Tensor:
        """Return lambda / N times the weights that each gate controls."""
        images = context.dataset.info.num_train
        weights = torch.tensor([float(group.weights) for group in self.layout_of.groups], device=probability.device)
        return self.layout_of.spread(weights) * (self.config.penalty / images)
