"""Which layers a method may prune, given how the network uses their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from prune_lab.accounting.costs import LayerCost
from prune_lab.accounting.eligibility import Layer
from prune_lab.foundations.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from prune_lab.core.method import Method


def usable_layers(method: Method, model: nn.Module, costs: Sequence[LayerCost]) -> list[Layer]:
    """Return every conv and linear layer of `model`, eligible by the method's rule and by how its weight is used.

    If a product reads a weight that is computed from the parameter, a mask would remove nothing. Such layers stay
    dense, with the reason given in `costs`.

    Raises:
        UserError: a pattern of the method matches no layer, or no layer is left to prune.
    """
    computed = {cost.parameter: cost.computed for cost in costs if cost.computed}
    layers = [
        replace(layer, eligible=False, reason=computed[layer.parameter])
        if layer.eligible and layer.parameter in computed else layer
        for layer in method.layers(model)
    ]  # fmt: skip
    prunes = any(phase.active for phase in method.chain())
    if prunes and not any(layer.eligible for layer in layers):
        reasons = dict.fromkeys(layer.reason for layer in layers)
        name = method.config.name
        raise UserError(f"method={name}: the network has no layer that can be pruned: {'; '.join(reasons)}")
    return layers
