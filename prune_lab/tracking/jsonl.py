"""The files of a run, written as it trains: metrics.jsonl and its companions. They are the primary record."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from prune_lab.foundations.files import jsonable, write_json, write_text
from prune_lab.tracking.base import BaseSink, RunInfo


def encode(record: dict[str, Any]) -> str:
    """Return `record` as one line of JSON; numbers that are not finite become null."""
    return json.dumps(jsonable(record), allow_nan=False) + "\n"


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append one record as one flushed line. A file that a kill left with half a line must be rewritten first."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(encode(record))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file; a last line truncated by a kill is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a broken line before the last one, named by its number.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):  # no newline after it: the writer was killed within the line
                break
            raise ValueError(f"{path}, line {number} is not JSON") from error
    return records


def rewrite(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Replace the file's content by `records`, whole or not at all."""
    write_text(path, "".join(encode(record) for record in records))


class JsonFiles(BaseSink):
    """Writes run.json, metrics.jsonl, layers.json, summary.json and status.json into the run directory.

    A restarted run rewrites metrics.jsonl, because all records are logged again. Finished phases keep theirs, and an
    unfinished one repeats only those after its last checkpoint.
    """

    def __init__(self) -> None:
        self._dir: Path | None = None
        self._metrics: TextIO | None = None

    def start(self, info: RunInfo) -> None:
        self._dir = info.run_dir
        info.run_dir.mkdir(parents=True, exist_ok=True)
        write_json(
            info.run_dir / "run.json",
            {
                "id": info.run_id,
                "name": info.name,
                "group": info.group,
                "tags": info.tags,
                "plan": info.plan,
                "config": info.config,
            },
        )
        write_json(info.run_dir / "status.json", {"status": "running", "error": None})
        self._metrics = open(info.run_dir / "metrics.jsonl", "w", encoding="utf-8", buffering=1)

    def log(self, record: dict[str, Any], *, replayed: bool = False) -> None:
        if self._metrics is not None:
            self._metrics.write(encode(record))  # line-buffered: flushed with the newline

    def layers(self, rows: list[dict[str, Any]]) -> None:
        if self._dir is not None:
            write_json(self._dir / "layers.json", rows)

    def summary(self, summary: dict[str, Any]) -> None:
        if self._dir is not None:
            write_json(self._dir / "summary.json", summary)

    def finish(self, status: str, error: str | None) -> None:
        if self._dir is None:
            return
        try:
            if self._metrics is not None:
                self._metrics.close()  # on a full disk flushing fails; the status may still fit
        finally:
            write_json(self._dir / "status.json", {"status": status, "error": error})
