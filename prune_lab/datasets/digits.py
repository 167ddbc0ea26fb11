"""The 1,797 real handwritten digits that come with scikit-learn (8x8, upscaled), split 80/20 for testing."""

from __future__ import annotations

from dataclasses import dataclass

from prune_lab.datasets.base import BatchFormat, Dataset, DatasetInfo, InMemoryConfig
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import torch

NUM_IMAGES = 1797
NUM_CLASSES = 10
SOURCE_SIZE = 8
TEST_FRACTION = 0.2
# A constant of the data set, as if its authors had published the split, so that results stay comparable.
SPLIT_SEED = 0


@dataclass(frozen=True)
class Config(InMemoryConfig):
    """Options of conf/dataset/digits.yaml."""

    def check(self, path: str) -> None:
        super().check(path)
        if self.image_size % SOURCE_SIZE:
            raise UserError(f"{path}.image_size must be a multiple of {SOURCE_SIZE}, got {self.image_size}")


def describe(config: Config) -> DatasetInfo:
    """Return the sizes; they are known without loading the images."""
    num_test = round(TEST_FRACTION * NUM_IMAGES)
    return config.info(num_classes=NUM_CLASSES, num_train_images=NUM_IMAGES - num_test, num_test_images=num_test)


def content(_config: Config) -> None:
    """Return None: the options fix the images."""


def load(config: Config, fmt: BatchFormat) -> Dataset:
    """Return the digits as an in-memory data set.

    Raises:
        UserError: scikit-learn is not installed.
    """
    import numpy as np

    from prune_lab.datasets.in_memory import ImageArrays, InMemoryDataset, hash_arrays
    from prune_lab.datasets.splits import hold_out

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("dataset=digits needs scikit-learn: pip install scikit-learn") from error
    source = load_digits()
    # 17 grey levels 0..16; 255 / 16 uses the whole uint8 range.
    grey = np.round(source.images * (255 / 16)).astype(np.uint8)
    factor = config.image_size // SOURCE_SIZE
    images = np.repeat(grey.repeat(factor, 1).repeat(factor, 2)[..., None], 3, axis=3)
    labels = source.target.astype(np.int64)
    train, test = (part.numpy() for part in hold_out(torch.from_numpy(labels), TEST_FRACTION, seed=SPLIT_SEED))
    parts = (images[train], labels[train], images[test], labels[test])
    return InMemoryDataset(config, ImageArrays(*parts, NUM_CLASSES, hash_arrays(*parts)), fmt)
