"""The Hessian of the training loss at a network, as products with vectors over all trainable parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.pruning.scores import evaluation_mode, gradients, second_derivatives

if TYPE_CHECKING:
    from torch import Tensor, nn


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Return all values as one vector, tensor after tensor in row-major order."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return `vector` [n] cut into tensors shaped like `like`."""
    parts = vector.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def hessian_product(
    model: nn.Module,
    weights: Sequence[nn.Parameter],
    data: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    vector: Tensor,
) -> Tensor:
    """Return H v [n], H the Hessian of the mean cross-entropy over `data` by `weights`.

    The model is in eval mode and in fp32: with batch statistics, augmentation or dropout every product would be that of
    another operator. Its buffers and modes are restored; gradients are lost.

    Args:
        data: returns the same images and labels in each call; the graph of one batch is in memory at a time.
        vector: [n], over `weights` as `flatten` orders them.

    Raises:
        UserError: an operator of the model has no second derivative, or the loss is not finite.
    """
    directions, images_seen = unflatten(vector, weights), 0
    with evaluation_mode.preserve_state(model, train_mode=False), evaluation_mode.twice_differentiable(model):
        for images, labels in data():
            _add_product(model, weights, images, labels, directions)
            images_seen += len(images)
        products = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    return flatten(products) / images_seen


def _add_product(
    model: nn.Module, weights: Sequence[nn.Parameter], images: Tensor, labels: Tensor, directions: Sequence[Tensor]
) -> None:
    """Add to `weight.grad` the Hessian of the batch's summed loss times `directions`."""
    loss = gradients.loss(model, images, labels)
    slopes = torch.autograd.grad(loss, list(weights), create_graph=True, materialize_grads=True)
    pairs = [(slope, part) for slope, part in zip(slopes, directions, strict=True) if slope.requires_grad]
    try:
        # Not autograd.grad: see second_derivatives.hessian_gradient.
        torch.autograd.backward([slope for slope, _ in pairs], [part for _, part in pairs])
    except RuntimeError as error:
        found = second_derivatives.without_second_derivative(model, images[:2])
        if found is None:
            raise
        raise UserError(f"the Hessian needs second derivatives, which {found} does not have") from error
