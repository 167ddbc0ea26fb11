"""Records of a row's runs during training, averaged over seeds: metrics.jsonl and layers.json."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_lab.commands.compare.groups import Row, Stat, stat
from prune_lab.foundations.files import read_json
from prune_lab.tracking.jsonl import read_records


@dataclass(frozen=True)
class Point:
    """One position in the course of a row's runs: the end of an epoch, or a pruning between two."""

    phase: str
    epoch: int
    """as recorded, within the phase; 0: before its training"""
    epochs: float
    """epochs trained since the run began, over all phases; mean over the runs"""
    macs: float | None
    """training MACs since the run began, mean over the runs"""
    values: dict[str, Stat]


@dataclass(frozen=True)
class Course:
    """The records of a row."""

    row: Row
    points: list[Point]
    densities: dict[str, Stat]
    """by layer, in the network's order"""


def is_kept(key: str) -> bool:
    """Return whether a key of a record is shown in a figure; figures per layer are left out."""
    whole = ("eval/top1", "sparsity", "channels/kept", "weights/overlap")
    return key in whole or (key.startswith("mask/") and key.count("/") == 1)


def read_course(row: Row, note: Callable[[str], None]) -> Course:
    """Return the records of the row's finished runs; `note` is called with reading errors."""
    records = [_read(read_records, run.path / "metrics.jsonl", note) for run in row.runs]
    tables = [_read(read_json, run.path / "layers.json", note) for run in row.runs]
    return Course(row, trajectory(filter(None, records)), densities(filter(None, tables)))


def _read(reader: Callable[[Path], Any], path: Path, note: Callable[[str], None]) -> list[dict[str, Any]]:
    try:
        content = reader(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        note(f"not in the figures: {path} ({reason})")
        return []
    if isinstance(content, list) and all(isinstance(entry, dict) for entry in content):
        return content
    note(f"not in the figures: {path} (no list of records)")
    return []


def trajectory(runs: Iterable[Sequence[dict[str, Any]]]) -> list[Point]:
    """Return the positions in the course of `runs`, each with mean and std over the runs that reached it, in order.

    A position is an epoch of a phase. Epochs are counted over the whole run, and every record of a trained epoch adds
    one: a method that rewinds trains an epoch of the same number again.
    """
    places: dict[tuple[str, int], list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    for records in runs:
        trained = 0
        for record in records:
            phase, epoch = record.get("phase"), record.get("epoch")
            if phase is None or epoch is None or phase == "final":
                continue
            trained += epoch > 0
            places[phase, epoch].append((trained, record))
    points = [_point(phase, epoch, visits) for (phase, epoch), visits in places.items()]
    return sorted(points, key=lambda point: point.epochs)  # stable: a pruning stays after the preceding epoch


def _point(phase: str, epoch: int, visits: Sequence[tuple[int, dict[str, Any]]]) -> Point:
    records = [record for _, record in visits]
    keys = dict.fromkeys(key for record in records for key in record if is_kept(key))
    values = {key: _numbers(records, key) for key in keys}
    macs = _numbers(records, "macs/train")
    return Point(
        phase=phase,
        epoch=epoch,
        epochs=stat([trained for trained, _ in visits]).mean,
        macs=stat(macs).mean if macs else None,
        values={key: stat(found) for key, found in values.items() if found},
    )


def _numbers(records: Sequence[dict[str, Any]], key: str) -> list[float]:
    """Return the finite numbers under `key`; a diverged loss is null there."""
    found = [record.get(key) for record in records]
    return [value for value in found if isinstance(value, (int, float)) and math.isfinite(value)]


def densities(tables: Iterable[Sequence[dict[str, Any]]]) -> dict[str, Stat]:
    """Return layer -> kept fraction of its weights; mean and std over the tables of layers that have the layer."""
    found: dict[str, list[float]] = defaultdict(list)
    for table in tables:
        for layer in table:
            found[str(layer.get("name"))] += _numbers([layer], "density")
    return {name: stat(values) for name, values in found.items() if values}
