"""Methods that rank channels and remove the lowest under a budget: options, phases, exact counts, controls."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from prune_lab.accounting import eligibility
from prune_lab.core import removal
from prune_lab.core.method import Method, MethodConfig
from prune_lab.core.phase import FINETUNE, PRUNE, REMOVE, TRAIN_DENSE, Phase
from prune_lab.foundations import distributed, patterns
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import Count, OpenFraction, require_one
from prune_lab.models import common
from prune_lab.pruning.channels import selection, surgery
from prune_lab.pruning.channels.removable import RemovableChannels
from prune_lab.pruning.masks.sparsity_schedules import floor_product

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from prune_lab.accounting.eligibility import Layer
    from prune_lab.config.run import RunConfig
    from prune_lab.core.context import Context
    from prune_lab.core.removal import TrialCut
    from prune_lab.pruning.channels.costs import ChannelCosts
    from prune_lab.pruning.channels.groups import ChannelMap, Lane
    from prune_lab.pruning.channels.selection import Budget


_RATIOS = ("macs_ratio", "params_ratio", "channels_ratio")


def reinitialise(method: ChannelPruning, context: Context) -> None:
    """Reinitialise the small network, with draws for its own widths."""
    fresh = context.fresh_model("control scratch")
    surgery.narrow(fresh, context.widths)
    for module in fresh.modules():
        # PyTorch's draw, which never yields zeros, depends on the width; that of the VGGs and MobileNets does not.
        if isinstance(module, torch.nn.Linear) and (module.bias is None or bool(module.bias.any())):
            module.reset_parameters()
    common.init_weights(fresh)  # draws continue those of the whole network, which the seed determines
    context.model.load_state_dict(fresh.state_dict())


_REINITIALISE = Phase("reinitialise", reinitialise, None, active=True)
_SCRATCH = Phase("scratch", None, "train", active=True)


@dataclass(frozen=True)
class ChannelPruningConfig(MethodConfig):
    macs_ratio: OpenFraction | None
    """kept fraction of the network's MACs"""
    params_ratio: OpenFraction | None
    """kept fraction of the network's parameters"""
    channels_ratio: OpenFraction | None
    """kept fraction of the network's channels; scope=layer: of each layer's, rounded as the paper does"""
    layer_channels: list[str]
    """instead of a ratio: PATTERN:KEPT, the fraction (if a whole number, the count) of the layers' channels to keep;
    later patterns win, and layers that match none keep all"""
    scope: Literal["layer", "global"]
    """whether layers keep equal fractions, or all channels compete"""
    residual: bool
    """whether channels that are added to others may be removed; they leave all layers of their trunk at once"""
    exclude: list[str]
    """patterns of layers that keep all of their output channels"""
    round_to: Count
    """layers keep a multiple of this number of channels, or all"""
    least_channels: Count
    """minimum number of channels of every layer"""
    control: Literal["none", "random", "scratch"]
    """random: channels drawn at random under the same budget; scratch: the pruned architecture trained from new
    weights over the schedule's train block"""

    GOALS: ClassVar[tuple[str, ...]] = (*_RATIOS, "layer_channels")

    def targets(self) -> dict[str, Any]:
        """Return the options of which exactly one fixes the kept amount; None: not set."""
        return {name: getattr(self, name) for name in _RATIOS} | {"layer_channels": self.layer_channels or None}

    def target(self) -> str:
        """Return the option that fixes the kept amount."""
        return next(name for name, value in self.targets().items() if value is not None)

    def check(self, path: str) -> None:
        require_one(path, self.targets(), unset="null or []")
        for entry in self.layer_channels:
            parse_kept(entry, f"{path}.layer_channels")
        if self.layer_channels and self.scope == "global":
            raise UserError(f"{path}.layer_channels goes with {path}.scope=layer, got global")


def parse_kept(entry: str, path: str) -> tuple[str, float | int]:
    """Return (pattern, kept) of PATTERN:KEPT; a whole number of 1 or more counts channels.

    Raises:
        UserError: wrong format.
    """
    pattern, _, text = entry.rpartition(":")
    try:
        kept = int(text) if text.isdigit() else float(text)
    except ValueError:
        kept = -1
    if not pattern or not (kept >= 1 if isinstance(kept, int) else 0 < kept < 1):
        raise UserError(
            f"{path}: {entry!r} must be PATTERN:KEPT with a fraction in (0, 1) or a count of at least 1, such as "
            "layer1.*:0.5"
        )
    return pattern, kept


