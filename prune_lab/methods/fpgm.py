"""Remove the filters nearest to their layer's geometric median from a trained network, then fine-tune."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from prune_lab.core.card import Card
from prune_lab.core.phase import FINETUNE, TRAIN_DENSE, Phase
from prune_lab.families.channel_pruning import ChannelPruning, ChannelPruningConfig, Problem
from prune_lab.foundations import distributed
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import Index, Momentum
from prune_lab.pruning.channels import filter_scores, selection
from prune_lab.pruning.masks.sparsity_schedules import floor_product

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.core.context import Context
    from prune_lab.pruning.channels.groups import ChannelMap


@dataclass(frozen=True)
class FpgmConfig(ChannelPruningConfig):
    distance: Literal["l2", "l1", "cosine"]
    """between filters"""
    by_norm: Momentum
    """fraction of each layer's channels that is removed first, by the filters' L2 norm; distances are then measured
    among the others only"""
    reselect_every: Index
    """0: the channels are chosen once, before fine-tuning; n: chosen and zeroed before fine-tuning, reselected after
    every n epochs of it, and removed at its end"""

    def check(self, path: str) -> None:
        super().check(path)
        if self.channels_ratio is not None and self.by_norm > 1 - self.channels_ratio + 1e-9:
            raise UserError(
                f"{path}.by_norm={self.by_norm:g} removes more than {path}.channels_ratio={self.channels_ratio:g} "
                f"allows; allowed: up to {1 - self.channels_ratio:g}"
            )


class FPGM(ChannelPruning):
    Config = FpgmConfig
    card = Card(
        summary="train dense, remove the filters with the smallest sum of distances to all others of their layer, "
        "fine-tune",
        paper="He, Liu, Wang, Hu, Yang 2019, Filter Pruning via Geometric Median for Deep Convolutional Neural "
        "Networks Acceleration, arXiv 1811.00250",
        acts="once, between dense training and fine-tuning, or with reselect_every before the fine-tuning and after "
        "every few epochs of it",
        eligible="output channels of convolutions and hidden linear layers; channels that an addition ties go together "
        "(method.residual) by the mean over all filters that write them",
        cost="the distances between the filters of each layer per selection; fine-tuning costs what the smaller "
        "network costs, with reselect_every what the whole one costs",
        differences="the paper chooses anew after every epoch (reselect_every=1); the official code zeroes the "
        "gradients of the filters that it zeroed, so its first choice is final (reselect_every=0). reselect_every also "
        "zeroes what reads a channel: with its filter alone zeroed, as the paper says, a ResNet-20 on digits fell to "
        "chance, with both it kept its accuracy and its first choice. The code's test of the distance is always true, "
        "so it only has l2, and the cosine that it names there would be the similarity. The paper prunes each "
        "convolution alone and adds the channels that are left back into a full trunk; here a trunk's channels go from "
        "all of its layers, or stay (residual=false)",
    )

    def __init__(self, config: FpgmConfig) -> None:
        super().__init__(config)
        self._alive: Tensor | None = None

    def before(self) -> tuple[Phase, ...]:
        return (TRAIN_DENSE, FINETUNE) if self.config.reselect_every else (TRAIN_DENSE,)

    def after(self) -> tuple[Phase, ...]:
        return () if self.config.reselect_every else (FINETUNE,)

    def count(self, size: int) -> int:
        """Return the number of a layer's `size` channels to keep; removed parts are rounded down, as in the code."""
        parts = self.config.by_norm, 1 - self.config.channels_ratio - self.config.by_norm
        return max(1, size - sum(floor_product(part * size) for part in parts))

    def scores(self, context: Context, channels: ChannelMap) -> Tensor:
        return self._distances(context, channels)

    def _distances(self, context: Context, channels: ChannelMap, among: Tensor | None = None) -> Tensor:
        measure = functools.partial(filter_scores.distance_sums, distance=self.config.distance)
        return filter_scores.per_class(context.model, channels, measure, among=among)

    def choose(self, context: Context, problem: Problem) -> Tensor:
        """Return the classes of channels to keep: without the smallest by norm, then by distance among the others."""
        if self.config.by_norm == 0 or self.config.control == "random":
            return super().choose(context, problem)
        channels, counts = problem.channels, problem.counts(self.ranking(context, problem))
        first = [max(lane.size - floor_product(self.config.by_norm * lane.size), int(count))
                 for lane, count in zip(channels.lanes, counts, strict=True)]
        norms = filter_scores.per_class(context.model, channels, filter_scores.l2_norms)
        others = selection.top(distributed.share(norms), channels, first)
        distances = distributed.share(self._distances(context, channels, among=others))
        return selection.top(distances.masked_fill(~others, -torch.inf), channels, counts)

    # Selection during the fine-tuning

    def _reselects(self, context: Context) -> bool:
        return bool(self.config.reselect_every) and context.phase == FINETUNE.name

    def setup(self, context: Context) -> None:
        if self._reselects(context):
            self._reselect(context)

    def end_epoch(self, context: Context, epoch: int) -> dict[str, float]:
        """Return prune/changed: the number of newly pruned channels."""
        if not self._reselects(context):
            return {}
        last = (epoch + 1) * context.steps_per_epoch >= context.last_step
        if not last and (epoch + 1) % self.config.reselect_every:
            return {}
        before = self._alive
        self._reselect(context)
        return {"prune/changed": int((before & ~self._alive).sum())}

    def _reselect(self, context: Context) -> None:
        """Choose the channels to keep; zero the filters of the others, and the weights that read them.

        If only the filter were zeroed, batch norm would multiply its gradient by 1 / sqrt(eps), about 300. After one
        step it would lie far from all others, and be kept instead of a channel that the network needs.
        """
        problem = Problem(self, context)
        self._alive = self.choose(context, problem)
        with torch.no_grad():
            for name, mask in problem.channels.weight_masks(self._alive, context.model).items():
                context.model.get_parameter(name).mul_(mask.to(context.device))

    def prune(self, context: Context) -> dict[str, float]:
        if not self.config.reselect_every:
            return super().prune(context)
        return self.leave_out(context, Problem(self, context), self._alive)

    def layout(self, context: Context) -> list[tuple[int, dict[str, int]]] | None:
        known = super().layout(context)
        return [(0, {})] if self._reselects(context) else known

    def state_dict(self) -> dict[str, Any]:
        return {} if self._alive is None else {"alive": self._alive}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._alive = state.get("alive")
