"""Does an exported network compute the same outputs as the run's? Measured on random images, against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_lab.foundations.errors import UserError

BATCHES = (1, 3, 28)
"""batch sizes for checking files: the batch size must be free"""
LEAST_SPREAD = 1e-2
"""fraction of the largest output: minimum of the scale, so that fp32's own rounding does not decide"""
NO_SPREAD = 1e-6
"""fraction of the largest output: within rounding, so that a file which ignores its images would pass"""
_PATCHES, _NOISE = 4, 0.5


@dataclass(frozen=True)
class Reference:
    """Images and the run's outputs for them in PyTorch."""

    images: list[Tensor]
    """fp32 [N, 3, H, W] for the sizes in `BATCHES`"""
    logits: list[Tensor]
    """fp32 [N, classes]"""
    exact: list[Tensor] | None = None
    """the same computed in float64; None if a module cannot"""

    @cached_property
    def wanted(self) -> Tensor:
        """All outputs [images, classes] in float64, in the best available precision."""
        return torch.cat(self.logits if self.exact is None else self.exact).double()

    @property
    def largest(self) -> float:
        """The largest absolute output."""
        return float(self.wanted.abs().max())

    @property
    def spread(self) -> float:
        """Largest distance of an output from its mean over the images; for one image, the largest output."""
        return float((self.wanted - self.wanted.mean(0)).abs().max()) if len(self.wanted) > 1 else self.largest

    @property
    def scale(self) -> float:
        """Divisor of differences: the spread, from `LEAST_SPREAD` to all of the largest output."""
        return min(max(self.spread, LEAST_SPREAD * self.largest), self.largest)

    @property
    def rounding(self) -> float:
        """Distance of PyTorch's own outputs in fp32 from those in float64, relative to `scale`."""
        return float((torch.cat(self.logits).double() - self.wanted).abs().max()) / self.scale


@dataclass(frozen=True)
class Agreement:
    """Distance of outputs from the reference."""

    max_difference: float
    """largest absolute difference of two outputs; NaN if an output is not a number"""
    relative: float
    """the same over the scale of the reference"""
    same_top1: int
    images: int

    def within(self, tolerance: float) -> bool:
        return self.relative <= tolerance  # False for NaN


def make_reference(model: nn.Module, image_size: int, *, batches: Sequence[int] = BATCHES, seed: int = 0) -> Reference:
    """Return random images with the outputs of `model` (fp32, eval mode).

    Raises:
        UserError: the network's outputs are not finite, all zero, or equal for all images, so that nothing can be
            compared.
    """
    generator = torch.Generator().manual_seed(seed)
    images = [_images(size, image_size, generator) for size in batches]
    with torch.inference_mode():
        reference = Reference(images, [model(batch) for batch in images], _exact(model, images))
    if not all(bool(logits.isfinite().all()) for logits in reference.logits) or reference.largest == 0:
        raise UserError("the outputs of the run's network on random images are not finite or all zero")
    if reference.spread <= NO_SPREAD * reference.largest:
        raise UserError(
            "the outputs of the run's network are the same for all random images: any file that ignores its images "
            "would agree with it"
        )
    return reference


def _images(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Return patches of colour with added noise: pixel means of pure noise hardly differ between images."""
    patches = torch.randn(count, 3, _PATCHES, _PATCHES, generator=generator)
    noise = torch.randn(count, 3, size, size, generator=generator)
    return F.interpolate(patches, size=size) + _NOISE * noise


def _exact(model: nn.Module, images: Sequence[Tensor]) -> list[Tensor] | None:
    """Return the outputs in float64; None if a module creates tensors of another precision."""
    double = copy.deepcopy(model).double()
    try:
        return [double(batch.double()) for batch in images]
    except RuntimeError:
        return None


def compare(reference: Reference, run: Callable[[Tensor], Tensor], *, is_same_arithmetic: bool = False) -> Agreement:
    """Return the agreement of `run` with the reference.

    Args:
        is_same_arithmetic: `run` is PyTorch itself in fp32, where rounding cannot be mistaken for a fault: it is
            compared with the fp32 outputs.
    """
    with torch.inference_mode():
        found = torch.cat([run(batch).double() for batch in reference.images])
    wanted = torch.cat(reference.logits).double() if is_same_arithmetic else reference.wanted
    difference = float((found - wanted).abs().max())
    same = int((found.argmax(1) == wanted.argmax(1)).sum())
    return Agreement(difference, difference / reference.scale, same, len(wanted))
