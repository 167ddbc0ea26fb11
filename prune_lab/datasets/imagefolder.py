"""Image folders read during training: ImageNet, Tiny ImageNet and any train/CLASS/*, val/CLASS/*."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prune_lab.datasets.base import BatchFormat, Dataset, DatasetInfo
from prune_lab.datasets.options import Config
from prune_lab.foundations.errors import UserError

if TYPE_CHECKING:
    from prune_lab.datasets.folder_listing import Listing


def describe(config: Config) -> DatasetInfo:
    """Return the sizes from the options if they state all three, otherwise from the folders.

    Raises:
        UserError: the options leave a size open and the folders are not there.
    """
    from prune_lab.datasets import folder_listing

    num_classes, num_train, num_test = config.num_classes, config.expect_train, config.expect_test
    if num_classes is not None and num_train is not None and num_test is not None:
        if config.check_counts or not (Path(config.root) / "train").is_dir():
            return _info(config, num_classes, num_train, num_test)
    try:
        train, test = folder_listing.list_splits(config)
    except UserError as error:
        raise UserError(
            f"{error}; without the images state dataset.num_classes, dataset.expect_train and dataset.expect_test"
        ) from error
    return _listed(config, train, test)


def load(config: Config, fmt: BatchFormat) -> Dataset:
    """Return the data set: the files are listed now and read batch by batch.

    Raises:
        UserError: folders missing or not laid out as expected, or counts that differ from the options.
    """
    from prune_lab.datasets.folder_listing import list_splits
    from prune_lab.datasets.stream import StreamDataset

    train, test = list_splits(config)
    return StreamDataset(config, _listed(config, train, test), train, test, fmt)


def content(config: Config) -> str:
    """Return the data set's `content`, from the names and sizes of the files.

    Raises:
        UserError: as `load`.
    """
    from prune_lab.datasets.folder_listing import list_splits
    from prune_lab.datasets.stream import fingerprint

    return fingerprint(config, *list_splits(config))


def _listed(config: Config, train: Listing, test: Listing) -> DatasetInfo:
    from prune_lab.datasets.folder_listing import note

    sizes = len(train.classes), len(train.labels), len(test.labels)
    return _info(config, *sizes, note=note(train, test))


def _info(config: Config, num_classes: int, num_train: int, num_test: int, note: str = "") -> DatasetInfo:
    return config.info(num_classes=num_classes, num_train_images=num_train, num_test_images=num_test, note=note)
