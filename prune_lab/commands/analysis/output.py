"""The folder of an analysis, named by everything that changes its result. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_lab.commands.analysis.runs import FinishedRun
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.files import jsonable, read_json, write_json

FORMAT = 1
"""raised when the meaning of stored results changes"""
DEFAULT_PARENT = Path("outputs") / "analysis"


@dataclass(frozen=True)
class ResultFolder:
    """analysis.json, written first, describes the analysis; result.json is written last."""

    directory: Path
    key: str
    inputs: dict[str, Any]

    @classmethod
    def of(
        cls, command: str, runs: Sequence[FinishedRun], inputs: dict[str, Any], *, chosen: str | None
    ) -> ResultFolder:
        """Return the folder of an analysis.

        Args:
            inputs: everything besides the networks of `runs` that can change the result, JSON-able.
            chosen: the folder; None: outputs/analysis/<command>-<runs>-<hash8>.

        Raises:
            UserError: the folder lies in a run directory, or holds another analysis.
        """
        inputs = jsonable({"command": command, "format": FORMAT, "networks": [run.digest for run in runs], **inputs})
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]
        name = "-".join([command, *(run.name for run in runs), key[:8]])
        folder = cls(DEFAULT_PARENT / name if chosen is None else Path(chosen), key, inputs)
        folder._check(chosen)
        return folder

    def _check(self, chosen: str | None) -> None:
        option = f"--output {chosen}" if chosen is not None else str(self.directory)
        path = self.directory.resolve()
        for above in (path, *path.parents):
            if (above / "run.json").exists():
                raise UserError(f"{option} lies in the run directory {above}; analyses leave runs as they are")
            if above.exists() and not above.is_dir():
                raise UserError(f"{option}: {above} is a file, no folder")
        owner = self._read("analysis.json").get("key")
        if owner not in (None, self.key):
            raise UserError(f"{option} holds another analysis (see analysis.json there); choose another folder")

    def _read(self, name: str) -> dict[str, Any]:
        """Return the content of a file in the folder, empty if it is missing or damaged."""
        try:
            content = read_json(self.directory / name)
        except (FileNotFoundError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def settle(
        self, runs: Sequence[FinishedRun], work: Callable[[], dict[str, Any]], *, report: Callable[[str], None]
    ) -> tuple[dict[str, Any], bool]:
        """Return the result, and whether it was stored already; otherwise `work` computes it now.

        Two processes with the same analysis compute it once: the second waits and reads.

        Raises:
            UserError: the folder cannot be created.
        """
        from prune_lab.pipeline import store

        found = self._result()
        if found is None:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                reason = f"cannot make the folder {self.directory}: {error.strerror}"
                raise UserError(f"{reason}; --output FOLDER names another") from error
            with store.lock(self.directory / ".lock", what=str(self.directory), report=report):
                found = self._result()
                if found is None:
                    about = {"key": self.key, "runs": [str(run.directory.resolve()) for run in runs], **self.inputs}
                    write_json(self.directory / "analysis.json", about)
                    found = jsonable({"key": self.key, **work()})
                    write_json(self.directory / "result.json", found)
                    return found, False
        report(f"done already: {self.directory}")
        return found, True

    def _result(self) -> dict[str, Any] | None:
        found = self._read("result.json")
        return found if found.get("key") == self.key else None
