"""Times of functions measured in turn, and whether two of them differ. Imports no torch."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MIN_ROUNDS = 8
"""with fewer rounds no interval of a median reaches 99 %"""
SAMPLE_S = 0.02
NOISE = 0.05
"""two copies of one network differed by this much, regardless of the number of rounds: their memory layouts differ"""


def interleaved(
    calls: Sequence[Callable[[], object]], *, rounds: int, seconds: float, sample_s: float = SAMPLE_S
) -> list[list[float]]:
    """Return seconds per call: one list per function, with one sample per round.

    Every round times each function once, in an order that rotates from round to round. So other work of the machine
    affects all of them equally.

    Args:
        rounds: at least `MIN_ROUNDS`.
        seconds: no further round starts after this time, except to reach `MIN_ROUNDS`.
        sample_s: a sample repeats a call for about this long, so that clocks and interrupts matter less.
    """
    repeats = [_repeats(call, sample_s) for call in calls]
    samples: list[list[float]] = [[] for _ in calls]
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.perf_counter() - begin > seconds:
            break
        order = range(len(calls)) if done % 2 == 0 else range(len(calls) - 1, -1, -1)
        for index in order:
            samples[index].append(_sample(calls[index], repeats[index]))
    return samples


def _repeats(call: Callable[[], object], sample_s: float) -> int:
    """Return the calls of one sample; warms up."""
    return max(1, math.ceil(sample_s / max(roughly(call), 1e-9)))


def roughly(call: Callable[[], object]) -> float:
    """Return the better time of two calls after a warm-up call, in seconds: an estimate, not a result."""
    call()
    return min(_sample(call, 1), _sample(call, 1))


def _sample(call: Callable[[], object], repeats: int) -> float:
    if repeats > 1:
        call()  # brings this network back into the caches, as in repeated calls
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(samples: Sequence[float]) -> Spread:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median, low, high)


@dataclass(frozen=True)
class Ratio:
    """How many times faster one function is than another."""

    median: float
    low: float
    """of an interval that covers the median with 99 % or more"""
    high: float

    @property
    def is_difference(self) -> bool:
        """Whether the difference exceeds chance and the effect of memory layout."""
        return not self.low <= 1 <= self.high and abs(math.log(self.median)) > math.log1p(NOISE)


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Ratio:
    """Return the median of slow / fast over rounds, with its interval.

    The interval lies between the k-th smallest and the k-th largest ratio. k is the largest number for which a median
    lies outside in at most 1 % of cases, for any distribution: 2 P[Binomial(n, 1/2) < k] <= 0.01. A table holds
    many ratios, hence 1 %.

    Raises:
        ValueError: fewer than `MIN_ROUNDS` rounds.
    """
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    n = len(ratios)
    if n < MIN_ROUNDS:
        raise ValueError(f"{MIN_ROUNDS} rounds or more are needed, got {n}")
    k, outside = 0, 0.0
    while outside + 2 * math.comb(n, k) / 2**n <= 0.01:
        outside += 2 * math.comb(n, k) / 2**n
        k += 1
    return Ratio(statistics.median(ratios), ratios[k - 1], ratios[n - k])
