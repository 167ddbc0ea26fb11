"""From checked options to a finished run: plan the phases, reuse, resume or do each, leave the results."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from prune_lab import datasets
from prune_lab.accounting import targets
from prune_lab.config.run import RunConfig
from prune_lab.core import chain
from prune_lab.datasets import BatchFormat
from prune_lab.foundations import distributed
from prune_lab.foundations.failure import lost_decoder
from prune_lab.foundations.files import SaveError
from prune_lab.foundations.schema import ConfigError
from prune_lab.pipeline import control_runs, identity, matching, results, run_folder
from prune_lab.pipeline import summary as pipeline_summary
from prune_lab.pipeline.host import Host
from prune_lab.pipeline.rehearsal import rehearse
from prune_lab.pipeline.run import Observe, Run
from prune_lab.pipeline.settling import settled
from prune_lab.pipeline.store import PhaseStore, lock
from prune_lab.tracking.lines import summary_lines
from prune_lab.training import numerics
from prune_lab.training.job import Job
from prune_lab.training.loop import Interrupted, NonFiniteLoss
from prune_lab.training.numerics import Numerics
from prune_lab.training.phases import dense_note, perform


def run(
    *configs: RunConfig, tally: Counter[str] | None = None, observe: Observe | None = None, host: Host | None = None
) -> int:
    """Carry out runs on the same device in turn, up to the first that does not finish, and return the exit code.

    0: all are finished, 1: one failed, 128: its observer stopped one, 128 + signal: one was interrupted.

    Args:
        tally: counts the runs' phases with training as "trained" now or "reused".
        observe: called once per run.
        host: what the runs share with others in this process; None: nothing.

    Raises:
        ConfigError: wrong options or data, before the run directory is touched.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    host = host or Host()
    arithmetic = replace(numerics.resolve(configs[0].trainer, local_rank=local_rank), vectorised=host.vectorised)
    distributed.start(arithmetic.torch_device)
    try:
        tally = Counter() if tally is None else tally
        codes = (_run(config, arithmetic, tally, observe, host) for config in configs)
        return next((code for code in codes if code), 0)
    finally:
        distributed.stop()


def _run(
    config: RunConfig, arithmetic: Numerics, tally: Counter[str], observe: Observe | None, host: Host
) -> int:
    info = datasets.describe(config.dataset)
    config = settled(config, info)
    sizes = {"num_classes": info.num_classes, "image_size": info.image_size}
    model_config = config.method.adapt_model(config.model, **sizes)
    # fp32 images on every device: autocast rounds them where it pays, exact evaluation needs them unrounded.
    fmt = BatchFormat(arithmetic.torch_device, torch.float32, arithmetic.channels_last)
    dataset = host.load(config.dataset, fmt)
    inputs = {"model": model_config, "numerics": arithmetic.identity(), "world_size": distributed.world_size()}

    def settle(options: RunConfig) -> tuple[RunConfig, run_folder.RunFolder]:
        solved = matching.matched(options, model_config, dataset.info, arithmetic)
        data = {"fingerprint": dataset.fingerprint, "content": dataset.content}
        return solved, run_folder.RunFolder.of(solved, **data, **inputs)

    own = control_runs.own_run(config)
    own_folder = None if own is None else settle(own)[1]
    config, folder = settle(config)
    planned, notes = identity.plan(config, fingerprint=dataset.fingerprint, **inputs), []
    if distributed.share(not (folder.directory / "run.json").exists() if distributed.is_main() else None):
        with matching.naming_reference(config):
            notes = rehearse(config, model_config, planned, dataset, arithmetic)
    with host.stop_flag() as stop:
        tracker = folder.tracker(config)
        run = Run(config, model_config, dataset, arithmetic, planned, folder, tracker, stop, tally, host, own_folder)
        run.notes = notes
        if observe and distributed.is_main():
            run.observer = observe(stop)
            tracker.add_local(run.observer)
        try:
            if not distributed.is_main():
                return _guarded(run)
            path = folder.directory / ".lock"
            with lock(path, what=str(folder.directory), report=run.tracker.message, poll=run.poll):
                return _guarded(run)
        except Interrupted:
            return stop.exit_code
        finally:
            host.close(dataset)


def _guarded(run: Run) -> int:
    """Do the run and turn every way it can end into a status, one line and an exit code."""
    done = distributed.share(run.folder.finished() if distributed.is_main() else None)
    if done is not None:
        run.tracker.message(f"done already: {run.folder.directory}")
        run.tally["reused"] += sum(entry.trains for entry in run.planned)
        _show(run, done)
        run.observer.summary(done)
        return 0
    try:
        return _carry_out(run)
    except (Interrupted, KeyboardInterrupt):
        return _end(run, "interrupted", run.stop.reason, code=run.stop.exit_code)
    except (ConfigError, NonFiniteLoss) as error:
        return _end(run, "failed", str(error), code=1)
    except OSError as error:
        return _end(run, "failed", _reason(error, run.folder.directory), code=1)
    except BaseException as error:
        if run.stop() and not distributed.is_main():  # the main process was stopped too, and left first
            return run.stop.exit_code
        if line := lost_decoder(error):
            return _end(run, "failed", line, code=1)
        if _lost_process(error):
            line = "another process of this run is gone; the same command goes on from the last checkpoint"
            return _end(run, "failed", line, code=1)
        with contextlib.suppress(OSError):
            run.folder.crash(run.tracker, error)
            error.add_note(f"traceback in {run.folder.directory / 'log.txt'}")
        raise


