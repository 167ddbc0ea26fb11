"""The only training loop and the only evaluation loop. They know methods by their hooks, never by name."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prune_lab.config.schedule import PhaseSchedule
from prune_lab.config.trainer import TrainerConfig
from prune_lab.core.context import Context
from prune_lab.core.method import Method
from prune_lab.datasets.task import Task
from prune_lab.foundations import distributed
from prune_lab.foundations.checkpoint import CheckpointPair
from prune_lab.foundations.seeding import seed_device
from prune_lab.optim.learning_rate import learning_rate, set_learning_rate
from prune_lab.optim.optimizer import leave_inner_loop
from prune_lab.training import averaging
from prune_lab.training.device_config import DeviceConfig
from prune_lab.training.evaluation import measure
from prune_lab.training.saving import Saves

_NEVER = 2**62

Differentiate = Callable[["TrainState", Tensor, Tensor], tuple[Tensor, Tensor]]
"""same contract as the function `differentiate`, perhaps for several runs at once"""


class Interrupted(Exception):
    """A signal requested the run to stop; a checkpoint has been written."""


class NonFiniteLoss(RuntimeError):
    """The loss became infinite or NaN."""


@dataclass
class Timestamp:
    """Time in a phase: `batch` batches of `epoch` are done, `step` steps in all."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    wall_s: float = 0.0


