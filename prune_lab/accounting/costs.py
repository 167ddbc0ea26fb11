"""Parameters and MACs, counted here and nowhere else.

Convention: a MAC is one multiply-accumulate of a convolution, or of a matrix product with a weight, for one image at
the data set's size. A weight is a parameter or computed from parameters; kernels that are mixed for each image count as
well. Biases, normalisation, activations, pooling, additions and products of two activations (`macs_without_weight`) are
not counted; FLOPs would be 2 x MACs. A backward pass costs twice a forward pass: once for the gradient of the inputs,
once for that of the weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prune_lab.accounting.device_counts import DeviceCounts
from prune_lab.accounting.eligibility import Layer, weights_of

if TYPE_CHECKING:
    from torch import Tensor, nn


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
    """why a mask on the parameter would not affect the counted products; empty if it does"""

    @property
    def macs(self) -> int:
        return self.weights * self.positions


def profile(model: nn.Module, image_size: int, *, channels: int = 3) -> list[LayerCost]:
    """Return the cost of every conv and linear layer that a forward pass uses, in the order of first use.

    One image passes through a copy of the model without memory or arithmetic ("meta" device). A layer used twice counts
    twice; a weight shared by two layers is one entry. Weights used without calling their layer, as in torchvision's
    attention, count too. So do kernels that are computed in the pass, such as mixtures.
    """
    from prune_lab.accounting.weight_use import observe  # its file subclasses a mode of torch

    uses = observe(model, image_size, channels=channels)
    known = [weight for name, module in model.named_modules() for weight in weights_of(name, module)]
    names, kinds = {path: name for name, path, _ in known}, {path: kind for _, path, kind in known}
    costs = []
    for path, macs in uses.macs.items():
        name, shape = names.get(path, path.rpartition(".")[0]), uses.shapes[path]
        kind = kinds.get(path) or ("linear" if len(shape) == 2 else "conv")
        positions, rest = divmod(macs, math.prod(shape))
        computed = uses.computed.get(name, "")
        costs.append(LayerCost(name, path, kind, shape, math.prod(shape), positions, computed))
        if rest:  # parts of the weight are used an unequal number of times
            costs.append(LayerCost(name, f"{path} (further use of a part)", kind, (rest,), rest, 1, computed))
    return costs


def dense_macs(costs: Sequence[LayerCost]) -> int:
    return sum(cost.macs for cost in costs)


def macs_without_weight(model: nn.Module, image_size: int) -> int:
    """Return the MACs per image of matrix products without a weight, which no other figure here counts.

    These are attention, and layers whose matrix another layer mixes for each image (timm's CondLinear).
    """
    from prune_lab.accounting.weight_use import observe

    return sum(observe(model, image_size).without_weight.values())


def computed_note(costs: Sequence[LayerCost]) -> str | None:
    """Return one line on the layers in which no mask affects the weight in use; None: there are none."""
    computed = [cost for cost in costs if cost.computed]
    if not computed:
        return None
    names, reasons = {cost.name for cost in computed}, dict.fromkeys(cost.computed for cost in computed)
    share = dense_macs(computed) / dense_macs(costs)
    return f"note: {len(names)} layers with {share:.2%} of the MACs stay dense: {'; '.join(reasons)}"


def sparse_macs(costs: Sequence[LayerCost], kept: Mapping[str, int]) -> int:
    """Return MACs per image when `kept` gives the number of weights left per parameter and all others are dense."""
    return sum(kept.get(cost.parameter, cost.weights) * cost.positions for cost in costs)


def masked_macs(costs: Sequence[LayerCost], kept: DeviceCounts) -> int | Tensor:
    """Return `sparse_macs` for kept weights that may still be on the device; a tensor if some are."""
    positions: Counter[str] = Counter()
    for cost in costs:
        positions[cost.parameter] += cost.positions
    return sparse_macs(costs, dict.fromkeys(kept.names, 0)) + kept.weighted_sum(positions)


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable values, biases and batch-norm included; a shared tensor counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def layer_table(
    layers: Sequence[Layer], costs: Sequence[LayerCost], kept: Mapping[str, int] | None
) -> list[dict[str, Any]]:
    """Return one row per layer; their MACs add up to the totals.

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
