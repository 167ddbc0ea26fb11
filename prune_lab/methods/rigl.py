"""RigL: drop the smallest weights, grow where the loss gradient is largest, at a fixed budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prune_lab.lazy import lazy_import
from prune_lab.methods.base import Card
from prune_lab.methods.families.sparse_training import DropAndGrow, DropAndGrowConfig
from prune_lab.schema import ConfigError, Count

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.context import Context

torch = lazy_import("torch")
accounting = lazy_import("prune_lab.accounting")


@dataclass(frozen=True)
class RigLConfig(DropAndGrowConfig):
    grow_batches: Count
    """growth score: |mean dense gradient| over so many steps up to the update (1: the update's batch, as published)"""

    def check(self, path: str) -> None:
        super().check(path)
        if self.grow_batches > self.interval:
            raise ConfigError(
                f"{path}.grow_batches must not exceed {path}.interval={self.interval}, got {self.grow_batches}"
            )


class RigL(DropAndGrow):
    Config = RigLConfig
    card = Card(
        summary="sparse from the start; every interval the smallest weights move to the largest gradients",
        paper="Evci, Gale, Menick, Castro, Elsen 2020, Rigging the Lottery: Making All Tickets Winners, "
        "arXiv 1911.11134",
        acts="during training, every method.interval steps until method.end of it",
        eligible="weights of convolutions and linear layers; depthwise ones only if included (RigL 4.1.2)",
        cost="one bool per weight; a dense weight gradient on update steps; two selections per layer and update",
        differences="ranks by exact index instead of adding 1e-5 noise; t counts update steps too (alg. 1), where the "
        "official code draws an extra batch; Adam's shared step counter is not restarted for grown weights",
    )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.gradient_sums: dict[str, Tensor] = {}
        self.due = False

    def needs_dense_gradient(self, step: int) -> bool:
        return self.postponed or any(due - self.config.grow_batches < step <= due for due in self._next_update(step))

    def _next_update(self, step: int) -> range:
        """Return the update at or after `step`, as a range of at most one step."""
        passed = max(step - self.config.begin, 0)
        return self.updates[-(-passed // self.config.interval) :][:1]

    def after_backward(self, context: Context, step: int) -> bool:
        if not self.needs_dense_gradient(step):
            return True
        due = step in self.updates or self.postponed
        gradients = {name: context.parameters()[name].grad for name in context.masks.masks}
        if context.amp_scaled and not all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values()):
            self.postponed = due  # fp16 overflowed; the scaler leaves the step out as well
            return True
        self.postponed = False
        if self.config.grow_batches > 1:
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
        self.gradient_sums = {}

    def _accumulate(self, gradients: dict[str, Tensor]) -> None:
        """Add to the sums, which rank like the mean; after a resume they come from the CPU."""
        sums = self.gradient_sums
        for name, gradient in gradients.items():
            sums[name] = sums[name].to(gradient.device) + gradient if name in sums else gradient.clone()

    def grow_scores(self, context: Context, step: int, candidates: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return |gradient of the task loss| of one batch or the mean of several; weight decay is not in it.

        Processes and micro-batches are averaged before the absolute value is taken.

        Raises:
            RuntimeError: every gradient of the pruned weights is zero, so somebody masked them.
        """
        named = context.parameters()
        gradients = self.gradient_sums or {name: named[name].grad for name in candidates}
        scores = {name: gradients[name].abs() for name in candidates}
        if scores and not any(bool(score[~candidates[name]].any()) for name, score in scores.items()):
            raise RuntimeError(f"RigL at step {step}: all gradients of pruned weights are zero; something masks them")
        return scores

    def paper_train_ratio(self, context: Context) -> float:
        return accounting.rigl_training_ratio(context.forward_macs, context.dense_macs, self.config.interval)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"gradient_sums": self.gradient_sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.gradient_sums = dict(state["gradient_sums"])
