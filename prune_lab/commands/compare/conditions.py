"""Conditions on runs such as method=rigl,set or seed!=3: parsed, checked against the runs' keys, applied."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from prune_lab.commands.compare.groups import Row
from prune_lab.commands.compare.runs import RunResult, flat_options
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import suggestion


@dataclass(frozen=True)
class Condition:
    """`key` has one of the values; with `negated`, none of them."""

    key: str
    values: tuple[Any, ...]
    negated: bool
    typed: str
    """as the user wrote it, for messages"""

    def holds(self, run: RunResult) -> bool:
        """Return whether the run satisfies it; a run that lacks the results or options to decide does."""
        value = lookup(run, self.key)
        if value is None and not run.summary and ("/" in self.key or not run.config):
            return True
        return (_plain(value) in self.values) != self.negated


def parse(flag: str, typed: Sequence[str], runs: Sequence[RunResult]) -> list[Condition]:
    """Return the conditions written after `flag`.

    Raises:
        UserError: not name=value, or a name that no run has as option or result.
    """
    return [_parse_one(flag, text, runs) for text in typed]


def _parse_one(flag: str, text: str, runs: Sequence[RunResult]) -> Condition:
    left, equals, right = text.partition("=")
    if not equals or not left.strip("!") or not right:
        raise UserError(f"{flag} {text}: write name=value, name=value,value or name!=value")
    key = left.removesuffix("!")
    require_key(flag, key, runs)
    return Condition(key, tuple(_value(part) for part in re.split(r",(?![^\[]*\])", right)), left.endswith("!"), text)


def require_key(flag: str, key: str, runs: Iterable[RunResult]) -> None:
    """Raise UserError unless some run has `key` as option or result."""
    runs = list(runs)
    if all(lookup(run, key) is None for run in runs):
        known = dict.fromkeys(name for run in runs for name in _names(run))
        if key not in known:
            examples = "method, model, dataset, seed, options such as method.sparsity, results such as final/top1"
            raise UserError(f"{flag} {key}: no run has it{suggestion(key, known)}; allowed: {examples}")


def _names(run: RunResult) -> Iterator[str]:
    yield from run.summary
    yield from run.config
    yield from (key for key, _ in flat_options(run.config))


def _value(text: str) -> Any:
    try:
        return float(text)  # YAML reads 1e-3 as a string
    except ValueError:
        pass
    try:
        return _plain(yaml.safe_load(text))
    except yaml.YAMLError:
        return text


def _plain(value: Any) -> Any:
    """Return a form that equal values share however they are written: 1 and 1.0, lists and their texts."""
    if value is None or isinstance(value, bool):
        return str(value)
    return float(value) if isinstance(value, (int, float)) else str(value)


def lookup(run: RunResult, key: str) -> Any:
    """Return a result (`final/top1`), an option (`method.sparsity`) or a group's choice (`method`); None: absent."""
    if "/" in key:
        return run.summary.get(key)
    if key == "status":
        return run.status
    node: Any = run.config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    if isinstance(node, dict):
        return node.get("name")
    return run.summary.get(f"config/{key}") if node is None else node


def apply(conditions: Sequence[Condition], runs: Sequence[RunResult]) -> list[RunResult]:
    """Return the runs that satisfy all conditions.

    Raises:
        UserError: no run does.
    """
    kept = [run for run in runs if all(condition.holds(run) for condition in conditions)]
    if not kept:
        raise UserError(f"--filter {' '.join(condition.typed for condition in conditions)}: none of {len(runs)} "
                          "runs is left")  # fmt: skip
    return kept


def sections(rows: Sequence[Row], key: str | None) -> dict[str, list[Row]]:
    """Return the rows by their value of `key`, in order of first appearance; under one empty title without a key."""
    if key is None:
        return {"": list(rows)}
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(f"{key}={lookup(row.runs[0], key)}", []).append(row)
    return found
