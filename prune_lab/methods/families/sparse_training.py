"""Sparse from the first step: random masks with a fixed budget per layer, moved now and then by drop and grow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from prune_lab.lazy import lazy_import
from prune_lab.methods.base import TRAIN, Phase
from prune_lab.methods.families.weight_pruning import WeightPruning, WeightPruningConfig
from prune_lab.schema import ConfigError, Count, Fraction, Index, Momentum

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.context import Context

masks = lazy_import("prune_lab.masks")
schedules = lazy_import("prune_lab.sparsity_schedules")


@dataclass(frozen=True)
class SparseTrainingConfig(WeightPruningConfig):
    distribution: Literal["uniform", "er", "erk", "file"]
    """how the kept weights are shared among layers"""


class SparseTraining(WeightPruning):
    """A network that is sparse from its first step; without updates this is static sparse training."""

    Config = SparseTrainingConfig

    def chain(self) -> tuple[Phase, ...]:
        return (TRAIN,)

    def setup(self, context: Context) -> None:
        """Draw exactly the budget of each layer at random, the same on every process."""
        shapes = {layer.parameter: layer.shape for layer in context.eligible()}
        drawn = {
            name: masks.random_mask(shapes[name], count, context.generator("initial mask", name)).to(context.device)
            for name, count in self.allocate(context, self.config.sparsity).items()
        }
        context.install_masks(drawn)


@dataclass(frozen=True)
class DropAndGrowConfig(SparseTrainingConfig):
    alpha: Momentum
    """fraction of a layer's kept weights that the first update may move"""
    interval: Count
    """optimizer steps between updates"""
    begin: Index
    """step of the first update"""
    end: Fraction
    """no updates from this fraction of the training on"""
    decay: Literal["cosine", "constant", "linear", "cubic"]
    """shape of the moved fraction from alpha to 0 at `end`"""
    drop: Literal["magnitude", "by_sign"]
    """magnitude: smallest |w|; by_sign: the weakest positives and the weakest negatives apart (SET paper)"""
    regrown: Literal["keep", "zero"]
    """a weight dropped and grown at once: keep: value and momentum stay (official code); zero: it restarts at 0
    (rigl-reproducibility)"""
    skip_step_on_update: bool
    """true: an update replaces the optimizer step of its batch (RigL alg. 1); false: it follows it"""
    reset_state: bool
    """true: optimizer state of newly grown weights starts at zero (official RigL code); false: with what their dense
    gradients have gathered while they were pruned"""

    def check(self, path: str) -> None:
        super().check(path)
        if self.decay != "constant" and self.end == 0:
            raise ConfigError(f"{path}.end must be above 0, got {self.end:g}")


class DropAndGrow(SparseTraining):
    """Moves `alpha(t)` of each layer's weights every `interval` steps; subclasses say where weights grow."""

    Config = DropAndGrowConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.updates = range(0)
        self.num_updates = 0
        self.num_moved = 0
        self.postponed = False

    def grow_scores(self, context: Context, step: int, candidates: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a score per position of each parameter named in `candidates`; higher grows first."""
        raise TypeError(f"{type(self).__name__} does not say where weights grow")

    def setup(self, context: Context) -> None:
        super().setup(context)
        self.updates = self.update_steps(context)
        context.report(f"mask updates: {len(self.updates)}, at steps {_preview(self.updates)} of {context.total_steps}")

    def update_steps(self, context: Context) -> range:
        """Return the steps at which masks move: begin, begin + interval, ... below end (RigL alg. 1).

        Raises:
            ConfigError: no update after the first one.
        """
        end, config = self.end_step(context), self.config
        steps = schedules.update_steps(config.begin, end, config.interval)
        if len(steps) < 2:
            raise ConfigError(
                f"method.interval={config.interval} leaves no mask update after the one at step {config.begin}: "
                f"updates end at step {end} of {context.total_steps}; lower method.interval or lengthen the schedule"
            )
        return steps

    def end_step(self, context: Context) -> int:
        return _floor(self.config.end * context.total_steps)

    def moved_fraction(self, context: Context, step: int) -> float:
        config = self.config
        return schedules.drop_fraction(
            step, alpha=config.alpha, begin=config.begin, end=self.end_step(context), shape=config.decay
        )

    def update(self, context: Context, step: int) -> None:
        """Drop and grow in every layer that is neither empty nor full, then make the new masks count."""
        fraction, named, counts = self.moved_fraction(context, step), context.parameters(), context.masks.counts()
        movable = {name: mask for name, mask in context.masks.masks.items() if 0 < counts[name] < mask.numel()}
        scores = self.grow_scores(context, step, movable)
        restarted: dict[str, Tensor] = {}
        for name, old in movable.items():
            weight = named[name].detach()
            kept = self._kept(weight, old, fraction)
            new = masks.grow(kept, scores[name], counts[name])
            restarted[name] = new & ~kept if self.config.regrown == "zero" else new & ~old
            weight[restarted[name]] = 0.0
            context.masks.replace(name, new)
            self.num_moved += int((new & ~old).sum())
        if self.config.reset_state:
            context.masks.zero_state(context.optimizer, restarted)
        context.commit()
        self.num_updates += 1

    def _kept(self, weight: Tensor, mask: Tensor, fraction: float) -> Tensor:
        if self.config.drop == "by_sign":
            return masks.keep_by_sign(weight, mask, fraction)
        count = int(mask.sum())
        return masks.keep_top(weight.abs(), count - _floor(fraction * count), candidates=mask)

    def end_epoch(self, context: Context, epoch: int) -> dict[str, float]:
        return {"mask/updates": self.num_updates, "mask/moved": self.num_moved}

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates, "num_moved": self.num_moved, "postponed": self.postponed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_updates, self.num_moved, self.postponed = (
            state["num_updates"], state["num_moved"], state["postponed"],
        )


def _floor(product: float) -> int:
    """Return the floor of a product of options as they were typed: 0.29 * 100 is 28.999999999999996 in binary."""
    return math.floor(product + 1e-9)


def _preview(steps: range) -> str:
    shown = [str(step) for step in steps]
    return ", ".join(shown) if len(shown) <= 6 else f"{', '.join(shown[:3])}, ..., {shown[-1]}"
