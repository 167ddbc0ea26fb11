"""Which channels to keep under a budget: the best by their scores, counted by what the network then really costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.pruning.channels.costs import ChannelCosts, Unit
from prune_lab.pruning.channels.groups import ChannelMap

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """A target for the network after its channels are removed."""

    unit: Unit
    ratio: float
    """kept fraction of what the network had"""
    round_to: int = 1
    """lanes keep multiples of this many channels, or all"""
    least: int = 1
    """lanes keep at least so many channels"""
    even: bool = False
    """whether what is left of the budget gives each lane one step at most, so that lanes keep alike"""

    @property
    def option(self) -> str:
        return f"method.{self.unit}_ratio={self.ratio:g}"


def within_lanes(scores: Tensor, channels: ChannelMap) -> Tensor:
    """Return scores by which every lane keeps about the same fraction: minus the rank in its lane, over its size."""
    ranked = torch.empty_like(scores, dtype=torch.float64)
    for lane in channels.lanes:
        order = scores[lane.classes].argsort(descending=True, stable=True)
        ranked[lane.classes[order]] = -torch.arange(1, lane.size + 1, dtype=torch.float64) / lane.size
    return ranked


def relative(scores: Tensor, channels: ChannelMap) -> Tensor:
    """Return scores as multiples of their lane's mean, so that lanes of different size can be compared."""
    shared = scores.double().clone()
    for lane in channels.lanes:
        mean = shared[lane.classes].mean()
        shared[lane.classes] /= mean if mean > 0 else 1
    return shared


def top(scores: Tensor, channels: ChannelMap, counts: Sequence[int] | np.ndarray) -> Tensor:
    """Return the classes with the highest scores, `counts` of each lane, bool [num_classes]; ties: the lower index."""
    alive = torch.zeros(channels.num_classes, dtype=torch.bool)
    for lane, count in zip(channels.lanes, counts, strict=True):
        order = scores[lane.classes].argsort(descending=True, stable=True)
        alive[lane.classes[order[: int(count)]]] = True
    return alive


def choose_counts(
    scores: Tensor, channels: ChannelMap, costs: ChannelCosts, budget: Budget, *, free: Sequence[bool]
) -> np.ndarray:
    """Return how many channels each lane keeps, int64 [lanes], so that the cost is the largest found within budget.

    Channels go in the order of their scores, lowest first and equal ones together, until the budget holds; then those
    that still fit come back, highest first. A channel of a residual trunk runs through many layers and costs much at
    once: what is left of the budget is filled with cheaper ones. Where none of them has gone, they go in place of the
    channel that overshot the budget, if that comes nearer to it.

    Args:
        scores: float64 [num_classes], higher is kept first.
        free: per lane, whether it may lose channels.

    Raises:
        UserError: the budget is below what the smallest allowed network costs.
    """
    return _Search(scores, channels, costs, budget, free).best()


class _Search:
    def __init__(
        self, scores: Tensor, channels: ChannelMap, costs: ChannelCosts, budget: Budget, free: Sequence[bool]
    ) -> None:
        self._costs, self._budget = costs, budget
        self._share = f" ({channels.share(free)})" if channels.held else ""
        self._whole = costs.at(budget.unit, costs.sizes)
        self._limit = Fraction(str(budget.ratio)) * self._whole
        least = np.minimum(costs.sizes, max(budget.least, 1))
        self._least = np.where(np.array(free, dtype=bool), self._rounded(least), costs.sizes)
        lanes, values = channels.lane_of().numpy(), scores.detach().cpu().numpy()
        best_first = np.lexsort((lanes, -values))
        self._order = lanes[best_first]
        """lanes of the classes, highest score first; equal scores in the order of the lanes"""
        ends = np.flatnonzero(np.diff(values[best_first][::-1]) > 0) + 1
        self._cuts = [0, *ends.tolist(), len(self._order)]
        """how many classes may go together: equal scores go alike"""

    def _rounded(self, counts: np.ndarray) -> np.ndarray:
        step = self._budget.round_to
        rounded: np.ndarray = np.minimum(-(-counts // step) * step, self._costs.sizes)
        return rounded

    def _after(self, num_removed: int) -> np.ndarray:
        """Return the counts when the last classes of the order go, as far as their lanes may lose them."""
        kept = len(self._order) - num_removed
        removed = np.bincount(self._order[kept:], minlength=len(self._costs.sizes))
        counts: np.ndarray = np.maximum(self._rounded(self._costs.sizes - removed), self._least)
        return counts

    def _fits(self, counts: np.ndarray) -> bool:
        return self._costs.at(self._budget.unit, counts) <= self._limit

    def best(self) -> np.ndarray:
        """Return the counts with the highest cost found within the budget."""
        counts = self.fill(self.cut())
        if self._budget.even:
            return counts
        before, after = (self._after(self._cuts[last]) for last in (self._last - 1, self._last))
        self._least = np.where(before > after, np.minimum(before, counts + self._budget.round_to), self._least)
        if not self._fits(self._after(len(self._order))):
            return counts
        return max(counts, self.fill(self.cut()), key=lambda found: self._costs.at(self._budget.unit, found))

    def cut(self) -> np.ndarray:
        low, high = 0, len(self._cuts) - 1
        least = self._after(self._cuts[high])
        if not self._fits(least):
            floor = self._costs.at(self._budget.unit, least) / self._whole
            raise UserError(
                f"{self._budget.option} is out of reach: the smallest network that the options allow has {floor:.4g} "
                f"of the {_WORDS[self._budget.unit]}; allowed: that or more, below 1{self._share}"
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._fits(self._after(self._cuts[middle])) else (middle, high)
        self._last, self._num_removed = high, self._cuts[high]
        return self._after(self._num_removed)

    def fill(self, counts: np.ndarray) -> np.ndarray:
        """Give channels back, highest score first, as long as the budget holds."""
        full: set[int] = set()
        for lane in self._order[len(self._order) - self._num_removed :].tolist():
            if lane in full:
                continue
            more = counts.copy()
            more[lane] = min(counts[lane] + self._budget.round_to, self._costs.sizes[lane])
            fits = more[lane] > counts[lane] and self._fits(more)
            counts = more if fits else counts
            if not fits or self._budget.even:
                full.add(lane)  # costs only grow: what does not fit now will not fit later either
        return counts


_WORDS = {"macs": "MACs", "params": "parameters", "channels": "channels"}
