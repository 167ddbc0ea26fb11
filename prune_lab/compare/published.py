"""What a recipe's publication reports beside what was measured here."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prune_lab.compare.groups import Row, Stat, stat_of
from prune_lab.compare.runs import RunResult

_HARMLESS = ("experiment", "seed", "output_dir", "dataset.root", "dataset.download", "dataset.cache_dir",
             "dataset.workers", "logger.", "trainer.device", "trainer.threads", "trainer.checkpoint_interval_s",
             "trainer.eval_batch_size", "trainer.compile", "trainer.channels_last", "paper.")  # fmt: skip
"""options, or beginnings of them, with which a recipe is still the paper's"""


@dataclass(frozen=True)
class Beside:
    """One published number and the same of the runs here."""

    row: Row
    key: str
    """of summary.json"""
    published: float
    std: float | None
    here: Stat | None
    paper: dict[str, Any]
    """the recipe's block"""
    changed: str
    """options of the runs that the recipe does not have; with any the two are not of the same experiment"""


def beside(rows: Sequence[Row]) -> list[Beside]:
    """Return every published number of every row that was run from a recipe."""
    found = []
    for row in rows:
        paper = row.runs[0].config.get("paper") if row.runs else None
        if paper:
            changed = changed_options(row.runs[0])
            found += [
                Beside(row, key, value, paper["std"].get(key), stat_of(row, key), paper, changed)
                for key, value in paper["values"].items()
            ]
    return found


def changed_options(run: RunResult) -> str:
    """Return the options beyond the recipe that a run was started with, but for those that change no result."""
    words = shlex.split(run.summary.get("run/command", ""))[1:]
    return " ".join(word for word in words if not word.lstrip("+~").startswith(_HARMLESS))
