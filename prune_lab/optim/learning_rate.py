"""Learning rate of each step."""

from __future__ import annotations

import math

from prune_lab.config.schedule import PhaseSchedule
from prune_lab.foundations.lazy import torch


def learning_rate(schedule: PhaseSchedule, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of optimizer step `step` (from 0).

    Warm-up rises linearly and reaches the peak at its end. Cosine and linear fall from there to `final_lr`, the
    value for the step after the last one.
    """
    epoch = step / steps_per_epoch
    if epoch < schedule.warmup_epochs:
        # A warm-up that ends between two steps must not overshoot.
        return schedule.lr * min(1.0, (step + 1) / (schedule.warmup_epochs * steps_per_epoch))
    if schedule.policy == "step":
        # Exact step counts: 0.1 epochs of 7 steps must not depend on rounding in the division.
        passed = sum(step >= round(milestone * steps_per_epoch) for milestone in schedule.milestones)
        return schedule.lr * schedule.gamma**passed
    if schedule.policy == "constant":
        return schedule.lr
    progress = (epoch - schedule.warmup_epochs) / (schedule.epochs - schedule.warmup_epochs)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if schedule.policy == "cosine" else 1 - progress
    return schedule.final_lr + (schedule.lr - schedule.final_lr) * remaining


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
