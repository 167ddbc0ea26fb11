"""A run before it starts: its phases set up on random images, and what each of them will cost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prune_lab.accounting.training import planned_training_macs
from prune_lab.config.run import RunConfig
from prune_lab.core.chain import PlannedPhase, Results, in_force
from prune_lab.core.context import Context
from prune_lab.core.method import Method
from prune_lab.core.phase import Phase
from prune_lab.datasets import DatasetInfo
from prune_lab.pipeline.rehearsal import RandomImages, job_without_files, set_up
from prune_lab.training.numerics import Numerics


@dataclass
class PhaseOutlook:
    """A phase with its method set up, nothing trained yet.

    `layout` and `macs` also answer for the same method with another budget, which is not set up again: which steps need
    dense gradients depends on the schedule.
    """

    phase: Phase
    method: Method
    context: Context
    batch_size: int

    @cached_property
    def dense_steps(self) -> list[int]:
        """Steps that need gradients of pruned weights."""
        steps = range(self.context.first_step, self.context.last_step)
        return [step for step in steps if self.method.needs_dense_gradient(step)]

    def layout(self, other: Method | None = None) -> list[tuple[int, dict[str, int]]] | None:
        """Return what will be in force from which step on; None: it depends on trained weights."""
        return self._method(other).layout(self.context)

    def macs(self, other: Method | None = None) -> int | None:
        """Return the MACs the phase will spend; None: unknown."""
        if self.phase.hook != "train":
            return self._method(other).phase_cost(self.context)
        layout = self.layout(other)
        if layout is None:
            return None
        steps = {"first_step": self.context.first_step, "last_step": self.context.last_step,
                 "dense_steps": self.dense_steps}
        return planned_training_macs(self.context.costs, layout, batch_size=self.batch_size, **steps)

    def _method(self, other: Method | None) -> Method:
        return other if other is not None and self.phase.active else self.method


def outlook(config: RunConfig, model_config: Any, info: DatasetInfo, arithmetic: Numerics) -> list[PhaseOutlook]:
    """Return the phases of a run in order, each set up on what the ones before left without training.

    Raises:
        ConfigError: whatever a set-up refuses.
    """
    chain, images = config.method.chain(), RandomImages(info, arithmetic.torch_device)
    phases, results = [], Results(chain)
    for declared in chain:
        phase, schedule = in_force(declared, config)
        entry = PlannedPhase(phase, "", schedule, {})  # nothing is stored: no key
        job = job_without_files(config, model_config, entry, images, arithmetic, results)
        result, context = set_up(job)
        results.add(phase, result)
        phases.append(PhaseOutlook(phase, job.method, context, config.schedule.batch_size))
    return phases
