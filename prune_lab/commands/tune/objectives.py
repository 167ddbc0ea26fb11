"""The objectives of a search: figures of summary.json, each with its direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import suggestion

Direction = Literal["minimize", "maximize"]

SHORT = {"top1": "final/top1", "test": "test/top1", "delta": "delta/top1", "macs": "macs/inference_ratio",
         "train": "macs/train_ratio", "params": "params/kept"}  # fmt: skip
"""names that `prune-lab compare` uses -> key"""
_LARGER = ("final/top1", "final/top5", "test/top1", "test/top5", "delta/top1")
_SMALLER = ("final/loss", "test/loss", "macs/inference_ratio", "macs/inference", "macs/train_ratio", "macs/train",
            "params/kept", "params/nonzero", "params/total")  # fmt: skip


@dataclass(frozen=True)
class Objective:
    name: str
    """as typed"""
    key: str
    """in summary.json"""

    @property
    def direction(self) -> Direction:
        """The direction in Optuna's term."""
        return "maximize" if self.key in _LARGER else "minimize"

    @property
    def follows_top1(self) -> bool:
        """Whether the accuracy after each epoch predicts it, so that a trial can be pruned early."""
        return self.key.endswith("/top1")

    @property
    def is_measured(self) -> bool:
        """Whether it depends on the evaluated images."""
        return self.key.startswith(("final/", "test/", "delta/"))


def parse(text: str) -> list[Objective]:
    """Return the objectives of a list KEY,KEY.

    Raises:
        UserError: an unknown one, or one given twice.
    """
    objectives = [Objective(name, SHORT.get(name, name)) for name in text.split(",")]
    for index, objective in enumerate(objectives):
        if objective.key not in _LARGER + _SMALLER:
            names = (*SHORT, *_LARGER, *_SMALLER)
            raise UserError(f"--objective {objective.name} is not a choice{suggestion(objective.name, names)}; "
                              f"allowed: {', '.join(names)}")  # fmt: skip
        if objective.key in {other.key for other in objectives[:index]}:
            raise UserError(f"--objective {text} names {objective.key} twice")
    return objectives


def shown(objectives: Sequence[Objective], values: Sequence[float]) -> str:
    return " ".join(f"{objective.name}={value:.6g}" for objective, value in zip(objectives, values, strict=True))
