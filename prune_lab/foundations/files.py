"""Files that are written whole or not at all, on local disks and over a network. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


class SaveError(OSError):
    """Nothing new could be written, for example on a full disk; older files are intact."""


def write_file(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Replace `path` by what `fill` writes, under a temporary name and a rename; readers see the old or the new file.

    Args:
        fill: writes the content to an open file, which may be rewound.

    Raises:
        SaveError: the disk refused; the temporary file is removed and `path` is as before.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        move(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise SaveError(error.errno, f"cannot write {path}: {error.strerror}") from error


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Replace `path` by `content` (see `write_file`)."""
    write_file(path, lambda file: file.write(content))


def move(source: Path, target: Path) -> None:
    """Rename `source` to `target`, which is replaced if it exists.

    When an NFS reply is lost, the client repeats the request and the server finds nothing to rename. That error is
    ignored if `target` is the very file that `source` was.

    Raises:
        OSError: not renamed.
    """
    number = os.stat(source).st_ino
    try:
        os.replace(source, target)
    except FileNotFoundError:
        with open(target, "rb") as file:  # opening reaches the server; a lookup may only reach a cache
            if os.fstat(file.fileno()).st_ino != number:
                raise


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` survive a power cut; does nothing where the file system does not support it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def read_bytes(path: Path) -> bytes:
    """Return the content of a file. One that another machine replaces meanwhile is read once more.

    Raises:
        FileNotFoundError: no such file.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno not in (errno.ESTALE, errno.ENOENT):
            raise
        return path.read_bytes()


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
    return json.loads(read_bytes(path).decode("utf-8"))


def jsonable(value: Any) -> Any:
    """Return `value` as containers, strings and numbers that JSON can hold.

    NaN and infinities become None: JSON has no such numbers, and a reader must not fail on them. Numbers with an
    `item()` method (NumPy, torch) become Python numbers, paths become strings.

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
        ValueError: the file is not JSON or not an object; the message begins with `path`.
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
