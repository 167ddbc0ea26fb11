"""Tools for methods that score weights: loss, and its gradients without side effects on the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.pruning.scores.evaluation_mode import preserve_state

if TYPE_CHECKING:
    from torch import Tensor, nn

    Data = Iterable[tuple[Tensor, Tensor]]


def loss(model: nn.Module, images: Tensor, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return the summed cross-entropy of logits / temperature, in the model's precision and fp32 at least.

    Raises:
        UserError: it is infinite or NaN.
    """
    value = _cross_entropy(model, images, labels, temperature)
    if not bool(torch.isfinite(value)):
        raise UserError(f"the loss of the scoring images is {value.item()}: look at the start weights and the images")
    return value


def _cross_entropy(model: nn.Module, images: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    logits = model(images)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits / temperature, labels, reduction="sum")


def gradients(
    model: nn.Module, weights: Sequence[Tensor], data: Data, *, temperature: float = 1.0
) -> Iterator[tuple[Tensor, ...]]:
    """Yield per batch the gradients of the summed loss, one tensor like each of `weights`."""
    for images, labels in data:
        yield torch.autograd.grad(loss(model, images, labels, temperature=temperature), weights)


def gradient_norm(
    model: nn.Module, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], data: Data, *, train_mode: bool
) -> float:
    """Return the L2 norm of the mean loss gradient over those of `weights` that `masks` keep (all without a mask).

    The norm is only reported: an infinite or NaN loss makes it infinite or NaN too, without an error.
    """
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    images_seen = 0
    with preserve_state(model, train_mode=train_mode):
        for images, labels in data:
            value = _cross_entropy(model, images, labels)
            gradients = torch.autograd.grad(value, list(weights.values()))
            torch._foreach_add_(list(sums.values()), gradients)
            images_seen += len(images)
    kept = [total if name not in masks else total * masks[name] for name, total in sums.items()]
    return float(torch.stack([total.double().square().sum() for total in kept]).sum().sqrt()) / images_seen
