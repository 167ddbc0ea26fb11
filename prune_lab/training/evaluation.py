"""Accuracy and loss of a network on a split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from prune_lab.config.trainer import TrainerConfig
from prune_lab.foundations import distributed
from prune_lab.training.device_config import DeviceConfig


@torch.no_grad()
def measure(
    model: nn.Module,
    dataset: Any,
    split: str,
    *,
    device_config: DeviceConfig,
    trainer: TrainerConfig,
    poll: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return the task's figures over every image of `split`, each counted once over all processes.

    If `trainer.limit_eval_batches` left some out, `images` is the number used.

    Args:
        model: maps [N, 3, H, W] to [N, classes]; set to eval mode, then restored.
        split: "val" or "test".
        device_config: precision of the forward pass; logits are compared in fp32.
        poll: called between batches; may raise to stop.
    """
    was_training = model.training
    model.eval()
    task = dataset.info.task
    sums = torch.zeros(task.num_evaluation_sums, dtype=torch.float64, device=device_config.torch_device)
    batches = dataset.eval_batches(
        split, trainer.eval_batch_size, rank=distributed.rank(), world_size=distributed.world_size()
    )
    state = None
    for index, (images, labels) in enumerate(batches):
        if trainer.limit_eval_batches is not None and index >= trainer.limit_eval_batches:
            break
        with device_config.autocast():
            logits, state = task.forward(model, images, state)
        task.add_evaluation(sums, logits, labels)
        poll()
    model.train(was_training)
    counted = distributed.total(sums).tolist()
    scores = task.evaluation_figures(counted)
    if trainer.limit_eval_batches is None:
        return scores
    every = dataset.info.num_val if split == "val" else dataset.info.num_test
    return scores | {task.unit: int(counted[-1])} if counted[-1] < every else scores
