"""SIGTERM and SIGINT as a question the loop asks, so that a checkpoint can be written first."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class StopFlag:
    """Remembers the first signal; `number` is None until then."""

    number: int | None = None

    def __call__(self) -> bool:
        return self.number is not None

    @property
    def exit_code(self) -> int:
        return 128 + (self.number or signal.SIGTERM)

    def _set(self, number: int, _frame: object) -> None:
        self.number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once


@contextlib.contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Catch SIGTERM and SIGINT while the block runs, and give the old handlers back."""
    flag = StopFlag()
    before = {number: signal.signal(number, flag._set) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
