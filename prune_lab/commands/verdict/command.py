"""prune-lab verdict: does a network have a winning ticket? Judges existing runs, or carries out the needed ones."""

from __future__ import annotations

import math
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from prune_lab.commands.arguments import Arguments
from prune_lab.commands.compare.runs import RunResult, read_runs, without_copies
from prune_lab.commands.compare.table import unfinished
from prune_lab.commands.verdict.cases import REWOUND, Case, find_cases, read_entries, sparsity_of
from prune_lab.commands.verdict.conditions import DENSE, REINIT, SMALL, TICKET, Rules, similar_margin
from prune_lab.commands.verdict.plan import PRESETS, Planned, check_data, is_ticket, plan, sharing, with_preset
from prune_lab.commands.verdict.table import Judged, as_json, text
from prune_lab.config.run import RunConfig, as_mapping
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.failure import fail
from prune_lab.foundations.files import write_json
from prune_lab.foundations.signals import STOPPED


def main(argv: list[str]) -> int:
    """Judge the runs named in `argv`, or carry out and judge those of its options; return the exit code.

    Raises:
        UserError: wrong option, nothing to judge, or no margin for the data set.
    """
    parser = _parser()
    options = parser.parse_intermixed_args(argv)
    _check_numbers(options)
    overrides = [argument for argument in options.what if "=" in argument and not os.path.exists(argument)]
    paths = [argument for argument in options.what if argument not in overrides]
    if paths and (overrides or options.preset):
        raise UserError(f"verdict: either run directories or options of new runs, got {paths[0]} among options")
    if paths:
        if options.dry_run:
            raise UserError("verdict: --dry-run goes with options of new runs, not with run directories")
        return _judge_there(paths, options)
    if not overrides and not options.preset:
        parser.error("name run directories, or options of new runs such as model=resnet20 dataset=cifar10")
    from prune_lab.compose.choices import conf_dir

    return _judge_new(conf_dir(), overrides, options)


def _parser() -> Arguments:
    parser = Arguments("verdict", "Say whether pruned networks are winning tickets: the five conditions of Ma et al. "
                       "2021. With run directories: judge them. With options (name=value, lists as a,b,c): do the "
                       "runs that the conditions compare, then judge them.")  # fmt: skip
    add = parser.add_argument
    add("what", nargs="*", metavar="RUNS | OPTIONS", help="run directories, folders of them or patterns; or options")
    add("--sim", type=float, metavar="POINTS", help="similar accuracy; default: as published for the data set")
    add("--gap", type=float, default=0.5, metavar="POINTS", help="clearly better: by more than this (default 0.5)")
    add("--min-sparsity", type=float, default=0.59, metavar="S", help="non-trivial from here on (default 0.59)")
    add("--same-lr", action="store_true", help="one learning rate must satisfy conditions 3 and 4 together")
    add("--preset", choices=PRESETS, help="lists of options for a question of the paper; typed options win: "
        + "; ".join(f"{name}: {' '.join(lines)}" for name, lines in PRESETS.items()))
    add("--dry-run", action="store_true", help="list the runs and how many trainings they share; train nothing")
    add("--json", metavar="FILE", help="where the verdict is written (default: verdict.json beside the runs)")
    return parser


def _check_numbers(options: Namespace) -> None:
    for name, value in (("--sim", options.sim), ("--gap", options.gap)):
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"{name} must be points of top-1, 0 or more, got {value:g}")
    if not 0 <= options.min_sparsity < 1:
        raise UserError(f"--min-sparsity must lie in [0, 1), got {options.min_sparsity:g}")


def _rules(dataset: str, options: Namespace) -> Rules:
    margin = similar_margin(dataset, options.sim)
    return Rules(margin, gap=options.gap, min_sparsity=options.min_sparsity, same_lr=options.same_lr)


# Existing runs


