"""The options of a run, one dataclass per group, checked after Hydra has composed them. Imports no torch."""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prune_lab import datasets, models
from prune_lab.methods.base import Method
from prune_lab.schema import (
    ConfigError,
    Count,
    FilePath,
    Index,
    Momentum,
    Name,
    NonNegative,
    OpenFraction,
    Positive,
    as_typed,
    parse,
    suggestion,
)

if TYPE_CHECKING:
    from prune_lab.matching import Matched


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
            raise ConfigError(f"{path}.milestones must rise, got {self.milestones}")
        if self.policy == "step" and self.epochs and any(m >= self.epochs for m in self.milestones):
            raise ConfigError(f"{path}.milestones must lie before epoch {self.epochs}, got {self.milestones}")
        if self.epochs and self.warmup_epochs >= self.epochs:
            raise ConfigError(
                f"{path}.warmup_epochs must be below {path}.epochs={self.epochs}, got {self.warmup_epochs:g}"
            )
        if self.final_lr > self.lr:
            raise ConfigError(f"{path}.final_lr must not exceed {path}.lr={self.lr:g}, got {self.final_lr:g}")

    def stretched(self, factor: float) -> PhaseSchedule:
        """Return the schedule `factor` times as long; epochs are rounded, a phase that is there keeps at least one."""
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
        return getattr(self, name).stretched(self.multiplier)


@dataclass(frozen=True)
class SGDConfig:
    name: Literal["sgd"]
    momentum: Momentum
    nesterov: bool
    weight_decay: NonNegative
    decay_norm_and_bias: bool

    def check(self, path: str) -> None:
        if self.nesterov and self.momentum == 0:
            raise ConfigError(f"{path}.nesterov=true needs {path}.momentum > 0")


@dataclass(frozen=True)
class AdamConfig:
    name: Literal["adam", "adamw"]
    beta1: Momentum
    beta2: Momentum
    eps: Positive
    weight_decay: NonNegative
    decay_norm_and_bias: bool


OPTIMIZERS = {"sgd": SGDConfig, "adam": AdamConfig, "adamw": AdamConfig}


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
            raise ConfigError(f"{path}.device={self.device} is not allowed{near}; allowed: {allowed}", f"{path}.device")
        interval, name = self.checkpoint_interval_s, f"{path}.checkpoint_interval_s"
        is_number = isinstance(interval, (int, float)) and not isinstance(interval, bool)
        if interval != "auto" and not (is_number and 0 < interval < math.inf):
            allowed = "auto, a number of seconds above 0"
            raise ConfigError(f"{name}={as_typed(interval)} is not allowed; allowed: {allowed}", name)


@dataclass(frozen=True)
class LoggerConfig:
    wandb: Literal["auto", "online", "offline", "disabled"]
    project: str
    entity: str | None
    tags: list[str]


@dataclass(frozen=True)
class PaperConfig:
    """What a publication reports for the run that a recipe describes; changes nothing about the run."""

    cite: str
    """authors, year, arXiv number"""
    where: str
    """table or figure, and row"""
    certainty: Literal["paper", "abstract", "report", "code", "author", "issue", "figure", "summary", "third-party",
                       "derived", "memory"]
    """where the values were read: `report` is a reproduction's, `summary` a text about the paper, `memory` unchecked"""
    values: dict[str, float]
    """published numbers under the keys of summary.json"""
    std: dict[str, float]
    """their standard deviations over seeds, where published"""
    remark: str | None
    """what in the recipe is not the paper's, or how its numbers were counted"""

    def check(self, path: str) -> None:
        for name, numbers in (("values", self.values), ("std", self.std)):
            for key in numbers:
                if key not in PAPER_KEYS:
                    raise ConfigError(f"unknown key {path}.{name}.{key}{suggestion(key, PAPER_KEYS)}; "
                                      f"allowed: {', '.join(PAPER_KEYS)}", path)  # fmt: skip
        for key, value in self.std.items():
            if key not in self.values or value < 0:
                raise ConfigError(f"{path}.std.{key} must be 0 or more, of a number that {path}.values has", path)


PAPER_KEYS = ("final/top1", "final/top5", "test/top1", "test/top5", "dense/top1", "delta/top1", "sparsity/achieved",
              "sparsity/all_parameters", "params/nonzero", "params/total", "params/dense", "macs/dense",
              "macs/inference", "macs/inference_ratio", "macs/train_ratio", "macs/train_ratio_paper")  # fmt: skip
"""keys of summary.json that a publication can have numbers for"""


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
        ConfigError: the first wrong option, in one line.
    """
    root = parse(_Root, node, "")
    _check_output_dir(root.output_dir)
    config = RunConfig(
        model=models.parse_config(root.model),
        dataset=datasets.parse_config(root.dataset),
        method=_method(root.method),
        schedule=root.schedule,
        optimizer=_optimizer(root.optimizer),
        trainer=root.trainer,
        logger=root.logger,
        seed=root.seed,
        output_dir=root.output_dir,
        dry_run=root.dry_run,
        resolved=dict(node),
        paper=root.paper,
    )
    config.method.check_run(config)
    return config


def _check_output_dir(name: str) -> None:
    """Refuse a place where no directory can be made, before the minutes of a run are spent."""
    if not name.strip():
        raise ConfigError("output_dir must name a folder, got an empty text", "output_dir")
    path = Path(name).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        raise ConfigError(f"output_dir={name}: {there} is a file, no folder", "output_dir")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir={name}: no permission to write to {there}", "output_dir")


def _optimizer(node: Mapping[str, Any]) -> SGDConfig | AdamConfig:
    if node.get("name") not in OPTIMIZERS:
        raise ConfigError(
            f"optimizer.name={node.get('name')} is not allowed; allowed: {', '.join(OPTIMIZERS)}", "optimizer.name"
        )
    return parse(OPTIMIZERS[node["name"]], node, "optimizer")


def method_class(node: Mapping[str, Any]) -> type[Method]:
    """Return the class that the group `method` names.

    Raises:
        ConfigError: there is none.
    """
    target, option = node.get("_target_"), "method._target_"
    if not isinstance(target, str) or "." not in target:
        raise ConfigError(f"{option} must name a class such as prune_lab.methods.rigl.RigL, got {target}", option)
    module_name, _, class_name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{option}={target} cannot be imported: {error}", option) from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ConfigError(f"{option}={target} is not a prune_lab.methods.base.Method", option)
    return found


def _method(node: Mapping[str, Any]) -> Method:
    cls = method_class(node)
    options = {key: value for key, value in node.items() if key != "_target_"}
    return cls(parse(cls.Config, options, "method"))


__all__ = ["AdamConfig", "ConfigError", "LoggerConfig", "PhaseSchedule", "RunConfig", "SGDConfig", "ScheduleConfig",
           "TrainerConfig", "check"]
