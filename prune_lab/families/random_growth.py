"""Drop and grow at random positions: the base of SET and its relatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from prune_lab.families.sparse_training import DropAndGrow, DropAndGrowConfig
from prune_lab.foundations.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.core.context import Context


@dataclass(frozen=True)
class RandomGrowthConfig(DropAndGrowConfig):
    growth: Literal["random", "random_unfired"]
    """random: every position equally likely; random_unfired: those that were never active first (the official ITOP code
    names it but does not accept it)"""


class RandomGrowth(DropAndGrow):
    """Moves weights to random positions; no gradient of a pruned weight is needed."""

    Config = RandomGrowthConfig

    def grow_scores(self, context: Context, step: int, candidates: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return one uniform number per position, keyed by (seed, parameter name, step)."""
        scores = {
            name: torch.rand(mask.shape, generator=context.generator("grow", name, step)).to(mask.device)
            for name, mask in candidates.items()
        }
        if self.config.growth == "random":
            return scores
        # In double precision adding 1 keeps all numbers distinct.
        ever = context.history.ever
        return {name: score.double() + ~ever[name] for name, score in scores.items()}

    def paper_train_ratio(self, context: Context) -> float:
        return context.forward_macs / context.dense_macs
