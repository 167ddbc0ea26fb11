"""Differences to a baseline, paired over seeds, with a confidence interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prune_lab.compare.conditions import Condition
from prune_lab.compare.groups import METRICS, Row, stat
from prune_lab.schema import ConfigError

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
        return bool(self.half_width) and abs(self.mean) > self.half_width  # equal differences tell no spread


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Return `values` minus `baseline` over the seeds that both have, None without any.

    The interval is Student's t with n - 1 degrees of freedom on the differences: runs of one seed share initial
    weights and data order, so that pairing removes what they have in common.
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
    """Return group -> difference in `metric` to the baseline of the same data set and model.

    Rows whose data set and model have no baseline among `rows` are left out, as is the baseline itself.

    Raises:
        ConfigError: no row satisfies the conditions, or several rows of one data set and model do.
    """
    baselines = find_baselines(rows, conditions)
    found = {}
    for row in rows:
        baseline = baselines.get(row.labels[1:3])
        if baseline is not None and baseline is not row:
            difference = paired(by_seed(row, metric), by_seed(baseline, metric))
            if difference is not None:
                found[row.group] = difference
    return found


def find_baselines(rows: Iterable[Row], conditions: Sequence[Condition]) -> dict[tuple[str, str], Row]:
    """Return (model, data set) -> the one row there that satisfies the conditions."""
    typed = f"--baseline {' '.join(condition.typed for condition in conditions)}"
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        if not all(condition.holds(row.runs[0]) for condition in conditions):
            continue
        other = found.setdefault(row.labels[1:3], row)
        if other is not row:
            raise ConfigError(f"{typed}: two rows of {' on '.join(row.labels[1:3])} are such ({_told(other)}; "
                              f"{_told(row)}); add conditions until one is left")  # fmt: skip
    if not found:
        raise ConfigError(f"{typed}: no row is such")
    return found


def _told(row: Row) -> str:
    return f"{row.name} schedule={row.labels[3]}"


def by_seed(row: Row, metric: str) -> dict[int, float]:
    """Return seed -> value of a short name of METRICS, of the runs that have both."""
    key = METRICS[metric]
    return {
        run.seed: run.summary[key] for run in row.runs if run.seed is not None and run.summary.get(key) is not None
    }
