"""Tracking: local JSON files first, then the console, log.txt and W&B. Imports neither torch nor wandb."""

from __future__ import annotations

from prune_lab.tracking.base import BaseSink, RunInfo, Sink, Tracker
from prune_lab.tracking.console import LogFile, console
from prune_lab.tracking.jsonl import JsonFiles

__all__ = ["BaseSink", "RunInfo", "Sink", "Tracker", "open_tracker"]


def open_tracker() -> Tracker:
    """Return a tracker with every sink of a run on its main process; other processes use an empty `Tracker()`."""
    return Tracker([JsonFiles(), LogFile(), console()])
