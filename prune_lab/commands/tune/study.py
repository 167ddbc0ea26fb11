"""A study on disk: one SQLite file that records its command; its trials resume where they stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna import Study, Trial
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial

from prune_lab.commands.tune.objectives import Direction
from prune_lab.commands.tune.sampler import UntriedSampler, untried
from prune_lab.commands.tune.space import Distribution, Space
from prune_lab.foundations.errors import UserError

_OWNER = "prune-lab"
"""the study's attribute with its original options and objectives"""
_REPEATS = "repeats"
"""attribute of a trial: number of the failed one that it repeats"""
DIVERGED = "diverged"
"""attribute of a trial whose loss was not finite"""
_STARTUP_TRIALS = 5
"""number of trials that finish before the first is pruned: Optuna's default"""


def open_study(
    path: Path, *, options: Sequence[str], objectives: Sequence[str], directions: Sequence[Direction], prune: bool
) -> Study:
    """Return the study in the file `path`, which is created if it does not exist.

    Args:
        options: lines that determine the result.
        objectives: keys of summary.json.
        prune: prune trials below the median of the finished ones.

    Raises:
        UserError: the file is not a study, or a study with other options or objectives.
    """
    import sqlalchemy

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url = sqlalchemy.engine.URL.create("sqlite", database=str(path)).render_as_string()
    try:
        study = optuna.create_study(
            storage=optuna.storages.RDBStorage(url),
            study_name=path.stem,
            directions=list(directions),
            load_if_exists=True,
            pruner=_pruner(prune),
        )
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError) as error:
        raise UserError(f"--study {path.stem}: {path} cannot be used as a study: {_first_line(error)}") from error
    _claim(study, {"options": list(options), "objectives": list(objectives)})
    return study


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _pruner(prune: bool) -> BasePruner:
    if not prune:
        return optuna.pruners.NopPruner()
    return optuna.pruners.MedianPruner(n_startup_trials=_STARTUP_TRIALS)


def _claim(study: Study, owner: dict[str, list[str]]) -> None:
    """Write a new study's options and objectives into it, and reject a study with others."""
    if _OWNER not in study.user_attrs and not study.trials:
        study.set_user_attr(_OWNER, owner)
        return
    there = study.user_attrs.get(_OWNER, {"options": [], "objectives": []})
    if there["objectives"] != owner["objectives"]:
        before, now = (",".join(entry["objectives"]) or "others" for entry in (there, owner))
        raise UserError(f"--study {study.study_name} has the objectives {before}, not {now}; give another --study")
    if there["options"] != owner["options"]:
        old, new = set(there["options"]), set(owner["options"])
        raise UserError(f"--study {study.study_name} was begun with {_only(old, new)}, this command has "
                          f"{_only(new, old)}; give another --study")  # fmt: skip


def _only(some: set[str], others: set[str]) -> str:
    return " ".join(sorted(some - others)) or "nothing else"


def current(study: Study) -> list[FrozenTrial]:
    """Return the trials without failed ones that have been repeated."""
    trials = study.get_trials(deepcopy=False)
    repeated = {trial.user_attrs.get(_REPEATS) for trial in trials}
    return [trial for trial in trials if trial.number not in repeated]


def repeat_failed(study: Study) -> None:
    """Enqueue new trials with the parameters of the failed ones, for any reason: a disk may have space again.

    A loss that was not finite is not repeated: it would not be finite the next time either.
    """
    for trial in current(study):
        if trial.state == optuna.trial.TrialState.FAIL and not trial.user_attrs.get(DIVERGED):
            study.enqueue_trial(trial.params, user_attrs={_REPEATS: trial.number})


def next_trial(study: Study, space: Space, *, num_trials: int) -> Trial | None:
    """Return the next trial with its parameters: an unfinished one first, then enqueued ones.

    Choices depend only on the number of the trial and on earlier trials, however often the search was stopped.
    None: there are `num_trials`, or every point of the space has had its trial.
    """
    trials, states = current(study), optuna.trial.TrialState
    unfinished = [trial for trial in trials if trial.state == states.RUNNING]
    waiting = [trial for trial in trials if trial.state == states.WAITING]
    if not unfinished and not waiting:
        if len(trials) >= num_trials or (space.num_points and not any(untried(space, trials))):
            return None
    number = (unfinished + waiting)[0].number if unfinished or waiting else len(study.trials)
    study.sampler = UntriedSampler(space, number)
    trial = optuna.trial.Trial(study, unfinished[0]._trial_id) if unfinished else study.ask()
    for name, distribution in space.searched.items():
        _suggest(trial, name, distribution)
    return trial


def _suggest(trial: Trial, name: str, distribution: Distribution) -> None:
    """Choose a parameter; a choice by an earlier call is kept."""
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        trial.suggest_categorical(name, distribution.choices)
    elif isinstance(distribution, optuna.distributions.IntDistribution):
        trial.suggest_int(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
    else:
        trial.suggest_float(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def importances(study: Study, *, objective: int) -> dict[str, Any]:
    """Return the part of each parameter in the variance of an objective; empty if trials are too few or all equal."""
    finished = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len(finished) < 10 or len({trial.values[objective] for trial in finished}) < 2:
        return {}
    return optuna.importance.get_param_importances(
        study,
        evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
        target=lambda trial: trial.values[objective],
    )
