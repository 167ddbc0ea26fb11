"""Rows of a comparison as cells for a reader, and the lines about missing ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prune_lab.accounting.targets import TOLERANCE
from prune_lab.commands.compare.differences import CONFIDENCE, Difference
from prune_lab.commands.compare.groups import Row, Stat, stat_of
from prune_lab.commands.compare.published import Beside
from prune_lab.commands.compare.runs import RunResult
from prune_lab.tracking.lines import MANY_ZEROS, dense_epochs, duration, epochs_text, quantity, to_ascii

COST_NAMES = {"macs": "inference MACs", "train": "training MACs", "params": "parameters left", "latency": "latency"}
DENSE_ROW = "train MACs / dense row"
SAME = "equal model, data, evaluation and schedule"


@dataclass(frozen=True)
class Findings:
    """Results computed across rows."""

    differences: Mapping[str, Difference] = field(default_factory=dict)
    """by group; empty without a baseline"""
    baseline: str = ""
    """as typed"""
    metric: str = "accuracy"
    """metric of differences and front: short name of METRICS"""
    front: frozenset[str] = frozenset()
    """groups on the Pareto front"""
    cost: str = "macs"
    """cost of the front: short name of COSTS"""
    unpaired: Sequence[str] = ()
    """why rows have no difference to the baseline"""
    over_dense: Mapping[str, float] = field(default_factory=dict)
    """by group: training MACs over those of the dense row"""
    before_pruning: bool = False
    """whether accuracies before pruning were requested"""
    published: tuple[Beside, ...] = ()


def table(rows: Sequence[Row], findings: Findings | None = None) -> tuple[list[str], list[list[str]]]:
    """Return column names and ASCII cells; a column that no row fills is left out."""
    known = findings or Findings()
    top1 = {entry.row.group: entry for entry in known.published if entry.key in ("final/top1", "test/top1")}
    columns = {
        "method": [row.labels[0] for row in rows],
        "model": [row.labels[1] for row in rows],
        "dataset": [row.labels[2] for row in rows],
        "schedule": [_part(row.labels[3], row.trained) for row in rows],
        "epochs": [row.epochs for row in rows] if len({row.epochs for row in rows}) > 1 else [],
        "sparsity": ["" if row.sparsity is None else f"{row.sparsity:g}" for row in rows],
        "target missed": [_missed(row) for row in rows],
        "matched": [row.matched for row in rows],
        "options": [row.options for row in rows],
        "start weights": [_start(row) for row in rows],
        "control": [row.control for row in rows],
        "n": [_count(row) for row in rows],
        "top-1 %": [_part(_spread(row, "top1", "{:.2f}"), row.evaluated) for row in rows],
        "test top-1 %": [_part(_spread(row, "test", "{:.2f}"), row.evaluated) for row in rows],
        "bits per character": [_spread(row, "bpc", "{:.4f}") for row in rows],
        "perplexity": [_spread(row, "perplexity", "{:.2f}") for row in rows],
        "paper top-1 %": [_published(top1.get(row.group)) for row in rows],
        **(_before_pruning(rows) if known.before_pruning else {}),
        "method - control": [_spread(row, "control", "{:+.2f}") for row in rows],
        f"against {known.baseline}": [_difference(known.differences.get(row.group)) for row in rows],
        "params left": [_params(row) for row in rows],
        "MACs": [_absolute(row, "macs/inference") for row in rows] if _several(rows, "macs/dense") else [],
        "MACs ratio": [_mean(row.stats.get("macs"), "{:.4f}") for row in rows],
        **_training(rows, known.over_dense),
        "latency ms": [_mean(row.stats.get("latency"), "{:.3g}") for row in rows],
        "wall time": [duration(row.stats["wall"].mean) if "wall" in row.stats else "" for row in rows],
        "front": ["*" if row.group in known.front else "" for row in rows],
    }
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    lines = [[to_ascii(cell) or "-" for cell in line] for line in zip(*kept.values(), strict=True)]
    return [to_ascii(name) for name in kept], lines


def _missed(row: Row) -> str:
    """Return the target that a run of the row has missed, and the row's mean value."""
    missed = next((run.summary for run in row.runs if run.summary.get("target/met") is False), None)
    if missed is None:
        return ""
    return f"{missed['target/unit']} {missed['target/asked']:g}: {stat_of(row, 'target/reached').mean:.4g}"


