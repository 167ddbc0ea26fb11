"""Runs the checked jobs of a command: in turn in this process, or through one of Hydra's launchers. Torch-free."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from prune_lab.config.run import RunConfig
from prune_lab.foundations.signals import STOPPED
from prune_lab.launch.outcome import Outcome
from prune_lab.launch.run_one import run_one


def run_all(configs: Sequence[RunConfig], *, conf_dir: Path, sweep: bool, launcher: Sequence[str] = ()) -> int:
    """Return 0 if every run finished, the code of a signal that stopped them, or of the first run that failed.

    A failed run does not stop a sweep, but a signal does. Unfinished runs are named at the end.

    Args:
        sweep: several runs were requested, even if one is left.
        launcher: options of Hydra's launcher; with none, or its own "basic", the runs are carried out in turn here.
    """
    names = _names(configs)
    if launcher and launcher != ["hydra/launcher=basic"]:
        from prune_lab.launch.launchers import launch

        now = time.strftime("%Y%m%d-%H%M%S")
        stamp = f"{now}-{time.time_ns() // 10**6 % 1000:03}-{os.getpid()}"
        folder = Path(configs[0].output_dir) / "sweep" / stamp
        outcomes = launch(conf_dir, configs, names, launcher, folder)
    else:
        outcomes = _in_turn(configs, names, sweep=sweep)
    return _conclude(outcomes, names)


def _in_turn(configs: Sequence[RunConfig], names: Sequence[str], *, sweep: bool) -> list[Outcome]:
    outcomes = []
    for number, config in enumerate(configs):
        if sweep:
            print(f"{'' if number == 0 else chr(10)}run {number + 1}: {names[number]}", flush=True)
        tally: Counter[str] = Counter()
        code = run_one(config, tally)
        outcomes.append(Outcome(number, code, "", tally["trained"], tally["reused"]))
        if code > STOPPED:
            break
    return outcomes


def _names(configs: Sequence[RunConfig]) -> list[str]:
    """Return for each run the options in which it differs from others."""
    everywhere = set(configs[0].overrides).intersection(*(config.overrides for config in configs))
    varied = [[line for line in config.overrides if line not in everywhere] for config in configs]
    return [" ".join(lines) or "the only one" for lines in varied]


def _conclude(outcomes: Sequence[Outcome], names: Sequence[str]) -> int:
    failed = [outcome for outcome in outcomes if outcome.code]
    if len(names) > 1:
        trained, reused = (sum(getattr(outcome, key) for outcome in outcomes) for key in ("trained", "reused"))
        shared = f"phases with training: {trained} done, {trained + reused} without sharing\n"
        done = len(outcomes) - len(failed)
        print(f"\n{shared if trained + reused else ''}sweep: {done} of {len(names)} runs finished", flush=True)
    for outcome in failed:
        if len(names) == 1 and not outcome.error:
            continue  # it has already reported this
        reason = f" ({outcome.error})" if outcome.error else ""
        print(f"prune-lab: not finished (exit code {outcome.code}): {names[outcome.number]}{reason}", file=sys.stderr)
    codes = [outcome.code for outcome in failed]
    return next((code for code in codes if code > STOPPED), codes[0] if codes else 0)
