"""Start-up: what a command takes before it computes, over importing torch, each in a process of its own.

A whole run writes everything a run leaves and evaluates one batch.
"""

from __future__ import annotations

import os
import sys
import tempfile

from benchmarks.report import Report
from benchmarks.timing import in_turn_once, seconds_of
from benchmarks.workload import Options

_ONE_STEP = ("dataset=fake", "schedule.batch_size=8", "schedule.train.epochs=1", "schedule.train.warmup_epochs=0",
             "trainer.limit_train_batches=1", "trainer.limit_eval_batches=1", "trainer.eval_batch_size=8",
             "logger.wandb=disabled")  # fmt: skip


def run(options: Options, report: Report) -> None:
    command = [sys.executable, "-m", "prune_lab"]
    with tempfile.TemporaryDirectory() as folder:
        fresh = iter(range(10**6))  # a seed per run: the same command would find its run done

        def one_step() -> float:
            place = [f"output_dir={folder}", f"seed={next(fresh)}"]
            return seconds_of([*command, *_ONE_STEP, *place], os.environ)

        calls = {
            "import torch": lambda: seconds_of([sys.executable, "-c", "import torch"], os.environ),
            "prune-lab --help": lambda: seconds_of([*command, "--help"], os.environ),
            "prune-lab --cfg job": lambda: seconds_of([*command, "--cfg", "job"], os.environ),
            "whole run of one training step": one_step,
            "the same, done already": lambda: seconds_of([*command, *_ONE_STEP, f"output_dir={folder}", "seed=0"],
                                                             os.environ),
        }  # fmt: skip
        in_turn_once(dict(list(calls.items())[:-1]), 1)  # files come into the page cache
        times = in_turn_once(calls, options.num_starts())
    for name in list(calls)[1:]:
        report.compare(f"{name}: over importing torch", times[name], times["import torch"])
