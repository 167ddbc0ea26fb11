"""Data sets too large for memory: worker processes read, crop and resize, the training device normalises."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from prune_lab.datasets import image_crops, splits
from prune_lab.datasets.base import BatchFormat, DatasetInfo, Split
from prune_lab.datasets.folder_listing import Listing
from prune_lab.datasets.image_files import READ_ERRORS
from prune_lab.datasets.normalise import Normaliser
from prune_lab.schema import ConfigError
from prune_lab.seeding import generator

if TYPE_CHECKING:
    from prune_lab.datasets.imagefolder import Config

class StreamDataset:
    """Batches read from image files.

    The random crop of an image is drawn from (seed, epoch, image), so it depends neither on the number of
    workers nor on the rank or batch that the image falls to.
    """

    def __init__(self, config: Config, info: DatasetInfo, train: Listing, test: Listing, fmt: BatchFormat) -> None:
        kept, held_out = splits.hold_out(
            torch.from_numpy(train.labels), config.validation, seed=config.validation_seed
        )
        self.info = info
        self.eval_split: Split = "val" if config.validation > 0 else "test"
        self.fingerprint = _fingerprint(config, train, test)
        self._config, self._fmt, self._train = config, fmt, train
        self._kept = kept
        self.train_labels = torch.from_numpy(train.labels)[kept]
        self._eval = {"test": (test, splits.eval_order(len(test.labels)))}
        if config.validation > 0:
            self._eval["val"] = (train, held_out[splits.eval_order(len(held_out))])
        self._normalise = Normaliser(config.mean, config.std, fmt, image_size=config.image_size)

    def num_batches(self, batch_size: int) -> int:
        return splits.count_batches(self.info.num_train, batch_size)

    def train_batches(
        self, *, epoch: int, batch_size: int, start: int, seed: int, rank: int, world_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        num_batches = self.num_batches(batch_size)
        shard = splits.batch_shard(batch_size, rank=rank, world_size=world_size)
        order = self._kept[splits.epoch_order(self.info.num_train, epoch=epoch, seed=seed)]
        batches = order[: num_batches * batch_size].view(num_batches, batch_size)[start:, shard]
        draw = (seed, epoch) if self._config.augment else None
        yield from self._read(_Reader(self._config, self._train, draw), list(batches))

    def train_subset(
        self, batches: Sequence[Tensor], *, augment_seed: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        draw = None if augment_seed is None else (augment_seed, 0)
        yield from self._read(_Reader(self._config, self._train, draw), [self._kept[batch] for batch in batches])

    def eval_batches(
        self, split: Split, batch_size: int, *, rank: int, world_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if split not in self._eval:
            raise ConfigError(f"there is no split {split!r} to evaluate on: dataset.validation is 0")
        listing, indices = self._eval[split]
        mine = splits.eval_range(len(indices), rank=rank, world_size=world_size)
        batches = indices[mine.start : mine.stop].split(batch_size) if mine else []
        yield from self._read(_Reader(self._config, listing, None), list(batches))

    def close(self) -> None:
        """Nothing to release: workers end with the iteration they serve."""

    def _read(self, reader: _Reader, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        if not batches:
            return
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        loader = torch.utils.data.DataLoader(
            reader,
            # NumPy, because tensors would travel to the workers through shared-memory files.
            batch_sampler=[batch.numpy() for batch in batches],
            collate_fn=_pass_through,
            num_workers=min(self._config.workers, len(batches), num_cores),
            pin_memory=self._fmt.device.type == "cuda",
        )
        for pixels, labels, broken in loader:
            if broken:
                raise ConfigError(broken)
            pixels = pixels.to(self._fmt.device, non_blocking=True)
            if not self._fmt.channels_last:
                pixels = pixels.permute(0, 3, 1, 2)
            yield self._normalise(pixels), labels.to(self._fmt.device, non_blocking=True)


class _Reader(torch.utils.data.Dataset):
    """Reads whole batches: indices [b] -> uint8 [b, S, S, 3], labels int64 [b], message ("" if all went well).

    Args:
        draw: (seed, epoch) of the random crops; None cuts the centre.
    """

    def __init__(self, config: Config, listing: Listing, draw: tuple[int, int] | None) -> None:
        self._config, self._listing, self._draw = config, listing, draw

    def __getitems__(self, indices: np.ndarray) -> tuple[Tensor, Tensor, str]:
        size = self._config.image_size
        pixels = np.empty((len(indices), size, size, 3), dtype=np.uint8)
        labels = torch.from_numpy(self._listing.labels[indices])
        for row, index in zip(pixels, indices.tolist(), strict=True):
            path = self._listing.folder / os.fsdecode(self._listing.paths[index])
            try:
                row[:] = self._cut(path, index)
            except READ_ERRORS as error:
                # A worker's exception would reach the user as a traceback of several lines.
                return torch.empty(0), labels, f"{path} is not a readable image: {' '.join(str(error).split())}"
        return torch.from_numpy(pixels), labels, ""

    def _cut(self, path: os.PathLike, index: int) -> np.ndarray:
        image, size = image_crops.read_rgb(path), self._config.image_size
        if self._draw is None:
            return image_crops.cut_centre(image, size, ratio=self._config.crop_ratio)
        seed, epoch = self._draw
        source = generator(seed, "augment", epoch, index)
        return image_crops.cut_random(
            image, size, min_scale=self._config.min_scale, flip=self._config.flip, source=source
        )


def _pass_through(batch: tuple[Tensor, Tensor, str]) -> tuple[Tensor, Tensor, str]:
    return batch


def _fingerprint(config: Config, *listings: Listing) -> str:
    """Return a hash of names and sizes: reading a large data set only to hash it would take hours."""
    from prune_lab.datasets import identity

    digest = hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode())
    for listing in listings:
        for path, size in zip(listing.paths, listing.sizes, strict=True):
            digest.update(b"%s\0%d\n" % (path, size))
        digest.update(b"\n")
    return digest.hexdigest()
