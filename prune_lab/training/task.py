"""The task of one phase: what it is made from, and where it reports to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prune_lab.config.run import RunConfig
from prune_lab.core.chain import PlannedPhase
from prune_lab.core.method import Method, MethodConfig, build_method
from prune_lab.core.phase import Phase
from prune_lab.core.phase_result import PhaseResult
from prune_lab.datasets.base import Sizes
from prune_lab.foundations import distributed
from prune_lab.foundations.checkpoint import CheckpointPair
from prune_lab.training.device_config import DeviceConfig
from prune_lab.training.loop import Differentiate, Interrupted, differentiate


@dataclass
class PhaseTask:
    """One phase to be done: what it is made from, and where it reports to."""

    config: RunConfig
    model_config: Any
    planned: PlannedPhase
    dataset: Any
    device_config: DeviceConfig
    previous: PhaseResult | None
    """result of the phase before; None: the phase starts from the initial network"""
    checkpoints: CheckpointPair
    resumed: dict[str, Any] | None
    """checkpoint to resume from"""
    record: Callable[[dict], None]
    show: Callable[[int, int, str], None]
    report: Callable[[str], None]
    stop: Callable[[], bool]
    origin: PhaseResult | None = None
    """result of the phase's origin"""
    differentiate: Differentiate = differentiate
    """forward and backward of a micro-batch"""
    validating: bool = False
    """nothing of it counts: a method does repeated work once"""

    @property
    def phase(self) -> Phase:
        return self.planned.phase

    @property
    def sizes(self) -> Sizes:
        """What the data set decides about the network."""
        return self.dataset.info.sizes

    @cached_property
    def method(self) -> Method:
        """The run's method in its active phases, plain dense training otherwise.

        A new instance for each phase: what a phase does must not depend on whether the one before ran in this process.
        """
        return build_method(self.config) if self.phase.active else Method(MethodConfig("dense"))

    def poll(self) -> None:
        """Give up where work can be done again from what is stored; several processes continue together."""
        if distributed.world_size() == 1 and self.stop():
            raise Interrupted
