"""Phases without training, such as scores at initialisation and removal of channels, over a dense step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from benchmarks import workload
from benchmarks.data import images
from benchmarks.report import Report, reason
from benchmarks.timing import in_turn
from benchmarks.workload import Options
from prune_lab.datasets import BatchFormat, Dataset
from prune_lab.datasets.in_memory import InMemoryDataset
from prune_lab.pipeline.validation import set_up
from prune_lab.training.loop import Interrupted
from prune_lab.training.task import PhaseTask

_MOST_S = 10.0
"""a phase that takes longer is named and left out"""


def run(options: Options, report: Report) -> None:
    """Time each phase as a run does it: network built and restored, images scored, masks made or channels removed."""
    overrides = options.over(*workload.SMALL)
    dense = workload.workload("dense", overrides)
    config, arrays = images(options)
    fmt = BatchFormat(dense.device, torch.float32, dense.training.device_config.channels_last)
    dataset = InMemoryDataset(config.dataset, arrays, fmt)
    for method in workload.methods():
        try:
            for name, call in _phases(method, overrides, dataset):
                call()
                times = in_turn({"phase": call, "dense": dense.ordinary}, options.plan(8, 0), dense.device)
                report.compare(f"{method}, {name}: dense steps that it lasts", times["phase"], times["dense"])
        except Interrupted:
            report.note(f"{method}: not measured: takes more than {_MOST_S:g} s")
        except Exception as error:  # phases that need a trained network; one method must not end the report
            report.note(f"{method}: not measured: {reason(error)}")


def _phases(method: str, overrides: Sequence[str], dataset: Dataset) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the phases without training, of repeated ones the first."""
    seen = set()
    for task in workload.tasks(method, overrides):
        name = workload.stem(task.phase)
        if not task.phase.is_training and name not in seen:
            seen.add(name)
            yield name, lambda task=task: _perform(task, dataset)


def _perform(task: PhaseTask, dataset: Dataset) -> None:
    """Do all of a phase's work, where a validation does some.

    Raises:
        Interrupted: it takes too long.
    """
    deadline = time.monotonic() + _MOST_S
    set_up(replace(task, dataset=dataset, validating=False, stop=lambda: time.monotonic() > deadline))
