"""Differences to a baseline, paired over seeds, with a confidence interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prune_lab.commands.compare.conditions import Condition
from prune_lab.commands.compare.groups import METRICS, Row, stat
from prune_lab.commands.compare.peers import peers, training_peers
from prune_lab.foundations.errors import UserError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Mean of `n` differences between runs of the same seed."""

    mean: float
    half_width: float | None
    """of the confidence interval; None with a single pair, whose spread is unknown"""
    n: int

    @property
    def excludes_zero(self) -> bool:
        return bool(self.half_width) and abs(self.mean) > self.half_width  # equal differences show no spread


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Return `values` minus `baseline` over their common seeds, None without any.

    The interval is Student's t with n - 1 degrees of freedom on the differences. Runs of one seed share initial
    weights and data order, so pairing removes their common variation.
    """
    gaps = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    if not gaps:
        return None
    found = stat(gaps)
    if found.std is None:
        return Difference(found.mean, None, 1)
    from scipy.special import stdtrit

    quantile = float(stdtrit(found.n - 1, 0.5 + CONFIDENCE / 2))
    return Difference(found.mean, quantile * found.std / math.sqrt(found.n), found.n)


def differences(rows: Sequence[Row], conditions: Sequence[Condition], metric: str) -> dict[str, Difference]:
    """Return group -> difference in `metric` to the baseline that the row is comparable with.

    Rows without such a baseline among `rows` are left out, as are the baselines themselves.

    Raises:
        UserError: no row satisfies the conditions, or several rows that are comparable with each other do.
    """
    baselines = find_baselines(rows, conditions)
    found = {}
    for row in rows:
        fitting = peers(row, baselines)
        if len(fitting) == 1 and fitting[0] is not row:
            difference = paired(by_seed(row, metric), by_seed(fitting[0], metric))
            if difference is not None:
                found[row.group] = difference
    return found


def find_baselines(rows: Iterable[Row], conditions: Sequence[Condition]) -> list[Row]:
    """Return the rows that satisfy the conditions; no two of them are comparable with each other.

    Raises:
        UserError: as `differences`.
    """
    typed = f"--baseline {' '.join(condition.typed for condition in conditions)}"
    found: list[Row] = []
    for row in rows:
        if all(condition.holds(row.runs[0]) for condition in conditions):
            for other in peers(row, found):
                raise UserError(f"{typed}: two rows of {' on '.join(row.labels[1:3])} are such ({_described(other)}; "
                                  f"{_described(row)}); add conditions until one is left")  # fmt: skip
            found.append(row)
    if not found:
        raise UserError(f"{typed}: no row is such")
    return found


def without_baseline(rows: Sequence[Row], baselines: Sequence[Row]) -> list[str]:
    """Return why rows have no baseline: one line per reason, with its rows."""
    found: dict[str, list[str]] = {}
    for row in rows:
        fitting = peers(row, baselines)
        if len(fitting) != 1:
            reason = f"{len(fitting)} rows are such" if fitting else _nearest_miss(row, baselines)
            found.setdefault(reason, []).append(row.name)
    return [f"{', '.join(names)}: {reason}" for reason, names in found.items()]


def _nearest_miss(row: Row, baselines: Sequence[Row]) -> str:
    """Return the differences of `row` from the most similar baseline."""
    unlike = min((row.kind.unlike(baseline.kind) for baseline in baselines), key=len)
    return f"{', '.join(unlike[:4])}{', ...' if len(unlike) > 4 else ''}"


def over_dense(rows: Sequence[Row]) -> dict[str, float]:
    """Return group -> training MACs over those of the comparable dense row, if there is one.

    Several such rows count if they cost the same.
    """
    dense = [row for row in rows if row.labels[0] == "dense" and row.stats.get("train")]
    found = {}
    for row in rows:
        costs = {round(other.stats["train"].mean) for other in training_peers(row, dense)}
        if "train" in row.stats and len(costs) == 1 and (cost := costs.pop()):
            found[row.group] = row.stats["train"].mean / cost
    return found


def _described(row: Row) -> str:
    return f"{row.name} schedule={row.labels[3]}"


def by_seed(row: Row, metric: str) -> dict[int, float]:
    """Return seed -> value of a short name of METRICS, of the runs that have both."""
    key = METRICS[metric]
    return {
        run.seed: run.summary[key] for run in row.runs if run.seed is not None and run.summary.get(key) is not None
    }
