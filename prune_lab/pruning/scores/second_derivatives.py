"""Products of the Hessian with vectors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.pruning.scores.evaluation_mode import twice_differentiable
from prune_lab.pruning.scores.gradients import gradients, loss

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prune_lab.pruning.scores.gradients import Data


def hessian_gradient(
    model: nn.Module,
    weights: Sequence[Tensor],
    data: Callable[[], Data],
    *,
    num_images: int,
    temperature: float = 1.0,
    per_batch: bool = False,
    low_memory: bool = False,
) -> list[Tensor]:
    """Return H g, one tensor like each of `weights`; the vector g is held constant.

    Memory: the graph of one batch at a time, and two tensors per weight. Gradients of all parameters are lost.

    Args:
        data: returns the same batches in each call.
        num_images: images in `data`.
        per_batch: False: gradient and Hessian of the mean loss over all images, read twice; True: the mean over
            batches, by their size, of H g of the mean loss of each.
        low_memory: store only the inputs of blocks and recompute the rest, twice.

    Raises:
        UserError: an operator of the model has no second derivative; names the module.

    Source: Wang et al. 2020, eq. 8, arXiv 2002.07376.
    """
    from prune_lab.pruning.scores.recompute import blocks  # its file defines an nn.Module and so imports torch

    direction = None
    if not per_batch:
        direction = [torch.zeros_like(weight) for weight in weights]
        for slopes in gradients(model, weights, data(), temperature=temperature):
            torch._foreach_add_(direction, slopes, alpha=1 / num_images)
    with twice_differentiable(model), blocks(model, weights) if low_memory else contextlib.nullcontext():
        for images, labels in data():
            _add_product(model, weights, images, labels, direction, temperature=temperature)
    products = []
    for weight in weights:
        assert weight.grad is not None
        products.append(weight.grad / num_images)
        weight.grad = None
    return products


def _add_product(
    model: nn.Module,
    weights: Sequence[Tensor],
    images: Tensor,
    labels: Tensor,
    direction: Sequence[Tensor] | None,
    *,
    temperature: float,
) -> None:
    """Add to `weight.grad` the Hessian of a batch's summed loss times `direction`, None: the gradient of its mean loss.

    A separate function, so that the graph is freed before the next batch builds one.
    """
    slopes = torch.autograd.grad(loss(model, images, labels, temperature=temperature), weights, create_graph=True)
    if direction is None:
        direction = [slope.detach() / len(images) for slope in slopes]
    try:
        # Not autograd.grad: with selected inputs it never reaches the error that torch raises behind a function marked
        # @once_differentiable, and the result would silently lack a part.
        torch.autograd.backward(slopes, direction)
    except RuntimeError as error:
        found = without_second_derivative(model, images[:2])
        if found is None:
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"scores need second derivatives, which {found} does not have: {reason}") from error


def without_second_derivative(model: nn.Module, images: Tensor) -> str | None:
    """Return the name and type of the innermost module that cannot be differentiated twice, None if all can."""
    calls: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[name] = module, args, kwargs

    named = list(model.named_modules())
    hooks = [module.register_forward_pre_hook(partial(note, name), with_kwargs=True) for name, module in named]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    for name in sorted(calls, key=lambda name: -name.count(".") if name else 1):  # inner modules first
        module, args, kwargs = calls[name]
        if not _differentiable_twice(module, args, kwargs):
            return f"{name or 'the model'} ({type(module).__name__})"
    return None


def _differentiable_twice(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    def leaf(value: Any) -> Any:
        return value.detach().requires_grad_() if torch.is_tensor(value) and value.is_floating_point() else value

    def fresh(value: Any) -> Any:
        return value.clone() if torch.is_tensor(value) else value  # protects leaves from in-place modules

    args, kwargs = tuple(map(leaf, args)), {key: leaf(value) for key, value in kwargs.items()}
    output = module(*map(fresh, args), **{key: fresh(value) for key, value in kwargs.items()})
    outputs = [value for value in (output if isinstance(output, tuple) else (output,)) if torch.is_tensor(value)]
    inputs = [value for value in (*args, *kwargs.values(), *module.parameters()) if torch.is_tensor(value)]
    inputs = [value for value in inputs if value.requires_grad]
    squares = sum(value.square().sum() for value in outputs if value.requires_grad)
    if not torch.is_tensor(squares):
        return True
    found = torch.autograd.grad(squares, inputs, create_graph=True, allow_unused=True)
    slopes = [slope for slope in found if slope is not None and slope.requires_grad]
    try:
        torch.autograd.backward(slopes, [slope.detach() for slope in slopes])
    except RuntimeError:
        return False
    return True
