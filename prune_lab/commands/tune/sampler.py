"""Sampler of a trial's options: Optuna's tree-structured Parzen estimator, without points already tried."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import optuna
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from prune_lab.commands.tune.space import Space
from prune_lab.pipeline.identity import digest

_DRAWS = 10
"""a finite space is enumerated in order after this many draws of points already tried"""


def untried(space: Space, trials: Sequence[FrozenTrial]) -> Iterator[dict[str, Any]]:
    """Yield the untried points of a finite space."""
    tried = [space.command(trial.params) for trial in trials if trial.params]
    return (point for point in space.points() if space.command(point) not in tried)


class UntriedSampler(optuna.samplers.BaseSampler):
    """Draws all parameters of a trial at once; the draw depends only on its number and earlier trials."""

    def __init__(self, space: Space, number: int) -> None:
        self._space = space
        self._tpe = optuna.samplers.TPESampler(seed=int(digest(["trial", number])[:8], 16))

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {**self._space.searched}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        others = [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        tried = [self._space.command(other.params) for other in others if other.params]
        for _ in range(_DRAWS):
            point = {name: self.sample_independent(study, trial, name, distribution)
                     for name, distribution in search_space.items()}  # fmt: skip
            if self._space.command(point) not in tried:
                return point
        return next(untried(self._space, others), point)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._tpe.sample_independent(study, trial, param_name, param_distribution)
