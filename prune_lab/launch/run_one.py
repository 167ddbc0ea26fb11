"""One run of a command, from its options to its exit status."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from prune_lab.config.run import RunConfig
from prune_lab.foundations.failure import fail
from prune_lab.pipeline.control_runs import in_order

if TYPE_CHECKING:
    from prune_lab.pipeline.executor import Executor


def run_one(config: RunConfig, tally: Counter[str], executor: Executor | None = None) -> int:
    """Carry out one run or its dry run and return its exit code; torch is imported here for the first time.

    Args:
        executor: services shared with other runs in this process; None: nothing is shared.
    """
    try:
        if config.dry_run:
            from prune_lab.pipeline.dry_run import dry_run

            return dry_run(config)
        from prune_lab.pipeline.runner import run

        return run(*in_order(config), tally=tally, executor=executor)
    except Exception as error:
        return fail(error)
