"""Runs as their files tell them: found under folders and patterns, read without torch, failed ones included."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_lab.files import read_json
from prune_lab.schema import ConfigError

_MARKS = ("status.json", "summary.json", "run.json")
"""a directory with one of these is a run's"""
_NOT_RUNS = {"phases", "wandb"}


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
    """empty unless the run is finished; with params/ratio, and latency/* of its export, which are worked out here"""
    config: dict[str, Any]
    """resolved options; empty if run.json is missing"""


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
        latency = _latency(_read_optional(path / "export" / "export.json"))
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
        summary=_with_ratio(summary) | latency if state == "finished" else {},
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


def _latency(record: dict[str, Any]) -> dict[str, float]:
    """Return what prune-lab export measured in PyTorch at its smallest batch size: the runtime every export times."""
    rows = [row for row in (record.get("latency") or {}).get("rows", ()) if row["runtime"] == "PyTorch"]
    if not rows:
        return {}
    row = min(rows, key=lambda entry: entry["batch"])
    dense = row["dense"]["median_s"]
    finished = row["pruned"]["median_s"] if "pruned" in row else dense
    return {"latency/ms": 1000 * finished, "latency/ratio": finished / dense, "latency/batch": row["batch"]}


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


def flat_options(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every option of a resolved configuration under its dotted name."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flat_options(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
