"""Cache of decoded images on disk: written atomically, verified on every read, rebuilt when damaged."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from prune_lab.datasets.in_memory import ImageArrays, hash_arrays
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.locks import lock

log = logging.getLogger(__name__)

Decoded = dict[str, Any]
"""{"classes": names, "train_images", "train_labels", "test_images", "test_labels": arrays, "note": text or missing}."""

_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
# Part of every key: raise it when decoding or file format changes.
_FORMAT = 2


def cached(source: Path, cache_dir: Path, *, name: str, decode: Callable[[], Decoded]) -> ImageArrays:
    """Return the arrays of `source`, decoding it only if `cache_dir` has no intact copy.

    Args:
        source: file or folder; its path, sizes and modification times identify the entry.
        name: readable beginning of the entry's folder name.
        decode: called at most once. Processes that need the same entry wait for the first one.

    Raises:
        UserError: `cache_dir` cannot be written, or from `decode`.
    """
    entry = cache_dir / f"{name}-{source_key(source)}"
    with locked(entry):
        arrays = _read(entry)
        if arrays is None:
            log.info("decoding %s once into %s", source, entry)
            _write(entry, decode())
            arrays = _read(entry)
    if arrays is None:
        raise UserError(f"dataset.cache_dir={cache_dir}: {entry.name} differs from what was just written")
    return arrays


def source_key(source: Path) -> str:
    """Return what changes with path, sizes and modification times of a file or folder."""
    digest = hashlib.sha256(f"{_FORMAT} {source.resolve()}".encode())
    paths = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    for path in paths:
        stat = path.stat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def locked(entry: Path) -> AbstractContextManager[None]:
    """Return a context that holds the lock of a cache entry; the lock is released if the process dies.

    Raises:
        UserError: on entering, if the folder of the entry cannot be created or written.
    """
    path, what = entry.with_name(f"{entry.name}.lock"), f"the data of {entry.name}"
    return lock(path, what=what, report=log.info, option="dataset.cache_dir", with_children=True)


@contextmanager
def replaced(entry: Path) -> Iterator[Path]:
    """Yield a temporary folder and rename it to `entry` at the end, so that a killed process leaves no partial entry.

    Leftovers of a killed process are removed first; a failing process removes its own at once.

    Raises:
        UserError: the disk refused.
    """
    unfinished = entry.with_name(entry.name + ".tmp")
    try:
        for leftover in (unfinished, entry):
            shutil.rmtree(leftover, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished
        os.rename(unfinished, entry)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise UserError(f"dataset.cache_dir={entry.parent} cannot be written: {error.strerror}") from error


def _write(entry: Path, decoded: Decoded) -> None:
    with replaced(entry) as folder:
        for name in _ARRAYS:
            np.save(folder / f"{name}.npy", decoded[name])
        described = {"classes": decoded["classes"], "note": decoded.get("note", "")}
        meta = described | {"sha256": {name: hash_arrays(decoded[name]) for name in _ARRAYS}}
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _read(entry: Path) -> ImageArrays | None:
    """Return the arrays (memory-mapped), or None after a note if the entry is missing or damaged."""
    if not entry.exists():
        return None
    try:
        meta = json.loads((entry / "meta.json").read_text())
        arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
        damaged = [name for name in _ARRAYS if hash_arrays(arrays[name]) != meta["sha256"][name]]
        content = hashlib.sha256(json.dumps(meta["sha256"], sort_keys=True).encode()).hexdigest()
        num_classes, note = len(meta["classes"]), meta["note"]
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        damaged = [str(error)]
    if damaged:
        log.warning("the cached images in %s are damaged (%s); decoding again", entry, ", ".join(damaged))
        return None
    images = (arrays[name] for name in _ARRAYS)
    train_images, train_labels, test_images, test_labels = images
    return ImageArrays(train_images, train_labels, test_images, test_labels, num_classes, content, note=note)
