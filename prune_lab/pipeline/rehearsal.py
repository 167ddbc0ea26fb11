"""A phase on random images and without files: what a run would refuse, found before anything is written."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prune_lab import datasets, models
from prune_lab.config.run import RunConfig
from prune_lab.core import removal
from prune_lab.core.chain import PlannedPhase, Results
from prune_lab.core.context import Context
from prune_lab.foundations.checkpoint import CheckpointPair
from prune_lab.training.job import Job
from prune_lab.training.loop import train_step
from prune_lab.training.numerics import Numerics
from prune_lab.training.phases import open_context, open_training, span, steps_per_epoch

_IMAGES = 4
"""images per micro-batch of the one step: enough for batch norm, little enough for ResNet-50 on a laptop"""


class RandomImages:
    """Stands in for a data set of the same sizes."""

    def __init__(self, info: datasets.DatasetInfo, device: torch.device) -> None:
        self.info, self._device = info, device

    def num_batches(self, batch_size: int) -> int:
        return self.info.num_train // batch_size

    def batch(self, num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.info.image_size
        images = torch.randn(num_images, 3, size, size, device=self._device)
        return images, torch.arange(num_images, device=self._device) % self.info.num_classes

    @property
    def train_labels(self) -> torch.Tensor:
        return torch.arange(self.info.num_train) % self.info.num_classes

    def train_subset(
        self, batches: Sequence[torch.Tensor], *, augment_seed: int | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield a few images for the first of `batches` only: enough to show that the shapes fit."""
        yield self.batch(min(_IMAGES, len(batches[0])))


def rehearse(
    config: RunConfig, model_config: Any, planned: Sequence[PlannedPhase], dataset: Any, arithmetic: Numerics
) -> list[str]:
    """Set up the first phase and lay out the budgets of the method, so that what they refuse is known before any file.

    Returns:
        Lines for the user: for methods that remove channels, which may go.

    Raises:
        ConfigError: wrong start weights, batch larger than the data, target out of reach, schedule too short, channels
            that cannot be removed ...
    """
    first, fresh = planned[0], replace(config, method=type(config.method)(config.method.config))
    job = job_without_files(fresh, model_config, first, dataset, arithmetic, Results(()))
    context, notes = open_context(job), []
    if any(entry.phase.hook == "remove" for entry in planned):
        cut = fresh.method.trial_cut(context)
        removal.try_cut(context, cut)
        notes.append(cut.line())
    if first.phase.hook == "train":
        context.optimizer = job.method.build_optimizer(context.model, config.optimizer)
    job.method.setup(context)
    fresh.method.layout(context)
    steps = steps_per_epoch(job)
    for entry in planned:
        span(entry, steps)
    return notes


def job_without_files(
    config: RunConfig, model_config: Any, entry: PlannedPhase, dataset: Any, arithmetic: Numerics, done: Results,
    *, report: Callable[[str], None] = lambda text: None,
) -> Job:
    """Return a phase that reads and writes no file, on what the phases before it left in `done`.

    Args:
        report: takes what the method says when it is set up.
    """
    nowhere = CheckpointPair(Path(tempfile.gettempdir()), print)
    return Job(
        config=config,
        model_config=model_config,
        planned=entry,
        dataset=dataset,
        numerics=arithmetic,
        previous=done.before(entry.phase),
        origin=done.origin(entry.phase),
        checkpoints=nowhere,
        resumed=None,
        record=lambda row: None,
        show=lambda done, total, text: None,
        report=report,
        stop=lambda: False,
        rehearsal=True,
    )


def set_up(job: Job) -> tuple[dict[str, Any], Context]:
    """Do everything of a phase but its training and return what the next phase starts from."""
    context = open_context(job)
    if job.planned.phase.hook == "train":
        context.optimizer = job.method.build_optimizer(context.model, job.config.optimizer)
    _prepare(job, context)
    noted = {} if job.planned.phase.hook == "train" else getattr(job.method, job.planned.phase.hook)(context)
    return _result(job, context) | {"noted": noted or {}}, context


def one_step(job: Job) -> tuple[dict[str, Any], Context]:
    """Do the first step of a phase and return what the next phase starts from."""
    if job.planned.phase.hook != "train":
        return set_up(job)
    context = open_context(job)
    training = open_training(job, context)
    _prepare(job, context)
    context.model.train()
    if context.total_steps:
        forward, size = training.forward, job.dataset.info.image_size

        def named(images: torch.Tensor) -> torch.Tensor:
            with models.one_line(job.model_config, size):
                return forward(images)

        training.forward = named
        train_step(training, *job.dataset.batch(_IMAGES * job.config.trainer.accumulate))
    return _result(job, context), context


def _prepare(job: Job, context: Context) -> None:
    """Set the method up; what it says later is of random images, and goes nowhere."""
    job.method.setup(context)
    context.report = lambda text: None


def _result(job: Job, context: Context) -> dict[str, Any]:
    masks = None if context.masks is None else context.masks.state_dict()
    if job.planned.phase.keeps_optimizer:
        context.optimizer_state = context.optimizer.state_dict()
    result = {"model": context.model.state_dict(), "masks": masks, "method": job.method.state_dict(),
              "widths": context.widths}
    return result if context.optimizer_state is None else result | {"optimizer": context.optimizer_state}
