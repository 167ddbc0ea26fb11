"""Many runs in one process, in lockstep: `-m seed=range(8) hydra/launcher=vectorised`. Equal networks run as one.

Every run is the ordinary pipeline in a coroutine of its own. It hands over whenever it has a batch ready; when all
have one, batches of equal networks are differentiated together and every run goes on with its own gradients.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter, deque
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from greenlet import getcurrent, greenlet

from prune_lab.config import RunConfig
from prune_lab.datasets import BatchFormat, CommonConfig
from prune_lab.datasets.base import InMemoryConfig
from prune_lab.host import Host
from prune_lab.joint_networks import Batch, JointNetworks, shape, why_alone
from prune_lab.loop import differentiate
from prune_lab.signals import StopFlag, stop_flag
from prune_lab.slots import gpus, slot
from prune_lab.sweep import run_one
from prune_lab.worker import Outcome, Twice, log_path

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.loop import Training


def run_together(configs: Sequence[RunConfig], at_once: int, folder: Path) -> list[Outcome]:
    """Return how the runs ended, in order.

    Args:
        folder: gets what each run prints, as run-N.log.
    """
    # A GPU is shared with nobody; without one the runs are those of one process with all its threads.
    with stop_flag() as stop, slot(stop) if gpus() else contextlib.nullcontext(True):
        company = _Company(stop)
        waiting = deque(_Member(number, config, company, folder) for number, config in enumerate(configs))
        active: list[_Member] = []
        outcomes: list[Outcome] = []
        while active or (waiting and not stop()):
            while waiting and len(active) < at_once and not stop():
                active.append(waiting.popleft())
                active[-1].resume()
            company.advance(active)
            outcomes += [member.outcome() for member in active if member.is_over]
            active = [member for member in active if not member.is_over]
        outcomes += [Outcome(member.number, stop.exit_code, "not started") for member in waiting]
        company.end()
    return sorted(outcomes, key=lambda outcome: outcome.number)


class _Member:
    """A run as a coroutine: goes on when it is resumed, until it has a batch, must wait for another run, or ends."""

    def __init__(self, number: int, config: RunConfig, company: _Company, folder: Path) -> None:
        self.number = number
        self.batch: Batch | None = None
        """what it waits for the gradients of; None: for another run"""
        self._tally: Counter[str] = Counter()
        self._errors = io.StringIO()
        self._path = log_path(folder, number)
        self._log: TextIO | None = None
        self._coroutine = greenlet(lambda: run_one(config, self._tally, company))
        self._code: int | None = None

    @property
    def is_over(self) -> bool:
        return self._coroutine.dead

    def resume(self, answer: tuple[Tensor, Tensor] | None = None) -> None:
        if self._log is None:  # open until the run ends: its console keeps the stream it finds at first
            self._log = open(self._path, "a", encoding="utf-8", buffering=1)
        with contextlib.redirect_stdout(self._log), contextlib.redirect_stderr(Twice(self._log, self._errors)):
            said = self._coroutine.switch(*([] if answer is None else [answer]))
        self.batch = None if self.is_over else said
        if self.is_over:
            self._code = said
            self._log.close()

    def outcome(self) -> Outcome:
        lines = self._errors.getvalue().strip().splitlines()[-1:] if self._code else []
        error = lines[0].removeprefix("prune-lab: error: ") if lines else ""
        words = "finished" if self._code == 0 else f"not finished (exit code {self._code})"
        print(f"run {self.number + 1}: {words}", flush=True)
        return Outcome(self.number, self._code, error, self._tally["trained"], self._tally["reused"])


class _Company(Host):
    """The runs that share this process: one copy of a data set in memory, one handler of signals, joint arithmetic."""

    vectorised = True

    def __init__(self, stop: StopFlag) -> None:
        self._stop, self._shown = stop, StopFlag()
        self._datasets: dict[str, Any] = {}
        self._networks: dict[tuple[int, ...], JointNetworks] = {}
        self._alone: set[int] = set()

    def load(self, config: CommonConfig, fmt: BatchFormat) -> Any:
        if not isinstance(config, InMemoryConfig):  # one that streams has readers of its own for each run
            return super().load(config, fmt)
        key = repr((config, fmt))
        if key not in self._datasets:
            self._datasets[key] = super().load(config, fmt)
        return self._datasets[key]

    def close(self, dataset: Any) -> None:
        if dataset not in self._datasets.values():
            dataset.close()

    def end(self) -> None:
        for dataset in self._datasets.values():
            dataset.close()

    def stop_flag(self) -> contextlib.AbstractContextManager[StopFlag]:
        return contextlib.nullcontext(self._shown)

    def pause(self) -> None:
        getcurrent().parent.switch(None)

    def differentiate(self, training: Training, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return getcurrent().parent.switch(Batch(training, images, labels))

    def advance(self, members: Sequence[_Member]) -> None:
        """Answer every batch and let its run go on; runs that wait go on when another run has got somewhere."""
        self._shown.number = self._stop.number  # all see a signal at the same step, so that they go on in step
        paused = [member for member in members if member.batch is None and not member.is_over]
        ready = [member for member in members if member.batch is not None]
        got_somewhere = not ready
        networks = {}
        for group in self._groups(ready):
            batches = [member.batch for member in group]
            for member, answer in zip(group, self._answers(batches, networks), strict=True):
                training = member.batch.training
                member.resume(answer)
                got_somewhere |= member.batch is None or member.batch.training is not training
        self._networks = networks
        if got_somewhere:
            for member in paused:
                member.resume()

    def _groups(self, ready: Sequence[_Member]) -> list[list[_Member]]:
        """Return the members in groups that are computed together."""
        groups: dict[Hashable, list[_Member]] = {}
        for member in ready:
            reason = why_alone(member.batch.training)
            if reason is not None:
                self._note_alone(member, reason)
            groups.setdefault(member.number if reason else shape(member.batch), []).append(member)
        return list(groups.values())

    def _note_alone(self, member: _Member, reason: str) -> None:
        if member.number not in self._alone:
            member.batch.training.context.report(f"computed alone: {reason}")
        self._alone.add(member.number)

    def _answers(self, batches: Sequence[Batch], networks: dict) -> list[tuple[Tensor, Tensor]]:
        """Return loss and logits of each batch; its network's parameters have got their gradients.

        Args:
            networks: gets the stacked networks that were used: those of earlier groups are given up.
        """
        if len(batches) == 1:
            (batch,) = batches
            return [differentiate(batch.training, batch.images, batch.labels)]
        key = tuple(id(batch.training) for batch in batches)
        networks[key] = self._networks.get(key) or JointNetworks([batch.training for batch in batches])
        return networks[key].differentiate(batches)
