"""Locks between processes, also where the file system has none."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.files import read_bytes

STALE_S = 60.0
"""an owner without a heartbeat for so long counts as dead"""
BEAT_S = 10.0
"""seconds between heartbeats"""

_TRIES = 3
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_FREE = b"free\n"

_held: list[TextIO] = []
"""lock files that end with this very process"""


@contextlib.contextmanager
def lock(
    path: Path,
    *,
    what: str,
    report: Callable[[str], None],
    poll: Callable[[], None] = lambda: time.sleep(0.5),
    option: str = "output_dir",
    with_children: bool = False,
) -> Iterator[None]:
    """Hold the lock file `path`; it is released when the process ends, however that happens.

    Where the file system has no locks (NFS without a lock service, Lustre without `flock`), heartbeats replace them.

    Args:
        what: named in the message while another process holds it.
        poll: called repeatedly while waiting; should let some time pass, may raise to give up.
        option: name of the option that locates the file, for errors.
        with_children: processes forked meanwhile hold it too, because they use what it protects; others must call
            `leave_to_parent`.

    Raises:
        UserError: the directory cannot be created or written, or the lock cannot be requested.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
    except OSError as error:
        raise UserError(f"{option}: cannot write {path}: {error.strerror}") from error
    with file:
        claim, waited = _claim(file, path, report), False
        while not _attempt(claim, path, option):
            if not waited:
                report(f"waiting for another process that is working on {what}")
            waited = True
            poll()
        if not with_children:
            _held.append(file)
        try:
            yield
        finally:
            if not with_children:
                _held.remove(file)
            claim.release()


def _claim(file: TextIO, path: Path, report: Callable[[str], None]) -> SystemLock | HeartbeatLock:
    """Return the kind of lock that the file system has."""
    claim = SystemLock(file)
    for _ in range(_TRIES):  # a lock service that restarts has none for a moment
        try:
            claim.attempt()  # if it succeeds now, the next attempt does too
            return claim
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                return claim
            reason = error.strerror
        time.sleep(1)
    report(f"{path.parent} is on a file system without locks ({reason}); heartbeats stand in for them")
    return HeartbeatLock(path)


def leave_to_parent() -> None:
    """Drop, in a forked process, the locks that are the parent's alone, so that they are released when it dies."""
    for file in _held:
        os.close(file.fileno())
    _held.clear()


def is_held(path: Path) -> bool:
    """Return whether a process holds the lock file `path`, which may be on a read-only file system."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: possible on a read-only file
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return HeartbeatLock(path).is_held()
    return False


def _attempt(claim: SystemLock | HeartbeatLock, path: Path, option: str) -> bool:
    try:
        return claim.attempt()
    except OSError as error:
        raise UserError(f"{option}: cannot lock {path}: {error.strerror}") from error


class SystemLock:
    """A lock that the kernel keeps for an open file."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def attempt(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)


class HeartbeatLock:
    """A lock that needs only one thing of the file system: that a new file is created by one process only.

    The files PATH.1, PATH.2, ... belong to the lock's owners in turn; the one with the highest number counts. Its owner
    changes it every few seconds and writes `free` into it at the end. A waiter that finds it free, or unchanged for
    `STALE_S` by its own clock (clocks of machines differ), creates the next number. Of several only one can. An owner
    deletes the numbers below its own and never its own, so that no number is ever given twice. A waiter whose judgement
    is out of date finds its number taken; or, if that was deleted, it finds higher numbers.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, bytes] | None = None
        self._since = self._looked = 0.0
        self._number = 0
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None

    def attempt(self) -> bool:
        """Return whether this process is the owner now; to be called repeatedly."""
        number = max(self._numbers(), default=0)
        if number and not self._is_over(number):
            return False
        try:
            descriptor = os.open(self._file(number + 1), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        if max(self._numbers()) > number + 1:
            os.close(descriptor)
            return False
        self._number = number + 1
        self._remove_older()
        self._write(descriptor, self._line(0))
        self._heart = threading.Thread(target=self._beat, args=[descriptor], daemon=True, name="lock")
        self._heart.start()
        return True

    def release(self) -> None:
        self._ended.set()
        if self._heart is not None:
            self._heart.join()

    def is_held(self) -> bool:
        """Return whether there is an owner that has not finished; one that was killed counts until it is replaced."""
        number = max(self._numbers(), default=0)
        try:
            return number > 0 and not read_bytes(self._file(number)).startswith(_FREE)
        except FileNotFoundError:  # the next owner has deleted it
            return True

    def _is_over(self, number: int) -> bool:
        """Return whether the owner has finished, or has been silent for as long as this process has watched."""
        try:
            content = self._file(number).read_bytes()
        except OSError:  # deleted by the next owner, or replaced while it was read
            return False
        if content.startswith(_FREE):
            return True
        now = time.monotonic()
        # A process that could not look, because it or the server was suspended, has observed no silence.
        if self._seen != (number, content) or now - self._looked > BEAT_S:
            self._seen, self._since = (number, content), now
        self._looked = now
        return now - self._since > STALE_S

    def _beat(self, descriptor: int) -> None:
        """Change the file until the end.

        An owner that was suspended may find itself replaced. Its process is then killed, because its writes would
        overwrite those of its successor.
        """
        beats = 0
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a server that does not answer now may answer the next beat
                if max(self._numbers(), default=self._number) > self._number:
                    print(f"prune-lab: error: {self._path} was taken over by another process while this one stood "
                          "still; it ends here", file=sys.stderr, flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)
                beats += 1
                self._write(descriptor, self._line(beats))
        with contextlib.suppress(OSError):
            self._write(descriptor, _FREE)
        os.close(descriptor)

    @staticmethod
    def _write(descriptor: int, content: bytes) -> None:
        os.pwrite(descriptor, content, 0)
        os.fsync(descriptor)

    @staticmethod
    def _line(beats: int) -> bytes:
        return f"{socket.gethostname()} {os.getpid()} {beats}\n".encode()

    def _file(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")

    def _numbers(self) -> list[int]:
        endings = (path.name.rpartition(".")[2] for path in self._path.parent.glob(f"{self._path.name}.*"))
        return [int(ending) for ending in endings if ending.isdigit()]

    def _remove_older(self) -> None:
        for number in self._numbers():
            if number < self._number:
                self._file(number).unlink(missing_ok=True)
