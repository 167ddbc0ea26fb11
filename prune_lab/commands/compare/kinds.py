"""Which rows may be compared: those of equal model, data, evaluation and schedule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prune_lab.commands.compare.partial import evaluated, trained
from prune_lab.commands.compare.runs import RunResult, flat_options
from prune_lab.commands.compare.sources import ANYWHERE, sources

_NOT_KIND = (*(key for key in ANYWHERE if key != "dataset.root"), "model.name", "dataset.name")
"""options of models and data sets that affect neither the network nor the images, or that labels show"""


@dataclass(frozen=True)
class Kind:
    """The properties that two rows must share for a comparison on the same task."""

    options: tuple[tuple[str, Any], ...] = ()
    """names and values: network, data, batch size, images per epoch"""
    evaluated: str = "all"
    """images evaluated"""
    train: float | None = None
    """epochs of the schedule's block `train`; None: unknown"""
    finetune: float | None = None
    """those of its block `finetune`; None: the run trained in one phase"""
    total: int | None = None
    """epochs trained over all phases; None: unknown"""

    def has_schedule_of(self, other: Kind) -> bool:
        """Return whether the blocks that both runs have are equally long."""
        same_finetune = self.finetune == other.finetune or None in (self.finetune, other.finetune)
        return self.train == other.train and same_finetune

    def is_as_long_as(self, other: Kind) -> bool:
        """Return whether both have the same planned schedule, or trained the same total number of epochs."""
        return self.has_schedule_of(other) or (self.total is not None and self.total == other.total)

    def fits(self, other: Kind) -> bool:
        """Return whether the accuracies of the two are comparable."""
        return self.evaluated == other.evaluated and self.trains_like(other)

    def trains_like(self, other: Kind) -> bool:
        """Return whether the training costs of the two are comparable."""
        return self.options == other.options and self.is_as_long_as(other)

    def unlike(self, other: Kind) -> list[str]:
        """Return the differences between the two, one text for each option, this one's value first."""
        here, there = ({**dict(kind.options), "images evaluated": kind.evaluated} for kind in (self, other))
        texts = [f"{key} {here.get(key)} / {there.get(key)}" for key in here | there if here.get(key) != there.get(key)]
        if not self.is_as_long_as(other):
            texts.append(f"epochs {self._length()} / {other._length()}")
        return texts

    def _length(self) -> str:
        if self.total is not None:
            return str(self.total)
        return f"{self.train}" + ("" if self.finetune is None else f" + {self.finetune}")


def kinds(firsts: Mapping[str, RunResult]) -> dict[str, Kind]:
    """Return the kind of each group.

    Args:
        firsts: group -> one of its runs. Options that not all runs of a model or data set have, because versions of
            this program differ, are ignored.
    """
    variants = {group: _variants(firsts, group) for group in ("model", "dataset")}
    return {name: _kind(run, [variants[group][name] for group in variants]) for name, run in firsts.items()}


def _variants(firsts: Mapping[str, RunResult], group: str) -> dict[str, dict[str, Any]]:
    """Return for each group of runs the options of its model or data set that all runs of it have.

    A run without recorded options counts as the others if these are equal, else as one of another kind.
    """
    files = sources(firsts)
    flat = {
        name: {key: files[name].get(key, value) for key, value in flat_options({group: run.options(group)})}
        for name, run in firsts.items()
    }
    by_label: dict[Any, list[str]] = defaultdict(list)
    for name, run in firsts.items():
        by_label[run.summary.get(f"config/{group}")].append(name)
    found: dict[str, dict[str, Any]] = {}
    for names in by_label.values():
        known = [name for name in names if flat[name]]
        shared = set.intersection(*(set(flat[name]) for name in known)) if known else set()
        for name in known:
            found[name] = {key: flat[name][key] for key in sorted(shared) if key not in _NOT_KIND}
        variants = {repr(found[name]): found[name] for name in known}
        lost = next(iter(variants.values())) if len(variants) == 1 else {f"{group} options": "lost"} if known else {}
        found |= {name: lost for name in names if not flat[name]}
    return found


def _kind(run: RunResult, variants: Iterable[Mapping[str, Any]]) -> Kind:
    options: dict[str, Any] = {group: run.summary.get(f"config/{group}") for group in ("model", "dataset", "schedule")}
    for entries in variants:
        options |= entries
    options["training images per epoch"] = trained(run) or "all"
    schedule = run.options("schedule")
    options["schedule.batch_size"] = schedule.get("batch_size")
    single = len(run.phases) == 1
    return Kind(
        options=tuple((key, value if value is None else str(value)) for key, value in options.items()),
        evaluated=evaluated(run) or "all",
        train=_epochs(schedule, "train"),
        finetune=None if single else _epochs(schedule, "finetune"),
        total=sum(phase["epochs"] for phase in run.phases) if "phases" in run.summary else None,
    )


def _epochs(schedule: Mapping[str, Any], block: str) -> float | None:
    epochs = (schedule.get(block) or {}).get("epochs")
    return None if epochs is None else round(epochs * schedule.get("multiplier", 1.0), 6)


def within(kind: Kind, leader: Kind) -> bool:
    """Return whether a kind has the leader's schedule; beside a leader without fine-tuning only others without it."""
    return kind.train == leader.train and kind.finetune in (None, leader.finetune)
