"""A network as a positive linear map, and the flow through each of its weights. The network itself is not changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prune_lab.foundations import tied
from prune_lab.foundations.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Flow:
    """The flow through a network that is a positive linear map."""

    total: float
    """R, the sum of the outputs"""
    scores: dict[str, Tensor]
    """w * dR/dw per weight, each shaped like its weight; not negative"""
    conserved: float
    """sum of x * dR/dx over the input, relative to R: 1 where the network is linear along its input; nan if R is 0"""
    replaced: Counter[str]
    """calls of functions that ReLU or 1 replaced, by name"""


def positive_form(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return |value| in `dtype` of all parameters and floating-point buffers; biases and running means become zero.

    Without additive terms the outputs scale with the input, which the conservation of flow requires. The official code
    also takes absolute values of biases and running means: the same at initialisation, where they are zero.
    """
    held = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if b.is_floating_point()}
    return {
        name: torch.zeros_like(value, dtype=dtype, memory_format=torch.contiguous_format)
        if _is_additive(name)
        else value.detach().to(dtype, memory_format=torch.contiguous_format, copy=True).abs_()
        for name, value in held.items()
    }


def _is_additive(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last == "running_mean" or last == "bias" or last.endswith("_bias")


def flow(model: nn.Module, tensors: Mapping[str, Tensor], weights: Sequence[str], image: Tensor) -> Flow:
    """Return the flow through `model` in evaluation mode with `tensors` in place of its parameters and buffers.

    Args:
        tensors: see `positive_form`.
        weights: names of the parameters to score; weights that no flow reaches score 0.
        image: one input with its batch dimension, of the dtype of `tensors`.

    Source: Tanaka et al. 2020, eq. 2 and algorithm 1, arXiv 2006.05467.
    """
    from prune_lab.pruning.scores.positive_linear import PositiveLinear  # its file subclasses a mode of torch

    source = image.detach().clone().requires_grad_()
    leaves = {name: tensors[name].detach().requires_grad_() for name in weights}
    with PositiveLinear() as functions:
        total = tied.call(model, tied.places(model), {**tensors, **leaves}, source).sum()
    wanted = [source, *leaves.values()]
    into, *gradients = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
    scores = torch._foreach_mul([leaf.detach() for leaf in leaves.values()], gradients)
    carried = float((into * source.detach()).sum())
    value = float(total.detach())
    return Flow(
        total=value,
        scores=dict(zip(leaves, scores, strict=True)),
        conserved=carried / value if value else float("nan"),
        replaced=functions.replaced,
    )
