"""Many runs in one process, in lockstep: `-m seed=range(8) hydra/launcher=vectorised`. Equal networks run as one.

Every run is the ordinary pipeline in its own coroutine. It yields whenever it has a batch ready. When all have one,
batches of equal networks are differentiated together, and every run resumes with its own gradients.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from greenlet import getcurrent, greenlet

from prune_lab.config.run import RunConfig
from prune_lab.datasets import BatchFormat, CommonConfig
from prune_lab.datasets.base import InMemoryConfig
from prune_lab.foundations.signals import StopFlag, stop_flag
from prune_lab.launch.joint_networks import Batch, JointNetworks, kind, reason_not_joint
from prune_lab.launch.outcome import Outcome, Twice, log_path
from prune_lab.launch.run_one import run_one
from prune_lab.launch.slots import gpus, slot
from prune_lab.pipeline.executor import Executor
from prune_lab.training.loop import differentiate

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.training.loop import TrainState

_WAIT_S = 0.5
"""seconds between checks for locks of other processes"""


def run_together(configs: Sequence[RunConfig], at_once: int, folder: Path) -> list[Outcome]:
    """Return the outcomes of the runs, in order.

    Args:
        folder: for the output of each run, as run-N.log.
    """
    # A GPU is not shared with other processes; without one the runs use all threads of one process.
    with stop_flag() as stop, slot(stop) if gpus() else contextlib.nullcontext(True):
        workers = _WorkerGroup(stop)
        waiting = deque(_Coroutine(number, config, workers, folder) for number, config in enumerate(configs))
        active: list[_Coroutine] = []
        outcomes: list[Outcome] = []
        while active or (waiting and not stop()):
            try:
                while waiting and len(active) < at_once and not stop():
                    active.append(waiting.popleft())
                    active[-1].resume()
                workers.advance(active)
            except KeyboardInterrupt as error:  # a second Ctrl-C: each run records the interruption
                for worker in active:
                    worker.end(error)
                raise
            outcomes += [worker.outcome() for worker in active if worker.is_over]
            active = [worker for worker in active if not worker.is_over]
        outcomes += [Outcome(worker.number, stop.exit_code, "not started") for worker in waiting]
        workers.end()
    return sorted(outcomes, key=lambda outcome: outcome.number)


@dataclass
class _Computed:
    """Yielded by a run that has computed a batch by itself."""

    training: TrainState


class _Coroutine:
    """A run as a coroutine: once resumed, it works until it yields or ends."""

    def __init__(self, number: int, config: RunConfig, workers: _WorkerGroup, folder: Path) -> None:
        self.number = number
        self.yielded: Batch | _Computed | None = None
        """a batch to compute, or one that it has computed by itself; None: it waits for another run"""
        self._tally: Counter[str] = Counter()
        self._errors = io.StringIO()
        self._path = log_path(folder, number)
        self._log: TextIO | None = None
        self._coroutine = greenlet(lambda: run_one(config, self._tally, workers))
        self._code = 0
        """exit code of a run that has ended"""

    @property
    def is_over(self) -> bool:
        return self._coroutine.dead

    @property
    def is_waiting(self) -> bool:
        return self.yielded is None and not self.is_over

    def resume(self, answer: tuple[Tensor, Tensor] | None = None) -> None:
        """Resume the run; without an answer it computes its batch by itself."""
        self._enter(lambda: self._coroutine.switch(*([answer] if self._coroutine else [])))

    def end(self, error: BaseException) -> None:
        """Raise `error` in the run, which records it."""
        if self._coroutine:
            with contextlib.suppress(type(error)):
                self._enter(lambda: self._coroutine.throw(error))

    def _enter(self, switch: Callable[[], Any]) -> None:
        if self._log is None:  # open until the run ends: its console keeps the first stream it finds
            self._log = open(self._path, "a", encoding="utf-8", buffering=1)
        with contextlib.redirect_stdout(self._log), contextlib.redirect_stderr(Twice(self._log, self._errors)):
            yielded = switch()
        self.yielded = None if self.is_over else yielded
        if self.is_over:
            self._code = yielded
            self._log.close()

    def outcome(self) -> Outcome:
        lines = self._errors.getvalue().strip().splitlines()[-1:] if self._code else []
        error = lines[0].removeprefix("prune-lab: error: ") if lines else ""
        words = "finished" if self._code == 0 else f"not finished (exit code {self._code})"
        print(f"run {self.number + 1}: {words}", flush=True)
        return Outcome(self.number, self._code, error, self._tally["trained"], self._tally["reused"])


class _WorkerGroup(Executor):
    """The runs that share this process: one copy of a data set in memory, one signal handler, joint gradients."""

    vectorised = True

    def __init__(self, stop: StopFlag) -> None:
        self._stop, self._shown = stop, StopFlag()
        self._datasets: dict[str, Any] = {}
        self._kinds: dict[int, _Kind] = {}
        self._networks: dict[tuple[int, ...], JointNetworks] = {}
        self._looked_s = time.monotonic()

    def load(self, config: CommonConfig, fmt: BatchFormat) -> Any:
        if not isinstance(config, InMemoryConfig):  # a streaming data set has its own readers for each run
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
        _yield(None, torch.device("cpu"))

    def differentiate(self, training: TrainState, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Yield the batch, or compute it here, before other runs have drawn from the random generators."""
        device, own = training.device_config.torch_device, self._kind(training)
        if own.reason is None:
            answer = _yield(Batch(training, images, labels), device)
            return differentiate(training, images, labels) if answer is None else answer
        answer = differentiate(training, images, labels)
        _yield(_Computed(training), device)
        return answer

    def _kind(self, training: TrainState) -> _Kind:
        """Return how the training's networks are computed, decided again in every epoch: methods may change them."""
        number, epoch = id(training), training.progress.epoch
        known = self._kinds.get(number)
        if known is None or known.training is not training or known.epoch != epoch:
            reason = reason_not_joint(training)
            reason = reason or (known.reason if known is not None and known.training is training else None)
            self._kinds[number] = _Kind(training, epoch, reason, kind(training))
            if reason and (known is None or known.reason != reason):
                training.context.report(f"computed alone: {reason}")
        return self._kinds[number]

    def advance(self, members: Sequence[_Coroutine]) -> None:
        """Resume every run with its gradients; a waiting one only after another made progress, or periodically.
        """
        if self._stop() and not self._shown():
            print("stopping: the runs under way write a checkpoint, the others do not start", flush=True)
        self._shown.number = self._stop.number  # all see a signal at the same step, so that they remain in lockstep
        waiting = [worker for worker in members if worker.is_waiting]
        ready = [worker for worker in members if worker.yielded is not None]
        got_somewhere = False
        networks: dict[tuple[int, ...], JointNetworks] = {}
        for group in self._groups(ready):
            for worker, answer in zip(group, self._answers(group, networks), strict=True):
                before = _training(worker)
                worker.resume(answer)
                got_somewhere |= _training(worker) is not before
        self._networks = networks
        now = time.monotonic()
        if not ready:
            time.sleep(_WAIT_S)  # all are waiting for other processes
        if got_somewhere or not ready or now - self._looked_s > _WAIT_S:
            self._looked_s = now
            for worker in waiting:
                worker.resume()
        alive = {id(_training(worker)) for worker in members}
        self._kinds = {number: known for number, known in self._kinds.items() if number in alive}

    def _groups(self, ready: Sequence[_Coroutine]) -> list[list[_Coroutine]]:
        """Return the members in groups that are computed together."""
        groups: dict[Hashable, list[_Coroutine]] = {}
        for worker in ready:
            batch = worker.yielded
            key = (self._kind(batch.training).kind, batch.images.shape) if isinstance(batch, Batch) else worker.number
            groups.setdefault(key, []).append(worker)
        return list(groups.values())

    def _answers(
        self, group: Sequence[_Coroutine], networks: dict[tuple[int, ...], JointNetworks]
    ) -> Sequence[tuple[Tensor, Tensor] | None]:
        """Return loss and logits of each batch; None: the run must compute it by itself.

        Args:
            networks: receives the stacked networks in use: those of earlier groups are dropped.
        """
        batches = [worker.yielded for worker in group if isinstance(worker.yielded, Batch)]
        if len(group) == 1:
            return [None]
        key = tuple(id(batch.training) for batch in batches)
        try:
            known = self._networks.get(key)
            if known is None or any(a is not b.training for a, b in zip(known.trainings, batches, strict=True)):
                known = JointNetworks([batch.training for batch in batches])
            networks[key] = known
            return known.differentiate(batches)
        except Exception as error:  # such as lack of memory, or an operation that torch.func does not support
            reason = f"together it failed with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            for batch in batches:
                number = id(batch.training)
                self._kinds[number] = replace(self._kinds[number], reason=reason)
                batch.training.context.report(f"computed alone: {reason}")
            return [None] * len(batches)


@dataclass(frozen=True)
class _Kind:
    """How the networks of a training are computed."""

    training: TrainState
    epoch: int
    reason: str | None
    """why computed alone; None: computed with others of the same kind"""
    kind: Hashable


def _training(worker: _Coroutine) -> TrainState | None:
    return None if worker.yielded is None else worker.yielded.training


def _yield(yielded: Batch | _Computed | None, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Yield to other runs and return the value that resumes this one; its random state is restored."""
    state = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    answer = getcurrent().parent.switch(yielded)
    torch.set_rng_state(state)
    if on_device is not None:
        torch.cuda.set_rng_state(on_device, device)
    return answer