def _start(row: Row) -> str:
    """Return accuracy and zeros of the row's start weights; empty for fresh ones."""
    top1, zeros = (stat_of(row, key) for key in ("start/top1", "start/zeros"))
    if top1 is None or zeros is None:
        return ""
    told = _part(f"{top1.mean:.2f} %", row.evaluated)
    return f"{told}, {zeros.mean:.0%} zeros" if zeros.mean >= MANY_ZEROS else told


def _several(rows: Sequence[Row], key: str) -> bool:
    """Return whether ratios to a figure are ratios to different ones."""
    return len({found.mean for row in rows if (found := stat_of(row, key))}) > 1


def _absolute(row: Row, key: str) -> str:
    found = stat_of(row, key)
    return "" if found is None else quantity(found.mean)


def _training(rows: Sequence[Row], over_dense: Mapping[str, float]) -> dict[str, list[str]]:
    """Return training MACs as a ratio to a dense row if there is one; also absolute unless all rows have the ratio."""
    counted = [row for row in rows if "train" in row.stats]
    columns = {
        "train MACs": [_absolute(row, "macs/train") for row in rows],
        DENSE_ROW: [f"{over_dense[row.group]:.3f}" if row.group in over_dense else "" for row in rows],
    }
    return {DENSE_ROW: columns[DENSE_ROW]} if all(row.group in over_dense for row in counted) else columns


