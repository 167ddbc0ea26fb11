"""Which rows of a table may be compared with each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from prune_lab.commands.compare.kinds import within

if TYPE_CHECKING:
    from prune_lab.commands.compare.groups import Row


def circles(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the largest sets of mutually comparable rows; a row may be in several."""
    by_task: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        by_task[row.kind.options, row.kind.evaluated].append(row)
    return [circle for members in by_task.values() for circle in _circles_of(members)]


def _circles_of(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the sets of comparable rows among those that differ only in their schedules."""
    found: list[tuple[set[str], list[Row]]] = []
    for kind in dict.fromkeys(row.kind for row in rows):
        for members in (
            [row for row in rows if within(row.kind, kind)],
            [row for row in rows if row.kind.total is not None and row.kind.total == kind.total],
        ):
            names = {row.group for row in members}
            if names and not any(names <= known for known, _ in found):
                found = [entry for entry in found if not entry[0] <= names] + [(names, members)]
    return [members for _, members in found]


def peers(row: Row, others: Sequence[Row]) -> list[Row]:
    """Return the rows comparable with `row`: those of the same schedule if there are any, else of equal length.

    The row itself is one of them if it is among `others`.
    """
    return _nearest(row, [other for other in others if other.kind.fits(row.kind)])


def training_peers(row: Row, others: Sequence[Row]) -> list[Row]:
    """Return the same for training costs, which do not depend on the images evaluated."""
    return _nearest(row, [other for other in others if other.kind.trains_like(row.kind)])


def _nearest(row: Row, fitting: list[Row]) -> list[Row]:
    return [other for other in fitting if other.kind.has_schedule_of(row.kind)] or fitting
