"""Random pruning at initialisation: the baseline of every score, with several layouts over the layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from prune_lab.core.card import Card
from prune_lab.families.initial_pruning import InitialPruning, InitialPruningConfig, random_scores
from prune_lab.foundations.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.core.context import Context


@dataclass(frozen=True)
class RandomConfig(InitialPruningConfig):
    distribution: Literal[  # type: ignore[assignment]  # wider: only a type for every method's words could say so
        "global", "uniform", "er", "erk", "balanced", "smart_ratio", "smart_ratio_vgg", "file", "2:4"
    ]
    """global: one draw over all layers, so that a layer's count varies; otherwise exact counts per layer. balanced: the
    same number of weights in each; smart_ratio: densities that fall with depth, 0.3 in linear layers (Su et al. 2020,
    arXiv 2009.11094); smart_ratio_vgg: also divided by the squared depth"""
    control: Literal["none", "reinit"]
    """reinit: the mask on new initial weights; other controls would randomise what is already random"""

    def check(self, path: str) -> None:
        super().check(path)
        if self.distribution.startswith("smart_ratio") and self.first_layer == "dense_compensated":
            raise UserError(
                f"{path}.first_layer=dense_compensated: {self.distribution} says what the first layer keeps"
            )


class Random(InitialPruning):
    Config = RandomConfig
    card = Card(
        summary="a random mask before training, drawn over all layers together or with a budget per layer",
        paper="baseline of Frankle et al. 2021, Why Are We Missing the Mark, arXiv 2009.08576; smart ratios of Su et "
        "al. 2020, Sanity-Checking Pruning Methods, arXiv 2009.11094",
        acts="once, before training",
        eligible="weights of convolutions and linear layers; depthwise ones only if included",
        cost="none to score; gradient norms take two passes over one scoring batch; one bool per weight",
        differences="exact total (independent bits would give a random one); with smart_ratio all counts add up to the "
        "budget (official code: rounded down)",
    )

    def scores(self, context: Context) -> dict[str, Tensor]:
        return random_scores(context)

    def paper_train_ratio(self, context: Context) -> float:
        """Return f_S / f_D (Evci et al. 2020, appendix H, for SNIP and static masks); it excludes scoring."""
        return context.forward_macs / context.dense_macs
