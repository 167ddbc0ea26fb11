"""Obtains a phase of a run: reused if stored, resumed from its checkpoint, or run now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prune_lab.core.chain import PlannedPhase, Results
from prune_lab.core.phase_result import PhaseResult
from prune_lab.foundations import distributed
from prune_lab.pipeline.run import Run
from prune_lab.pipeline.store import PhaseStore
from prune_lab.training.phases import perform
from prune_lab.training.task import PhaseTask


def obtain(run: Run, planned: PlannedPhase, done: Results) -> tuple[PhaseResult, bool]:
    """Return the result of a phase, stored or computed by the process that holds its lock, and whether it was stored.

    Args:
        done: results of earlier phases.
    """
    store = PhaseStore(Path(run.config.output_dir), planned.key, run.tracker.message)
    if not distributed.is_main():
        return _obtain_locked(run, planned, done, store)
    with store.lock(what=f"phase {planned.phase.name} ({planned.key[:8]})", poll=run.poll):
        return _obtain_locked(run, planned, done, store)


def _obtain_locked(run: Run, planned: PlannedPhase, done: Results, store: PhaseStore) -> tuple[PhaseResult, bool]:
    result = distributed.on_main(store.load)
    if result is not None:
        distributed.on_main(lambda: _replay(run, store.records()))
        run.tracker.message(f"phase {planned.phase.name}: reused ({planned.key[:8]})")
        return result, True
    resumed = distributed.on_main(store.checkpoints.load)
    distributed.on_main(lambda: _replay(run, store.begin(resumed["progress"]["epoch"] if resumed else -1)))
    if resumed:
        run.tracker.message(f"phase {planned.phase.name}: resumed at step {resumed['progress']['step']}")
    result, effort = perform(_task(run, planned, done, store, resumed))
    run.spend(effort)
    distributed.on_main(lambda: store.finish(result, planned.inputs))
    return result, False


def _replay(run: Run, records: list[dict[str, Any]]) -> None:
    for record in records:
        run.tracker.log(_absolute(run, record), replayed=True)


def _task(run: Run, planned: PlannedPhase, done: Results, store: PhaseStore, resumed: dict | None) -> PhaseTask:
    def record(row: dict) -> None:
        if distributed.is_main():
            store.append(row)
            run.tracker.log(_absolute(run, row))

    return PhaseTask(
        config=run.config,
        model_config=run.model_config,
        planned=planned,
        dataset=run.dataset,
        device_config=run.device_config,
        previous=done.before(planned.phase),
        origin=done.origin(planned.phase),
        checkpoints=store.checkpoints,
        resumed=resumed,
        record=record,
        show=run.tracker.progress,
        report=run.tracker.message,
        stop=run.stop,
        differentiate=run.executor.differentiate,
    )


def _absolute(run: Run, row: dict) -> dict:
    """Return a phase's record with steps and MACs counted over the whole run."""
    row = dict(row)
    row["global_step"] = row.pop("step") + run.step_offset
    row["macs/train"] = row["macs/train"] + run.macs_offset
    first = ("phase", "epoch", "global_step")
    return {key: row[key] for key in first} | {key: value for key, value in row.items() if key not in first}
