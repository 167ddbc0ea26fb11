"""From a decoded image to a uint8 crop: random for training, central for evaluation."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from prune_lab.datasets.image_reading import UnreadableImage, reason

ASPECT_RATIOS = (3 / 4, 4 / 3)
NUM_TRIES = 10

Decoded = Image.Image | np.ndarray
"""An image as Pillow decoded it, or its pixels as uint8 [H, W, 3]."""


@contextlib.contextmanager
def opened(file: str | os.PathLike[str] | IO[bytes]) -> Iterator[Image.Image]:
    """Open an image; Pillow reads only its header.

    Raises:
        UnreadableImage: replaces any error of Pillow, here or where the caller decodes the pixels. On broken files
            its readers raise many types: OSError and SyntaxError, but also RuntimeError (AVIF), TypeError,
            zlib.error, IndexError.
    """
    try:
        with Image.open(file) as image:
            yield image
    except Exception as error:
        raise UnreadableImage(reason(error)) from error


def read_rgb(file: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """Return the first frame of an image of any mode as 8-bit RGB.

    Grey, palette and 1-bit images keep their appearance, CMYK is converted, transparency is ignored. Of 16-bit values
    the upper 8 bits are kept, as Pillow does for 16-bit colours.

    Raises:
        UnreadableImage: missing, broken, or with integers of more than 16 bits or floating-point numbers: files do not
            state their range.
    """
    with opened(file) as image:
        shift = surplus_bits(image)
        if shift is None:
            return image.convert("RGB")
        pixels = (np.asarray(image) >> shift).astype(np.uint8)
        # Tag 262, 0: white is zero. Pillow applies it only to images of at most 8 bits.
        is_negative = _tiff_tags(image).get(262) == 0
        return Image.fromarray(~pixels if is_negative else pixels).convert("RGB")


def surplus_bits(image: Image.Image) -> int | None:
    """Return how many low bits a grey image has beyond 8; None: Pillow converts its mode by itself.

    Raises:
        ValueError: the values of its mode have an unknown range.
    """
    if image.mode.startswith("I;16") and image.format not in ("FITS", "MCIDAS"):
        return _tiff_tags(image).get(258, (16,))[0] - 8  # tag 258: bits per sample
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits, which Pillow returns in 32
        return 8
    if image.mode[0] in "IF":
        raise ValueError(f"its pixels (mode {image.mode}) have no stated range; save it with 8 or 16 bits per pixel")
    return None


def _tiff_tags(image: Image.Image) -> Mapping[int, Any]:
    """Return the tags of a TIFF file; empty for any other format."""
    return image.tag_v2 if isinstance(image, TiffImageFile) and image.format == "TIFF" else {}


def shape_with_shorter_side(width: int, height: int, shorter: int) -> tuple[int, int]:
    """Return (width, height) of the image once its shorter side is resized to `shorter` pixels."""
    factor = shorter / min(width, height)
    return max(shorter, round(width * factor)), max(shorter, round(height * factor))


def side_for_centre(size: int, ratio: float) -> int:
    """Return the shorter side that an image is resized to before its central square of `size` pixels is cut."""
    return round(size / ratio)


def cut_centre(image: Decoded, size: int, *, ratio: float) -> np.ndarray:
    """Return uint8 [size, size, 3]: shorter side resized to size / ratio, then the central square.

    With ratio 0.875 and size 224 the shorter side becomes 256 pixels, as in most published evaluations.
    """
    width, height = shape_with_shorter_side(*_size(image), side_for_centre(size, ratio))
    resized = resize(image, width, height)
    left, top = (width - size) // 2, (height - size) // 2
    return resized[top : top + size, left : left + size]


def cut_random(image: Decoded, size: int, *, min_scale: float, flip: bool, source: torch.Generator) -> np.ndarray:
    """Return uint8 [size, size, 3]: a random box resized to a square and, with `flip`, mirrored half the time."""
    draws = torch.rand(4 * NUM_TRIES + 1, generator=source, dtype=torch.float64).tolist()
    left, top, width, height = random_box(*_size(image), min_scale=min_scale, draws=draws[1:])
    crop = resize(image, size, size, box=(left, top, left + width, top + height))
    return crop[:, ::-1] if flip and draws[0] < 0.5 else crop


def _size(image: Decoded) -> tuple[int, int]:
    return image.size if isinstance(image, Image.Image) else image.shape[1::-1]


def resize(image: Decoded, width: int, height: int, *, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """Return uint8 [height, width, 3] of the part (left, top, right, bottom), bilinear and antialiased.

    Arrays take torch's kernel, which is several times as fast as Pillow's and differs by at most one level in 255
    inside the image. At the edge of a box Pillow also reads the pixels beyond it.
    """
    if isinstance(image, Image.Image):
        return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=box))
    left, top, right, bottom = box or (0, 0, *_size(image))
    if (right - left, bottom - top) == (width, height):
        return image[top:bottom, left:right]
    # A copy, because torch warns about read-only memory. The axes are moved after the batch axis is added: only then
    # does the kernel see channels_last, in which it is fastest.
    part = torch.from_numpy(np.array(image[top:bottom, left:right]))[None].permute(0, 3, 1, 2)
    return F.interpolate(part, (height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def random_box(width: int, height: int, *, min_scale: float, draws: list[float]) -> tuple[int, int, int, int]:
    """Return (left, top, width, height) of a random part of a width x height image.

    Area uniform in [min_scale, 1] of the image, aspect ratio log-uniform in [3/4, 4/3], position uniform. Boxes
    that do not fit are drawn again; after the last try the largest central box of allowed ratio is taken.

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
