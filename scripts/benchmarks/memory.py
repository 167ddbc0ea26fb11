"""Peak memory of training, each in a process of its own: RigL over the dense network and its masks as bool."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import workload
from benchmarks.report import Report
from benchmarks.timing import Goal, figures_of, in_turn_once
from benchmarks.workload import Options

GOAL = Goal(1.05)


def run(options: Options, report: Report) -> None:
    shapes = {"ResNet-20": workload.SMALL, "ResNet-50": workload.large(quick=options.quick)}
    report.note("net: what training adds to a process that has imported torch; whole: all of the process")
    for name, base in shapes.items():
        _compare(name, options.over(*base), options, report)


def _compare(name: str, overrides: Sequence[str], options: Options, report: Report) -> None:
    masks = 0.0
    found: dict[str, dict[str, list[float]]] = {"net": {}, "whole": {}}

    def child(method: str) -> float:
        nonlocal masks
        figures = figures_of([sys.executable, "-m", "benchmarks.memory", method, *overrides], os.environ)
        masks = max(masks, figures["masks"])
        for kind, values in found.items():
            values.setdefault(method, []).append(figures[kind])
        return figures["net"]

    in_turn_once({method: lambda method=method: child(method) for method in ("dense", "rigl")},
                 options.num_starts())  # fmt: skip
    for kind, values in found.items():
        report.compare(f"{name}, {kind}: RigL over dense", values["rigl"], values["dense"])
        allowed = [value + masks for value in values["dense"]]
        report.compare(f"{name}, {kind}: RigL over dense and masks", values["rigl"], allowed, GOAL)


def _measure(method: str, overrides: Sequence[str]) -> dict[str, float]:
    """Return bytes after some steps and an update: `whole` process, `net` of what it had before, and `masks`."""
    is_gpu = torch.cuda.is_available()
    before = 0 if is_gpu else _resident()
    work = workload.workload(method, overrides)
    work.ordinary()
    (work.update if work.updates else work.ordinary)()
    work.ordinary()
    whole = torch.cuda.max_memory_allocated() if is_gpu else _peak()
    masks = work.training.context.masks
    return {"whole": whole, "net": whole - before,
            "masks": 0 if masks is None else sum(mask.numel() for mask in masks.masks.values())}  # fmt: skip


def _peak() -> int:
    """Return the most bytes that this process ever had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _resident() -> int:
    """Return the bytes that this process has in memory now; its peak where the system does not tell."""
    table = Path("/proc/self/statm")
    return int(table.read_text().split()[1]) * resource.getpagesize() if table.exists() else _peak()


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], sys.argv[2:])))
