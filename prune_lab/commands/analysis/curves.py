"""Curves between two networks, and barriers along them. Pure functions of tensors and numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Curve:
    """The straight line from `start` to `end`, or with `middle` the quadratic Bezier curve.

    Each is a list of tensors matched by position; `start` and `end` are the ends t = 0 and t = 1.
    """

    start: Sequence[Tensor]
    end: Sequence[Tensor]
    middle: Sequence[Tensor] | None = None

    def at(self, t: float) -> list[Tensor]:
        """Return the point at `t` in [0, 1], in the dtypes of `start`.

        Sums are computed in fp64: between equal ends every point equals them, bit for bit.
        """
        a, m, b = coefficients(t, bezier=self.middle is not None)
        points = []
        for index, (start, end) in enumerate(zip(self.start, self.end, strict=True)):
            total = start.double() * a + end.double() * b
            if self.middle is not None:
                total += self.middle[index].double() * m
            points.append(total.to(start.dtype))
        return points

    def length(self, *, steps: int = 10_000) -> float:
        """Return the length over all tensors, the integral of |d theta / dt|."""
        if self.middle is None:
            return distance(self.start, self.end)
        first = [(m.double() - a.double()) for a, m in zip(self.start, self.middle, strict=True)]
        last = [(b.double() - m.double()) for m, b in zip(self.middle, self.end, strict=True)]
        ff, fl, ll = (_dot(one, other) for one, other in ((first, first), (first, last), (last, last)))
        t = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
        squared = (1 - t) ** 2 * ff + 2 * t * (1 - t) * fl + t**2 * ll
        return float(2 * squared.clamp(min=0).sqrt().mean())


def coefficients(t: float, *, bezier: bool) -> tuple[float, float, float]:
    """Return the weights of start, middle and end at `t`: (1-t, 0, t), or ((1-t)^2, 2t(1-t), t^2)."""
    return ((1 - t) ** 2, 2 * t * (1 - t), t**2) if bezier else (1 - t, 0.0, t)


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return the Euclidean distance over all tensors."""
    difference = [one.double() - other.double() for one, other in zip(a, b, strict=True)]
    return math.sqrt(_dot(difference, difference))


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return math.fsum(float((one * other).sum()) for one, other in zip(a, b, strict=True))


def positions(count: int) -> list[float]:
    """Return `count` evenly spaced t from 0 to 1; an odd count includes the middle."""
    return [index / (count - 1) for index in range(count)]


def barrier(values: Sequence[float]) -> float:
    """Return the largest of `values` along a curve minus the mean of the first and the last one.

    It is never negative, because the ends belong to the curve, and infinite if a value is not finite.

    Source: Frankle et al. 2020, arXiv 1912.05671.
    """
    if not all(map(math.isfinite, values)):
        return math.inf
    return max(values) - (values[0] + values[-1]) / 2
