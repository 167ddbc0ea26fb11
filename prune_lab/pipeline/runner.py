"""From checked options to a finished run: plan the phases, reuse, resume or run each, save the results."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from prune_lab import datasets
from prune_lab.accounting import targets
from prune_lab.config.run import RunConfig
from prune_lab.core import chain
from prune_lab.core.method import build_method
from prune_lab.datasets import BatchFormat, Dataset
from prune_lab.foundations import distributed
from prune_lab.pipeline import control_runs, matching, results
from prune_lab.pipeline.endings import guarded
from prune_lab.pipeline.executor import Executor
from prune_lab.pipeline.run import Observe, Run
from prune_lab.pipeline.settling import SettledRun, settle, settled
from prune_lab.pipeline.store import lock
from prune_lab.pipeline.stored_phases import obtain
from prune_lab.pipeline.validation import validate
from prune_lab.training.device_config import DeviceConfig, resolve_device_config
from prune_lab.training.loop import Interrupted
from prune_lab.training.phases import dense_note


def run(
    *configs: RunConfig,
    tally: Counter[str] | None = None,
    observe: Observe | None = None,
    executor: Executor | None = None,
) -> int:
    """Carry out runs in turn on the same device, up to the first that does not finish, and return the exit code.

    0: all are finished, 1: one failed, 128: its observer stopped one, 128 + signal: one was interrupted.

    Args:
        tally: counts the runs' phases with training as "trained" now or "reused".
        observe: called once per run.
        executor: services shared with other runs in this process; None: nothing is shared.

    Raises:
        UserError: wrong options or data, before the run directory is written.
    """
    executor, tally = executor or Executor(), Counter() if tally is None else tally
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    resolved = resolve_device_config(configs[0].trainer, local_rank=local_rank)
    device_config = replace(resolved, vectorised=executor.vectorised)
    distributed.start(device_config.torch_device)
    try:
        codes = (_run(config, device_config, tally, observe, executor) for config in configs)
        return next((code for code in codes if code), 0)
    finally:
        distributed.stop()


def _run(
    config: RunConfig, device_config: DeviceConfig, tally: Counter[str], observe: Observe | None, executor: Executor
) -> int:
    config = settled(config, datasets.describe(config.dataset))
    # fp32 images on every device: autocast rounds them where useful, and exact evaluation needs them unrounded.
    dataset = executor.load(
        config.dataset, BatchFormat(device_config.torch_device, torch.float32, device_config.channels_last)
    )
    settling = partial(settle, info=dataset.info, device_config=device_config, fingerprint=dataset.fingerprint,
                       content=dataset.content)  # fmt: skip
    this, baseline = settling(config), control_runs.baseline_run(config)
    folder = None if baseline is None else settling(baseline).folder
    begins = distributed.on_main(lambda: not (this.folder.directory / "run.json").exists())
    notes = _validate(this, dataset, device_config) if begins else []
    with executor.stop_flag() as stop:
        run = Run(this, dataset, device_config, this.folder.tracker(config), stop, tally, executor, folder, notes=notes)
        try:
            with _opened(run, observe):
                return guarded(run, _carry_out)
        except Interrupted:
            return stop.exit_code
        finally:
            executor.close(dataset)


def _validate(this: SettledRun, dataset: Dataset, device_config: DeviceConfig) -> list[str]:
    with matching.naming_reference(this.config):
        return validate(this.config, this.model_config, this.planned, dataset, device_config)


@contextlib.contextmanager
def _opened(run: Run, observe: Observe | None) -> Iterator[None]:
    """Lock the run's folder, which one process at a time writes, and add an observer to the run's sinks."""
    if not distributed.is_main():
        yield
        return
    if observe:
        run.observer = observe(run.stop)
        run.tracker.add_local(run.observer)
    directory = run.folder.directory
    with lock(directory / ".lock", what=str(directory), report=run.tracker.message, poll=run.poll):
        yield


def _carry_out(run: Run) -> int:
    started = time.monotonic()
    run.folder.start(run.tracker, run.config, run.planned)
    for line in _first_lines(run):
        run.tracker.message(line)
    done = chain.Results(entry.phase for entry in run.planned)
    for entry in run.planned:
        result, reused = obtain(run, entry, done)
        done.add(entry.phase, result)
        run.count(entry, result, reused=reused)
    results.complete(run, result, wall_s=time.monotonic() - started)
    return 0


def _first_lines(run: Run) -> Iterator[str]:
    """Yield the lines for the user before the first phase."""
    config, info = run.config, run.dataset.info
    yield from info.lines()
    yield from run.notes
    if config.matched:
        yield config.matched.line()
    if line := targets.plan_line(build_method(run.config).asked()):
        yield line
    if run.baseline:
        yield f"control {config.method.control} of {run.baseline.directory.name}"
    if note := dense_note(config, run.model_config, info.sizes):
        yield note
    if config.model.weights is not None:
        yield "note: macs/train does not count the training of model.weights"
