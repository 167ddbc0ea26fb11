"""Checkpoints while training continues: copied at the step, written by a thread, as often as their cost allows."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from prune_lab.foundations import distributed
from prune_lab.foundations.checkpoint import CheckpointPair

SHARE = 0.01
"""maximum fraction of the training time spent on checkpoints if their interval is `auto`"""
LEAST_S = 10.0
"""minimum seconds between two checkpoints, however cheap they are"""
MOST_S = 600.0
"""maximum seconds between two checkpoints, unless even the cheapest one so far requires more"""


def next_save_s(costs: Sequence[float], last_s: float) -> float:
    """Return when the next checkpoint is due, in seconds since training began.

    It is due when all checkpoints, including the next one, take `SHARE` of the time until then. `MOST_S` prevents one
    slow checkpoint, on a busy disk, from leaving hours of training without any.

    Args:
        costs: seconds that each checkpoint so far took from training.
        last_s: time of the last one, 0 if there is none.
    """
    if not costs:
        return last_s + LEAST_S
    affordable = (sum(costs) + fmean(costs)) / SHARE
    return max(last_s + LEAST_S, min(affordable, last_s + max(MOST_S, min(costs) / SHARE)))


def snapshot(value: Any) -> Any:
    """Return a copy of nested dicts, lists and tuples in which every tensor is a new one in host memory.

    Copies from a GPU use page-locked memory and may be unfinished when this returns: synchronise before reading.
    """
    if isinstance(value, Tensor):
        if value.device.type != "cuda":
            return value.detach().to("cpu", copy=True)
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        return {key: snapshot(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(snapshot(entry) for entry in value)
    return value


class Saves:
    """The checkpoints of one training phase.

    At most one is being written. A save that comes meanwhile waits: skipping it could lose the state at a stop, and
    two copies would take twice the memory. The wait counts as cost, so that `auto` saves less often.
    """

    def __init__(
        self,
        pair: CheckpointPair,
        interval_s: float | Literal["auto"],
        device: torch.device,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.costs: list[float] = []
        self._pair, self._interval_s, self._device, self._clock = pair, interval_s, device, clock
        self._began, self._last_s = clock(), 0.0
        self._plan()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[float] | None = None

    def due(self) -> bool:
        """Return whether a checkpoint is due, which the main process decides.

        Raises:
            SaveError: the disk refused the one before.
        """
        if self._writing is not None and self._writing.done():
            self.wait()
        return distributed.is_main() and self._clock() - self._began >= self._due_s

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Record the block's time as the cost of a checkpoint, without steps that a GPU has yet to finish."""
        self._synchronize()
        started = self._clock()
        yield
        self._last_s = self._clock() - self._began
        self.costs.append(self._clock() - started)
        self._plan()

    def save(self, state: dict[str, Any]) -> None:
        """Copy `state`, which may change afterwards, and begin to write it, on the main process.

        Raises:
            SaveError: the disk refused the one before.
        """
        if not distributed.is_main():
            return
        self.wait()
        copied = snapshot(state)
        self._synchronize()
        self._writing = self._thread.submit(self._write, copied)

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            SaveError: the disk refused; existing checkpoints are as before.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            seconds = writing.result()
            if self.costs:  # the thread took a core or the interpreter from training
                self.costs[-1] += seconds
                self._plan()

    def close(self) -> None:
        """Wait as `wait` does, without its error; to be called however training ends."""
        self._thread.shutdown()

    def last_good(self) -> Path | None:
        """Wait for writing to finish and return the newest checkpoint; to be called when training ends."""
        self.close()
        return self._pair.last_good()

    def _write(self, state: dict[str, Any]) -> float:
        """Write the checkpoint and return the CPU seconds that this took."""
        started = time.thread_time()
        self._pair.save(state)
        return time.thread_time() - started

    def _plan(self) -> None:
        if self._interval_s == "auto":
            self._due_s = next_save_s(self.costs, self._last_s)
        else:
            self._due_s = self._last_s + self._interval_s

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
