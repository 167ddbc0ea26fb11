"""Encoded text on disk: written once and atomically, checked when it is read, mapped into memory."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prune_lab.datasets.cache import locked, replaced, source_key
from prune_lab.datasets.in_memory import hash_arrays
from prune_lab.datasets.text_files import SPLITS, as_bytes, as_words, read_splits
from prune_lab.foundations.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedText:
    """Symbols of each split, by number."""

    symbols: dict[str, np.ndarray]
    """split -> uint8 or int32 [symbols], mapped into memory"""
    num_symbols: int
    """size of the vocabulary"""
    content_hash: str


def cached(source: Path, cache_dir: Path, *, unit: str) -> EncodedText:
    """Return the text of `source`, encoded only if `cache_dir` has no sound copy.

    Args:
        unit: byte or word.

    Raises:
        UserError: no text there, or `cache_dir` cannot be written.
    """
    if not source.exists():
        read_splits(source)  # says what is missing
    entry = cache_dir / f"text-{unit}-{source_key(source)}"
    with locked(entry):
        text = _read(entry)
        if text is None:
            log.info("encoding %s once into %s", source, entry)
            _write(entry, source, unit)
            text = _read(entry)
    if text is None:
        raise UserError(f"dataset.cache_dir={cache_dir}: {entry.name} differs from what was just written")
    return text


def _write(entry: Path, source: Path, unit: str) -> None:
    splits = read_splits(source)
    symbols, vocabulary = (as_bytes(splits), None) if unit == "byte" else as_words(splits)
    hashes = {split: hash_arrays(symbols[split]) for split in SPLITS}
    with replaced(entry) as folder:
        for split in SPLITS:
            np.save(folder / f"{split}.npy", symbols[split])
        (folder / "meta.json").write_text(json.dumps({"vocabulary": vocabulary, "sha256": hashes}))


def _read(entry: Path) -> EncodedText | None:
    """Return the text, or None after a note if the entry is missing or damaged."""
    if not entry.exists():
        return None
    try:
        meta = json.loads((entry / "meta.json").read_text())
        symbols = {split: np.load(entry / f"{split}.npy", mmap_mode="r", allow_pickle=False) for split in SPLITS}
        is_sound = all(hash_arrays(symbols[split]) == meta["sha256"][split] for split in SPLITS)
        vocabulary = meta["vocabulary"]
        content = hashlib.sha256(json.dumps([meta["sha256"], vocabulary], sort_keys=True).encode()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        is_sound = False
    if not is_sound:
        log.warning("the cached text in %s is damaged; encoding again", entry)
        return None
    return EncodedText(symbols, 256 if vocabulary is None else len(vocabulary), content)
