"""From uint8 pixels to normalised floating-point batches."""

from __future__ import annotations

import torch
from torch import Tensor

from prune_lab.datasets.base import BatchFormat


class Normaliser:
    """Maps uint8 pixels to (pixel / 255 - mean) / std in `fmt.dtype`.

    Scale and shift are stored for every pixel of an image, so that the arithmetic runs over long rows. A broadcast
    over the 3 innermost channels is several times slower.
    """

    def __init__(self, mean: list[float], std: list[float], fmt: BatchFormat, *, image_size: int) -> None:
        self._shape = (image_size, image_size, 3) if fmt.channels_last else (3, image_size, image_size)
        self._channels_last = fmt.channels_last
        self._dtype = fmt.dtype
        spread = (1, 1, 3) if fmt.channels_last else (3, 1, 1)
        mean_, std_ = (torch.tensor(values, dtype=torch.float64).view(spread) for values in (mean, std))
        self._scale = (1 / (255 * std_)).expand(self._shape).reshape(-1).to(fmt.device, fmt.dtype)
        self._shift = (-mean_ / std_).expand(self._shape).reshape(-1).to(fmt.device, fmt.dtype)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return [b, 3, H, W].

        Args:
            pixels: uint8, [b, H, W, 3] with channels_last, otherwise [b, 3, H, W]; trailing dimensions may be
                merged.
        """
        flat = pixels.reshape(len(pixels), -1).to(self._dtype)
        images = torch.addcmul(self._shift, flat, self._scale).view(len(pixels), *self._shape)
        return images.permute(0, 3, 1, 2) if self._channels_last else images
