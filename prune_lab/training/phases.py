"""Running one phase: from the previous phase's result to this phase's result and figures."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypedDict

import torch
from torch import nn

from prune_lab import models
from prune_lab.accounting.costs import LayerCost, computed_note, macs_without_weight, profile
from prune_lab.config.run import RunConfig
from prune_lab.core.chain import PlannedPhase
from prune_lab.core.context import Context
from prune_lab.core.method import Method, build_method
from prune_lab.core.phase_result import PhaseResult
from prune_lab.core.usable_layers import usable_layers
from prune_lab.datasets.base import Sizes
from prune_lab.foundations import distributed, tied
from prune_lab.foundations.bits import make_zeros_positive
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.seeding import seed_everything, stable_hash
from prune_lab.models.weights import load_weights
from prune_lab.pruning.channels import surgery
from prune_lab.training import start_weights
from prune_lab.training.averaging import moving_average
from prune_lab.training.evaluation import measure
from prune_lab.training.loop import Timestamp, TrainState, fit
from prune_lab.training.task import PhaseTask


def perform(task: PhaseTask) -> tuple[PhaseResult, Effort]:
    """Run the phase; return its result, and its effort in this process.

    Raises:
        Interrupted, NonFiniteLoss: see loop.fit.
        UserError: options that prove invalid only on the real model or data.
    """
    context = open_context(task)
    begins = task.previous is None and task.model_config.weights is not None
    explained = start_weights.examine(task, context) if begins else {}
    started, acts = time.monotonic(), task.phase.acts
    if acts is None:
        training = _train(task, context)
        # The moving average is a result; training resumes from the network itself.
        model = context.model if task.phase.keeps_optimizer else training.evaluated
        step, effort = training.progress.step, Effort(training.steps_here, training.train_s, training.earlier_s)
        scores = training.last_scores or _exact_scores(task, model)  # none if resumed after its last epoch
    else:
        task.method.setup(context)
        noted = acts(task.method, context) or {}
        context.cost.total += _known_cost(task.method, context)
        model, step, effort = context.model, 0, Effort()
        scores = _exact_scores(task, model)
        task.record(_row(context, scores) | noted)
        explained |= noted
    make_zeros_positive(model)
    figures = scores | {
        "epochs": epochs_done(context, step),
        "steps": step - context.first_step,
        "macs_train": context.cost.total,
        "macs_inference": context.forward_macs,
        "wall_s": time.monotonic() - started + effort.earlier_s,
        "paper_train_ratio": task.method.paper_train_ratio(context),
        "explained": explained | task.method.explain() | _totals(context),
    }
    return result_of(task, context, model, figures), effort


@dataclass(frozen=True)
class Effort:
    """Effort of a phase: in this process, except `earlier_s`."""

    steps: int = 0
    """optimizer steps"""
    train_s: float = 0.0
    """seconds of training steps"""
    earlier_s: float = 0.0
    """seconds of the earlier processes up to the checkpoint resumed from"""


def _train(task: PhaseTask, context: Context) -> TrainState:
    """Train to the end of the phase, from its checkpoint if there is one."""
    training = open_training(task, context)
    task.method.setup(context)
    training.ema = moving_average(context.model, task.config.trainer.ema_decay)
    if task.resumed is not None:
        training.load_state_dict(task.resumed)
    fit(training)
    return training


def _exact_scores(task: PhaseTask, model: nn.Module) -> dict[str, float]:
    """Return the fp32 accuracy of a network on the evaluation split."""
    fp32, dataset = task.device_config.in_fp32(), task.dataset
    return measure(model, dataset, dataset.eval_split, device_config=fp32, trainer=task.config.trainer, poll=task.poll)


def result_of(task: PhaseTask, context: Context, model: nn.Module, figures: dict[str, Any]) -> PhaseResult:
    """Return the result of a phase, its tensors on the CPU.

    Args:
        model: the network that the next phase starts from.
    """
    if task.phase.keeps_optimizer and context.optimizer is not None:
        context.optimizer_state = context.optimizer.state_dict()
    masks = {} if context.masks is None else context.masks.state_dict()
    return PhaseResult(
        model={name: tensor.cpu() for name, tensor in model.state_dict().items()},
        masks=None if context.masks is None else {name: mask.cpu() for name, mask in masks.items()},
        method=task.method.state_dict(),
        widths=context.widths,
        optimizer=context.optimizer_state,
        figures=figures,
    )


def epochs_done(context: Context, step: int) -> float:
    """Return the epochs between the start of the phase and `step`; whole numbers as integers."""
    steps = step - context.first_step
    per_epoch = max(context.steps_per_epoch, 1)
    return steps / per_epoch if steps % per_epoch else steps // per_epoch


def _known_cost(method: Method, context: Context) -> int:
    cost = method.phase_cost(context)
    if cost is None:
        raise TypeError(f"{type(method).__name__} does not know what the phase {context.phase} cost")
    return cost


def _totals(context: Context) -> dict[str, float]:
    if context.masks is None or context.history is None:
        return {}
    return context.history.totals(context.masks.masks)


def _row(context: Context, scores: dict[str, float]) -> dict[str, Any]:
    """Return the record of a phase without training: the network after it."""
    row = {"phase": context.phase, "epoch": 0, "step": 0, "macs/inference": context.forward_macs}
    row |= {"macs/train": context.cost.total} | {f"eval/{key}": value for key, value in scores.items()}
    if context.masks is None:
        return row
    return row | context.mask_figures()


def open_context(task: PhaseTask) -> Context:
    """Return the phase's model, masks and costs: fresh weights in the first phase, the previous result later."""
    config, previous, phase = task.config, task.previous, task.phase
    model, widths = _initial_model(task), None if previous is None else previous.widths
    costs = layer_costs(task.model_config, **task.sizes) if widths is None else profile(model, task.sizes["image_size"])
    if config.trainer.sync_bn and phase.is_training:
        model = distributed.join_batch_norm(model, task.device_config.torch_device)
    task.device_config.placed(model)
    run_method = build_method(config)  # also in phases where it does nothing
    context = Context(
        model=model,
        costs=list(costs),
        layers=usable_layers(run_method, model, costs),
        phase=phase.name,
        seed=config.seed,
        **_steps(task),
        origin=task.origin,
        schedule=task.planned.schedule,
        block=phase.schedule,
        report=task.report,
        amp_scaled=task.device_config.precision == "fp16",
        dataset=task.dataset,
        widths=widths,
        removes_channels=run_method.removes_channels(),
        fresh_model=partial(_drawn_anew, task),
        poll=task.poll,
        validating=task.validating,
    )
    if previous is not None and previous.masks is not None:
        context.install_masks({name: mask.to(context.device) for name, mask in previous.masks.items()})
    if previous is not None and phase.active and previous.method:
        task.method.load_state_dict(previous.method)
    return context


