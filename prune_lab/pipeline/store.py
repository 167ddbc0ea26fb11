"""Phases on disk: one directory per key, one writer at a time, finished ones shared by all runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from prune_lab.core.phase_result import PhaseResult
from prune_lab.foundations import checkpoint
from prune_lab.foundations.files import SaveError, read_json, write_json
from prune_lab.foundations.locks import lock
from prune_lab.tracking.jsonl import append_record, read_records, rewrite


class PhaseStore:
    """The directory of one phase: `phase.json`, `metrics.jsonl`, `result.pt`, and checkpoints while it is running."""

    def __init__(self, output_dir: Path, key: str, report: Callable[[str], None]) -> None:
        self.directory = output_dir / "phases" / key
        self.key = key
        self.checkpoints = checkpoint.CheckpointPair(self.directory, report)
        self._report = report

    def lock(self, *, what: str, poll: Callable[[], None]):
        return lock(self.directory / "lock", what=what, report=self._report, poll=poll)

    def load(self) -> PhaseResult | None:
        """Return the result of the finished phase; None: it is missing or damaged, and the phase must run again."""
        figures = self._figures()
        if figures is None:
            return None
        try:
            tensors = checkpoint.load(self.directory / "result.pt")
        except checkpoint.DamagedFile as error:
            self._report(f"{error}; the phase is done again")
            (self.directory / "phase.json").unlink(missing_ok=True)
            (self.directory / "result.pt").unlink()
            return None
        return PhaseResult(**tensors, figures=figures)

    def _figures(self) -> dict[str, Any] | None:
        path = self.directory / "phase.json"
        if not path.exists() or not (self.directory / "result.pt").exists():
            return None
        try:
            return read_json(path)["figures"]
        except (ValueError, KeyError, TypeError):
            self._report(f"{path} is damaged; the phase is done again")
            return None

    def finish(self, result: PhaseResult, inputs: dict[str, Any]) -> None:
        """Store the result; the phase counts as finished after the last rename."""
        checkpoint.save(result.tensors(), self.directory / "result.pt")
        write_json(self.directory / "phase.json", {"key": self.key, "inputs": inputs, "figures": result.figures})
        self.checkpoints.remove()

    def records(self) -> list[dict[str, Any]]:
        path = self.directory / "metrics.jsonl"
        return read_records(path) if path.exists() else []

    def begin(self, epochs_done: int) -> list[dict[str, Any]]:
        """Drop records after `epochs_done`, which are repeated, and a killed writer's leftovers; return those kept.

        Epochs decide, not steps: a checkpoint may follow the last step of an epoch whose record is still to come.
        """
        kept = [record for record in self.records() if record["epoch"] <= epochs_done]
        for leftover in self.directory.glob("*.tmp"):
            leftover.unlink()
        rewrite(self.directory / "metrics.jsonl", kept)
        return kept

    def append(self, record: dict[str, Any]) -> None:
        """Append a record.

        Raises:
            SaveError: the disk refused.
        """
        path = self.directory / "metrics.jsonl"
        try:
            append_record(path, record)
        except OSError as error:
            raise SaveError(error.errno, f"cannot write {path}: {error.strerror}") from error
