"""prune-lab verdict: does a network have a winning ticket? Judges runs that are there, or does the needed ones."""

from __future__ import annotations

import math
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_lab import datasets
from prune_lab.arguments import Arguments
from prune_lab.compare.runs import RunResult, read_runs, without_copies
from prune_lab.compare.table import unfinished
from prune_lab.config import RunConfig
from prune_lab.failure import fail
from prune_lab.files import write_json
from prune_lab.lazy import lazy_import
from prune_lab.overrides import compose_checked
from prune_lab.schema import ConfigError
from prune_lab.verdict import DENSE, REINIT, SMALL, TICKET, Rules, similar_margin
from prune_lab.verdict_cases import REWOUND, Case, find_cases, read_entries, sparsity_of
from prune_lab.verdict_table import Judged, as_json, text

torch = lazy_import("torch")
accounting = lazy_import("prune_lab.accounting")
eligibility = lazy_import("prune_lab.eligibility")
identity = lazy_import("prune_lab.identity")
models = lazy_import("prune_lab.models")
numerics = lazy_import("prune_lab.numerics")
phases = lazy_import("prune_lab.phases")
pipeline = lazy_import("prune_lab.pipeline")
results = lazy_import("prune_lab.results")

_CONTEXT = ("LT-OMP", "RR-OMP", "LR-rewinding-OMP")
"""one-shot pruning, and pruning the trained network and training it on: rows beside the conditions"""
_INTERRUPTED = 128
"""exit codes above this mean that a signal stopped a run"""

_SWEEP = ("schedule.train.lr=0.005,0.01,0.1", "seed=0,1,2", "method.levels=4,8,11,13,14")
"""the learning rates that Ma et al. 2021 name for ResNet-20, their 3 runs per point, the sparsities they tabulate"""
PRESETS = {
    # How the verdict depends on the learning rate: small ones flatter the ticket, large ones the dense network.
    "learning_rate": _SWEEP,
    # The same with half the training: 78 and 160 epochs, milestones scaled with them.
    "epochs": (*_SWEEP, "schedule=cifar_160", "schedule.multiplier=0.4875,1"),
    # The same with twice the channels: more redundancy keeps tickets up to higher sparsity.
    "width": (*_SWEEP, "model.width=1,2"),
}


@dataclass(frozen=True)
class Planned:
    """One of the runs that a verdict needs."""

    label: str
    config: RunConfig
    directory: Path
    trainings: tuple[str, ...]
    """keys of its phases that train"""


def main(argv: list[str]) -> int:
    """Judge the runs named in `argv`, or do and judge those that its options ask for; return the exit code.

    Raises:
        ConfigError: wrong option, nothing to judge, or no margin for the data set.
    """
    parser = _parser()
    options = parser.parse_intermixed_args(argv)
    _check_numbers(options)
    overrides = [argument for argument in options.what if "=" in argument and not os.path.exists(argument)]
    paths = [argument for argument in options.what if argument not in overrides]
    if paths and (overrides or options.preset):
        raise ConfigError(f"verdict: either run directories or options of new runs, got {paths[0]} among options")
    if paths:
        if options.dry_run:
            raise ConfigError("verdict: --dry-run goes with options of new runs, not with run directories")
        return _judge_there(paths, options)
    if not overrides and not options.preset:
        parser.error("name run directories, or options of new runs such as model=resnet20 dataset=cifar10")
    from prune_lab.cli import conf_dir

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
            raise ConfigError(f"{name} must be points of top-1, 0 or more, got {value:g}")
    if not 0 <= options.min_sparsity < 1:
        raise ConfigError(f"--min-sparsity must lie in [0, 1), got {options.min_sparsity:g}")


def _rules(dataset: str, options: Namespace) -> Rules:
    margin = similar_margin(dataset, options.sim)
    return Rules(margin, gap=options.gap, min_sparsity=options.min_sparsity, same_lr=options.same_lr)


# Runs that are there