def _before_pruning(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Return each run's accuracy before pruning, the epochs before it, and the change since."""
    cells = []
    for row in rows:
        before, epochs = stat_of(row, "dense/top1"), {dense_epochs(run.summary) for run in row.runs}
        cells.append(f"{before.mean:.2f}{_std(before)} ({epochs_text(epochs.pop())})" if before and row.prunes else "")
    since = [_spread(row, "delta", "{:+.2f}") if cell else "" for row, cell in zip(rows, cells, strict=True)]
    return {"before pruning %": cells, "change since": since}


def legend(rows: Sequence[Row], findings: Findings) -> list[str]:
    """Return how to read the table."""
    lines = ["mean +- sample standard deviation over n finished runs; MACs ratio and % of params are to the row's own "
             "network, dense"]  # fmt: skip
    if findings.over_dense:
        lines.append(f"{DENSE_ROW}: training MACs of the whole run over those of the row dense of equal model, data "
                     "and schedule")  # fmt: skip
    if any(_start(row) for row in rows):
        lines.append("start weights: top-1 before training, and zeros, of the weights from a file that a row began "
                     "with (a row dense too); - fresh weights")  # fmt: skip
    if any("test" in row.stats for row in rows):
        lines.append("top-1 is of held-out training images where test top-1 is given; front and differences go by test "
                     "images")  # fmt: skip
    if any(_missed(row) for row in rows):
        lines.append(f"target missed: what was asked and what was reached, where a run ended over {TOLERANCE:g} off")
    if any(row.evaluated or row.trained for row in rows):
        lines.append("(N of M images): only a part was evaluated (top-1) or trained on in each epoch (schedule); such "
                     "rows are compared with their like alone")  # fmt: skip
    if any("control" in row.stats for row in rows):
        lines.append("method - control: top-1 of the method's own run minus that of its control, in points; above 0 "
                     "the method is better")  # fmt: skip
    if findings.before_pruning:
        lines.append("before pruning: the same run's network at the end of its own dense training, which may be "
                     "shorter than that of a row dense")  # fmt: skip
    if findings.baseline:
        lines.append(f"against {findings.baseline}: mean difference in points over runs of the same seed, "
                     f"{CONFIDENCE:.0%} confidence interval (Student's t; n pairs); ! it leaves out 0, not "
                     "corrected for the number of rows")  # fmt: skip
        lines += [f"- no row {findings.baseline} of {SAME} (here / there): {line}" for line in findings.unpaired]
    if findings.front:
        lines.append(f"front: * no other row of {SAME} has at least its accuracy for at most its "
                     f"{COST_NAMES[findings.cost]}, and one of them better")  # fmt: skip
    if any("latency" in row.stats for row in rows):
        lines.append("latency: PyTorch, batch 1, as prune-lab export measured it on its machine")
    return [*lines, *_mixed(rows)]


def _mixed(rows: Sequence[Row]) -> list[str]:
    """Return a line for every row whose runs share all options but not the machine or the versions."""
    lines = []
    for row in rows:
        kinds = {repr((run.summary.get("run/device"), run.summary.get("run/versions"))) for run in row.runs}
        if len(kinds) > 1:
            lines.append(f"note: the runs of {row.name} come from {len(kinds)} kinds of machine or package versions")
    return lines


def published_table(entries: Sequence[Beside]) -> tuple[list[str], list[list[str]], list[str]]:
    """Return columns, cells and remarks of published numbers beside those measured here."""
    header = ["recipe", "figure", "paper", "here", "here - paper", "read from"]
    cells, remarks = [], {}
    for entry in entries:
        std = "" if entry.std is None else f" +- {entry.std:g}"
        here = "" if entry.here is None else _number(entry.here.mean) + _std(entry.here)
        gap = "" if entry.here is None else f"{_number(entry.here.mean - entry.published, sign=True)}"
        mark = " *" if entry.changed else ""
        cells.append([entry.recipe + mark, entry.key, f"{entry.published:g}{std}", here or "-", gap or "-",
                      f"{entry.paper['cite']}, {entry.paper['where']} [{entry.paper['certainty']}]"])  # fmt: skip
        if entry.changed:
            remarks[entry.row.group, 0] = f"* {entry.recipe}: not the paper's experiment, changed: {entry.changed}"
        if entry.paper.get("remark"):
            remarks[entry.row.group, 1] = f"{entry.recipe}: {entry.paper['remark']}"
    return header, [[to_ascii(cell) for cell in line] for line in cells], list(remarks.values())


def unfinished(runs: Sequence[RunResult]) -> list[str]:
    """Return a line for every run without results; `running` may also mean killed."""
    left = [run for run in runs if not run.summary]
    words = {"running": "running or killed"}
    lines = [f"not finished, {len(left)} of {len(runs)} runs:"] if left else []
    for run in left:
        lines.append(f"  {words.get(run.status, run.status)}: {run.path}" + (f" ({run.error})" if run.error else ""))
    return lines


def _part(text: str, images: str | None) -> str:
    return f"{text} ({images} images)" if text and images else text


def _count(row: Row) -> str:
    return str(row.num_finished) if row.num_finished == row.num_runs else f"{row.num_finished} of {row.num_runs}"


def _spread(row: Row, metric: str, form: str) -> str:
    found = row.stats.get(metric)
    if found is None:
        return ""
    return form.format(found.mean) + _std(found) + ("" if found.n == row.num_finished else f" ({found.n})")


def _std(stat: Stat) -> str:
    return "" if stat.std is None else f" +- {stat.std:.2f}"


def _mean(stat: Stat | None, form: str) -> str:
    return "" if stat is None else form.format(stat.mean)


def _number(value: float, *, sign: bool = False) -> str:
    text = quantity(abs(value)) if abs(value) >= 1000 else f"{abs(value):.4g}"
    return ("-" if value < 0 else "+" if sign else "") + text


def _params(row: Row) -> str:
    count, ratio = row.stats.get("params"), row.stats.get("params_ratio")
    if count is None:
        return ""
    return quantity(count.mean) + ("" if ratio is None else f" ({ratio.mean:.1%})")


def _published(entry: Beside | None) -> str:
    if entry is None:
        return ""
    std = "" if entry.std is None else f" +- {entry.std:.2f}"
    certainty = entry.paper["certainty"]
    doubt = f" [{certainty}]" if certainty in ("memory", "derived") else ""
    return f"{entry.published:.2f}{std}{doubt}" + (" *" if entry.changed else "")


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return ""
    if difference.half_width is None:
        return f"{difference.mean:+.2f} (1)"
    mark = " !" if difference.excludes_zero else ""
    return f"{difference.mean:+.2f} +- {difference.half_width:.2f} ({difference.n}){mark}"
