"""One image file to one uint8 crop: random for training, central for evaluation."""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from PIL import Image

ASPECT_RATIOS = (3 / 4, 4 / 3)
NUM_TRIES = 10


def read_rgb(path: str | os.PathLike) -> Image.Image:
    """Return the image as RGB, whatever its mode (grey, palette, CMYK, with alpha).

    Raises:
        one of image_files.READ_ERRORS: the file is missing or no readable image.
    """
    with Image.open(path) as image:
        return image.convert("RGB")


def cut_centre(image: Image.Image, size: int, *, ratio: float) -> np.ndarray:
    """Return uint8 [size, size, 3]: shorter side resized to size / ratio, then the central square.

    With ratio 0.875 and size 224 the shorter side becomes 256 pixels, as in most published evaluations.
    """
    shorter = round(size / ratio)
    factor = shorter / min(image.size)
    width, height = (max(size, round(side * factor)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def cut_random(
    image: Image.Image, size: int, *, min_scale: float, flip: bool, source: torch.Generator
) -> np.ndarray:
    """Return uint8 [size, size, 3]: a random box resized to a square and, with `flip`, mirrored half the time."""
    draws = torch.rand(4 * NUM_TRIES + 1, generator=source, dtype=torch.float64).tolist()
    left, top, width, height = random_box(*image.size, min_scale=min_scale, draws=draws[1:])
    box = (left, top, left + width, top + height)
    crop = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if flip and draws[0] < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(crop)


def random_box(width: int, height: int, *, min_scale: float, draws: list[float]) -> tuple[int, int, int, int]:
    """Return (left, top, width, height) of a random part of a width x height image.

    Area uniform in [min_scale, 1] of the image, aspect ratio log-uniform in [3/4, 4/3], position uniform;
    boxes that do not fit are drawn again, at last the largest central box of allowed ratio is taken.

    Args:
        draws: 4 uniform numbers in [0, 1) per try.

    Source: Szegedy et al. 2015, section 6, arXiv 1409.4842; same rule as torchvision's RandomResizedCrop.
    """
    low, high = (math.log(ratio) for ratio in ASPECT_RATIOS)
    for i in range(0, len(draws), 4):
        area = width * height * (min_scale + (1 - min_scale) * draws[i])
        ratio = math.exp(low + (high - low) * draws[i + 1])
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left, top = int(draws[i + 2] * (width - box_width + 1)), int(draws[i + 3] * (height - box_height + 1))
            return left, top, box_width, box_height
    box_width = min(width, round(height * ASPECT_RATIOS[1]))
    box_height = min(height, round(width / ASPECT_RATIOS[0]))
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height
