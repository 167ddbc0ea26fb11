"""A network as a graph of operations with the shape of every tensor in it."""

from __future__ import annotations

import copy
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from prune_lab.accounting.eligibility import layer_kind
from prune_lab.accounting.weight_use import computed_weights
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.shapes import QuickShapes
from prune_lab.models.resnet_cifar import ZeroPadShortcut
from prune_lab.pruning.batch_norm.kind import is_norm

_POOLS = (nn.MaxPool2d, nn.AvgPool2d)


@dataclass(frozen=True)
class TracedNetwork:
    graph: fx.Graph
    modules: dict[str, nn.Module]
    """module path -> module of the traced copy, which has no memory"""
    shapes: dict[fx.Node, tuple[int, ...]]
    """shape of each tensor for two images"""
    uncut: set[str]
    """paths of modules that are used more than once, or whose weight is computed from others: their channels stay"""


def trace(model: nn.Module, image_size: int) -> TracedNetwork:
    """Return the graph of a copy of `model` in evaluation mode without memory.

    Args:
        image_size: height and width of the RGB images, px.

    Raises:
        UserError: the network is wrapped, or its data flow cannot be traced; the message names the operation.
    """
    check_plain(model)
    try:
        ghost = copy.deepcopy(model).to("meta").eval()
        traced = fx.GraphModule(ghost, _Tracer(_plain_layers(model, image_size)).trace(ghost))
        recorder = _ShapeRecorder(traced)
        with torch.no_grad(), QuickShapes():
            precision = next(model.parameters()).dtype
            recorder.run(torch.zeros(2, 3, image_size, image_size, device="meta", dtype=precision))
    except Exception as error:  # a traced forward may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"removing channels needs a network that torch.fx can trace; {type(model).__name__} is not: "
            f"{reason}{_place(error)}"
        ) from error
    return TracedNetwork(traced.graph, dict(traced.named_modules()), recorder.shapes, _uncut(model, traced.graph))


def check_plain(model: nn.Module) -> None:
    """Raise UserError if `model` is compiled or wrapped for several devices."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch._dynamo.OptimizedModule)
    if isinstance(model, wrappers):
        raise UserError(
            f"channels are removed from plain networks, got {type(model).__name__}; remove first, then wrap or compile"
        )


def _place(error: Exception) -> str:
    """Return the line of the network's code that raised `error`, as text."""
    own = (str(Path(torch.__file__).parent), __file__)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(own)]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""


def _plain_layers(model: nn.Module, image_size: int) -> set[str]:
    """Return the paths of other libraries' convolutions and linear layers that use their own weight as it is.

    They may prepare their input (padding) but hold nothing beside weight and bias, so that cutting these is all.
    """
    found = {
        path for path, module in model.named_modules()
        if layer_kind(module) and type(module) not in (nn.Conv2d, nn.Linear)
        and {name for name, _ in (*module.named_parameters(), *module.named_buffers())} <= {"weight", "bias"}
    }
    return found - computed_weights(model, image_size).keys() if found else found


class _Tracer(fx.Tracer):
    """Takes as one step what works channel by channel in every library, padded shortcuts, and the layers given."""

    def __init__(self, layers: set[str]) -> None:
        super().__init__()
        self._layers = layers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            is_norm(m) or isinstance(m, (*_POOLS, ZeroPadShortcut)) or module_qualified_name in self._layers
            or super().is_leaf_module(m, module_qualified_name)
        )


class _ShapeRecorder(fx.Interpreter):
    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.extra_traceback = False
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except Exception as error:
            raise RuntimeError(f"operation {n.name}: {error}") from error
        if torch.is_tensor(result):
            self.shapes[n] = tuple(result.shape)
        return result


def _uncut(model: nn.Module, graph: fx.Graph) -> set[str]:
    tensors = {id(tensor): path for path, tensor in (*model.named_parameters(), *model.named_buffers())}
    modules = dict(model.named_modules())
    uses: Counter[str] = Counter()
    owned: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            module = modules[node.target]
            held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            owned[node.target] = [tensors[id(tensor)] for tensor in held]
            uses.update([*owned[node.target], node.target])
        elif node.op == "get_attr":
            uses[node.target] += 1
    return {
        path for path, names in owned.items()
        if any(uses[name] > 1 for name in names)
        or (uses[path] > 1 and isinstance(modules[path], ZeroPadShortcut))
        or not isinstance(getattr(modules[path], "weight", None), (nn.Parameter, type(None)))
    }
