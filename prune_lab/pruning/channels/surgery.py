"""Dead channels removed for good: a smaller network with the same outputs, and its widths to build it again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch
from prune_lab.pruning.batch_norm.kind import is_norm
from prune_lab.pruning.channels.groups import ChannelMap, Lane

if TYPE_CHECKING:
    from torch import Tensor, nn

Widths = dict[str, list[int]]
"""module path -> [outputs, inputs] of a layer, [channels] of a batch norm, [front, back] of a padded shortcut"""


def remove_channels(model: nn.Module, channels: ChannelMap, alive: Tensor) -> nn.Module:
    """Return a copy of `model` without the dead classes' rows, columns, batch-norm entries and zero channels.

    The constant that batch norm makes of a dead channel's zeros goes with it. Optimizers, moving averages and wrappers
    of `model` hold its old parameters and must be made anew.

    Args:
        channels: the channel map of `model`.
        alive: bool [num_classes].

    Raises:
        UserError: nothing is dead, a layer would be left without channels, or `model` is compiled or wrapped.
    """
    from prune_lab.pruning.channels.trace import check_plain  # its file subclasses torch's tracer

    check_plain(model)
    _check_alive(channels, alive)
    small = _share_parameters(model)
    for path, rows in channels.rows.items():
        columns = channels.columns.get(path)
        kept_columns = None if columns is None else channels.kept(columns, alive)
        _cut_layer(small.get_submodule(path), channels.kept(rows, alive), kept_columns)
    for path, rows in channels.norms.items():
        _cut_norm(small.get_submodule(path), channels.kept(rows, alive))
    for path, (front, back) in channels.pads.items():
        shortcut: Any = small.get_submodule(path)
        shortcut.front, shortcut.back = (int(channels.kept(part, alive).sum()) for part in (front, back))
    return copy.deepcopy(small)  # whatever was not cut is still shared


def _check_alive(channels: ChannelMap, alive: Tensor) -> None:
    if alive.dtype != torch.bool or alive.shape != (channels.num_classes,):
        raise ValueError(f"alive must be bool of shape {(channels.num_classes,)}, got {alive.dtype} {alive.shape}")
    if bool(alive.all()):
        raise UserError("no channels to remove: all of them are in use")
    for path, rows in channels.rows.items():
        if not bool(channels.kept(rows, alive).any()):
            raise UserError(f"{path} would be left without channels; keep at least one")


def _share_parameters(model: nn.Module) -> nn.Module:
    """Return a copy of the modules that holds the same tensors: the cut copies what it keeps, and only that."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors})


def _cut_layer(layer: Any, rows: Tensor, columns: Tensor | None) -> None:
    """Keep the chosen rows and columns (bool masks) of a convolution or linear layer.

    Args:
        columns: None: a depthwise convolution, which has one column.
    """
    rows = rows.nonzero().flatten().to(layer.weight.device)
    weight = layer.weight.detach().index_select(0, rows)
    if columns is not None:
        weight = weight.index_select(1, columns.nonzero().flatten().to(weight.device))
    _set(layer, "weight", weight)
    if layer.bias is not None:
        _set(layer, "bias", layer.bias.detach().index_select(0, rows))
    _note_size(layer)


def _note_size(layer: Any) -> None:
    """Make a layer's own figures those of its weight."""
    outputs, inputs = layer.weight.shape[:2]
    if isinstance(layer, torch.nn.Linear):
        layer.out_features, layer.in_features = outputs, inputs
        return
    depthwise = layer.groups > 1
    layer.out_channels, layer.in_channels = outputs, outputs if depthwise else inputs
    layer.groups = outputs if depthwise else 1


def _cut_norm(norm: Any, kept: Tensor) -> None:
    kept = kept.nonzero().flatten()
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(norm, name)
        if tensor is not None:
            _set(norm, name, tensor.detach().index_select(0, kept.to(tensor.device)))
    norm.num_features = len(kept)


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    before = getattr(module, name)
    if isinstance(before, torch.nn.Parameter):
        tensor = torch.nn.Parameter(tensor, requires_grad=before.requires_grad)
    setattr(module, name, tensor)


def widths(model: nn.Module, channels: ChannelMap) -> Widths:
    """Return the sizes of everything that `remove_channels` may cut in networks with this channel map."""
    sizes = {path: list(model.get_parameter(f"{path}.weight").shape[:2]) for path in channels.rows}
    norms: dict[str, Any] = {path: model.get_submodule(path) for path in channels.norms}
    shortcuts: dict[str, Any] = {path: model.get_submodule(path) for path in channels.pads}
    sizes |= {path: [norm.num_features] for path, norm in norms.items()}
    return sizes | {path: [shortcut.front, shortcut.back] for path, shortcut in shortcuts.items()}


def narrow(model: nn.Module, sizes: Mapping[str, list[int]]) -> None:
    """Give `model` the widths of a network whose channels were removed, its first channels standing for those kept.

    Its own state dict, or the values of a new draw, are to be loaded afterwards.

    Raises:
        UserError: the widths are of another architecture.
    """
    for path, size in sizes.items():
        try:
            _narrow(model.get_submodule(path), size)
        except (AttributeError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"channels: the widths {size} of {path!r} are not this network's: {error}") from error


def _narrow(module: Any, size: list[int]) -> None:
    from prune_lab.models.resnet_cifar import ZeroPadShortcut  # its file defines an nn.Module and so imports torch

    if isinstance(module, ZeroPadShortcut):
        module.front, module.back = size
    elif is_norm(module):
        _cut_norm(module, _first(size[0], module.num_features))
    else:
        outputs, inputs = size
        depthwise = isinstance(module, torch.nn.Conv2d) and module.groups > 1
        columns = None if depthwise else _first(inputs, module.weight.shape[1])
        _cut_layer(module, _first(outputs, module.weight.shape[0]), columns)


def _first(count: int, size: int) -> Tensor:
    if not 0 < count <= size:
        raise ValueError(f"{count} of {size} channels")
    return torch.arange(size) < count


def emptied(channels: ChannelMap, alive: Tensor) -> list[Lane]:
    """Return the lanes of which nothing is left."""
    return [lane for lane in channels.lanes if not bool(alive[lane.classes].any())]
