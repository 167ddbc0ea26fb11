"""Which channels of a network stand or fall together: every tensor's channels carry identities, and ties unite them."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

from prune_lab.models.resnet_cifar import ZeroPadShortcut
from prune_lab.pruning.batch_norm.kind import is_norm
from prune_lab.pruning.channels.trace import TracedNetwork

_POINTWISE = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Tanhshrink, nn.Softplus, nn.Softsign,
    nn.Softshrink, nn.Hardshrink, nn.Threshold,
)  # fmt: skip
_POOLS = (
    nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d,
    nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d,
)  # fmt: skip
_POINTWISE_FUNCTIONS = {
    torch.relu, torch.sigmoid, torch.tanh, F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardswish,
    F.hardsigmoid, F.hardtanh, F.sigmoid, F.tanh, F.softplus, F.dropout, F.dropout2d, F.alpha_dropout,
    torchvision.ops.stochastic_depth,
}  # fmt: skip
_POOL_FUNCTIONS = {
    F.max_pool2d, torch.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate,
}  # fmt: skip
_POINTWISE_METHODS = {"relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "contiguous", "clone", "detach"}
_RESHAPES: set[Any] = {torch.flatten, torch.reshape, "flatten", "view", "reshape"}
_SUMS: set[Any] = {operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub,
                   "add", "add_", "sub", "sub_"}
_PRODUCTS: set[Any] = {operator.mul, operator.imul, operator.truediv, torch.mul, torch.div, "mul", "mul_", "div"}
_JOINS: set[Any] = {torch.cat, torch.concat, torch.concatenate}
_READERS = ("size", "dim")

_FROZEN = 0
"""root given for every channel that has to stay"""
OUTPUTS = "the outputs"
"""what holds the channels that the network puts out"""
_ENDS = {"placeholder": "the images", "output": OUTPUTS}


class _Identities:
    """Union-find over integers from 1 on; what is held stays, with all that is united with it."""

    def __init__(self) -> None:
        self._parents = [_FROZEN]
        self._summed: list[int] = []
        self._held: dict[int, str] = {}

    def fresh(self, count: int) -> np.ndarray:
        """Return `count` identities of their own."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return np.arange(first, first + count)

    def find(self, identity: int) -> int:
        root = identity
        while self._parents[root] != root:
            root = self._parents[root]
        while self._parents[identity] != root:
            self._parents[identity], identity = root, self._parents[identity]
        return root

    def unite(self, first: np.ndarray, second: np.ndarray) -> None:
        """Tie `first` and `second` position by position."""
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            low, high = sorted((self.find(a), self.find(b)))
            self._parents[high] = low

    def hold(self, identities: np.ndarray, holder: str) -> None:
        """Let `identities` stay because of `holder`; the first holder counts."""
        for identity in identities.tolist():
            self._held.setdefault(identity, holder)

    @cached_property
    def holders(self) -> dict[int, str]:
        """Return what holds each root that stays; to be asked for when all are united."""
        found: dict[int, str] = {}
        for identity, holder in self._held.items():
            found.setdefault(self.find(identity), holder)
        return found

    def note_sum(self, identities: np.ndarray) -> None:
        self._summed.extend(identities.tolist())

    def roots(self, identities: np.ndarray) -> np.ndarray:
        """Return one number for all that are one, _FROZEN for what stays."""
        found = (self.find(identity) for identity in identities.tolist())
        free = (_FROZEN if root in self.holders else root for root in found)
        return np.fromiter(free, dtype=np.int64, count=len(identities))

    def summed(self) -> set[int]:
        """Return the roots of channels that were added to others."""
        return {self.find(identity) for identity in self._summed}

    def count_held(self, identities: np.ndarray) -> Counter[str]:
        """Return how many of these are held by what."""
        found = (self.holders.get(self.find(identity)) for identity in identities.tolist())
        return Counter(holder for holder in found if holder is not None)


@dataclass(frozen=True)
class _Carried:
    """The channels of a tensor."""

    identities: np.ndarray
    last: bool = False
    """True: in the last of many dimensions, False: in the second"""


