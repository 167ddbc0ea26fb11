"""Which hidden channels of a network can be removed on their own: found by tracing the flow of its data."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prune_lab.schema import ConfigError

_NORMS = (nn.modules.batchnorm._BatchNorm,)
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
}  # fmt: skip
_POOL_FUNCTIONS = {
    F.max_pool2d, torch.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate,
}  # fmt: skip
_POINTWISE_METHODS = {"relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "contiguous", "clone", "detach"}
_RESHAPES: set[Any] = {torch.flatten, torch.reshape, "flatten", "view", "reshape"}


@dataclass(frozen=True)
class Consumer:
    """A layer that reads the channels of a group."""

    path: str
    """module path of an ungrouped convolution or a linear layer"""
    span: int
    """channel i feeds the input columns i * span up to (i + 1) * span: H * W after a flatten, else 1"""


@dataclass(frozen=True)
class ChannelGroup:
    """Hidden channels that can be removed without a change to any other channel.

    To remove channel i: row i of the producer (weight and bias), entry i of every norm, row i of every depthwise
    convolution, and its columns of every consumer.
    """

    producer: str
    """module path of the ungrouped convolution or linear layer whose output rows they are"""
    norms: tuple[str, ...]
    """module paths of the batch norms they pass"""
    depthwise: tuple[str, ...]
    """module paths of the depthwise convolutions they pass, one filter per channel"""
    consumers: tuple[Consumer, ...]
    size: int
    """number of channels"""

    def layers(self) -> tuple[str, ...]:
        """Return the module paths of all convolutions and linear layers that lose weights with a channel."""
        return (self.producer, *self.depthwise, *(consumer.path for consumer in self.consumers))


def channel_groups(model: nn.Module, image_size: int) -> list[ChannelGroup]:
    """Return the groups of `model` in the order in which its forward pass reaches their producers.

    Channels are hidden if they pass only through batch norms, pointwise activations, pooling, dropout, a flatten and
    depthwise convolutions, and if only ungrouped convolutions and linear layers read them. A channel that meets an
    addition, a product (squeeze-and-excitation), a concatenation, a padded shortcut or the output belongs to no group.
    Where a trunk begins or ends without an addition, as the stem of a ResNet-50 or the last 1x1 convolution of a
    MobileNet, its channels are a group like any other.

    A layer that is called more than once, or shares its weight, belongs to none either.

    Args:
        image_size: height and width of the RGB images, px; sets the span after a flatten.

    Raises:
        ConfigError: the network's data flow cannot be traced.
    """
    traced, shapes = _trace(model, image_size)
    flow = _Flow(traced, shapes, _shared(model, traced.graph))
    groups = [flow.follow(node) for node in traced.graph.nodes]
    return [group for group in groups if group is not None]


def _trace(model: nn.Module, image_size: int) -> tuple[fx.GraphModule, dict[fx.Node, tuple[int, ...]]]:
    """Return the graph of a copy in evaluation mode without memory, and the shape of each tensor for two images."""
    try:
        ghost = copy.deepcopy(model).to("meta").eval()
        traced = fx.GraphModule(ghost, _Tracer().trace(ghost))
        recorder = _ShapeRecorder(traced)
        with torch.no_grad():
            precision = next(model.parameters()).dtype
            recorder.run(torch.zeros(2, 3, image_size, image_size, device="meta", dtype=precision))
    except Exception as error:  # a traced forward may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"removing channels needs a network that torch.fx can trace; {type(model).__name__} is not: {reason}"
        ) from error
    return traced, recorder.shapes


class _Tracer(fx.Tracer):
    """Takes every batch norm as one step, also those of other libraries, which work channel by channel as well."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _NORMS) or super().is_leaf_module(m, module_qualified_name)


class _ShapeRecorder(fx.Interpreter):
    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.extra_traceback = False
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if torch.is_tensor(result):
            self.shapes[n] = tuple(result.shape)
        return result


def _shared(model: nn.Module, graph: fx.Graph) -> set[str]:
    """Return the module paths whose weight is used more than once."""
    weights = {id(weight): path for path, weight in model.named_parameters()}
    modules = dict(model.named_modules())
    uses: Counter[str] = Counter()
    owners: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            for weight in modules[node.target].parameters(recurse=False):
                uses[weights[id(weight)]] += 1
                owners.setdefault(weights[id(weight)], []).append(node.target)
        elif node.op == "get_attr":
            uses[node.target] += 1
    return {path for weight, paths in owners.items() if uses[weight] > 1 for path in paths}


