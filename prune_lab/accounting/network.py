"""A network as the parts of methods see it: its modules, its layers and their cost, without the surrounding run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prune_lab.accounting.costs import LayerCost, dense_macs
from prune_lab.accounting.eligibility import Layer
from prune_lab.foundations.lazy import torch

if TYPE_CHECKING:
    from torch import nn


@dataclass
class LayeredNetwork:
    """A network with the layers that its method may prune."""

    model: nn.Module
    layers: Sequence[Layer]
    """eligibility of every conv and linear layer, by the method's rule"""
    costs: Sequence[LayerCost]
    """dense cost per conv and linear layer, in model order"""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dense_macs(self) -> int:
        """MACs per image without masks."""
        return dense_macs(self.costs)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the parameters by path."""
        return dict(self.model.named_parameters())

    def eligible(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.eligible]


@dataclass
class Network(LayeredNetwork):
    """A network on square images."""

    image_size: int
    """height and width of the images, px"""
