"""Runs read from their files: found under folders and patterns, read without torch, including failed ones."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.files import read_object

_MARKS = ("status.json", "summary.json", "run.json")
"""a directory with one of these is a run's"""
_NOT_RUNS = {"phases", "wandb"}


@dataclass(frozen=True)
class RunResult:
    """One run, read from its files."""

    path: Path
    status: str
    error: str | None
    group: str
    """equal for runs that differ only in the seed"""
    seed: int | None
    summary: dict[str, Any]
    """empty unless the run is finished; with params/kept, params/ratio, accuracy/test and latency/*, computed
    here"""
    config: dict[str, Any]
    """resolved options; empty if run.json is missing"""

    def options(self, group: str) -> dict[str, Any]:
        """Return the options of a group such as `model`; empty if they are unknown."""
        found = self.config.get(group)
        return found if isinstance(found, dict) else {}

    @property
    def phases(self) -> list[dict[str, Any]]:
        """The training phases of a finished run: name, epochs and more; empty if they are unknown."""
        return [phase for phase in self.summary.get("phases") or () if phase.get("epochs")]


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """Return the run directories that `paths` are, contain or match (shell patterns), each once, sorted by name.

    Raises:
        UserError: a path that does not exist, or one without runs.
    """
    found: dict[Path, None] = {}
    for path in paths:
        matches = sorted(glob.glob(os.fspath(path))) if not os.path.exists(path) else [os.fspath(path)]
        if not matches:
            raise UserError(f"{path}: no such run or folder")
        below = [run for match in matches for run in _below(match)]
        if not below:
            raise UserError(f"no runs in {path}")
        found.update(dict.fromkeys(below))
    return list(found)


def _below(directory: str) -> Iterator[Path]:
    if _is_run(directory):
        yield Path(directory)
    elif os.path.isdir(directory):
        with os.scandir(directory) as entries:
            found = sorted((entry.name, entry.is_symlink()) for entry in entries if entry.is_dir())
        for name, is_link in found:
            path = os.path.join(directory, name)
            if name not in _NOT_RUNS and (not is_link or _is_run(path)):  # other links may form cycles
                yield from _below(path)


def _is_run(directory: str) -> bool:
    return any(os.path.exists(os.path.join(directory, name)) for name in _MARKS)


def read_runs(paths: Iterable[str | Path]) -> list[RunResult]:
    """Return the runs found under `paths`, failed and unfinished ones included.

    Raises:
        UserError: as `find_runs`.
    """
    return [_read_run(path) for path in find_runs(paths)]


def _read_run(path: Path) -> RunResult:
    try:
        return _as_result(path)
    except (ValueError, OSError, RecursionError) as error:
        return RunResult(path, "unreadable", " ".join(str(error).split()), str(path), None, {}, {})


def _as_result(path: Path) -> RunResult:
    run, summary, status = (_read_optional(path, name) for name in ("run.json", "summary.json", "status.json"))
    config = run.get("config") or {}
    _check(summary, status, config)
    state = status.get("status") or summary.get("status") or "unknown"
    if state == "finished" and not summary:
        state = "without summary.json"
    exported = _read_optional(path, "export/export.json")
    worked_out = _ratio(summary) | _accuracy(summary, config) | _control(summary) | _latency(exported)
    return RunResult(
        path=path,
        status=state,
        error=status.get("error"),
        group=summary.get("run/group") or run.get("group") or str(path),
        seed=summary.get("run/seed", config.get("seed")),
        summary=summary | worked_out if state == "finished" else {},
        config=config,
    )


_KINDS = {"status": str, "run/id": str, "run/group": str, "run/command": str, "run/seed": int}


