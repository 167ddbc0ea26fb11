"""Files of tensors that are written whole or not at all, and checked when read."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_DIGEST_BYTES = 32


class DamagedFile(Exception):
    """The file ends early or its content does not match its checksum."""


class SaveError(OSError):
    """Nothing new could be written, for example on a full disk; older files are untouched."""


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` to `path` under a temporary name, then rename; readers see the old or the new file.

    Raises:
        SaveError: the disk refused; the temporary file is removed and `path` is as before.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(hashlib.sha256(payload).digest())
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SaveError(error.errno, f"cannot write {path}: {error.strerror}") from error


def load(path: Path) -> dict[str, Any]:
    """Return the state saved at `path`, tensors on the CPU.

    Raises:
        FileNotFoundError: no such file.
        DamagedFile: truncated or altered.
    """
    content = path.read_bytes()
    payload = memoryview(content)[_DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != content[:_DIGEST_BYTES]:
        raise DamagedFile(f"{path} is damaged (checksum mismatch)")
    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)


class CheckpointPair:
    """The newest checkpoint of a phase and the one before it."""

    def __init__(self, directory: Path, report: Callable[[str], None]) -> None:
        self.newest = directory / "checkpoint.pt"
        self.previous = directory / "checkpoint.previous.pt"
        self._report = report

    def save(self, state: dict[str, Any]) -> None:
        """Keep the newest as previous, then write. A crash in between leaves `previous` to be found by `load`."""
        staged = self.newest.with_name("checkpoint.next.pt")
        save(state, staged)
        if self.newest.exists():
            os.replace(self.newest, self.previous)
        os.replace(staged, self.newest)

    def load(self) -> dict[str, Any] | None:
        """Return the newest intact checkpoint, or None; a damaged one is reported and passed over."""
        for path in (self.newest, self.previous):
            try:
                return load(path)
            except FileNotFoundError:
                continue
            except DamagedFile as error:
                self._report(f"{error}; the one before it is used")
        return None

    def last_good(self) -> Path | None:
        return next((path for path in (self.newest, self.previous) if path.exists()), None)

    def remove(self) -> None:
        for path in (self.newest, self.previous):
            path.unlink(missing_ok=True)
