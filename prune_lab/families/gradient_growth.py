"""Drop and grow where the loss gradient is largest: the base of RigL and its relatives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from prune_lab.families.sparse_training import DropAndGrow, DropAndGrowConfig, check_dense
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import Count

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.core.context import Context


@dataclass(frozen=True)
class GradientGrowthConfig(DropAndGrowConfig):
    grow_batches: Count
    """growth score: |mean dense gradient| over this many steps up to the update (1: its own batch, as published)"""
    redistribution: Literal["none", "gradient", "momentum"]
    """whether layers keep their counts, or freed weights move to layers with the largest mean |gradient| (RigL-SG) or
    |momentum| (RigL-SM) of active weights"""

    def check(self, path: str) -> None:
        super().check(path)
        if isinstance(self.interval, int):
            self.check_window(path, self.interval)

    def check_window(self, path: str, interval: int) -> None:
        """Raise UserError if the batches of two updates would overlap."""
        if self.grow_batches > interval:
            raise UserError(
                f"{path}.grow_batches must not exceed {path}.interval={interval}, got {self.grow_batches}"
            )


class GradientGrowth(DropAndGrow):
    """Moves weights to the largest |gradient|; layers keep their counts unless they are redistributed."""

    Config: type[GradientGrowthConfig] = GradientGrowthConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.gradient_sums: dict[str, Tensor] = {}
        self.num_summed = 0
        self.due = False
        self.postponed = False

    def setup(self, context: Context) -> None:
        super().setup(context)
        self.config.check_window("method", self.interval(context))
        first = self.updates.start
        if self.config.grow_batches > first + 1:
            context.report(f"the first mask update, at step {first}, has the gradients of {first + 1} steps only")
        if self.config.redistribution == "momentum":
            self.require_momentum(context, "method.redistribution=momentum")

    @property
    def least_interval(self) -> int:
        return self.config.grow_batches

    def needs_dense_gradient(self, step: int) -> bool:
        return super().needs_dense_gradient(step) or self._in_window(step)

    def _in_window(self, step: int) -> bool:
        return self.postponed or any(due - self.config.grow_batches < step <= due for due in self._next_update(step))

    def _next_update(self, step: int) -> range:
        """Return the update at or after `step`, as a range of at most one step."""
        passed = max(step - self.updates.start, 0)
        return self.updates[-(-passed // self.updates.step) :][:1]

    def after_backward(self, context: Context, step: int) -> bool:
        if not self._in_window(step):
            return True
        due = step in self.updates or self.postponed
        gradients = {name: context.parameters()[name].grad for name in context.masks.masks}
        if context.amp_scaled and not all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values()):
            self.postponed = due  # fp16 overflowed; the scaler skips the step as well
            return True
        self.postponed = False
        if self.config.grow_batches > 1 or not self.config.skip_step_on_update:  # clipping comes before `after_step`
            self._accumulate(gradients)
        if due and self.config.skip_step_on_update:
            self._update_now(context, step)
            return False
        self.due = due
        return True

    def after_step(self, context: Context, step: int) -> None:
        if self.due:
            self._update_now(context, step)

    def _update_now(self, context: Context, step: int) -> None:
        self.update(context, step)
        self.due = False
        self.gradient_sums, self.num_summed = {}, 0

    def _accumulate(self, gradients: dict[str, Tensor]) -> None:
        """Add to the sums, which are on the CPU after a resume."""
        sums = self.gradient_sums
        self.num_summed += 1
        for name, gradient in gradients.items():
            sums[name] = sums[name].to(gradient.device) + gradient if name in sums else gradient.clone()

    def gradients(self, context: Context, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the gradient of the task loss of one batch, or the mean of several: before clipping, without decay.

        They are averaged over processes and micro-batches before absolute values are taken.
        """
        if not self.gradient_sums:
            named = context.parameters()
            return {name: named[name].grad for name in names}
        return {name: self.gradient_sums[name] / self.num_summed for name in names}

    def grow_scores(self, context: Context, step: int, candidates: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return |gradient| per position.

        Raises:
            RuntimeError: every gradient of the pruned weights is zero, because they were masked.
        """
        scores = {name: gradient.abs() for name, gradient in self.gradients(context, candidates).items()}
        check_dense(scores, candidates, f"gradients at step {step}")
        return scores

    def redistributes(self) -> bool:
        return self.config.redistribution != "none"

    def redistribution_signal(self, context: Context, names: Iterable[str]) -> dict[str, Tensor] | None:
        if not self.redistributes():
            return None
        if self.config.redistribution == "gradient":
            return self.gradients(context, names)
        return self.momenta(context, names)

    def paper_train_ratio(self, context: Context) -> float | None:
        if self.redistributes():  # the formula assumes a constant f_S
            return None
        from prune_lab.accounting.training import rigl_training_ratio  # its file imports torch

        return rigl_training_ratio(context.forward_macs, context.dense_macs, self.interval(context))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "gradient_sums": self.gradient_sums, "num_summed": self.num_summed, "postponed": self.postponed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.gradient_sums, self.num_summed = dict(state["gradient_sums"]), state["num_summed"]
        self.postponed = state["postponed"]