def _check(summary: dict[str, Any], status: dict[str, Any], config: Any) -> None:
    """Raise ValueError, naming file and key, for values that no run of this program writes."""
    for key, value in summary.items():
        kind = _KINDS.get(key)
        if kind and not (isinstance(value, kind) and not isinstance(value, bool)):
            raise ValueError(f"summary.json: {key} is {value!r}")
        if key.startswith(_NUMBERS) and key.count("/") == 1 and not _is_number(value):
            raise ValueError(f"summary.json: {key} is {value!r}, no number")
    phases = summary.get("phases") or []
    if not isinstance(phases, list) or not all(isinstance(phase, dict) and _is_number(phase.get("epochs"))
                                               for phase in phases):  # fmt: skip
        raise ValueError("summary.json: phases is no list of phases with epochs")
    if not all(isinstance(status.get(key), (str, type(None))) for key in ("status", "error")):
        raise ValueError(f"status.json holds {status!r}")
    if not isinstance(config, dict) or not isinstance(config.get("seed"), (int, type(None))):
        raise ValueError("run.json: config is no group of options with a seed")
    paper, keys = config.get("paper"), {"cite", "where", "certainty", "values", "std"}
    if paper is not None and not (isinstance(paper, dict) and keys <= {*paper}):
        raise ValueError("run.json: config.paper is not what a recipe has")


_NUMBERS = ("final/", "test/", "dense/", "delta/", "params/", "macs/", "sparsity/", "time/", "data/num_",
            "train/", "control/method_top1", "control/method_minus")  # fmt: skip
"""beginnings of the keys whose values are numbers"""


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value))


def _read_optional(run: Path, name: str) -> dict[str, Any]:
    try:
        return read_object(run / name)
    except ValueError as error:  # the run is named beside it
        raise ValueError(str(error).removeprefix(f"{run}/")) from error


def _ratio(summary: dict[str, Any]) -> dict[str, float]:
    """Return the remaining parameters, which older versions stored only under params/nonzero."""
    left, dense = summary.get("params/kept", summary.get("params/nonzero")), summary.get("params/dense")
    found = {} if left is None else {"params/kept": left}
    return found | {"params/ratio": left / dense} if found and dense else found


def _accuracy(summary: dict[str, Any], config: dict[str, Any]) -> dict[str, float]:
    """Return the top-1 on test images: with dataset.validation the final one is on held-out training images."""
    held_out = "test/top1" in summary or (config.get("dataset") or {}).get("validation")
    value = summary.get("test/top1" if held_out else "final/top1")
    return {} if value is None else {"accuracy/test": value}


def _control(summary: dict[str, Any]) -> dict[str, float]:
    """Return the method's advantage over its control, in points; runs before this key have the two accuracies."""
    method, control = summary.get("control/method_top1"), summary.get("final/top1")
    return {} if method is None or control is None else {"control/method_minus_control": method - control}


def _latency(record: dict[str, Any]) -> dict[str, float]:
    """Return the latency of prune-lab export in PyTorch, the runtime that every export times, at batch size 1."""
    try:
        for row in (record.get("latency") or {}).get("rows", ()):
            if row["runtime"] == "PyTorch" and row["batch"] == 1:
                dense = row["dense"]["median_s"]
                finished = row["pruned"]["median_s"] if "pruned" in row else dense
                return {"latency/ms": 1000 * finished, "latency/ratio": finished / dense}
    except (TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"export/export.json: {type(error).__name__}: {error}") from error
    return {}


def without_copies(runs: Iterable[RunResult]) -> tuple[list[RunResult], list[str]]:
    """Return the runs, each finished one once, even if its directory was copied, and a note on every copy."""
    kept: list[RunResult] = []
    first: dict[str, Path] = {}
    notes: list[str] = []
    for run in runs:
        key = run.summary.get("run/id")
        if key is not None and key in first:
            notes.append(f"{run.path} is a copy of {first[key]} (same run/id) and is not counted")
            continue
        if key is not None:
            first[key] = run.path
        kept.append(run)
    return kept, notes


def flat_options(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every option of a resolved configuration under its dotted name."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flat_options(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