def _lost_process(error: BaseException) -> bool:
    """Return whether the connection to another process broke; gloo has no type of its own for that."""
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


def _end(run: Run, status: str, line: str, *, code: int) -> int:
    """Tell every sink how the run ended; a full disk may keep some of them from noting it."""
    if status == "failed":
        print(f"prune-lab: error: {line}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        run.tracker.finish(status, line)
    return code


def _reason(error: OSError, directory: Path) -> str:
    """Return one line for an error of the disk; those of prune-lab's own writers name the file already."""
    if isinstance(error, SaveError):
        return f"{error.strerror}; what was there before is untouched, the same command goes on"
    return f"{error.strerror or type(error).__name__}: {error.filename or directory}"


def _carry_out(run: Run) -> int:
    started = time.monotonic()
    run.folder.start(run.tracker, run.config, run.planned)
    for line in (*run.dataset.info.lines(), *run.notes):
        run.tracker.message(line)
    if run.config.matched:
        run.tracker.message(run.config.matched.line())
    if line := targets.plan_line(run.config.method.asked()):
        run.tracker.message(line)
    if run.own:
        run.tracker.message(f"control {run.config.method.config.control} of {run.own.directory.name}")
    if note := dense_note(run.config, run.model_config, run.dataset.info):
        run.tracker.message(note)
    if run.config.model.weights is not None:
        run.tracker.message("note: macs/train does not count the training of model.weights")
    done = chain.Results(entry.phase for entry in run.planned)
    for planned in run.planned:
        result, figures = _obtain(run, planned, done)
        done.add(planned.phase, result)
        run.tally["reused" if figures["reused"] else "trained"] += planned.trains
        run.outcomes.append(figures)
        run.step_offset += figures["steps"]
        run.macs_offset += 0 if planned.phase.repeated else figures["macs_train"]
    results.complete(run, result, wall_s=time.monotonic() - started)
    return 0


def _obtain(run: Run, planned: chain.PlannedPhase, done: chain.Results) -> tuple[dict, dict]:
    """Return (result, figures) of a phase: stored already, or done now by whoever holds its lock."""
    store = PhaseStore(Path(run.config.output_dir), planned.key, run.tracker.message)
    if not distributed.is_main():
        return _obtain_locked(run, planned, done, store)
    with store.lock(what=f"phase {planned.phase.name} ({planned.key[:8]})", poll=run.poll):
        return _obtain_locked(run, planned, done, store)


def _obtain_locked(
    run: Run, planned: chain.PlannedPhase, done: chain.Results, store: PhaseStore
) -> tuple[dict, dict]:
    figures = distributed.share(store.finished() if distributed.is_main() else None)
    result = distributed.share(store.result() if distributed.is_main() and figures else None)
    if result is not None:
        if distributed.is_main():
            for record in store.records():
                run.tracker.log(_absolute(run, record), replayed=True)
        run.tracker.message(f"phase {planned.phase.name}: reused ({planned.key[:8]})")
        return result, figures | {"reused": True}
    resumed = distributed.share(store.checkpoints.load() if distributed.is_main() else None)
    if distributed.is_main():
        for record in store.begin(resumed["progress"]["epoch"] if resumed else -1):
            run.tracker.log(_absolute(run, record), replayed=True)
    if resumed:
        run.tracker.message(f"phase {planned.phase.name}: resumed at step {resumed['progress']['step']}")
    result, figures = perform(_job(run, planned, done, store, resumed))
    run.images_done += figures.pop("steps_here") * run.config.schedule.batch_size
    run.train_s += figures.pop("train_s_here")
    if distributed.is_main():
        store.finish(result, figures, planned.inputs)
    distributed.barrier()
    return result, figures | {"reused": False}


def _job(
    run: Run, planned: chain.PlannedPhase, done: chain.Results, store: PhaseStore, resumed: dict | None
) -> Job:
    def record(row: dict) -> None:
        if distributed.is_main():
            store.append(row)
            run.tracker.log(_absolute(run, row))

    return Job(
        config=run.config,
        model_config=run.model_config,
        planned=planned,
        dataset=run.dataset,
        numerics=run.numerics,
        previous=done.before(planned.phase),
        origin=done.origin(planned.phase),
        checkpoints=store.checkpoints,
        resumed=resumed,
        record=record,
        show=run.tracker.progress,
        report=run.tracker.message,
        stop=run.stop,
        differentiate=run.host.differentiate,
    )


def _absolute(run: Run, row: dict) -> dict:
    """Return a phase's record with steps and MACs counted over the whole run."""
    row = dict(row)
    row["global_step"] = row.pop("step") + run.step_offset
    row["macs/train"] = row["macs/train"] + run.macs_offset
    first = ("phase", "epoch", "global_step")
    return {key: row[key] for key in first} | {key: value for key, value in row.items() if key not in first}


def _show(run: Run, summary: dict) -> None:
    for line in [*summary_lines(summary), *pipeline_summary.control_lines(run, summary)]:
        run.tracker.message(line)
