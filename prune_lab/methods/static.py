"""Static sparse training: one random mask, drawn before training and kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prune_lab.core.card import Card
from prune_lab.families.sparse_training import SparseTraining

if TYPE_CHECKING:
    from prune_lab.core.context import Context


class Static(SparseTraining):
    card = Card(
        summary="a random mask with an exact budget per layer, fixed before training",
        paper="baseline of Evci et al. 2020, Rigging the Lottery, arXiv 1911.11134",
        acts="before the first step; masks never change",
        eligible="weights of convolutions and linear layers; depthwise ones only if included",
        cost="one bool per weight; no extra time",
        differences="counts are exact per layer (public reproductions draw independent bits)",
    )

    def paper_train_ratio(self, context: Context) -> float:
        return context.forward_macs / context.dense_macs