class _Flow:
    """Follows the channels of one layer through the graph."""

    def __init__(self, traced: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]], shared: set[str]) -> None:
        self._modules, self._shapes, self._shared = dict(traced.named_modules()), shapes, shared

    def follow(self, start: fx.Node) -> ChannelGroup | None:
        """Return the group of the channels that `start` makes; None: it makes none, or they are not free."""
        module = self._module(start)
        if not _mixes(module) or start.target in self._shared:
            return None
        size = module.weight.shape[0]
        last = isinstance(module, nn.Linear) and len(self._shapes[start]) > 2  # channels in the last of many dimensions
        norms, depthwise, consumers = [], [], []
        stack = [start]
        while stack:
            node = stack.pop()
            for user in reversed(node.users):
                kind = self._kind(node, user, size=size, last=last)
                if kind is None or user.target in self._shared:
                    return None
                if kind == "consumer":
                    span = 1 if last else self._shapes[node][1] // size
                    consumers.append((user, Consumer(user.target, span)))
                elif kind != "reader":
                    stack.append(user)
                    {"norm": norms, "depthwise": depthwise}.get(kind, []).append(user.target)
        if not consumers:
            return None
        order = {node: index for index, node in enumerate(start.graph.nodes)}
        ordered = [consumer for _, consumer in sorted(consumers, key=lambda pair: order[pair[0]])]
        return ChannelGroup(start.target, tuple(norms), tuple(depthwise), tuple(ordered), size)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._modules[node.target] if node.op == "call_module" else None

    def _kind(self, node: fx.Node, user: fx.Node, *, size: int, last: bool) -> str | None:
        """Return what `user` does to the channels in `node`'s output; None: something that binds or mixes them."""
        shape, module = self._shapes[node], self._module(user)
        span = 1 if last else shape[1] // size
        if user.op == "call_method" and user.target in ("size", "dim") or user.target is getattr:
            return "reader"
        if module is None:
            called = user.target if user.op in ("call_function", "call_method") else None
            pointwise = called in _POINTWISE_FUNCTIONS or (user.op == "call_method" and called in _POINTWISE_METHODS)
            pool = called in _POOL_FUNCTIONS or _is_spatial_mean(user)
            flatten = called in _RESHAPES
        else:
            pointwise, pool = isinstance(module, _POINTWISE), isinstance(module, _POOLS)
            flatten = isinstance(module, nn.Flatten)
        if pointwise:
            return "passes"
        if last:  # channels at the end of a sequence or a map: only linear layers read them there
            return "consumer" if isinstance(module, nn.Linear) else None
        if pool:
            return "passes" if len(shape) == 4 else None
        if flatten:
            return "passes" if self._shapes[user] == (shape[0], math.prod(shape[1:])) else None
        if isinstance(module, _NORMS):
            return "norm" if span == 1 else None
        if isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels:
            return "depthwise"
        if isinstance(module, nn.Linear):
            return "consumer" if len(shape) == 2 else None
        return "consumer" if _mixes(module) else None


def _mixes(module: nn.Module | None) -> bool:
    """Return whether every output of `module` reads all of its inputs."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _is_spatial_mean(node: fx.Node) -> bool:
    """Return whether `node` averages over height and width, as x.mean([2, 3])."""
    if node.target not in ("mean", torch.mean):
        return False
    over = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(over, (list, tuple)) and {dim % 4 for dim in over} == {2, 3}


def columns(channels: Tensor, span: int) -> Tensor:
    """Return the input columns [len(channels) * span] that belong to `channels` (indices or a bool mask over all)."""
    if channels.dtype == torch.bool:
        return channels.repeat_interleave(span)
    return (channels[:, None] * span + torch.arange(span, device=channels.device)).flatten()


def weight_masks(
    model: nn.Module, groups: Sequence[ChannelGroup], kept: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the masks that leave out channels: parameter path -> bool, True = kept, for all layers of `groups`.

    Args:
        kept: producer -> bool [size]; a group that is missing keeps all of its channels.
    """
    device = next(model.parameters()).device
    paths = dict.fromkeys(path for group in groups for path in group.layers())
    masks = {path: torch.ones_like(model.get_submodule(path).weight, dtype=torch.bool) for path in paths}
    for group in groups:
        if group.producer not in kept:
            continue
        gone = ~kept[group.producer].to(device)
        for path in (group.producer, *group.depthwise):
            masks[path][gone] = False
        for consumer in group.consumers:
            masks[consumer.path][:, columns(gone, consumer.span)] = False
    return {f"{path}.weight": mask for path, mask in masks.items()}


def weight_counts(model: nn.Module, groups: Sequence[ChannelGroup], kept: Mapping[str, int]) -> dict[str, int]:
    """Return the weights that `weight_masks` keeps per parameter when each producer keeps so many channels."""
    paths = dict.fromkeys(path for group in groups for path in group.layers())
    counts = {path: model.get_submodule(path).weight.numel() for path in paths}
    for group in groups:
        for path in group.layers():  # a layer's rows and columns belong to one group each
            counts[path] = counts[path] // group.size * kept.get(group.producer, group.size)
    return {f"{path}.weight": count for path, count in counts.items()}
