"""Sparse from the first step: random masks with a fixed budget per layer, updated periodically by drop and grow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from prune_lab.core.method import MethodConfig
from prune_lab.core.phase import TRAIN, Phase
from prune_lab.families.weight_pruning import WeightPruning, WeightPruningConfig
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import Count, Fraction, Index, Momentum
from prune_lab.optim import optimizer
from prune_lab.pruning.masks import redistribution, sparsity_schedules, top_k
from prune_lab.pruning.masks.selection import SEMI_STRUCTURED

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from prune_lab.config.run import RunConfig
    from prune_lab.core.context import Context


@dataclass(frozen=True)
class SparseTrainingConfig(WeightPruningConfig):
    distribution: Literal["uniform", "er", "erk", "file", "2:4"]
    """how the kept weights are shared among layers; 2:4: two of every four input channels in each layer"""


class SparseTraining(WeightPruning):
    """A network that is sparse from its first step; without updates this is static sparse training."""

    Config: type[SparseTrainingConfig] = SparseTrainingConfig

    def chain(self) -> tuple[Phase, ...]:
        return (TRAIN,)

    def setup(self, context: Context) -> None:
        """Draw exactly the budget of each layer at random, the same on every process."""
        shapes = {layer.parameter: layer.shape for layer in context.eligible()}
        drawn = {
            name: self.draw(shapes[name], count, context.generator("initial mask", name)).to(context.device)
            for name, count in self.allocate(context, self.config.sparsity).items()
        }
        context.install_masks(drawn)

    def draw(self, shape: tuple[int, ...], count: int, source: Generator) -> Tensor:
        """Return a random mask with `count` True."""
        return self.selection.random_mask(shape, count, source)


BY_SIGN = (
    "method.drop=by_sign drops floor(alpha n) of each sign's n weights (SET's code: ceil(alpha n) negatives, "
    "floor(alpha n) + 1 positives, and ties with the last)"
)
"""for the cards of methods with that rule"""

PROPORTIONAL = (
    "shares what was freed in exact proportion and fills layers (official sparse momentum, and rigl-reproducibility "
    "after it: a layer grows at most 99 % of its room, what exceeds that is divided equally among the layers, and the "
    "total varies)"
)
REDISTRIBUTION = f"method.redistribution {PROPORTIONAL}"
"""for the cards of methods with that option"""


@dataclass(frozen=True)
class DropAndGrowConfig(SparseTrainingConfig):
    alpha: Momentum
    """fraction of a layer's kept weights that the first update may move"""
    floor: Momentum
    """the same fraction at `end`"""
    interval: Count | Literal["auto"] | None
    """optimizer steps between updates; None: one epoch; auto: the published number, or fewer on schedules so short that
    it would leave fewer than ten updates"""
    begin: Index | None
    """step of the first update; None: after the first interval"""
    end: Fraction
    """fraction of the training at which updates end; none follows the last step"""
    decay: Literal["cosine", "constant", "linear", "cubic"]
    """shape of the moved fraction from alpha to floor at `end`"""
    drop: Literal["magnitude", "by_sign"]
    """magnitude: smallest |w|; by_sign: the weakest positives and the weakest negatives separately (SET paper)"""
    regrown: Literal["keep", "zero"]
    """a weight dropped and regrown at once: keep: value and momentum stay (official code); zero: it restarts at 0
    (rigl-reproducibility)"""
    skip_step_on_update: bool
    """true: an update replaces the optimizer step of its batch (RigL alg. 1); false: it follows that step"""
    reset_state: bool
    """true: optimizer state of newly grown weights starts at zero (official RigL code); false: with the state that
    their dense gradients accumulated while they were pruned"""

    def check(self, path: str) -> None:
        super().check(path)
        if self.decay != "constant" and self.end == 0:
            raise UserError(f"{path}.end must be above 0, got {self.end:g}")
        if self.floor > self.alpha:
            raise UserError(f"{path}.floor must not exceed {path}.alpha={self.alpha:g}, got {self.floor:g}")


