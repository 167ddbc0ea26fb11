"""Options of what a run reports, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LoggerConfig:
    wandb: Literal["auto", "online", "offline", "disabled"]
    project: str
    entity: str | None
    tags: list[str]
