"""Number format, memory layout, compilation and threads of a dense step, each over fp32, contiguous, eager."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import torch

from benchmarks import workload
from benchmarks.report import Report
from benchmarks.timing import in_turn, in_turn_once
from benchmarks.workload import Options
from prune_lab.foundations.errors import UserError

_BASE = "fp32, contiguous"


def run(options: Options, report: Report) -> None:
    _formats(options, report, compiled=False)
    _threads(options, report)


def compiled(options: Options, report: Report) -> None:
    """Compare compiled steps with eager ones; compiling is not part of the times."""
    _formats(options, report, compiled=True)


def _formats(options: Options, report: Report, *, compiled: bool) -> None:
    works, compilers = {}, {"": "false"}
    if compiled:
        compilers[", compiled"] = "true"
    if compiled and torch.cuda.is_available():
        compilers[", CUDA graphs"] = "graphs"
    for precision in ("fp32", "bf16"):
        for layout, channels_last in (("contiguous", "false"), ("channels_last", "true")):
            for suffix, compiler in compilers.items():
                chosen = {"precision": precision, "channels_last": channels_last, "compile": compiler}
                typed = [f"trainer.{key}={value}" for key, value in chosen.items()]
                overrides = tuple(dict.fromkeys((*options.over(*workload.SMALL), *typed)))
                try:
                    works[f"{precision}, {layout}{suffix}"] = workload.workload("dense", overrides)
                except UserError as error:
                    report.note(f"{precision}: not measured: {error}")
    first = next(iter(works.values()))
    times = in_turn({name: work.ordinary for name, work in works.items()}, options.plan(40, 60), first.device)
    for name, work in works.items():
        work.check()
        if name != _BASE:
            report.compare(f"speed of {name} over {_BASE}", times[_BASE], times[name])


def _threads(options: Options, report: Report) -> None:
    """Compare numbers of threads, each in a process of its own: torch fixes some at the first work it does."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = sorted({2**power for power in range(cores.bit_length()) if 2**power <= cores} | {cores})
    if len(counts) == 1:
        report.note("threads: not measured: there is one core")
        return
    overrides = options.over(*workload.SMALL)
    children = {count: _Child(count, overrides) for count in counts}
    try:
        calls = {str(count): child.step for count, child in children.items()}
        in_turn_once(calls, 3)  # warm-up
        times = in_turn_once(calls, options.plan(40, 60).rounds)
    finally:
        for child in children.values():
            child.close()
    for count in counts[1:]:
        report.compare(f"speed of {count} threads over one", times["1"], times[str(count)])


class _Child:
    """A process with its own number of threads that takes a step whenever it is asked to."""

    def __init__(self, threads: int, overrides: tuple[str, ...]) -> None:
        command = [sys.executable, "-m", "benchmarks.formats", *overrides, f"trainer.threads={threads}"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE)  # fmt: skip

    def step(self) -> float:
        """Return the seconds of one step.

        Raises:
            RuntimeError: the process ended.
        """
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("a process that measures threads ended; its reason is above")
        return float(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def _serve(overrides: list[str]) -> None:
    """Take a step for each line that comes in and print its seconds."""
    work = workload.workload("dense", overrides)
    for _ in sys.stdin:
        begin = time.perf_counter()
        work.ordinary()
        print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1:])
