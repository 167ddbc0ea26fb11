"""Random images and labels of any size, for dry runs and speed measurements. There is nothing to learn."""

from __future__ import annotations

from dataclasses import dataclass

from prune_lab.datasets.base import BatchFormat, DatasetInfo, InMemoryConfig
from prune_lab.foundations.lazy import torch
from prune_lab.foundations.schema import Count, Index


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


def load(config: Config, fmt: BatchFormat):
    """Return the data set."""
    from prune_lab.datasets.in_memory import InMemoryDataset

    return InMemoryDataset(config, read(config), fmt)


def read(config: Config):
    """Return random ImageArrays; image i has label i mod num_classes, so that classes have equal size."""
    from prune_lab.datasets.in_memory import ImageArrays, hash_arrays
    from prune_lab.foundations.seeding import generator

    parts = []
    for split, num_images in (("train", config.num_train), ("test", config.num_test)):
        shape = (num_images, config.image_size, config.image_size, 3)
        source = generator(config.content_seed, "fake", split)
        parts.append(torch.randint(0, 256, shape, dtype=torch.uint8, generator=source).numpy())
        parts.append((torch.arange(num_images) % config.num_classes).numpy())
    return ImageArrays(*parts, config.num_classes, hash_arrays(*parts))