def _initial_model(task: PhaseTask) -> nn.Module:
    """Return the network that a phase starts from, on the CPU."""
    if task.previous is not None:
        return restore_model(task.model_config, task.previous, **task.sizes)
    model = build_model(task.model_config, **task.sizes, seed=task.config.seed)
    for line in load_weights(model, task.model_config):
        task.report(line)
    return model


def _drawn_anew(task: PhaseTask, key: str) -> nn.Module:
    """Return the network with initial weights drawn from the seed and `key`."""
    return build_model(task.model_config, **task.sizes, seed=stable_hash(task.config.seed, key) % 2**31)


class _Steps(TypedDict):
    total_steps: int
    steps_per_epoch: int
    first_step: int
    last_step: int


def _steps(task: PhaseTask) -> _Steps:
    """Return the position of a phase in its schedule, in optimizer steps; all 0 for a phase without training."""
    schedule = task.planned.schedule
    per_epoch = 0 if schedule is None else steps_per_epoch(task)
    first, last = span(task.planned, per_epoch)
    total = per_epoch * schedule.epochs if schedule else 0
    return {"total_steps": total, "steps_per_epoch": per_epoch, "first_step": first, "last_step": last}


def span(planned: PlannedPhase, steps_per_epoch: int) -> tuple[int, int]:
    """Return the first step of a phase and the step after its last, counted from the start of its schedule.

    Raises:
        UserError: the schedule ends earlier, or the phase would start within the warm-up.
    """
    phase, schedule = planned.phase, planned.schedule
    if schedule is None:
        return 0, 0
    total = schedule.epochs * steps_per_epoch
    first, last = (default if place is None else place.step(steps_per_epoch)
                   for place, default in ((phase.begin, 0), (phase.end, total)))
    for place, step in ((phase.begin, first), (phase.end, last)):
        if place is not None and step > total:
            raise UserError(f"{place.typed} lies beyond the {total} steps of schedule.{phase.schedule}")
    if phase.begin is not None and 0 < first < schedule.warmup_epochs * steps_per_epoch:
        raise UserError(
            f"{phase.begin.typed} lies within the warm-up "
            f"(schedule.{phase.schedule}.warmup_epochs={schedule.warmup_epochs:g}, {steps_per_epoch} steps each)"
        )
    return first, last


