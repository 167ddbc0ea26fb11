"""prune-lab tune: searches options with Optuna. Each trial is an ordinary run; a stopped search resumes."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra import initialize_config_dir

from prune_lab import datasets
from prune_lab.commands.arguments import Arguments
from prune_lab.commands.tune import objectives as goals
from prune_lab.commands.tune.objectives import Objective
from prune_lab.compose.overrides import compose_checked, parse_overrides
from prune_lab.config.run import RunConfig
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import Word
from prune_lab.pipeline.identity import digest

if TYPE_CHECKING:
    from prune_lab.commands.tune.search import Search
    from prune_lab.commands.tune.space import Space

_IMAGES = ("trainer.limit_eval_batches", "trainer.limit_train_batches", "trainer.eval_batch_size",
           "dataset.validation")  # fmt: skip
"""options that decide which images a run sees; evaluation batch size is one if the number of batches is limited"""


def main(argv: list[str]) -> int:
    """Search the options in `argv` and return the exit code: 1 if no trial has finished.

    Raises:
        UserError: a wrong option anywhere in the space, or a study that belongs to another command.
    """
    options = _parser().parse_intermixed_args(argv)
    objectives = goals.parse(options.objective)
    _check(options, objectives)
    from prune_lab.compose.choices import conf_dir

    space, configs = _checked_space(conf_dir(), options.options)
    config = configs[0]
    _check_split(config, objectives)
    images = _check_data(config)
    from prune_lab.commands.tune.search import Search  # torch is imported only once the options are valid
    from prune_lab.commands.tune.study import open_study
    from prune_lab.pipeline import store

    name = options.study or _name(config, space, objectives)
    path = Path(config.output_dir) / "tune" / f"{name}.db"
    # One process at a time: the running trials of another would look like leftovers of a kill.
    with store.lock(path.with_suffix(".lock"), what=f"study {name}", report=print):
        study = open_study(
            path,
            options=[*space.identity(), f"images={images}"],
            objectives=[objective.key for objective in objectives],
            directions=[objective.direction for objective in objectives],
            prune=_prunes(options.pruner, objectives, configs),
        )
        search = Search(study, space, objectives, conf_dir(), careful=options.pruner != "median")
        print("\n".join([f"study {name} in {path}", *map(search.line, search.trials())]))
        code = search.work(num_trials=options.trials, timeout_s=options.timeout)
        return code or _conclude(search)


def _parser() -> Arguments:
    parser = Arguments("tune", "Search options with Optuna. Options are written as for a run; those given several "
                       "values are searched: method.alpha=interval(0.1,0.5), tag(log,interval(1e-4,1e-1)), "
                       "int(interval(1,9)), range(1,10,2), choice(a,b) or a,b. The same command goes on with a stopped "
                       "search, tries failed trials again and shows a finished search.")  # fmt: skip
    add = parser.add_argument
    add("options", nargs="+", metavar="OPTIONS", help="name=value, as for a run")
    add("--study", metavar="NAME", help="kept in OUTPUT_DIR/tune/NAME.db (default: named after the options)")
    add("--trials", type=int, default=20, metavar="N", help="trials in all, earlier calls included (default 20)")
    add("--objective", default="top1", metavar="KEY[,KEY]", help="figures of summary.json, or "
        + ", ".join(goals.SHORT) + " (default top1); of several, the trials that no other beats are listed")
    add("--pruner", choices=("median", "none"), help="median: stop a run below the median of the finished ones after "
        "the same epoch, a third of the last training phase at the earliest (default for a single objective that is a "
        "top-1, if trials share method, schedule and trainer.limit_train_batches, and unless their sparsity changes in "
        "that phase)")
    add("--timeout", type=float, metavar="S", help="begin no trial later than so many seconds from now")
    return parser


def _check(options: Namespace, objectives: Sequence[Objective]) -> None:
    """Reject incompatible options."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError("prune-lab tune needs Optuna: pip install optuna")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("prune-lab tune runs in one process; start it without torchrun")
    if options.trials < 1:
        raise UserError(f"--trials must be 1 or more, got {options.trials}")
    if options.timeout is not None and not 0 < options.timeout < math.inf:
        raise UserError(f"--timeout must be seconds above 0, got {options.timeout:g}")
    if options.study is not None and not Word().contains(options.study):
        raise UserError(f"--study {options.study} must be a file name of letters, digits and _.+-")
    if options.pruner == "median" and not _follow_top1(objectives):
        raise UserError("--pruner median goes by the top-1 after each epoch and needs one objective that is a top-1 "
                          f"(top1, test, delta), got --objective {options.objective}")  # fmt: skip


