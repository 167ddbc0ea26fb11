"""Gates that are exactly 0 or far from it: their values, their training, and the cost of open gates.

t is the parameter of a gate, g its value. A gate precedes the layers that read a channel. It multiplies their
input columns, which is equivalent to multiplying the channel, also if the input is padded with zeros.

Source: Guo, Yuan, Tan, Wang, Yang, Liu 2021, arXiv 2109.02220, whose text was not at hand: see the card of method=gdp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from prune_lab.foundations.lazy import torch
from prune_lab.pruning.channels.groups import ChannelMap

if TYPE_CHECKING:
    from torch import Tensor, nn


def gate(t: Tensor, eps: float) -> Tensor:
    """Return g = t^2 / (t^2 + eps), shaped like `t`: 0 at t = 0, below 1, and 1/2 at |t| = sqrt(eps)."""
    squared = (t / eps**0.5).square_()
    value: Tensor = squared / (squared + 1)
    return value


def slope(t: Tensor, eps: float) -> Tensor:
    """Return dg/dt = 2 t eps / (t^2 + eps)^2, shaped like `t`: 0 at t = 0, so that a gate at 0 stays there."""
    scaled = t / eps**0.5
    value: Tensor = 2 * scaled / (scaled.square() + 1).square_() / eps**0.5  # eps^2 would underflow
    return value


def proximal_step(t: Tensor, gradient: Tensor, price: Tensor, lr: float) -> Tensor:
    """Return t after a gradient step on the loss and the soft threshold of an absolute price.

    u = t - lr gradient; t = sign(u) max(|u| - lr price, 0).

    Args:
        gradient: dL/dt, shaped like `t`.
        price: non-negative, shaped like `t`: decrease of the loss when |t| falls by 1.
    """
    moved = t - lr * gradient
    return moved.sign() * (moved.abs() - lr * price).clamp_(min=0)


def eps_at(step: int, *, start: float, end: float, num_steps: int) -> float:
    """Return the sharpness of the gates in step `step`: geometric from `start` to `end`, reached at `num_steps`."""
    return float(start * (end / start) ** min(step / max(num_steps, 1), 1.0))


def keep_best(t: Tensor, before: Tensor, lanes: Tensor) -> Tensor:
    """Return `t` [gates], but in a lane whose gates are all 0 the gate that was widest `before` keeps that value.

    Args:
        lanes: the gates of each lane, from `members`.
    """
    widest = _gathered(before.abs(), lanes).argmax(1, keepdim=True)
    best = lanes.gather(1, widest).squeeze(1)
    shut = _gathered(t.abs(), lanes).amax(1) == 0
    kept = t.clone()
    kept[best] = torch.where(shut, before[best], t[best])
    return kept


def sums(values: Tensor, groups: Tensor) -> Tensor:
    """Return the sum of `values` [n] over each group, from `members`.

    The order of the additions is the same on every process, unlike that of `index_add_` on a GPU.
    """
    return _gathered(values, groups).sum(1)


def _gathered(values: Tensor, groups: Tensor) -> Tensor:
    return torch.cat([values, values.new_zeros(1)])[groups]


def members(group_of: Tensor, num_groups: int) -> Tensor:
    """Return the positions of each group in `group_of`, int64 [num_groups, size of the largest], padded by its length.

    Args:
        group_of: int64 [n] on the CPU; -1: in none.
    """
    counts = torch.bincount(group_of + 1, minlength=num_groups + 1)
    order = group_of.argsort(stable=True)
    rank = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    inside = order[int(counts[0]):]
    table = torch.full((num_groups, int(counts[1:].max())), len(order))
    table[group_of[inside], rank[int(counts[0]):]] = inside
    return table


def cost(widths: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cost of the network, x A x, and the cost of one more channel in each lane, [lanes].

    x is `widths` followed by a 1. The cost is bilinear in the widths of neighbouring layers. The cost of a channel is
    computed with the other factor fixed (alternating relaxation). It adds up over all layers that produce the channel
    and all that read it.

    Args:
        widths: channels per lane, the sum of their gates [lanes].
        matrix: A, from `ChannelCosts.matrix`, [lanes + 1, lanes + 1].
    """
    extended = torch.cat([widths, widths.new_ones(1)])
    product = matrix @ extended
    return extended @ product, (product + extended @ matrix)[:-1]


class ColumnGates:
    """The input columns that gates multiply, over all layers at once."""

    def __init__(self, model: nn.Module, channels: ChannelMap, gated: Tensor) -> None:
        """Gate the columns of these classes.

        Args:
            gated: bool [num_classes]; columns of other classes are multiplied by 1.
        """
        whole = torch.cat([gated, gated.new_zeros(1)])  # -1, what stays, is the last
        reading = {path: classes for path, classes in channels.columns.items() if bool(whole[classes].any())}
        self.parameters = [f"{path}.weight" for path in reading]
        """paths of the weights that gates change"""
        self._shapes = [(1, -1, *[1] * (model.get_parameter(name).dim() - 2)) for name in self.parameters]
        self._sizes = [len(classes) for classes in reading.values()]
        device = next(model.parameters()).device
        self._class_of = torch.cat(list(reading.values())).to(device)
        self._members = members(self._class_of.cpu(), channels.num_classes).to(device)

    def factors(self, gates: Tensor) -> list[Tensor]:
        """Return the factor on each parameter, shaped to broadcast to it.

        Args:
            gates: g per class [num_classes].
        """
        columns = torch.cat([gates, gates.new_ones(1)])[self._class_of]  # -1, what stays, is the last
        return [part.view(shape) for part, shape in zip(columns.split(self._sizes), self._shapes, strict=True)]

    def gradient(self, gradients: Mapping[str, Tensor], raw: Mapping[str, Tensor]) -> Tensor:
        """Return dL/dg per class [num_classes]: dL/d(w g) w, summed over all weights in its columns.

        Args:
            gradients: dL/d(w g) per parameter.
            raw: w per parameter.
        """
        names = self.parameters
        products = torch._foreach_mul([gradients[name] for name in names], [raw[name] for name in names])
        by_column = [product.sum([dim for dim in range(product.dim()) if dim != 1]) for product in products]
        return sums(torch.cat(by_column), self._members)