def differentiate(training: TrainState, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Add the gradient of a micro-batch to the parameters and return (mean loss, logits in fp32), detached."""
    with training.device_config.autocast():
        logits, state = training.task.forward(training.forward, images, training.carried.get(training.part))
    if state is not None:
        training.carried[training.part] = tree_map(Tensor.detach, state)
    loss = training.task.loss(logits, labels, label_smoothing=training.label_smoothing)
    training.scaler.scale(loss / training.trainer.accumulate).backward()
    return loss.detach(), logits.detach()


@dataclass
class TrainState:
    """All state that a training phase updates; a checkpoint holds its `state_dict`."""

    context: Context
    method: Method
    dataset: Any
    schedule: PhaseSchedule
    batch_size: int
    label_smoothing: float
    trainer: TrainerConfig
    device_config: DeviceConfig
    forward: Callable[[Tensor], Tensor]
    """the model, perhaps compiled and wrapped for data parallelism"""
    data_seed: int
    checkpoints: CheckpointPair
    record: Callable[[dict[str, Any]], None]
    show: Callable[[int, int, str], None]
    stop: Callable[[], bool]
    scaler: torch.amp.GradScaler
    differentiate: Differentiate = differentiate
    ema: torch.optim.swa_utils.AveragedModel | None = None
    progress: Timestamp = field(default_factory=Timestamp)
    clock: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        device = self.device_config.torch_device
        self.sums = torch.zeros(self.task.num_training_sums, dtype=torch.float64, device=device)  # of this epoch
        self.first_bad = torch.tensor(_NEVER, device=device)  # step of the first non-finite loss
        self.last_scores: dict[str, float] | None = None  # of the last epoch, if it finished in this process
        self.train_s = 0.0  # seconds of training steps in this process
        self.earlier_s = 0.0  # seconds of earlier processes, up to the checkpoint resumed from
        self._first_here = self.progress.step
        self.carried: dict[int, Any] = {}  # number of the micro-batch -> state of a recurrent network after it
        self.part = 0  # number of the micro-batch at work
        self.saves = Saves(self.checkpoints, self.trainer.checkpoint_interval_s, device)

    @property
    def task(self) -> Task:
        return self.dataset.info.task

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        if self.context.optimizer is None:
            raise TypeError(f"the phase {self.context.phase} has no optimizer")
        return self.context.optimizer

    @property
    def evaluated(self) -> nn.Module:
        """The network to evaluate: the moving average if there is one."""
        return self.context.model if self.ema is None else self.ema.module

    def state_dict(self) -> dict[str, Any]:
        """Return the state; all processes must call it. Random draws are keyed, so no generator state is included."""
        context = self.context
        return {
            "model": context.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "masks": None if context.masks is None else context.masks.state_dict(),
            "history": None if context.history is None else context.history.state_dict(),
            "method": self.method.state_dict(),
            "progress": vars(self.progress).copy(),
            "sums": distributed.total(self.sums.clone()),
            "cost": context.cost.state_dict(),
            "carried": dict(self.carried),
        }

    @property
    def steps_here(self) -> int:
        """Optimizer steps in this process."""
        return self.progress.step - self._first_here

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a checkpoint, which holds what `state_dict` returned."""
        context = self.context
        context.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if state["masks"] is not None:  # whether or not `setup` draws masks: a method may prune later
            context.install_masks(state["masks"])
            if context.history is not None:
                context.history.load_state_dict(state["history"])
        self.method.load_state_dict(state["method"])
        self.progress = Timestamp(**state["progress"])
        self.sums.copy_(state["sums"] if distributed.is_main() else torch.zeros_like(self.sums))
        context.cost.load_state_dict(state["cost"])
        device = self.device_config.torch_device
        self.carried = tree_map(lambda tensor: tensor.to(device), state["carried"])
        self._first_here, self.earlier_s = self.progress.step, self.progress.wall_s


def fit(training: TrainState) -> None:
    """Train from `training.progress` to the end of the phase, which may lie within an epoch.

    All writing is complete when this ends, also by an error.

    Raises:
        Interrupted: after a checkpoint, when `training.stop()` is true.
        NonFiniteLoss: naming phase, epoch, step and the last good checkpoint.
        SaveError: the disk refused a checkpoint.
    """
    try:
        _train_epochs(training)
        check_finite(training, weights=True)
        training.saves.wait()
    finally:
        training.saves.close()


def _train_epochs(training: TrainState) -> None:
    progress = training.progress
    context = training.context
    # An epoch may be resumed after its last step, before its end-of-epoch work.
    while progress.step < context.last_step or (progress.batch and progress.step > context.first_step):
        started, first = time.monotonic(), progress.batch
        _train_epoch(training)
        seconds = time.monotonic() - started
        training.train_s += seconds
        images = (progress.batch - first) * training.batch_size * training.dataset.info.units_per_row
        _end_epoch(training, seconds=seconds, images_per_s=images / max(seconds, 1e-9))
        progress.epoch, progress.batch = progress.epoch + 1, 0
        training.sums.zero_()
        if distributed.any_rank(training.saves.due(), training.device_config.torch_device):
            save_checkpoint(training)
        if distributed.any_rank(training.stop(), training.device_config.torch_device):
            _interrupt(training)


def _train_epoch(training: TrainState) -> None:
    progress, steps, last_step = training.progress, training.context.steps_per_epoch, training.context.last_step
    training.context.model.train()
    if progress.batch == 0:
        training.carried.clear()
    sync_every = 1 if training.device_config.torch_device.type == "cpu" else 50  # reading the loss stalls a GPU
    batches = iter(
        training.dataset.train_batches(
            epoch=progress.epoch,
            batch_size=training.batch_size,
            start=progress.batch,
            seed=training.data_seed,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
    )
    while progress.batch < steps and progress.step < last_step:
        try:
            train_step(training, *next(batches))
        except ValueError:
            check_finite(training)  # a NaN in a method is better explained by the loss that caused it
            raise
        progress.batch += 1
        progress.step += 1
        if progress.step % sync_every == 0:
            check_finite(training)
            training.show(progress.step, last_step, training.context.phase)
        if _agreed(training, progress.step, training.saves.due()):
            save_checkpoint(training)
        if _agreed(training, progress.step, training.stop()):
            _interrupt(training)
    check_finite(training, weights=True)


def _agreed(training: TrainState, step: int, flag: bool) -> bool:
    """Return whether to act on `flag` now: at once on one process, every tenth step jointly on several."""
    if distributed.world_size() == 1:
        return flag
    return step % 10 == 0 and distributed.any_rank(flag, training.device_config.torch_device)


def train_step(training: TrainState, images: Tensor, labels: Tensor) -> None:
    """Run one step: forward and backward over the micro-batches, the method, the optimizer, the masks."""
    context, method, step = training.context, training.method, training.progress.step
    seed_device(training.device_config.torch_device, training.data_seed, "step", step, distributed.rank())
    optimizer = training.optimizer
    set_learning_rate(optimizer, learning_rate(training.schedule, step, context.steps_per_epoch))
    optimizer.zero_grad(set_to_none=True)
    forward_macs = method.forward_macs(context)
    gradient_macs = method.weight_gradient_macs(context, step)
    method.before_forward(context, step)
    _forward_backward(training, images, labels)
    training.scaler.unscale_(optimizer)
    if method.after_backward(context, step):
        _clip(training)
        _mask_gradients(training)
        training.scaler.step(optimizer)
    training.scaler.update()
    method.after_step(context, step)
    if context.masks is not None:
        context.masks.apply()
    if training.ema is not None:
        training.ema.update_parameters(context.model)
        averaging.clear(training.ema, context.model)
    units = training.task.num_units(labels)
    context.cost.add(units * distributed.world_size(), forward_macs, gradient_macs)


def _forward_backward(training: TrainState, images: Tensor, labels: Tensor) -> None:
    chunks = training.trainer.accumulate
    size = len(images) // chunks
    for index in range(chunks):
        part, training.part = slice(index * size, (index + 1) * size), index
        last = index == chunks - 1
        wait = None if last else getattr(training.forward, "no_sync", None)
        with wait() if wait else contextlib.nullcontext():  # processes exchange gradients once per step
            loss, logits = training.differentiate(training, images[part], labels[part])
        _count(training, loss, logits, labels[part])


def _count(training: TrainState, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
    """Add to the epoch's sums on the device, without reading them back."""
    training.task.add_training(training.sums, loss, logits, labels)
    here = torch.where(torch.isfinite(loss), _NEVER, training.progress.step)
    training.first_bad = torch.minimum(training.first_bad, here)


def _clip(training: TrainState) -> None:
    """Scale gradients so that their norm is at most clip_norm; pruned weights count only if they are trained too."""
    limit = training.trainer.clip_norm
    if limit is None:
        return
    masks = training.context.masks
    masked = {} if masks is None or training.method.trains_pruned() else masks.masked_grads()
    named = training.context.model.named_parameters()
    counted = [masked.get(name, parameter.grad) for name, parameter in named if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(counted)
    torch.nn.utils.clip_grads_with_norm_(training.context.model.parameters(), limit, norm)


def _mask_gradients(training: TrainState) -> None:
    """Zero gradients of pruned weights for an optimizer that normalises the gradients of whole tensors."""
    masks = training.context.masks
    if masks is not None and getattr(training.optimizer, "normalises", False) and not training.method.trains_pruned():
        masks.mask_grads()


def check_finite(training: TrainState, *, weights: bool = False) -> None:
    """Raise NonFiniteLoss if any loss so far was infinite or NaN (on any process).

    Args:
        weights: check the weights as well: a gradient overflow corrupts them one step before the loss shows it.
    """
    context, bad = training.context, training.first_bad
    if distributed.world_size() > 1:
        bad = bad.clone()
        torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MIN)
    step, what = int(bad), "loss is"
    if step == _NEVER and weights and not _all_finite(context.model):
        step, what = max(training.progress.step - 1, 0), "weights are"
    if step == _NEVER:
        return
    kept = training.saves.last_good()
    raise NonFiniteLoss(
        f"{what} not finite in phase {context.phase}, epoch {step // context.steps_per_epoch + 1}, step {step}; "
        f"last good checkpoint: {kept if kept else 'none'}; lower schedule.{context.block}.lr or use trainer.clip_norm"
    )


def _all_finite(model: nn.Module) -> bool:
    return bool(torch.stack([torch.isfinite(tensor).all() for tensor in model.parameters()]).all())


def save_checkpoint(training: TrainState) -> None:
    """Take a checkpoint, which the main process writes, after checking that losses and weights are finite."""
    with training.saves.timed():
        check_finite(training, weights=True)
        training.progress.wall_s += time.monotonic() - training.clock
        training.clock = time.monotonic()
        training.saves.save(training.state_dict())


def _interrupt(training: TrainState) -> NoReturn:
    """Stop after a checkpoint.

    Raises:
        Interrupted: it is on disk.
        SaveError: the disk refused it.
    """
    save_checkpoint(training)
    training.saves.wait()
    raise Interrupted


def _end_epoch(training: TrainState, *, seconds: float, images_per_s: float) -> None:
    context, progress = training.context, training.progress
    figures = training.task.training_figures(distributed.total(training.sums.clone()).tolist())
    row = {
        "phase": context.phase,
        "epoch": progress.epoch + 1,
        "step": progress.step - context.first_step,
        "lr": training.optimizer.param_groups[0]["lr"],
        **{f"train/{key}": value for key, value in figures.items()},
        "macs/inference": context.forward_macs,
        "macs/train": context.cost.total,
        "time/epoch_s": seconds,
        "time/images_per_s": images_per_s,
    }
    if context.steps_per_epoch < training.dataset.num_batches(training.batch_size):
        row["train/images"] = context.steps_per_epoch * training.batch_size
    if context.masks is not None:
        row |= context.mask_figures()
    row |= training.method.end_epoch(context, progress.epoch)
    if training.ema is not None:
        averaging.follow(training.ema, context.model)
    last = progress.step == context.last_step
    if last:
        leave_inner_loop(training.optimizer)
    if last or (progress.epoch + 1) % training.trainer.eval_interval == 0:
        # The last epoch is the reported one: measured in fp32, once.
        device_config = training.device_config.in_fp32() if last else training.device_config
        result = evaluate(training.evaluated, training, device_config=device_config)
        training.last_scores = result if last else None
        row |= {f"eval/{key}": value for key, value in result.items()}
    training.record(row)


def evaluate(model: nn.Module, training: TrainState, *, device_config: DeviceConfig) -> dict[str, float]:
    """Return the figures of the training's evaluation split (see `measure`)."""
    def stop() -> None:
        if distributed.world_size() == 1 and training.stop():
            _interrupt(training)

    distributed.share_buffers(model)
    dataset = training.dataset
    return measure(model, dataset, dataset.eval_split, device_config=device_config, trainer=training.trainer, poll=stop)
