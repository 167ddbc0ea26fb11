"""The rows that no other row beats in both accuracy and cost."""

from __future__ import annotations

from collections.abc import Sequence

from prune_lab.commands.compare.groups import COSTS, Row, stat_of
from prune_lab.commands.compare.peers import circles


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


def front_lines(rows: Sequence[Row], metric: str, cost: str) -> list[tuple[list[Row], list[Row]]]:
    """Return each set of two or more comparable rows with those on its Pareto front, by ascending cost.

    Args:
        metric: short name of METRICS, higher is better.
        cost: short name of COSTS, lower is better. Means over seeds count for both.
    """
    points = {}
    for row in rows:
        value = stat_of(row, COSTS[cost])
        if metric in row.stats and value is not None and row.control in ("", "none"):
            points[row.group] = row.stats[metric].mean, value.mean
    lines = []
    for circle in circles(row for row in rows if row.group in points):
        if len(circle) > 1:
            flags = pareto([points[row.group] for row in circle])
            best = [row for row, on_front in zip(circle, flags, strict=True) if on_front]
            lines.append((circle, sorted(best, key=lambda row: points[row.group][1])))
    return lines


def fronts(rows: Sequence[Row], metric: str, cost: str) -> set[str]:
    """Return the groups that no comparable row beats; rows that are comparable with no other have no front.

    Args:
        metric, cost: as for `front_lines`.
    """
    lines = front_lines(rows, metric, cost)
    beaten = {row.group for circle, best in lines for row in circle if row not in best}
    return {row.group for _, best in lines for row in best} - beaten
