"""Which weights may be pruned, and the reasons why others may not."""

from __future__ import annotations

import fnmatch
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import suggestion

if TYPE_CHECKING:
    from torch import nn

NO_PARAMETER = "its weight is no parameter but computed from others"


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer, or one matrix of a recurrent layer."""

    name: str
    """module path, such as layer1.0.conv1"""
    parameter: str
    """path of its weight, such as layer1.0.conv1.weight"""
    kind: str
    """conv, depthwise conv, grouped conv, linear, input matrix or recurrent matrix"""
    shape: tuple[int, ...]
    eligible: bool
    reason: str
    """why it is not eligible; empty if it is"""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def layer_kind(module: nn.Module) -> str | None:
    """Return the kind of a layer whose MACs are counted, None for every other module."""
    if isinstance(module, torch.nn.Linear):
        return "linear"
    if not isinstance(module, torch.nn.Conv2d):
        return None
    if module.groups == 1:
        return "conv"
    return "depthwise conv" if module.groups == module.in_channels else "grouped conv"


def weights_of(name: str, module: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Yield (layer, path of its weight, kind) of each weight of a module that MACs are counted for.

    A recurrent module has an input and a recurrent matrix per layer (and direction), which hold those of all its gates.
    """
    kind = layer_kind(module)
    if kind:
        yield name, weight_path(name), kind
    elif isinstance(module, torch.nn.RNNBase):
        for path, _ in module.named_parameters(name, recurse=False):
            attribute = path.rpartition(".")[2]
            if attribute.startswith("weight_"):
                yield path, path, "recurrent matrix" if attribute.startswith("weight_hh") else "input matrix"


def weight_path(module: str) -> str:
    """Return the path of the weight of the layer at the path `module`."""
    return f"{module}.weight" if module else "weight"


def select_layers(
    model: nn.Module,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dense_first: bool = False,
    grouped: bool = False,
) -> list[Layer]:
    """Return every conv, linear and recurrent layer of `model` in definition order; a shared weight is listed once.

    Args:
        include: patterns (* and ?) of module paths to prune although they are dense by default (depthwise).
        exclude: patterns of module paths to keep dense; wins over include.
        dense_first: keep the first layer dense and out of the budget.
        grouped: keep layers dense whose input channels cannot be divided into the groups of 2:4 sparsity.

    Raises:
        UserError: a pattern matches no layer, or nothing is left to prune.
    """
    found = [weight for name, module in model.named_modules() for weight in weights_of(name, module)]
    names = [name for name, _, _ in found]
    for option, patterns in (("method.include", include), ("method.exclude", exclude)):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                near = suggestion(pattern, names)
                raise UserError(f"{option}: {pattern!r} matches no layer{near}; see dry_run=true")
    path_of = {id(parameter): path for path, parameter in model.named_parameters()}  # one path per shared weight
    layers, seen = [], set()
    for index, (name, own_path, kind) in enumerate(found):
        weight = operator.attrgetter(own_path)(model)  # a parametrization recomputes it on each access
        path = path_of.get(id(weight), own_path)
        if path in seen:
            continue
        seen.add(path)
        shape = tuple(weight.shape)
        reason = _reason(name, kind, include=include, exclude=exclude, first=dense_first and index == 0)
        if id(weight) not in path_of:
            reason = NO_PARAMETER
        if grouped and not reason and not has_groups(shape):
            reason = f"{shape[1]} input channels are no multiple of {GROUP} (2:4)"
        layers.append(Layer(name, path, kind, shape, not reason, reason))
    if not any(layer.eligible for layer in layers):
        raise UserError(_nothing_left(layers, grouped))
    return layers


def sparsity(layers: Sequence[Layer], kept: Mapping[str, int]) -> float:
    """Return the fraction of zeros among the weights of the eligible layers.

    Args:
        kept: weights left per parameter under a mask; a missing parameter keeps all.
    """
    eligible = [layer for layer in layers if layer.eligible]
    return 1 - sum(kept.get(layer.parameter, layer.size) for layer in eligible) / sum(layer.size for layer in eligible)


def reshaped(layers: Sequence[Layer], model: nn.Module) -> list[Layer]:
    """Return the layers with their shapes in `model`, the same network with fewer channels."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return [replace(layer, shape=shapes.get(layer.parameter, layer.shape)) for layer in layers]


def _nothing_left(layers: Sequence[Layer], grouped: bool) -> str:
    if not layers:
        return "the model has no layer to prune"
    if grouped:
        return f"method.distribution=2:4: no layer that may be pruned has a multiple of {GROUP} input channels"
    return "method.exclude leaves no layer to prune"


def _reason(name: str, kind: str, *, include: Sequence[str], exclude: Sequence[str], first: bool) -> str:
    if any(fnmatch.fnmatch(name, pattern) for pattern in exclude):
        return "kept dense by method.exclude"
    if first:
        return "first layer kept dense (method.first_layer)"
    if kind == "depthwise conv" and not any(fnmatch.fnmatch(name, pattern) for pattern in include):
        return "depthwise convolutions are kept dense (RigL 4.1.2)"
    return ""


GROUP = 4


def has_groups(shape: tuple[int, ...]) -> bool:
    """Return whether the input channels of a weight divide into groups of four."""
    return len(shape) >= 2 and shape[1] % GROUP == 0
