"""A run resolved before it starts: options as numbers, its network, its phases and its folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from prune_lab import models
from prune_lab.config.run import RunConfig
from prune_lab.core.chain import PlannedPhase
from prune_lab.core.method import build_method, method_class
from prune_lab.datasets import DatasetInfo
from prune_lab.foundations import distributed
from prune_lab.foundations.errors import UserError
from prune_lab.pipeline import identity, matching
from prune_lab.pipeline.run_folder import RunFolder
from prune_lab.training.device_config import DeviceConfig


@dataclass(frozen=True)
class SettledRun:
    """The inputs of a run, from which its name follows."""

    config: RunConfig
    model_config: Any
    """options of the network that is built, after the method adapted them"""
    planned: list[PlannedPhase]
    folder: RunFolder


def settled(config: RunConfig, info: DatasetInfo) -> RunConfig:
    """Return the options of a run, with those resolved that the method derives from the schedule.

    Raises:
        UserError: model or method are for other data.
    """
    _check_data(config, info)
    steps, limit = info.num_train // config.schedule.batch_size, config.trainer.limit_train_batches
    steps = steps if limit is None else min(steps, limit)
    return replace(config, method=build_method(config).for_schedule(config, steps))


def _check_data(config: RunConfig, info: DatasetInfo) -> None:
    """Refuse text for what works on images, and the reverse."""
    is_text, reads_text = info.task.unit != "images", isinstance(config.model, models.RecurrentConfig)
    if is_text != reads_text:
        reads, has = ("text", "images") if reads_text else ("images", "text")
        raise UserError(f"model={config.model.name} reads {reads}, dataset={config.dataset.name} holds {has}", "model")
    reason = method_class(config.method_target).needs_images
    if is_text and reason:
        raise UserError(f"method={config.method.name} needs a data set of images: {reason}", "method")


def settle(
    config: RunConfig, info: DatasetInfo, device_config: DeviceConfig, *, fingerprint: str | None, content: str | None
) -> SettledRun:
    """Return the run with every option resolved; `config` is the result of `settled`.

    Args:
        fingerprint: content hash of the data set; None: keys that depend on options alone.
        content: of the data set, part of the directory's name (see Dataset.content).

    Raises:
        UserError: the method cannot adapt the network, or the target of method.match is unreachable.
    """
    model_config = build_method(config).adapt_model(config.model, **info.sizes)
    config = matching.matched(config, model_config, info, device_config)
    inputs = {"model": model_config, "device_config": device_config.identity(), "world_size": distributed.world_size()}
    planned = identity.plan_phases(config, fingerprint=fingerprint, **inputs)
    folder = RunFolder.of(config, fingerprint=fingerprint, content=content, **inputs)
    return SettledRun(config, model_config, planned, folder)
