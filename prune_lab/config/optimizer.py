"""Options of the optimizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import Momentum, NonNegative, Positive


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


OPTIMIZERS = {"sgd": SGDConfig, "adam": AdamConfig, "adamw": AdamConfig}
