"""Options of the training loop and of what it saves."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import Count, OpenFraction, Positive, as_typed, suggestion


@dataclass(frozen=True)
class TrainerConfig:
    device: str
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    channels_last: bool | Literal["auto"]
    compile: bool | Literal["auto", "graphs"]
    accumulate: Count
    clip_norm: Positive | None
    ema_decay: OpenFraction | None
    sync_bn: bool
    eval_batch_size: Count
    eval_interval: Count
    checkpoint_interval_s: Any
    """auto, or seconds above 0"""
    threads: Count | None
    limit_train_batches: Count | None
    limit_eval_batches: Count | None

    def check(self, path: str) -> None:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            near = suggestion(self.device, ("auto", "cpu", "cuda", "mps"))
            allowed = "auto, cpu, cuda, cuda:N, mps"
            raise UserError(f"{path}.device={self.device} is not allowed{near}; allowed: {allowed}", f"{path}.device")
        interval, name = self.checkpoint_interval_s, f"{path}.checkpoint_interval_s"
        is_number = isinstance(interval, (int, float)) and not isinstance(interval, bool)
        if interval != "auto" and not (is_number and 0 < interval < math.inf):
            allowed = "auto, a number of seconds above 0"
            raise UserError(f"{name}={as_typed(interval)} is not allowed; allowed: {allowed}", name)
