"""Step time: our loop over bare PyTorch, and every method over the dense step, its mask updates amortised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks import workload
from benchmarks.report import Report, reason
from benchmarks.timing import Goal, Plan, amortised, in_turn
from benchmarks.workload import Options, Workload
from prune_lab.datasets import DatasetInfo
from prune_lab.training import loop

GOAL = Goal(1.01)
_NO_SAVES = "trainer.checkpoint_interval_s=1e9"
"""what they cost is the section checkpoints"""
_STEPS = 5
"""steps per sample of the whole loop"""


def goals(options: Options, report: Report) -> None:
    """Compare the loop with bare PyTorch, and masks and RigL's updates with the dense step, in many rounds."""
    overrides, plan = options.over(*workload.SMALL, _NO_SAVES), options.plan(200, 120)
    dense = workload.workload("dense", overrides)
    ours, bare = _loop_steps(dense, _STEPS), workload.bare_steps(dense, _STEPS)
    times = in_turn({"ours": ours, "bare": bare}, options.plan(80, 120), dense.device)
    report.compare(f"dense: our loop over bare PyTorch ({_STEPS} steps)", times["ours"], times["bare"], GOAL)
    dense.check()
    for method in ("static", "rigl"):
        _compare(workload.workload(method, overrides), dense, plan, report, GOAL)


def small(options: Options, report: Report) -> None:
    """Compare every training phase of every method with the dense step: ResNet-20, batch 128."""
    _all(options.over(*workload.SMALL), options.plan(40, 7), report)


def large(options: Options, report: Report) -> None:
    """The same with ResNet-50 at 224 px."""
    overrides = options.over(*workload.large(quick=options.quick))
    if not torch.cuda.is_available():
        report.note("small batches, because a CPU takes many seconds for a batch of 64: costs per step, such as masks "
                    "and updates, weigh more here than in training")  # fmt: skip
    _all(overrides, options.plan(8, 1), report)


def _all(overrides: Sequence[str], plan: Plan, report: Report) -> None:
    dense = workload.workload("dense", overrides)
    report.note(f"{dense.training.device_config}, batch {dense.training.batch_size}")
    for method in workload.methods():
        if method == "dense":
            continue
        measured = False
        try:
            for work in workload.workloads(method, overrides):
                _compare(work, dense, plan, report)
                measured = True
        except Exception as error:  # named, and the other methods are still measured
            report.note(f"{method}: not measured: {reason(error)}")
            continue
        if not measured:
            report.note(f"{method}: has no training of its own, its steps are dense ones")


def _compare(work: Workload, dense: Workload, plan: Plan, report: Report, goal: Goal | None = None) -> None:
    calls: dict[str, Callable[[], None]] = {"dense": dense.ordinary, "ordinary": work.ordinary}
    if work.updates:
        calls["update"] = work.update
    times = in_turn(calls, plan, dense.device)
    work.check()
    dense.check()
    report.compare(f"{work.name}: step over dense", times["ordinary"], times["dense"], None if work.updates else goal)
    if work.updates:
        report.compare(f"{work.name}: update step over dense", times["update"], times["dense"])
        mean = amortised(times["ordinary"], times["update"], work.interval)
        report.compare(f"{work.name}: amortised (one in {work.interval:g})", mean, times["dense"], goal)


def _loop_steps(work: Workload, count: int) -> Callable[[], None]:
    """Return the last `count` steps of an epoch of our own loop, its checks included."""
    training = work.training
    training.dataset = _SameBatch(work.batch, training.dataset.info)

    def steps() -> None:
        training.progress.batch = training.context.steps_per_epoch - count
        training.progress.step = training.context.first_step + 1
        loop._train_epoch(training)

    return steps


class _SameBatch:
    """A data set whose batches cost nothing."""

    def __init__(self, batch: tuple[Tensor, Tensor], info: DatasetInfo) -> None:
        self._batch, self.info = batch, info

    def train_batches(self, **_place: int) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield self._batch
