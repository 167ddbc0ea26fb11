"""Runs grouped over seeds: mean, standard deviation and n. Runs that differ in more than the seed stay separate."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from prune_lab.commands.compare import options
from prune_lab.commands.compare.kinds import Kind, kinds
from prune_lab.commands.compare.partial import evaluated, trained
from prune_lab.commands.compare.runs import RunResult

METRICS = {
    "top1": "final/top1",
    "test": "test/top1",
    "bpc": "final/bpc",
    "perplexity": "final/perplexity",
    "accuracy": "accuracy/test",
    "delta": "delta/top1",
    "control": "control/method_minus_control",
    "params": "params/kept",
    "params_ratio": "params/ratio",
    "macs": "macs/inference_ratio",
    "train": "macs/train",
    "latency": "latency/ms",
    "wall": "time/wall_s",
}
"""averaged metrics: short name -> key in a run's summary"""

HIGHER_IS_BETTER = ("top1", "test", "accuracy", "delta", "control")

SORT_KEYS = ("name", "sparsity", *METRICS)

COSTS = {"macs": "macs/inference", "train": "macs/train", "params": "params/kept", "latency": "latency/ms"}
"""costs for comparison with accuracy: short name -> key, absolute so that networks of different size can be compared"""


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
    """requested; None if the method has no target"""
    options: str
    """every option in which it differs from another row"""
    num_finished: int
    num_runs: int
    stats: dict[str, Stat]
    """by short name of METRICS; without those that no run has"""
    group: str = ""
    matched: str = ""
    """the matched cost and its reference layout; the epochs, if they were solved for"""
    control: str = ""
    """which sanity check of a method it is; none: a method beside its controls"""
    control_of: str | None = None
    """group of the method that it is a control of, if that is among the rows"""
    kind: Kind = field(default_factory=Kind, repr=False)
    """determines the rows with which it may be compared"""
    evaluated: str | None = None
    """part of the evaluation images behind its accuracies; None: all"""
    trained: str | None = None
    """part of the training images in its epochs; None: all"""
    epochs: str = ""
    """epochs of each training phase: 2 + 1"""
    runs: tuple[RunResult, ...] = field(default=(), repr=False)
    """the finished ones, by seed"""

    @property
    def prunes(self) -> bool:
        """Whether its accuracy before pruning differs from its last one."""
        return any(run.summary.get("delta/top1") for run in self.runs)

    @property
    def name(self) -> str:
        """The row's name as a single text, such as for a legend."""
        sparsity = "" if self.sparsity is None else f"{self.sparsity:g}"
        parts = (self.labels[0], sparsity, self.matched, self.options, self.control.replace("none", ""))
        return " ".join(part for part in parts if part)


def stat(values: Sequence[float]) -> Stat:
    """Return mean and sample standard deviation of one value or more."""
    return Stat(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def stat_of(row: Row, key: str) -> Stat | None:
    """Return the statistics of a key of summary.json over the row's runs; None if no run has it."""
    values = [run.summary[key] for run in row.runs if run.summary.get(key) is not None]
    return stat(values) if values else None


def aggregate(runs: Iterable[RunResult]) -> list[Row]:
    """Return one row per group that has a finished run: mean, standard deviation and n over its finished runs."""
    groups: dict[str, list[RunResult]] = defaultdict(list)
    for run in runs:
        groups[run.group].append(run)
    finished = {name: [run for run in members if run.summary] for name, members in groups.items()}
    shown = {name: members for name, members in finished.items() if members}
    firsts = {name: members[0] for name, members in shown.items()}
    described = options.texts(firsts, {name: _look(run) for name, run in firsts.items()})
    kind_of, methods = kinds(firsts), _methods_of_controls(shown)
    return [
        Row(
            labels=_labels(members[0]),
            sparsity=members[0].summary.get("sparsity/requested"),
            options=described[name],
            num_finished=len(members),
            num_runs=len(groups[name]),
            stats=_stats(members),
            group=name,
            matched=_matched(members[0]),
            control=members[0].summary.get("control/kind") or ("none" if name in methods.values() else ""),
            control_of=methods.get(name),
            kind=kind_of[name],
            evaluated=evaluated(members[0]),
            trained=trained(members[0]),
            epochs=_epochs(members[0]),
            runs=tuple(sorted(members, key=lambda run: -1 if run.seed is None else run.seed)),
        )
        for name, members in shown.items()
    ]


def _methods_of_controls(groups: dict[str, list[RunResult]]) -> dict[str, str]:
    """Return group of a control -> group of the method's own runs, if both exist."""
    group_of = {run.path.name: name for name, members in groups.items() for run in members}
    own = {
        name: [group_of[run.summary["control/method_run"]] for run in members
               if run.summary.get("control/method_run") in group_of]
        for name, members in groups.items()
    }
    return {name: found[0] for name, found in own.items() if found}


def _labels(run: RunResult) -> tuple[str, str, str, str]:
    keys = ("config/method", "config/model", "config/dataset", "config/schedule")
    method, model, dataset, schedule = (str(run.summary.get(key, "?")) for key in keys)
    return method, model, dataset, schedule


def _look(run: RunResult) -> tuple:
    """Return the properties of a run that the table shows beside its options."""
    sparsity = f"{run.summary.get('sparsity/requested') or 0:g}"
    return _labels(run), sparsity, _matched(run), run.summary.get("control/kind")


def _epochs(run: RunResult) -> str:
    return " + ".join(f"{phase['epochs']:g}" for phase in run.phases)


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
            stats[name] = stat(values)
    return stats


def sort_rows(rows: Iterable[Row], key: str) -> list[Row]:
    """Return rows by `name` (data set, model, method, sparsity), `sparsity`, or the mean of a metric.

    Accuracies are descending, costs ascending; rows without the metric come last. Controls follow their method.
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
    sign = -1 if key in HIGHER_IS_BETTER else 1
    return sorted(ordered, key=lambda row: sign * row.stats[key].mean if key in row.stats else float("inf"))

