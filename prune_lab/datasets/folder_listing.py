"""The image files of a folder data set, checked against the expected layout and counts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prune_lab.datasets.image_reading import is_hidden, left_out_line, some, why_left_out
from prune_lab.foundations.errors import UserError

if TYPE_CHECKING:
    from prune_lab.datasets.options import Config

ANNOTATIONS = "val_annotations.txt"


@dataclass(frozen=True)
class Listing:
    """Images of one split, sorted by class and path."""

    folder: Path
    classes: list[str]
    paths: np.ndarray
    """Byte strings [N], relative to `folder`. One flat array: worker processes share its memory, whereas reference
    counting copies a list of a million strings piece by piece."""
    labels: np.ndarray
    """int64 [N]."""
    sizes: np.ndarray
    """File sizes in bytes, int64 [N]."""
    modified: np.ndarray
    """Modification times in nanoseconds, int64 [N]."""
    left_out: Counter[str]
    """Number of files and hidden folders of each kind that are not images of the data set."""

    def path(self, index: int) -> Path:
        """Return the path of image `index`."""
        return self.folder / os.fsdecode(self.paths[index])


def list_splits(config: Config) -> tuple[Listing, Listing]:
    """Return the training and test images.

    Raises:
        UserError: no such folder, images without class folders, an empty class, a class missing from
            training, or counts that differ from those in `config`.
    """
    root = Path(config.root)
    if not (root / "train").is_dir():
        what = "is a file (unpack it first)" if root.is_file() else "holds no folder train"
        raise UserError(
            f"dataset.root={config.root} {what}; expected layout: train/CLASS/*.jpg|png and "
            f"{config.test_folder or 'val'}/CLASS/*.jpg|png, then dataset.root=/path/to/folder"
        )
    classes = sorted(entry.name for entry in os.scandir(root / "train") if entry.is_dir() and not is_hidden(entry.name))
    train = _list_split(root / "train", classes)
    test = _list_split(_test_folder(config, root), classes)
    _check(config, train, test)
    return train, test


def _test_folder(config: Config, root: Path) -> Path:
    names = [config.test_folder] if config.test_folder else ["test", "val"]
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise UserError(f"dataset.root={config.root} holds no folder {' or '.join(names)} (CLASS/*.jpg|png) to test on")


def _list_split(folder: Path, classes: list[str]) -> Listing:
    annotations = folder / ANNOTATIONS
    left_out: Counter[str] = Counter()
    if annotations.is_file():
        found = _annotated(folder, annotations, left_out)
    else:
        found = _by_class_folder(folder, left_out)
    index = {name: i for i, name in enumerate(classes)}
    rows = []
    for class_name, path, stat in found:
        if class_name not in index:
            raise UserError(f"{folder} holds the class {class_name}, which {folder.parent / 'train'} does not")
        rows.append((index[class_name], os.fsencode(path), stat.st_size, stat.st_mtime_ns))
    rows.sort()
    chosen, paths, *numbers = zip(*rows, strict=True) if rows else ((), (), (), ())
    labels, sizes, modified = (np.array(values, dtype=np.int64) for values in (chosen, *numbers))
    return Listing(folder, classes, np.array(paths, dtype=np.bytes_), labels, sizes, modified, left_out)


def _by_class_folder(folder: Path, left_out: Counter[str]) -> Iterator[tuple[str, str, os.stat_result]]:
    for entry in os.scandir(folder):
        if entry.is_dir() and not is_hidden(entry.name):
            for path, stat in _images_below(entry, left_out, entry.name):
                yield entry.name, path, stat
        elif reason := why_left_out(entry.name):
            left_out[reason] += 1
        else:
            raise UserError(
                f"{folder} holds images without class folders ({entry.name}); "
                f"sort them into {folder}/CLASS/, with the class names of the folder train"
            )


def _images_below(
    folder: str | os.PathLike[str], left_out: Counter[str], place: str = ""
) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the images in `folder` and all folders below; `place` precedes the name of each."""
    for entry in os.scandir(folder):
        # Calling os.path.relpath for every image would take half the time of listing ImageNet.
        path = f"{place}/{entry.name}" if place else entry.name
        if entry.is_dir() and not is_hidden(entry.name):
            yield from _images_below(entry, left_out, path)
        elif reason := why_left_out(entry.name):
            left_out[reason] += 1
        else:
            yield path, entry.stat()


def _annotated(
    folder: Path, annotations: Path, left_out: Counter[str]
) -> Iterator[tuple[str, str, os.stat_result]]:
    """Tiny ImageNet's own layout: images/NAME and a table with NAME and class in its first two columns."""
    class_of = dict(line.split("\t")[:2] for line in annotations.read_text().splitlines() if line.count("\t") >= 1)
    if reason := why_left_out(annotations.name):
        left_out[reason] -= 1  # recognised, so not counted as left out below
    for path, stat in _images_below(folder, left_out):
        name = os.path.basename(path)
        if name not in class_of:
            raise UserError(f"{annotations} does not name the class of {folder / path}")
        yield class_of[name], path, stat


def _check(config: Config, train: Listing, test: Listing) -> None:
    counts = np.bincount(train.labels, minlength=len(train.classes))
    for name, count in zip(train.classes, counts, strict=True):
        if not count:
            raise UserError(f"the class folder {train.folder / name} holds no image")
    if not len(train.labels) or not len(test.labels):
        empty = test if len(train.labels) else train
        raise UserError(f"{empty.folder} holds no image; expected layout: CLASS/*.jpg|png")
    if config.num_classes not in (None, len(train.classes)):
        raise UserError(
            f"{train.folder} holds {len(train.classes)} classes, but dataset.num_classes is {config.num_classes}; "
            f"for this subset: dataset.num_classes={len(train.classes)} dataset.check_counts=false"
        )
    if not config.check_counts:
        return
    for option, listing in (("expect_train", train), ("expect_test", test)):
        expected, found = getattr(config, option), len(listing.labels)
        if expected not in (None, found):
            raise UserError(
                f"{listing.folder} holds {found} images, but dataset.{option} is {expected}; "
                "for a subset: dataset.check_counts=false"
            )
    if untested := _untested(train, test):
        raise UserError(
            f"{test.folder} holds {len(train.classes) - len(untested)} of the {len(train.classes)} classes; "
            f"for a subset: dataset.check_counts=false (no image of {some(untested)})"
        )


def _untested(train: Listing, test: Listing) -> list[str]:
    """Return the names of the classes without a test image."""
    counts = np.bincount(test.labels, minlength=len(train.classes))
    return [name for name, count in zip(train.classes, counts, strict=True) if not count]


def note(train: Listing, test: Listing) -> str:
    """Return one line on what was left out and on classes without test images, "" if there are none."""
    untested = _untested(train, test)
    lines = [
        left_out_line({listing.folder.name: +listing.left_out for listing in (train, test)}),
        f"no test images of {some(untested)}" if untested else "",
    ]
    return "; ".join(filter(None, lines))
