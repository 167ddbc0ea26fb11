"""The task of one phase: its inputs, and where it reports."""

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
    """One phase to run: its inputs, and where it reports."""

    config: RunConfig
    model_config: Any
    planned: PlannedPhase
    dataset: Any
    device_config: DeviceConfig
    previous: PhaseResult | None
    """result of the previous phase; None: the phase starts from the initial network"""
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
    """its results are discarded: a method does repeated work once"""

    @property
    def phase(self) -> Phase:
        return self.planned.phase

    @property
    def sizes(self) -> Sizes:
        """Sizes of the network that the data set determines."""
        return self.dataset.info.sizes

    @cached_property
    def method(self) -> Method:
        """The run's method in its active phases, plain dense training otherwise.

        Each phase has a new instance: its result must not depend on whether the previous one ran in this process.
        """
        return build_method(self.config) if self.phase.active else Method(MethodConfig("dense"))

    def poll(self) -> None:
        """Stop where stored results allow the work to be repeated; several processes continue together."""
        if distributed.world_size() == 1 and self.stop():
            raise Interrupted
