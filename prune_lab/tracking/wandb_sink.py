"""Copies a run to Weights & Biases. wandb is imported when a run starts, and not at all when it is disabled."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_lab.foundations.files import jsonable
from prune_lab.tracking.base import BaseSink, RunInfo
from prune_lab.tracking.wandb_key import Mode, find_key

if TYPE_CHECKING:
    import wandb

_AXES = ("global_step", "epoch", "macs/train")
"""Possible x-axes of charts. W&B keeps one default axis per metric, global_step; the others are logged with every
record, so each chart can be switched to them."""

_MAX_TAG = 64
"""W&B rejects longer tags."""


class WandbSink(BaseSink):
    """One W&B run per run, with the same id on every call, so that an interrupted run resumes there, too.

    A resumed run logs all records again from the first. Those already on the server are skipped by number: W&B counts
    one step per record, and the order of records is always the same.
    """

    label = "W&B"

    def __init__(
        self,
        *,
        mode: Mode,
        project: str,
        entity: str | None,
        report: Callable[[str], None],
        init_timeout_s: float,
        finish_timeout_s: float,
    ) -> None:
        self._mode = mode
        self._project = project
        self._entity = entity
        self._report = report
        self._init_timeout_s = init_timeout_s
        self._finish_timeout_s = finish_timeout_s
        self._begun: wandb.Run | None = None
        self._layers: list[dict[str, Any]] = []
        self.num_present = 0
        """number of records already on the server when the run began"""
        self._num_logged = 0

    def start(self, info: RunInfo) -> None:
        import wandb

        if self._mode == "offline":
            _remove_offline_copies(info)
        wandb.setup(settings=wandb.Settings(silent=True))  # before init, which prints messages about keys
        self._begun = wandb.init(
            mode=self._mode,
            project=self._project,
            entity=self._entity,
            id=info.run_id,
            resume="allow" if self._mode == "online" else None,
            name=info.name,
            group=info.group,
            tags=[tag[:_MAX_TAG] for tag in dict.fromkeys(info.tags)],
            config=jsonable(info.config),
            dir=info.run_dir,
            save_code=False,
            settings=wandb.Settings(
                api_key=find_key() if self._mode == "online" else None,  # passed so that W&B never prompts for it
                console="off",
                silent=True,
                reinit="create_new",  # never the unfinished run of an earlier job in this process
                init_timeout=self._init_timeout_s,
                finish_timeout=self._finish_timeout_s,
                finish_timeout_raises=True,
            ),
        )
        for axis in _AXES:
            self._run.define_metric(axis)
        self._run.define_metric("*", step_metric="global_step")
        self.num_present = self._run.starting_step
        self._report(f"W&B: {self.url}")

    @property
    def _run(self) -> wandb.Run:
        if self._begun is None:
            raise RuntimeError("W&B: the run has not begun")
        return self._begun

    @property
    def url(self) -> str:
        """The run's page, or the folder of the offline copy."""
        return self._run.url or str(Path(self._run.dir).parent)

    def log(self, record: dict[str, Any], *, replayed: bool = False) -> None:
        self._num_logged += 1
        if self._num_logged > self.num_present:
            self._run.log(_present(record))

    def layers(self, rows: list[dict[str, Any]]) -> None:
        self._layers = rows

    def summary(self, summary: dict[str, Any]) -> None:
        self._run.summary.update(_present(summary))

    def finish(self, status: str, error: str | None) -> None:
        try:
            if self._layers:  # last: a table demands more of the server than numbers do
                self._run.summary["layers"] = _table(self._layers)
        finally:
            self._run.finish(exit_code=0 if status == "finished" else 1)


def _table(rows: list[dict[str, Any]]) -> wandb.Table:
    """Return rows with different keys as a table over all keys; lists such as shapes become strings."""
    import wandb

    columns = list(dict.fromkeys(key for row in rows for key in row))
    data = [[_cell(row.get(column)) for column in columns] for row in rows]
    return wandb.Table(columns=[*columns], data=data, allow_mixed_types=True)


def _cell(value: Any) -> Any:
    value = jsonable(value)
    return str(value) if isinstance(value, (list, dict)) else value


def _present(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values as metrics.jsonl holds them, so that a refill sends the same; nulls are left out."""
    return {key: value for key, value in jsonable(values).items() if value is not None}


def _remove_offline_copies(info: RunInfo) -> None:
    """Remove the copies of earlier calls of this run: the new copy begins with the same records."""
    for folder in (info.run_dir / "wandb").glob(f"offline-run-*-{info.run_id}"):
        shutil.rmtree(folder)
