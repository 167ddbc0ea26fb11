"""Second derivatives in less memory: blocks of a network that store their input and recompute the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.accounting.costs import LayerCost
from prune_lab.accounting.eligibility import layer_kind
from prune_lab.foundations import tied

Run = Callable[..., Tensor]
"""(input, *weights) -> output of a block"""


@contextlib.contextmanager
def blocks(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """Make every block of `model` store only its input, in the graphs of the first and of the second derivative.

    The derivatives are the same. Only dependence on `weights` is tracked: other parameters are constants.
    torch.utils.checkpoint does not help here, because the graph of the first derivative holds the recomputed values.
    """
    chosen = find_blocks(model)
    try:
        for module in chosen:
            module.forward = _Block(module, weights)
        yield
    finally:
        for module in chosen:
            module.__dict__.pop("forward", None)


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the outermost elements of the Sequential parts of `model` that hold two layers or more."""
    found: list[nn.Module] = []

    def search(module: nn.Module, *, in_sequence: bool) -> None:
        is_sequence = isinstance(module, nn.Sequential)
        if in_sequence and not is_sequence and sum(layer_kind(part) is not None for part in module.modules()) > 1:
            found.append(module)
            return
        for child in module.children():
            search(child, in_sequence=is_sequence)

    search(model, in_sequence=False)
    return found


def extra_macs(model: nn.Module, costs: Sequence[LayerCost]) -> int:
    """Return the MACs per image of recomputation in a Hessian-gradient product, 4 f_D of the blocks.

    The first derivative repeats the forward pass; the second one repeats it and the backward pass, which counts twice.
    """
    inside = {id(part) for block in find_blocks(model) for part in block.modules()}
    names = {name for name, module in model.named_modules() if id(module) in inside}
    return 4 * sum(cost.macs for cost in costs if cost.name in names)


class _Plain(nn.Module):
    """Calls a module's own forward, even if it has been replaced."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = type(self.inner).forward(self.inner, x)
        return output


class _Block:
    """Replaces the forward function of a module; calls with more than one tensor are passed through."""

    def __init__(self, module: nn.Module, weights: Sequence[Tensor]) -> None:
        self.plain = _Plain(module)
        self.places = tied.places(self.plain)
        wanted = {id(weight) for weight in weights}
        self.weights = {name: value for name, value in self.plain.named_parameters() if id(value) in wanted}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not torch.is_tensor(args[0]):
            return type(self.plain.inner).forward(self.plain.inner, *args, **kwargs)
        return _Forward.apply(self.run, args[0], *self.weights.values())

    def run(self, x: Tensor, *weights: Tensor) -> Tensor:
        # A clone, because a block may begin with an in-place function.
        output: Tensor = tied.call(self.plain, self.places, dict(zip(self.weights, weights, strict=True)), x.clone())
        return output


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


class _Forward(torch.autograd.Function):
    """run(x, *weights), nothing stored but its arguments."""

    @staticmethod
    def forward(context: Any, run: Run, x: Tensor, *weights: Tensor) -> Tensor:
        context.run = run
        context.save_for_backward(x, *weights)
        return run(x, *weights)

    @staticmethod
    def backward(context: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_Backward.apply(context.run, slope, *context.saved_tensors)


class _Backward(torch.autograd.Function):
    """The gradients of <slope, run(x, *weights)> by x and weights, nothing stored but its arguments."""

    @staticmethod
    def forward(context: Any, run: Run, slope: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
        context.run = run
        context.save_for_backward(slope, *arguments)
        leaves = _leaves(arguments)
        with torch.enable_grad():
            output = run(*leaves)
        return torch.autograd.grad(output, leaves, slope)

    @staticmethod
    def backward(context: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        leaves = _leaves(context.saved_tensors)
        with torch.enable_grad():
            first = torch.autograd.grad(context.run(*leaves[1:]), leaves[1:], leaves[0], create_graph=True)
        torch.autograd.backward(first, slopes)  # not autograd.grad: see second_derivatives.hessian_gradient
        return None, *(leaf.grad for leaf in leaves)
