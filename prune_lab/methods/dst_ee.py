"""DST-EE: RigL whose growth also favours positions that were rarely active."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from prune_lab.core.card import Card
from prune_lab.families.gradient_growth import GradientGrowth, GradientGrowthConfig
from prune_lab.families.sparse_training import BY_SIGN, REDISTRIBUTION
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import NonNegative, Positive

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.core.context import Context


@dataclass(frozen=True)
class DSTEEConfig(GradientGrowthConfig):
    c: NonNegative
    """weight of exploration; 0 is RigL"""
    eps: Positive
    """added to the number of times a position was active: small values favour positions never active"""
    time: Literal["step", "round"]
    """argument of the logarithm: the optimizer step or the number of the update, at least 1"""
    normalize: Literal["none", "layer_rms"]
    """layer_rms: |gradient| is divided by its root mean square over the layer's pruned weights"""


class DSTEE(GradientGrowth):
    Config = DSTEEConfig
    card = Card(
        summary="RigL whose growth adds c ln(t) / (N + eps) to |gradient|; N counts the rounds a position was active",
        paper="Huang, Lei, Xu, Peng, Sun, Xie, Ding 2023, Dynamic Sparse Training via Balancing the "
        "Exploration-Exploitation Trade-off, arXiv 2211.16667",
        acts="during training, every method.interval steps until method.end of it",
        eligible="weights of convolutions and linear layers; depthwise ones only if included",
        cost="RigL's, and one int32 per weight",
        differences="no official code is known and only the paper's abstract was checked: the bonus is "
        "written from memory of the paper, default values of c and eps are this program's, N starts as the first "
        "mask and counts updates, t is the optimizer step (method.time=round: the update's number). "
        f"{REDISTRIBUTION}. {BY_SIGN}",
    )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.rounds_active: dict[str, Tensor] = {}
        self.last: dict[str, float] = {}
        self.noted_epoch = -1

    def setup(self, context: Context) -> None:
        super().setup(context)
        self.rounds_active = {name: mask.int() for name, mask in context.masks.masks.items()}

    def gradient_scores(self, context: Context, step: int, candidates: dict[str, Tensor]) -> dict[str, Tensor]:
        scores = super().grow_scores(context, step, candidates)
        if self.config.normalize == "none":
            return scores
        return {name: score / _rms(score[~candidates[name]]) for name, score in scores.items()}

    def bonus(self, name: str, step: int) -> Tensor:
        """Return c ln(t) / (N + eps) per position of parameter `name`."""
        time = step if self.config.time == "step" else self.churn["updates"] + 1
        return self.config.c * math.log(max(time, 1)) / (self.rounds_active[name] + self.config.eps)

    def grow_scores(self, context: Context, step: int, candidates: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return |gradient| + bonus; positions just dropped are candidates like all others."""
        scores = self.gradient_scores(context, step, candidates)
        return {name: score + self.bonus(name, step) for name, score in scores.items()}

    def update(self, context: Context, step: int) -> None:
        old = dict(context.masks.masks)
        gradients = self.gradient_scores(context, step, old)
        bonuses = {name: self.bonus(name, step) for name in old}
        super().update(context, step)
        epoch = step // context.steps_per_epoch
        if epoch != self.noted_epoch:  # not in `end_epoch`, which runs twice if a signal stops the evaluation
            self.last, self.noted_epoch = {}, epoch
        for name, mask in context.masks.masks.items():
            self._note_layer(name, gradients[name], bonuses[name], pruned=~old[name], grown=mask & ~old[name])
        for name, mask in context.masks.masks.items():
            self.rounds_active[name] += mask

    def _note_layer(self, name: str, gradient: Tensor, bonus: Tensor, *, pruned: Tensor, grown: Tensor) -> None:
        """Record mean |gradient| and bonus of the layer's new weights and of all pruned ones."""
        count, layer = int(grown.sum()), name.removesuffix(".weight")
        if not count:
            return
        for kind, where in (("pruned", pruned), ("grown", grown)):
            self.last[f"{kind}/gradient/{layer}"] = float(gradient[where].mean())
            self.last[f"{kind}/bonus/{layer}"] = float(bonus[where].mean())
        self.last[f"grown/never_active/{layer}"] = int((self.rounds_active[name][grown] == 0).sum()) / count

    def end_epoch(self, context: Context, epoch: int) -> dict[str, float]:
        """Return the churn and the terms of growth in each layer's last update of the epoch.

        grown/gradient/LAYER, grown/bonus/LAYER: means over the newly grown weights; pruned/...: over all weights that
        could have been grown; grown/never_active/LAYER: fraction of grown weights that had never been active.
        """
        return super().end_epoch(context, epoch) | (self.last if epoch == self.noted_epoch else {})

    def state_dict(self) -> dict[str, Any]:
        noted = {"last": dict(self.last), "noted_epoch": self.noted_epoch}
        return super().state_dict() | {"rounds_active": dict(self.rounds_active)} | noted

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        device = {name: counts.device for name, counts in self.rounds_active.items()}
        self.rounds_active = {
            name: counts.to(device.get(name, counts.device)) for name, counts in state["rounds_active"].items()
        }
        self.last, self.noted_epoch = dict(state["last"]), state["noted_epoch"]


def _rms(values: Tensor) -> Tensor:
    """Return the root mean square, 1 where all values are zero."""
    square = values.double().square().mean()
    return torch.where(square > 0, square.sqrt(), 1.0).to(values.dtype)
