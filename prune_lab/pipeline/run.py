"""A run in progress: its options, its folder and its reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from prune_lab.config.run import RunConfig
from prune_lab.core.chain import PlannedPhase
from prune_lab.core.phase_result import PhaseResult
from prune_lab.foundations import distributed
from prune_lab.foundations.signals import StopFlag
from prune_lab.pipeline.executor import Executor
from prune_lab.pipeline.run_folder import RunFolder
from prune_lab.pipeline.settling import SettledRun
from prune_lab.tracking import BaseSink, Sink, Tracker
from prune_lab.training.device_config import DeviceConfig
from prune_lab.training.loop import Interrupted
from prune_lab.training.phases import Effort

Observe = Callable[[StopFlag], Sink]
"""makes a sink for one run; it receives the run's reports and may set the flag to stop it"""


@dataclass
class Run:
    """One run in progress, on every process; only the main process writes."""

    settled: SettledRun
    dataset: Any
    device_config: DeviceConfig
    tracker: Tracker
    stop: StopFlag
    tally: Counter[str]
    executor: Executor
    baseline: RunFolder | None = None
    """for a control: the folder of the method's own run"""
    observer: Sink = field(default_factory=BaseSink)
    """one of the tracker's sinks, which is also notified of a run that is already finished"""
    notes: list[str] = field(default_factory=list)
    """findings of the validation; a resumed run has none"""
    outcomes: list[dict] = field(default_factory=list)
    """figures of the finished phases, in order"""
    images_done: int = 0
    train_s: float = 0.0
    step_offset: int = 0
    macs_offset: int = 0

    @property
    def config(self) -> RunConfig:
        return self.settled.config

    @property
    def model_config(self) -> Any:
        return self.settled.model_config

    @property
    def planned(self) -> list[PlannedPhase]:
        return self.settled.planned

    @property
    def folder(self) -> RunFolder:
        return self.settled.folder

    def count(self, entry: PlannedPhase, result: PhaseResult, *, reused: bool) -> None:
        """Record a finished phase."""
        figures = result.figures | {"reused": reused}
        self.tally["reused" if reused else "trained"] += entry.trains
        self.outcomes.append(figures)
        self.step_offset += figures["steps"]
        self.macs_offset += 0 if entry.phase.repeated else figures["macs_train"]

    def spend(self, effort: Effort) -> None:
        """Record the effort of a phase in this process."""
        self.images_done += effort.steps * self.config.schedule.batch_size * self.dataset.info.units_per_row
        self.train_s += effort.train_s

    def poll(self) -> None:
        """To be called while waiting for another process."""
        self.executor.pause()
        if self.stop():
            raise Interrupted

    def poll_alone(self) -> None:
        """Like `poll`, but several processes continue together."""
        if distributed.world_size() == 1 and self.stop():
            raise Interrupted
