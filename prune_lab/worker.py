"""One run of a sweep in a process of its own: waits for a free slot, keeps its output in a file, says how it ended."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prune_lab.config import check
from prune_lab.files import read_json, write_json, write_text
from prune_lab.overrides import plain
from prune_lab.slots import slot

INTERRUPTED = 128
"""exit codes above this mean that a signal stopped the run"""
STOP = "stop"
"""name of the file, in a sweep's folder, that holds the number of the signal that stops it"""
_LAUNCHER = "launcher.pid"


@dataclass(frozen=True)
class Outcome:
    """How one run of a sweep ended."""

    number: int
    """position in the sweep, from 0"""
    code: int
    """0: finished; above INTERRUPTED: stopped by a signal"""
    error: str = ""
    """one line, where it failed in a process of its own"""
    trained: int = 0
    """phases with training that were done; likewise `reused`"""
    reused: int = 0


def run_in_worker(node: Any) -> int:
    """Do the run that Hydra composed for this process, and leave its outcome in the sweep's folder.

    Signals are for the run alone: between runs a worker ignores them, so that it can say how its run ended.
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
            code = _run(config, tally) if free else INTERRUPTED + signal.SIGTERM
    if code > INTERRUPTED and not preempted() and os.getpid() == _pid_of_launcher(folder):
        write_text(folder / STOP, str(code - INTERRUPTED))  # the signal was for the sweep, which runs in this process
    if code > INTERRUPTED and (folder / STOP).exists():
        code = INTERRUPTED + int((folder / STOP).read_text())
    error = errors.getvalue().strip().splitlines()[-1:] if code else []
    line = error[0].removeprefix("prune-lab: error: ") if error else ""
    requeue(code)
    write_json(outcome_path(folder, number), asdict(Outcome(number, code, line, tally["trained"], tally["reused"])))
    words = "finished" if code == 0 else f"not finished (exit code {code})"
    print(f"run {number + 1}: {words}", flush=True)
    return code


def note_launcher(folder: Path) -> None:
    """Leave this process's number in the sweep's folder: a launcher may do runs in the process that started it."""
    write_text(folder / _LAUNCHER, str(os.getpid()))


def _pid_of_launcher(folder: Path) -> int:
    return int((folder / _LAUNCHER).read_text())


def log_path(folder: Path, number: int) -> Path:
    return folder / f"run-{number + 1}.log"


def outcome_path(folder: Path, number: int) -> Path:
    return folder / f"run-{number + 1}.json"


def read_outcome(folder: Path, number: int) -> Outcome | None:
    """Return what run `number` left, None if it left nothing."""
    path = outcome_path(folder, number)
    return Outcome(**read_json(path)) if path.exists() else None


def _run(config: Any, tally: Counter[str]) -> int:
    from prune_lab.sweep import run_one

    return run_one(config, tally)


@contextlib.contextmanager
def _own_output(path: Path) -> Iterator[io.StringIO]:
    """Send what the run prints to a file of its own; give its error lines to the block."""
    errors = io.StringIO()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8", buffering=1) as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(Twice(log, errors)):
            yield errors


class Twice(io.TextIOBase):
    """Writes to a file and keeps what was written."""

    def __init__(self, log: Any, kept: io.StringIO) -> None:
        self._log, self._kept = log, kept

    def write(self, text: str) -> int:
        self._log.write(text)
        return self._kept.write(text)


@contextlib.contextmanager
def _stopping_when(stopped: Callable[[], bool]) -> Iterator[None]:
    """Stop the run in the block, checkpoint first, as soon as `stopped` says so.

    A signal reaches the process that started a sweep; on a terminal its workers too, under a launcher not always.
    It is sent again until the run ends: one that comes before the run listens is lost.
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
    """Ignore SIGINT and SIGTERM outside of the run; give (was it preempted?, put a preempted job back) to the block.

    submitit's handler of SIGUSR2 (a job's time is up, or it is preempted) puts the job into the queue again and leaves
    at once. Here the run is stopped first, so that its checkpoint is of this moment.
    """
    ignored = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    handler, called = signal.getsignal(signal.SIGUSR2), []

    if callable(handler):
        signal.signal(signal.SIGUSR2, lambda number, frame: called.append((number, frame)))

    def requeue(code: int) -> None:
        if called and code > INTERRUPTED:
            handler(*called[0])

    try:
        yield lambda: bool(called), requeue
    finally:
        if callable(handler):
            signal.signal(signal.SIGUSR2, handler)
        for number, before in ignored.items():
            signal.signal(number, before)

