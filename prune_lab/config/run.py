"""All options of one run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prune_lab.config.logger import LoggerConfig
from prune_lab.config.optimizer import AdamConfig, SGDConfig
from prune_lab.config.paper import PaperConfig
from prune_lab.config.schedule import ScheduleConfig
from prune_lab.config.trainer import TrainerConfig
from prune_lab.foundations.schema import FilePath

if TYPE_CHECKING:
    from prune_lab.config.matched import Matched

@dataclass(frozen=True)
class RunConfig:
    """Everything one run is told. `method` is an instance of the method's class, not yet attached to a model."""

    model: Any
    dataset: Any
    method: Any
    schedule: ScheduleConfig
    optimizer: SGDConfig | AdamConfig
    trainer: TrainerConfig
    logger: LoggerConfig
    seed: int
    output_dir: FilePath
    dry_run: bool
    resolved: dict
    overrides: tuple[str, ...] = ()
    """the command's options as typed, for the record"""
    paper: PaperConfig | None = None
    """published numbers to compare with, from a recipe"""
    matched: Matched | None = None
    """how the budget was solved, with method.match; `method` and `schedule` hold the outcome"""
