"""Training steps to time: every training phase of a method, on random images of a data set's sizes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Plan
from prune_lab import datasets
from prune_lab.compose.choices import choices, conf_dir
from prune_lab.compose.overrides import compose_checked
from prune_lab.config.run import RunConfig
from prune_lab.core.chain import PlannedPhase, Results
from prune_lab.core.phase import Phase
from prune_lab.pipeline.settling import settle, settled
from prune_lab.pipeline.validation import RandomImages, set_up, task_without_files
from prune_lab.training import loop
from prune_lab.training.device_config import resolve_device_config
from prune_lab.training.loop import TrainState
from prune_lab.training.phases import open_context, open_training
from prune_lab.training.task import PhaseTask

CALM_LR = 1e-4
"""learning rate of timed steps: weights that run away, or learn their batch by heart, would change what is measured"""
SMALL = ("model=resnet20", "dataset=cifar10", "schedule=cifar_160", "logger.wandb=disabled")
"""ResNet-20, 32 px, batch 128; a schedule long enough for every method as shipped"""


def large(*, quick: bool) -> tuple[str, ...]:
    """ResNet-50, 224 px: batch 64 on a GPU; on a CPU, where such a step takes many seconds, 4 or 2.

    The schedule has the length that it has with batches of 256, whatever the batch is.
    """
    batch = 64 if torch.cuda.is_available() else 2 if quick else 4
    trainer = ("trainer.limit_train_batches=5000", "trainer.compile=false")
    return ("model=resnet50", "dataset=imagenet", f"schedule.batch_size={batch}", *trainer, "logger.wandb=disabled")


@dataclass(frozen=True)
class Options:
    """What the command asks for."""

    overrides: tuple[str, ...] = ()
    rounds: int | None = None
    quick: bool = False
    root: str | None = None
    accuracy: bool = False
    epochs: int = 3
    batches: int = 30

    def plan(self, rounds: int, seconds: float) -> Plan:
        """Return the rounds of a comparison: those typed, few with --quick, else what the section takes."""
        if self.quick:
            return Plan(self.rounds or 8, 5.0)
        return Plan(self.rounds or rounds, float("inf") if self.rounds else seconds)

    def num_starts(self) -> int:
        """Return the rounds of a comparison of processes, each of which imports torch."""
        return self.rounds or (2 if self.quick else 8)

    def over(self, *base: str) -> tuple[str, ...]:
        """Return the options `base` with those typed in their places."""
        return tuple({line.partition("=")[0]: line for line in (*base, *self.overrides)}.values())


def methods() -> list[str]:
    return choices(conf_dir(), "method")


def compose(overrides: Sequence[str]) -> RunConfig:
    """Return the checked options of a run; raises as `compose_checked`."""
    return next(iter(compose_checked(conf_dir(), list(overrides), sweep=False)))


@dataclass(frozen=True)
class Workload:
    """One training phase at a step of it."""

    name: str
    training: TrainState
    updates: Collection[int]
    """steps at which the method changes its masks on a schedule of its own, in order"""
    batch: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        size, numeric = self.training.batch_size, self.training.device_config
        images, labels = self.training.dataset.batch(size)
        object.__setattr__(self, "batch", (images.to(memory_format=numeric.memory_format), labels))

    @property
    def device(self) -> torch.device:
        return self.training.device_config.torch_device

    @property
    def interval(self) -> float:
        """Mean number of steps between two updates."""
        steps = list(self.updates)
        return (steps[-1] - steps[0]) / max(len(steps) - 1, 1) or self.training.context.total_steps

    def ordinary(self) -> None:
        """Take a step without an update, always at the same place of the schedule."""
        first = self.training.context.first_step + 1
        self._step(next(step for step in range(first, first + len(self.updates) + 1) if step not in self.updates))

    def update(self) -> None:
        """Take a step that changes the masks; not the first such step, which may come before there is momentum."""
        self._step(list(self.updates)[:2][-1])

    def _step(self, step: int) -> None:
        self.training.progress.step = step
        loop.train_step(self.training, *self.batch)

    def check(self) -> None:
        """Raise NonFiniteLoss if the weights ran away: times of such steps say nothing."""
        loop.check_finite(self.training, weights=True)


def workload(method: str, overrides: Sequence[str]) -> Workload:
    """Return the first training phase of a method; raises as `workloads`."""
    return next(iter(workloads(method, overrides)))


def workloads(method: str, overrides: Sequence[str]) -> Iterator[Workload]:
    """Yield the method's own training phases; dense training is that of method=dense.

    What comes before them is done in miniature, as in a dry run; of repeated phases (train_1, train_2 ...) the first.

    Raises:
        UserError: options that do not go together.
    """
    chain = _Tasks(compose([f"method={method}", *overrides]))
    wanted = [entry for entry in chain.planned if entry.phase.is_training and _counts(method, entry)]
    stems = [stem(entry.phase) for entry in wanted]
    wanted = [entry for index, entry in enumerate(wanted) if stems[index] not in stems[:index]]
    for task in chain.up_to(wanted[-1] if wanted else None):
        if task.planned in wanted:
            name = method if len(wanted) == 1 else f"{method}, {task.phase.name}"
            training = _open(task)
            yield Workload(name, training, _updates(task.method))


def stem(phase: Phase) -> str:
    """Return the name that repeated phases share: train of train_1, train_2 ..."""
    return re.sub(r"_\d+$", "", phase.name)


def _counts(method: str, entry: PlannedPhase) -> bool:
    return entry.phase.active or method == "dense"


def _updates(method: object) -> Collection[int]:
    """Return the steps at which masks change, as methods that drop and grow, or that cut by and by, keep them."""
    return getattr(method, "updates", None) or getattr(method, "cuts", None) or ()


class _Tasks:
    """The phases of a run on random images, each on what the ones before it left."""

    def __init__(self, config: RunConfig) -> None:
        self.device_config = resolve_device_config(config.trainer)
        info = datasets.describe(config.dataset)
        run = settle(settled(config, info), info, self.device_config, fingerprint=None, content=None)
        self.config, self.model, self.planned = run.config, run.model_config, run.planned
        self.dataset = RandomImages(info, self.device_config.torch_device)

    def up_to(self, last: PlannedPhase | None) -> Iterator[PhaseTask]:
        """Yield the tasks up to that of `last` (None: no one); the next one starts from what set-up alone leaves."""
        done = Results(entry.phase for entry in self.planned)
        for entry in self.planned if last is not None else ():
            task = task_without_files(self.config, self.model, entry, self.dataset, self.device_config, done)
            yield task
            if entry is last:
                return
            done.add(entry.phase, set_up(replace(task))[0])


def tasks(method: str, overrides: Sequence[str]) -> Iterator[PhaseTask]:
    """Yield a task for each phase of a method's chain, on random images; raises as `workloads`."""
    found = _Tasks(compose([f"method={method}", *overrides]))
    yield from found.up_to(found.planned[-1])


def _open(task: PhaseTask) -> TrainState:
    """Return the loop's state at the first step of a training phase."""
    context = open_context(task)
    training = open_training(task, context)
    task.method.setup(context)
    training.schedule = replace(training.schedule, lr=CALM_LR, final_lr=0.0)  # the method knows the real one
    context.model.train()
    return training


def bare_steps(work: Workload, count: int = 1) -> Callable[[], None]:
    """Return `count` steps without prune-lab: forward, loss, backward, fused SGD on a copy, in the same formats."""
    numeric, model = work.training.device_config, copy.deepcopy(work.training.context.model)
    forward = numeric.compiled(model)
    options = {"lr": CALM_LR, "momentum": 0.9, "weight_decay": 5e-4, "fused": work.device.type in ("cpu", "cuda")}
    optimizer = torch.optim.SGD(model.parameters(), **options)
    images, labels = work.batch

    def steps() -> None:
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            with numeric.autocast():
                logits = forward(images).float()
            F.cross_entropy(logits, labels).backward()
            optimizer.step()

    return steps
