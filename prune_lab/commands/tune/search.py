"""The search itself: one run per trial. Each ends as finished, pruned or failed, or resumes with the same command."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
from optuna import Study, Trial
from optuna.trial import FrozenTrial

from prune_lab.commands.tune.objectives import Objective, shown
from prune_lab.commands.tune.space import Space, text
from prune_lab.commands.tune.study import DIVERGED, current, next_trial, repeat_failed
from prune_lab.commands.tune.watch import TrialWatch
from prune_lab.compose.overrides import compose_checked
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.failure import fail
from prune_lab.foundations.signals import STOPPED, StopFlag
from prune_lab.pipeline import runner
from prune_lab.pipeline.control_runs import in_order

_STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
_CHANGING = "sparsity changes"
"""attribute of a trial whose sparsity changed while its last phase trained"""


def _state(trial: FrozenTrial) -> str | None:
    """Return how a trial ended; None if it has not. A diverged one counts as pruned only for Optuna."""
    return "failed" if trial.state.name == "PRUNED" and DIVERGED in trial.user_attrs else _STATES.get(trial.state.name)


@dataclass(frozen=True)
class Search:
    """The space, the objectives and the study of a search."""

    study: Study
    space: Space
    objectives: list[Objective]
    conf_dir: Path
    careful: bool = True
    """prune no trial whose sparsity changes while its last phase trains"""

    def trials(self, *states: str) -> list[FrozenTrial]:
        """Return the trials that have ended: all, or those that ended as `finished`, `pruned` or `failed`."""
        return [trial for trial in current(self.study) if _state(trial) in (states or _STATES.values())]

    def command(self, trial: FrozenTrial) -> str:
        """Return the command that repeats the trial's run, or resumes a pruned one."""
        return shlex.join(["prune-lab", *self.space.command(trial.params)])

    def parameters(self, trial: FrozenTrial | Trial) -> str:
        return " ".join(f"{key}={text(trial.params[key])}" for key in self.space.searched)

    def line(self, trial: FrozenTrial) -> str:
        """Return parameters, values and state of a trial that has ended."""
        parts = [f"trial {trial.number}: {self.parameters(trial)}"]
        if trial.state.name == "COMPLETE":
            parts.append(shown(self.objectives, trial.values))
        error = trial.user_attrs.get("error")
        return "  ".join([*parts, _state(trial) + (f": {error}" if error else "")])

    def work(self, *, num_trials: int, timeout_s: float | None) -> int:
        """Continue until there are `num_trials`, failed ones first; return 0, or the code of the signal that ended it.

        Args:
            timeout_s: no trial starts after this many seconds.

        Raises:
            UserError: the runs do not have an objective.
        """
        started = time.monotonic()
        repeat_failed(self.study)
        while timeout_s is None or time.monotonic() - started < timeout_s:
            trial = next_trial(self.study, self.space, num_trials=num_trials)
            if trial is None:
                if len(self.trials()) < num_trials:
                    print(f"\nall {self.space.num_points} combinations have had their trial", flush=True)
                break
            count = f"{len(self.trials()) + 1} of {num_trials}"
            print(f"\ntrial {trial.number} ({count}): {self.parameters(trial)}", flush=True)
            code = self._attempt(trial)
            if code > STOPPED:
                print(f"study {self.study.study_name}: stopped; the same command goes on with trial {trial.number}")
                return code
            print(self.line(self.study.get_trials(deepcopy=False)[trial.number]), flush=True)
        return 0

    def _attempt(self, trial: Trial) -> int:
        """Carry out the run of a trial and record its outcome, unless a signal stopped it; return the exit code."""
        watch = TrialWatch(self._judge(trial))

        def observe(stop: StopFlag) -> TrialWatch:
            watch.stop = stop
            return watch

        try:
            overrides = self.space.command(trial.params)
            (config,) = compose_checked(self.conf_dir, overrides, sweep=False)
            *before, config = in_order(replace(config, overrides=tuple(overrides)))
            code = (runner.run(*before) if before else 0) or runner.run(config, observe=observe)
        except Exception as error:
            code = fail(error)
            watch.error = " ".join(str(error).split()) or type(error).__name__
        if code <= STOPPED:
            self._tell(trial, watch, code)
        return code

    def _judge(self, trial: Trial) -> Callable[[int, float], str | None]:
        """Return the judge that gives, after an epoch, the reason to prune the trial."""
        trials = self.study.get_trials(deepcopy=False)
        reported = set(trials[trial.number].intermediate_values)
        # A median exists only if a trial has finished, and that trial has recorded whether its sparsity changed.
        spared = self.careful and any(_CHANGING in other.user_attrs for other in trials)

        def judge(epoch: int, top1: float) -> str | None:
            if len(self.objectives) > 1:  # Optuna accepts values per epoch only with a single objective
                return None
            if epoch not in reported:  # a resumed run repeats the epochs after its checkpoint
                reported.add(epoch)
                trial.report(top1, epoch)
            if spared or not trial.should_prune():
                return None
            return (f"pruned by tune: top-1 of {top1:.2f} after epoch {epoch} is below the median "
                    f"(study {self.study.study_name}, trial {trial.number}); its command goes on")  # fmt: skip

        return judge

    def _tell(self, trial: Trial, watch: TrialWatch, code: int) -> None:
        states = optuna.trial.TrialState
        if code == STOPPED:
            self.study.tell(trial, state=states.PRUNED)
            return
        error = watch.error or "a run that it needs did not finish"
        if code == 0:
            self._tell_values(trial, watch)
            return
        trial.set_user_attr("error", error)
        diverged = "not finite" in error
        if diverged:
            trial.set_user_attr(DIVERGED, True)
        # Optuna learns nothing from failed trials; with a single objective it ranks pruned ones below finished ones.
        self.study.tell(trial, state=states.PRUNED if diverged and len(self.objectives) == 1 else states.FAIL)

    def _tell_values(self, trial: Trial, watch: TrialWatch) -> None:
        """Record the results of a finished run.

        Raises:
            UserError: it does not have an objective, so neither will the others.
        """
        for objective in self.objectives:
            if watch.found.get(objective.key) is None:
                error = f"no {objective.key} in its summary"
                trial.set_user_attr("error", error)
                self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
                raise UserError(f"--objective {objective.name}: trial {trial.number} has finished with {error}; "
                                  "give an objective that these runs have")  # fmt: skip
        if watch.sparsity_changed:
            trial.set_user_attr(_CHANGING, True)
        self.study.tell(trial, [watch.found[objective.key] for objective in self.objectives])
