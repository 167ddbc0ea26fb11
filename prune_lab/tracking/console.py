"""Output of a run in progress: rich on a terminal, one plain line per epoch elsewhere, the same in log.txt."""

from __future__ import annotations

import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from prune_lab.tracking.base import BaseSink, RunInfo
from prune_lab.tracking.lines import epoch_line, plan_lines, summary_lines, summary_rows, to_ascii

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def console(stream: TextIO | None = None) -> BaseSink:
    """Return the sink that fits `stream` (default: standard output)."""
    stream = sys.stdout if stream is None else stream
    if stream.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return RichConsole(stream)
    return PlainConsole(stream)


class _Lines(BaseSink, ABC):
    """Turns every call into lines of text for `_write`."""

    def __init__(self) -> None:
        self._epochs: dict[str, int] = {}

    @abstractmethod
    def _write(self, line: str) -> None:
        """Write one line."""

    def start(self, info: RunInfo) -> None:
        self._epochs = {phase["name"]: phase.get("epochs") or 0 for phase in info.plan}
        for line in plan_lines(info):
            self._write(line)

    def log(self, record: dict[str, Any], *, replayed: bool = False) -> None:
        line = None if replayed else epoch_line(record, self._epochs)
        if line is not None:
            self._write(line)

    def summary(self, summary: dict[str, Any]) -> None:
        for line in summary_lines(summary):
            self._write(line)

    def message(self, text: str) -> None:
        self._write(text)

    def finish(self, status: str, error: str | None) -> None:
        self._write(status + (f": {error}" if error else ""))


class _Forgiving:
    """A stream that ignores the loss of its reader (a closed pipe, a lost terminal); the run continues."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._gone = False

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, call: Callable[[], Any]) -> None:
        if self._gone:
            return
        try:
            call()
        except (OSError, ValueError):
            self._gone = True
            _silence(self._stream)


class PlainConsole(_Lines):
    """Flushed ASCII lines."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = _Forgiving(stream)

    def _write(self, line: str) -> None:
        self._stream.write(to_ascii(line) + "\n")
        self._stream.flush()


class LogFile(_Lines):
    """Appends the lines to log.txt in the run directory, with the time; lines before `start` are held back."""

    def __init__(self) -> None:
        super().__init__()
        self._path: Path | None = None
        self._waiting: list[str] = []

    def start(self, info: RunInfo) -> None:
        self._path = info.run_dir / "log.txt"
        super().start(info)

    def _write(self, line: str) -> None:
        self._waiting.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {to_ascii(line)}\n")
        if self._path is not None:
            with open(self._path, "a", encoding="ascii") as file:  # reopened: lines may come after `finish`
                file.writelines(self._waiting)
            self._waiting.clear()


class RichConsole(_Lines):
    """Epoch lines scroll above a live bar with speed and remaining time of the phase; a table ends the run."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        super().__init__()
        file: Any = _Forgiving(stream)  # rich needs no more of a stream than this one has
        self._console = Console(file=file, highlight=False, markup=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._phase: str | None = None
        self._batch_size: int | None = None

    def start(self, info: RunInfo) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        super().start(info)
        self._batch_size = info.config.get("schedule", {}).get("batch_size")
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(compact=True),
        )
        self._progress = Progress(*columns, console=self._console, transient=True)

    def progress(self, done: int, total: int, text: str) -> None:
        if self._progress is None:
            return
        if self._task is None or text != self._phase:
            self._task = self._begin(self._progress, done, total, text)
        task = self._progress.tasks[0]
        speed = task.speed or 0.0
        shown = f"{speed * self._batch_size:.0f} img/s" if self._batch_size else f"{speed:.1f} steps/s"
        self._progress.update(self._task, completed=done, speed=shown if speed else "")

    def _begin(self, progress: Progress, done: int, total: int, text: str) -> TaskID:
        """Give the phase `text` a fresh bar: speed counts from `done`, where a resumed phase begins."""
        if self._task is not None:
            progress.remove_task(self._task)
        task = progress.add_task(to_ascii(text), total=total, completed=done, speed="")
        self._phase = text
        progress.start()
        return task

    def summary(self, summary: dict[str, Any]) -> None:
        from rich import box
        from rich.table import Table

        self._stop()
        table = Table(box=box.ASCII, show_header=False)
        for name, text in summary_rows(summary):
            table.add_row(to_ascii(name), to_ascii(text))
        self._console.print(table)

    def finish(self, status: str, error: str | None) -> None:
        self._stop()
        super().finish(status, error)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _write(self, line: str) -> None:
        self._console.print(to_ascii(line), soft_wrap=True)


def _silence(stream: TextIO) -> None:
    """Point `stream` nowhere, so that the interpreter's last flush does not fail on what is still buffered."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError):
        pass  # not a real file
