"""The options in which the rows of a table differ, as text."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from prune_lab.commands.compare.runs import RunResult, flat_options
from prune_lab.commands.compare.sources import ANYWHERE, sources

_NOT_OPTIONS = ("seed", "output_dir", "dry_run", "logger.", "paper.", *ANYWHERE, "trainer.checkpoint_interval_s",
                "trainer.threads", "trainer.eval_interval")  # fmt: skip
"""options, or beginnings of them, that do not separate groups"""
_CHOICES = ("model", "dataset", "schedule", "method")
"""groups whose options are comparable only within one kind: those of two methods are not compared"""
_SHARED = ("method.distribution", "method.macs_ratio", "method.params_ratio", "method.channels_ratio")
"""options that methods have in common"""
_OTHER_COLUMNS = ("method.sparsity", "method.control", "method.match", "model.name", "dataset.name", "schedule.name",
                  "method.name", "trainer.limit_", "trainer.eval_batch_size")  # fmt: skip
"""options, or beginnings of them, that another column shows; parts of the images are shown with schedule and top-1"""


def texts(firsts: Mapping[str, RunResult], looks: Mapping[str, Any]) -> dict[str, str]:
    """Return for each group, as name=value name=value, every option in which the groups differ.

    Options of a model, data set, schedule or method are compared among the groups that have it.

    Args:
        firsts: group -> one of its runs.
        looks: group -> content of the table's other columns; groups that would still look the same get all options in
            which they differ, and their name if there are none.
    """
    files = sources(firsts)
    flat = {name: _separating(run) | files[name] for name, run in firsts.items()}
    shown = _differing(firsts, flat)
    found = {name: _text(flat[name], [key for key in flat[name] if key in shown[name]]) for name in firsts}
    same_look: dict[Any, list[str]] = defaultdict(list)
    for name in firsts:
        same_look[looks[name], found[name]].append(name)
    for names in same_look.values():
        if len(names) > 1:
            found |= _distinguished({name: (found[name], flat[name]) for name in names})
    return found


def _separating(run: RunResult) -> dict[str, Any]:
    """Return the options that can separate runs, with the resolved precision."""
    flat = {key: value for key, value in flat_options(run.config) if not key.startswith(_NOT_OPTIONS)}
    if flat.get("trainer.limit_eval_batches") is None:
        flat.pop("trainer.eval_batch_size", None)  # changes speed only
    if len(run.phases) == 1:  # the schedule's second block was not used
        flat = {key: value for key, value in flat.items() if not key.startswith("schedule.finetune.")}
    resolved = re.search(r"\((\w+)\)$", str(run.summary.get("run/device", "")))
    if resolved and "trainer.precision" in flat:
        flat["trainer.precision"] = resolved[1]
    return flat


def _differing(firsts: Mapping[str, RunResult], flat: Mapping[str, dict[str, Any]]) -> dict[str, set[str]]:
    """Return group -> names of its options that differ from those of a group in which they mean the same."""
    values: dict[tuple[str, str], set[str]] = defaultdict(set)
    places = {name: {key: _beside(firsts[name], key) for key in flat[name] if not key.startswith(_OTHER_COLUMNS)}
              for name in firsts}  # fmt: skip
    for name, keys in places.items():
        for key, place in keys.items():
            values[place, key].add(repr(flat[name][key]))
    return {name: {key for key, place in keys.items() if len(values[place, key]) > 1} for name, keys in places.items()}


def _beside(run: RunResult, key: str) -> str:
    """Return the common property of the groups among which an option is compared."""
    group = key.partition(".")[0]
    if key in _SHARED or group not in _CHOICES:
        return "" if group != "optimizer" else str(run.options("optimizer").get("name"))
    return str(run.summary.get(f"config/{group}"))


def _distinguished(same_look: Mapping[str, tuple[str, dict[str, Any]]]) -> dict[str, str]:
    """Return text for groups that look the same: all their differences, or their names."""
    keys = dict.fromkeys(key for _, options in same_look.values() for key in options)
    differing = [key for key in keys if len({repr(options.get(key)) for _, options in same_look.values()}) > 1]
    found = {name: _joined(text, _text(options, [key for key in differing if key in options]))
             for name, (text, options) in same_look.items()}  # fmt: skip
    count = Counter(found.values())
    return {name: _joined(text, name) if count[text] > 1 else text for name, text in found.items()}


def _joined(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _text(options: Mapping[str, Any], keys: Iterable[str]) -> str:
    return " ".join(f"{key}={_typed(options[key])}" for key in keys)


def _typed(value: Any) -> str:
    """Return a value as typed on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
