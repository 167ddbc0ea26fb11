"""How a run in another process ended, as a file that its launcher reads."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_lab.foundations.files import read_json

STOP = "stop"
"""name of the file, in a sweep's folder, that holds the number of the signal that stops it"""


@dataclass(frozen=True)
class Outcome:
    """How one run of a sweep ended."""

    number: int
    """position in the sweep, from 0"""
    code: int
    """0: finished; above signals.STOPPED: stopped by a signal"""
    error: str = ""
    """one line, if it failed in its own process"""
    trained: int = 0
    """number of phases trained; likewise `reused`"""
    reused: int = 0


def log_path(folder: Path, number: int) -> Path:
    return folder / f"run-{number + 1}.log"


def outcome_path(folder: Path, number: int) -> Path:
    return folder / f"run-{number + 1}.json"


def read_outcome(folder: Path, number: int) -> Outcome | None:
    """Return the outcome of run `number`, None if it left none."""
    path = outcome_path(folder, number)
    return Outcome(**read_json(path)) if path.exists() else None


class Twice(io.TextIOBase):
    """Writes to a file and keeps a copy of the text."""

    def __init__(self, log: Any, kept: io.StringIO) -> None:
        self._log, self._kept = log, kept

    def write(self, text: str) -> int:
        self._log.write(text)
        return self._kept.write(text)
