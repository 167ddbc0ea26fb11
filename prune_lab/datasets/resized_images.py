"""Images of a folder, resized once: uint8 pixels in one memory-mapped file, with an index beside it."""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import shutil
import sys
import zlib
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prune_lab.datasets import cache
from prune_lab.datasets.folder_listing import Listing
from prune_lab.datasets.image_crops import opened, read_rgb, resize, shape_with_shorter_side
from prune_lab.datasets.image_reading import UnreadableImage, unreadable
from prune_lab.datasets.worker_pool import WorkerPool
from prune_lab.foundations.errors import UserError

log = logging.getLogger(__name__)

# Part of every entry's name: raise it when resizing or file format changes.
_FORMAT = 2
_PIXELS, _INDEX, _META = "pixels.bin", "index.npy", "meta.json"
_REQUEST = 64
"""images per request to a worker"""
_NUM_CHECKED = 64
"""images, spread over the file, whose pixels are compared with their checksums on opening"""

OFFSET, HEIGHT, WIDTH, CHECKSUM = range(4)
"""columns of the index"""


class ResizedImages:
    """Images of one split; open in any number of processes at once.

    Args:
        index: int64 [N, 4], see the columns above.
    """

    def __init__(self, folder: Path, index: np.ndarray) -> None:
        self._path, self._index = folder / _PIXELS, index
        self._pixels: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_pixels": None}  # a process maps the file itself

    def __getitem__(self, i: int) -> np.ndarray:
        """Return image `i` of the listing, uint8 [height, width, 3], read-only."""
        if self._pixels is None:
            with open(self._path, "rb") as file:
                self._pixels = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
        offset, height, width, _ = self._index[i].tolist()
        return self._pixels[offset : offset + 3 * height * width].reshape(height, width, 3)

    def fault(self) -> str | None:
        """Return the fault of the files, in their size or in the pixels of a few images; None: none was found."""
        offset, height, width, _ = self._index[-1].tolist()
        expected, found = offset + 3 * height * width, self._path.stat().st_size
        if found != expected:
            return f"{_PIXELS} has {found} bytes instead of {expected}"
        for i in np.linspace(0, len(self._index) - 1, min(_NUM_CHECKED, len(self._index))).astype(int):
            if zlib.crc32(self[i].data) != self._index[i, CHECKSUM]:
                return f"the pixels of image {i} do not match their checksum"
        return None


def open_resized(listing: Listing, *, side: int, cache_dir: Path, name: str, workers: int) -> ResizedImages:
    """Return the images of `listing`, which are decoded only if `cache_dir` has no intact copy.

    Args:
        side: pixels of the shorter side after resizing; smaller images are kept as they are.
        name: readable beginning of the entry's folder name; the rest follows from names, sizes and times of the files.
        workers: processes that decode. Other processes that need the same entry wait for the first one.

    Raises:
        UserError: an image cannot be read, the disk is too small, or `cache_dir` cannot be written.
    """
    entry = cache_dir / f"{name}-{side}px-{_key(listing, side)}"
    with cache.locked(entry):
        images = _read(entry)
        if images is None:
            _write(entry, listing, side, workers)
            images = _read(entry)
    if images is None:
        raise UserError(f"dataset.cache_dir={cache_dir}: {entry.name} differs from what was just written")
    return images


def _key(listing: Listing, side: int) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {side}".encode())
    for array in (listing.paths, listing.sizes, listing.modified):
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def _read(entry: Path) -> ResizedImages | None:
    """Return the entry, or None after a note if it is missing or damaged."""
    if not entry.exists():
        return None
    try:
        index = np.load(entry / _INDEX, allow_pickle=False)
        if hashlib.sha256(index.data).hexdigest() != json.loads((entry / _META).read_text())["index_sha256"]:
            raise ValueError(f"{_INDEX} does not match its checksum")
        images = ResizedImages(entry, index)
        fault = images.fault()
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        fault = str(error)
    if fault:
        log.warning("the resized images in %s are damaged (%s); resizing again", entry, fault)
        return None
    return images


