"""Small images from a folder or tar laid out as train/CLASS/*, test/CLASS/*, decoded into arrays."""

from __future__ import annotations

import io
import lzma
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from prune_lab.datasets.image_crops import read_rgb
from prune_lab.datasets.image_reading import (
    HIDDEN,
    UnreadableImage,
    is_hidden,
    left_out_line,
    some,
    unreadable,
    why_left_out,
)
from prune_lab.foundations.errors import UserError

LAYOUT = "train/CLASS/*.jpg|png and test/CLASS/*.jpg|png"


def decode_folder_or_tar(source: Path, *, image_size: int) -> dict[str, Any]:
    """Return {"classes": names, "train_images": uint8 [N, S, S, 3], "train_labels": int64 [N], "test_...": ...,
    "note": what was left out}.

    Args:
        source: folder, or tar (plain, gz, xz, bz2), whose entries end in train|test/CLASS/FILE. Classes are
            numbered in the order of their sorted names; images are sorted by class and file name.
        image_size: the height and width S that every image must have.

    Raises:
        UserError: a split without images, splits with different classes, a truncated tar, or a broken image; the
            message names the file.
    """
    left_out: dict[str, Counter[str]] = {"train": Counter(), "test": Counter()}
    entries = _folder_entries(source, left_out) if source.is_dir() else _tar_entries(source, left_out)
    splits: dict[str, dict[tuple[str, str], bytes]] = {"train": {}, "test": {}}
    for split, class_name, file_name, content in entries:
        splits[split][class_name, file_name] = content
    classes = _same_classes(source, splits)
    decoded: dict[str, Any] = {"classes": classes, "note": left_out_line(left_out)}
    for split, contents in splits.items():
        names = sorted(contents)
        images = np.empty((len(names), image_size, image_size, 3), dtype=np.uint8)
        for i, name in enumerate(names):
            images[i] = _decode(contents[name], f"{source}: {split}/{'/'.join(name)}", image_size)
        decoded[f"{split}_images"] = images
        decoded[f"{split}_labels"] = np.array([classes.index(class_name) for class_name, _ in names], dtype=np.int64)
    return decoded


def _decode(content: bytes, name: str, image_size: int) -> np.ndarray:
    try:
        pixels = np.asarray(read_rgb(io.BytesIO(content)))
    except UnreadableImage as error:
        raise UserError(unreadable(name, error)) from error
    if pixels.shape[:2] != (image_size, image_size):
        height, width = pixels.shape[:2]
        raise UserError(f"{name} must be {image_size}x{image_size} pixels (dataset.image_size), got {width}x{height}")
    return pixels


def _same_classes(source: Path, splits: dict[str, dict[tuple[str, str], bytes]]) -> list[str]:
    """Return the sorted class names, which must be the same in both splits."""
    train, test = ({class_name for class_name, _ in splits[name]} for name in ("train", "test"))
    if not train or train != test:
        lacks = {"train": test - train, "test": train - test}
        missing = "; ".join(f"{split} lacks {some(sorted(names))}" for split, names in lacks.items() if names)
        raise UserError(
            f"{source} must hold the same classes in train and test, got {len(train)} classes in train and "
            f"{len(test)} in test{missing and f' ({missing})'}; expected layout: {LAYOUT}, and a tar that is not "
            "cut short"
        )
    return sorted(train)


def _split_name(path: str, left_out: dict[str, Counter[str]]) -> tuple[str, str, str] | None:
    """Return (split, class, file) if `path` ends that way, None for anything else in the archive."""
    *_, split, class_name, file_name = ("", "", *path.split("/"))
    if split not in left_out:
        return None
    reason = HIDDEN if is_hidden(class_name) else why_left_out(file_name)
    if reason is not None:
        left_out[split][reason] += 1
        return None
    return split, class_name, file_name


def _folder_entries(source: Path, left_out: dict[str, Counter[str]]) -> Iterator[tuple[str, str, str, bytes]]:
    for split in ("train", "test"):
        for path in sorted((source / split).glob("*/*")):
            name = _split_name(path.as_posix(), left_out) if path.is_file() else None
            if name is not None:
                yield *name, path.read_bytes()


def _tar_entries(source: Path, left_out: dict[str, Counter[str]]) -> Iterator[tuple[str, str, str, bytes]]:
    # "r|*" reads the archive once from front to back; seeking in an xz stream would decompress it again.
    try:
        with tarfile.open(source, "r|*") as archive:
            for member in archive:
                name = _split_name(member.name, left_out) if member.isfile() else None
                file = None if name is None else archive.extractfile(member)
                if name is not None and file is not None:
                    yield *name, file.read()
    except (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{source} is damaged or no tar of images ({error}); expected layout: {LAYOUT}") from error
