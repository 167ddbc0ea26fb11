"""Files of tensors that are written whole or not at all, and checked when read."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from prune_lab.foundations.files import SaveError, move, read_bytes, sync_directory, write_file

__all__ = ["CheckpointPair", "DamagedFile", "SaveError", "load", "save"]

_DIGEST_BYTES = 32


class DamagedFile(Exception):
    """The file ends early or its content does not match its checksum."""


class _Hashing:
    """A file that is hashed as it is written, so that the content is nowhere in memory as a whole."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.hash = file, hashlib.sha256()
        self.refused: OSError | None = None

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.refused = error
            raise

    def flush(self) -> None:
        self._file.flush()


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` to `path` under a temporary name, then rename; readers see the old or the new file.

    Raises:
        SaveError: the disk refused; the temporary file is removed and `path` is as before.
    """

    def fill(file: BinaryIO) -> None:
        file.write(bytes(_DIGEST_BYTES))
        hashing = _Hashing(file)
        try:
            torch.save(state, hashing)  # type: ignore[arg-type]  # it uses no more of a file than write and flush
        except RuntimeError as error:  # torch reports a disk error as one about positions
            raise hashing.refused or error from None
        file.seek(0)
        file.write(hashing.hash.digest())

    write_file(path, fill)


def load(path: Path) -> dict[str, Any]:
    """Return the state saved at `path`, tensors on the CPU.

    Raises:
        FileNotFoundError: no such file.
        DamagedFile: truncated or altered.
    """
    content = read_bytes(path)
    payload = memoryview(content)[_DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != content[:_DIGEST_BYTES]:
        raise DamagedFile(f"{path} is damaged (checksum mismatch)")
    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)


class CheckpointPair:
    """The newest checkpoint of a phase and the one before it."""

    def __init__(self, directory: Path, report: Callable[[str], None]) -> None:
        self.newest = directory / "checkpoint.pt"
        self.previous = directory / "checkpoint.previous.pt"
        self._staged = directory / "checkpoint.next.pt"
        self._report = report

    def save(self, state: dict[str, Any]) -> None:
        """Write, then make the newest the previous one. At every moment `load` finds a whole checkpoint.

        Raises:
            SaveError: the disk refused; the existing checkpoints are as before.
        """
        save(state, self._staged)
        try:
            if self.newest.exists():
                move(self.newest, self.previous)
            move(self._staged, self.newest)
            sync_directory(self.newest.parent)
        except OSError as error:
            raise SaveError(error.errno, f"cannot write {self.newest}: {error.strerror}") from error

    def _by_age(self) -> tuple[Path, Path, Path]:
        """Newest first: a leftover staged file was written last, by a process killed before its renames."""
        return self._staged, self.newest, self.previous

    def load(self) -> dict[str, Any] | None:
        """Return the newest intact checkpoint, or None; a damaged one is reported and skipped."""
        found_damage = False
        for path in self._by_age():
            try:
                return load(path)
            except FileNotFoundError:
                continue
            except DamagedFile as error:
                self._report(f"{error}; the one before it is used")
                path.unlink()  # it must neither become the previous one nor be reported as good
                found_damage = True
        if found_damage:
            self._report("no checkpoint is left; the phase begins again")
        return None

    def last_good(self) -> Path | None:
        return next((path for path in self._by_age() if path.exists()), None)

    def remove(self) -> None:
        for path in self._by_age():
            path.unlink(missing_ok=True)
