"""A phase on random images and without files: errors of a run, found before anything is written."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from prune_lab import datasets, models
from prune_lab.config.run import RunConfig
from prune_lab.core import removal
from prune_lab.core.chain import PlannedPhase, Results
from prune_lab.core.context import Context
from prune_lab.core.method import build_method
from prune_lab.core.phase_result import PhaseResult
from prune_lab.datasets.text import TextInfo, random_batch
from prune_lab.foundations.checkpoint import CheckpointPair
from prune_lab.training.device_config import DeviceConfig
from prune_lab.training.loop import train_step
from prune_lab.training.phases import open_context, open_training, result_of, span, steps_per_epoch
from prune_lab.training.task import PhaseTask

_IMAGES = 4
"""images per micro-batch of the single step: enough for batch norm, few enough for ResNet-50 on a laptop"""


class RandomImages:
    """Stands in for a data set of the same sizes."""

    def __init__(self, info: datasets.DatasetInfo, device: torch.device) -> None:
        self.info, self._device = info, device

    def num_batches(self, batch_size: int) -> int:
        return self.info.num_train // batch_size

    def batch(self, num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(self.info, TextInfo):
            return random_batch(self.info, num_images, self._device)
        size = self.info.image_size
        images = torch.randn(num_images, 3, size, size, device=self._device)
        return images, torch.arange(num_images, device=self._device) % self.info.num_classes

    @property
    def train_labels(self) -> torch.Tensor:
        return torch.arange(self.info.num_train) % self.info.num_classes

    def train_subset(
        self, batches: Sequence[torch.Tensor], *, augment_seed: int | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield a few images for the first of `batches` only: enough to check that the shapes fit."""
        yield self.batch(min(_IMAGES, len(batches[0])))


def validate(
    config: RunConfig, model_config: Any, planned: Sequence[PlannedPhase], dataset: Any, device_config: DeviceConfig
) -> list[str]:
    """Set up the first phase and allocate the method's budgets, so that their errors appear before any file is written.

    Returns:
        Lines for the user: for methods that remove channels, the removable ones.

    Raises:
        UserError: wrong start weights, batch larger than the data, unreachable target, schedule too short, channels
            that cannot be removed ...
    """
    method, first = build_method(config), planned[0]
    task = task_without_files(config, model_config, first, dataset, device_config, Results(()))
    context, notes = open_context(task), []
    if method.removes_channels():
        cut = method.trial_cut(context)
        removal.try_cut(context, cut)
        notes.append(cut.line())
    if first.phase.is_training:
        context.optimizer = task.method.build_optimizer(context.model, config.optimizer)
    task.method.setup(context)
    method.layout(context)
    steps = steps_per_epoch(task)
    for entry in planned:
        span(entry, steps)
    return notes


def task_without_files(
    config: RunConfig, model_config: Any, entry: PlannedPhase, dataset: Any, device_config: DeviceConfig, done: Results,
    *, report: Callable[[str], None] = lambda text: None,
) -> PhaseTask:
    """Return a phase that reads and writes no file, based on the results of earlier phases in `done`.

    Args:
        report: receives the method's messages during set-up.
    """
    nowhere = CheckpointPair(Path(tempfile.gettempdir()), print)
    return PhaseTask(
        config=config,
        model_config=model_config,
        planned=entry,
        dataset=dataset,
        device_config=device_config,
        previous=done.before(entry.phase),
        origin=done.origin(entry.phase),
        checkpoints=nowhere,
        resumed=None,
        record=lambda row: None,
        show=lambda done, total, text: None,
        report=report,
        stop=lambda: False,
        validating=True,
    )


def set_up(task: PhaseTask) -> tuple[PhaseResult, Context]:
    """Run a phase without its training and return the start of the next phase."""
    context, acts = open_context(task), task.phase.acts
    if acts is None:
        context.optimizer = task.method.build_optimizer(context.model, task.config.optimizer)
    _prepare(task, context)
    figures = {} if acts is None else acts(task.method, context) or {}
    return result_of(task, context, context.model, figures), context


def one_step(task: PhaseTask) -> tuple[PhaseResult, Context]:
    """Run the first step of a phase and return the start of the next phase."""
    if not task.phase.is_training:
        return set_up(task)
    context = open_context(task)
    training = open_training(task, context)
    _prepare(task, context)
    context.model.train()
    if context.total_steps:
        forward, size = training.forward, task.sizes["image_size"]

        def named(*inputs: Any) -> Any:
            with models.one_line(task.model_config, size):
                return forward(*inputs)

        training.forward = named
        train_step(training, *task.dataset.batch(_IMAGES * task.config.trainer.accumulate))
    return result_of(task, context, context.model, {}), context


def _prepare(task: PhaseTask, context: Context) -> None:
    """Set the method up; later reports concern random images and are dropped."""
    task.method.setup(context)
    context.report = lambda text: None
