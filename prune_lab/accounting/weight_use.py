"""How a forward pass uses the weights of a network: in which products, how often, and directly or recomputed.

A mask on a parameter acts only if the parameter itself is passed to the convolution or matrix product. Weight
standardisation, parametrizations and mixtures of kernels compute another tensor from it, which no mask reaches.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prune_lab.accounting.eligibility import layer_kind, weight_path
from prune_lab.foundations.shapes import QuickShapes, meta_like

aten = torch.ops.aten
_OPERANDS = {
    aten.mm.default: (1, 0), aten.addmm.default: (2, 1), aten.bmm.default: (1, 0), aten.baddbmm.default: (2, 1),
    aten.addbmm.default: (2, 1), aten.mv.default: (0, 1), aten.addmv.default: (1, 2), aten.dot.default: (1, 0),
    aten.convolution.default: (1,), aten._trilinear.default: (1,),
}  # fmt: skip
"""operator -> its arguments that may be a weight, the likelier one first"""
_WITH_VECTOR = {aten.mv.default, aten.addmv.default, aten.dot.default}
"""with a fixed vector they only estimate the norm of a weight"""
_COPIES = {aten.clone.default, aten._to_copy.default}
"""operators whose result has the zeros of the parameter they read, like a view of it"""
COMPUTED = "its weight is computed anew in each pass, a mask on the parameter would not reach it"
PARTS = "parts of its weight are used differently often, its MACs under a mask are not known"


@dataclass
class WeightUses:
    """How one image uses the weights of a network, in order of first use."""

    macs: dict[str, int] = field(default_factory=dict)
    """parameter path, or a name for a kernel that is larger or smaller than it -> multiply-accumulates"""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """shape of the same parameter or kernel"""
    computed: dict[str, str] = field(default_factory=dict)
    """module path -> why a mask on its weight would not act; modules that use their weight as it is are missing"""
    without_weight: dict[str, int] = field(default_factory=dict)
    """module path -> multiply-accumulates of its matrix products that read the image and no weight"""


def computed_weights(model: nn.Module, image_size: int, *, channels: int = 3) -> dict[str, str]:
    """Return the modules that do not pass their own parameter to the convolution or matrix product, with reasons.

    Views and copies of the parameter (transposed, reshaped, a part of a packed projection) are the parameter.

    Args:
        image_size: height and width of the images, px.
    """
    return observe(model, image_size, channels=channels).computed


def observe(model: nn.Module, image_size: int, *, channels: int = 3) -> WeightUses:
    """Return how one image of `image_size` px uses the weights of `model`.

    The image passes through a copy of the model without memory or arithmetic ("meta" device). All convolutions count,
    and matrix products with an operand that is a parameter or is computed from parameters alone. Products of two
    activations are counted separately: those of attention, and those with a matrix computed from the image.
    """
    ghost = meta_copy(model)
    precision = next((parameter.dtype for parameter in ghost.parameters()), torch.float32)
    image = _example(model, image_size, channels, precision)
    watch = _Watch(ghost, image)
    with torch.no_grad(), QuickShapes(), watch:
        ghost(image)
    watch.finish()
    return watch.uses


def _example(model: nn.Module, image_size: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Return one input on the meta device: what the network says of itself, else an image."""
    own: Any = getattr(model, "example_input", None)
    if own is not None:
        symbols: Tensor = own("meta")
        return symbols
    return torch.zeros(1, channels, image_size, image_size, device="meta", dtype=dtype)


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of `model` in evaluation mode whose tensors have no memory; shared tensors stay shared."""
    known: dict[int, Any] = {}
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(value, Tensor):
                empty = meta_like(value)
                is_parameter = isinstance(value, nn.Parameter)
                known[id(value)] = nn.Parameter(empty, value.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, known).eval()


@dataclass(frozen=True)
class _Origin:
    """The sources from which a tensor was computed."""

    image: bool
    """whether the image is among them"""
    parameters: frozenset[str]
    """parameters that entered by themselves, not through a convolution or matrix product"""


class _Watch(TorchDispatchMode):
    """Follows parameters through a forward pass into convolutions and matrix products."""

    def __init__(self, ghost: nn.Module, image: Tensor) -> None:
        super().__init__()
        self.uses = WeightUses()
        self._parameters = dict(ghost.named_parameters())
        paths = {id(parameter): path for path, parameter in self._parameters.items()}
        self._owners = {_storage(parameter): path for path, parameter in self._parameters.items()}
        self._origins = {_storage(image): _Origin(True, frozenset())}
        self._alive: list[Tensor] = []  # a new tensor could reuse the storage of a freed one
        self._running: list[tuple[str, nn.Module, int]] = []
        self._num_products = 0
        self._called: dict[str, None] = {}
        self._weight_of: dict[nn.Module, str] = {}
        self._parts: dict[str, dict[tuple[int, int], int]] = {}
        """parameter path -> (first value, size) of each part that a product reads -> multiply-accumulates per value"""
        self._layers: dict[str, list[str]] = {}
        """path of a layer's weight -> layers that share it"""
        for name, module in ghost.named_modules():
            if layer_kind(module):
                self._weight_of[module] = paths.get(id(module.weight), weight_path(name))
                self._layers.setdefault(self._weight_of[module], []).append(name)
            module.register_forward_pre_hook(partial(self._enter, name))
            module.register_forward_hook(self._leave)
        for path, parameter in self._parameters.items():
            # vectors, such as gains, scale activations
            is_weight = path in self._layers or parameter.numel() > max(parameter.shape, default=1)
            self._origins[_storage(parameter)] = _Origin(False, frozenset([path] if is_weight else []))

    def finish(self) -> None:
        """List the layers that were called without a product of their weight, or with uneven parts of it."""
        self._list(path for path in self._called if path not in self.uses.macs)
        for path, parts in self._parts.items():
            covered = sum(size for _, size in parts)
            if covered != self._parameters[path].numel() or len(set(parts.values())) > 1:
                self._list([path], PARTS)

    def _enter(self, name: str, module: nn.Module, _inputs: Any) -> None:
        self._running.append((name, module, self._num_products))

    def _leave(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        _, _, before = self._running.pop()
        if module not in self._weight_of:
            return
        path = self._weight_of[module]
        self._called[path] = None
        if self._num_products == before and isinstance(output, Tensor):  # an operator from another library
            self._list([path])
            weight = module.get_parameter("weight")
            self._add(path, tuple(weight.shape), output.numel() * weight[0].numel())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        counted = func in _OPERANDS and self._product(func, args, output, of_image=self._of_image(read))
        if func in _COPIES and (owner := self._owners.get(_storage(read[0]))):
            self._owners[_storage(output)] = owner
        self._follow(read, made, enters=not counted)
        return output

    def _of_image(self, read: Iterable[Tensor]) -> bool:
        return any(origin.image for tensor in read if (origin := self._origins.get(_storage(tensor))))

    def _follow(self, read: Iterable[Tensor], made: Iterable[Tensor], *, enters: bool) -> None:
        """Record the sources of an operator's results; results of constants alone are constants."""
        known = [origin for tensor in read if (origin := self._origins.get(_storage(tensor)))]
        if not known:
            return
        parameters = frozenset().union(*(origin.parameters for origin in known)) if enters else frozenset()
        origin = _Origin(self._of_image(read), parameters)
        for tensor in made:
            self._alive.append(tensor)
            self._origins[_storage(tensor)] = origin

    def _product(self, func: Any, args: tuple[Any, ...], output: Tensor, *, of_image: bool) -> bool:
        """Count a convolution, or a matrix product in which an operand is a weight; return whether it is one."""
        for at in _OPERANDS[func]:
            weight = args[at]
            owner, origin = self._owners.get(_storage(weight)), self._origins.get(_storage(weight))
            entered = origin.parameters & self._layers.keys() if origin else frozenset()
            if owner and (of_image or func not in _WITH_VECTOR):
                self._add_own(owner, weight, _operator_macs(func, args, output))
            elif func is aten.convolution.default or (of_image and origin and (entered or not origin.image)):
                home = self._home(origin.parameters if origin else frozenset())
                self._list([*entered, home])
                self._add(home, tuple(weight.shape), _operator_macs(func, args, output))
            else:
                continue
            return True
        if of_image:
            name, macs = self._running[-1][0], _operator_macs(func, args, output)
            self.uses.without_weight[name] = self.uses.without_weight.get(name, 0) + macs
        return False

    def _add_own(self, path: str, weight: Tensor, macs: int) -> None:
        """Add the MACs of a parameter, or of a part of it."""
        parts, part = self._parts.setdefault(path, {}), (int(weight.storage_offset()), _num_values(weight))
        parts[part] = parts.get(part, 0) + macs // part[1]
        self._add(path, tuple(self._parameters[path].shape), macs)

    def _home(self, entered: frozenset[str]) -> str:
        """Return the parameter that a computed kernel counts as: that of the running layer, else the largest source."""
        name, module, _ = self._running[-1]
        if module in self._weight_of:
            return self._weight_of[module]
        own = {f"{name}.{key}" if name else key for key, _ in module.named_parameters(recurse=False)}
        candidates = entered & self._layers.keys() or entered or own & self._parameters.keys()
        return max(sorted(candidates), key=lambda path: self._parameters[path].numel(), default=weight_path(name))

    def _list(self, paths: Iterable[str], reason: str = COMPUTED) -> None:
        for path in paths:
            for name in self._layers.get(path, [path.rpartition(".")[0]]):
                self.uses.computed.setdefault(name, reason)

    def _add(self, path: str, shape: tuple[int, ...], macs: int) -> None:
        self._num_products += 1
        parameter = self._parameters.get(path)
        if parameter is not None and parameter.numel() != math.prod(shape):
            path = f"{path} (computed kernel)"
        self.uses.macs[path] = self.uses.macs.get(path, 0) + macs
        self.uses.shapes.setdefault(path, shape)


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _num_values(weight: Tensor) -> int:
    """Return the number of values of a tensor, without dimensions that only repeat them."""
    return math.prod(size for size, stride in zip(weight.shape, weight.stride(), strict=True) if stride)


def _operator_macs(func: Any, args: tuple[Any, ...], output: Tensor) -> int:
    """Return the multiply-accumulates of a convolution or matrix product."""
    second: Tensor = args[1]
    if func is aten._trilinear.default:  # from nn.Bilinear: each weight is used once per value of its output feature
        return output.numel() * second[0].numel()
    if func is aten.addbmm.default:  # sums over the batch
        return output.numel() * second.shape[0] * second.shape[-1]
    if func is not aten.convolution.default:
        left: Tensor = args[min(_OPERANDS[func])]
        return output.numel() * left.shape[-1]
    image: Tensor = args[0] if args[6] else output  # the input of a transposed convolution
    return image.numel() * second[0].numel()
