"""Accuracy and zeros of weights from a file, reported before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prune_lab import models
from prune_lab.accounting.eligibility import select_layers
from prune_lab.foundations.errors import UserError
from prune_lab.pruning.masks.distributions import num_keep_total
from prune_lab.tracking.lines import MANY_ZEROS
from prune_lab.training.evaluation import measure

if TYPE_CHECKING:
    from prune_lab.accounting.eligibility import Layer
    from prune_lab.config.run import RunConfig
    from prune_lab.core.context import Context
    from prune_lab.training.task import PhaseTask


def examine(task: PhaseTask, context: Context) -> dict[str, Any]:
    """Return `start/top1` (the headline metric) and `start/zeros` (fraction) before the first step; report both.

    `start/content` is the digest of the weights' source.
    """
    fp32, split = task.device_config.in_fp32(), task.dataset.eval_split
    trainer = task.config.trainer
    scores = measure(context.model, task.dataset, split, device_config=fp32, trainer=trainer, poll=task.poll)
    zeros = share_of_zeros(context.model)
    limit = trainer.limit_eval_batches
    part = "" if limit is None else f" (trainer.limit_eval_batches={limit})"
    where = f"on the {split} split{part} before training"
    headline = task.dataset.info.task.headline
    task.report(f"start weights: {headline.text(scores[headline.key])} {where}{_hint(task.config)}")
    if zeros >= MANY_ZEROS:
        task.report(f"start weights: {zeros:.2%} of the weights of convolutions and linear layers are zero; training "
                   f"moves those that the method does not mask{keeping(context)}")  # fmt: skip
    content = models.weights_digest(task.config.model)
    return {f"start/{headline.key}": scores[headline.key], "start/zeros": zeros, "start/content": content}


def share_of_zeros(model: nn.Module) -> float:
    """Return the fraction of zeros among the weights of convolutions and linear layers; 0 for a network without."""
    total, zeros = _count(model, _layers(model))
    return zeros / total if total else 0.0


def keeping(context: Context) -> str:
    """Return the options that make a run keep exactly the zeros of a network, as the end of a sentence.

    The largest weights under one global ranking are the nonzero ones; empty if there is no such target.
    """
    computed = {cost.parameter for cost in context.costs if cost.computed}
    eligible = [layer for layer in _layers(context.model) if layer.eligible and layer.parameter not in computed]
    total, zeros = _count(context.model, eligible)
    if not 0 < zeros < total:
        return ""
    sparsity = next(value for digits in range(2, 18) if _asks_for(value := float(f"{zeros / total:.{digits}g}"), total,
                                                                  zeros) or digits == 17)  # fmt: skip
    return f"; method=magnitude_init method.first_layer=sparse method.sparsity={sparsity} keeps these zeros"


def _asks_for(sparsity: float, total: int, zeros: int) -> bool:
    return 0 < sparsity < 1 and num_keep_total(total, sparsity) == total - zeros


def _layers(model: nn.Module) -> list[Layer]:
    try:
        return select_layers(model)
    except UserError:  # no layer that could be pruned
        return []


def _count(model: nn.Module, layers: list[Layer]) -> tuple[int, int]:
    """Return weights and zeros among them."""
    named = dict(model.named_parameters())
    weights = [named[layer.parameter] for layer in layers]
    nonzero = sum(int(torch.count_nonzero(weight)) for weight in weights)
    total = sum(weight.numel() for weight in weights)
    return total, total - nonzero


def _hint(config: RunConfig) -> str:
    """Return a hint that the normalisation may be wrong, if the user did not choose it."""
    if any(line.lstrip("+").startswith(("dataset.mean=", "dataset.std=")) for line in config.overrides):
        return ""
    mean, std = (",".join(f"{value:g}" for value in values) for values in (config.dataset.mean, config.dataset.std))
    return f"; if they were trained with other values than mean {mean} and std {std}, set dataset.mean, dataset.std"
