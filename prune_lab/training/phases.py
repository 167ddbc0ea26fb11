"""One phase at work: from the result of the phase before to this phase's result and figures."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from prune_lab import models
from prune_lab.accounting.costs import LayerCost, computed_note, profile
from prune_lab.config.run import RunConfig
from prune_lab.core.chain import PlannedPhase
from prune_lab.core.context import Context
from prune_lab.core.usable_layers import usable_layers
from prune_lab.foundations import distributed, tied
from prune_lab.foundations.bits import make_zeros_positive
from prune_lab.foundations.schema import ConfigError
from prune_lab.foundations.seeding import seed_everything, stable_hash
from prune_lab.models.weights import load_weights
from prune_lab.pruning.channels import surgery
from prune_lab.training import start_weights
from prune_lab.training.averaging import moving_average
from prune_lab.training.evaluation import measure
from prune_lab.training.job import Job
from prune_lab.training.loop import Progress, Training, fit


def perform(job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """Do the phase and return (result tensors, figures).

    Raises:
        Interrupted, NonFiniteLoss: see loop.fit.
        ConfigError: options that only prove wrong on the real model or data.
    """
    context = open_context(job)
    begins = job.previous is None and job.model_config.weights is not None
    brought = start_weights.examine(job, context) if begins else {}
    method, phase = job.method, job.planned.phase
    started, model = time.monotonic(), context.model
    progress, scores, train_s, noted, resumed_at = Progress(), None, 0.0, {}, context.first_step
    if phase.hook == "train":
        training = open_training(job, context)
        method.setup(context)
        training.ema = moving_average(context.model, job.config.trainer.ema_decay)
        if job.resumed is not None:
            training.load_state_dict(job.resumed)
            started -= training.progress.wall_s
            resumed_at = training.progress.step
        fit(training)
        # The moving average is a result; what training goes on from is the network itself.
        model, progress = context.model if phase.keeps_optimizer else training.evaluated, training.progress
        scores, train_s = training.last_scores, training.train_s
    else:
        method.setup(context)
        noted = getattr(method, phase.hook)(context) or {}
        context.cost.total += method.phase_cost(context)
        model = context.model  # channels may have gone
    if scores is None:  # no epoch ended here: a phase without training, or one resumed after its last epoch
        trainer, exact = job.config.trainer, job.numerics.exact()
        scores = measure(model, job.dataset, job.dataset.eval_split, numerics=exact, trainer=trainer, poll=job.poll)
    if phase.hook != "train":
        job.record(_row(context, scores) | noted)
    make_zeros_positive(model)
    figures = scores | {
        "epochs": epochs_done(context, progress.step),
        "steps": progress.step - context.first_step,
        "macs_train": context.cost.total,
        "macs_inference": context.forward_macs,
        "wall_s": time.monotonic() - started,
        "train_s_here": train_s,
        "steps_here": progress.step - resumed_at,
        "paper_train_ratio": method.paper_train_ratio(context),
        "explained": brought | noted | method.explain() | _totals(context),
    }
    result = {
        "model": {name: tensor.cpu() for name, tensor in model.state_dict().items()},
        "masks": None if context.masks is None else {k: v.cpu() for k, v in context.masks.state_dict().items()},
        "method": method.state_dict(),
        "widths": context.widths,
    }
    if phase.keeps_optimizer:
        context.optimizer_state = context.optimizer.state_dict()
    if context.optimizer_state is not None:
        result["optimizer"] = context.optimizer_state
    return result, figures


def epochs_done(context: Context, step: int) -> float:
    """Return the epochs between the start of the phase and `step`; whole numbers as such."""
    steps = step - context.first_step
    per_epoch = max(context.steps_per_epoch, 1)
    return steps / per_epoch if steps % per_epoch else steps // per_epoch


def _totals(context: Context) -> dict[str, float]:
    return {} if context.masks is None else context.history.totals(context.masks.masks)


def _row(context: Context, scores: dict[str, float]) -> dict[str, Any]:
    """Return the record of a phase without training: the network as the phase leaves it."""
    row = {"phase": context.phase, "epoch": 0, "step": 0, "macs/inference": context.forward_macs}
    row |= {"macs/train": context.cost.total} | {f"eval/{key}": value for key, value in scores.items()}
    if context.masks is None:
        return row
    return row | context.mask_figures()


def open_context(job: Job) -> Context:
    """Return the phase's model, masks and costs: fresh weights in the first phase, the previous result later."""
    config, info = job.config, job.dataset.info
    sizes = {"num_classes": info.num_classes, "image_size": info.image_size}
    widths = None if job.previous is None else job.previous.get("widths")
    if job.previous is None:
        model = build_model(job.model_config, **sizes, seed=config.seed)
        for line in load_weights(model, job.model_config):
            job.report(line)
    else:
        model = restore_model(job.model_config, job.previous, **sizes)
    costs = layer_costs(job.model_config, **sizes) if widths is None else profile(model, info.image_size)
    if config.trainer.sync_bn and job.planned.phase.hook == "train":
        model = distributed.join_batch_norm(model, job.numerics.torch_device)
    job.numerics.placed(model)
    phase, schedule = job.planned.phase, job.planned.schedule
    steps = 0 if schedule is None else steps_per_epoch(job)
    first_step, last_step = span(job.planned, steps)
    context = Context(
        model=model,
        costs=list(costs),
        layers=usable_layers(config.method, model, costs),
        phase=phase.name,
        seed=config.seed,
        total_steps=steps * schedule.epochs if schedule else 0,
        steps_per_epoch=steps,
        first_step=first_step,
        last_step=last_step,
        origin=job.origin,
        schedule=schedule,
        block=phase.schedule,
        report=job.report,
        amp_scaled=job.numerics.precision == "fp16",
        dataset=job.dataset,
        widths=widths,
        removes_channels=config.method.removes_channels(),
        fresh_model=lambda word: build_model(job.model_config, **sizes, seed=stable_hash(config.seed, word) % 2**31),
        poll=job.poll,
        rehearsal=job.rehearsal,
    )
    if job.previous is not None and job.previous["masks"] is not None:
        context.install_masks({name: mask.to(context.device) for name, mask in job.previous["masks"].items()})
    if job.previous is not None and job.planned.phase.active and job.previous["method"]:
        job.method.load_state_dict(job.previous["method"])
    return context