_FEW = 10
"""number of updates below which masks hardly change: no weight of a layer has been tried more than ten times"""


class DropAndGrow(SparseTraining):
    """Moves `alpha(t)` of each layer's weights every `interval` steps; subclasses choose where weights grow.

    Layers keep their counts unless `redistribution_signal` moves weights between them. With 2:4 each group of four
    grows as many weights as it dropped.
    """

    Config: type[DropAndGrowConfig] = DropAndGrowConfig
    published_interval: int | None = 100
    """meaning of `auto` on the papers' schedules; None: one epoch"""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.updates = range(0)
        self.churn = dict.fromkeys(("updates", "dropped", "grown", "regrown"), 0)

    def check_run(self, config: RunConfig) -> None:
        """Reject moving weights between layers that all keep half."""
        if self.redistributes() and self.config.distribution == SEMI_STRUCTURED:
            raise UserError(
                "method.redistribution must be none with method.distribution=2:4: every layer keeps half of its weights"
            )

    def grow_scores(self, context: Context, step: int, candidates: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a score per position of each parameter named in `candidates`; higher grows first."""
        raise TypeError(f"{type(self).__name__} does not say where weights grow")

    def redistributes(self) -> bool:
        """Return whether weights freed in one layer may move to others."""
        return False

    def redistribution_signal(self, context: Context, names: Iterable[str]) -> dict[str, Tensor] | None:
        """Return a value per weight; its mean over a layer's active weights is the layer's claim on freed weights.

        None: every layer grows as many weights as it dropped.
        """
        return None

    def setup(self, context: Context) -> None:
        super().setup(context)
        self.updates = self.update_steps(context)
        self._check_moves(context)
        if self.redistributes():
            self._report_redistribution(context)
        steps = f"mask updates: {len(self.updates)}, at steps {_preview(self.updates)} of {context.total_steps}"
        context.report(steps + self._warning(context))

    def needs_dense_gradient(self, step: int) -> bool:
        """Return True while pruned weights accumulate optimizer state that a later update gives them."""
        return not self.config.reset_state and step <= max(self.updates, default=-1)

    def after_backward(self, context: Context, step: int) -> bool:
        if self.config.skip_step_on_update and step in self.updates:
            self.update(context, step)
            return False
        return True

    def after_step(self, context: Context, step: int) -> None:
        if not self.config.skip_step_on_update and step in self.updates:
            self.update(context, step)

    def require_momentum(self, context: Context, who: str) -> None:
        """Raise UserError if there is no momentum at the first update."""
        optimizer.require_momentum(context.optimizer, who)
        if self.config.skip_step_on_update and self.updates.start == 0:
            raise UserError(
                f"{who}: there is no momentum at step 0; method.begin must be null or above 0, "
                "or method.skip_step_on_update false"
            )

    def layout(self, context: Context) -> list[tuple[int, dict[str, int]]] | None:
        return None if self.redistributes() else super().layout(context)

    def momenta(self, context: Context, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the optimizer's running mean of gradients of each parameter."""
        named = context.parameters()
        return {name: optimizer.momentum(context.optimizer, named[name]) for name in names}

    def _report_redistribution(self, context: Context) -> None:
        """Report that layer budgets will depart from `distribution`."""
        if len(context.eligible()) < 2:
            context.report("one layer only: there is nothing to redistribute")
        else:
            context.report(f"layer budgets start as {self.config.distribution} and move with method.redistribution")

    def _check_moves(self, context: Context) -> None:
        """Report the layers that keep so few weights that no update moves one.

        Raises:
            UserError: no layer moves any weight although `alpha` is above 0.
        """
        if self.config.drop != "magnitude" or self.config.alpha == 0:
            return
        masked = context.masks.masks
        movable = {n: count for n, count in context.masks.counts().items() if 0 < count < masked[n].numel()}
        fixed = [n for n, count in movable.items() if not self.num_dropped(self.config.alpha, count, masked[n].shape)]
        if fixed and len(fixed) == len(movable):
            raise UserError(
                f"method.alpha={self.config.alpha:g} moves no weight in any layer, because too few are kept; raise it "
                "or lower method.sparsity"
            )
        if fixed:
            names = ", ".join(name.removesuffix(".weight") for name in fixed)
            context.report(f"layers whose mask never moves, because they keep too few weights: {names}")

    def for_schedule(self, config: RunConfig, steps_per_epoch: int) -> MethodConfig:
        total = steps_per_epoch * config.schedule.phase("train").epochs
        if self.config.interval != "auto" or not total:
            return self.config
        return replace(self.config, interval=self._automatic(total, steps_per_epoch))

    def interval(self, context: Context) -> int:
        """Return the optimizer steps between updates."""
        if self.config.interval == "auto":
            return self._automatic(context.total_steps, context.steps_per_epoch)
        return context.steps_per_epoch if self.config.interval is None else self.config.interval

    def _automatic(self, total: int, steps_per_epoch: int) -> int:
        """Return the published interval, or the longest one that leaves ten updates in `total` steps."""
        published = self.published_interval or steps_per_epoch
        return self._fitting(published, total) or min(published, self.least_interval)

    def _fitting(self, longest: int, total: int) -> int | None:
        count = partial(self._num_updates, total)
        return sparsity_schedules.fitting_interval(longest, count, wanted=_FEW, least=self.least_interval)

    @property
    def least_interval(self) -> int:
        """The shortest interval that other options allow."""
        return 1

    def _num_updates(self, total: int, interval: int) -> int:
        begin = interval - 1 if self.config.begin is None else self.config.begin
        return len(sparsity_schedules.update_steps(begin, self._end_of(total), interval))

    def _warning(self, context: Context) -> str:
        """Return a warning that so few updates hardly differ from a fixed mask; empty if there are enough."""
        if len(self.updates) >= _FEW:
            return ""
        fitting = self._fitting(self.interval(context), context.total_steps)
        advice = "lengthen the schedule" if fitting is None else f"method.interval={fitting} leaves {_FEW} or more"
        return f"; warning: fewer than {_FEW}, little else than a fixed mask: {advice}"

    def update_steps(self, context: Context) -> range:
        """Return the steps at which masks move: begin, begin + interval, ... below end (RigL alg. 1).

        Raises:
            UserError: no update after step 0.
        """
        end, interval = self.end_step(context), self.interval(context)
        begin = interval - 1 if self.config.begin is None else self.config.begin
        steps = sparsity_schedules.update_steps(begin, end, interval)
        if not steps or steps[-1] == 0:
            shown = "null (one epoch)" if self.config.interval is None else interval
            first = "null" if self.config.begin is None else begin
            after = begin + interval if steps else begin
            raise UserError(
                f"method.interval={shown} with method.begin={first} leaves no mask update after step 0: it would come "
                f"at step {after}, updates end at step {max(end, 0)} of {context.total_steps}; lower them or lengthen "
                "the schedule"
            )
        return steps

    def end_step(self, context: Context) -> int:
        """Return the step after which masks stay fixed; weights grown after the last step would never be trained."""
        return self._end_of(context.total_steps)

    def _end_of(self, total: int) -> int:
        return min(sparsity_schedules.floor_product(self.config.end * total), total - 1)

    def moved_fraction(self, context: Context, step: int) -> float:
        config = self.config
        return sparsity_schedules.drop_fraction(
            step,
            alpha=config.alpha,
            begin=config.begin or 0,
            end=max(sparsity_schedules.floor_product(config.end * context.total_steps), 1),
            shape=config.decay,
            floor=config.floor,
        )

    def num_dropped(self, fraction: float, count: int, shape: tuple[int, ...]) -> int:
        """Return the number of a layer's `count` kept weights to drop."""
        return sparsity_schedules.floor_product(fraction * count)

    def drop_scores(self, weight: Tensor) -> Tensor:
        """Return a score per weight; the lowest are dropped."""
        return weight.abs()

    def update(self, context: Context, step: int) -> None:
        """Drop and grow in every layer that can change, then apply the new masks."""
        fraction, named, counts = self.moved_fraction(context, step), context.parameters(), context.masks.counts()
        signal = self.redistribution_signal(context, counts)
        movable = {
            name: mask
            for name, mask in context.masks.masks.items()
            if 0 < counts[name] and (counts[name] < mask.numel() or signal is not None)
        }
        scores = self.grow_scores(context, step, movable)
        fractions, shares = dict.fromkeys(movable, fraction), None
        if signal is not None:
            shares = redistribution.shares({name: _mean_active(signal[name], mask) for name, mask in movable.items()})
            full = {name: 1 - counts[name] / mask.numel() for name, mask in movable.items()}
            fractions = redistribution.drop_fractions(fraction, shares, full)
        kept = {name: self._kept(named[name].detach(), mask, fractions[name]) for name, mask in movable.items()}
        left = {name: int(mask.sum()) for name, mask in kept.items()}
        totals = {name: counts[name] for name in movable}
        if shares is not None:
            totals = self.new_totals(shares, left, totals, {name: mask.numel() for name, mask in movable.items()})
        restarted: dict[str, Tensor] = {}
        for name, old in movable.items():
            new = self.selection.grow(kept[name], scores[name], totals[name])
            restarted[name] = new & ~kept[name] if self.config.regrown == "zero" else new & ~old
            named[name].detach()[restarted[name]] = 0.0
            context.masks.replace(name, new)
            self._note(old, kept[name], new)
        if self.config.reset_state:
            context.masks.zero_state(context.optimizer, restarted)
        context.commit()
        self.churn["updates"] += 1

    def new_totals(
        self, shares: dict[str, float], left: dict[str, int], before: dict[str, int], sizes: dict[str, int]
    ) -> dict[str, int]:
        """Return weights per layer after growing; their sum equals that of `before`.

        Args:
            left: weights per layer after dropping.
        """
        freed = sum(before.values()) - sum(left.values())
        grown = redistribution.apportion(shares, {name: sizes[name] - left[name] for name in left}, freed)
        return {name: left[name] + grown[name] for name in left}

    def _note(self, old: Tensor, kept: Tensor, new: Tensor) -> None:
        self.churn["dropped"] += int((old & ~kept).sum())
        self.churn["grown"] += int((new & ~old).sum())
        self.churn["regrown"] += int((new & old & ~kept).sum())

    def _kept(self, weight: Tensor, mask: Tensor, fraction: float) -> Tensor:
        if self.config.drop == "by_sign":
            return top_k.keep_by_sign(weight, mask, fraction)
        count = int(mask.sum())
        dropped = self.num_dropped(fraction, count, tuple(weight.shape))
        return top_k.keep_top(self.drop_scores(weight), count - dropped, candidates=mask)

    def end_epoch(self, context: Context, epoch: int) -> dict[str, float]:
        """Return sums since the phase began: updates; dropped weights, those regrown at once, and newly grown ones."""
        return self.explain()

    def explain(self) -> dict[str, float]:
        return {f"mask/{name}": count for name, count in self.churn.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"churn": dict(self.churn)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.churn = dict(state["churn"])


def check_dense(scores: dict[str, Tensor], active: dict[str, Tensor], what: str) -> None:
    """Raise UserError if the scores of all pruned positions are zero, so that growth has no basis."""
    if scores and not any(bool(score[~active[name]].any()) for name, score in scores.items()):
        raise UserError(
            f"all {what} are zero at pruned weights, so none can be chosen to grow: no signal passes a network as "
            "sparse as this (a lower method.sparsity leaves it a way), or something masks gradients"
        )


def _mean_active(signal: Tensor, mask: Tensor) -> float:
    """Return the mean |signal| over the active positions of a layer, which must have some."""
    return float((signal.abs() * mask).sum(dtype=torch.float64)) / int(mask.sum())


def _preview(steps: range) -> str:
    shown = [str(step) for step in steps]
    return ", ".join(shown) if len(shown) <= 6 else f"{', '.join(shown[:3])}, ..., {shown[-1]}"
