"""Options of image folders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from prune_lab.datasets.base import CommonConfig
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import Count, FilePath, Index, Range


@dataclass(frozen=True)
class Config(CommonConfig):
    """Options of conf/dataset/imagefolder.yaml, imagenet.yaml and tiny_imagenet.yaml."""

    root: FilePath
    test_folder: str | None
    """null: test where there is one, otherwise val."""
    num_classes: Count | None
    """null: the number of folders."""
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
    """Folder of these copies."""

    def check(self, path: str) -> None:
        super().check(path)
        least = round(self.image_size / self.crop_ratio)
        if self.cached_side is not None and self.cached_side < least:
            raise UserError(
                f"{path}.cached_side must be null or at least {least} (image_size / crop_ratio, the side that "
                f"evaluation resizes to), got {self.cached_side}"
            )
