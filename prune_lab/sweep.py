"""Hands a checked command line to Hydra and runs the jobs it composes in turn. Torch-free until one starts."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prune_lab.config import check
from prune_lab.control_runs import in_order
from prune_lab.failure import fail
from prune_lab.overrides import plain

INTERRUPTED = 128
"""exit codes above this mean that a signal stopped the run"""


def run_all(conf_dir: Path, arguments: list[str]) -> int:
    """Return 0 if every run finished, the code of the first one that did not otherwise.

    A failed run does not stop a sweep, a signal does. Runs that did not finish are named at the end.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig

    jobs: list[tuple[str, int]] = []
    tally: Counter[str] = Counter()

    def task(node: Any) -> None:
        task_overrides = list(HydraConfig.get().overrides.task)
        varied = [override for override in task_overrides if override not in fixed]
        name = " ".join(varied) or "the only one"
        sweeping = HydraConfig.get().mode.name == "MULTIRUN"
        if sweeping:
            print(f"{'' if not jobs else chr(10)}run {len(jobs) + 1}: {name}", flush=True)
        code = run_composed(node, task_overrides, tally)
        jobs.append((name, code))
        if code > INTERRUPTED:
            raise SystemExit(code)  # the one way out of Hydra that starts no further job

    fixed, arguments = set(arguments), _master_free(arguments)
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
    return _conclude(jobs, tally)


def _conclude(jobs: list[tuple[str, int]], tally: Counter[str]) -> int:
    failed = [(name, code) for name, code in jobs if code]
    if len(jobs) > 1:
        trained, reused = tally["trained"], tally["reused"]
        shared = f"phases with training: {trained} done, {trained + reused} without sharing\n"
        print(f"\n{shared if tally else ''}sweep: {len(jobs) - len(failed)} of {len(jobs)} runs finished", flush=True)
        for name, code in failed:
            print(f"prune-lab: not finished (exit code {code}): {name}", file=sys.stderr)
    return failed[0][1] if failed else 0


def _master_free(arguments: list[str]) -> list[str]:
    """Return a sweep's arguments with single values written as choice(value).

    Hydra first composes the options that are not swept alone. There method=rigl,set is still the default method, which
    has no method.sparsity; as a choice of one it joins each job instead.
    """
    if not {"-m", "--multirun"} & set(arguments):
        return arguments
    from hydra.core.override_parser.overrides_parser import OverridesParser

    flags = [argument for argument in arguments if argument.startswith("-")]
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    written = []
    for override in OverridesParser.create().parse_overrides(overrides):
        line = override.input_line
        key, _, value = line.partition("=")
        as_typed = override.is_sweep_override() or override.is_delete() or override.is_add() or "/" in key
        written.append(line if as_typed else f"{key}=choice({value})")
    return flags + written


def run_composed(node: Any, overrides: Sequence[str], tally: Counter[str]) -> int:
    """Run one composed configuration and return its exit code; torch is imported here for the first time."""
    try:
        config = replace(check(plain(node)), overrides=tuple(overrides))
        if config.dry_run:
            from prune_lab.dry_run import dry_run

            return dry_run(config)
        from prune_lab.pipeline import run

        return run(*in_order(config), tally=tally)
    except Exception as error:
        return fail(error)
