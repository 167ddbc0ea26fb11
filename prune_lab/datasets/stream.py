"""Data sets too large for memory: worker processes read, crop and resize; the training device normalises."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from prune_lab.datasets import image_crops, splits
from prune_lab.datasets.base import BatchFormat, DatasetInfo, Split
from prune_lab.datasets.folder_listing import Listing
from prune_lab.datasets.image_reading import UnreadableImage, unreadable
from prune_lab.datasets.normalise import Normaliser
from prune_lab.datasets.prefetch import on_device
from prune_lab.datasets.resized_images import ResizedImages, open_resized
from prune_lab.datasets.worker_pool import WorkerPool
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.seeding import generator

if TYPE_CHECKING:
    from prune_lab.datasets.options import Config


PIECE = 64
"""Images per request to a worker. Workers share a large batch, so that the first one of an epoch arrives sooner and
less memory is in flight."""


@dataclass(frozen=True)
class Request:
    """A batch, or part of one, for a worker to prepare."""

    split: str
    """train or test"""
    indices: np.ndarray
    """int64 [b] into the split's listing. NumPy, because tensors would be passed through shared-memory files."""
    draw: tuple[int, int] | None
    """(seed, epoch) of the random crops; None: central crops"""


class StreamDataset:
    """Batches read from image files, or from resized copies (`dataset.cached_side`).

    The random crop of an image is drawn from (seed, epoch, image). It depends neither on the number of
    workers nor on rank or batch.
    """

    def __init__(self, config: Config, info: DatasetInfo, train: Listing, test: Listing, fmt: BatchFormat) -> None:
        kept, held_out = splits.hold_out(
            torch.from_numpy(train.labels), config.validation, seed=config.validation_seed
        )
        self.info = info
        self.eval_split: Split = "val" if config.validation > 0 else "test"
        self.fingerprint = fingerprint(config, train, test)
        self.content: str | None = self.fingerprint
        self._config, self._fmt = config, fmt
        self._kept = kept
        self.train_labels = torch.from_numpy(train.labels)[kept]
        self._eval = {"test": ("test", splits.eval_order(len(test.labels)))}
        if config.validation > 0:
            self._eval["val"] = ("train", held_out[splits.eval_order(len(held_out))])
        self._normalise = Normaliser(config.mean, config.std, fmt, image_size=config.image_size)
        reader = _Reader(config, {"train": train, "test": test})
        self._pool = WorkerPool(reader, workers=config.workers, pin_memory=fmt.device.type == "cuda")

    def num_batches(self, batch_size: int) -> int:
        return splits.count_batches(self.info.num_train, batch_size)

    def train_batches(
        self, *, epoch: int, batch_size: int, start: int, seed: int, rank: int, world_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        num_batches = self.num_batches(batch_size)
        shard = splits.batch_shard(batch_size, rank=rank, world_size=world_size)
        order = self._kept[splits.epoch_order(self.info.num_train, epoch=epoch, seed=seed)]
        batches = order[: num_batches * batch_size].view(num_batches, batch_size)[start:, shard]
        yield from self._read("train", batches, (seed, epoch) if self._config.augment else None)

    def train_subset(
        self, batches: Sequence[Tensor], *, augment_seed: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        draw = None if augment_seed is None else (augment_seed, 0)
        yield from self._read("train", [self._kept[batch] for batch in batches], draw)

    def eval_batches(
        self, split: Split, batch_size: int, *, rank: int, world_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if split not in self._eval:
            raise UserError(f"there is no split {split!r} to evaluate on: dataset.validation is 0")
        source, indices = self._eval[split]
        mine = splits.eval_range(len(indices), rank=rank, world_size=world_size)
        batches = indices[mine.start : mine.stop].split(batch_size) if mine else []
        yield from self._read(source, batches, None)

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    def _read(
        self, split: str, batches: Iterable[Tensor], draw: tuple[int, int] | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        pieces = [batch.split(PIECE) for batch in batches]
        requests = [Request(split, piece.numpy(), draw) for batch in pieces for piece in batch]
        with closing(self._pool.map(requests)) as answers:
            whole = (tuple(tensor for _ in batch for tensor in _checked(next(answers))) for batch in pieces)
            for tensors in on_device(whole, self._fmt.device):
                pixels, labels = _joined(tensors[::2]), _joined(tensors[1::2])
                if not self._fmt.channels_last:
                    pixels = pixels.permute(0, 3, 1, 2)
                yield self._normalise(pixels), labels


class _Reader:
    """Makes batches: uint8 [b, S, S, 3], labels int64 [b], error message ("" if there is none)."""

    def __init__(self, config: Config, listings: dict[str, Listing]) -> None:
        self._config, self._listings = config, listings
        self._resized: dict[str, ResizedImages] = {}
        if config.cached_side is not None:
            for split, listing in listings.items():
                self._resized[split] = open_resized(
                    listing,
                    side=config.cached_side,
                    cache_dir=Path(config.cache_dir),
                    name=f"{config.name}-{split}",
                    workers=config.workers,
                )
        else:
            for listing in listings.values():
                _require_readable(listing)

    def __call__(self, request: Request) -> tuple[Tensor, Tensor, str]:
        size, listing = self._config.image_size, self._listings[request.split]
        pixels = np.empty((len(request.indices), size, size, 3), dtype=np.uint8)
        labels = torch.from_numpy(listing.labels[request.indices])
        for row, index in zip(pixels, request.indices.tolist(), strict=True):
            try:
                row[:] = self._cut(self._decoded(request.split, index), index, request.draw)
            except UnreadableImage as error:
                # A worker's exception would reach the user as a traceback of several lines.
                return torch.empty(0), labels, unreadable(listing.path(index), error)
        return torch.from_numpy(pixels), labels, ""

    def _decoded(self, split: str, index: int) -> image_crops.Decoded:
        if split in self._resized:
            return self._resized[split][index]
        return image_crops.read_rgb(self._listings[split].path(index))

    def _cut(self, image: image_crops.Decoded, index: int, draw: tuple[int, int] | None) -> np.ndarray:
        config = self._config
        if draw is None:
            return image_crops.cut_centre(image, config.image_size, ratio=config.crop_ratio)
        seed, epoch = draw
        source = generator(seed, "augment", epoch, index)
        return image_crops.cut_random(
            image, config.image_size, min_scale=config.min_scale, flip=config.flip, source=source
        )


def _require_readable(listing: Listing) -> None:
    """Raise UserError if the header of a class's first image shows that it cannot be read.

    Most folders hold one kind of image: this reports floating-point images before training, not in its first batch.
    """
    for index in np.unique(listing.labels, return_index=True)[1].tolist():
        try:
            with image_crops.opened(listing.path(index)) as image:
                image_crops.surplus_bits(image)
        except UnreadableImage as error:
            raise UserError(unreadable(listing.path(index), error)) from error


def _checked(answer: tuple[Tensor, Tensor, str]) -> tuple[Tensor, Tensor]:
    """Return pixels and labels of a worker's answer."""
    pixels, labels, broken = answer
    if broken:
        raise UserError(broken)
    return pixels, labels


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def fingerprint(config: Config, *listings: Listing) -> str:
    """Return a hash of options, names and sizes: reading a large data set only to hash it would take hours."""
    from prune_lab.datasets.base import identity

    digest = hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode())
    for listing in listings:
        for path, size in zip(listing.paths, listing.sizes, strict=True):
            digest.update(b"%s\0%d\n" % (path, size))
        digest.update(b"\n")
    return digest.hexdigest()
