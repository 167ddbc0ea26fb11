"""Hands a checked command line to Hydra and runs the jobs it composes in turn. Torch-free until one starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from prune_lab.failure import fail

INTERRUPTED = 128
"""exit codes above this mean that a signal stopped the run"""


def run_all(conf_dir: Path, arguments: list[str]) -> int:
    """Return 0 if every run finished, the code of the first one that did not otherwise.

    A failed run does not stop a sweep, a signal does. Runs that did not finish are named at the end.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig

    jobs: list[tuple[str, int]] = []

    def task(node: Any) -> None:
        varied = [override for override in HydraConfig.get().overrides.task if override not in arguments]
        name = " ".join(varied) or "the only one"
        sweeping = HydraConfig.get().mode.name == "MULTIRUN"
        if sweeping:
            print(f"{'' if not jobs else chr(10)}run {len(jobs) + 1}: {name}", flush=True)
        code = run_composed(node)
        jobs.append((name, code))
        if code > INTERRUPTED:
            raise SystemExit(code)  # the one way out of Hydra that starts no further job

    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here instead of being printed by Hydra
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir), config_name="config")(task)()
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
    return _conclude(jobs)


def _conclude(jobs: list[tuple[str, int]]) -> int:
    failed = [(name, code) for name, code in jobs if code]
    if len(jobs) > 1:
        print(f"\nsweep: {len(jobs) - len(failed)} of {len(jobs)} runs finished", flush=True)
        for name, code in failed:
            print(f"prune-lab: not finished (exit code {code}): {name}", file=sys.stderr)
    return failed[0][1] if failed else 0


def run_composed(node: Any) -> int:
    """Run one composed configuration and return its exit code; torch is imported here for the first time."""
    # Threads of GNU OpenMP wait for each other by spinning. With another program on the same cores that made a ResNet-20
    # step 10 to 30 times as long; after 10,000 turns of sleep instead 4 times, and as fast as ever on idle cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from prune_lab.config import check
    from prune_lab.overrides import plain

    try:
        config = check(plain(node))
        if config.dry_run:
            from prune_lab.dry_run import dry_run as start
        else:
            from prune_lab.pipeline import run as start
        return start(config)
    except Exception as error:
        return fail(error)
