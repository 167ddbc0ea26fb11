"""SIGTERM and SIGINT as a flag that the loop polls, so that a checkpoint can be written first."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

STOPPED = 128
"""exit code of a run that the program itself stopped; codes above it mean that a signal did"""


class StopFlag:
    """Records the first signal, or the program's own request; `number` is None until a signal arrives."""

    number: int | None = None
    _asked: str | None = None

    def __call__(self) -> bool:
        return self.number is not None or self._asked is not None

    def ask(self, reason: str) -> None:
        """Stop the run as a signal would, after a checkpoint; `reason` is one line for its status."""
        self._asked = reason

    @property
    def reason(self) -> str:
        """Why the run stops, and how it is resumed; a signal takes precedence over the program's request."""
        if self.number is None and self._asked is not None:
            return self._asked
        return "stopped by a signal; the same command goes on"

    @property
    def exit_code(self) -> int:
        if self.number is None and self._asked is not None:
            return STOPPED
        return 128 + (self.number or signal.SIGTERM)

    def _set(self, number: int, _frame: object) -> None:
        self.number = number
        signal.signal(signal.SIGINT, _stop_at_once)


def _stop_at_once(_number: int, _frame: object) -> None:
    """Raise an exception after a second Ctrl-C; further ones would only interrupt its handling."""
    leave_in_peace()
    raise KeyboardInterrupt


def leave_in_peace() -> None:
    """Ignore Ctrl-C from now on: this process is about to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Catch SIGTERM and SIGINT while the block runs, then restore the old handlers."""
    flag = StopFlag()
    before = {number: signal.signal(number, flag._set) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
