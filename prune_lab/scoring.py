"""What methods that score weights share: balanced images, derivatives of the loss without a trace on the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_lab.context import Context
from prune_lab.recompute import blocks
from prune_lab.schema import ConfigError

Order = Literal["stratified", "class_sorted", "random"]


def batches(
    context: Context,
    *,
    per_class: int,
    batch_size: int,
    order: Order = "stratified",
    augment: bool = False,
    rounds: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images, labels) of `per_class` training images of every class, in batches of nearly equal size.

    The images are drawn from the seed, the same on every process and in every call.

    Args:
        batch_size: most images per batch.
        order: stratified: classes take turns, so that every batch holds all of them alike; class_sorted: class after
            class (official GraSP code); random.
        augment: crops and flips of training, the same in every call; False: images as for evaluation.
        rounds: this many times `per_class` images of every class, each round others, none shared by two batches.

    Raises:
        ConfigError: a class has fewer images.
    """
    source, num_classes = context.generator("scoring images"), context.dataset.info.num_classes
    check_classes(context.dataset.train_labels, per_class, num_classes, rounds=rounds)
    drawn = _draw(context.dataset.train_labels, per_class * rounds, num_classes, source)
    chosen = [_ordered(part, order, source) for part in drawn.split(per_class, dim=1)]
    parts = -(-per_class * num_classes // batch_size)
    seed = context.seed if augment else None
    positions = [batch for part in chosen for batch in part.tensor_split(parts)]
    for images, labels in context.dataset.train_subset(positions, augment_seed=seed):
        context.poll()
        yield images, labels


def _draw(labels: Tensor, count: int, num_classes: int, source: torch.Generator) -> Tensor:
    """Return random positions [num_classes, count] in `labels`, a row per class."""
    rows = []
    for label in range(num_classes):
        members = (labels == label).nonzero().flatten()
        rows.append(members[torch.randperm(len(members), generator=source)[:count]])
    return torch.stack(rows)


def _ordered(rows: Tensor, order: Order, source: torch.Generator) -> Tensor:
    """Return the entries of `rows` [num_classes, per_class], flat."""
    if order == "random":
        flat = rows.flatten()
        return flat[torch.randperm(len(flat), generator=source)]
    return rows.flatten() if order == "class_sorted" else rows.t().flatten()


def check_classes(labels: Tensor, per_class: int, num_classes: int, *, rounds: int = 1) -> None:
    """Raise ConfigError if a class has fewer than `per_class` x `rounds` of `labels`."""
    for label, count in enumerate(torch.bincount(labels, minlength=num_classes).tolist()):
        if count < per_class * rounds:
            times = f" x method.rounds={rounds}" if rounds > 1 else ""
            raise ConfigError(
                f"method.samples_per_class={per_class}{times} exceeds the {count} training images of class {label}"
            )


def most_per_class(labels: Tensor, wanted: int, num_classes: int) -> int:
    """Return how many images every class can give, up to `wanted`; 0 if one has none."""
    return min(wanted, int(torch.bincount(labels, minlength=num_classes).min()))


@contextlib.contextmanager
def untouched(model: nn.Module, *, train_mode: bool) -> Iterator[None]:
    """Score inside: gradients on for all parameters, no autocast, batch norm on batch statistics or on running ones.

    Everything else is in evaluation mode: dropout would make each pass score another network. Afterwards parameters'
    gradients are gone and buffers, modes, `requires_grad` and random states are as before, bit for bit. The caller
    answers for the parameters' values. No copy of the weights is made.
    """
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    device = next(model.parameters()).device
    drawing = torch.random.fork_rng([device] if device.type == "cuda" else [])
    try:
        for module in model.modules():
            module.training = train_mode and isinstance(module, nn.modules.batchnorm._BatchNorm)
        for parameter in wanted:
            parameter.requires_grad_(True)
            parameter.grad = None
        with drawing, torch.autocast(device.type, enabled=False):
            yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        for parameter, needed in wanted.items():
            parameter.grad = None
            parameter.requires_grad_(needed)
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def redrawn_linear(model: nn.Module, source: Callable[[str], torch.Generator]) -> Iterator[None]:
    """Give every linear layer Xavier-normal weights inside; afterwards they have their own again, bit for bit.

    Args:
        source: layer name -> generator of its draws.
    """
    own = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kept = {name: module.weight.data for name, module in own.items()}
    try:
        for name, module in own.items():
            drawn = torch.empty(module.weight.shape)
            nn.init.xavier_normal_(drawn, generator=source(name))
            module.weight.data = drawn.to(kept[name])
        yield
    finally:
        for name, module in own.items():
            module.weight.data = kept[name]


_TWICE_DIFFERENTIABLE = {nn.Hardsigmoid: lambda x: F.relu6(x + 3) / 6}
"""modules whose own operator has no second derivative -> the same function from operators that have one"""


@contextlib.contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Compute inside with functions that have second derivatives where a module's own has none; values are the same."""
    changed = [module for module in model.modules() if type(module) in _TWICE_DIFFERENTIABLE]
    try:
        for module in changed:
            module.forward = _TWICE_DIFFERENTIABLE[type(module)]
        yield
    finally:
        for module in changed:
            del module.forward


def loss(model: nn.Module, images: Tensor, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return the summed cross-entropy of logits / temperature, in the model's precision and fp32 at least.

    Raises:
        ConfigError: it is infinite or NaN.
    """
    value = _cross_entropy(model, images, labels, temperature)
    if not bool(torch.isfinite(value)):
        raise ConfigError(f"the loss of the scoring images is {value.item()}: look at the start weights and the images")
    return value


def _cross_entropy(model: nn.Module, images: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    logits = model(images)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits / temperature, labels, reduction="sum")


Data = Iterable[tuple[Tensor, Tensor]]


def gradients(model: nn.Module, weights: Sequence[Tensor], data: Data, *, temperature: float = 1.0) -> Iterator[tuple]:
    """Yield per batch the gradients of the summed loss, a tensor like each of `weights`."""
    for images, labels in data:
        yield torch.autograd.grad(loss(model, images, labels, temperature=temperature), weights)


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
    """Return H g, a tensor like each of `weights`: what g is multiplied with is held constant.

    Memory: the graph of one batch at a time, and two tensors per weight. Gradients of all parameters are lost.

    Args:
        data: gives the same batches in each call.
        num_images: images in `data`.
        per_batch: False: gradient and Hessian of the mean loss over all images, read twice; True: the mean over
            batches, by their size, of H g of the mean loss of each.
        low_memory: store the inputs of blocks only and compute the rest again, twice.

    Raises:
        ConfigError: an operator of the model has no second derivative; names the module.

    Source: Wang et al. 2020, eq. 8, arXiv 2002.07376.
    """
    direction = None
    if not per_batch:
        direction = [torch.zeros_like(weight) for weight in weights]
        for slopes in gradients(model, weights, data(), temperature=temperature):
            torch._foreach_add_(direction, slopes, alpha=1 / num_images)
    with twice_differentiable(model), blocks(model, weights) if low_memory else contextlib.nullcontext():
        for images, labels in data():
            _add_product(model, weights, images, labels, direction, temperature=temperature)
    products = [weight.grad / num_images for weight in weights]
    for weight in weights:
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

    A function of its own, so that the graph is gone before the next batch builds one.
    """
    slopes = torch.autograd.grad(loss(model, images, labels, temperature=temperature), weights, create_graph=True)
    if direction is None:
        direction = [slope.detach() / len(images) for slope in slopes]
    try:
        # Not autograd.grad: with chosen inputs it never reaches the error that torch plants behind a function marked
        # @once_differentiable, and the result would lack a part without a word.
        torch.autograd.backward(slopes, direction)
    except RuntimeError as error:
        found = without_second_derivative(model, images[:2])
        if found is None:
            raise
        reason = str(error).splitlines()[0]
        raise ConfigError(f"scores need second derivatives, which {found} does not have: {reason}") from error


def without_second_derivative(model: nn.Module, images: Tensor) -> str | None:
    """Return the name and type of the innermost module that cannot be differentiated twice, None if all can."""
    calls: dict[str, tuple[nn.Module, tuple, dict]] = {}

    def note(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
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


def _differentiable_twice(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    def leaf(value: Any) -> Any:
        return value.detach().requires_grad_() if torch.is_tensor(value) and value.is_floating_point() else value

    def fresh(value: Any) -> Any:
        return value.clone() if torch.is_tensor(value) else value  # modules that work in place spoil no leaf

    args, kwargs = tuple(map(leaf, args)), {key: leaf(value) for key, value in kwargs.items()}
    output = module(*map(fresh, args), **{key: fresh(value) for key, value in kwargs.items()})
    outputs = [value for value in (output if isinstance(output, tuple) else (output,)) if torch.is_tensor(value)]
    inputs = [value for value in (*args, *kwargs.values(), *module.parameters()) if torch.is_tensor(value)]
    inputs = [value for value in inputs if value.requires_grad]
    squares = sum(value.square().sum() for value in outputs if value.requires_grad)
    if not torch.is_tensor(squares):
        return True
    slopes = torch.autograd.grad(squares, inputs, create_graph=True, allow_unused=True)
    slopes = [slope for slope in slopes if slope is not None and slope.requires_grad]
    try:
        torch.autograd.backward(slopes, [slope.detach() for slope in slopes])
    except RuntimeError:
        return False
    return True


def gradient_norm(context: Context, data: Data, *, train_mode: bool) -> float:
    """Return the L2 norm of the mean loss gradient over the kept eligible weights (all of them without masks).

    A figure to report: a loss that is infinite or NaN makes it so, too, and stops nothing.
    """
    named = context.parameters()
    weights = {layer.parameter: named[layer.parameter] for layer in context.eligible()}
    masks = {} if context.masks is None else context.masks.masks
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    images_seen = 0
    with untouched(context.model, train_mode=train_mode):
        for images, labels in data:
            value = _cross_entropy(context.model, images, labels)
            gradients = torch.autograd.grad(value, list(weights.values()))
            torch._foreach_add_(list(sums.values()), gradients)
            images_seen += len(images)
    kept = [total if name not in masks else total * masks[name] for name, total in sums.items()]
    return float(torch.stack([total.double().square().sum() for total in kept]).sum().sqrt()) / images_seen
