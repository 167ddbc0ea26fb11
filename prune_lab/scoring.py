"""What methods that score weights share: balanced images, gradients without a trace on the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_lab.context import Context
from prune_lab.schema import ConfigError

Order = Literal["stratified", "class_sorted", "random"]


def batches(
    context: Context, *, per_class: int, batch_size: int, order: Order = "stratified", augment: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images, labels) of `per_class` training images of every class, in batches of nearly equal size.

    The images are drawn from the seed, the same on every process and in every call.

    Args:
        batch_size: most images per batch.
        order: stratified: classes take turns, so that every batch holds all of them alike; class_sorted: class after
            class (official GraSP code); random.

    Raises:
        ConfigError: a class has fewer images.
    """
    source = context.generator("scoring images")
    chosen = balanced(context.dataset.train_labels, per_class, context.dataset.info.num_classes, order, source)
    parts = -(-len(chosen) // batch_size)
    seed = context.seed if augment else None
    yield from context.dataset.train_subset(chosen.tensor_split(parts), augment_seed=seed)


def balanced(labels: Tensor, per_class: int, num_classes: int, order: Order, source: torch.Generator) -> Tensor:
    """Return positions [per_class * num_classes] in `labels`, `per_class` of each class.

    Raises:
        ConfigError: a class has fewer.
    """
    check_classes(labels, per_class, num_classes)
    rows = []
    for label in range(num_classes):
        members = (labels == label).nonzero().flatten()
        rows.append(members[torch.randperm(len(members), generator=source)[:per_class]])
    chosen = torch.stack(rows)
    if order == "random":
        flat = chosen.flatten()
        return flat[torch.randperm(len(flat), generator=source)]
    return chosen.flatten() if order == "class_sorted" else chosen.t().flatten()


def check_classes(labels: Tensor, per_class: int, num_classes: int) -> None:
    """Raise ConfigError if a class has fewer than `per_class` of `labels`."""
    for label, count in enumerate(torch.bincount(labels, minlength=num_classes).tolist()):
        if count < per_class:
            raise ConfigError(
                f"method.samples_per_class={per_class} exceeds the {count} training images of class {label}"
            )


@contextlib.contextmanager
def untouched(model: nn.Module, *, train_mode: bool) -> Iterator[None]:
    """Score inside: gradients on for all parameters, batch norm on batch statistics or on running ones.

    Afterwards parameters' gradients are gone and buffers, modes and `requires_grad` are as before, bit for bit. The
    caller answers for the parameters' values. No copy of the weights is made.
    """
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    try:
        model.train(train_mode)
        for parameter in wanted:
            parameter.requires_grad_(True)
            parameter.grad = None
        yield
    finally:
        torch.set_rng_state(state)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        for parameter, needed in wanted.items():
            parameter.grad = None
            parameter.requires_grad_(needed)
        for module, mode in modes.items():
            module.training = mode


def loss(model: nn.Module, images: Tensor, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return the summed cross-entropy of logits / temperature, in the model's precision (no autocast)."""
    return F.cross_entropy(model(images).float() / temperature, labels, reduction="sum")


def gradient_norm(context: Context, data: Iterator[tuple[Tensor, Tensor]], *, train_mode: bool) -> float:
    """Return the L2 norm of the mean loss gradient over the kept eligible weights (all of them without masks)."""
    named = context.parameters()
    weights = {layer.parameter: named[layer.parameter] for layer in context.eligible()}
    masks = {} if context.masks is None else context.masks.masks
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    images_seen = 0
    with untouched(context.model, train_mode=train_mode):
        for images, labels in data:
            gradients = torch.autograd.grad(loss(context.model, images, labels), list(weights.values()))
            torch._foreach_add_(list(sums.values()), gradients)
            images_seen += len(images)
    kept = [total if name not in masks else total * masks[name] for name, total in sums.items()]
    return float(torch.stack([total.double().square().sum() for total in kept]).sum().sqrt()) / images_seen
