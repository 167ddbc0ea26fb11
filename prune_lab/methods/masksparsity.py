"""MaskSparsity: a first sparse training selects channels, a second one penalises only their scales."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from prune_lab.core import removal
from prune_lab.core.card import Card
from prune_lab.core.phase import TRAIN_DENSE, Phase
from prune_lab.families.channel_pruning import ChannelPruningConfig, Problem
from prune_lab.families.scale_pruning import ScalePruning
from prune_lab.foundations import distributed
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import FilePath, NonNegative, OpenFraction, Positive
from prune_lab.pruning.batch_norm import masks, penalty, thresholds
from prune_lab.pruning.channels import filter_scores, selection
from prune_lab.pruning.channels.groups import channel_map

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.config.run import RunConfig
    from prune_lab.core.context import Context
    from prune_lab.core.removal import TrialCut
    from prune_lab.pruning.batch_norm.penalty import ScalePenalty
    from prune_lab.pruning.channels.groups import ChannelMap


_SPARSIFY = Phase("sparsify", None, "train", active=True)
_MASKED = Phase("masked", None, "train", active=True)
_MARKS = ("threshold", "energy", "mask_file")
"""targets that select channels instead of fixing their number"""


@dataclass(frozen=True)
class MaskSparsityConfig(ChannelPruningConfig):
    threshold: NonNegative | None
    """instead of a ratio: channels with scales up to this value are removed"""
    energy: OpenFraction | None
    """instead of a ratio: each batch norm's smallest scales with this fraction of the sum of squares are removed"""
    mask_file: FilePath | None
    """instead of a ratio: JSON of the channels to keep (see masks.load)"""
    criterion: Literal["sparsified", "l1_norm"]
    """ranking of the channels: their scales after training under the penalty on all scales, or the filters' L1 norms
    in the dense network, which saves that training"""
    scale_penalty: Positive
    """factor of the penalty in both trainings"""
    regularizer: Literal["l1", "l2", "smooth_l1"]
    """gradient of the penalty: sign of the scale, the scale, or the scale below lr x scale_penalty and else its sign"""
    start: Literal["dense", "sparsified"]
    """start network of the training under the mask"""

    GOALS: ClassVar[tuple[str, ...]] = (*ChannelPruningConfig.GOALS, *_MARKS)

    def targets(self) -> dict[str, Any]:
        return super().targets() | {name: getattr(self, name) for name in _MARKS}

    def check(self, path: str) -> None:
        super().check(path)
        target = self.target()
        if target in _MARKS and self.scope != "global":
            raise UserError(f"{path}.{target} goes with {path}.scope=global, got {self.scope}")
        if target in _MARKS and self.criterion != "sparsified":
            raise UserError(f"{path}.{target} goes with {path}.criterion=sparsified, got {self.criterion}")
        if self.start == "sparsified" and not self.sparsifies:
            raise UserError(f"{path}.start=sparsified needs the training under the penalty on all scales, which "
                              f"{path}.mask_file and {path}.criterion=l1_norm save")

    @property
    def sparsifies(self) -> bool:
        """Whether there is a training under the penalty on all scales."""
        return self.criterion == "sparsified" and self.mask_file is None