class ChannelPruning(Method):
    """Base of the methods that rank the channels of a trained network. Subclasses define the ranking in `scores`."""

    needs_images = "it removes channels of convolutions"
    Config: type[ChannelPruningConfig] = ChannelPruningConfig

    def chain(self) -> tuple[Phase, ...]:
        """Return train -> prune -> remove -> fine-tune; the control `scratch` has new weights and a full training."""
        if self.config.control == "scratch":
            return (*self.before(), PRUNE, REMOVE, _REINITIALISE, _SCRATCH)
        return (*self.before(), PRUNE, REMOVE, *self.after())

    def before(self) -> tuple[Phase, ...]:
        """Return the phases that produce the network whose channels are ranked."""
        return (TRAIN_DENSE,)

    def after(self) -> tuple[Phase, ...]:
        """Return the phases that train the smaller network."""
        return (FINETUNE,)

    def asked(self) -> dict[str, float]:
        """Return the target for the whole network; targets per layer are counted and rounded there."""
        target = self.config.target()
        if target not in _RATIOS or (target == "channels_ratio" and self.config.scope == "layer"):
            return {}
        return {target.removesuffix("_ratio"): getattr(self.config, target)}

    def without_control(self) -> MethodConfig | None:
        return None if self.config.control == "none" else replace(self.config, control="none")

    def phase_identity(self, phase: Phase) -> dict[str, Any]:
        """Return the options; a control that acts later shares earlier phases with the method's own run."""
        options = self.identity()
        if self.config.control == "scratch" and phase not in (_REINITIALISE, _SCRATCH):
            options["control"] = "none"
        return options

    def check_run(self, config: RunConfig) -> None:
        """Reject ranking the channels of an untrained network."""
        config.require_trained(f"method={self.config.name}")

    def layers(self, model: nn.Module) -> list[Layer]:
        """Return all layers, including depthwise ones: their filters are removed with the channel."""
        return eligibility.select_layers(model, include=["*"])

    def scores(self, context: Context, channels: ChannelMap) -> Tensor:
        """Return the score of each class of channels, [num_classes]; higher is kept first."""
        raise TypeError(f"{type(self).__name__} does not say what a channel is worth")

    def comparable(self, scores: Tensor, channels: ChannelMap) -> Tensor:
        """Return scores that are comparable between layers, for scope=global."""
        return selection.relative(scores, channels)

    def count(self, size: int) -> int:
        """Return the number of a layer's `size` channels that channels_ratio keeps with scope=layer."""
        return max(1, floor_product(self.config.channels_ratio * size))

    def can_rank(self, channels: ChannelMap, lane: Lane) -> bool:
        """Return whether the method can score the channels of a lane; other lanes are kept."""
        return True

    def prune(self, context: Context) -> dict[str, float]:
        """Choose the channels and mask all others; return the target and the outcome.

        Raises:
            UserError: an unreachable budget, a pattern that matches nothing, or nothing to prune.
        """
        problem = Problem(self, context)
        return self.leave_out(context, problem, self.choose(context, problem))

    def choose(self, context: Context, problem: Problem) -> Tensor:
        """Return the classes of channels to keep, bool [num_classes]: the best of each lane under the budget."""
        scores = self.ranking(context, problem)
        return selection.top(scores, problem.channels, problem.counts(scores))

    def ranking(self, context: Context, problem: Problem) -> Tensor:
        """Return the deciding scores, equal on all processes, float64 [num_classes]; random ones for that control.

        Raises:
            UserError: a score is infinite or NaN.
        """
        if self.config.control == "random":
            drawn = context.generator("random channels")
            scores = torch.rand(problem.channels.num_classes, generator=drawn, dtype=torch.float64)
        else:
            scores = self.scores(context, problem.channels).double().cpu()
        if not bool(torch.isfinite(scores).all()):
            raise UserError("scores of channels are infinite or NaN: look at the trained weights")
        return distributed.share(scores)

    def leave_out(self, context: Context, problem: Problem, alive: Tensor) -> dict[str, float]:
        """Mask the channels that are not kept; return and report the remaining size."""
        problem.check_removes(problem.costs.kept(alive))
        masks = problem.channels.weight_masks(alive, context.model)
        context.install_masks({name: mask.to(context.device) for name, mask in masks.items() if not bool(mask.all())})
        figures = problem.figures(problem.costs.kept(alive))
        context.report(problem.line(figures))
        return figures

    def trial_cut(self, context: Context) -> TrialCut:
        """Return a cut of the requested size, with channels drawn at random."""
        problem = Problem(self, context)
        drawn = context.generator("trial cut")
        scores = torch.rand(problem.channels.num_classes, generator=drawn, dtype=torch.float64)
        alive = selection.top(scores, problem.channels, problem.counts(scores))
        return removal.TrialCut(problem.channels, problem.free, alive)

    def layout(self, context: Context) -> list[tuple[int, dict[str, int]]] | None:
        """Return the kept weights of the budget; with scope=global they depend on trained weights."""
        known = self.config.scope == "layer"
        if context.widths is not None:
            return [(0, {cost.parameter: cost.weights for cost in context.costs})] if known else None
        problem = Problem(self, context)
        counts = problem.counts(torch.zeros(problem.channels.num_classes, dtype=torch.float64))  # raises if out of
        problem.check_removes(counts)  # reach with any scores
        return [(0, problem.costs.layer_weights(counts))] if known else None


