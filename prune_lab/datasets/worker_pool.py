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
"""seconds that a worker works on after a signal to end"""


def num_usable_cores() -> int:
    """Return the cores that this process may use; processes that torchrun started on this machine share them."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, num_cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class WorkerPool:
    """Answers requests ahead of their use, two per worker.

    Args:
        answer: called in a worker with one request; what it raises ends the iteration with a traceback.
        workers: processes, at most one per core; 0: answers are made in this process when they are needed.
        pin_memory: put tensors of the answers where a GPU can fetch them by itself.
    """

    def __init__(self, answer: Callable[[Any], Any], *, workers: int, pin_memory: bool = False) -> None:
        self._answer = answer
        self._num_workers, self._pin_memory = min(workers, num_usable_cores()), pin_memory
        self._kept = self._loader(keep=True)
        self._is_busy = False
        self._running: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()
        # At exit Python ends the workers by a signal, which they leave to the training: they are to be gone before.
        atexit.register(_close, weakref.ref(self))

    def map(self, requests: Sequence[Any]) -> Generator[Any, None, None]:
        """Return the answers to `requests`, in order.

        The workers start with the first request and stay for later calls. An iteration that begins before another one
        has ended gets workers of its own.
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
            generator=torch.Generator(),  # every loader draws a number, which would move torch's global generator
        )


class _Requests:
    """What a loader takes for batches of indices; other ones for every iteration."""

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
    """Hold no locks of the training process, and continue when all processes of a job get a signal.

    The training process may need more answers to end well.

    Workers end when their pool is closed and soon after the death of the process that started them; the alarm is for
    the case that a worker itself was meant.
    """
    locks.leave_to_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_S))
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
