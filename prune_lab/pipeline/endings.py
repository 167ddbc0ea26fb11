"""How a run can end: each way leaves a status, one line for the user and an exit code."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prune_lab.foundations import distributed
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.failure import lost_decoder
from prune_lab.foundations.files import SaveError
from prune_lab.pipeline import summary as pipeline_summary
from prune_lab.pipeline.run import Run
from prune_lab.tracking.lines import summary_lines
from prune_lab.training.loop import Interrupted, NonFiniteLoss


def guarded(run: Run, carry_out: Callable[[Run], int]) -> int:
    """Carry out an unfinished run; convert every way it can end into a status, one line and an exit code."""
    done = distributed.on_main(run.folder.finished)
    if done is not None:
        return _done_already(run, done)
    try:
        return carry_out(run)
    except (Interrupted, KeyboardInterrupt):
        return _end(run, "interrupted", run.stop.reason, code=run.stop.exit_code)
    except BaseException as error:
        if run.stop() and not distributed.is_main():  # the main process was stopped too, and exited first
            return run.stop.exit_code
        if line := _explanation(error, run.folder.directory):
            return _end(run, "failed", line, code=1)
        with contextlib.suppress(OSError):
            run.folder.crash(run.tracker, error)
            error.add_note(f"traceback in {run.folder.directory / 'log.txt'}")
        raise


def _done_already(run: Run, summary: dict[str, Any]) -> int:
    run.tracker.message(f"done already: {run.folder.directory}")
    run.tally["reused"] += sum(entry.trains for entry in run.planned)
    for line in [*summary_lines(summary), *pipeline_summary.control_lines(run, summary)]:
        run.tracker.message(line)
    run.observer.summary(summary)
    return 0


def _explanation(error: BaseException, directory: Path) -> str | None:
    """Return one line for an error that the user can fix; None: it is a defect of the program."""
    if isinstance(error, (UserError, NonFiniteLoss)):
        return str(error)
    if isinstance(error, SaveError):  # its text names the file
        return f"{error.strerror}; what was there before is untouched, the same command goes on"
    if isinstance(error, OSError):
        return f"{error.strerror or type(error).__name__}: {error.filename or directory}"
    if line := lost_decoder(error):
        return line
    if _is_lost_process(error):
        return "another process of this run is gone; the same command goes on from the last checkpoint"
    return None


def _is_lost_process(error: BaseException) -> bool:
    """Return whether the connection to another process broke; gloo has no error type of its own for that."""
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


def _end(run: Run, status: str, line: str, *, code: int) -> int:
    """Report the end of the run to every sink; a full disk may prevent some from recording it."""
    if status == "failed":
        print(f"prune-lab: error: {line}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        run.tracker.finish(status, line)
    return code