def _write(entry: Path, listing: Listing, side: int, workers: int) -> None:
    with cache.replaced(entry) as folder:
        everything = np.arange(len(listing.labels))
        requests = np.array_split(everything, -(-len(everything) // _REQUEST))
        index = np.zeros((len(everything), 4), dtype=np.int64)
        index[:, [HEIGHT, WIDTH]] = _collect(partial(_shapes, listing, side), requests, workers)
        ends = np.cumsum(3 * index[:, HEIGHT] * index[:, WIDTH])
        index[1:, OFFSET] = ends[:-1]
        _reserve(folder / _PIXELS, int(ends[-1]), side, len(listing.labels))
        index[:, CHECKSUM] = _collect(partial(_store, listing, index, folder / _PIXELS), requests, workers)
        with open(folder / _PIXELS, "rb+") as file:
            os.fsync(file.fileno())  # the workers' data reach the disk before the entry gets its name
        np.save(folder / _INDEX, index)
        meta: dict[str, Any] = {"format": _FORMAT, "side": side, "images": len(index), "bytes": int(ends[-1])}
        meta["index_sha256"] = hashlib.sha256(index.data).hexdigest()
        (folder / _META).write_text(json.dumps(meta, indent=1))


def _reserve(path: Path, size: int, side: int, num_images: int) -> None:
    """Create the file, after reporting its size.

    Raises:
        UserError: the disk has too little free space.
    """
    entry = path.parent.with_suffix("")
    free = shutil.disk_usage(path.parent).free
    what = f"{num_images} images at dataset.cached_side={side} take {size / 1e9:.2f} GB"
    if size > free:
        raise UserError(f"{what}, but dataset.cache_dir={entry.parent} has {free / 1e9:.2f} GB left")
    print(f"{what} ({free / 1e9:.2f} GB are free): resizing them once into {entry}", file=sys.stderr, flush=True)
    with open(path, "wb") as file:
        file.truncate(size)


def _collect(answer: partial, requests: list[np.ndarray], workers: int) -> np.ndarray:
    """Return the rows of all answers, computed by processes that end with this call."""
    rows = []
    with closing(WorkerPool(answer, workers=workers)) as pool:
        for found in pool.map(requests):
            if isinstance(found, str):
                raise UserError(found)
            rows.append(found)
    return np.concatenate(rows)


def _shapes(listing: Listing, side: int, indices: np.ndarray) -> np.ndarray | str:
    """Return height and width of images after resizing, from the files' headers, or a message on a broken file."""
    shapes = np.empty((len(indices), 2), dtype=np.int64)
    for row, index in zip(shapes, indices.tolist(), strict=True):
        try:
            with opened(listing.path(index)) as image:
                width, height = image.size
        except UnreadableImage as error:
            return unreadable(listing.path(index), error)
        if min(width, height) > side:
            width, height = shape_with_shorter_side(width, height, side)
        row[:] = height, width
    return shapes


def _store(listing: Listing, index: np.ndarray, path: Path, indices: np.ndarray) -> np.ndarray | str:
    """Write the pixels of images to their offsets and return their checksums, or a message on the failure."""
    checksums = np.empty(len(indices), dtype=np.int64)
    try:
        with open(path, "rb+") as file:
            for row, i in enumerate(indices.tolist()):
                offset, height, width, _ = index[i].tolist()
                try:
                    pixels = np.ascontiguousarray(resize(read_rgb(listing.path(i)), width, height))
                except UnreadableImage as error:
                    return unreadable(listing.path(i), error)
                checksums[row] = zlib.crc32(pixels.data)
                file.seek(offset)
                file.write(pixels.data)
    except OSError as error:
        return f"dataset.cache_dir: {path} cannot be written: {error.strerror}"
    return checksums