@dataclass
class ChannelFlow:
    """What a pass through the graph finds: identities per module, and which of them are one."""

    identities: _Identities = field(default_factory=_Identities)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    """layer, batch norm or depthwise convolution -> identities of its outputs"""
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """layer that mixes channels -> identities of its inputs"""
    pads: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """padded shortcut -> identities of its zero channels in front and behind"""
    opaque: dict[str, str] = field(default_factory=dict)
    """layer whose channels are not followed -> what holds them"""

    def held(self, sizes: Mapping[str, int]) -> Counter[str]:
        """Return how many channels that layers make are held by what, the most first; without the outputs.

        Args:
            sizes: module path of each layer -> channels that it makes.
        """
        counts = sum((self.identities.count_held(self.rows[path]) for path in self.columns), Counter())
        for path, holder in self.opaque.items():
            counts[holder] += sizes.get(path, 0)
        kept = ((holder, count) for holder, count in counts.most_common() if count and holder != OUTPUTS)
        return Counter(dict(kept))


def follow(network: TracedNetwork) -> ChannelFlow:
    """Return what ties the channels of a traced network.

    Convolutions without groups and linear layers make new channels; additions and products unite their operands
    position by position, a concatenation joins lists, a padded shortcut adds zero channels of their own, a flatten
    repeats each channel; batch norm, activations, pooling and depthwise convolutions pass channels on. The channels
    that meet anything else, the images and the outputs stay.
    """
    return _Walk(network).flow


