"""What a save keeps from training, in steps; computed from it, its share of an hour; and what resuming takes."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import workload
from benchmarks.report import Report
from benchmarks.timing import in_turn
from benchmarks.workload import Options
from prune_lab.foundations.checkpoint import CheckpointPair
from prune_lab.training import loop
from prune_lab.training.saving import Saves, next_save_s

_METHOD = "rigl"
"""masks and their history are part of its checkpoints"""
_STEPS = 3
_HOUR = 3600.0


def run(options: Options, report: Report) -> None:
    report.note(f"a save: the copy, what the writing thread takes from {_STEPS} steps, waiting until it is done")
    report.note("computed: that cost, placed by the rule of the options, which aims at 1 %; long training is not timed")
    shapes = {"ResNet-20": workload.SMALL, "ResNet-50": workload.large(quick=options.quick)}
    for name, base in shapes.items():
        _one(name, options.over(*base), options, report)


def _one(name: str, overrides: Sequence[str], options: Options, report: Report) -> None:
    interval = workload.compose(overrides).trainer.checkpoint_interval_s
    still = (*overrides, "trainer.checkpoint_interval_s=1e9")  # saves come when asked for here, not by the clock
    work = workload.workload(_METHOD, still)
    with tempfile.TemporaryDirectory() as folder:
        training = work.training
        training.checkpoints = CheckpointPair(Path(folder), report.note)
        training.saves = Saves(training.checkpoints, 1e9, work.device)

        def steps() -> None:
            for _ in range(_STEPS):
                work.ordinary()

        def save_and_steps() -> None:
            loop.save_checkpoint(training)
            steps()
            training.saves.wait()

        def started() -> None:
            workload.workload(_METHOD, still).ordinary()

        def resumed() -> None:
            fresh = workload.workload(_METHOD, still)
            fresh.training.load_state_dict(training.checkpoints.load())
            fresh.ordinary()

        plan = options.plan(20, 30)
        times = in_turn({"steps": steps, "saved": save_and_steps}, plan, work.device)
        starts = in_turn({"anew": started, "resumed": resumed}, options.plan(8, 10), work.device)
        training.saves.close()
    one = [value / _STEPS for value in times["steps"]]
    stalls = [b - a for a, b in zip(times["steps"], times["saved"], strict=True)]
    report.compare(f"{name}: steps that a save costs", stalls, one)
    slowed = [1 + share(max(stall, 0.0), interval) for stall in stalls]
    report.compare(f"{name}: computed: training that saves ({interval}) over none", slowed, [1.0] * len(slowed))
    report.compare(f"{name}: resumed to its first step, over started anew", starts["resumed"], starts["anew"])


def share(stall_s: float, interval_s: float | str) -> float:
    """Return the part of an hour's training that saves take which each keep `stall_s` from it.

    With `auto` the rule of the loop places them.
    """
    if interval_s != "auto":
        return stall_s / float(interval_s)
    costs, last = [], 0.0
    while (last := next_save_s(costs, last)) <= _HOUR:
        costs.append(stall_s)
    return sum(costs) / _HOUR
