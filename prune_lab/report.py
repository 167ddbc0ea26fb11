"""prune-lab compare: reads the summaries of runs, groups them over seeds, shows a table. Imports no torch."""

from __future__ import annotations

import glob
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_lab.arguments import Arguments
from prune_lab.files import read_json
from prune_lab.schema import ConfigError, suggestion

_MARKS = ("status.json", "summary.json", "run.json")
"""a directory with one of these is a run's"""
_NOT_RUNS = {"phases", "wandb"}
_NOT_OPTIONS = {"seed", "logger", "output_dir", "dry_run"}
"""options that do not tell groups apart"""

METRICS = {
    "top1": "final/top1",
    "test": "test/top1",
    "delta": "delta/top1",
    "control": "control/delta",
    "params": "params/nonzero",
    "params_ratio": "params/ratio",
    "macs": "macs/inference_ratio",
    "train": "macs/train_ratio",
    "wall": "time/wall_s",
}
"""what is averaged: short name -> key in summary.json (params/ratio is worked out here)"""

SORT_KEYS = ("name", "sparsity", *METRICS)


@dataclass(frozen=True)
class RunResult:
    """One run as its files tell it."""

    path: Path
    status: str
    error: str | None
    group: str
    """equal for runs that differ in nothing but the seed"""
    seed: int | None
    summary: dict[str, Any]
    """empty unless the run is finished"""
    config: dict[str, Any]
    """resolved options; empty if run.json is missing"""


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation (ddof 1; None for a single value) of `n` runs."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class Row:
    """The runs of one group."""

    labels: tuple[str, str, str, str]
    """method, model, data set, schedule"""
    sparsity: float | None
    """requested; None where the method has no target"""
    options: str
    """what sets it apart from other rows with the same labels"""
    num_finished: int
    num_runs: int
    stats: dict[str, Stat]
    """by short name of METRICS; without those that no run has"""
    group: str = ""
    matched: str = ""
    """which cost was made equal to that of which layout; the epochs, if they were solved for"""
    control: str = ""
    """which sanity check of a method it is; none: a method beside its controls"""
    control_of: str | None = None
    """group of the method that it is a control of, if that is among the rows"""


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """Return the run directories that `paths` are, contain or match (shell patterns), each once, in order of name.

    Raises:
        ConfigError: a path that does not exist, or none of them leads to a run.
    """
    found: dict[Path, None] = {}
    given = list(paths)
    for path in given:
        matches = sorted(glob.glob(os.fspath(path))) if not os.path.exists(path) else [os.fspath(path)]
        if not matches:
            raise ConfigError(f"{path}: no such run or folder")
        for match in matches:
            found.update(dict.fromkeys(_below(match)))
    if not found:
        raise ConfigError(f"no runs in {', '.join(os.fspath(path) for path in given)}")
    return list(found)


def _below(directory: str) -> Iterator[Path]:
    if any(os.path.exists(os.path.join(directory, name)) for name in _MARKS):
        yield Path(directory)
    elif os.path.isdir(directory):
        with os.scandir(directory) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        for name in names:
            if name not in _NOT_RUNS:
                yield from _below(os.path.join(directory, name))


def read_runs(paths: Iterable[str | Path]) -> list[RunResult]:
    """Return the runs found under `paths`, failed and unfinished ones included.

    Raises:
        ConfigError: as `find_runs`.
    """
    return [_read_run(path) for path in find_runs(paths)]


def _read_run(path: Path) -> RunResult:
    try:
        run, summary, status = (_read_optional(path / name) for name in ("run.json", "summary.json", "status.json"))
    except ValueError as error:
        return RunResult(path, "unreadable", str(error), path.name, None, {}, {})
    state = status.get("status") or summary.get("status") or "unknown"
    if state == "finished" and not summary:
        state = "without summary.json"
    config = run.get("config") or {}
    return RunResult(
        path=path,
        status=state,
        error=status.get("error"),
        group=summary.get("run/group") or run.get("group") or path.name,
        seed=summary.get("run/seed", config.get("seed")),
        summary=_with_ratio(summary) if state == "finished" else {},
        config=config,
    )