class _Walk:
    def __init__(self, network: TracedNetwork) -> None:
        self.flow, self._network = ChannelFlow(), network
        self._carried: dict[fx.Node, _Carried] = {}
        self._places: dict[str, str] = {}
        for node in network.graph.nodes:
            shape = network.shapes.get(node)
            carried = self._step(node)
            if shape is not None and len(shape) > 1 and node.op != "get_attr":
                self._carried[node] = carried or self._held(shape[1], node)

    def _held(self, count: int, node: fx.Node) -> _Carried:
        fresh = self.flow.identities.fresh(count)
        self.flow.identities.hold(fresh, self._holder(node))
        return _Carried(fresh)

    def _holder(self, node: fx.Node) -> str:
        """Return words for an operation that channels stay for, with the first place where it was met."""
        if node.op in _ENDS:
            return _ENDS[node.op]
        if node.op == "call_module":
            module, place = self._network.modules[_path(node)], _path(node)
            words, groups = type(module).__name__, getattr(module, "groups", 1)
            words += f" of {groups} groups" if groups > 1 else ""
            words += " used more than once" if node.target in self._network.uncut else ""
        else:
            words = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            place, owner = next(reversed(node.meta.get("nn_module_stack", {"": ("", None)}).values()))
            words += f" in {owner.__name__}" if owner is not None else ""
        place = self._places.setdefault(words, place)
        return f"{words} ({place})" if place else words

    def _step(self, node: fx.Node) -> _Carried | None:
        """Note what `node` does; return the channels of its output, None: they stay."""
        if node.op in ("placeholder", "get_attr"):
            return None
        if node.op == "call_module":
            module = self._network.modules[_path(node)]
            known = None if node.target in self._network.uncut else self._module(node, module)
        elif node.op == "output":
            known = None
        else:
            if (node.op == "call_method" and node.target in _READERS) or node.target is getattr:
                return None
            known = self._call(node)
        if known is None:
            self._hold_inputs(node)
        return known

    def _hold_inputs(self, node: fx.Node) -> None:
        holder = self._holder(node)
        for source in node.all_input_nodes:
            if source in self._carried:
                self.flow.identities.hold(self._carried[source].identities, holder)
            elif source.op == "get_attr":
                self.flow.opaque.setdefault(_path(source).rpartition(".")[0], holder)
        if node.op == "call_module":
            self.flow.opaque.setdefault(_path(node), holder)

    def _module(self, node: fx.Node, module: nn.Module) -> _Carried | None:
        source = self._carried.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if source is None:
            return None
        if isinstance(module, _POINTWISE):
            return source
        if isinstance(module, nn.Linear):
            return self._linear(node, module, source)
        if source.last:
            return None
        if isinstance(module, _POOLS):
            return source if len(self._shape(node)) == 4 else None
        if isinstance(module, nn.Flatten):
            return self._reshaped(node, source)
        if isinstance(module, ZeroPadShortcut):
            front, back = (self.flow.identities.fresh(count) for count in (module.front, module.back))
            self.flow.pads[_path(node)] = (front, back)
            return _Carried(np.concatenate([front, source.identities, back]))
        if not (is_norm(module) or isinstance(module, nn.Conv2d)):
            return None
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            return self._mixed(node, source, last=False)
        if isinstance(module, nn.Conv2d) and not 1 < module.groups == module.in_channels == module.out_channels:
            return None
        self.flow.rows[_path(node)] = source.identities
        return source

    def _linear(self, node: fx.Node, layer: nn.Linear, source: _Carried) -> _Carried | None:
        many = len(self._shape(node)) > 2
        if many and not source.last:  # the last dimension is not the channels'
            self.flow.identities.hold(source.identities, self._holder(node))
            return self._mixed(node, self._held(layer.in_features, node), last=True)
        return self._mixed(node, source, last=many)

    def _mixed(self, node: fx.Node, source: _Carried, *, last: bool) -> _Carried:
        path = _path(node)
        made = self.flow.identities.fresh(len(self._network.modules[path].get_parameter("weight")))
        self.flow.columns[path], self.flow.rows[path] = source.identities, made
        return _Carried(made, last)

    def _call(self, node: fx.Node) -> _Carried | None:
        tensors = [source for source in node.all_input_nodes if source in self._network.shapes]
        sources = [self._carried[source] for source in tensors if source in self._carried]
        if not sources or len(sources) < len(tensors):
            return None
        first = sources[0]
        if node.target in _POINTWISE_FUNCTIONS or (node.op == "call_method" and node.target in _POINTWISE_METHODS):
            return first
        if node.target in _SUMS or node.target in _PRODUCTS:
            same = len({len(self._network.shapes[source]) for source in tensors}) == 1
            return self._united(node, sources, summed=node.target in _SUMS) if same else None
        if any(source.last for source in sources):
            return None
        if node.target in _JOINS:
            return self._joined(node)
        return self._rearranged(node, first)

    def _rearranged(self, node: fx.Node, source: _Carried) -> _Carried | None:
        rank = len(self._shape(node.all_input_nodes[0]))
        if node.target in _POOL_FUNCTIONS or _is_spatial_mean(node):
            return source if rank == 4 else None
        if node.target in _RESHAPES:
            return self._reshaped(node, source)
        if node.target is F.pad:
            sides: Any = node.args[1] if len(node.args) > 1 else node.kwargs["pad"]
            return source if rank == 4 and len(sides) <= 4 else None
        if node.target is operator.getitem:
            return source if _keeps_channels(node.args[1]) else None
        return None

    def _united(self, node: fx.Node, sources: list[_Carried], *, summed: bool) -> _Carried | None:
        first = max(sources, key=lambda source: len(source.identities))
        for source in sources:
            if source.last != first.last:
                return None
            if len(source.identities) == len(first.identities):
                self.flow.identities.unite(first.identities, source.identities)
            elif len(source.identities) == 1:  # one value for all channels
                self.flow.identities.hold(source.identities, self._holder(node))
            else:
                return None
        if summed and len(sources) > 1:
            self.flow.identities.note_sum(first.identities)
        return first

    def _joined(self, node: fx.Node) -> _Carried | None:
        parts: Any = node.args[0] if node.args else node.kwargs["tensors"]
        dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if dim % len(self._shape(node)) != 1:
            return None
        return _Carried(np.concatenate([self._carried[part].identities for part in parts]))

    def _reshaped(self, node: fx.Node, source: _Carried) -> _Carried | None:
        """Return the channels after a flatten of all but the images, or between [N, C] and [N, C, 1, 1]."""
        before, after = self._network.shapes[node.all_input_nodes[0]], self._shape(node)
        if node.op != "call_module" and any(isinstance(size, int) and size > 1 for size in _sizes(node)):
            return None  # a number in the code would be wrong without the channels
        if after == (before[0], math.prod(before[1:])):
            return _Carried(np.repeat(source.identities, math.prod(after[1:]) // len(source.identities)))
        same = after[:2] == before[:2] and math.prod(after[2:]) == math.prod(before[2:]) == 1
        return source if same else None

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        """Return the shape of a tensor, nothing for several at once."""
        return self._network.shapes.get(node, ())


def _path(node: fx.Node) -> str:
    """Return the name of the module or attribute that a node uses."""
    return str(node.target)


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    """Return the sizes that a reshape is given; a flatten's are dimensions."""
    if node.target in (torch.flatten, "flatten"):
        return ()
    shape: Any = node.kwargs.get("shape", ())
    given = node.args[1:] if len(node.args) > 1 else tuple(shape)
    return tuple(given[0]) if len(given) == 1 and isinstance(given[0], (tuple, list)) else given


def _keeps_channels(index: Any) -> bool:
    """Return whether x[index] has all channels of x: images and places may be chosen."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(not isinstance(part, slice) for part in parts):
        return False
    return len(parts) < 2 or parts[1] == slice(None)


def _is_spatial_mean(node: fx.Node) -> bool:
    """Return whether `node` averages over height and width, as x.mean([2, 3])."""
    if node.target not in ("mean", torch.mean):
        return False
    over = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(over, (list, tuple)) and {dim % 4 for dim in over} == {2, 3}
