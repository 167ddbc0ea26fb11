"""Options of the schedule: epochs and learning rate of each phase."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import Count, Index, Momentum, Name, NonNegative, Positive


@dataclass(frozen=True)
class PhaseSchedule:
    """How long one phase trains and with which learning rate. Epochs, milestones and warm-up count epochs."""

    epochs: Index
    lr: Positive
    policy: Literal["constant", "step", "cosine", "linear"]
    milestones: list[Positive]
    gamma: Positive
    warmup_epochs: NonNegative
    final_lr: NonNegative

    def check(self, path: str) -> None:
        if self.milestones != sorted(self.milestones):
            raise UserError(f"{path}.milestones must rise, got {self.milestones}")
        if self.policy == "step" and self.epochs and any(m >= self.epochs for m in self.milestones):
            raise UserError(f"{path}.milestones must lie before epoch {self.epochs}, got {self.milestones}")
        if self.epochs and self.warmup_epochs >= self.epochs:
            raise UserError(
                f"{path}.warmup_epochs must be below {path}.epochs={self.epochs}, got {self.warmup_epochs:g}"
            )
        if self.final_lr > self.lr:
            raise UserError(f"{path}.final_lr must not exceed {path}.lr={self.lr:g}, got {self.final_lr:g}")

    def stretched(self, factor: float) -> PhaseSchedule:
        """Return the schedule `factor` times as long; epochs are rounded, and an existing phase keeps at least one."""
        return replace(
            self,
            epochs=max(1, round(self.epochs * factor)) if self.epochs else 0,
            milestones=[milestone * factor for milestone in self.milestones],
            warmup_epochs=self.warmup_epochs * factor,
        )


@dataclass(frozen=True)
class ScheduleConfig:
    name: Name
    batch_size: Count
    multiplier: Positive
    label_smoothing: Momentum
    train: PhaseSchedule
    finetune: PhaseSchedule

    def phase(self, name: str) -> PhaseSchedule:
        """Return the block `name` with the multiplier applied."""
        block: PhaseSchedule = getattr(self, name)
        return block.stretched(self.multiplier)