class MaskSparsity(ScalePruning):
    Config = MaskSparsityConfig
    sparse_phases = (_SPARSIFY.name, _MASKED.name)
    card = Card(
        summary="train dense, mark channels after a sparse training, train again with a penalty on the marked "
        "batch-norm scales only, remove, fine-tune (from the official code; of the paper only the abstract was read)",
        paper="Jiang, Zhao, Zhao, An, Tang, Wang 2022, Pruning-aware Sparse Regularization for Network Pruning, "
        "arXiv 2201.06776",
        acts="adds scale_penalty x sign(scale) to the gradients of all scales (phase sparsify), then, starting from "
        "the dense network, to those of the marked ones (phase masked); removes once; fine-tunes the smaller network",
        eligible="channels that pass a batch norm. With a threshold, batch norms whose outputs are added vote, as in "
        "the official code; a ratio ranks them by the mean of their scales",
        cost="one update of all scales per step; three trainings over schedule.train and the fine-tuning",
        differences="the official code applies the threshold a second time after the masked training (here the marked "
        "channels go), may empty a trunk (here least_channels stay), prunes in several rounds for its published masks "
        "and gives depthwise layers the mask of the layer before (here both norms vote). Here as there the shift of a "
        "removed channel is dropped, which the fine-tuning mends. Ratios are this program's",
    )

    def __init__(self, config: MaskSparsityConfig) -> None:
        super().__init__(config)
        self.alive: Tensor | None = None
        """the classes of channels to keep, once selected, bool [num_classes]"""

    def before(self) -> tuple[Phase, ...]:
        """Return dense training -> sparse training -> mask -> training under the mask."""
        if not self.config.sparsifies:
            return (TRAIN_DENSE, Phase("mask", type(self).mask, None, active=True), _MASKED)
        origin = TRAIN_DENSE.name if self.config.start == "dense" else None
        return (TRAIN_DENSE, _SPARSIFY, Phase("mask", type(self).mask, None, active=True, origin=origin), _MASKED)

    def identity(self) -> dict[str, Any]:
        """Return the options, the file of masks by its content.

        Raises:
            UserError: the file cannot be read.
        """
        options, path = super().identity(), self.config.mask_file
        if path is None:
            return options
        try:
            return options | {"mask_file": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
        except OSError as error:
            raise UserError(f"method.mask_file={path} cannot be read: {error.strerror}") from error

    def phase_identity(self, phase: Phase) -> dict[str, Any]:
        """Return the options; all targets share the training under the penalty on all scales."""
        if phase == _SPARSIFY:
            return {"scale_penalty": self.config.scale_penalty, "regularizer": self.config.regularizer}
        return super().phase_identity(phase)

    def check_run(self, config: RunConfig) -> None:
        """Reject a schedule without the trainings that drive scales to zero."""
        config.require_training(f"method={self.config.name}, which trains under penalties over this block")

    def scores(self, context: Context, channels: ChannelMap) -> Tensor:
        if self.config.criterion == "l1_norm":
            return filter_scores.per_class(context.model, channels, filter_scores.l1_norms)
        return super().scores(context, channels)

    def comparable(self, scores: Tensor, channels: ChannelMap) -> Tensor:
        if self.config.criterion == "l1_norm":
            return selection.relative(scores, channels)
        return super().comparable(scores, channels)

    def choose(self, context: Context, problem: Problem) -> Tensor:
        """Return the classes of channels to keep, bool [num_classes]."""
        if self.config.target() not in _MARKS:
            return super().choose(context, problem)
        alive = distributed.share(self._unmarked(context, problem))
        if self.config.control == "random":
            counts = problem.costs.kept(alive)
            return selection.top(self.ranking(context, problem), problem.channels, counts)
        return alive

    def _unmarked(self, context: Context, problem: Problem) -> Tensor:
        """Return the channels kept by the threshold or file, plus a layer's best ones if those are too few."""
        channels, lanes = problem.channels, problem.channels.lanes
        scales = thresholds.absolute_scales(context.model, channels)
        worth = thresholds.class_means(channels, scales)
        if self.config.mask_file is not None:
            alive = masks.load(self.config.mask_file, channels)
        else:
            alive = self._voted(channels, scales, problem.free)
        counts = problem.fixed_counts({index: int(alive[lane.classes].sum()) for index, lane in enumerate(lanes)})
        for lane, count in zip(lanes, counts.tolist(), strict=True):
            alive[lane.classes] = thresholds.with_least(alive[lane.classes], worth[lane.classes], count)
        return alive

    def _voted(self, channels: ChannelMap, scales: dict[str, Tensor], free: list[bool]) -> Tensor:
        pruned = {path: ~self._above(values.cpu()) for path, values in scales.items()}
        alive = torch.ones(channels.num_classes, dtype=torch.bool)
        for lane, may_go in zip(channels.lanes, free, strict=True):
            if may_go:
                alive[lane.classes] = thresholds.agreed(thresholds.lane_values(channels, lane, pruned))
        return alive

    def _above(self, values: Tensor) -> Tensor:
        """Return the channels that a batch norm keeps by itself, bool [channels]."""
        energy = self.config.energy
        limit = self.config.threshold if energy is None else thresholds.energy_threshold(values, energy)
        return thresholds.with_least(values > limit, values, self.config.least_channels)

    def trial_cut(self, context: Context) -> TrialCut:
        if self.config.target() not in _MARKS:
            return super().trial_cut(context)
        problem = self._problem(context)
        return removal.half(problem.channels, problem.free)

    def layout(self, context: Context) -> list[tuple[int, dict[str, int]]] | None:
        if self.config.target() not in _MARKS:
            return super().layout(context)
        if context.widths is None:
            problem = self._problem(context)
            if self.config.mask_file is not None:
                self._unmarked(context, problem)  # rejects masks of other networks
        return [(0, {})] if context.phase in self.sparse_phases else None

    def _problem(self, context: Context) -> Problem:
        penalty.scales(context.model)
        return Problem(self, context)

    def mask(self, context: Context) -> dict[str, float]:
        """Decide which channels to remove; set up the start network of the training under the mask.

        Raises:
            UserError: an unreachable budget, or no scale small enough.
        """
        problem = self._problem(context)
        self.alive = self.choose(context, problem)
        if bool(self.alive.all()) and not context.validating:
            self._refuse_nothing(context, problem)
        marked = masks.left_out(problem.channels, self.alive)
        num_marked, total = (sum(int(f(mask)) for mask in marked.values()) for f in (torch.sum, torch.numel))
        context.report(f"mask: {num_marked} of {total} scales are marked, those of "
                       f"{int((~self.alive).sum())} of {problem.channels.num_classes} channels")
        if context.origin is not None:
            context.model.load_state_dict(context.origin.model)
        return {"scales/marked": num_marked / total}

    def _refuse_nothing(self, context: Context, problem: Problem) -> None:
        option = f"method.{self.config.target()}"
        if self.config.mask_file is not None:
            raise UserError(f"{option} marks no channel that may go")
        scales = thresholds.absolute_scales(context.model, problem.channels)
        smallest = min(float(values.min()) for values in scales.values())
        raise UserError(f"{option} marks no channel (the smallest scale is {smallest:.3g}): train longer, raise it "
                          "or method.scale_penalty, or set a ratio")

    def make_penalty(self, context: Context) -> ScalePenalty:
        """Return the penalty on all scales; in the second training, on the marked ones."""
        marked = None
        if context.phase == _MASKED.name:
            channels = channel_map(context.model, context.dataset.info.image_size)
            marked = masks.left_out(channels, self.alive)
        config = self.config
        return penalty.ScalePenalty(context.model, config.scale_penalty, config.regularizer, marked)

    def prune(self, context: Context) -> dict[str, float]:
        """Mask the marked channels, regardless of their current scales."""
        problem = self._problem(context)
        if bool(self.alive.all()):  # only in a validation run: the marked channels are an outcome of the training
            return {}
        return self.leave_out(context, problem, self.alive)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.alive is None else {"alive": self.alive}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.alive = state.get("alive")
