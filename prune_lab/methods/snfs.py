"""SNFS (sparse momentum): drop the smallest weights, redistribute the freed ones among layers, grow by momentum."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from prune_lab.core.card import Card
from prune_lab.families.sparse_training import BY_SIGN, PROPORTIONAL, DropAndGrow, DropAndGrowConfig, check_dense
from prune_lab.foundations.errors import UserError
from prune_lab.pruning.masks import redistribution

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.core.context import Context


@dataclass(frozen=True)
class SNFSConfig(DropAndGrowConfig):
    redistribution: Literal["momentum", "none"]
    """momentum: freed weights move to the layers whose active weights have the largest mean |momentum| (paper); none:
    layers keep their counts (the momentum baseline of the RigL code)"""
    apportion: Literal["exact", "official"]
    """exact: the total never changes; official: the excess is divided equally, and the next update corrects the total
    (official code)"""

    def check(self, path: str) -> None:
        super().check(path)
        if self.redistribution == "none" and self.apportion == "official":
            raise UserError(f"{path}.apportion=official divides what {path}.redistribution=momentum frees; got none")


class SNFS(DropAndGrow):
    Config = SNFSConfig
    published_interval = None
    card = Card(
        summary="sparse from the start; every epoch the smallest weights move to the largest momentum, layers included",
        paper="Dettmers, Zettlemoyer 2019, Sparse Networks from Scratch: Faster Training without Losing Performance, "
        "arXiv 1907.04840",
        acts="during training, after the optimizer step, at the end of every epoch but the last (method.interval)",
        eligible="weights of convolutions and linear layers; depthwise ones only if included",
        cost="a dense weight gradient in every step, as pruned weights keep their momentum; one bool per weight",
        differences=f"method.apportion=exact keeps the total at every moment and {PROPORTIONAL}; "
        "method.apportion=official is that rule. No layer drops its last weight; the first mask has exact counts, not "
        f"independent bits. {BY_SIGN}",
    )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.residuals: list[int] = []
        self.adjustment = 0.0

    def setup(self, context: Context) -> None:
        super().setup(context)
        self.require_momentum(context, "method=snfs")

    def budget_is_exact(self) -> bool:
        return self.config.apportion == "exact"

    def needs_dense_gradient(self, step: int) -> bool:
        """Return True up to the last update: the momentum of pruned weights decides growth."""
        return step <= max(self.updates, default=-1)

    def num_dropped(self, fraction: float, count: int, shape: tuple[int, ...]) -> int:
        """Return the official ceil(fraction * count), but never the layer's last weight."""
        return min(math.ceil(fraction * count - 1e-9), count - 1)

    def redistributes(self) -> bool:
        return self.config.redistribution != "none"

    def redistribution_signal(self, context: Context, names: Iterable[str]) -> dict[str, Tensor] | None:
        return self.momenta(context, names) if self.redistributes() else None

    def grow_scores(self, context: Context, step: int, candidates: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return |momentum| per position.

        Raises:
            RuntimeError: every momentum of the pruned weights is zero, because it was masked.
        """
        scores = {name: momentum.abs() for name, momentum in self.momenta(context, candidates).items()}
        check_dense(scores, candidates, f"momenta at step {step}")
        return scores

    def new_totals(
        self, shares: dict[str, float], left: dict[str, int], before: dict[str, int], sizes: dict[str, int]
    ) -> dict[str, int]:
        if self.config.apportion == "exact":
            return super().new_totals(shares, left, before, sizes)
        freed = sum(before.values()) - sum(left.values())
        room = {name: sizes[name] - left[name] for name in left}
        grown = redistribution.apportion_official(shares, room, freed + self.adjustment)
        totals = {name: left[name] + grown[name] for name in left}
        # The baseline is the first total: `before` includes the shift by earlier residuals.
        self.residuals.append(sum(before.values()) + sum(self.residuals[-1:]) - sum(totals.values()))
        self.adjustment = (
            0.25 * self.adjustment + 0.75 * self.residuals[-1] + sum(self.residuals) / len(self.residuals)
        )
        return totals

    def paper_train_ratio(self, context: Context) -> float | None:
        """Return (2 E[f_S] + f_D) / 3 f_D (Evci et al. 2020, appendix H), which assumes updates until the end."""
        mean = context.cost.mean_forward
        return None if mean is None else (2 * mean + context.dense_macs) / (3 * context.dense_macs)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"residuals": list(self.residuals), "adjustment": self.adjustment}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.residuals, self.adjustment = list(state["residuals"]), state["adjustment"]
