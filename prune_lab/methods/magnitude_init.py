"""Magnitude pruning at initialisation: the largest untrained weights are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prune_lab.core.card import Card
from prune_lab.families.initial_pruning import InitialPruning

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.core.context import Context


class MagnitudeInit(InitialPruning):
    card = Card(
        summary="keep the largest |weight| at initialisation, then train with that mask",
        paper="baseline of Tanaka et al. 2020, SynFlow, arXiv 2006.05467, and Frankle et al. 2021, arXiv 2009.08576",
        acts="once, before training",
        eligible="weights of convolutions and linear layers; depthwise ones only if included",
        cost="none to score; gradient norms take two passes over one scoring batch; one bool per weight",
        differences="exact count. One ranking over all layers favours those with few inputs, whose initial weights are "
        "larger; at high sparsity wide layers can be left empty (method.min_per_layer, method.distribution)",
    )

    def scores(self, context: Context) -> dict[str, Tensor]:
        named = context.parameters()
        return {layer.parameter: named[layer.parameter].detach().abs() for layer in context.eligible()}
