"""Text and JSON files that are written whole or not at all. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any


class SaveError(OSError):
    """Nothing new could be written, for example on a full disk; older files are untouched."""


def write_bytes(path: Path, *parts: bytes | memoryview) -> None:
    """Replace `path` by the joined `parts` under a temporary name and a rename; readers see the old or the new file.

    Raises:
        SaveError: the disk refused; the temporary file is removed and `path` is as before.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise SaveError(error.errno, f"cannot write {path}: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` as UTF-8 (see `write_bytes`)."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON; numbers that are not finite become null (see `jsonable`)."""
    write_text(path, json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON.
    """
    return json.loads(path.read_text(encoding="utf-8"))


def jsonable(value: Any) -> Any:
    """Return `value` as containers, texts and numbers that JSON can hold.

    NaN and infinities become None: JSON has no such numbers, and a reader must not fail on them. Numbers with an
    `item()` method (NumPy, torch) become Python numbers, paths become texts.

    Raises:
        TypeError: a value of any other type.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(entry) for entry in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):
        return jsonable(value.item())
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON: {value!r}")


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; an empty one if there is no such file.

    Raises:
        ValueError: the file is no JSON, or holds something else than an object; the message begins with `path`.
    """
    try:
        content = read_json(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no object")
    return content