def _judge_there(paths: Sequence[str], options: Namespace) -> int:
    runs, copies = without_copies(read_runs(paths))
    judged, notes = judge_runs(runs, options)
    if not judged:
        raise ConfigError(
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


# Runs that are still to do


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
    _check_data(planned)
    code, tally = 0, Counter()
    for number, entry in enumerate(planned, start=1):
        print(f"\nrun {number} of {len(planned)}: {entry.label}", flush=True)
        result = _run(entry.config, tally)
        if result > _INTERRUPTED:
            return result
        code = code or result
    runs = [_result(entry) for entry in planned]
    judged, notes = judge_runs(runs, options)
    print()
    _show(judged, [*notes, *unfinished(runs)], Path(planned[0].config.output_dir), options)
    print(f"{len(planned)} runs: {sharing(planned)}; {tally['trained']} done now")
    return code


def with_preset(typed: Sequence[str], preset: str | None) -> list[str]:
    """Return the typed options and those of the preset that are not typed."""
    names = {argument.partition("=")[0] for argument in typed}
    if "method.sparsity" in names:
        names.add("method.levels")  # either of them says how sparse
    added = [line for line in PRESETS[preset] if line.partition("=")[0] not in names] if preset else []
    return [*added, *typed]


def plan(conf_dir: Path, overrides: Sequence[str]) -> list[Planned]:
    """Return the runs that the definition compares, all checked: dense ones first, then by sparsity.

    Args:
        overrides: options of the runs, lists of values allowed; those of `method` are options of method=lottery, but
            for method.tolerance of the small dense network.

    Raises:
        ConfigError: a wrong option, or too few learning rates or seeds for any verdict.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("verdict starts its runs in one process, one after the other: start it without torchrun")
    _refuse(overrides)
    shared = [line for line in overrides if not line.startswith("method.")]
    small = [line for line in overrides if line.startswith("method.tolerance=")]
    lottery = [line for line in overrides if line.startswith("method.") and line not in small]
    rewinding = [line for line in lottery if line.startswith(("method.rewind_to=", "method.optimizer_state="))]
    masks = ["method=lottery", *(line for line in lottery if line not in rewinding)]
    arms = ",".join((TICKET, REINIT, *_CONTEXT))
    jobs = [*compose_checked(conf_dir, [*shared, "method=dense"], sweep=True),
            *compose_checked(conf_dir, [*shared, *masks, f"method.arm={arms}"], sweep=True)]  # fmt: skip
    _check_enough(config for config in jobs)
    if rewinding:
        rewound = f"{REWOUND},{REINIT}" if any(line.startswith("method.rewind_to=") for line in rewinding) else REWOUND
        jobs += compose_checked(conf_dir, [*shared, *masks, *rewinding, f"method.arm={rewound}"], sweep=True)
    jobs += [config for job in _small_jobs(jobs, small) for config in compose_checked(conf_dir, job, sweep=True)]
    varied = _varied(jobs)
    widths: dict[str, Any] = {}
    chosen = {repr(config.dataset): config.dataset for config in jobs}
    contents = {name: datasets.content(options) for name, options in chosen.items()}
    planned = {entry.directory: entry for entry in (_planned(config, varied, widths, contents) for config in jobs)}
    return sorted(planned.values(), key=_order)


def _check_rules(planned: Sequence[Planned], options: Namespace) -> None:
    """Refuse before hours of training what no verdict can come of.

    Raises:
        ConfigError: no margin for a data set, or every sparsity is trivial.
    """
    for name in dict.fromkeys(entry.config.dataset.name for entry in planned):
        _rules(name, options)
    highest = max(sparsity_of(entry.config.resolved["method"]) for entry in planned if _is_ticket(entry.config))
    if highest < options.min_sparsity - 1e-9:
        raise ConfigError(
            f"method.levels: every sparsity is trivial, the highest is {highest:.4g}; --min-sparsity is "
            f"{options.min_sparsity:g}"
        )


def _refuse(overrides: Sequence[str]) -> None:
    for line in overrides:
        name = line.partition("=")[0].lstrip("+~")
        if name in ("method", "method.arm", "method.name", "method.copy"):
            raise ConfigError(f"{line}: verdict chooses methods and arms itself; leave {name}=... out")


def _check_enough(configs: Iterable[RunConfig]) -> None:
    """Refuse runs that could give no verdict whatever their results are."""
    configs = list(configs)
    lrs, seeds = {config.schedule.train.lr for config in configs}, {config.seed for config in configs}
    if len(lrs) < 2:
        raise ConfigError(
            f"schedule.train.lr={lrs.pop():g}: a verdict needs two learning rates or more, such as "
            "schedule.train.lr=0.01,0.1, because dense training at one is not known to be its best"
        )
    if len(seeds) < 2:
        raise ConfigError(f"seed={seeds.pop()}: a verdict needs two seeds or more, such as seed=0,1,2")


def _is_ticket(config: RunConfig) -> bool:
    return config.resolved["method"].get("arm") == TICKET


def _small_jobs(jobs: Sequence[RunConfig], small: Sequence[str]) -> list[list[str]]:
    """Return the options of the dense networks that have as many parameters as each ticket keeps."""
    found = {}
    for config in jobs:
        if _is_ticket(config):
            shared = [line for line in config.overrides if not line.startswith("method")]
            job = [*shared, "method=small_dense", *small, f"method.sparsity={small_sparsity(config):.6g}"]
            found[tuple(job)] = job
    return list(found.values())


def small_sparsity(config: RunConfig) -> float:
    """Return which fraction of all parameters a ticket lacks; its own sparsity counts eligible weights only."""
    info = datasets.describe(config.dataset)
    sizes = {"num_classes": info.num_classes, "image_size": info.image_size}
    model = models.build_on_meta(config.model, **sizes)
    layers = eligibility.usable_layers(config.method, model, phases.layer_costs(config.model, **sizes))
    eligible = sum(layer.size for layer in layers if layer.eligible)
    return sparsity_of(config.resolved["method"]) * eligible / accounting.count_parameters(model)


def _varied(jobs: Sequence[RunConfig]) -> set[str]:
    """Return the names of the options that tell runs apart."""
    lines = {line for config in jobs for line in config.overrides if not line.startswith(("method=", "method.arm="))}
    names = [line.partition("=")[0] for line in lines]
    return {name for name in names if names.count(name) > 1} | {"method.levels", "method.sparsity", "method.rewind_to"}


def _planned(
    config: RunConfig, varied: set[str], widths: dict[str, Any], contents: dict[str, str | None]
) -> Planned:
    """Return one run with the place and the trainings that the pipeline will give it.

    Args:
        varied: names of the options to show.
        widths: adapted model options that are known already; found ones are added.
        contents: `Dataset.content` of each data set's options.
    """
    info, method = datasets.describe(config.dataset), config.method
    sizes = {"num_classes": info.num_classes, "image_size": info.image_size}
    key = repr((config.model, method.config, sizes))
    if key not in widths:
        widths[key] = method.adapt_model(config.model, **sizes)
    inputs = {"model": widths[key], "numerics": numerics.resolve(config.trainer).identity(), "world_size": 1}
    content = contents[repr(config.dataset)]
    phases = identity.plan(config, fingerprint=content, **inputs)
    name = getattr(method.config, "arm", method.config.name)
    shown = [line for line in config.overrides if line.partition("=")[0] in varied]
    return Planned(
        " ".join([name, *shown]),
        config,
        results.RunFolder.of(config, fingerprint=None, content=content, **inputs).directory,
        tuple(entry.key for entry in phases if entry.trains),
    )


def _order(planned: Planned) -> tuple[bool, float]:
    """Dense runs first, then by sparsity."""
    method = planned.config.resolved["method"]
    dense = method["name"] == DENSE
    return (not dense, 0.0 if dense else sparsity_of(method))


def sharing(planned: Sequence[Planned]) -> str:
    """Return how many trainings the runs consist of, and how many they would need if none were shared."""
    keys = [key for entry in planned for key in entry.trainings]
    return f"{len(set(keys))} trainings, because equal phases are shared; {len(keys)} without sharing"


def _check_data(planned: Sequence[Planned]) -> None:
    """Refuse missing or damaged data once, instead of in every run."""
    for config in {repr(entry.config.dataset): entry.config for entry in planned}.values():
        arithmetic = numerics.resolve(config.trainer)
        fmt = datasets.BatchFormat(arithmetic.torch_device, torch.float32, arithmetic.channels_last)
        datasets.load(config.dataset, fmt).close()


def _run(config: RunConfig, tally: Counter[str]) -> int:
    """Do one run and return its exit code; a failed one is reported and does not stop the others.

    Args:
        tally: counts what was trained and what was there already.
    """
    try:
        return pipeline.run(config, tally=tally)
    except Exception as error:
        return fail(error)


def _result(planned: Planned) -> RunResult:
    """Return what a run left behind, or that it left nothing."""
    if (planned.directory / "status.json").exists():
        return read_runs([planned.directory])[0]
    config = planned.config
    return RunResult(planned.directory, "not started", None, planned.directory.name, config.seed, {}, config.resolved)
