"""A trial's view of its run: the accuracy after each epoch, which may end it early, and the summary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prune_lab.foundations.signals import StopFlag
from prune_lab.tracking import BaseSink, RunInfo

_FIRST_JUDGED_EPOCH = 2
_FIRST_JUDGED_FRACTION = 1 / 3
"""fraction of the phase's epochs: before that, accuracy reflects the warm-up and not the end"""


class TrialWatch(BaseSink):
    """Passes the top-1 after each epoch of the last training phase to `judge`, and stops the run if it gives a reason.

    Earlier phases are shared by trials or matter little: their accuracy does not predict the end.
    """

    def __init__(self, judge: Callable[[int, float], str | None]) -> None:
        """`judge` is called with (epoch, percent) and returns why the run should stop, None if it should continue."""
        self._judge = judge
        self._phase: str | None = None
        self._epochs: float | None = None
        self._sizes: set[tuple[float | None, ...]] = set()
        self.stop = StopFlag()
        self.found: dict[str, Any] = {}
        """the run's summary"""
        self.error: str | None = None

    def start(self, info: RunInfo) -> None:
        training = [phase for phase in info.plan if phase["length"]]
        if training:
            self._phase, self._epochs = training[-1]["name"], training[-1]["epochs"]

    def log(self, record: dict[str, Any], *, replayed: bool = False) -> None:
        if record["phase"] != self._phase or record.get("eval/top1") is None:
            return
        self._sizes.add(tuple(record.get(key) for key in ("sparsity", "channels/kept")))
        reason = self._judge(record["epoch"], record["eval/top1"])
        if reason and not replayed and self._is_judged(record["epoch"]):
            self.stop.ask(reason)

    def _is_judged(self, epoch: int) -> bool:
        """Return whether stopping here may be justified, and saves any time."""
        if self._epochs is None:  # the phase starts or ends at an optimizer step
            return False
        return max(_FIRST_JUDGED_EPOCH, _FIRST_JUDGED_FRACTION * self._epochs) <= epoch < self._epochs

    @property
    def sparsity_changed(self) -> bool:
        """Whether it or the number of channels did in the last training phase: later removals decide the end."""
        return len(self._sizes) > 1

    def summary(self, summary: dict[str, Any]) -> None:
        self.found = summary

    def finish(self, status: str, error: str | None) -> None:
        self.error = error
