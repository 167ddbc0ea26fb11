"""What a trial hears of its run: the accuracy after each epoch, which may end it early, and the summary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prune_lab.signals import StopFlag
from prune_lab.tracking import BaseSink, RunInfo


class TrialWatch(BaseSink):
    """Hands the top-1 after each epoch of the last training phase to `judge`, and asks the run to stop if that says so.

    The phases before are shared by trials or decide little: what they reach tells nothing about the end.
    """

    def __init__(self, judge: Callable[[int, float], str | None]) -> None:
        """`judge` gets (epoch, percent) and returns why the run is not worth going on, None if it is."""
        self._judge = judge
        self._phase: str | None = None
        self._epochs = 0
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
        reason = self._judge(record["epoch"], record["eval/top1"])
        if reason and not replayed and record["epoch"] < self._epochs:  # stopping after the last epoch saves nothing
            self.stop.ask(reason)

    def summary(self, summary: dict[str, Any]) -> None:
        self.found = summary

    def finish(self, status: str, error: str | None) -> None:
        self.error = error
