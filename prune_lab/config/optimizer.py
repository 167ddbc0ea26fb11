"""Options of the optimizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import Count, Momentum, NonNegative, Positive


@dataclass(frozen=True)
class SGDConfig:
    name: Literal["sgd"]
    momentum: Momentum
    nesterov: bool
    weight_decay: NonNegative
    decay_norm_and_bias: bool

    def check(self, path: str) -> None:
        if self.nesterov and self.momentum == 0:
            raise UserError(f"{path}.nesterov=true needs {path}.momentum > 0")


@dataclass(frozen=True)
class AdamConfig:
    name: Literal["adam", "adamw"]
    beta1: Momentum
    beta2: Momentum
    eps: Positive
    weight_decay: NonNegative
    decay_norm_and_bias: bool


PlainConfig = SGDConfig | AdamConfig

PLAIN = {"sgd": SGDConfig, "adam": AdamConfig, "adamw": AdamConfig}
"""name -> options of an optimizer of torch"""


@dataclass(frozen=True)
class FrankWolfeConfig:
    name: Literal["frank_wolfe"]
    outer: Any
    """a PlainConfig, checked beforehand"""
    inner_steps: Count
    inner_radius: Positive
    inner_point: Literal["official", "ball"]

    @property
    def weight_decay(self) -> float:
        """That of the outer optimizer."""
        decay: float = self.outer.weight_decay
        return decay


OptimizerConfig = PlainConfig | FrankWolfeConfig