def _judge_there(paths: Sequence[str], options: Namespace) -> int:
    runs, copies = without_copies(read_runs(paths))
    judged, notes = judge_runs(runs, options)
    if not judged:
        raise UserError(
            f"verdict: no run of method=lottery with method.arm={TICKET}, {REINIT} or {REWOUND} in {', '.join(paths)}; "
            f"a verdict compares {DENSE}, {TICKET}, {REINIT} and {SMALL}"
        )
    _show(judged, [*notes, *copies, *unfinished(runs)], _common_folder(runs), options)
    return 0


def judge_runs(runs: Iterable[RunResult], options: Namespace) -> tuple[list[Judged], list[str]]:
    """Return every case among `runs` with its rules and its verdict, and notes on runs that cannot be used."""
    entries, notes = read_entries(runs)
    return [_judged(case, options) for case in find_cases(entries)], notes


def _judged(case: Case, options: Namespace) -> Judged:
    rules = _rules(case.network["dataset.name"], options)
    return case, rules, case.verdict(rules)


def _common_folder(runs: Sequence[RunResult]) -> Path:
    return Path(os.path.commonpath([run.path.absolute().parent for run in runs]))


def _show(judged: Sequence[Judged], notes: Sequence[str], folder: Path, options: Namespace) -> None:
    print(text(judged, notes), end="")
    path = Path(options.json) if options.json else folder / "verdict.json"
    write_json(path, as_json(judged, notes))
    print(f"written to {os.path.relpath(path)}")


# Missing runs


def _judge_new(conf_dir: Path, typed: Sequence[str], options: Namespace) -> int:
    overrides = with_preset(typed, options.preset)
    if options.preset:
        print(f"preset {options.preset}: {' '.join(line for line in overrides if line not in typed)}")
    print("checking every run before the first one starts", flush=True)
    planned = plan(conf_dir, overrides)
    _check_rules(planned, options)
    print(f"{len(planned)} runs: {sharing(planned)}", flush=True)
    if options.dry_run or planned[0].config.dry_run:
        for entry in planned:
            print(f"  {entry.label}: {entry.directory.name}{' (done)' if _result(entry).summary else ''}")
        return 0
    check_data(planned)
    tally: Counter[str] = Counter()
    code = 0
    for number, entry in enumerate(planned, start=1):
        print(f"\nrun {number} of {len(planned)}: {entry.label}", flush=True)
        result = _run(entry.config, tally)
        if result > STOPPED:
            return result
        code = code or result
    runs = [_result(entry) for entry in planned]
    judged, notes = judge_runs(runs, options)
    print()
    _show(judged, [*notes, *unfinished(runs)], Path(planned[0].config.output_dir), options)
    print(f"{len(planned)} runs: {sharing(planned)}; {tally['trained']} done now")
    return code


def _check_rules(planned: Sequence[Planned], options: Namespace) -> None:
    """Reject, before hours of training, runs that cannot lead to a verdict.

    Raises:
        UserError: no margin for a data set, or every sparsity is trivial.
    """
    for name in dict.fromkeys(entry.config.dataset.name for entry in planned):
        _rules(name, options)
    highest = max(sparsity_of(asdict(entry.config.method)) for entry in planned if is_ticket(entry.config))
    if highest < options.min_sparsity - 1e-9:
        raise UserError(
            f"method.levels: every sparsity is trivial, the highest is {highest:.4g}; --min-sparsity is "
            f"{options.min_sparsity:g}"
        )


def _run(config: RunConfig, tally: Counter[str]) -> int:
    """Carry out one run and return its exit code; a failed one is reported and does not stop the others.

    Args:
        tally: counts trained and reused phases.
    """
    from prune_lab.pipeline import runner  # torch is imported only once the options are valid

    try:
        return runner.run(config, tally=tally)
    except Exception as error:
        return fail(error)


def _result(planned: Planned) -> RunResult:
    """Return the results of a run, or that there are none."""
    if (planned.directory / "status.json").exists():
        return read_runs([planned.directory])[0]
    config = planned.config
    options = as_mapping(config)
    return RunResult(planned.directory, "not started", None, planned.directory.name, config.seed, {}, options)
