"""A run at work: its options, its folder and what it reports to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from prune_lab.config.run import RunConfig
from prune_lab.core import chain
from prune_lab.foundations import distributed
from prune_lab.foundations.signals import StopFlag
from prune_lab.pipeline import run_folder
from prune_lab.pipeline.host import Host
from prune_lab.tracking import BaseSink, Sink, Tracker
from prune_lab.training.loop import Interrupted
from prune_lab.training.numerics import Numerics

Observe = Callable[[StopFlag], Sink]
"""makes a sink for one run; it sees what the run reports and may ask the flag to stop it"""


@dataclass
class Run:
    """One run while it is under way, on every process alike; only the main process writes."""

    config: RunConfig
    model_config: Any
    dataset: Any
    numerics: Numerics
    planned: list[chain.PlannedPhase]
    folder: run_folder.RunFolder
    tracker: Tracker
    stop: StopFlag
    tally: Counter[str]
    host: Host
    own: run_folder.RunFolder | None = None
    """a control: where the method's own run is"""
    observer: Sink = field(default_factory=BaseSink)
    """one of the tracker's sinks, which also hears of a run that is done already"""
    notes: list[str] = field(default_factory=list)
    """what the rehearsal found out; a run that goes on has none"""
    outcomes: list[dict] = field(default_factory=list)
    images_done: int = 0
    train_s: float = 0.0
    step_offset: int = 0
    macs_offset: int = 0

    def poll(self) -> None:
        """To be called while waiting for another process."""
        self.host.pause()
        if self.stop():
            raise Interrupted

    def poll_alone(self) -> None:
        """Like `poll`, but several processes go on together."""
        if distributed.world_size() == 1 and self.stop():
            raise Interrupted
