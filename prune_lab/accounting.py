"""Parameters and MACs, counted here and nowhere else.

Convention: a MAC is one multiply-accumulate of a convolution, or of a matrix product with a weight, for one image at
the data set's size. A weight is a parameter or computed from parameters; kernels that are mixed for each image count as
well. Biases, normalisation, activations, pooling, additions and products of two activations (`macs_without_weight`) are
not counted; FLOPs would be 2 x MACs. A backward pass costs twice a forward pass: once for the gradient of the inputs,
once for that of the weights.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.eligibility import Layer, layer_kind, weight_path
from prune_lab.weight_use import observe


@dataclass(frozen=True)
class LayerCost:
    """Dense cost of one layer. Every weight is used `positions` times per image, so MACs are exact for any mask."""

    name: str
    parameter: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    positions: int
    computed: str = ""
    """why a mask on the parameter would not act on the products that are counted; empty if it does"""

    @property
    def macs(self) -> int:
        return self.weights * self.positions


def profile(model: nn.Module, image_size: int, *, channels: int = 3) -> list[LayerCost]:
    """Return the cost of every conv and linear layer that a forward pass uses, in the order of first use.

    One image passes through a copy of the model without memory or arithmetic ("meta" device). A layer used twice counts
    twice; a weight shared by two layers is one entry. Weights that are used without calling their layer, as in
    torchvision's attention, and kernels that are computed in the pass, such as mixtures, count as well.
    """
    uses = observe(model, image_size, channels=channels)
    kinds = {weight_path(name): layer_kind(module) for name, module in model.named_modules()}
    costs = []
    for path, macs in uses.macs.items():
        name, shape = path.rpartition(".")[0], uses.shapes[path]
        kind = kinds.get(path) or ("linear" if len(shape) == 2 else "conv")
        positions, rest = divmod(macs, math.prod(shape))
        computed = uses.computed.get(name, "")
        costs.append(LayerCost(name, path, kind, shape, math.prod(shape), positions, computed))
        if rest:  # parts of the weight are used differently often
            costs.append(LayerCost(name, f"{path} (further use of a part)", kind, (rest,), rest, 1, computed))
    return costs


def dense_macs(costs: Sequence[LayerCost]) -> int:
    return sum(cost.macs for cost in costs)


def macs_without_weight(model: nn.Module, image_size: int) -> int:
    """Return the MACs per image of matrix products that no weight enters, which no other figure here counts.

    Those are attention, and layers whose matrix another layer mixes for each image (timm's CondLinear).
    """
    return sum(observe(model, image_size).without_weight.values())


def computed_note(costs: Sequence[LayerCost]) -> str | None:
    """Return one line on the layers in which no mask acts on the weight that is used; None: there are none."""
    computed = [cost for cost in costs if cost.computed]
    if not computed:
        return None
    names, reasons = {cost.name for cost in computed}, dict.fromkeys(cost.computed for cost in computed)
    share = dense_macs(computed) / dense_macs(costs)
    return f"note: {len(names)} layers with {share:.2%} of the MACs stay dense: {'; '.join(reasons)}"


def sparse_macs(costs: Sequence[LayerCost], kept: Mapping[str, int]) -> int:
    """Return MACs per image when the parameters in `kept` keep so many weights and all others are dense."""
    return sum(kept.get(cost.parameter, cost.weights) * cost.positions for cost in costs)


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable values, biases and batch-norm included; a shared tensor counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def layer_table(
    layers: Sequence[Layer], costs: Sequence[LayerCost], kept: Mapping[str, int] | None
) -> list[dict[str, Any]]:
    """Return one row per layer, so that MACs add up to the totals.

    Weights of other modules that cost MACs (packed attention projections) follow the layers of `layers`.

    Args:
        kept: parameter -> kept weights, dense where missing; None: unknown, the layout depends on trained weights.
    """
    cost_of = {cost.parameter: cost for cost in costs}
    listed = {layer.parameter for layer in layers}
    others = [cost for cost in costs if cost.parameter not in listed]
    rest = [
        Layer(cost.name, cost.parameter, cost.kind, cost.shape, False, cost.computed or "no layer of its own")
        for cost in others
    ]
    rows = []
    for layer in [*layers, *rest]:
        cost = cost_of.get(layer.parameter)
        keep = None if kept is None else kept.get(layer.parameter, layer.size)
        positions = cost.positions if cost else 0
        rows.append(
            {
                "name": layer.name,
                "kind": layer.kind,
                "shape": list(layer.shape),
                "eligible": layer.eligible,
                "reason": layer.reason,
                "weights": layer.size,
                "kept": keep,
                "density": None if keep is None else keep / layer.size,
                "macs_dense": layer.size * positions,
                "macs_kept": None if keep is None else keep * positions,
            }
        )
    return rows


class TrainingCost:
    """MACs spent on training so far, over all images and processes."""

    def __init__(self) -> None:
        self.images = 0
        self._total = 0
        self._forward = 0
        self._unread: Tensor | None = None
        """int64 [2] on the device: what is still to be added to total and forward"""

    @property
    def total(self) -> int:
        self._read()
        return self._total

    @total.setter
    def total(self, value: int) -> None:
        self._read()
        self._total = value

    @property
    def forward(self) -> int:
        """MACs of the forward passes alone."""
        self._read()
        return self._forward

    def _read(self) -> None:
        if self._unread is not None:
            total, forward = self._unread.tolist()
            self._total, self._forward, self._unread = self._total + total, self._forward + forward, None

    @property
    def mean_forward(self) -> float | None:
        """MACs per image of the networks trained so far, on average; None before the first step."""
        return self.forward / self.images if self.images else None

    def add(self, images: int, forward: int | Tensor, dense_gradient: int | None = None) -> None:
        """Add one step; a number that is still on the device is read when the sums are asked for.

        Args:
            images: images of the step over all processes.
            forward: MACs per image of the network as masked in this step.
            dense_gradient: MACs of the dense network if gradients of pruned weights were needed, else None.

        Source: Evci et al. 2020, appendix H, arXiv 1911.11134: 3 f_S, and 2 f_S + f_D with the dense gradient.
        """
        self.images += images
        step = images * (2 * forward + (forward if dense_gradient is None else dense_gradient))
        if isinstance(forward, Tensor):
            unread = torch.stack([step, images * forward])
            self._unread = unread if self._unread is None else self._unread + unread
        else:
            self._total, self._forward = self._total + step, self._forward + images * forward

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "images": self.images, "forward": self.forward}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._total, self.images, self._forward = state["total"], state["images"], state["forward"]
        self._unread = None


def planned_training_macs(
    costs: Sequence[LayerCost],
    layout: Sequence[tuple[int, Mapping[str, int]]],
    *,
    last_step: int,
    batch_size: int,
    dense_steps: Sequence[int],
    first_step: int = 0,
) -> int:
    """Return the MACs of a training phase whose masks are known beforehand.

    Args:
        first_step, last_step: the phase does the steps from `first_step` up to `last_step` - 1 of its schedule.
        layout: (first step, kept weights per parameter) in order, as from Method.layout.
        dense_steps: the steps that need gradients of pruned weights, rising.
    """
    cost, dense = TrainingCost(), dense_macs(costs)
    starts = [min(max(start, first_step), last_step) for start, _ in layout] + [last_step]
    for (_, kept), start, end in zip(layout, starts[:-1], starts[1:], strict=True):
        forward = sparse_macs(costs, kept)
        num_dense = bisect_left(dense_steps, end) - bisect_left(dense_steps, start)
        cost.add(batch_size * (end - start - num_dense), forward)
        cost.add(batch_size * num_dense, forward, dense)
    return cost.total


def rigl_training_ratio(sparse: int, dense: int, interval: int) -> float:
    """Return RigL's training cost over dense training by its paper's formula, which has updates until the end.

    Source: Evci et al. 2020, appendix H, arXiv 1911.11134: (3 f_S dT + 2 f_S + f_D) / (3 f_D (dT + 1)).
    """
    return (3 * sparse * interval + 2 * sparse + dense) / (3 * dense * (interval + 1))
