"""Does an exported network compute what the run's network computes? Measured on random images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prune_lab.schema import ConfigError

BATCHES = (1, 3, 28)
"""sizes that files are checked with: the batch size must be free"""


@dataclass(frozen=True)
class Reference:
    """Images and what the run's network says about them in PyTorch, fp32."""

    images: list[Tensor]
    """normal random numbers, fp32 [N, 3, H, W] for the sizes in `BATCHES`"""
    logits: list[Tensor]

    @property
    def scale(self) -> float:
        """The largest absolute output."""
        return max(float(logits.abs().max()) for logits in self.logits)


@dataclass(frozen=True)
class Agreement:
    """How far outputs are from the reference."""

    max_difference: float
    """largest absolute difference of two outputs; NaN if an output is not a number"""
    relative: float
    """the same over the largest absolute output of the reference"""
    same_top1: int
    images: int

    def within(self, tolerance: float) -> bool:
        return self.relative <= tolerance  # False for NaN


def make_reference(model: nn.Module, image_size: int, *, seed: int = 0) -> Reference:
    """Return random images with the outputs of `model`.

    Raises:
        ConfigError: the network's outputs are not finite, or all zero, so that nothing can be compared.
    """
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(size, 3, image_size, image_size, generator=generator) for size in BATCHES]
    with torch.inference_mode():
        reference = Reference(images, [model(batch) for batch in images])
    if not all(bool(logits.isfinite().all()) for logits in reference.logits) or reference.scale == 0:
        raise ConfigError("the outputs of the run's network on random images are not finite or all zero")
    return reference


def compare(reference: Reference, run: Callable[[Tensor], Tensor]) -> Agreement:
    """Return how `run` agrees with the reference."""
    with torch.inference_mode():
        outputs = [run(batch).float() for batch in reference.images]
    found, wanted = torch.cat(outputs), torch.cat(reference.logits)
    difference = float((found.double() - wanted.double()).abs().max())
    same = int((found.argmax(1) == wanted.argmax(1)).sum())
    return Agreement(difference, difference / reference.scale, same, len(wanted))