def _read_optional(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no object")
    return content


def _with_ratio(summary: dict[str, Any]) -> dict[str, Any]:
    nonzero, dense = summary.get("params/nonzero"), summary.get("params/dense")
    return summary | {"params/ratio": nonzero / dense} if nonzero is not None and dense else summary


def without_copies(runs: Iterable[RunResult]) -> tuple[list[RunResult], list[str]]:
    """Return the runs, each finished one once however often its directory was copied, and a note on every copy."""
    kept, first, notes = [], {}, []
    for run in runs:
        key = run.summary.get("run/id")
        if key is not None and key in first:
            notes.append(f"{run.path} is a copy of {first[key]} (same run/id) and is not counted")
            continue
        if key is not None:
            first[key] = run.path
        kept.append(run)
    return kept, notes


def aggregate(runs: Iterable[RunResult]) -> list[Row]:
    """Return one row per group that has a finished run: mean, standard deviation and n over its finished runs."""
    groups: dict[str, list[RunResult]] = defaultdict(list)
    for run in runs:
        groups[run.group].append(run)
    finished = {name: [run for run in members if run.summary] for name, members in groups.items()}
    shown = {name: members for name, members in finished.items() if members}
    options = _options({name: members[0] for name, members in shown.items()})
    methods = _methods_of_controls(shown)
    return [
        Row(
            labels=_labels(members[0]),
            sparsity=members[0].summary.get("sparsity/requested"),
            options=options[name],
            num_finished=len(members),
            num_runs=len(groups[name]),
            stats=_stats(members),
            group=name,
            matched=_matched(members[0]),
            control=members[0].summary.get("control/kind") or ("none" if name in methods.values() else ""),
            control_of=methods.get(name),
        )
        for name, members in shown.items()
    ]


def _methods_of_controls(groups: dict[str, list[RunResult]]) -> dict[str, str]:
    """Return group of a control -> group of the method's own runs, where both are there."""
    group_of = {run.path.name: name for name, members in groups.items() for run in members}
    own = {
        name: [group_of[run.summary["control/method_run"]] for run in members
               if run.summary.get("control/method_run") in group_of]
        for name, members in groups.items()
    }
    return {name: found[0] for name, found in own.items() if found}


def _labels(run: RunResult) -> tuple[str, str, str, str]:
    keys = ("config/method", "config/model", "config/dataset", "config/schedule")
    return tuple(str(run.summary.get(key, "?")) for key in keys)


def _matched(run: RunResult) -> str:
    kind, to, epochs = (run.summary.get(f"match/{key}") for key in ("kind", "to", "epochs"))
    if kind is None:
        return ""
    return f"{kind} = {to}" + ("" if epochs is None else f", {epochs} epochs")


def _stats(members: list[RunResult]) -> dict[str, Stat]:
    stats = {}
    for name, key in METRICS.items():
        values = [run.summary[key] for run in members if run.summary.get(key) is not None]
        if values:
            std = statistics.stdev(values) if len(values) > 1 else None
            stats[name] = Stat(statistics.fmean(values), std, len(values))
    return stats


def _options(firsts: dict[str, RunResult]) -> dict[str, str]:
    """Return for each group the options in which it differs from the groups that would look the same in the table."""
    alike: dict[tuple, list[str]] = defaultdict(list)
    for name, run in firsts.items():
        alike[(_labels(run), run.summary.get("sparsity/requested"), _matched(run))].append(name)
    texts = dict.fromkeys(firsts, "")
    for names in alike.values():
        if len(names) == 1:
            continue
        flat = {name: dict(_flat(firsts[name].config)) for name in names}
        keys = dict.fromkeys(key for options in flat.values() for key in options)
        differing = [key for key in keys if len({repr(options.get(key)) for options in flat.values()}) > 1]
        controls = any("control/kind" in firsts[name].summary for name in names)  # they have a column of their own
        shown = [key for key in differing if not (controls and key == "method.control")]
        for name in names:
            text = " ".join(f"{key}={flat[name][key]}" for key in shown if key in flat[name])
            texts[name] = text or ("" if controls else name)
    return texts


def _flat(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if prefix == "" and key in _NOT_OPTIONS:
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def sort_rows(rows: Iterable[Row], key: str) -> list[Row]:
    """Return rows by `name` (data set, model, method, sparsity), `sparsity`, or the mean of a metric.

    Accuracies fall, costs rise; rows without the metric come last. Controls follow their method.
    """
    ordered = _sorted(rows, key)
    controls: dict[str, list[Row]] = defaultdict(list)
    for row in ordered:
        if row.control_of is not None:
            controls[row.control_of].append(row)
    return [shown for row in ordered if row.control_of is None for shown in (row, *controls[row.group])]


def _sorted(rows: Iterable[Row], key: str) -> list[Row]:

    def by_name(row: Row) -> tuple:
        method, model, dataset, schedule = row.labels
        return dataset, model, method, row.sparsity or 0.0, schedule, row.options, row.control

    ordered = sorted(rows, key=by_name)
    if key == "name":
        return ordered
    if key == "sparsity":
        return sorted(ordered, key=lambda row: row.sparsity or 0.0)
    sign = -1 if key in ("top1", "test", "delta", "control") else 1
    return sorted(ordered, key=lambda row: sign * row.stats[key].mean if key in row.stats else float("inf"))


def main(argv: list[str]) -> int:
    """Print the table of the runs named in `argv`; unfinished and failed ones are listed below it.

    Raises:
        ConfigError: wrong option, or nothing to compare.
    """
    from prune_lab.report_table import render

    parser = Arguments("compare", "Show runs as a table, averaged over seeds.")
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="run directories, folders of them, or patterns")
    parser.add_argument("--sort", default="name", metavar="KEY", help=f"one of {', '.join(SORT_KEYS)}")
    options = parser.parse_args(argv)
    if options.sort not in SORT_KEYS:
        near = suggestion(options.sort, SORT_KEYS)
        raise ConfigError(f"--sort {options.sort} is not a choice{near}; allowed: {', '.join(SORT_KEYS)}")
    runs, notes = without_copies(read_runs(options.runs))
    render(sort_rows(aggregate(runs), options.sort), runs, notes, stream=sys.stdout)
    return 0
