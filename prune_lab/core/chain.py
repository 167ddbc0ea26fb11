"""The phases of a run in order: the position of each in the schedule, and its starting point. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from prune_lab.config.run import RunConfig
from prune_lab.config.schedule import PhaseSchedule
from prune_lab.core.phase import Phase
from prune_lab.core.phase_result import PhaseResult


@dataclass(frozen=True)
class PlannedPhase:
    phase: Phase
    """`begin` and `end` are positions in `schedule`"""
    key: str
    schedule: PhaseSchedule | None
    """with the multiplier applied"""
    inputs: dict[str, Any]

    @property
    def epochs(self) -> float | None:
        """Epochs of training; None for a phase that starts or ends at an optimizer step."""
        if self.schedule is None:
            return 0
        begin, end = self.phase.begin, self.phase.end
        if any(place and place.unit == "it" and place.count for place in (begin, end)):
            return None
        length = (end.count if end else self.schedule.epochs) - (begin.count if begin else 0)
        return int(length) if length == int(length) else length

    @property
    def trains(self) -> bool:
        """Whether the phase takes optimizer steps."""
        return self.schedule is not None and self.epochs != 0

    @property
    def length(self) -> str:
        """The length of the training as text, empty for a phase without training."""
        if self.schedule is None or self.epochs == 0:
            return ""
        if self.epochs is not None:
            return f"{self.epochs:g} epochs" if self.epochs != 1 else "1 epoch"
        if self.phase.end is not None:
            return f"to {self.phase.end.count}it"
        assert self.phase.begin is not None  # otherwise its length is a number of epochs
        return f"from {self.phase.begin.count}it to {self.schedule.epochs}ep"


class Results:
    """Results of a chain's phases, as far as later ones start from them."""

    def __init__(self, phases: Iterable[Phase]) -> None:
        self._origins = {phase.origin for phase in phases}
        self._kept: dict[str | None, PhaseResult] = {}
        self._last: PhaseResult | None = None

    def add(self, phase: Phase, result: PhaseResult) -> None:
        self._last = result
        if phase.name in self._origins:
            self._kept[phase.name] = result

    def before(self, phase: Phase) -> PhaseResult | None:
        """Return the result that `phase` starts from, None if it starts from the initial network."""
        return None if phase.fresh else self._last

    def origin(self, phase: Phase) -> PhaseResult | None:
        """Return the result of the phase's origin, None if it has none."""
        return self._kept.get(phase.origin)


def resolve(phase: Phase, config: RunConfig) -> tuple[Phase, PhaseSchedule | None]:
    """Return a phase and its schedule with the schedule's multiplier applied to both."""
    if phase.schedule is None:
        return phase, None
    factor = config.schedule.multiplier
    begin, end = (place.stretched(factor) if place else None for place in (phase.begin, phase.end))
    return replace(phase, begin=begin, end=end), config.schedule.phase(phase.schedule)