class Problem:
    """The budget of a method on the network of a context."""

    def __init__(self, method: ChannelPruning, context: Context) -> None:
        self._method, self._config = method, method.config
        removable = RemovableChannels(
            context.network, residual=self._config.residual, exclude=self._config.exclude, can_rank=method.can_rank
        )
        self.channels: ChannelMap = removable.map
        self.costs: ChannelCosts = removable.costs
        self.free: list[bool] = removable.free_lanes
        """per lane, whether it may lose channels"""

    @functools.cached_property
    def budget(self) -> Budget:
        config, unit = self._config, self._config.target()
        return selection.Budget(
            unit.removesuffix("_ratio"), getattr(config, unit), config.round_to, config.least_channels,
            even=config.scope == "layer",
        )

    def counts(self, scores: Tensor) -> np.ndarray:
        """Return the channels that each lane keeps."""
        config = self._config
        if config.layer_channels:
            return self._named_counts()
        if config.scope == "global":
            ranked = self._method.comparable(scores, self.channels)
        elif config.channels_ratio is None:
            ranked = selection.within_lanes(scores, self.channels)
        else:
            wanted = {index: self._method.count(lane.size) for index, lane in enumerate(self.channels.lanes)}
            return self.fixed_counts(wanted)
        return selection.choose_counts(ranked, self.channels, self.costs, self.budget, free=self.free)

    def _named_counts(self) -> np.ndarray:
        wanted = {}
        for entry in self._config.layer_channels:
            pattern, kept = parse_kept(entry, "method.layer_channels")
            for index, lane in self._named_lanes(pattern).items():
                if kept > lane.size:
                    raise UserError(
                        f"method.layer_channels: {entry!r} asks for more channels than {lane.name} has; allowed: up to "
                        f"{lane.size}"
                    )
                wanted[index] = kept if isinstance(kept, int) else max(1, floor_product(kept * lane.size))
        return self.fixed_counts(wanted)

    def _named_lanes(self, pattern: str) -> dict[int, Lane]:
        """Return the lanes that match a pattern of method.layer_channels, among those that may lose channels."""
        option, lanes = "method.layer_channels", self.channels.lanes
        patterns.check(option, [pattern], self.channels.producers(), "layer that makes channels")
        named = {index: lane for index, lane in enumerate(lanes)
                 if self.free[index] and patterns.matches([pattern], *lane.producers)}
        if not named:
            raise UserError(
                f"{option}: the channels of {pattern!r} have to stay; under method.exclude and method.residual there "
                f"may go those of {', '.join(lane.name for lane, free in zip(lanes, self.free, strict=True) if free)}"
            )
        return named

    def fixed_counts(self, wanted: dict[int, int]) -> np.ndarray:
        """Return the lane sizes, with those in `wanted` for lanes that may lose channels."""
        counts, step = self.costs.sizes.copy(), self._config.round_to
        for index, count in wanted.items():
            if self.free[index]:
                count = max(count, self._config.least_channels)
                counts[index] = min(-(-count // step) * step, self.costs.sizes[index])
        return counts

    def check_removes(self, counts: np.ndarray) -> None:
        """Raise UserError if no lane loses a channel."""
        if (counts == self.costs.sizes).all():
            raise UserError(f"{self.asked}: nothing to remove, all layers keep all of their channels; keep less")

    @property
    def asked(self) -> str:
        """The option that fixes the kept amount, as typed."""
        return self.budget.option if self._config.target() in _RATIOS else f"method.{self._config.target()}"

    def figures(self, counts: np.ndarray) -> dict[str, float]:
        """Return the kept fractions of channels, MACs and parameters."""
        kept = {unit: self.costs.at(unit, counts) / self.costs.at(unit, self.costs.sizes)
                for unit in ("channels", "macs", "params")}
        return {f"prune/{unit}_kept": value for unit, value in kept.items()}

    def line(self, figures: dict[str, float]) -> str:
        shown = ", ".join(f"{value:.4%} of the {word}" for word, value in
                          zip(("channels", "MACs", "parameters"), figures.values(), strict=True))
        rounded = f", in multiples of {self._config.round_to}" if self._config.round_to > 1 else ""
        return f"{self.asked}: keeps {shown}{rounded}"
