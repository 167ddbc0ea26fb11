"""Reporting of a run: the sink protocol and the tracker that feeds several sinks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class RunInfo:
    """Identity of one run, as passed to every sink."""

    run_dir: Path
    run_id: str
    """unique and stable: the same command has the same id, so that a copy elsewhere is resumed, not duplicated"""
    name: str
    group: str
    """the same for runs that differ only in the seed"""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    """resolved options as plain containers"""
    plan: list[dict[str, Any]] = field(default_factory=list)
    """phases in order: {name, epochs: of the schedule, length: of the phase as text, ...}"""


class Sink(Protocol):
    """A destination for a run's reports. Calls come in this order: start, then the others in any order, then finish.

    `message` and `progress` may come before `start`, or without it if the run is already finished.
    """

    label: str
    """how messages name the sink"""

    def start(self, info: RunInfo) -> None:
        """Start the run, or restart it after an interruption; all its records follow, including earlier ones."""

    def log(self, record: dict[str, Any], *, replayed: bool = False) -> None:
        """Log one record: `phase`, `epoch`, `global_step`, then flat keys.

        Args:
            replayed: it was measured by an earlier call of the same run or by another run that shares the phase.
        """

    def layers(self, rows: list[dict[str, Any]]) -> None:
        """Log the per-layer table."""

    def summary(self, summary: dict[str, Any]) -> None:
        """Log the flat final result."""

    def message(self, text: str) -> None:
        """Show one line to the reader."""

    def progress(self, done: int, total: int, text: str) -> None:
        """Show the position within the phase `text`: `done` of `total` optimizer steps."""

    def finish(self, status: str, error: str | None) -> None:
        """End the run: `finished`, `failed` or `interrupted`; `error` is one line."""


class BaseSink:
    """Ignores everything; sinks override what they use."""

    label = "files"
    """how messages name the sink"""

    def start(self, info: RunInfo) -> None: ...
    def log(self, record: dict[str, Any], *, replayed: bool = False) -> None: ...
    def layers(self, rows: list[dict[str, Any]]) -> None: ...
    def summary(self, summary: dict[str, Any]) -> None: ...
    def message(self, text: str) -> None: ...
    def progress(self, done: int, total: int, text: str) -> None: ...
    def finish(self, status: str, error: str | None) -> None: ...


class Tracker:
    """Passes every call to its sinks in order: local files first, then copies elsewhere.

    The caller handles an error of a local sink (a full disk). An error of a copy is reported once, in one line, and
    that copy receives nothing more. It can be recreated from the local files, so it never stops a run.
    """

    def __init__(self, local: Iterable[Sink] = ()) -> None:
        self._local = list(local)
        self._copies: list[Sink] = []

    def add_local(self, sink: Sink) -> None:
        """Add a sink whose errors end the run."""
        self._local.append(sink)

    def add_copy(self, sink: Sink) -> None:
        """Add a sink whose errors do not affect the run."""
        self._copies.append(sink)

    def start(self, info: RunInfo) -> None:
        self._each(lambda sink: sink.start(info))

    def log(self, record: dict[str, Any], *, replayed: bool = False) -> None:
        self._each(lambda sink: sink.log(record, replayed=replayed))

    def layers(self, rows: list[dict[str, Any]]) -> None:
        self._each(lambda sink: sink.layers(rows))

    def summary(self, summary: dict[str, Any]) -> None:
        self._each(lambda sink: sink.summary(summary))

    def message(self, text: str) -> None:
        self._each(lambda sink: sink.message(text))

    def progress(self, done: int, total: int, text: str) -> None:
        self._each(lambda sink: sink.progress(done, total, text))

    def finish(self, status: str, error: str | None = None) -> None:
        """End the run in every sink, even if one of the local ones fails; its error is raised at the end."""
        failures = []
        for sink in self._local:
            try:
                sink.finish(status, error)
            except OSError as failure:
                failures.append(failure)
        self._copy(lambda sink: sink.finish(status, error))
        if failures:
            raise failures[0]

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in self._local:
            call(sink)
        self._copy(call)

    def _copy(self, call: Callable[[Sink], None]) -> None:
        for sink in list(self._copies):
            try:
                call(sink)
            except Exception as error:  # a copy must never stop training
                self._copies.remove(sink)
                reason = " ".join(str(error).split()) or type(error).__name__
                self.message(
                    f"{sink.label} copy stopped: {reason}. The run goes on; its files are complete, "
                    "and prune-lab wandb-sync sends them later"
                )
