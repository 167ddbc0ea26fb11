"""How the threshold of gRDA grows with the steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator


def increment(step: int, lr: float, *, c: float, mu: float) -> float:
    """Return the growth of the threshold at `step` (from 1): c * lr^(mu + 1/2) * (step^mu - (step - 1)^mu).

    Source: official PyTorch and TensorFlow code of Chao et al. 2020, arXiv 2006.09358. With a constant learning rate
    the increments add up to the paper's c * lr^(1/2) * (step * lr)^mu.
    """
    return c * lr ** (mu + 0.5) * (step**mu - (step - 1) ** mu)


def thresholds(rates: Iterable[float], *, c: float, mu: float) -> Iterator[float]:
    """Yield the threshold after each step with these learning rates."""
    total = 0.0
    for step, lr in enumerate(rates, start=1):
        total += increment(step, lr, c=c, mu=mu)
        yield total


def steps_to_reach(threshold: float, lr: float, *, c: float, mu: float) -> float:
    """Return the steps at a constant learning rate until the threshold is reached; infinite with c = 0."""
    scale = c * lr ** (mu + 0.5)
    try:
        return math.ceil((threshold / scale) ** (1 / mu))
    except (ZeroDivisionError, OverflowError):
        return math.inf
