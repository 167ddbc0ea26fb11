"""What a phase is made from, and where it reports to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prune_lab.config.run import RunConfig
from prune_lab.core.chain import PlannedPhase
from prune_lab.core.method import Method, MethodConfig
from prune_lab.foundations import distributed
from prune_lab.foundations.checkpoint import CheckpointPair
from prune_lab.training.loop import Differentiate, Interrupted, differentiate
from prune_lab.training.numerics import Numerics


@dataclass
class Job:
    """What a phase is made from, and where it reports to."""

    config: RunConfig
    model_config: Any
    planned: PlannedPhase
    dataset: Any
    numerics: Numerics
    previous: dict[str, Any] | None
    """result of the phase before; None: the phase starts from the initial network"""
    checkpoints: CheckpointPair
    resumed: dict[str, Any] | None
    """checkpoint to go on from"""
    record: Callable[[dict], None]
    show: Callable[[int, int, str], None]
    report: Callable[[str], None]
    stop: Callable[[], bool]
    origin: dict[str, Any] | None = None
    """result of the phase's origin"""
    differentiate: Differentiate = differentiate
    """forward and backward of a micro-batch"""
    rehearsal: bool = False
    """nothing of it counts: a method does repeated work once"""

    @cached_property
    def method(self) -> Method:
        """The run's method in its active phases, plain dense training otherwise.

        A new instance for each phase: what a phase does must not depend on whether the one before ran in this process.
        """
        return fresh(self.config.method) if self.planned.phase.active else Method(MethodConfig("dense"))

    def poll(self) -> None:
        """Give up where work can be done again from what is stored; several processes go on together."""
        if distributed.world_size() == 1 and self.stop():
            raise Interrupted


def fresh(method: Method) -> Method:
    """Return a new instance of a method with its options and no state."""
    return type(method)(method.config)
