"""Small data sets: all images as one uint8 tensor on the training device, augmented in batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prune_lab.datasets import splits
from prune_lab.datasets.base import BatchFormat, InMemoryConfig, Split
from prune_lab.datasets.normalise import Normaliser
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.seeding import generator


@dataclass(frozen=True)
class ImageArrays:
    """Decoded images: uint8 [N, H, W, 3], labels int64 [N]."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    content_hash: str
    fixed: bool = True
    """whether the options of the data set determine the images"""
    note: str = ""
    """see DatasetInfo"""


def hash_arrays(*arrays: np.ndarray) -> str:
    """Return the sha256 of the shapes, types and values of `arrays`."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


class InMemoryDataset:
    """Batches cut from images that stay on the training device.

    Memory there: uint8 canvases of (H + 2 padding)^2 x 3 bytes per training image, twice that with flips: 480 MB for
    CIFAR. Mirrored copies are stored, because mirroring per batch costs more than cropping.
    """

    def __init__(self, config: InMemoryConfig, arrays: ImageArrays, fmt: BatchFormat) -> None:
        labels = torch.from_numpy(arrays.train_labels.astype(np.int64))
        kept, held_out = splits.hold_out(labels, config.validation, seed=config.validation_seed)
        self.info = config.info(
            num_classes=arrays.num_classes, num_train_images=len(labels), num_test_images=len(arrays.test_labels),
            note=arrays.note,
        )
        self.eval_split: Split = "val" if config.validation > 0 else "test"
        self.fingerprint = fingerprint(config, arrays)
        self.content: str | None = None if arrays.fixed else self.fingerprint
        self._normalise = Normaliser(config.mean, config.std, fmt, image_size=config.image_size)
        self._device = fmt.device
        self._windows = Windows(
            arrays.train_images[kept.numpy()],
            padding=config.crop_padding if config.augment else 0,
            flip=config.flip and config.augment,
            fmt=fmt,
        )
        self.train_labels = labels[kept]
        self._labels = self.train_labels.to(fmt.device)
        self._eval = {"test": self._place(arrays.test_images, arrays.test_labels, fmt)}
        if config.validation > 0:
            chosen = held_out.numpy()
            self._eval["val"] = self._place(arrays.train_images[chosen], arrays.train_labels[chosen], fmt)

    def num_batches(self, batch_size: int) -> int:
        return splits.count_batches(self.info.num_train, batch_size)

    def train_batches(
        self, *, epoch: int, batch_size: int, start: int, seed: int, rank: int, world_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        num_batches = self.num_batches(batch_size)
        shard = splits.batch_shard(batch_size, rank=rank, world_size=world_size)
        order = splits.epoch_order(self.info.num_train, epoch=epoch, seed=seed)
        batches = order[: num_batches * batch_size].view(num_batches, batch_size)[start:]
        # All random numbers are drawn before the first batch: one transfer per epoch and no wait for the device.
        starts = [
            self._windows.draw(batch, generator(seed, "augment", epoch, start + i))[shard]
            for i, batch in enumerate(batches)
        ]
        if not starts:
            return
        starts_on_device = torch.stack(starts).to(self._device)
        labels = self._labels[batches[:, shard].to(self._device)]
        for i in range(len(starts)):
            yield self._normalise(self._windows.cut(starts_on_device[i])), labels[i]

    def train_subset(
        self, batches: Sequence[Tensor], *, augment_seed: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for i, batch in enumerate(batches):
            source = None if augment_seed is None else generator(augment_seed, "subset", i)
            starts = self._windows.middle(batch) if source is None else self._windows.draw(batch, source)
            yield self._normalise(self._windows.cut(starts.to(self._device))), self._labels[batch.to(self._device)]

    def eval_batches(
        self, split: Split, batch_size: int, *, rank: int, world_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if split not in self._eval:
            raise UserError(f"there is no split {split!r} to evaluate on: dataset.validation is 0")
        images, labels = self._eval[split]
        mine = splits.eval_range(len(labels), rank=rank, world_size=world_size)
        for first in range(mine.start, mine.stop, batch_size):
            chosen = slice(first, min(first + batch_size, mine.stop))
            yield self._normalise(images[chosen]), labels[chosen]

    def close(self) -> None:
        """Do nothing: there are no workers, and the memory is freed with the object."""

    @staticmethod
    def _place(images: np.ndarray, labels: np.ndarray, fmt: BatchFormat) -> tuple[Tensor, Tensor]:
        # Image folders are sorted by class; in a shuffled order the first batches represent the whole split.
        order = splits.eval_order(len(labels)).numpy()
        images, labels = images[order], labels[order]
        pixels = torch.from_numpy(np.array(images))
        if not fmt.channels_last:
            pixels = pixels.permute(0, 3, 1, 2).contiguous()
        return pixels.to(fmt.device), torch.from_numpy(labels.astype(np.int64)).to(fmt.device)


class Windows:
    """Random crops as one gather from a view that starts a window at every pixel of the padded images.

    Args:
        images: uint8 [N, S, S, 3].
        padding: black pixels on each side; crops are S x S.
        flip: store a mirrored copy of each image after the N originals.
        fmt: gives the device and whether pixels are stored [H, W, 3] or [3, H, W].
    """

    def __init__(self, images: np.ndarray, *, padding: int, flip: bool, fmt: BatchFormat) -> None:
        self._num_images, size = images.shape[:2]
        self._padding, self._flip = padding, flip
        self._width = width = size + 2 * padding
        pixels = torch.from_numpy(images).to(fmt.device).permute(0, 3, 1, 2)
        memory_format = torch.channels_last if fmt.channels_last else torch.contiguous_format
        shape = ((1 + flip) * self._num_images, 3, width, width)
        canvas = torch.empty(shape, dtype=torch.uint8, device=fmt.device, memory_format=memory_format).zero_()
        inner = slice(padding, padding + size)
        window: tuple[int, ...]
        strides: tuple[int, ...]
        canvas[: self._num_images, :, inner, inner] = pixels
        if flip:
            canvas[self._num_images :, :, inner, inner] = pixels.flip(3)
        if fmt.channels_last:
            window, strides = (size, size * 3), (3, 3 * width, 1)
            self._starts_per_image = width * width
        else:
            window, strides = (3, size, size), (1, width * width, width, 1)
            self._starts_per_image = 3 * width * width
        last = sum((extent - 1) * stride for extent, stride in zip(window, strides[1:], strict=True))
        num_starts = (canvas.numel() - 1 - last) // strides[0] + 1
        self._view = torch.as_strided(canvas, (num_starts, *window), strides)

    def draw(self, indices: Tensor, source: torch.Generator) -> Tensor:
        """Return a random window start (position in the view) for each image of `indices` [b]."""
        row, column = torch.randint(0, 2 * self._padding + 1, (2, len(indices)), generator=source)
        if self._flip:
            indices = indices + self._num_images * torch.randint(0, 2, (len(indices),), generator=source)
        return indices * self._starts_per_image + row * self._width + column

    def middle(self, indices: Tensor) -> Tensor:
        """Return the start of the unmoved, unmirrored window for each image of `indices` [b]."""
        return indices * self._starts_per_image + self._padding * (self._width + 1)

    def cut(self, starts: Tensor) -> Tensor:
        """Return the uint8 windows that begin at `starts` [b], pixels in the stored order."""
        return self._view.index_select(0, starts)


def fingerprint(config: InMemoryConfig, arrays: ImageArrays) -> str:
    """Return a hash of pixels, labels and options."""
    from prune_lab.datasets.base import identity

    text = json.dumps([arrays.content_hash, identity(config)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
