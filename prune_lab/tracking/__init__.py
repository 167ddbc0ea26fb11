"""Tracking: local JSON files first, then log.txt, the console and W&B. Imports neither torch nor wandb."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prune_lab.tracking.background import Background
from prune_lab.tracking.base import BaseSink, RunInfo, Sink, Tracker
from prune_lab.tracking.console import LogFile, console
from prune_lab.tracking.jsonl import JsonFiles
from prune_lab.tracking.wandb_key import resolve_mode
from prune_lab.tracking.wandb_sink import WandbSink

if TYPE_CHECKING:
    from prune_lab.config.logger import LoggerConfig

__all__ = ["BaseSink", "RunInfo", "Sink", "Tracker", "open_tracker"]

_INIT_TIMEOUT_S = 30.0
_FINISH_TIMEOUT_S = 20.0


def open_tracker(
    logger: LoggerConfig | None = None,
    *,
    init_timeout_s: float = _INIT_TIMEOUT_S,
    finish_timeout_s: float = _FINISH_TIMEOUT_S,
) -> Tracker:
    """Return a tracker with every sink of a run, for its main process; other processes use an empty `Tracker()`.

    Args:
        logger: options of the W&B copy; None: no copy. The caller puts its tags into `RunInfo.tags`.
        init_timeout_s: maximum time W&B may take to start; nothing waits for it.
        finish_timeout_s: maximum time that the end of the run waits for data not yet sent to W&B.

    Raises:
        UserError: logger.wandb=online without a key.
    """
    tracker = Tracker([JsonFiles(), LogFile(), console()])
    if logger is None or (mode := resolve_mode(logger.wandb)) == "disabled":
        return tracker
    sink = WandbSink(
        mode=mode,
        project=logger.project,
        entity=logger.entity,
        report=lambda text: copy.notice(text),
        init_timeout_s=init_timeout_s,
        finish_timeout_s=finish_timeout_s,
    )
    copy = Background(sink, report=tracker.message, finish_timeout_s=finish_timeout_s + 5)
    tracker.add_copy(copy)
    return tracker
