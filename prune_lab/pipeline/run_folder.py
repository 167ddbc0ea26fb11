"""The folder of a run: its files, and which of them are intact."""

from __future__ import annotations

import contextlib
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prune_lab.config.run import RunConfig, as_mapping
from prune_lab.core.chain import PlannedPhase
from prune_lab.foundations import distributed
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.files import read_json, write_text
from prune_lab.pipeline.identity import group_key, plan_phases, run_key
from prune_lab.tracking import RunInfo, Tracker, open_tracker


@dataclass(frozen=True)
class RunFolder:
    """The directory outputs/<dataset>-<model>-<method>-s<seed>-<hash8> of one run."""

    directory: Path
    key: str
    group: str

    @classmethod
    def of(cls, config: RunConfig, *, fingerprint: str | None, content: str | None, **inputs: Any) -> RunFolder:
        """Return the folder of a run.

        Args:
            fingerprint: of the data set, part of the run's identity; None: not known.
            content: of the data set, part of the directory's name (see Dataset.content).
            inputs: as for identity.plan_phases.
        """
        short = run_key(plan_phases(config, fingerprint=content, **inputs), config)[:8]
        name = f"{config.dataset.name}-{config.model.name}-{config.method.name}-s{config.seed}-{short}"
        key = run_key(plan_phases(config, fingerprint=fingerprint, **inputs), config)
        return cls(Path(config.output_dir) / name, key, group_key(config, fingerprint=fingerprint, **inputs))

    def tracker(self, config: RunConfig) -> Tracker:
        return open_tracker(config.logger) if distributed.is_main() else Tracker()

    def finished(self) -> dict[str, Any] | None:
        """Return the summary if this very run is finished here.

        Raises:
            UserError: the directory was written by another configuration.
        """
        owner = self._owner()
        if owner not in (None, self.key):
            raise UserError(
                f"output_dir: {self.directory} was written by another configuration or from other data (run id "
                f"{owner}, this one is {self.key}); move it away or choose another output_dir"
            )
        try:
            if read_json(self.directory / "status.json")["status"] != "finished":  # written last
                return None
            summary = read_json(self.directory / "summary.json")
            kept = [self.directory / name for name in ("model.json", "model.safetensors", "metrics.jsonl")]
            return summary if summary["status"] == "finished" and all(path.exists() for path in kept) else None
        except (FileNotFoundError, ValueError, KeyError):
            return None

    def _owner(self) -> str | None:
        """Return the run id stored in the directory's files, None for a directory without a run."""
        for name, key in (("run.json", "id"), ("summary.json", "run/id")):
            with contextlib.suppress(FileNotFoundError, ValueError):
                return str(read_json(self.directory / name).get(key))
        return "unknown" if (self.directory / "config.yaml").exists() else None  # run.json is written before it

    def start(self, tracker: Tracker, config: RunConfig, planned: list[PlannedPhase]) -> None:
        """Start or restart: write the options, open all sinks."""
        plan = [
            {"name": entry.phase.name, "key": entry.key, "epochs": entry.schedule.epochs if entry.schedule else 0,
             "length": entry.length}
            for entry in planned
        ]
        if distributed.is_main():
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / "summary.json").unlink(missing_ok=True)
        tags = [config.dataset.name, config.model.name, config.method.name, *config.logger.tags]
        options = as_mapping(config)
        tracker.start(RunInfo(self.directory, self.key, self.directory.name, self.group, tags, options, plan))
        if distributed.is_main():
            write_text(self.directory / "config.yaml", yaml.safe_dump(options, sort_keys=False))
            self._link_phases(planned)

    def _link_phases(self, planned: list[PlannedPhase]) -> None:
        """Link the run's phases into its directory."""
        links = self.directory / "phases"
        links.mkdir(exist_ok=True)
        width = len(str(len(planned) - 1))  # so that names sort
        for index, entry in enumerate(planned):
            link = links / f"{index:0{width}}-{entry.phase.name}"
            link.unlink(missing_ok=True)
            link.symlink_to(Path("..") / ".." / "phases" / entry.key)

    def crash(self, tracker: Tracker, error: BaseException) -> None:
        """Leave the traceback in the log and one line in the status."""
        if distributed.is_main() and self.directory.exists():
            with open(self.directory / "log.txt", "a", encoding="utf-8") as log:
                log.write(traceback.format_exc())
        tracker.finish("failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
