"""A run before it starts: its phases set up on random images, and the cost of each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prune_lab.accounting.training import planned_training_macs
from prune_lab.config.run import RunConfig
from prune_lab.core.chain import PlannedPhase, Results, resolve
from prune_lab.core.context import Context
from prune_lab.core.method import Method, build_method
from prune_lab.core.phase import Phase
from prune_lab.datasets import DatasetInfo
from prune_lab.pipeline.validation import RandomImages, set_up, task_without_files
from prune_lab.training.device_config import DeviceConfig


@dataclass
class PhasePlan:
    """A phase whose method is set up but not trained.

    `layout` and `macs` also accept the same method with another budget, without a new set-up: only the schedule decides
    which steps need dense gradients.
    """

    phase: Phase
    method: Method
    context: Context
    units_per_step: int
    """images or symbols of a batch"""

    @cached_property
    def dense_steps(self) -> list[int]:
        """Steps that need gradients of pruned weights."""
        steps = range(self.context.first_step, self.context.last_step)
        return [step for step in steps if self.method.needs_dense_gradient(step)]

    def layout(self, other: Method | None = None) -> list[tuple[int, dict[str, int]]] | None:
        """Return the layouts and the steps at which they start; None: they depend on trained weights."""
        return self._method(other).layout(self.context)

    def macs(self, other: Method | None = None) -> int | None:
        """Return the MACs the phase will spend; None: unknown."""
        if not self.phase.is_training:
            return self._method(other).phase_cost(self.context)
        layout = self.layout(other)
        if layout is None:
            return None
        return planned_training_macs(
            self.context.costs,
            layout,
            first_step=self.context.first_step,
            last_step=self.context.last_step,
            units_per_step=self.units_per_step,
            dense_steps=self.dense_steps,
        )

    def _method(self, other: Method | None) -> Method:
        return other if other is not None and self.phase.active else self.method


def plan_costs(config: RunConfig, model_config: Any, info: DatasetInfo, device_config: DeviceConfig) -> list[PhasePlan]:
    """Return the phases of a run in order, each set up on the untrained results of earlier ones.

    Raises:
        UserError: whatever a set-up rejects.
    """
    chain, images = build_method(config).chain(), RandomImages(info, device_config.torch_device)
    phases, results = [], Results(chain)
    for declared in chain:
        phase, schedule = resolve(declared, config)
        entry = PlannedPhase(phase, "", schedule, {})  # nothing is stored: no key
        task = task_without_files(config, model_config, entry, images, device_config, results)
        result, context = set_up(task)
        results.add(phase, result)
        phases.append(PhasePlan(phase, task.method, context, config.schedule.batch_size * info.units_per_row))
    return phases
