"""One-shot magnitude pruning of a trained network, then fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prune_lab.core.card import Card
from prune_lab.core.phase import FINETUNE, PRUNE, TRAIN_DENSE, Phase
from prune_lab.families.weight_pruning import WeightPruning

if TYPE_CHECKING:
    from prune_lab.core.context import Context


class Magnitude(WeightPruning):
    card = Card(
        summary="train dense, cut the smallest weights once (per layer or globally), fine-tune",
        paper="Han, Pool, Tran, Dally 2015, Learning both Weights and Connections for Efficient Neural Networks, "
        "arXiv 1506.02626 (one of its prune and retrain rounds)",
        acts="once, between dense training and fine-tuning",
        eligible="weights of convolutions and linear layers; depthwise ones only if included",
        cost="one bool per weight while fine-tuning; no extra time",
        differences="ranks by exact index, ties by position, so the kept count is exact",
    )

    def chain(self) -> tuple[Phase, ...]:
        return (TRAIN_DENSE, PRUNE, FINETUNE)

    def prune(self, context: Context) -> None:
        """Keep the largest |w|: the budget of each layer, or of all layers together with distribution=global."""
        named = context.parameters()
        scores = {layer.parameter: named[layer.parameter].detach().abs() for layer in context.eligible()}
        self.cut(context, self.keep_best(scores, self.budget(context, self.config.sparsity)))
