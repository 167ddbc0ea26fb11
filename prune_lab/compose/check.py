"""From Hydra's composed configuration to one checked `RunConfig`. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_lab import datasets, models
from prune_lab.config.logger import LoggerConfig
from prune_lab.config.optimizer import PLAIN, FrankWolfeConfig, OptimizerConfig, PlainConfig
from prune_lab.config.paper import PaperConfig
from prune_lab.config.run import RunConfig
from prune_lab.config.schedule import ScheduleConfig
from prune_lab.config.trainer import TrainerConfig
from prune_lab.core.method import MethodConfig, build_method, method_class
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import FilePath, Index, parse


@dataclass(frozen=True)
class _Root:
    model: dict[str, Any]
    dataset: dict[str, Any]
    method: dict[str, Any]
    schedule: ScheduleConfig
    optimizer: dict[str, Any]
    trainer: TrainerConfig
    logger: LoggerConfig
    paper: PaperConfig | None
    seed: Index
    output_dir: FilePath
    dry_run: bool


def check(node: Mapping[str, Any]) -> RunConfig:
    """Return the checked options of a run.

    Args:
        node: the composed configuration as plain containers, interpolations resolved.

    Raises:
        UserError: the first wrong option, in one line.
    """
    root = parse(_Root, node, "")
    _check_output_dir(root.output_dir)
    config = RunConfig(
        model=models.parse_config(root.model),
        dataset=datasets.parse_config(root.dataset),
        method=_method(root.method),
        method_target=root.method["_target_"],
        schedule=root.schedule,
        optimizer=_optimizer(root.optimizer),
        trainer=root.trainer,
        logger=root.logger,
        seed=root.seed,
        output_dir=root.output_dir,
        dry_run=root.dry_run,
        paper=root.paper,
    )
    build_method(config).check_run(config)
    return config


def _check_output_dir(name: str) -> None:
    """Reject a location where no directory can be created, before the run spends minutes."""
    if not name.strip():
        raise UserError("output_dir must name a folder, got an empty text", "output_dir")
    path = Path(name).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        raise UserError(f"output_dir={name}: {there} is a file, no folder", "output_dir")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"output_dir={name}: no permission to write to {there}", "output_dir")


def _optimizer(node: Mapping[str, Any]) -> OptimizerConfig:
    if node.get("name") != "frank_wolfe":
        return _plain_optimizer(node, "optimizer", (*PLAIN, "frank_wolfe"))
    if not isinstance(node.get("outer"), Mapping):
        raise UserError("optimizer.outer must be a group of options, those of an optimizer", "optimizer.outer")
    outer = _plain_optimizer(node["outer"], "optimizer.outer", tuple(PLAIN))
    return parse(FrankWolfeConfig, {**node, "outer": outer}, "optimizer")


def _plain_optimizer(node: Mapping[str, Any], path: str, allowed: tuple[str, ...]) -> PlainConfig:
    name = node.get("name")
    if name not in PLAIN:
        raise UserError(f"{path}.name={name} is not allowed; allowed: {', '.join(allowed)}", f"{path}.name")
    return parse(PLAIN[name], node, path)


def _method(node: Mapping[str, Any]) -> MethodConfig:
    options = {key: value for key, value in node.items() if key != "_target_"}
    return parse(method_class(node.get("_target_")).Config, options, "method")
