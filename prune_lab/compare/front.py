"""Which rows no other one beats in both accuracy and cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from prune_lab.compare.groups import COSTS, Row, stat_of


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return for each (accuracy, cost) whether no other point is at least as good in both and better in one."""
    order = sorted(range(len(points)), key=lambda index: (points[index][1], -points[index][0]))
    on_front, best, cost_of_best = [False] * len(points), float("-inf"), None
    for index in order:
        accuracy, cost = points[index]
        on_front[index] = accuracy > best or (accuracy == best and cost == cost_of_best)
        if accuracy > best:
            best, cost_of_best = accuracy, cost
    return on_front


def fronts(rows: Sequence[Row], metric: str, cost: str) -> set[str]:
    """Return the groups on the Pareto front of their data set; data sets with a single row have none.

    Args:
        metric: short name of METRICS, higher is better.
        cost: short name of COSTS, lower is better. Means over seeds count for both.
    """
    candidates = defaultdict(list)
    for row in rows:
        value = stat_of(row, COSTS[cost])
        if metric in row.stats and value is not None and row.control in ("", "none"):
            candidates[row.labels[2]].append((row.group, (row.stats[metric].mean, value.mean)))
    found = set()
    for entries in candidates.values():
        if len(entries) > 1:
            flags = pareto([point for _, point in entries])
            found |= {group for (group, _), on_front in zip(entries, flags, strict=True) if on_front}
    return found
