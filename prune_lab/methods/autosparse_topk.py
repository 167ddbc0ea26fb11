"""AutoSparse's annealed gradients under a fixed budget: the largest weights are active, the others train along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prune_lab.core.card import Card
from prune_lab.families.annealed_gradient import AnnealingConfig, GradientAnnealing
from prune_lab.families.weight_pruning import WeightPruning, WeightPruningConfig

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.core.context import Context


@dataclass(frozen=True)
class AutoSparseTopKConfig(WeightPruningConfig, AnnealingConfig):
    """A budget, and the factor on the gradients of weights outside it."""


class AutoSparseTopK(GradientAnnealing, WeightPruning):
    Config = AutoSparseTopKConfig
    card = Card(
        summary="the largest weights act, the others get alpha times their gradient until alpha has fallen to 0",
        paper="Kundu, Mellempudi, Vooturi, Kaul, Dubey, AutoSparse, submission to ICLR 2023 (OpenReview zyfEWkV6it), "
        "whose abstract names gradient annealing combined with a fixed top-k budget",
        acts="during training, in every step",
        eligible="weights of convolutions and linear layers; depthwise ones only if included",
        cost="a second copy of the weights, a dense weight gradient while alpha is above 0; one selection per layer "
        "and step",
        differences="no official code is known, and only that abstract was read: that the largest weights of a layer "
        "are kept as they are, without threshold and shrinking, is derived here from AutoSparse (arXiv 2304.06941). "
        "alpha 0.75 and sigmoid_cosine are not checked against either paper, cutoff 0.9 is that of the PQuant library, "
        "which multiplies alpha by its schedule again and again (method.compound=true)",
    )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.kept: int | dict[str, int] = {}
        self.empty: set[str] = set()

    def setup(self, context: Context) -> None:
        self.kept = self.budget(context, self.config.sparsity)
        super().setup(context)

    def project(self, context: Context) -> dict[str, Tensor]:
        return self.keep_best({name: raw.abs() for name, raw in self.raw.items()}, self.kept)

    def end_epoch(self, context: Context, epoch: int) -> dict[str, float]:
        """Return the factor of the epoch; report layers that a global budget leaves empty."""
        empty = {name.removesuffix(".weight") for name, count in context.masks.counts().items() if count == 0}
        if empty != self.empty:
            context.report(f"layers without any weight now: {', '.join(sorted(empty)) or 'none'}")
        self.empty = empty
        return super().end_epoch(context, epoch)
