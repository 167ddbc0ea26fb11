"""CIFAR-10 and CIFAR-100 from the published files or from a folder (or tar) of images, decoded once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from prune_lab.datasets.base import BatchFormat, Dataset, DatasetInfo, InMemoryConfig
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import Count, FilePath

if TYPE_CHECKING:
    from prune_lab.datasets.cache import Decoded
    from prune_lab.datasets.in_memory import ImageArrays


@dataclass(frozen=True)
class Config(InMemoryConfig):
    """Options of conf/dataset/cifar10.yaml and cifar100.yaml."""

    archive: Literal["cifar10", "cifar100"]
    """The archive whose URL and checksums apply."""
    root: FilePath
    cache_dir: FilePath
    download: bool
    num_classes: Count
    num_train: Count
    num_test: Count


def describe(config: Config) -> DatasetInfo:
    """Return the sizes that the options state; `load` checks them against the images."""
    return config.info(
        num_classes=config.num_classes, num_train_images=config.num_train, num_test_images=config.num_test
    )


def load(config: Config, fmt: BatchFormat) -> Dataset:
    """Return the data set; raises as `read`."""
    from prune_lab.datasets.in_memory import InMemoryDataset

    return InMemoryDataset(config, read(config), fmt)


def read(config: Config) -> ImageArrays:
    """Return the images; the first call decodes them into `cache_dir`, later ones map them into memory.

    Raises:
        UserError: nothing at `root`, or files that are incomplete, damaged or not as published.
    """
    from prune_lab.datasets import cache, cifar_files, image_files

    source = cifar_files.find_source(config.root, config.archive, download=config.download)

    def decode() -> Decoded:
        if cifar_files.is_published(source, config.archive):
            decoded = cifar_files.read_published(source, config.archive)
        else:
            decoded = image_files.decode_folder_or_tar(source, image_size=config.image_size)
        _check_counts(config, decoded, source)
        return decoded

    arrays = cache.cached(source, Path(config.cache_dir), name=config.archive, decode=decode)
    return replace(arrays, fixed=cifar_files.is_published(source, config.archive))


def content(config: Config) -> str | None:
    """Return the data set's `content`; the user's own images are decoded if they have not been.

    Raises:
        UserError: as `read`; nothing is downloaded.
    """
    from prune_lab.datasets import cifar_files, in_memory

    source = cifar_files.find_source(config.root, config.archive, download=False)
    if cifar_files.is_published(source, config.archive):
        return None
    return in_memory.fingerprint(config, read(config))


def _check_counts(config: Config, decoded: Decoded, source: Path) -> None:
    found = {
        "num_classes": len(decoded["classes"]),
        "num_train": len(decoded["train_labels"]),
        "num_test": len(decoded["test_labels"]),
    }
    for option, count in found.items():
        expected = getattr(config, option)
        if count != expected:
            raise UserError(
                f"{source} holds {option} = {count}, but dataset.{option} is {expected}; "
                "expected layout: train/CLASS/*.jpg|png and test/CLASS/*.jpg|png, and a tar that is not cut short"
            )
    size = decoded["train_images"].shape[1]
    if size != config.image_size:
        raise UserError(f"{source} holds images of {size} pixels, but dataset.image_size is {config.image_size}")
