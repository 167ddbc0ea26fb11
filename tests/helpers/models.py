"""Helpers of the model tests: options by name, networks without memory, an independent MAC counter."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import nn

from prune_lab import models
from prune_lab.foundations.shapes import QuickShapes

REPO = Path(__file__).parents[2]


def node(group: str, **changes) -> dict:
    """Return the options of conf/model/`group`.yaml with `changes`."""
    return OmegaConf.to_container(OmegaConf.load(REPO / "conf" / "model" / f"{group}.yaml")) | changes


def build(group: str, *, num_classes: int, image_size: int, device: str = "cpu", **changes) -> nn.Module:
    """Return the network of conf/model/`group`.yaml; device "meta" takes no memory and no time to initialise."""
    with torch.device(device):
        return models.build(models.parse_config(node(group, **changes)), num_classes=num_classes, image_size=image_size)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_weights(model: nn.Module) -> int:
    """Return the number of weights of all conv and linear layers (no biases)."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


def count_macs(model: nn.Module, image_size: int) -> int:
    """Return multiply-accumulates of conv and linear layers on one image, counted apart from the program's counter."""
    macs = []

    def record(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        macs.append(output.numel() * module.weight[0].numel())

    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    hooks = [module.register_forward_hook(record) for module in layers]
    device = next(model.parameters()).device
    with torch.no_grad(), QuickShapes():
        model.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
    for hook in hooks:
        hook.remove()
    return sum(macs)
