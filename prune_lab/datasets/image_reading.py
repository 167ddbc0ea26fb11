"""Which files of a data set count as images, and messages about files that do not or cannot be read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence

from PIL import Image

_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""formats that Pillow lists but does not decode by itself"""


def _suffixes() -> frozenset[str]:
    Image.init()
    readable = set(Image.OPEN) - _NOT_DECODED
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in readable)


IMAGE_SUFFIXES = _suffixes()
"""endings of image files, lower case: all that Pillow reads here"""
HIDDEN = "hidden"
_NUM_SHOWN = 5


class UnreadableImage(Exception):
    """A file is missing, broken, or has pixels that are not colours; the message names it in one line."""


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is not part of a data set: a copy or cache of another program."""
    return name.startswith(".")


def why_left_out(name: str) -> str | None:
    """Return None for the name of an image file, otherwise the kind of file."""
    if is_hidden(name):
        return HIDDEN
    suffix = os.path.splitext(name)[1].lower()  # pathlib would take half a minute for ImageNet's names
    return None if suffix in IMAGE_SUFFIXES else suffix or "without an ending"


def left_out_line(counts: Mapping[str, Counter[str]]) -> str:
    """Return one line that counts what was left out of each split, "" if nothing was."""
    parts = [
        f"of {split}: {', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))}"
        for split, kinds in counts.items()
        if kinds
    ]
    return f"left out, because they are hidden or no images, {'; '.join(parts)}" if parts else ""


def some(names: Sequence[str]) -> str:
    """Return the first names on one line, and the number of the rest."""
    shown = ", ".join(names[:_NUM_SHOWN])
    return shown if len(names) <= _NUM_SHOWN else f"{shown} and {len(names) - _NUM_SHOWN} more"


def reason(error: Exception) -> str:
    """Return an image reader's error on one line, with its type if the message alone explains little (KeyError)."""
    text = " ".join(str(error).split())
    is_sentence = isinstance(error, (OSError, SyntaxError, ValueError, Image.DecompressionBombError))
    return text if text and is_sentence else f"{type(error).__name__} {text}".strip()


def unreadable(name: object, error: UnreadableImage) -> str:
    """Return one line that names the broken file and the fault."""
    return f"{name} is not a readable image: {error}"