def span(planned: PlannedPhase, steps_per_epoch: int) -> tuple[int, int]:
    """Return the first step of a phase and the one before which it ends, counted from the start of its schedule.

    Raises:
        ConfigError: the schedule ends before, or the phase would start within the warm-up.
    """
    phase, schedule = planned.phase, planned.schedule
    if schedule is None:
        return 0, 0
    total = schedule.epochs * steps_per_epoch
    first, last = (default if place is None else place.step(steps_per_epoch)
                   for place, default in ((phase.begin, 0), (phase.end, total)))
    for place, step in ((phase.begin, first), (phase.end, last)):
        if step > total:
            raise ConfigError(f"{place.typed} lies beyond the {total} steps of schedule.{phase.schedule}")
    if 0 < first < schedule.warmup_epochs * steps_per_epoch:
        raise ConfigError(
            f"{phase.begin.typed} lies within the warm-up "
            f"(schedule.{phase.schedule}.warmup_epochs={schedule.warmup_epochs:g}, {steps_per_epoch} steps each)"
        )
    return first, last


@lru_cache(maxsize=32)
def layer_costs(model_config: Any, *, num_classes: int, image_size: int) -> tuple[LayerCost, ...]:
    """Return the dense cost per layer of a network as its options build it.

    Raises:
        ConfigError: the network does not work with images of this size, in evaluation or in training, or cannot be
            saved.
    """
    sizes = {"num_classes": num_classes, "image_size": image_size}
    model = models.build_on_meta(model_config, **sizes)
    with models.one_line(model_config, image_size):
        costs = tuple(profile(model, image_size))
    models.check_training_pass(model, model_config, **sizes)
    tied.require_tensors(model, model_config.name)
    return costs


def dense_note(config: RunConfig, model_config: Any, info: Any) -> str | None:
    """Return one line on the layers that no method can prune; None: there are none, or the run prunes nothing."""
    if not any(phase.active for phase in config.method.chain()):
        return None
    return computed_note(layer_costs(model_config, num_classes=info.num_classes, image_size=info.image_size))


def build_model(model_config: Any, *, num_classes: int, image_size: int, seed: int) -> nn.Module:
    """Return the freshly initialised network of `seed`, on the CPU."""
    seed_everything(seed, "init")
    return models.build(model_config, num_classes=num_classes, image_size=image_size)


def restore_model(model_config: Any, result: dict[str, Any], *, num_classes: int, image_size: int) -> nn.Module:
    """Return the network that a phase left, on the CPU, with the widths it left it with."""
    model = build_model(model_config, num_classes=num_classes, image_size=image_size, seed=0)
    if result.get("widths") is not None:
        surgery.narrow(model, result["widths"])
    model.load_state_dict(result["model"])
    return model


def steps_per_epoch(job: Job) -> int:
    """Return optimizer steps per epoch.

    Raises:
        ConfigError: the batch does not fit the data, the processes or the micro-batches.
    """
    batch, trainer = job.config.schedule.batch_size, job.config.trainer
    parts = distributed.world_size() * trainer.accumulate
    if batch % parts:
        raise ConfigError(
            f"schedule.batch_size={batch} must be a multiple of processes x trainer.accumulate = "
            f"{distributed.world_size()} x {trainer.accumulate}"
        )
    steps = job.dataset.num_batches(batch)
    if steps == 0:
        raise ConfigError(
            f"schedule.batch_size={batch} exceeds the {job.dataset.info.num_train} training images of "
            f"{job.config.dataset.name}"
        )
    return steps if trainer.limit_train_batches is None else min(steps, trainer.limit_train_batches)


def open_training(job: Job, context: Context) -> Training:
    """Return the loop's state for a training phase, with a fresh optimizer and no moving average yet."""
    config, numerics, order = job.config, job.numerics, job.planned.phase.order
    context.optimizer = job.method.build_optimizer(context.model, config.optimizer)
    start = None if job.previous is None else job.previous.get("optimizer")
    if start is not None:
        context.optimizer.load_state_dict(start)
    forward = distributed.parallel(context.model)
    spe, first = max(context.steps_per_epoch, 1), context.first_step
    return Training(
        context=context,
        method=job.method,
        dataset=job.dataset,
        schedule=job.planned.schedule,
        batch_size=config.schedule.batch_size,
        label_smoothing=config.schedule.label_smoothing,
        trainer=config.trainer,
        numerics=numerics,
        forward=numerics.compiled(forward) if job.method.can_compile else forward,
        data_seed=stable_hash(config.seed, order or context.phase) % 2**31,
        checkpoints=job.checkpoints,
        record=job.record,
        show=job.show,
        stop=job.stop,
        progress=Progress(epoch=first // spe, batch=first % spe, step=first),
        differentiate=job.differentiate,
        scaler=torch.amp.GradScaler(numerics.torch_device.type, enabled=numerics.precision == "fp16"),
    )
