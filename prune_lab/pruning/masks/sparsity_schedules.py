"""When masks change and by how much, as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

_POWERS = {"linear": 1, "cubic": 3}


def drop_fraction(step: int, *, alpha: float, begin: int, end: int, shape: str, floor: float = 0.0) -> float:
    """Return the fraction of a layer's kept weights that the update at `step` moves.

    alpha up to `begin`; `floor` from `end` on unless shape is "constant". Shapes: constant, cosine, linear, cubic
    (inverse power 3). An update may come after `end` when an fp16 overflow postponed it.

    Source: Evci et al. 2020, section 3(2) and appendix G, arXiv 1911.11134; a floor above 0: Dettmers, Zettlemoyer
    2019, arXiv 1907.04840 (official code).
    """
    if shape == "constant":
        return alpha
    progress = min(max((step - begin) / (end - begin), 0.0), 1.0)
    if shape == "cosine":
        return floor + (alpha - floor) / 2 * (1 + math.cos(math.pi * progress))
    return floor + (alpha - floor) * (1 - progress) ** _POWERS[shape]


def floor_product(product: float) -> int:
    """Return the floor of a product of options as typed: 0.29 * 100 is 28.999999999999996 in binary."""
    return math.floor(product + 1e-9)


def cubic_sparsity(step: int, *, begin: int, end: int, initial: float, final: float) -> float:
    """Return the sparsity at `step`: `initial` before `begin`, exactly `final` from `end` on.

    Source: Zhu, Gupta 2017, section 3, arXiv 1710.01878.
    """
    if step >= end:
        return final
    if step < begin:
        return initial
    return final + (initial - final) * (1 - (step - begin) / (end - begin)) ** 3


def fitting_interval(published: int, count: Callable[[int], int], *, wanted: int, least: int = 1) -> int | None:
    """Return the longest interval up to `published` that allows `wanted` updates; None: none down to `least` does.

    Args:
        count: number of updates with an interval.
    """
    return next((interval for interval in range(published, least - 1, -1) if count(interval) >= wanted), None)


def update_steps(begin: int, end: int, interval: int) -> range:
    """Return begin, begin + interval, ... below `end` (Evci et al. 2020, algorithm 1, where step 0 counts)."""
    return range(begin, max(begin, end), interval)
