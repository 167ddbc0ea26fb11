"""The search space: overrides in Hydra's sweep grammar, read as Optuna's distributions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from prune_lab.foundations.errors import UserError

Distribution = CategoricalDistribution | IntDistribution | FloatDistribution

_PLACES = {"output_dir", "logger", "dataset.root", "dataset.cache_dir", "dataset.download", "dataset.workers",
           "dataset.check_counts", "trainer.device", "trainer.threads", "trainer.checkpoint_interval_s"}  # fmt: skip
"""options that change the location and speed of runs, but not their results"""
_MAX_POINTS = 10_000
"""a larger space counts as infinite, because draws in it do not repeat"""


@dataclass(frozen=True)
class Space:
    """A command line with some options to search."""

    lines: list[str]
    """as typed"""
    keys: list[str]
    """name of the option in each line, including a leading +"""
    searched: dict[str, Distribution]
    """by name of the option"""

    def command(self, parameters: Mapping[str, Any]) -> list[str]:
        """Return the options of the run with these values of the searched ones."""
        return [f"{key}={text(parameters[key])}" if key in self.searched else line
                for key, line in zip(self.keys, self.lines, strict=True)]  # fmt: skip

    def identity(self) -> list[str]:
        """Return the lines that determine the result, in a canonical order."""
        return sorted(line for key, line in zip(self.keys, self.lines, strict=True)
                      if not is_place(key))  # fmt: skip

    @property
    def num_points(self) -> int | None:
        """Number of combinations; None: infinite, or practically so."""
        count = math.prod(_count(distribution) for distribution in self.searched.values())
        return int(count) if count <= _MAX_POINTS else None

    def points(self) -> Iterator[dict[str, Any]]:
        """Yield the parameters of every combination, none if the space is infinite."""
        if self.num_points is not None:
            values = [_values(distribution) for distribution in self.searched.values()]
            yield from (dict(zip(self.searched, point, strict=True)) for point in itertools.product(*values))

    def probes(self) -> Iterator[dict[str, Any]]:
        """Yield parameters that reach every category and both ends of every interval, one option changed at a time."""
        first = {key: _ends(distribution)[0] for key, distribution in self.searched.items()}
        yield first
        for key, distribution in self.searched.items():
            for value in _ends(distribution)[1:]:
                yield first | {key: value}


def is_place(key: str) -> bool:
    """Return whether an option changes only the location and speed of runs, not their results."""
    name = key.lstrip("+")
    return not _PLACES.isdisjoint((name, name.split(".")[0]))


def read(parsed: Sequence[Override]) -> Space:
    """Return the space spanned by the options of a command.

    Raises:
        UserError: values that cannot be searched, or no option to search.
    """
    keys = [override.get_key_element() for override in parsed]
    searched = {key: _distribution(override) for key, override in zip(keys, parsed, strict=True)
                if override.is_sweep_override()}  # fmt: skip
    if not searched:
        raise UserError("prune-lab tune: nothing to search; give an option several values, as a,b,c, range(1,10,2), "
                          "interval(0.1,0.5) or tag(log,interval(1e-4,1e-1))")  # fmt: skip
    for key in searched:
        if keys.count(key) > 1:
            raise UserError(f"{key} is given {keys.count(key)} times")
    return Space([override.input_line for override in parsed], keys, searched)


def text(value: Any) -> str:
    """Return a value as typed, real numbers with six digits: the run uses exactly the value shown."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _ends(distribution: Distribution) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    return [distribution.low, distribution.high]


def _count(distribution: Distribution) -> float:
    """Return the number of values; infinite for an interval of real numbers."""
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    if distribution.single():
        return 1
    if distribution.step is None:
        return math.inf
    return round((distribution.high - distribution.low) / distribution.step) + 1


def _values(distribution: Distribution) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    return [distribution.low + index * (distribution.step or 0) for index in range(int(_count(distribution)))]


def _distribution(override: Override) -> Distribution:
    line, value = override.input_line, override.value()
    tags: set[str] = getattr(value, "tags", set())
    if tags - {"log"} or (tags and not override.is_interval_sweep()):
        raise UserError(f"{line}: the only tag is log, for an interval: tag(log,interval(1e-4,1e-1))")
    if getattr(value, "shuffle", False):
        raise UserError(f"{line}: shuffle means nothing in a search; leave it out")
    if isinstance(value, IntervalSweep):
        return _numbers(line, value.start, value.end, log=bool(tags))
    if override.is_range_sweep():
        return _steps(line, value)
    texts = tuple(dict.fromkeys(override.sweep_string_iterator()))
    if not texts:
        raise UserError(f"{line} matches nothing")
    if isinstance(value, ChoiceSweep) and len(texts) < len(value.list):
        raise UserError(f"{line} names a value twice")
    return CategoricalDistribution(texts)


def _numbers(line: str, low: float, high: float, *, log: bool) -> Distribution:
    if low > high:
        raise UserError(f"{line}: the interval ends before it starts")
    if log and low <= 0:
        raise UserError(f"{line}: a logarithmic interval must start above 0, got {low:g}")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(float(low), float(high), log=log)


def _steps(line: str, value: Any) -> Distribution:
    """Return start, start + step, ... below stop; Optuna's range includes its upper end, Hydra's does not."""
    count = len(list(value.range()))
    if not count:
        raise UserError(f"{line} holds no values: it starts at its end")
    start, step = Decimal(str(value.start)), Decimal(str(value.step))  # 0.1 + 2 * 0.1 must be 0.3
    low, high = sorted((start, start + (count - 1) * step))
    if all(isinstance(number, int) for number in (value.start, value.step)):
        return IntDistribution(int(low), int(high), step=abs(int(step)))
    return FloatDistribution(float(low), float(high), step=abs(float(step)))
