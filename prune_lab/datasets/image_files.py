"""Small images from a folder or tar laid out as train/CLASS/*, test/CLASS/*, decoded into arrays."""

from __future__ import annotations

import io
import lzma
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from prune_lab.schema import ConfigError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
READ_ERRORS = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for missing, truncated and broken files."""
LAYOUT = "train/CLASS/*.jpg|png and test/CLASS/*.jpg|png"


def unreadable(name: object, error: Exception) -> str:
    """Return one line that says which file is broken, and how."""
    return f"{name} is not a readable image: {' '.join(str(error).split())}"


def decode_folder_or_tar(source: Path, *, image_size: int) -> dict:
    """Return {"classes": names, "train_images": uint8 [N, S, S, 3], "train_labels": int64 [N], "test_...": ...}.

    Args:
        source: folder, or tar (plain, gz, xz, bz2), whose entries end in train|test/CLASS/FILE. Classes are
            numbered in the order of their sorted names; images are sorted by class and file name.
        image_size: the height and width S that every image must have.

    Raises:
        ConfigError: no image in one of the splits, different classes in them, a truncated tar, or a broken
            image; the line names the file.
    """
    entries = _folder_entries(source) if source.is_dir() else _tar_entries(source)
    splits: dict[str, dict[tuple[str, str], bytes]] = {"train": {}, "test": {}}
    for split, class_name, file_name, content in entries:
        splits[split][class_name, file_name] = content
    classes, test_classes = (sorted({class_name for class_name, _ in splits[name]}) for name in ("train", "test"))
    if not classes or classes != test_classes:
        raise ConfigError(
            f"{source} must hold the same classes in train and test, got {len(classes)} classes in train and "
            f"{len(test_classes)} in test; expected layout: {LAYOUT}, and a tar that is not cut short"
        )
    decoded = {"classes": classes}
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
        with Image.open(io.BytesIO(content)) as image:
            pixels = np.asarray(image.convert("RGB"))
    except READ_ERRORS as error:
        raise ConfigError(unreadable(name, error)) from error
    if pixels.shape[:2] != (image_size, image_size):
        height, width = pixels.shape[:2]
        raise ConfigError(f"{name} must be {image_size}x{image_size} pixels (dataset.image_size), got {width}x{height}")
    return pixels


def _split_name(path: str) -> tuple[str, str, str] | None:
    """Return (split, class, file) if `path` ends like that, None for anything else in the archive."""
    parts = path.split("/")
    is_image = parts[-1].lower().endswith(IMAGE_SUFFIXES) and not parts[-1].startswith("._")
    return tuple(parts[-3:]) if is_image and len(parts) >= 3 and parts[-3] in ("train", "test") else None


def _folder_entries(source: Path) -> Iterator[tuple[str, str, str, bytes]]:
    for split in ("train", "test"):
        for path in sorted((source / split).glob("*/*")):
            name = _split_name(path.as_posix())
            if name is not None:
                yield *name, path.read_bytes()


def _tar_entries(source: Path) -> Iterator[tuple[str, str, str, bytes]]:
    # "r|*" reads the archive once from front to back; seeking in an xz stream would decompress it again.
    try:
        with tarfile.open(source, "r|*") as archive:
            for member in archive:
                name = _split_name(member.name) if member.isfile() else None
                if name is not None:
                    yield *name, archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise ConfigError(f"{source} is damaged or no tar of images ({error}); expected layout: {LAYOUT}") from error
