"""One run of a sweep in its own process: waits for a free slot, logs to a file, reports its outcome."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

from prune_lab.compose.check import check
from prune_lab.compose.overrides import plain
from prune_lab.foundations.files import write_json, write_text
from prune_lab.foundations.signals import STOPPED
from prune_lab.launch.outcome import STOP, Outcome, Twice, log_path, outcome_path
from prune_lab.launch.slots import slot

_LAUNCHER = "launcher.pid"


def run_in_worker(node: Any) -> int:
    """Carry out the run that Hydra composed for this process, and write its outcome to the sweep's folder.

    Signals affect only the run: between runs a worker ignores them, so that it can report the outcome.
    """
    from hydra.core.hydra_config import HydraConfig

    job = HydraConfig.get()
    folder, number = Path(job.sweep.dir), int(job.job.num)
    config = replace(check(plain(node)), overrides=tuple(job.overrides.task))
    tally: Counter[str] = Counter()
    with _own_signals() as (preempted, requeue), _own_output(log_path(folder, number)) as errors:

        def stopped() -> bool:
            return preempted() or (folder / STOP).exists()

        with _stopping_when(stopped), slot(stopped) as free:
            code = _run(config, tally) if free else STOPPED + signal.SIGTERM
    if code > STOPPED and not preempted() and os.getpid() == _pid_of_launcher(folder):
        write_text(folder / STOP, str(code - STOPPED))  # the signal was for the sweep, which runs in this process
    if code > STOPPED and (folder / STOP).exists():
        code = STOPPED + int((folder / STOP).read_text())
    error = errors.getvalue().strip().splitlines()[-1:] if code else []
    line = error[0].removeprefix("prune-lab: error: ") if error else ""
    requeue(code)
    write_json(outcome_path(folder, number), asdict(Outcome(number, code, line, tally["trained"], tally["reused"])))
    words = "finished" if code == 0 else f"not finished (exit code {code})"
    print(f"run {number + 1}: {words}", flush=True)
    return code


def note_launcher(folder: Path) -> None:
    """Write this process's number to the sweep's folder: a launcher may use the process that started it."""
    write_text(folder / _LAUNCHER, str(os.getpid()))


def _pid_of_launcher(folder: Path) -> int:
    return int((folder / _LAUNCHER).read_text())


def _run(config: Any, tally: Counter[str]) -> int:
    from prune_lab.launch.run_one import run_one

    return run_one(config, tally)


@contextlib.contextmanager
def _own_output(path: Path) -> Iterator[io.StringIO]:
    """Redirect the run's output to its own file; yield its error lines to the block."""
    errors = io.StringIO()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8", buffering=1) as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(Twice(log, errors)):
            yield errors


@contextlib.contextmanager
def _stopping_when(stopped: Callable[[], bool]) -> Iterator[None]:
    """Stop the run in the block, checkpoint first, as soon as `stopped` is set.

    A signal reaches the process that started a sweep; on a terminal also its workers, but under a launcher not always.
    It is sent repeatedly until the run ends: one that arrives before the run listens is lost.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            if stopped():
                os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


@contextlib.contextmanager
def _own_signals() -> Iterator[tuple[Callable[[], bool], Callable[[int], None]]]:
    """Ignore SIGINT and SIGTERM outside the run; yield (was it preempted?, requeue a preempted job) to the block.

    submitit's handler of SIGUSR2 (a job's time is up, or it is preempted) requeues the job and exits at once. Here the
    run is stopped first, so that its checkpoint is up to date.
    """
    ignored = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    handler = signal.getsignal(signal.SIGUSR2)
    called: list[tuple[int, FrameType | None]] = []

    if callable(handler):
        signal.signal(signal.SIGUSR2, lambda number, frame: called.append((number, frame)))

    def requeue(code: int) -> None:
        if called and code > STOPPED and callable(handler):
            handler(*called[0])

    try:
        yield lambda: bool(called), requeue
    finally:
        if callable(handler):
            signal.signal(signal.SIGUSR2, handler)
        for number, before in ignored.items():
            signal.signal(number, before)

