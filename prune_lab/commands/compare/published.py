"""Published numbers of a recipe beside those measured here."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prune_lab.commands.compare.groups import Row, Stat, stat_of
from prune_lab.commands.compare.runs import RunResult

_HARMLESS = ("experiment=", "seed=", "output_dir=", "dataset.download=", "dataset.cache_dir=", "dataset.workers=",
             "logger.", "trainer.device", "trainer.threads", "trainer.checkpoint_interval_s",
             "trainer.eval_batch_size", "trainer.compile", "trainer.channels_last")  # fmt: skip
"""options, or beginnings of them, that do not depart from the paper's recipe"""


@dataclass(frozen=True)
class Beside:
    """One published number and the corresponding one of the runs here."""

    row: Row
    recipe: str
    key: str
    """of summary.json"""
    published: float
    std: float | None
    here: Stat | None
    paper: dict[str, Any]
    """the recipe's block"""
    changed: str
    """options of the runs that the recipe does not have; with any, the two are different experiments"""


def beside(rows: Sequence[Row]) -> list[Beside]:
    """Return every published number of every row that was run from a recipe."""
    found = []
    for row in rows:
        from_recipe = [run for run in row.runs if run.config.get("paper")]
        for run in from_recipe[:1]:
            paper, words = run.config["paper"], _options(run)
            recipe = next((word.partition("=")[2] for word in words if word.startswith("experiment=")), row.name)
            changed = " ".join(dict.fromkeys(word for other in from_recipe for word in changed_options(other)))
            found += [
                Beside(row, recipe, key, value, paper["std"].get(key), stat_of(row, key), paper, changed)
                for key, value in paper["values"].items()
            ]
    return found


def changed_options(run: RunResult) -> list[str]:
    """Return the options of a run beyond its recipe, except those that change no result.

    The path of ImageNet changes nothing, because its images are counted; a replacement of CIFAR's archive may hold
    other images.
    """
    harmless = _HARMLESS if (run.config.get("dataset") or {}).get("kind") == "cifar" else (*_HARMLESS, "dataset.root=")
    return [word for word in _options(run) if not word.lstrip("+~").startswith(harmless)]


def _options(run: RunResult) -> list[str]:
    command = run.summary.get("run/command", "")
    try:
        return shlex.split(command)[1:]
    except ValueError:  # not written by this program
        return command.split()[1:]
