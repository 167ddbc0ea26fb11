"""Gates after batch norms: drawn for every image during a step, part of scale and shift between steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from prune_lab.accounting.network import Network
from prune_lab.foundations import distributed
from prune_lab.foundations.lazy import torch
from prune_lab.pruning.batch_norm.kind import is_norm
from prune_lab.pruning.channels.groups import ChannelGroup, channel_groups
from prune_lab.pruning.gates import hard_concrete

if TYPE_CHECKING:
    from torch import Tensor, fx, nn

    Parameters = Mapping[str, nn.Parameter]
    """the network's parameters by path"""


def find_norms(model: nn.Module, image_size: int) -> list[tuple[ChannelGroup, str]]:
    """Return the channels of each layer that a batch norm follows, and the module path of the norm before their gates.

    It is the last batch norm before the channels branch or reach a layer that mixes them. After a depthwise
    convolution, it is that one's own. A batch norm after the gate would undo the gate's effect on all images. Excluded
    are channels that an addition ties or that pass a norm on a separate path. So are norms without scale and shift or
    with a built-in activation.
    """
    from prune_lab.pruning.channels.trace import trace  # its file subclasses torch's tracer

    graph = trace(model, image_size).graph
    node_of = {node.target: node for node in graph.nodes if node.op == "call_module"}
    found = []
    for group in channel_groups(model, image_size):
        path = _last_norm(node_of[group.producer], group)
        if path is not None and _has_scale_and_shift(model.get_submodule(path)):
            found.append((group, path))
    return found


def _last_norm(node: fx.Node, group: ChannelGroup) -> str | None:
    """Return the last of the norms of `group` if the first directly follows `node` and all are on one path."""
    passed: list[str] = []
    first = True
    while len(node.users) == 1:
        (node,) = node.users
        if node.target in group.norms:
            passed.append(node.target)
        if first and not passed:
            return None
        first = False
    return passed[-1] if passed and set(passed) == set(group.norms) else None


def _has_scale_and_shift(norm: nn.Module) -> bool:
    plain = is_norm(norm) and not any(norm.children())
    return plain and norm.weight is not None and norm.bias is not None


class Draw:
    """The gates of one step, a sample for every image; each forward pass of the step draws new ones."""

    def __init__(self, log_alpha: Tensor, sizes: list[int], source: Callable[[int], torch.Generator]) -> None:
        """Draw from `log_alpha` [num_gates], which gradients reach; `source` returns the generator of the n-th pass."""
        self._log_alpha, self._sizes, self._source = log_alpha, sizes, source
        self._passes = 0
        self._parts: tuple[Tensor, ...] = ()
        self._given: set[int] = set()

    def gates(self, index: int, num_images: int) -> Tensor:
        """Return z [num_images, gates] of norm `index`; a second call for a norm begins the next forward pass.

        All processes draw for all images and each uses its own part, so that together they match a single process.
        """
        if not self._parts or index in self._given:
            source, self._passes, self._given = self._source(self._passes), self._passes + 1, set()
            whole = (distributed.world_size() * num_images, len(self._log_alpha))
            mine = slice(distributed.rank() * num_images, (distributed.rank() + 1) * num_images)
            drawn = hard_concrete.sample(self._log_alpha, hard_concrete.noise(whole, source)[mine])
            self._parts = drawn.split(self._sizes, 1)
        self._given.add(index)
        return self._parts[index]


class GatedNorms:
    """The batch norms with gates: their raw scales and shifts, and the hooks that multiply their outputs."""

    def __init__(self, network: Network, paths: list[str], parameters: Callable[[], Parameters]) -> None:
        """Gate the norms at `paths`; `parameters` returns the network's parameters by path."""
        self._parameters, named = parameters, parameters()
        self._paths = [f"{path}.{name}" for name in ("weight", "bias") for path in paths]
        self.raw = {path: named[path].detach().clone() for path in self._paths}
        self._state: dict[str, Draw | None] = {"draw": None}
        norms = [network.model.get_submodule(path) for path in paths]
        self._sizes = [len(named[f"{path}.weight"]) for path in paths]
        self._handles = [
            norm.register_forward_hook(_multiply(self._state, index)) for index, norm in enumerate(norms)
        ]

    def begin(self, log_alpha: Tensor, source: Callable[[int], torch.Generator]) -> None:
        """Make forward passes of the model draw gates, on raw scales and shifts; see `Draw`."""
        self._copy(self._values(), list(self.raw.values()))
        self._state["draw"] = Draw(log_alpha, self._sizes, source)

    def end(self) -> None:
        """Stop forward passes from drawing gates."""
        self._state["draw"] = None

    def take(self) -> None:
        """Read the raw scales and shifts back from the model."""
        self._copy(list(self.raw.values()), self._values())

    def fold(self, gates: Tensor) -> None:
        """Write the raw scales and shifts times `gates` [num_gates] into the model."""
        products = torch._foreach_mul(list(self.raw.values()), [*gates.split(self._sizes)] * 2)
        self._copy(self._values(), list(products))

    def remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _values(self) -> list[Tensor]:
        named = self._parameters()
        return [named[path].detach() for path in self._paths]

    @staticmethod
    def _copy(targets: list[Tensor], values: list[Tensor]) -> None:
        torch._foreach_copy_(targets, values)


def _multiply(state: dict[str, Draw | None], index: int) -> Callable[..., Tensor | None]:
    """Return a forward hook; a plain function, so that copies of the model share it and its state."""

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        draw = state["draw"]
        if draw is None:
            return None
        gates = draw.gates(index, len(output)).to(output.dtype)
        return output * gates.view(*gates.shape, *[1] * (output.dim() - 2))

    return hook