def _follow_top1(objectives: Sequence[Objective]) -> bool:
    return len(objectives) == 1 and objectives[0].follows_top1


def _prunes(pruner: str | None, objectives: Sequence[Objective], configs: Sequence[RunConfig]) -> bool:
    """Return whether to prune trials early: by default only if an epoch means the same for all `configs`."""
    if pruner is None:
        comparable = all((config.method.name, config.schedule, config.trainer.limit_train_batches)
                    == (configs[0].method.name, configs[0].schedule, configs[0].trainer.limit_train_batches)
                    for config in configs)  # fmt: skip
        return comparable and _follow_top1(objectives)
    return pruner == "median"


def _checked_space(conf_dir: Path, typed: list[str]) -> tuple[Space, list[RunConfig]]:
    """Return the space, all ends of which are allowed, and the options of runs that reach them."""
    from prune_lab.commands.tune.space import is_place, read  # Optuna may be missing

    with initialize_config_dir(str(conf_dir), version_base="1.3"):
        space = read(parse_overrides(typed))
    for key in space.searched:
        if is_place(key) or key == "dry_run":
            raise UserError(f"{key} does not change results, so it cannot be searched")
        if key in _IMAGES:
            raise UserError(f"{key} cannot be searched: it decides which images a trial is trained or measured on, "
                              "and figures of different images cannot be compared")  # fmt: skip
        if key.endswith("seed"):
            raise UserError(f"{key} cannot be searched: the best of several seeds is luck; search with one and "
                              "run the best with several (-m seed=0,1,2), prune-lab compare averages them")  # fmt: skip
    configs = [config for probe in space.probes()
               for config in compose_checked(conf_dir, space.command(probe), sweep=False)]  # fmt: skip
    if configs[0].dry_run:
        raise UserError("dry_run=true trains nothing, so there is nothing to search; leave it out")
    return space, configs


def _check_split(config: RunConfig, objectives: Sequence[Objective]) -> None:
    """Warn about selection on test images."""
    if config.dataset.validation > 0:
        return
    for objective in objectives:
        if objective.key.startswith("test/"):
            raise UserError(f"--objective {objective.name} needs dataset.validation above 0; without it top1 is "
                              "measured on the test split")  # fmt: skip
    if any(objective.is_measured for objective in objectives):
        print("prune-lab: warning: trials are compared on test images, which flatters the best one; "
              "dataset.validation=0.1 compares them on images held out of training", file=sys.stderr)  # fmt: skip


def _check_data(config: RunConfig) -> str:
    """Reject missing or damaged data once, instead of in every trial; return a name for the data."""
    from prune_lab.training.device_config import resolve_device_config

    device_config = resolve_device_config(config.trainer)
    fmt = datasets.BatchFormat(device_config.torch_device, torch.float32, device_config.channels_last)
    dataset = datasets.load(config.dataset, fmt)
    dataset.close()
    return dataset.fingerprint[:8]


def _name(config: RunConfig, space: Space, objectives: Sequence[Objective]) -> str:
    """Return a name for the study that other commands do not share."""
    key = digest([space.identity(), [objective.key for objective in objectives]])
    return f"{config.dataset.name}-{config.model.name}-{config.method.name}-{key[:8]}"


def _conclude(search: Search) -> int:
    """Print the best trials and the importance of parameters; return 1 if there is none."""
    from prune_lab.commands.tune.study import importances

    counts = {state: len(search.trials(state)) for state in ("finished", "pruned", "failed")}
    counted = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "no trial yet"
    print(f"\nstudy {search.study.study_name}: {counted}", flush=True)
    for trial in search.trials("failed"):
        print(f"prune-lab: {search.line(trial)}", file=sys.stderr)
    if not counts["finished"]:
        return 1
    names = [objective.name for objective in search.objectives]
    several = len(names) > 1
    if several:
        print(f"no other trial is better in {', '.join(names[:-1])} and {names[-1]} than these:")
    for trial in search.study.best_trials if several else [search.study.best_trial]:
        print(f"{'' if several else 'best: '}{search.line(trial)}\n  {search.command(trial)}")
    for index, name in enumerate(names):
        shares = [f"{key} {share:.2f}" for key, share in importances(search.study, objective=index).items()]
        if shares:
            print(f"importance for {name}: {', '.join(shares)}")
    return 0
