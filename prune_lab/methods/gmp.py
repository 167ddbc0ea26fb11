"""Gradual magnitude pruning: sparsity rises along a cubic while the network trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from prune_lab.accounting.costs import sparse_macs
from prune_lab.core.card import Card
from prune_lab.core.method import MethodConfig
from prune_lab.core.phase import TRAIN, Phase
from prune_lab.families.weight_pruning import WeightPruning, WeightPruningConfig
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import Count, Fraction, Range
from prune_lab.pruning.masks.sparsity_schedules import cubic_sparsity

if TYPE_CHECKING:
    from prune_lab.config.run import RunConfig
    from prune_lab.core.context import Context


_NUM_CUTS = 15
"""one per 1,000 steps of the RigL paper's runs"""


@dataclass(frozen=True)
class GMPConfig(WeightPruningConfig):
    initial_sparsity: Annotated[float, Range(0, 1, open_high=True)]
    """sparsity at the first cut"""
    begin: Fraction
    """fraction of the training at which the ramp starts"""
    end: Fraction
    """fraction of the training at which the target is reached"""
    num_cuts: Count | Literal["auto"]
    """cuts after the first one, evenly spaced; the last one reaches the target exactly; auto: 15, or as many as a
    shorter ramp has steps"""

    def check(self, path: str) -> None:
        super().check(path)
        if self.end <= self.begin:
            raise UserError(f"{path}.end must exceed {path}.begin={self.begin:g}, got {self.end:g}")
        if self.initial_sparsity >= self.sparsity:
            raise UserError(
                f"{path}.initial_sparsity must be below {path}.sparsity={self.sparsity:g}, "
                f"got {self.initial_sparsity:g}"
            )


class GMP(WeightPruning):
    Config = GMPConfig
    card = Card(
        summary="train dense and cut the smallest weights step by step along a cubic (per layer or globally)",
        paper="Zhu, Gupta 2017, To prune, or not to prune, arXiv 1710.01878; ramp positions as in the RigL paper",
        acts="during training, from method.begin to method.end of it",
        eligible="weights of convolutions and linear layers; depthwise ones only if included",
        cost="one bool per weight; one selection per layer and cut",
        differences="masks only shrink: a removed weight stays zero, its optimizer state is zeroed. The target is "
        "reached exactly at the last cut. distribution=file takes every layer along the cubic to a density of its own; "
        "with 2:4 every group of four keeps two or more at each cut",
    )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.cuts: Mapping[int, int | dict[str, int]] = {}

    def chain(self) -> tuple[Phase, ...]:
        return (TRAIN,)

    def setup(self, context: Context) -> None:
        self.cuts = self.planned_cuts(context)
        named = context.parameters()
        whole = {
            layer.parameter: torch.ones_like(named[layer.parameter], dtype=torch.bool) for layer in context.eligible()
        }
        context.install_masks(whole)
        steps = list(self.cuts)
        context.report(f"cuts: {len(steps)}, from step {steps[0]} to {steps[-1]} of {context.total_steps}")

    def for_schedule(self, config: RunConfig, steps_per_epoch: int) -> MethodConfig:
        first, last = self._ramp(steps_per_epoch * config.schedule.phase("train").epochs)
        return replace(self.config, num_cuts=self._num_cuts(last - first))

    def _ramp(self, total: int) -> tuple[int, int]:
        """Return the steps of the first and the last cut."""
        return round(self.config.begin * total), min(round(self.config.end * total), total - 1)

    def _num_cuts(self, steps: int) -> int:
        """Return the number of cuts after the first one in a ramp of `steps` steps."""
        return max(1, min(_NUM_CUTS, steps)) if self.config.num_cuts == "auto" else self.config.num_cuts

    def planned_cuts(self, context: Context) -> Mapping[int, int | dict[str, int]]:
        """Return step -> weights to keep from then on: a total with distribution=global, else counts per layer.

        Raises:
            UserError: the ramp has fewer steps than cuts.
        """
        if self.config.distribution == "global":
            return {step: self.total(context, level) for step, level in self._levels(context).items()}
        return self._layer_cuts(context)

    def _layer_cuts(self, context: Context) -> dict[int, dict[str, int]]:
        counts, above = {}, {layer.parameter: layer.size for layer in context.eligible()}
        for step, level in self._levels(context).items():
            above = counts[step] = self.allocate_nested(context, level, above)
        return counts

    def _levels(self, context: Context) -> dict[int, float]:
        """Return the step of each cut -> the sparsity it leaves."""
        config = self.config
        first, last = self._ramp(context.total_steps)
        num_cuts = self._num_cuts(last - first)
        if last - first < num_cuts:
            raise UserError(
                f"method.num_cuts={num_cuts} does not fit the ramp of {max(last - first, 0)} steps "
                f"(method.begin to method.end of {context.total_steps} steps); lower it or lengthen the schedule"
            )
        steps = [first + round(index * (last - first) / num_cuts) for index in range(num_cuts + 1)]
        levels = [
            cubic_sparsity(
                index, begin=0, end=num_cuts, initial=config.initial_sparsity, final=config.sparsity
            )
            for index in range(num_cuts + 1)
        ]
        return dict(zip(steps, levels, strict=True))

    def after_step(self, context: Context, step: int) -> None:
        keep = self.cuts.get(step)
        if keep is None:
            return
        named, old = context.parameters(), dict(context.masks.masks)
        scores = {name: named[name].detach().abs() for name in old}
        new = self.keep_best(scores, keep, old)
        self.cut(context, new)
        context.masks.zero_state(context.optimizer, {name: old[name] & ~mask for name, mask in new.items()})

    def layout(self, context: Context) -> list[tuple[int, dict[str, int]]] | None:
        if super().layout(context) is None:
            return None
        return [(0, {}), *((step + 1, kept) for step, kept in self._layer_cuts(context).items())]

    def paper_train_ratio(self, context: Context) -> float | None:
        """Return the mean of f_S over the steps, relative to f_D (Evci et al. 2020, appendix H)."""
        layout = self.layout(context)
        if layout is None or not context.total_steps:
            return None
        ends = [start for start, _ in layout[1:]] + [context.total_steps]
        spent = sum(
            (end - start) * sparse_macs(context.costs, kept)
            for (start, kept), end in zip(layout, ends, strict=True)
        )
        return spent / (context.total_steps * context.dense_macs)