@lru_cache(maxsize=32)
def layer_costs(model_config: Any, *, num_classes: int, image_size: int) -> tuple[LayerCost, ...]:
    """Return the dense cost per layer of a network as its options build it.

    Raises:
        UserError: the network does not work with images of this size, in evaluation or in training, or cannot be
            saved.
    """
    sizes = {"num_classes": num_classes, "image_size": image_size}
    model = models.build_on_meta(model_config, **sizes)
    with models.one_line(model_config, image_size):
        costs = tuple(profile(model, image_size))
    models.check_training_pass(model, model_config, **sizes)
    tied.require_tensors(model, model_config.name)
    return costs


@lru_cache(maxsize=32)
def uncounted_macs(model_config: Any, *, num_classes: int, image_size: int) -> int:
    """Return the `macs_without_weight` of a network as its options build it."""
    model = models.build_on_meta(model_config, num_classes=num_classes, image_size=image_size)
    return macs_without_weight(model, image_size)


def dense_note(config: RunConfig, model_config: Any, sizes: Sizes) -> str | None:
    """Return one line on the layers that no method can prune; None if there are none or the run prunes nothing."""
    if not any(phase.active for phase in build_method(config).chain()):
        return None
    return computed_note(layer_costs(model_config, **sizes))


def build_model(model_config: Any, *, num_classes: int, image_size: int, seed: int) -> nn.Module:
    """Return the freshly initialised network of `seed`, on the CPU."""
    seed_everything(seed, "init")
    return models.build(model_config, num_classes=num_classes, image_size=image_size)


def restore_model(model_config: Any, result: PhaseResult, *, num_classes: int, image_size: int) -> nn.Module:
    """Return the network that a phase saved, on the CPU, with the widths of that phase."""
    model = build_model(model_config, num_classes=num_classes, image_size=image_size, seed=0)
    if result.widths is not None:
        surgery.narrow(model, result.widths)
    model.load_state_dict(result.model)
    return model


def steps_per_epoch(task: PhaseTask) -> int:
    """Return optimizer steps per epoch.

    Raises:
        UserError: the batch does not fit the data, the processes or the micro-batches.
    """
    batch, trainer = task.config.schedule.batch_size, task.config.trainer
    parts = distributed.world_size() * trainer.accumulate
    if batch % parts:
        raise UserError(
            f"schedule.batch_size={batch} must be a multiple of processes x trainer.accumulate = "
            f"{distributed.world_size()} x {trainer.accumulate}"
        )
    steps = task.dataset.num_batches(batch)
    if steps == 0:
        raise UserError(
            f"schedule.batch_size={batch} exceeds the {task.dataset.info.num_train} training images of "
            f"{task.config.dataset.name}"
        )
    return steps if trainer.limit_train_batches is None else min(steps, trainer.limit_train_batches)


def open_training(task: PhaseTask, context: Context) -> TrainState:
    """Return the loop's state for a training phase, with a fresh optimizer and no moving average yet."""
    config, device_config, order, schedule = task.config, task.device_config, task.phase.order, task.planned.schedule
    if schedule is None:
        raise TypeError(f"the phase {context.phase} has no schedule to train by")
    context.optimizer = task.method.build_optimizer(context.model, config.optimizer)
    if task.previous is not None and task.previous.optimizer is not None:
        context.optimizer.load_state_dict(task.previous.optimizer)
    forward = distributed.parallel(context.model)
    spe, first = max(context.steps_per_epoch, 1), context.first_step
    return TrainState(
        context=context,
        method=task.method,
        dataset=task.dataset,
        schedule=schedule,
        batch_size=config.schedule.batch_size,
        label_smoothing=config.schedule.label_smoothing,
        trainer=config.trainer,
        device_config=device_config,
        forward=device_config.compiled(forward) if task.method.can_compile else forward,
        data_seed=stable_hash(config.seed, order or context.phase) % 2**31,
        checkpoints=task.checkpoints,
        record=task.record,
        show=task.show,
        stop=task.stop,
        progress=Timestamp(epoch=first // spe, batch=first % spe, step=first),
        differentiate=task.differentiate,
        scaler=torch.amp.GradScaler(device_config.torch_device.type, enabled=device_config.precision == "fp16"),
    )
