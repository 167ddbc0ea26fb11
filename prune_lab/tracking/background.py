"""Runs a sink on its own thread, so that a slow or silent server never blocks training."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from prune_lab.tracking.base import BaseSink, RunInfo


class Background(BaseSink):
    """Passes calls to `sink` in order, on a thread; only `finish` waits, and only for a bounded time.

    The first error ends the thread and is raised by the next call here. Messages of the sink are also shown by the
    next call here, so that all output comes from the caller's thread.
    """

    def __init__(self, sink: BaseSink, *, report: Callable[[str], None], finish_timeout_s: float) -> None:
        self.label = sink.label
        self._sink = sink
        self._report = report
        self._finish_timeout_s = finish_timeout_s
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._notices: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def notice(self, text: str) -> None:
        """Keep a line from the sink until the caller's thread shows it."""
        self._notices.put(text)

    def start(self, info: RunInfo) -> None:
        self._thread = threading.Thread(target=self._work, name=f"{self.label} copy", daemon=True)
        self._thread.start()
        self._put(lambda: self._sink.start(info))

    def log(self, record: dict[str, Any], *, replayed: bool = False) -> None:
        self._put(lambda: self._sink.log(record, replayed=replayed))

    def layers(self, rows: list[dict[str, Any]]) -> None:
        self._put(lambda: self._sink.layers(rows))

    def summary(self, summary: dict[str, Any]) -> None:
        self._put(lambda: self._sink.summary(summary))

    def finish(self, status: str, error: str | None) -> None:
        """Wait for the thread.

        Raises:
            TimeoutError: it has not ended in time.
        """
        if self._thread is None:
            return
        self._put(lambda: self._sink.finish(status, error))
        self._calls.put(None)
        self._thread.join(self._finish_timeout_s)
        self._surface()
        if self._thread.is_alive():
            raise TimeoutError(f"not everything was sent within {self._finish_timeout_s:g} s")
        self._thread = None

    def _put(self, call: Callable[[], None]) -> None:
        self._surface()
        self._calls.put(call)

    def _surface(self) -> None:
        """Pass the thread's messages to the caller's thread."""
        while not self._notices.empty():
            self._report(self._notices.get())
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:  # raised again on the caller's thread
                self._error = error
                return
