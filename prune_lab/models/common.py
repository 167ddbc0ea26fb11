"""What the model families share: channel scaling, image-size rule, initial weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prune_lab.foundations.lazy import torch

if TYPE_CHECKING:
    from torch import nn

SMALL_IMAGE_PX = 64
"""Images up to this size get the small-image form of a network (no early down-sampling)."""


def is_small(image_size: int) -> bool:
    """Return whether images of `image_size` px get the small-image form."""
    return image_size <= SMALL_IMAGE_PX


def scale_channels(channels: int, width: float) -> int:
    """Return `width * channels` rounded to the nearest integer (halves to even), at least 1."""
    return max(1, round(channels * width))


def init_weights(model: nn.Module) -> None:
    """Draw convolution weights (Kaiming normal, fan out) and reset BN in place, as torchvision's ResNets.

    Linear layers keep PyTorch's default draw. Source: He et al. 2015, arXiv 1502.01852.
    """
    if next(model.parameters()).is_meta:  # no values here, and drawing them takes longer than building the network
        return
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        elif isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            torch.nn.init.ones_(module.weight)
            torch.nn.init.zeros_(module.bias)
