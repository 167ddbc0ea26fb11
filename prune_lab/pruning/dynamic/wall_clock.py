"""Measured time of networks on the same images, taken in turn so that other work on the machine affects all equally."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from prune_lab.foundations.lazy import no_grad, torch

if TYPE_CHECKING:
    from torch import Tensor

_TIMED = 4
"""maximum number of timed batches"""


@no_grad
def seconds_per_image(forwards: Sequence[Callable[[Tensor], Any]], batches: Iterable[Tensor]) -> list[float]:
    """Return the mean seconds per image of each forward pass over the first few batches.

    The first batch also passes once beforehand, untimed, as a warm-up of memory and kernels.

    Args:
        forwards: each takes images [n, 3, height, width].
        batches: at least one, on the device that computes.
    """
    seconds, num_images = [0.0] * len(forwards), 0
    for index, images in enumerate(islice(batches, _TIMED)):
        num_images += len(images)
        for number, forward in enumerate(forwards):
            if index == 0:
                forward(images)
            _wait(images.device)
            started = time.perf_counter()
            forward(images)
            _wait(images.device)
            seconds[number] += time.perf_counter() - started
    return [value / num_images for value in seconds]


def _wait(device: torch.device) -> None:
    """Wait for queued work to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
