"""Image folders that are read during training: ImageNet, Tiny ImageNet and any train/CLASS/*, val/CLASS/*."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from prune_lab.datasets.base import BatchFormat, CommonConfig, DatasetInfo
from prune_lab.schema import ConfigError, Count, FilePath, Index, Range

if TYPE_CHECKING:
    from prune_lab.datasets.folder_listing import Listing


@dataclass(frozen=True)
class Config(CommonConfig):
    """Options of conf/dataset/imagefolder.yaml, imagenet.yaml and tiny_imagenet.yaml."""

    root: FilePath
    test_folder: str | None
    """null: test where there is one, otherwise val."""
    num_classes: Count | None
    """null: as many as there are folders."""
    expect_train: Count | None
    expect_test: Count | None
    check_counts: bool
    min_scale: Annotated[float, Range(0, 1, open_low=True)]
    """Least area of a random crop, as a fraction of the image."""
    flip: bool
    crop_ratio: Annotated[float, Range(0, 1, open_low=True)]
    """Evaluation: side of the central crop over the shorter side of the resized image."""
    workers: Index
    """Processes that decode, at most one per core; 0: in the training process."""
    cached_side: Count | None
    """Shorter side of the resized copies that batches are cut from; null: from the files themselves."""
    cache_dir: FilePath
    """Where these copies are kept."""

    def check(self, path: str) -> None:
        super().check(path)
        least = round(self.image_size / self.crop_ratio)
        if self.cached_side is not None and self.cached_side < least:
            raise ConfigError(
                f"{path}.cached_side must be null or at least {least} (image_size / crop_ratio, the side that "
                f"evaluation resizes to), got {self.cached_side}"
            )


def describe(config: Config) -> DatasetInfo:
    """Return the sizes from the options if they state all three, otherwise from the folders.

    Raises:
        ConfigError: the options leave a size open and the folders are not there.
    """
    from prune_lab.datasets import folder_listing

    stated = (config.num_classes, config.expect_train, config.expect_test)
    is_stated = None not in stated
    if is_stated and (config.check_counts or not (Path(config.root) / "train").is_dir()):
        return _info(config, *stated)
    try:
        train, test = folder_listing.list_splits(config)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; without the images state dataset.num_classes, dataset.expect_train and dataset.expect_test"
        ) from error
    return _listed(config, train, test)


def load(config: Config, fmt: BatchFormat):
    """Return the data set, which lists the files now and reads them batch by batch.

    Raises:
        ConfigError: folders missing or not laid out as expected, or other counts than the options state.
    """
    from prune_lab.datasets.folder_listing import list_splits
    from prune_lab.datasets.stream import StreamDataset

    train, test = list_splits(config)
    return StreamDataset(config, _listed(config, train, test), train, test, fmt)


def content(config: Config) -> str:
    """Return the data set's `content`, from the names and sizes of the files.

    Raises:
        ConfigError: as `load`.
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
