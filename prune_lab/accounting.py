"""Parameters and MACs, counted here and nowhere else.

Convention: a MAC is one multiply-accumulate of a convolution or linear layer, for one image at the data set's size.
Biases, normalisation, activations, pooling and additions are not counted; FLOPs would be 2 x MACs. A backward pass
costs twice a forward pass: once for the gradient of the inputs, once for that of the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.eligibility import Layer, layer_kind


@dataclass(frozen=True)
class LayerCost:
    """Dense cost of one layer. Every weight is used `positions` times per image, so MACs are exact for any mask."""

    name: str
    parameter: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    positions: int

    @property
    def macs(self) -> int:
        return self.weights * self.positions


def profile(model: nn.Module, image_size: int, *, channels: int = 3) -> list[LayerCost]:
    """Return the cost of every conv and linear layer that a forward pass uses, in the order of first use.

    One image passes through a copy of the model without memory or arithmetic ("meta" device); a layer used twice
    counts twice.
    """
    ghost = copy.deepcopy(model).to("meta").eval()
    positions: dict[str, int] = {}
    names = {module: name for name, module in ghost.named_modules()}

    def count(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        channels_out = module.weight.shape[0]
        name = names[module]
        positions[name] = positions.get(name, 0) + output.numel() // channels_out

    hooks = [module.register_forward_hook(count) for module in ghost.modules() if layer_kind(module)]
    with torch.no_grad():
        ghost(torch.zeros(1, channels, image_size, image_size, device="meta"))
    for hook in hooks:
        hook.remove()
    modules = dict(ghost.named_modules())
    return [_layer_cost(name, modules[name], count) for name, count in positions.items()]


def _layer_cost(name: str, module: nn.Module, positions: int) -> LayerCost:
    shape = tuple(module.weight.shape)
    return LayerCost(name, f"{name}.weight", layer_kind(module), shape, module.weight.numel(), positions)


def dense_macs(costs: Sequence[LayerCost]) -> int:
    return sum(cost.macs for cost in costs)


def sparse_macs(costs: Sequence[LayerCost], kept: Mapping[str, int]) -> int:
    """Return MACs per image when the parameters in `kept` keep so many weights and all others are dense."""
    return sum(kept.get(cost.parameter, cost.weights) * cost.positions for cost in costs)


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable values, biases and batch-norm included; a shared tensor counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def layer_table(
    layers: Sequence[Layer], costs: Sequence[LayerCost], kept: Mapping[str, int] | None
) -> list[dict[str, Any]]:
    """Return one row per layer; `kept` None: unknown, because the layout depends on trained weights."""
    cost_of = {cost.parameter: cost for cost in costs}
    rows = []
    for layer in layers:
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
        self.total = 0

    def add(self, images: int, forward: int, dense_gradient: int | None = None) -> None:
        """Add one step.

        Args:
            images: images of the step over all processes.
            forward: MACs per image of the network as masked in this step.
            dense_gradient: MACs of the dense network if gradients of pruned weights were needed, else None.

        Source: Evci et al. 2020, appendix H, arXiv 1911.11134: 3 f_S, and 2 f_S + f_D with the dense gradient.
        """
        self.total += images * (2 * forward + (forward if dense_gradient is None else dense_gradient))

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.total = state["total"]


def rigl_training_ratio(sparse: int, dense: int, interval: int) -> float:
    """Return RigL's training cost over dense training by its paper's formula, which has updates until the end.

    Source: Evci et al. 2020, appendix H, arXiv 1911.11134: (3 f_S dT + 2 f_S + f_D) / (3 f_D (dT + 1)).
    """
    return (3 * sparse * interval + 2 * sparse + dense) / (3 * dense * (interval + 1))
