"""Worker processes that answer requests in order and live as long as the data set that uses them."""

from __future__ import annotations

import atexit
import os
import signal
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch

from prune_lab.foundations import locks

_GRACE_S = 20
"""seconds that a worker continues after a termination signal"""


def num_usable_cores() -> int:
    """Return the number of cores this process may use; processes started by torchrun on this machine share them."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, num_cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class WorkerPool:
    """Answers requests ahead of their use, two per worker.

    Args:
        answer: called in a worker with one request; an exception ends the iteration with a traceback.
        workers: processes, at most one per core; 0: answers are computed in this process when they are needed.
        pin_memory: put tensors of the answers into pinned memory, which a GPU can read directly.
    """

    def __init__(self, answer: Callable[[Any], Any], *, workers: int, pin_memory: bool = False) -> None:
        self._answer = answer
        self._num_workers, self._pin_memory = min(workers, num_usable_cores()), pin_memory
        self._kept = self._loader(keep=True)
        self._is_busy = False
        self._running: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()
        # At exit Python sends the workers a signal, which they leave to the training process: end them before that.
        atexit.register(_close, weakref.ref(self))

    def map(self, requests: Sequence[Any]) -> Generator[Any, None, None]:
        """Return the answers to `requests`, in order.

        The workers start with the first request and stay for later calls. An iteration that begins before another one
        has ended gets its own workers.
        """
        answers = self._answers(requests)
        self._running.add(answers)
        return answers

    def close(self) -> None:
        """End the workers and every iteration; a later `map` starts others."""
        for answers in list(self._running):
            answers.close()
        self._kept = self._loader(keep=True)

    def _answers(self, requests: Sequence[Any]) -> Generator[Any, None, None]:
        if not requests:
            return
        if self._is_busy:
            yield from _iterate(self._loader(keep=False), requests)
            return
        self._is_busy = True
        try:
            yield from _iterate(self._kept, requests)
        finally:
            self._is_busy = False

    def _loader(self, *, keep: bool) -> _Loader:
        return _Loader(
            _Answers(self._answer),
            batch_sampler=_Requests(),
            collate_fn=_unchanged,
            worker_init_fn=_leave_to_the_training,
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
            persistent_workers=keep and self._num_workers > 0,
            generator=torch.Generator(),  # every loader draws a number, which would advance torch's global generator
        )


class _Requests:
    """Stands in for a loader's batches of indices; replaced for every iteration."""

    def __init__(self) -> None:
        self.current: Sequence[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.current)


class _Loader(torch.utils.data.DataLoader[Any]):
    batch_sampler: _Requests


class _Answers(torch.utils.data.Dataset[Any]):
    def __init__(self, answer: Callable[[Any], Any]) -> None:
        self._answer = answer

    def __getitems__(self, request: Any) -> Any:
        return self._answer(request)


def _iterate(loader: _Loader, requests: Sequence[Any]) -> Iterator[Any]:
    loader.batch_sampler.current = requests
    yield from loader


def _unchanged(answer: Any) -> Any:
    return answer


def _close(pool: weakref.ref[WorkerPool]) -> None:
    alive = pool()
    if alive is not None:
        alive.close()


def _leave_to_the_training(_worker: int) -> None:
    """Drop the training process's locks, and continue when all processes of a job receive a signal.

    The training process may need more answers to end cleanly.

    Workers end when their pool is closed and soon after the process that started them dies. The alarm covers a signal
    meant for the worker itself.
    """
    locks.leave_to_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_S))
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
