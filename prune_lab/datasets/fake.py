"""Random images and labels of any size, for dry runs and speed measurements. Nothing can be learned from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prune_lab.datasets.base import BatchFormat, Dataset, DatasetInfo, InMemoryConfig
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import Count, Index

if TYPE_CHECKING:
    import numpy as np

    from prune_lab.datasets.in_memory import ImageArrays


@dataclass(frozen=True)
class Config(InMemoryConfig):
    """Options of conf/dataset/fake.yaml."""

    num_classes: Count
    num_train: Count
    num_test: Count
    content_seed: Index
    """Draws the images and labels; independent of the run's seed."""


def describe(config: Config) -> DatasetInfo:
    """Return the sizes that the options state."""
    return config.info(
        num_classes=config.num_classes, num_train_images=config.num_train, num_test_images=config.num_test
    )


def content(_config: Config) -> None:
    """Return None: the options fix the images."""


def load(config: Config, fmt: BatchFormat) -> Dataset:
    """Return the data set."""
    from prune_lab.datasets.in_memory import InMemoryDataset

    return InMemoryDataset(config, read(config), fmt)


def read(config: Config) -> ImageArrays:
    """Return random images; image i has label i mod num_classes, so that class sizes are equal."""
    from prune_lab.datasets.in_memory import ImageArrays, hash_arrays

    train, test = _drawn(config, "train", config.num_train), _drawn(config, "test", config.num_test)
    parts = (*train, *test)
    return ImageArrays(*parts, config.num_classes, hash_arrays(*parts))


def _drawn(config: Config, split: str, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images and labels."""
    from prune_lab.foundations.seeding import generator

    shape = (num_images, config.image_size, config.image_size, 3)
    source = generator(config.content_seed, "fake", split)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=source)
    return images.numpy(), (torch.arange(num_images) % config.num_classes).numpy()
